//! Pace: how fast the peer takes bytes, and how many of them may be on their way so that the downtime stays honest.
//!
//! QEMU stops the guest when what is left fits into the downtime at the speed at which *it* writes. What lies in the agents
//! and in the network between comes on top. So the bytes in flight are kept to what the link carries in a part of the
//! downtime limit, but not below one bandwidth-delay product, which the link needs to be full.
//!
//! Where the link loses packets a chunk takes a round trip or two more until it is whole. What that takes is on its way, too: bound to one
//! round trip the sender would measure less than the link carries, and be bound to that next.
//!
//! While the bound is what limits the sender, the measured rate is the bound over the round trip; the next
//! bound is then larger by the budget, so it grows until the link is the limit.
//!
//! The rate is that between acknowledgements while bytes are in flight. Where each acknowledgement empties the line there is no such
//! stretch; there the rate since the first byte was sent counts, but only upwards: it holds a round trip, and
//! perhaps a source with little to say. So one slow moment cannot keep the bound so low that it is never measured again.
//!
//! A source that had nothing to say meanwhile shows what it said, not what the link carries: over such a stretch the rate counts
//! upwards only, and only if the stretch is long enough not to be a burst of late acknowledgements. (BBR calls these samples
//! application-limited.) An encoder that is the bottleneck is another matter: the last round will be no faster.
//!
//! Acknowledgements that come together, as after a connection was made again, are no measure: a stretch shorter than a round trip counts nowhere.
//! And where less may be taken of the link than it carries, that is the rate.

use std::collections::VecDeque;
use std::time::Duration;

/// Over how long the rate is measured.
const SPAN: Duration = Duration::from_secs(1);
/// The shortest stretch whose rate counts although the source was silent in it.
const STRETCH: Duration = Duration::from_millis(250);
/// The shortest stretch whose rate counts at all, if the round trip is not longer: acknowledgements come in clumps, and within one they tell
/// nothing of the link. QEMU stops the guest by the rate that it is told, so one such moment would cost seconds of downtime.
const CLUMP: Duration = Duration::from_millis(50);
/// Samples kept, about; a newer one replaces the last where they come faster.
const SAMPLES: u32 = 64;
/// The least that may be in flight: a few compressed chunks, so that encoder, network and decoder overlap.
const FLOOR: u64 = 512 << 10;
/// What may be in flight before anything was measured.
const START: u64 = 2 << 20;
/// Round trips until most chunks have arrived whole where packets are lost: the loss shows after one, and what is sent again may be lost, too.
const RECOVERY: f64 = 2.5;

/// See the module.
#[derive(Debug)]
pub struct Pace {
    budget: Duration,
    /// Nothing of the budget is spent for now.
    narrow: bool,
    lossy: bool,
    /// Bytes a second that may be taken of the link.
    limit: f64,
    rtt: Option<Duration>,
    samples: VecDeque<(Duration, u64)>,
    /// When something came to be in flight, and the total then.
    busy: Option<(Duration, u64)>,
    /// When the source last had nothing to say although there was room.
    starved: Option<Duration>,
    total: u64,
    rate: f64,
}

impl Pace {
    /// A pace that lets `budget` of the downtime be spent on bytes in flight.
    pub fn new(budget: Duration) -> Self {
        Pace {
            budget,
            narrow: false,
            lossy: false,
            limit: f64::INFINITY,
            rtt: None,
            samples: VecDeque::new(),
            busy: None,
            starved: None,
            total: 0,
            rate: 0.0,
        }
    }

    /// For a link that loses packets.
    #[must_use]
    pub fn over_losses(self, lossy: bool) -> Self {
        Pace { lossy, ..self }
    }

    /// Where no more than so many bytes a second may be taken of the link, whatever it carries: one chunk at a time is acknowledged as fast as
    /// the link can.
    #[must_use]
    pub fn within(self, limit: Option<u64>) -> Self {
        Pace { limit: limit.map_or(f64::INFINITY, |limit| limit as f64), ..self }
    }

    /// A round trip was measured; the least counts, since longer ones hold queues.
    pub fn round_trip(&mut self, rtt: Duration) {
        self.rtt = Some(self.rtt.map_or(rtt, |least| least.min(rtt)));
    }

    /// The least round trip seen.
    pub fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Bytes are sent at `now`; it counts if nothing was in flight.
    pub fn sent(&mut self, now: Duration) {
        self.busy.get_or_insert((now, self.total));
    }

    /// There is room at `now`, and the source has nothing to say.
    pub fn starved(&mut self, now: Duration) {
        self.starved = Some(now);
    }

    /// `bytes` were acknowledged at `now`; `idle` when nothing is left in flight, so that the pause that follows is not
    /// taken for a slow link.
    pub fn acked(&mut self, bytes: u64, now: Duration, idle: bool) {
        self.total += bytes;
        let before_last = self.samples.len().checked_sub(2).and_then(|i| self.samples.get(i));
        if before_last.is_some_and(|b| now.saturating_sub(b.0) < SPAN / SAMPLES) {
            self.samples.pop_back();
        }
        self.samples.push_back((now, self.total));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|f| now.saturating_sub(f.0) > SPAN) {
            self.samples.pop_front();
        }
        if let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) {
            let stretch = last.0.saturating_sub(first.0);
            let rate = (last.1 - first.1) as f64 / stretch.as_secs_f64();
            let starved = self.rate > 0.0 && self.starved.is_some_and(|at| at >= first.0);
            let counts = match starved {
                true => stretch >= STRETCH && rate > self.rate,
                false => stretch >= CLUMP.max(self.rtt.unwrap_or_default()),
            };
            if counts {
                self.rate = rate;
            }
        }
        if idle {
            self.samples.clear();
            if let Some((since, total)) = self.busy.take() {
                self.at_least((self.total - total) as f64, now.saturating_sub(since));
            }
        }
    }

    fn at_least(&mut self, bytes: f64, time: Duration) {
        let known = match self.rate > 0.0 {
            true => self.rate,
            // Unmeasured, the bound stands for a rate.
            false => START as f64 / self.span().as_secs_f64(),
        };
        let rate = bytes / time.as_secs_f64();
        if rate > known && rate.is_finite() {
            self.rate = rate;
        }
    }

    /// Keeps the link's queues short, or no longer: what a round trip is without them then shows, at hardly any cost in throughput.
    pub fn narrow(&mut self, narrow: bool) {
        self.narrow = narrow;
    }

    /// The time for which bytes may be in flight.
    fn span(&self) -> Duration {
        let budget = if self.narrow { Duration::ZERO } else { self.budget };
        self.rtt.unwrap_or_default().mul_f64(if self.lossy { RECOVERY } else { 1.0 }) + budget
    }

    /// Bytes a second that the peer acknowledged lately; 0 before anything was measured.
    pub fn rate(&self) -> f64 {
        self.rate.min(self.limit)
    }

    /// Bytes that may be in flight.
    pub fn target(&self) -> u64 {
        if self.rate <= 0.0 {
            return START;
        }
        ((self.rate() * self.span().as_secs_f64()) as u64).max(FLOOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut pace = Pace::new(ms(100));
        for t in 1..=3000 {
            let bytes = if t <= 1500 { 1000 } else { 100 };
            pace.acked(bytes, ms(t), false);
        }
        assert!((pace.rate() - 100_000.0).abs() < 5_000.0, "{}", pace.rate());
    }

    #[test]
    fn a_pause_is_not_a_slow_link() {
        let mut pace = Pace::new(ms(100));
        (1..=100).for_each(|t| pace.acked(1000, ms(t), t == 100));
        (9_000..9_100).for_each(|t| pace.acked(1000, ms(t), false));
        assert!(pace.rate() > 900_000.0, "{}", pace.rate());
    }

    #[test]
    fn a_slow_moment_is_forgotten_although_each_acknowledgement_empties_the_line() {
        let mut pace = Pace::new(ms(100));
        pace.round_trip(ms(50));
        // A destination that stood still: one chunk in twenty seconds.
        pace.sent(ms(0));
        pace.acked(1 << 20, ms(60), false);
        pace.acked(1 << 20, ms(20_000), true);
        assert_eq!(pace.target(), FLOOR);
        pace.sent(ms(20_000));
        pace.acked(1 << 20, ms(20_060), true);
        assert!(pace.target() > 2 << 20, "{}", pace.target());
        // A source with little to say does not make the link slow.
        let before = pace.rate();
        pace.sent(ms(30_000));
        pace.acked(100, ms(30_050), true);
        assert!((pace.rate() - before).abs() < 1.0);
    }

    /// A guest that dirties little: QEMU must not be told that the link has become slow.
    #[test]
    fn a_source_with_little_to_say_does_not_lower_the_rate() {
        let mut pace = Pace::new(ms(100));
        (1..=1000).for_each(|t| pace.acked(10_000, ms(t), false));
        for t in 1001..=5000 {
            pace.starved(ms(t));
            pace.acked(100, ms(t), false);
        }
        assert!(pace.rate() > 9e6, "{}", pace.rate());
        // A burst of acknowledgements that were late is no proof of a faster link.
        pace.acked(1_000_000, ms(5001), false);
        assert!(pace.rate() < 11e6, "{}", pace.rate());
        // It has much to say again, and the link has become slow meanwhile.
        (5002..=6100).for_each(|t| pace.acked(1000, ms(t), false));
        assert!(pace.rate() < 1.1e6, "{}", pace.rate());
    }

    #[test]
    fn a_source_with_little_to_say_may_show_that_the_link_is_faster() {
        let mut pace = Pace::new(ms(100));
        (1..=1000).for_each(|t| pace.acked(100, ms(t), false));
        for t in 1001..=3000 {
            pace.starved(ms(t));
            pace.acked(10_000, ms(t), false);
        }
        assert!(pace.rate() > 9e6, "{}", pace.rate());
    }

    #[test]
    fn what_is_in_flight_is_a_part_of_the_downtime_or_the_product_of_bandwidth_and_delay() {
        let mut pace = Pace::new(ms(100));
        pace.round_trip(ms(50));
        pace.round_trip(ms(80));
        (1..=1000).for_each(|t| pace.acked(100_000, ms(t), false));
        let expected = 100e6 * 0.150;
        assert!((pace.target() as f64 / expected - 1.0).abs() < 0.02, "{}", pace.target());
        pace.narrow(true);
        assert!((pace.target() as f64 / (100e6 * 0.050) - 1.0).abs() < 0.02, "{}", pace.target());
        let mut slow = Pace::new(ms(10));
        (1..=1000).for_each(|t| slow.acked(1, ms(t), false));
        assert_eq!(slow.target(), FLOOR);
    }

    /// As after a connection was made again: what had arrived is acknowledged in one go.
    #[test]
    fn a_clump_of_acknowledgements_is_no_fast_link() {
        let clump =
            |pace: &mut Pace, at| (0..20).for_each(|n| pace.acked(200_000, at + ms(1) * n / 20, false));
        let mut pace = Pace::new(ms(100));
        clump(&mut pace, ms(500));
        assert_eq!((pace.rate(), pace.target()), (0.0, START));
        // One a round trip.
        pace.round_trip(ms(100));
        (6..20).for_each(|t| clump(&mut pace, ms(t * 100)));
        assert!((pace.rate() / 40e6 - 1.0).abs() < 0.1, "{}", pace.rate());
        // And after a silence.
        clump(&mut pace, ms(10_000));
        assert!(pace.rate() < 45e6, "{}", pace.rate());
    }

    #[test]
    fn a_limit_bounds_the_rate_where_single_chunks_are_fast() {
        let mut pace = Pace::new(ms(100)).within(Some(10_000_000));
        for n in 0..10 {
            pace.sent(ms(n * 100));
            pace.acked(1 << 20, ms(n * 100 + 2), true);
        }
        assert_eq!((pace.rate(), pace.target()), (1e7, 1_000_000));
    }

    /// A link that carries 100 MB/s with 100 ms: the bound must not keep it from being found.
    #[test]
    fn the_bound_grows_until_the_link_is_the_limit() {
        let mut pace = Pace::new(ms(50));
        pace.round_trip(ms(100));
        let mut now = ms(0);
        for _ in 0..100 {
            let sent = pace.target().min(10_000_000);
            now += ms(100);
            pace.acked(sent, now, false);
        }
        assert!(pace.rate() > 90e6, "{}", pace.rate());
    }

    /// The same where each chunk is whole after two round trips.
    #[test]
    fn losses_do_not_keep_the_bound_from_growing() {
        let rate = |lossy| {
            let mut pace = Pace::new(ms(30)).over_losses(lossy);
            pace.round_trip(ms(100));
            let mut now = ms(0);
            for _ in 0..100 {
                let sent = pace.target().min(20_000_000);
                now += ms(200);
                pace.acked(sent, now, false);
            }
            pace.rate()
        };
        assert!(rate(true) > 90e6, "{}", rate(true));
        assert!(rate(false) < 5e6, "{}", rate(false));
    }
}
