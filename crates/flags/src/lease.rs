//! For how long a server's answer holds.

use std::time::Duration;

/// How long an answer holds: long enough for two lost polls of a second each.
pub const LEASE: Duration = Duration::from_secs(3);

/// A point on the monotonic clock, as the time since an origin that stays the same while the process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Moment(pub Duration);

/// Permission by the last confirmed answer. It counts from when that answer was *asked for*: what arrives late, or is
/// held back on the way, is not worth more for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    length: Duration,
    asked: Option<Moment>,
}

impl Lease {
    /// A lease that nothing has confirmed yet.
    pub fn new(length: Duration) -> Self {
        Lease { length, asked: None }
    }

    /// An answer confirmed the document; its request was sent at `asked`. Answers that overtake each other do no harm.
    pub fn confirm(&mut self, asked: Moment) {
        self.asked = self.asked.max(Some(asked));
    }

    /// Whether the permission holds at `now`.
    pub fn holds(&self, now: Moment) -> bool {
        self.age(now).is_some_and(|age| age < self.length)
    }

    /// What is left of the permission at `now`; zero if there is none.
    pub fn left(&self, now: Moment) -> Duration {
        self.ends().map_or(Duration::ZERO, |end| end.0.saturating_sub(now.0))
    }

    /// When the permission ends, or ended; `None` if there was none.
    pub fn ends(&self) -> Option<Moment> {
        self.asked.map(|asked| Moment(asked.0 + self.length))
    }

    /// Time since the last confirmed request was sent; `None` if there was none.
    pub fn age(&self, now: Moment) -> Option<Duration> {
        self.asked.map(|asked| now.0.saturating_sub(asked.0))
    }
}

impl Default for Lease {
    fn default() -> Self {
        Lease::new(LEASE)
    }
}
