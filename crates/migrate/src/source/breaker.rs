//! This node's own reasons to leave v3: it takes memory and processor time that v1 does not.
//!
//! A cause trips above its limit and is lifted below [`EASED`] of it; between the two nothing changes, so that it does not flap.

use dwcp_proto::path::Cause;

use crate::config::Limits;
use crate::report::anon_bytes;

/// A cause is lifted only below this part of its limit.
const EASED: f64 = 0.8;
/// Pressure stall information of the whole node: the share of the last ten seconds in which some task waited for a processor.
const PRESSURE: &str = "/proc/pressure/cpu";

/// The limits that this node watches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Breaker {
    memory: Option<u64>,
    cpu_pressure: Option<f64>,
}

/// What was found of one cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Finding {
    /// Above the limit, in words.
    Tripped(String),
    /// Well below it.
    Lifted,
}

impl Breaker {
    pub(crate) fn new(limits: &Limits) -> Self {
        Breaker { memory: limits.memory, cpu_pressure: limits.cpu_pressure.map(f64::from) }
    }

    /// Whether there is anything to watch.
    pub(crate) fn watches(&self) -> bool {
        self.memory.is_some() || self.cpu_pressure.is_some()
    }

    /// Looks at this node now. A cause of which nothing is said stays as it is.
    pub(crate) fn look(&self) -> Vec<(Cause, Finding)> {
        let memory = self.memory.and_then(|limit| {
            let used = anon_bytes();
            let words = || {
                format!(
                    "the agent takes {} MiB of memory, more than [limits] agent_memory allows",
                    used >> 20
                )
            };
            Some((Cause::Memory, judge(used as f64, limit as f64, words)?))
        });
        let cpu = self.cpu_pressure.and_then(|limit| {
            let waits = pressure(&std::fs::read_to_string(PRESSURE).unwrap_or_default())?;
            let words = || {
                format!("tasks of this node waited for a processor {waits} % of the time, [limits] cpu_pressure is {limit}")
            };
            Some((Cause::Cpu, judge(waits, limit, words)?))
        });
        memory.into_iter().chain(cpu).collect()
    }
}

fn judge(value: f64, limit: f64, words: impl FnOnce() -> String) -> Option<Finding> {
    if value >= limit {
        Some(Finding::Tripped(words()))
    } else {
        (value < limit * EASED).then_some(Finding::Lifted)
    }
}

/// The share in percent, from the first line of the kernel's file; see `Documentation/accounting/psi.rst` of Linux.
fn pressure(text: &str) -> Option<f64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    some.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_trips_at_its_limit_and_is_lifted_well_below_it() {
        let judge = |value| judge(value, 50.0, || "too much".into());
        assert_eq!(judge(50.0), Some(Finding::Tripped("too much".into())));
        assert_eq!(judge(45.0), None);
        assert_eq!(judge(39.0), Some(Finding::Lifted));
    }

    #[test]
    fn the_pressure_is_that_of_ten_seconds() {
        let text =
            "some avg10=32.49 avg60=53.53 avg300=79.13 total=13747307010\nfull avg10=0.00 avg60=0.00\n";
        assert_eq!(pressure(text), Some(32.49));
        for odd in ["", "full avg10=1.00", "some avg60=1.00", "some avg10=much"] {
            assert_eq!(pressure(odd), None, "{odd}");
        }
    }
}
