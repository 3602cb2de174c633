//! One direction of the line, without clock or device: it says of each packet when it arrives, if it does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long to wait before a device that failed is read again.
pub(crate) const PATIENCE: Duration = Duration::from_millis(10);

/// How much later a packet comes that took the longer way.
const DETOUR: Duration = Duration::from_millis(3);

/// When a packet arrives.
#[derive(Clone, Copy)]
pub(crate) struct Arrival {
    pub(crate) at: Instant,
    /// It took the longer way. Packets of one way keep their order.
    pub(crate) detour: bool,
}

/// The state of one direction.
pub(crate) struct Line {
    /// Bits a second; 0 is unlimited.
    rate: u64,
    delay: Duration,
    /// Packets lost of a million.
    loss: u64,
    /// Packets of a million that take a longer way, so that those behind them arrive first.
    reorder: u64,
    /// Bytes that may wait for their turn; more are dropped, as by a router.
    queue: u64,
    cut: bool,
    /// When the last packet has left the queue.
    free: Option<Instant>,
    /// Bytes that were taken and have not arrived: those that wait and those under way.
    held: u64,
    random: u64,
    delivered: u64,
    delivered_bytes: u64,
    dropped: u64,
}

impl Line {
    /// A perfect line.
    pub(crate) fn new(seed: u64) -> Self {
        Line {
            rate: 0,
            delay: Duration::ZERO,
            loss: 0,
            reorder: 0,
            queue: 1 << 20,
            cut: false,
            free: None,
            held: 0,
            random: seed,
            delivered: 0,
            delivered_bytes: 0,
            dropped: 0,
        }
    }

    /// Obeys one `key=value`.
    pub(crate) fn set(&mut self, setting: &str) -> Result<()> {
        let (key, value) = setting.split_once('=').with_context(|| format!("no value in {setting:?}"))?;
        let value: u64 = value.parse().with_context(|| format!("no number in {setting:?}"))?;
        match key {
            "rate" => self.rate = value,
            "delay" => self.delay = Duration::from_micros(value),
            "loss" => self.loss = value,
            "reorder" => self.reorder = value,
            "queue" => self.queue = value,
            _ => bail!("no setting {key:?}"),
        }
        Ok(())
    }

    /// Cuts the line, or mends it.
    pub(crate) fn cut(&mut self, cut: bool) {
        self.cut = cut;
    }

    /// Takes a packet at `now` and says when it arrives; `None` if it is lost.
    pub(crate) fn offer(&mut self, now: Instant, length: usize) -> Option<Arrival> {
        let length = length as u64;
        let start = self.free.map_or(now, |free| free.max(now));
        let waiting = self.bytes_in(start.saturating_duration_since(now));
        // Without a rate nothing waits for its turn, but what is under way must still be bounded.
        let full = if self.rate == 0 { self.held > 64 * self.queue } else { waiting + length > self.queue };
        if self.cut || full || self.drawn(self.loss) {
            self.dropped += 1;
            return None;
        }
        let free = start + self.time_for(length);
        self.free = Some(free);
        self.held += length;
        let detour = self.drawn(self.reorder);
        let at = free + self.delay + if detour { DETOUR } else { Duration::ZERO };
        Some(Arrival { at, detour })
    }

    /// The packet's time has come: whether it arrives.
    pub(crate) fn arrive(&mut self, length: usize) -> bool {
        self.held = self.held.saturating_sub(length as u64);
        if self.cut {
            self.dropped += 1;
        } else {
            self.delivered += 1;
            self.delivered_bytes += length as u64;
        }
        !self.cut
    }

    /// Packets that arrived.
    pub(crate) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// Their bytes, IP headers included.
    pub(crate) fn delivered_bytes(&self) -> u64 {
        self.delivered_bytes
    }

    /// Packets that were lost, by chance, cut or a full queue.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    fn time_for(&self, bytes: u64) -> Duration {
        let nanos = (bytes * 8 * 1_000_000_000).checked_div(self.rate);
        Duration::from_nanos(nanos.unwrap_or(0))
    }

    fn bytes_in(&self, time: Duration) -> u64 {
        (time.as_secs_f64() * self.rate as f64 / 8.0) as u64
    }

    fn drawn(&mut self, of_a_million: u64) -> bool {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % 1_000_000 < of_a_million
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(settings: &[&str]) -> Line {
        let mut line = Line::new(1);
        settings.iter().for_each(|setting| line.set(setting).unwrap());
        line
    }

    #[test]
    fn packets_follow_each_other_at_the_rate_after_the_delay() {
        // A byte takes a microsecond.
        let mut line = line(&["rate=8000000", "delay=5000"]);
        let now = Instant::now();
        let micros = |arrival: Option<Arrival>| (arrival.unwrap().at - now).as_micros();
        assert_eq!(micros(line.offer(now, 1000)), 6000);
        assert_eq!(micros(line.offer(now, 500)), 6500);
        assert_eq!(
            micros(line.offer(now + Duration::from_millis(10), 1000)),
            16_000,
            "an idle line saves nothing up"
        );
    }

    #[test]
    fn a_full_queue_drops_and_empties_with_time() {
        let mut line = line(&["rate=8000000", "queue=2000"]);
        let now = Instant::now();
        let taken = (0..10).filter(|_| line.offer(now, 1000).is_some()).count();
        assert_eq!((taken, line.dropped()), (2, 8));
        assert!(line.offer(now + Duration::from_millis(1), 1000).is_some());
    }

    #[test]
    fn a_cut_takes_what_is_under_way_and_a_mended_line_delivers() {
        let mut line = line(&[]);
        let now = Instant::now();
        assert!(line.offer(now, 100).is_some());
        line.cut(true);
        assert!(!line.arrive(100));
        assert!(line.offer(now, 100).is_none());
        line.cut(false);
        assert!(line.offer(now, 100).is_some() && line.arrive(100));
        assert_eq!((line.delivered(), line.delivered_bytes(), line.dropped()), (1, 100, 2));
    }

    #[test]
    fn loss_is_as_frequent_as_asked_for() {
        let mut line = line(&["loss=20000"]);
        let now = Instant::now();
        let lost = (0..100_000).filter(|_| line.offer(now, 10).is_none_or(|_| !line.arrive(10))).count();
        assert!((1800..2200).contains(&lost), "{lost}");
    }

    #[test]
    fn some_packets_are_overtaken() {
        let mut line = line(&["rate=8000000", "queue=100000000", "reorder=100000"]);
        let now = Instant::now();
        let arrivals: Vec<_> = (0..1000).filter_map(|_| line.offer(now, 100)).collect();
        let overtaken = arrivals.windows(2).filter(|pair| pair[0].at > pair[1].at).count();
        assert!((50..150).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn wrong_settings_are_named() {
        for wrong in ["rate", "rate=fast", "colour=1"] {
            assert!(Line::new(1).set(wrong).is_err(), "{wrong}");
        }
    }
}
