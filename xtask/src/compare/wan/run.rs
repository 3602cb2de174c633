//! What one move of a guest came to, and what several of them are summed up as.

use serde::{Deserialize, Serialize};

use crate::compare::table::median;

/// How a move ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum End {
    /// The guest runs at the destination.
    Done,
    /// It did not within the time that a run is given.
    Late,
    /// Somebody gave up, and said this.
    Failed(String),
}

/// One move. Seconds and CPU seconds are from the first command to the guest's resumption, or to the end of the attempt.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Run {
    pub(super) end: End,
    pub(super) seconds: f64,
    /// From the source's last `STOP` to the destination's `RESUME`, by QEMU's own stamps.
    pub(super) downtime_ms: Option<f64>,
    /// What the line delivered, both ways, IP headers included.
    pub(super) wire_bytes: u64,
    /// Pages that the guest rewrote a second while it ran at the source.
    pub(super) rewrites: f64,
    /// The whole machine, without the line itself.
    pub(super) machine: f64,
    /// Both agents.
    pub(super) agents: f64,
    /// Neither agents, nor QEMUs, nor the line; and what the host took.
    pub(super) others: f64,
    /// The most that each agent held of anonymous memory, source and destination, in bytes.
    pub(super) anon_bytes: Option<[u64; 2]>,
    /// What the agents say of it; null without agents.
    pub(super) said: serde_json::Value,
    /// What `dwcpctl estimate` had said before, where it was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) foretold: Option<Foretold>,
}

/// What `dwcpctl estimate` says.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Foretold {
    pub(super) seconds: f64,
    pub(super) downtime_ms: f64,
    pub(super) wire_bytes: f64,
    pub(super) converges: bool,
}

impl Run {
    /// Bytes on the wire beside the guest's pages that were sent and are not zero; more than 1 where the agents do not say.
    pub(super) fn part_of_non_zero(&self) -> f64 {
        let layers = ["unchanged", "dedup", "delta", "whole"];
        let before = |layer: &str| self.said["layers"][layer]["before_bytes"].as_f64().unwrap_or_default();
        let pages: f64 = layers.into_iter().map(before).sum();
        self.wire_bytes as f64 / pages.max(1.0)
    }
}

/// All runs of one setting.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Runs(pub(super) Vec<Run>);

impl Runs {
    /// Those that were done.
    pub(super) fn done(&self) -> impl Iterator<Item = &Run> {
        self.0.iter().filter(|run| run.end == End::Done)
    }

    /// Whether every one of them was done.
    pub(super) fn all_done(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|run| run.end == End::Done)
    }

    /// The median of a figure over the runs that were done, or over all where none was.
    pub(super) fn median(&self, figure: impl Fn(&Run) -> f64) -> Option<f64> {
        let done = median(self.done().map(&figure));
        done.or_else(|| median(self.0.iter().map(&figure)))
    }

    /// The median of what was foretold of a figure beside what it came to; absent where nothing was.
    pub(super) fn foretold(&self, said: fn(&Foretold) -> f64, taken: fn(&Run) -> f64) -> Option<f64> {
        median(self.done().filter_map(|run| Some(said(run.foretold.as_ref()?) / taken(run))))
    }

    /// The median downtime in milliseconds.
    pub(super) fn downtime(&self) -> Option<f64> {
        median(self.done().filter_map(|run| run.downtime_ms))
    }

    /// The most of an agent's anonymous memory, in bytes: source and destination.
    pub(super) fn anon(&self) -> Option<[u64; 2]> {
        let most = |side: usize| self.0.iter().filter_map(|run| Some(run.anon_bytes?[side])).max();
        Some([most(0)?, most(1)?])
    }

    /// How they ended, where not all were done.
    pub(super) fn remark(&self) -> String {
        let late = self.0.iter().filter(|run| run.end == End::Late).count();
        let failed = self.0.iter().filter_map(|run| match &run.end {
            End::Failed(why) => Some(why.as_str()),
            _ => None,
        });
        let failed: Vec<&str> = failed.collect();
        let mut words = Vec::new();
        if late > 0 {
            words.push(format!("{late} of {} not done", self.0.len()));
        }
        if let Some(why) = failed.first() {
            words.push(format!("{} of {} failed: {why}", failed.len(), self.0.len()));
        }
        words.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(end: End, seconds: f64) -> Run {
        Run {
            end,
            seconds,
            downtime_ms: None,
            wire_bytes: 0,
            rewrites: 0.0,
            machine: 0.0,
            agents: 0.0,
            others: 0.0,
            anon_bytes: None,
            said: serde_json::Value::Null,
            foretold: None,
        }
    }

    #[test]
    fn what_was_not_done_is_said_and_does_not_lower_the_median() {
        let runs = Runs(vec![
            run(End::Done, 9.0),
            run(End::Failed("no route".into()), 1.0),
            run(End::Late, 120.0),
            run(End::Done, 7.0),
        ]);
        assert_eq!(runs.median(|run| run.seconds), Some(8.0));
        assert_eq!(runs.remark(), "1 of 4 not done; 1 of 4 failed: no route");
        assert!(!runs.all_done());
        assert_eq!(Runs(vec![run(End::Late, 120.0)]).median(|run| run.seconds), Some(120.0));
        assert_eq!(Runs(vec![run(End::Done, 1.0)]).remark(), "");
    }
}
