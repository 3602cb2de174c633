//! What monitoring sees of the flag. Ages are computed when they are asked for: a gauge that somebody has to set would
//! stand still exactly when it matters.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::keeper::{Clock, View};

/// How a poll can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Poll {
    /// A document that was not in force before.
    Changed,
    /// What is in force was confirmed.
    Confirmed,
    /// An answer that is not obeyed.
    Refused,
    /// No answer of use.
    Failed,
}

/// Why an answer is not obeyed.
pub(super) const REFUSALS: [&str; 7] =
    ["cluster", "equivocal", "lower_epoch", "malformed", "no_epoch", "signature", "unknown_flag"];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByReason {
    reason: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByResult {
    result: &'static str,
}

/// The counters. Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub(super) struct FlagMetrics {
    refused: Family<ByReason, Counter>,
    polls: Family<ByResult, Counter>,
}

impl FlagMetrics {
    /// All series at 0.
    pub(super) fn new() -> Self {
        let metrics = FlagMetrics { refused: Family::default(), polls: Family::default() };
        for reason in REFUSALS {
            drop(metrics.refused.get_or_create(&ByReason { reason }));
        }
        for poll in [Poll::Changed, Poll::Confirmed, Poll::Refused, Poll::Failed] {
            drop(metrics.polls.get_or_create(&poll.into()));
        }
        metrics
    }

    /// A poll ended.
    pub(super) fn polled(&self, poll: Poll) {
        self.polls.get_or_create(&poll.into()).inc();
    }

    /// An answer was refused, for one of [`REFUSALS`].
    pub(super) fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ByReason { reason }).inc();
    }

    /// How often an answer was refused for this reason.
    pub(super) fn refusals(&self, reason: &'static str) -> u64 {
        self.refused.get_or_create(&ByReason { reason }).get()
    }

    /// Puts every series into `registry`.
    pub(super) fn register(&self, registry: &mut Registry, ages: Ages) {
        registry.register(
            "dwcp_flag_refused",
            "Answers of the flag's source that were not obeyed, by reason; lower_epoch and equivocal mean a server that \
             went back in time, or a replay",
            self.refused.clone(),
        );
        registry.register("dwcp_flag_polls", "Looks at the flag's source, by result", self.polls.clone());
        registry.register_collector(Box::new(ages));
    }
}

impl From<Poll> for ByResult {
    fn from(poll: Poll) -> Self {
        let result = match poll {
            Poll::Changed => "changed",
            Poll::Confirmed => "confirmed",
            Poll::Refused => "refused",
            Poll::Failed => "failed",
        };
        ByResult { result }
    }
}

/// What depends on the time of asking.
#[derive(Debug)]
pub(super) struct Ages {
    /// What is shown.
    pub(super) view: watch::Receiver<View>,
    /// Its clock; `None` where there is no source, and so nothing that ages.
    pub(super) clock: Option<Clock>,
}

impl Collector for Ages {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let view = self.view.borrow().clone();
        let now = self.clock.map(Clock::now).unwrap_or_default();
        let age = now.0.saturating_sub(view.confirmed.unwrap_or_default().0);
        let left = view.lease.map(|lease| lease.left(now)).unwrap_or_default();
        let mut seconds = |name: &str, help: &str, value: f64| {
            let value = ConstGauge::new(value);
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
        };
        seconds(
            "dwcp_flag_age_seconds",
            "Since the flag's source last confirmed what is in force, or since the start; 0 without a source",
            age.as_secs_f64(),
        )?;
        seconds("dwcp_flag_lease_seconds", "Left of the flag's lease; 0 without one", left.as_secs_f64())?;
        let epoch = view.document.and_then(|document| document.epoch);
        let parts = Family::<ByPart, Gauge>::default();
        for (part, value) in [
            ("incarnation", epoch.map_or(0, |epoch| epoch.incarnation)),
            ("counter", epoch.map_or(0, |epoch| epoch.counter)),
        ] {
            parts.get_or_create(&ByPart { part }).set(i64::try_from(value).unwrap_or(i64::MAX));
        }
        let help = "The epoch of the flag document in force; 0 without one";
        parts.encode(encoder.encode_descriptor("dwcp_flag_epoch", help, None, parts.metric_type())?)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPart {
    part: &'static str,
}
