//! The handover, checked exhaustively: two agents, two VMMs, a network that loses, doubles and reorders, disks that fail,
//! agents that die at any point with their writes half done, VMMs that die, and operators.
//!
//! Each setup bounds how much of what may happen; within it *every* interleaving is visited. `cargo test --release -p
//! dwcp-proto --test handover_model -- --nocapture` prints how many states that are.

mod model;
mod net;
mod rules;
mod search;
mod world;

use dwcp_proto::handover::Afterwards;
use model::Model;
use search::{Found, search};
use world::{Mutant, Setup};

fn holds(setup: Setup) -> Found {
    match search(&Model::new(setup)) {
        Ok(found) => {
            println!(
                "{}: {} states, {} steps, {} settled, {} with the source as owner",
                setup.name, found.states, found.steps, found.settled, found.source_owns
            );
            found
        }
        Err(flaw) => panic!("{}: {}\n{}", setup.name, flaw.rule, flaw.way.join("\n")),
    }
}

/// Breaks a rule, and wants it found: `rule` is part of what the search must say.
fn found(mutant: Mutant, rule: &str, setup: Setup) {
    match search(&Model::new(Setup { mutant: Some(mutant), ..setup })) {
        Ok(_) => panic!("{mutant:?} was not found"),
        Err(flaw) => {
            assert!(flaw.rule.contains(rule), "{mutant:?}: {}\n{}", flaw.rule, flaw.way.join("\n"));
            println!("{mutant:?}: {} after {} steps", flaw.rule, flaw.way.len());
        }
    }
}

fn setup() -> Setup {
    Setup::default()
}

#[test]
fn without_faults_and_over_a_network_that_loses() {
    holds(setup());
    holds(Setup { name: "a paused guest", guest_ran: false, crashes: [1, 1], ..setup() });
    holds(Setup { name: "losses", lossy: true, deaths: [1, 1], ..setup() });
}

#[test]
fn agents_die_anywhere() {
    holds(Setup { name: "crashes, VMMs at first out of reach", crashes: [1, 1], mute_vmm: true, ..setup() });
    holds(Setup {
        name: "crashes and losses",
        lossy: true,
        crashes: [1, 1],
        cancels: [true, false],
        ..setup()
    });
    holds(Setup { name: "the source crashes twice", crashes: [2, 0], ..setup() });
    holds(Setup { name: "the destination crashes twice", crashes: [0, 2], ..setup() });
}

#[test]
fn disks_fail() {
    holds(Setup { name: "failed writes", failed_writes: [3, 3], ..setup() });
    let source = Setup { crashes: [1, 0], failed_writes: [2, 0], mute_vmm: true, ..setup() };
    holds(Setup { name: "failed writes, the source crashes", ..source });
    let destination = Setup { crashes: [0, 1], failed_writes: [0, 2], mute_vmm: true, ..setup() };
    holds(Setup { name: "failed writes, the destination crashes", ..destination });
}

#[test]
fn vmms_die_and_refuse() {
    holds(Setup { name: "deaths and refusals", deaths: [1, 1], refusals: [2, 2], ..setup() });
    let source = Setup { crashes: [1, 0], deaths: [1, 1], ..setup() };
    holds(Setup { name: "deaths, the source crashes", ..source });
    let destination = Setup { crashes: [0, 1], deaths: [1, 1], refusals: [0, 1], mute_vmm: true, ..setup() };
    holds(Setup { name: "deaths, the destination crashes", ..destination });
    let quit = Setup { deaths: [0, 1], failed_writes: [0, 1], on_abort: Afterwards::Quit, ..setup() };
    holds(Setup { name: "the destination's VMM quits", crashes: [0, 1], ..quit });
}

#[test]
fn operators_resolve() {
    let operator = Setup { operator: [1, 1], ..setup() };
    holds(Setup { name: "operators and deaths", deaths: [1, 1], ..operator });
    holds(Setup { name: "operators and failed writes", failed_writes: [1, 1], ..operator });
    holds(Setup { name: "operators and crashes", crashes: [1, 1], cancels: [true, false], ..operator });
    holds(Setup { name: "false claims", false_claims: true, ..operator });
}

#[test]
fn every_phase_is_visited() {
    let faults = Setup { deaths: [1, 1], failed_writes: [1, 0], refusals: [0, 1], ..setup() };
    let found = holds(Setup { name: "a little of everything", ..faults });
    let source = "preparing migrating delivered source_lost committing committed withdrawing restoring aborted moved lost";
    let destination =
        "arming receiving signing in_doubt starting resuming start_refused dropping dropped moved";
    let all: Vec<_> = source.split(' ').chain(destination.split(' ')).collect();
    assert!(all.iter().all(|phase| found.phases.contains(phase)), "{:?}", found.phases);
}

#[test]
fn every_broken_rule_is_found() {
    let crash = |source, destination| Setup { crashes: [source, destination], ..setup() };
    found(Mutant::CommitBeforeJournal, "I1", crash(1, 0));
    let muted = Setup { failed_writes: [2, 0], mute_vmm: true, ..crash(1, 0) };
    found(Mutant::FailedWriteIsNoCommit, "I1", muted);
    found(Mutant::SourceDeadlineAfterCommit, "I1", setup());
    found(Mutant::DestinationDeadlineStarts, "I1", setup());
    found(Mutant::StartingNotDurable, "I3", Setup { deaths: [0, 1], ..crash(0, 1) });
    found(Mutant::LostSaysNeverRan, "I3", Setup { deaths: [0, 1], ..setup() });
    let withdrawn = Setup { failed_writes: [0, 1], operator: [1, 0], ..crash(0, 1) };
    found(Mutant::UnwrittenPromise, "I3", withdrawn);
    found(Mutant::NoStopWhileIncoming, "I", setup());
    found(Mutant::NoResend, "stuck", Setup { lossy: true, ..setup() });
}
