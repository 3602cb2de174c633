//! How long chunks take from their sending to their acknowledgement: the agent's own histogram.

use anyhow::{Context, Result};
use dwcp_tests::Agent;

/// Chunks by latency: upper edges in seconds, and how many chunks took no longer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Latency(Vec<(f64, f64)>);

impl Latency {
    /// What an agent has counted in datacenter mode so far.
    pub(super) fn of(agent: &Agent) -> Result<Self> {
        Latency::parse(&agent.http_get("/metrics")?).context("no latencies in the metrics")
    }

    fn parse(metrics: &str) -> Option<Self> {
        let lines = metrics.lines().filter_map(|line| line.strip_prefix("dwcp_v3_latency_seconds_bucket{"));
        let edges = lines.filter(|line| line.contains("mode=\"datacenter\"")).map(|line| {
            let (labels, count) = line.split_once("} ")?;
            let edge = labels.split_once("le=\"")?.1.split_once('"')?.0;
            let edge = if edge == "+Inf" { f64::INFINITY } else { edge.parse().ok()? };
            Some((edge, count.parse().ok()?))
        });
        edges.collect::<Option<Vec<_>>>().map(Latency)
    }

    /// What was counted since `earlier`.
    pub(super) fn since(mut self, earlier: &Latency) -> Self {
        for ((_, count), (_, before)) in self.0.iter_mut().zip(&earlier.0) {
            *count -= before;
        }
        self
    }

    /// Counts another one's chunks as well.
    pub(super) fn add(&mut self, other: &Latency) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        for ((_, count), (_, more)) in self.0.iter_mut().zip(&other.0) {
            *count += more;
        }
    }

    /// Seconds that this part of the chunks does not exceed, interpolated within its bucket. `None` without chunks, or beyond the
    /// last edge.
    pub(super) fn quantile(&self, part: f64) -> Option<f64> {
        let wanted = self.0.last()?.1 * part;
        if wanted <= 0.0 {
            return None;
        }
        let (mut edge, mut below) = (0.0, 0.0);
        for &(upper, count) in &self.0 {
            if count >= wanted {
                let inside = (wanted - below) / (count - below);
                return Some(edge + (upper - edge) * inside).filter(|seconds| seconds.is_finite());
            }
            (edge, below) = (upper, count);
        }
        None
    }

    /// p50, p95 and p99 in milliseconds.
    pub(super) fn words(&self) -> String {
        let cell =
            |part| self.quantile(part).map_or_else(|| "-".into(), |seconds| format!("{:.1}", seconds * 1e3));
        if self.0.is_empty() { String::new() } else { [0.5, 0.95, 0.99].map(cell).join(" / ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const METRICS: &str = "dwcp_v3_latency_seconds_bucket{le=\"0.01\",mode=\"internet\"} 7\n\
                           dwcp_v3_latency_seconds_bucket{le=\"0.01\",mode=\"datacenter\"} 50\n\
                           dwcp_v3_latency_seconds_bucket{le=\"0.02\",mode=\"datacenter\"} 100\n\
                           dwcp_v3_latency_seconds_bucket{le=\"+Inf\",mode=\"datacenter\"} 100\n";

    #[test]
    fn quantiles_lie_within_their_buckets() {
        let latency = Latency::parse(METRICS).unwrap();
        assert_eq!(latency.quantile(0.5), Some(0.01));
        assert!((latency.quantile(0.75).unwrap() - 0.015).abs() < 1e-9);
        assert_eq!(latency.words(), "10.0 / 19.0 / 19.8");
        let mut twice = latency.clone();
        twice.add(&latency);
        assert_eq!(twice.clone().since(&latency), latency);
        assert_eq!(latency.clone().since(&latency).quantile(0.5), None);
        assert_eq!(Latency::default().words(), "");
    }
}
