//! The table of faults: what may go wrong, what must happen then, and which tests show it. `cargo xtask faults` runs
//! them and prints it.

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FaultRow {
    /// Its short name, by which tests report what they measured.
    pub name: &'static str,
    /// What goes wrong.
    pub fault: &'static str,
    /// What must happen.
    pub expected: &'static str,
    /// How it is shown.
    pub shown: Shown,
}

/// How a row of the table is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// By these tests of the package `dwcp-tests`, by the last parts of their names; each runs with all tests.
    By(&'static [&'static str]),
    /// By tests that take minutes: they run with `--long` only.
    Long(&'static [&'static str]),
    /// By tests of other packages, which `cargo xtask faults` does not run.
    Elsewhere(&'static str),
    /// Not yet, and why.
    Not(&'static str),
}

const KEEPS: &str = "precopy resumes, nothing acknowledged is sent twice, the guest is right";

/// The table.
pub const FAULTS: &[FaultRow] = &[
    FaultRow {
        name: "kill_source_agent",
        fault: "kill -9 of the source agent, at each moment of the handover",
        expected: "before the commit the guest runs on at the source; after it the restarted agent finishes",
        shown: Shown::By(&["a_source_agent_that_dies_at_any_moment"]),
    },
    FaultRow {
        name: "kill_destination_agent",
        fault: "kill -9 of the destination agent, at each moment of the handover",
        expected: "before the receipt the guest stays; after it the restarted agent asks and goes on",
        shown: Shown::By(&["a_destination_agent_that_dies_at_any_moment"]),
    },
    FaultRow {
        name: "kill_random",
        fault: "kill -9 of any of the four processes at a random moment",
        expected: "one running guest or, where its VMM was killed, none; never two, never a part of one",
        shown: Shown::By(&["any_process_killed_at_random"]),
    },
    FaultRow {
        name: "kill_random_qemu",
        fault: "the same with real QEMUs",
        expected: "the same, and the guest finds no wrong page",
        shown: Shown::Long(&["any_process_killed_at_random_with_qemu"]),
    },
    FaultRow {
        name: "reset",
        fault: "all connections reset in precopy, twice (relay)",
        expected: KEEPS,
        shown: Shown::By(&["v1_goes_on_after_its_link_was_cut", "v3_goes_on_after_its_links_were_cut"]),
    },
    FaultRow {
        name: "kernel_reset",
        fault: "all connections killed by the kernel in precopy (ss -K)",
        expected: KEEPS,
        shown: Shown::Long(&["link_kernel_reset"]),
    },
    FaultRow {
        name: "cut_1s",
        fault: "link dark for 1 s in precopy",
        expected: KEEPS,
        shown: Shown::By(&["a_link_that_is_dark_for_a_second"]),
    },
    FaultRow {
        name: "dark_1s",
        fault: "link dark for 1 s, beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_dark_for_1_s"]),
    },
    FaultRow {
        name: "dark_10s",
        fault: "link dark for 10 s, beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_dark_for_10_s"]),
    },
    FaultRow {
        name: "dark_60s",
        fault: "link dark for 60 s, beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_dark_for_60_s"]),
    },
    FaultRow {
        name: "dark_20min",
        fault: "link dark for 20 min (past TCP's own patience), beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_dark_for_20_min"]),
    },
    FaultRow {
        name: "address_moves",
        fault: "the destination's address goes away for 5 s and comes back",
        expected: KEEPS,
        shown: Shown::Long(&["link_address_goes_and_comes_back"]),
    },
    FaultRow {
        name: "cut_at_switchover",
        fault: "link dark at switchover",
        expected: "after a deadline the guest runs on at the source",
        shown: Shown::By(&["a_link_that_is_dark_at_switchover"]),
    },
    FaultRow {
        name: "receipt_lost",
        fault: "connections reset between receipt and commit: the receipt is lost",
        expected: "it is said again, and the guest moves",
        shown: Shown::By(&["a_lost_receipt"]),
    },
    FaultRow {
        name: "commit_lost",
        fault: "connections reset after the commit: it is lost",
        expected: "it is sent again, and the guest moves",
        shown: Shown::By(&["a_lost_commit"]),
    },
    FaultRow {
        name: "last_word_lost",
        fault: "connections reset after the start: the destination's last word is lost",
        expected: "it is said again; both sides know that the guest moved",
        shown: Shown::By(&["a_lost_last_word"]),
    },
    FaultRow {
        name: "black_hole",
        fault: "black hole in one direction for 6 s, no reset",
        expected: KEEPS,
        shown: Shown::By(&["a_black_hole_in_one_direction"]),
    },
    FaultRow {
        name: "hole_forth",
        fault: "black hole for 10 s towards the destination, beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_black_hole_towards_the_destination"]),
    },
    FaultRow {
        name: "hole_back",
        fault: "black hole for 10 s towards the source, beside plain QEMU",
        expected: KEEPS,
        shown: Shown::Long(&["link_black_hole_towards_the_source"]),
    },
    FaultRow {
        name: "loss_0.1",
        fault: "0.1 % of packets lost, 20 ms, beside plain QEMU",
        expected: "no false abort; the guest is right",
        shown: Shown::Long(&["link_loses_1_packet_of_1000"]),
    },
    FaultRow {
        name: "loss_2",
        fault: "2 % of packets lost, 20 ms, beside plain QEMU",
        expected: "no false abort; the guest is right",
        shown: Shown::Long(&["link_loses_20_packets_of_1000"]),
    },
    FaultRow {
        name: "far",
        fault: "300 ms round trip, beside plain QEMU",
        expected: "no false abort; the guest is right",
        shown: Shown::Long(&["link_of_300_ms"]),
    },
    FaultRow {
        name: "slow",
        fault: "link at 1 kB/s for 20 s, beside plain QEMU",
        expected: "back-pressure; data flows again once the link does",
        shown: Shown::Long(&["link_at_1_kb_a_second"]),
    },
    FaultRow {
        name: "reordering",
        fault: "2 % of packets 3 ms late, out of order, beside plain QEMU",
        expected: "no false abort; the guest is right",
        shown: Shown::Long(&["link_out_of_order"]),
    },
    FaultRow {
        name: "stalled_stream",
        fault: "one of several connections stalls and stays open",
        expected: "its chunks go over the others",
        shown: Shown::By(&["a_stream_that_stalls"]),
    },
    FaultRow {
        name: "vmm_stops_reading",
        fault: "the destination's VMM stops reading",
        expected: "back-pressure and bounded memory; a cancel leaves the guest at the source",
        shown: Shown::By(&["a_vmm_that_stops_reading"]),
    },
    FaultRow {
        name: "disk_full",
        fault: "state folder full in mid-migration",
        expected: "nothing is committed that is not on disk: abort to the source; new migrations are refused",
        shown: Shown::By(&["a_full_disk"]),
    },
    FaultRow {
        name: "disk_read_only",
        fault: "state folder not writable",
        expected: "the agent says so and does not start",
        shown: Shown::By(&["an_agent_that_cannot_write_its_state_says_so_and_ends"]),
    },
    FaultRow {
        name: "fsync_eio",
        fault: "fsync fails (EIO)",
        expected: "as a full disk",
        shown: Shown::By(&["a_disk_that_does_not_sync"]),
    },
    FaultRow {
        name: "torn_journal",
        fault: "the journal's last line is torn",
        expected: "it does not count; the restarted agent goes on from the one before",
        shown: Shown::By(&["a_torn_journal"]),
    },
    FaultRow {
        name: "clock",
        fault: "clock jumps an hour or ten years",
        expected: "deadlines are monotonic",
        shown: Shown::By(&["a_clock_that_jumps"]),
    },
    FaultRow {
        name: "flag_server",
        fault: "flag server down, hanging, lying, flapping",
        expected: "lease rule, hysteresis",
        shown: Shown::Elsewhere("dwcp-flags (state, lease), dwcp-proto (path), dwcp-migrate (switch)"),
    },
    FaultRow {
        name: "descriptors",
        fault: "the destination agent has hardly any file descriptors",
        expected: "refused or carried out, never half; the running agent lives on",
        shown: Shown::By(&["an_agent_that_runs_out_of_descriptors"]),
    },
    FaultRow {
        name: "memory",
        fault: "memory limit (cgroup)",
        expected: "new work is refused, what runs ends or aborts",
        shown: Shown::By(&["an_agent_short_of_memory"]),
    },
    FaultRow {
        name: "qmp_hangs",
        fault: "QMP hangs, at either side",
        expected: "a named end within the time limits, the guest at the source",
        shown: Shown::By(&["a_vmm_that_answers_no_more"]),
    },
    FaultRow {
        name: "qmp_garbage",
        fault: "QMP says unknown events, statuses and garbage",
        expected: "what is unknown is passed over; garbage ends the migration with the guest at the source",
        shown: Shown::By(&["a_vmm_that_talks_nonsense"]),
    },
    FaultRow {
        name: "version_skew",
        fault: "an agent of another version, unknown fields",
        expected: "the lower v3 minor, or a refusal",
        shown: Shown::Elsewhere("dwcp-proto: the choice between versions, and messages with unknown fields"),
    },
    FaultRow {
        name: "cancel",
        fault: "cancel at any moment; the same start twice; two starts of one VM",
        expected: "idempotent by id, the second is refused, the guest is on one side",
        shown: Shown::By(&["a_cancel_at_any_moment"]),
    },
    FaultRow {
        name: "service_stop",
        fault: "stop of either agent's service in mid-migration",
        expected: "the guest stays at the source and outlives the agent; the next migration succeeds",
        shown: Shown::By(&["a_service_that_is_stopped"]),
    },
];

/// A mechanism of the agents that can be switched off, and tests that have to fail without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Without {
    /// Its name in `dwcp_proto::fault::Mechanism`.
    pub mechanism: &'static str,
    /// Tests of the package `dwcp-tests`, by the last parts of their names; each of them has to fail.
    pub tests: &'static [&'static str],
}

/// All mechanisms that can be switched off.
pub const WITHOUT: &[Without] = &[
    Without { mechanism: "chunk_signature", tests: &["sig_forge", "wrong_signer"] },
    Without { mechanism: "payload_digest", tests: &["payload_flip"] },
    Without { mechanism: "chain", tests: &["omit", "reorder"] },
    Without { mechanism: "old_round", tests: &["old_round"] },
    Without { mechanism: "equivocation", tests: &["equivocation"] },
    Without { mechanism: "word_signature", tests: &["forged_word"] },
    Without { mechanism: "receipt", tests: &["forged_receipt"] },
    Without { mechanism: "join_signature", tests: &["v1_hijack"] },
    Without {
        mechanism: "resume",
        tests: &[
            "v1_goes_on_after_its_link_was_cut",
            "v3_goes_on_after_its_links_were_cut",
            "a_lost_receipt",
        ],
    },
    Without { mechanism: "give_up", tests: &["a_black_hole_in_one_direction"] },
    Without { mechanism: "stall", tests: &["a_stream_that_stalls"] },
    Without { mechanism: "say_again", tests: &["a_lost_receipt", "a_lost_commit", "a_lost_last_word"] },
    // (The agents that die at each moment come back as the released program, which goes without nothing.)
    Without { mechanism: "recovery", tests: &["a_torn_journal"] },
    Without { mechanism: "torn_line", tests: &["a_torn_journal"] },
    Without { mechanism: "journal_failure", tests: &["a_full_disk", "a_disk_that_does_not_sync"] },
    Without { mechanism: "switchover_patience", tests: &["a_link_that_is_dark_at_switchover"] },
    Without { mechanism: "back_pressure", tests: &["a_vmm_that_stops_reading"] },
    Without { mechanism: "idempotence", tests: &["a_cancel_at_any_moment"] },
];

/// The variable that names the mechanism which all agents of a test go without.
pub const OFF: &str = "DWCP_OFF";

#[cfg(test)]
mod tests {
    use dwcp_proto::fault::Mechanism;

    use super::*;

    #[test]
    fn each_mechanism_that_can_be_off_has_a_test_that_misses_it() {
        let named: Vec<_> = WITHOUT.iter().map(|without| without.mechanism).collect();
        assert_eq!(named, Mechanism::ALL.map(Mechanism::name));
        assert!(WITHOUT.iter().all(|without| !without.tests.is_empty()));
    }

    #[test]
    fn rows_have_names_of_their_own() {
        for (i, row) in FAULTS.iter().enumerate() {
            assert_eq!(FAULTS.iter().position(|other| other.name == row.name), Some(i), "{}", row.name);
        }
    }
}
