//! A bandwidth limit: bytes may run into debt by one write, and the debt is waited off.

use std::time::Duration;

/// A token bucket without a clock; time is the duration since a fixed moment.
#[derive(Debug)]
pub(crate) struct Bucket {
    /// Bytes a second; `None` is no limit.
    rate: Option<u64>,
    /// When all that was spent so far is paid for.
    paid_at: Duration,
}

/// Unused rate is kept for so long, so that a late wake-up does not cost throughput.
const BURST: Duration = Duration::from_millis(20);

impl Bucket {
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Bucket { rate: rate.map(|r| r.max(1)), paid_at: Duration::ZERO }
    }

    /// Whether there is a rate.
    pub(crate) fn is_limited(&self) -> bool {
        self.rate.is_some()
    }

    /// How long to wait before the next write.
    pub(crate) fn wait(&self, now: Duration) -> Duration {
        match self.rate {
            Some(_) => self.paid_at.saturating_sub(now),
            None => Duration::ZERO,
        }
    }

    /// `bytes` were written.
    pub(crate) fn spend(&mut self, bytes: u64, now: Duration) {
        if let Some(rate) = self.rate {
            let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
            self.paid_at = self.paid_at.max(now.saturating_sub(BURST)) + cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time_whatever_the_writes() {
        for size in [1_000, 100_000, 3_000_000] {
            let (mut bucket, mut now, mut sent) = (Bucket::new(Some(1_000_000)), Duration::ZERO, 0);
            while now < Duration::from_secs(100) {
                bucket.spend(size, now);
                sent += size;
                now += bucket.wait(now);
            }
            let rate = sent as f64 / now.as_secs_f64();
            assert!((rate / 1e6 - 1.0).abs() < 0.01, "{size}: {rate}");
        }
        assert_eq!(Bucket::new(None).wait(Duration::ZERO), Duration::ZERO);
    }
}
