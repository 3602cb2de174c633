//! Tables, goals and the document.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::bench::DOWNTIME;
use super::cases::{Guest, Link, Setting};
use super::run::{Run, Runs};
use crate::compare::table::Table;

/// What may be added to the downtime's overshoot of QEMU alone, beside a round trip.
const SLACK_MS: f64 = 20.0;
/// An estimate is to be within this part of what then happens.
const NEAR: f64 = 0.25;

/// What else was tried, and what bounds the figures; goes into the document as it is.
const REMARKS: &str = include_str!("remarks.md");

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
        // Where all settings face the same guest it says nothing.
        let rewrites = self.guest == Guest::Writes;
        let mut head = vec![
            "median",
            "seconds",
            "downtime ms",
            "MB on the wire",
            "CPU s, machine",
            "CPU s, agents",
            "agents' memory MiB",
        ];
        head.extend(rewrites.then_some("rewrites a second"));
        head.push("remarks");
        let mut table = Table::new(&head);
        for (setting, runs) in &self.results {
            let figure = |figure: fn(&Run) -> f64| runs.median(figure).unwrap_or_default();
            let seconds = figure(|run| run.seconds);
            let anon = runs.anon().map(|[a, b]| format!("{} / {}", a >> 20, b >> 20));
            let mut line: Vec<String> = vec![
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
            ];
            line.extend(rewrites.then(|| format!("{:.0}", figure(|run| run.rewrites))));
            line.push(runs.remark());
            table.line(line);
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
        for ours in [Setting::V3Mapped, Setting::V3Cache, Setting::V3Direct] {
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
            if self.guest == Guest::Dense {
                // Nothing is gained there: what v3 does beside v1 has to cost nothing.
                let v1 = of(Setting::V1, seconds);
                goal(format!("{title}: time beside v1"), beside(v1, seconds), 1.03);
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
        self.goals().into_iter().map(verdict).chain(self.estimates()).collect()
    }

    /// How near `dwcpctl estimate` came.
    fn estimates(&self) -> impl Iterator<Item = String> {
        self.results.iter().filter_map(|(setting, runs)| {
            let time = runs.foretold(|said| said.seconds, |run| run.seconds)?;
            let bytes = runs.foretold(|said| said.wire_bytes, |run| run.wire_bytes as f64)?;
            let verdict = if (time - 1.0).abs() <= NEAR { "met" } else { "MISSED" };
            Some(format!(
                "{}: dwcpctl estimate said {time:.2} x the time that it took and {bytes:.2} x the bytes, aim for the time {:.2} to {:.2}: {verdict}",
                setting.title(),
                1.0 - NEAR,
                1.0 + NEAR
            ))
        })
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
             - *CPU s, machine*: all but the line's own; it holds the emulated guest, which takes most of one core where it works. The kernel counts the machine's in ticks and the line's exactly, so where the cores are mostly idle this comes out too low, or below zero.\n\
             - *agents' memory*: the most of RssAnon, source and destination, over all runs.\n\
             - *rewrites a second*: pages that the write-heavy guest rewrote while it ran at the source; whoever slows it has less to carry.\n\
             - Before each run with mapped RAM `dwcpctl estimate` was asked what it would take; what it said is below each table.\n\
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A case over 200 Mbit/s: of each setting its seconds and the guest's rewrites a second.
    fn case(guest: &str, results: &[(&str, f64, f64)]) -> Case {
        let result = |&(setting, seconds, rewrites): &(&str, f64, f64)| {
            let run = json!({
                "end": "done", "seconds": seconds, "downtime_ms": 50.0, "wire_bytes": 1000, "rewrites": rewrites,
                "machine": 0.0, "agents": 0.0, "others": 0.0, "anon_bytes": null, "said": null
            });
            json!([setting, [run]])
        };
        let results: Vec<_> = results.iter().map(result).collect();
        let case = json!({
            "guest": guest, "link": "m200", "day": "2026-12-01", "load": [0.0, 0.0], "limit": 120, "machine": [],
            "results": results
        });
        serde_json::from_value(case).unwrap()
    }

    #[test]
    fn an_incompressible_guest_is_held_against_v1_where_that_was_measured() {
        let beside_v1 = |results: &[(&str, f64, f64)]| {
            let verdicts = case("dense", results).verdicts().into_iter();
            verdicts.filter(|line| line.contains("beside v1")).collect::<Vec<_>>()
        };
        assert_eq!(
            beside_v1(&[("v1", 20.0, 0.0), ("v3-mapped", 20.4, 0.0), ("v3-cache", 21.0, 0.0)]),
            [
                "agents, v3, mapped RAM: time beside v1: 1.02, aim at most 1.03: met",
                "agents, v3, cache: time beside v1: 1.05, aim at most 1.03: MISSED"
            ]
        );
        assert!(beside_v1(&[("plain", 20.0, 0.0), ("v3-mapped", 20.4, 0.0)]).is_empty());
    }

    #[test]
    fn a_write_heavy_guests_rewrites_are_in_its_table() {
        let results = [("xbzrle", 30.0, 15_000.0), ("v3-mapped", 10.0, 19_000.4)];
        let table = case("writes", &results).table().to_string();
        let lines = table.lines().filter(|line| !line.contains("---"));
        let last: Vec<&str> = lines.map(|line| line.split('|').rev().nth(2).unwrap().trim()).collect();
        assert_eq!(last, ["rewrites a second", "15000", "19000"], "{table}");
        assert!(!case("dense", &results).table().to_string().contains("rewrites"));
    }
}
