//! What the link of a running v3 leg is like, from what the kernel knows of its connections and the agents' own round trips.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_link::{Gauge, Sample};
use dwcp_proto::LinkId;
use dwcp_proto::mode::Link;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::Outgoing;
use crate::counters::Counters;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// The part of the time since the last look in which connections must have waited for the network alone, on average, for the link to
/// count as what bounds the rate.
const STRAINED: f64 = 0.7;

/// See the module.
pub(super) struct Survey {
    counters: Arc<Counters>,
    /// Bytes a second that may be taken of the link.
    limit: Option<u64>,
    ticks: Interval,
    looked: Instant,
    before: HashMap<LinkId, Sample>,
}

impl Survey {
    pub(super) fn new(out: &Outgoing) -> Self {
        let mut ticks = interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Survey {
            counters: out.counters.clone(),
            limit: out.limit,
            ticks,
            looked: Instant::now(),
            before: HashMap::new(),
        }
    }

    /// Waits until it is time for a look. Cancel safe.
    pub(super) async fn due(&mut self) {
        self.ticks.tick().await;
    }

    /// Looks at a leg's connections, over which chunks were acknowledged at `rate` bytes a second.
    pub(super) fn look<'a>(&mut self, links: impl Iterator<Item = (LinkId, &'a Gauge)>, rate: f64) -> Link {
        let samples: HashMap<_, _> =
            links.filter_map(|(link, gauge)| Some((link, gauge.sample()?))).collect();
        let time = std::mem::replace(&mut self.looked, Instant::now()).elapsed();
        let before = std::mem::replace(&mut self.before, samples);
        let seen: Vec<_> =
            self.before.iter().filter_map(|(link, now)| Some((before.get(link)?, now))).collect();
        let micros = self.counters.rtt_now_us.load();
        let rtt = (micros > 0).then(|| Duration::from_micros(micros));
        judge(&seen, time, rtt, rate, self.limit)
    }
}

/// The link between two looks at its connections, `time` apart.
fn judge(
    seen: &[(&Sample, &Sample)],
    time: Duration,
    rtt: Option<Duration>,
    rate: f64,
    limit: Option<u64>,
) -> Link {
    let seconds = time.as_secs_f64().max(1e-3);
    let strained = |(before, now): &(&Sample, &Sample)| now.strained.saturating_sub(before.strained);
    let strained: Duration = seen.iter().map(strained).sum();
    let full = !seen.is_empty() && strained.as_secs_f64() / seconds > STRAINED * seen.len() as f64;
    let moved = seen.iter().map(|(before, now)| now.bytes_acked.saturating_sub(before.bytes_acked));
    let moved = moved.sum::<u64>() as f64 / seconds;
    // Where the link is not full, a burst says more of it than an average.
    let burst = seen.iter().map(|(_, now)| now.delivery_rate).max().unwrap_or(0) as f64;
    let rate = if full { moved } else { moved.max(burst).max(rate) };
    // What an idle connection knows of the round trip is of another time.
    let used = seen.iter().filter(|(before, now)| now.bytes_acked > before.bytes_acked);
    Link {
        rtt,
        kernel_rtt: used.map(|(_, now)| now.rtt).min(),
        rate: limit.map_or(rate, |limit| rate.min(limit as f64)),
        full,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sample(acked: u64, strained: Duration) -> Sample {
        Sample {
            rtt: MS,
            rtt_var: Some(MS),
            min_rtt: MS,
            queued: Some(0),
            unsent: Some(0),
            delivery_rate: 500_000_000,
            retransmits: 0,
            congestion_window: 0,
            bytes_acked: acked,
            bytes_received: 0,
            strained,
        }
    }

    #[test]
    fn a_full_link_carries_what_moved_and_another_one_what_its_bursts_show() {
        let start = sample(0, Duration::ZERO);
        let (busy, idle) = (sample(10_000_000, MS * 240), sample(10_000_000, MS * 10));
        let full = judge(&[(&start, &busy), (&start, &busy)], MS * 250, None, 1.0, None);
        assert_eq!((full.full, full.rate), (true, 80e6));
        let burst = judge(&[(&start, &busy), (&start, &idle)], MS * 250, Some(MS), 1.0, None);
        assert_eq!((burst.full, burst.rate, burst.kernel_rtt), (false, 500e6, Some(MS)));
        assert_eq!(judge(&[(&start, &idle)], MS * 250, None, 1.0, Some(25_000_000)).rate, 25e6);
        assert_eq!(judge(&[], MS * 250, None, 7.0, None), Link { rate: 7.0, ..Link::default() });
    }

    #[test]
    fn an_idle_connection_says_nothing_of_the_round_trip() {
        let start = sample(0, Duration::ZERO);
        let used = Sample { rtt: MS * 20, ..sample(1000, Duration::ZERO) };
        let trip = |seen: &[(&Sample, &Sample)]| judge(seen, MS * 250, Some(MS * 20), 1.0, None).kernel_rtt;
        assert_eq!(trip(&[(&start, &start), (&start, &used)]), Some(MS * 20));
        assert_eq!(trip(&[(&start, &start)]), None);
    }
}
