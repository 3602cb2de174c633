//! Tables, goals and the document.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::bench::DOWNTIME;
use super::cases::{Guest, Link, Setting};
use super::run::{Run, Runs};
use crate::compare::table::Table;

/// What may be added to the downtime's overshoot of QEMU alone, beside a round trip.
const SLACK_MS: f64 = 20.0;

/// What else was tried, and what bounds the figures; goes into the document as it is.
const REMARKS: &str = "\
## What bounds it, and what did not pay

- *The cache* of a destination whose RAM cannot be mapped takes 16 MiB and 2.7 % of the guest's RAM. A guest that rewrites several \
times as much in each round finds next to nothing there when it comes round again, whatever is kept: its pages go whole, and it may not \
converge. Give the destination's VMM shared RAM (memfd or file), or expect what QEMU's plain migration does.
- *LZ4 as the cheapest step* when the CPU is what the link waits for: on a busy machine half of the Debian guest's chunks went there, \
and it came to more bytes than QEMU's zstd 1. zstd -1 takes its place.
- *Words taken apart into planes of bytes* before compression, so that the constant bytes of pointers lie together: text and pointers in \
equal parts shrink to 48 % then, but to 24 % as they are (zstd 1, chunks of 512 KiB).
- *Chunks of 1 MiB*, and level 9 instead of 7: a few tenths of a point. From level 1 to 9 there are 3 to 6 points, for 5 to 8 times the CPU.
- A random quarter of the write-heavy guest's pages takes 134 of its 512 MiB whatever is done.
- *The Debian guest on two cores*: its emulation takes one of them all the time. The line is full for the first five seconds of eight; then come \
pages that are copies or zero, for which the destination's agent reads 1.3 GB of RAM again (it must not touch what is zero already), and the line waits for the CPU. \
Of both agents' CPU time (perf, cpu-clock, shared RAM, 2026-11-22) zstd takes 19 % to compress and 6 % to decompress, copying from sockets and RAM 11 %, copying to RAM 4 %, \
switching and waking tasks 14 %, BLAKE3 4 %, fingerprints and their index 3 %, Ed25519 and AES-GCM 4 %. QEMU's own multifd has no second pair of processes in between, and no \
hashes: with zstd 1 its CPU time is half of ours, and where it fills the line only fewer bytes could be faster.
- *Fewer bytes* for that guest: dedup takes a third of its pages away and zstd leaves 24 % of the others. What is left is programs and libraries, of which level 9 takes some 10 % \
more than level 3, for five times the CPU. Windows beyond a chunk were not tried.
- *Fresh memory for each chunk*: giving buffers back to the allocator cost a tenth of the agents' time, most of it in the kernel; they are kept now.
";

/// One guest over one link: all settings, measured in turns.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Case {
    pub(super) guest: Guest,
    pub(super) link: Link,
    pub(super) day: String,
    /// Load average before and after.
    pub(super) load: [f64; 2],
    /// Seconds until a run counted as not done.
    pub(super) limit: u64,
    pub(super) machine: Vec<String>,
    pub(super) results: Vec<(Setting, Runs)>,
}

/// All that is known, of this invocation and of earlier ones.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) cases: Vec<Case>,
}

/// A goal, as far as one case tells.
struct Goal {
    /// What is aimed at.
    words: String,
    /// What was found.
    found: f64,
    /// The most that it may be.
    most: f64,
}

impl Case {
    /// The medians.
    pub(super) fn table(&self) -> Table {
        let head = [
            "median",
            "seconds",
            "downtime ms",
            "MB on the wire",
            "CPU s, machine",
            "CPU s, agents",
            "agents' memory MiB",
            "remarks",
        ];
        let mut table = Table::new(&head);
        for (setting, runs) in &self.results {
            let figure = |figure: fn(&Run) -> f64| runs.median(figure).unwrap_or_default();
            let seconds = figure(|run| run.seconds);
            let anon = runs.anon().map(|[a, b]| format!("{} / {}", a >> 20, b >> 20));
            table.line(vec![
                setting.title().into(),
                if runs.done().count() == 0 { format!("> {seconds:.0}") } else { format!("{seconds:.2}") },
                runs.downtime().map(|ms| format!("{ms:.0}")).unwrap_or_default(),
                format!("{:.1}", figure(|run| run.wire_bytes as f64 / 1e6)),
                format!("{:.1}", figure(|run| run.machine)),
                if setting.path().is_some() {
                    format!("{:.1}", figure(|run| run.agents))
                } else {
                    String::new()
                },
                anon.unwrap_or_default(),
                runs.remark(),
            ]);
        }
        table
    }

    fn runs(&self, setting: Setting) -> Option<&Runs> {
        self.results.iter().find(|(found, _)| *found == setting).map(|(_, runs)| runs)
    }

    /// The least of a figure's medians among QEMU's own settings that were done.
    fn best_native(&self, figure: fn(&Run) -> f64) -> Option<f64> {
        let native =
            self.results.iter().filter(|(setting, runs)| setting.path().is_none() && runs.all_done());
        native.filter_map(|(_, runs)| runs.median(figure)).min_by(f64::total_cmp)
    }

    fn goals(&self) -> Vec<Goal> {
        let seconds: fn(&Run) -> f64 = |run| run.seconds;
        let bytes: fn(&Run) -> f64 = |run| run.wire_bytes as f64;
        let of = |setting, figure: fn(&Run) -> f64| self.runs(setting)?.median(figure);
        let mut goals = Vec::new();
        let mut goal = |words: String, found: Option<f64>, most: f64| {
            goals.extend(found.map(|found| Goal { words, found, most }));
        };
        for ours in [Setting::V3Mapped, Setting::V3Cache] {
            if !self.runs(ours).is_some_and(Runs::all_done) {
                continue;
            }
            let beside = |other: Option<f64>, figure| Some(of(ours, figure)? / other?);
            let title = ours.title();
            match (self.guest, self.link) {
                (Guest::Writes, Link::M200) => {
                    let xbzrle = |figure| of(Setting::Xbzrle, figure);
                    goal(format!("{title}: bytes beside xbzrle"), beside(xbzrle(bytes), bytes), 0.3);
                    goal(format!("{title}: time beside xbzrle"), beside(xbzrle(seconds), seconds), 0.35);
                }
                (Guest::Dense, Link::M200) => {
                    let plain = |figure| of(Setting::Plain, figure);
                    goal(format!("{title}: bytes beside plain"), beside(plain(bytes), bytes), 1.03);
                    goal(format!("{title}: time beside plain"), beside(plain(seconds), seconds), 1.03);
                }
                (Guest::Debian, Link::M200) => {
                    let left = of(ours, Run::part_of_non_zero);
                    goal(format!("{title}: bytes beside all pages that are not zero"), left, 0.2);
                    let native = |figure| self.best_native(figure);
                    goal(
                        format!("{title}: bytes beside QEMU's best setting"),
                        beside(native(bytes), bytes),
                        0.75,
                    );
                    let words = format!("{title}: time beside QEMU's best setting");
                    goal(words, beside(native(seconds), seconds), 0.8);
                }
                (_, Link::G1) => {
                    let words = format!("{title}: time beside QEMU's best setting");
                    goal(words, beside(self.best_native(seconds), seconds), 1.0);
                }
                _ => {}
            }
            let overshoot = |ms: f64| (ms - DOWNTIME.as_secs_f64() * 1e3).max(0.0);
            let native = self.results.iter().filter(|(setting, _)| setting.path().is_none());
            let native = native.filter_map(|(_, runs)| runs.downtime()).map(overshoot).min_by(f64::total_cmp);
            let most = native.unwrap_or_default() + self.link.round_trip().as_secs_f64() * 1e3 + SLACK_MS;
            let found = self.runs(ours).and_then(Runs::downtime).map(overshoot);
            goal(format!("{title}: downtime's overshoot in ms"), found, most);
        }
        goals
    }

    fn verdicts(&self) -> Vec<String> {
        let verdict = |goal: Goal| {
            let verdict = if goal.found <= goal.most { "met" } else { "MISSED" };
            format!("{}: {:.2}, aim at most {:.2}: {verdict}", goal.words, goal.found, goal.most)
        };
        self.goals().into_iter().map(verdict).collect()
    }
}

impl Report {
    /// Takes a case in, in the place of an older one of the same guest and link.
    pub(super) fn put(&mut self, case: Case) {
        self.cases.retain(|old| (old.guest, old.link) != (case.guest, case.link));
        self.cases.push(case);
        let place = |case: &Case| (case.guest as u8, case.link as u8);
        self.cases.sort_by_key(place);
    }

    /// The goals, and whether they were met.
    pub(super) fn verdicts(&self) -> Vec<String> {
        let of = |case: &Case| {
            let name = format!("{} over {}", case.guest.title(), case.link.title());
            case.verdicts().into_iter().map(move |line| format!("{name}: {line}")).collect::<Vec<_>>()
        };
        self.cases.iter().flat_map(of).collect()
    }

    /// docs/compare-wan.md.
    pub(super) fn document(&self) -> String {
        let mut text = format!(
            "# Internet mode beside QEMU's own settings\n\n\
             Made by `cargo xtask compare wan`; make it anew with that. `--guest`, `--link` and `--runs` measure a part, and the \
             rest stays as it was. The figures of each run are in compare-wan.json.\n\n\
             ![seconds and bytes](compare-wan.svg)\n\n\
             A guest that runs, writes and checks its memory (QEMU 10.0 under TCG, one virtual CPU) goes over a line between two \
             network namespaces, which paces, delays and loses packets in both directions. Everybody is asked for a downtime of \
             {} ms, and no bandwidth is limited beside the line. The destination's memory is preallocated. The order turns \
             round with each run; the first of each setting is followed by a check of all of the guest's memory.\n\n\
             - *seconds*: from the first command to the guest's resumption at the destination; *> n*: not done in n seconds, and the \
             other figures are those until then.\n\
             - *downtime*: from the source's `STOP` to the destination's `RESUME`, by QEMU's own stamps, for all alike.\n\
             - *MB on the wire*: 10^6 bytes that the line delivered in both directions, IP headers included.\n\
             - *CPU s, machine*: all but the line's own; it holds the emulated guest, which takes most of one core all the time.\n\
             - *agents' memory*: the most of RssAnon, source and destination, over all runs.\n\
             - xbzrle has a cache of 256 MiB, multifd has two connections. The agents encrypt (TLS), QEMU alone does not.\n",
            DOWNTIME.as_millis()
        );
        for case in &self.cases {
            let runs = case.results.iter().map(|(_, runs)| runs.0.len()).min().unwrap_or(0);
            // Writing to a string cannot fail.
            let _ = write!(
                text,
                "\n## {} over {}\n\n{} of each, {}; load average {:.1} before, {:.1} after; {}.\n\n{}\n",
                capital(case.guest.title()),
                case.link.title(),
                if runs == 1 { "1 run".to_owned() } else { format!("{runs} runs") },
                case.day,
                case.load[0],
                case.load[1],
                case.machine.join(", "),
                case.table()
            );
            case.verdicts().iter().for_each(|line| text.push_str(&format!("- {line}\n")));
        }
        text + "\n" + REMARKS
    }
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}
