//! How hard to compress: learned from what the last chunks cost and how long they then had to wait for the link.
//!
//! A chunk that is encoded long before the link takes it could have been made smaller; where the link waits for chunks, less work
//! carries more. That needs no figure of the link's rate, which cannot be told apart from the encoder's own while the link waits, and
//! it follows from what the content, the link and the CPU are *now*: a busy machine makes the same chunk dearer.

use std::time::Duration;

use crate::encode::{Choice, LANE_LEVEL};

/// What may be chosen, from the cheapest, with the cost of each beside zstd 1. (Programs and a heap of pointers, chunks of 512 KiB:
/// level -1 costs 0.7 times as much as level 1, 3 1.4 times, 5 3.1 to 3.7, 7 4.5 to 6.4, 9 5.3 to 8.0; from 7 to 9 a few tenths of a point are left.
/// LZ4 is not among them: level -1 takes no longer and saves 7 to 10 points more, see [`Choice::INTERNET`].)
const LADDER: [(Choice, f64); 6] = [
    (Choice::Sampled(-1), 0.7),
    (Choice::Sampled(1), 1.0),
    (Choice::Sampled(3), 1.45),
    (Choice::Sampled(5), 3.4),
    (Choice::Sampled(7), 5.5),
    (Choice::Sampled(9), 7.0),
];
/// Where to begin: see [`Choice::INTERNET`].
const FIRST: usize = 1;
/// Bytes that are compressed before the choice may change: eight full chunks. Small chunks are many, and tell little.
const DWELL: u64 = 4 << 20;
/// The part of a chunk's time between its beginning and its sending that compression may take. Some three are between the two at any
/// time, so that a migration spends one CPU and a half on it at most for as long as the link is what holds it up. (At half of that the choice
/// stayed at the cheapest level where one core of two was the guest's, while a link of 200 Mbit/s was full and a quarter of a core idle.)
const SHARE: f64 = 0.5;
/// The same where a lane is compressed by one thread: with the chunks of a lane nothing is compressed beside them.
const LANE_SHARE: f64 = SHARE * 0.6;
/// With a lane [`DWELL`] is this many times as long: a frame that begins anew begins without a window.
const LANE_DWELL: u64 = 4;
/// The encoder is what holds the link up when chunks wait for less than this part of what they cost.
const HURRY: f64 = 0.25;

/// What a chunk came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spent {
    /// Its bytes before compression.
    pub bytes: u64,
    /// Compressing it.
    pub busy: Duration,
    /// From then on until the link had room for it.
    pub waited: Duration,
    /// Whether others were being encoded behind it: if not, the VMM is what everybody waits for.
    pub followed: bool,
}

/// See the module. One per leg.
#[derive(Debug, Clone)]
pub struct Effort {
    lane: bool,
    rung: usize,
    bytes: u64,
    followed: u64,
    busy: Duration,
    waited: Duration,
}

impl Effort {
    /// For a leg whose chunks go into a lane.
    pub fn in_lane() -> Self {
        Effort::at(FIRST, true)
    }

    /// What the next chunk is to get.
    pub fn choice(&self) -> Choice {
        LADDER[self.rung].0
    }

    /// Takes note of a chunk that was compressed. One that was left raw tells nothing of what compression costs.
    pub fn spent(&mut self, spent: Spent) {
        self.bytes = self.bytes.saturating_add(spent.bytes);
        self.followed += if spent.followed { spent.bytes } else { 0 };
        self.busy = self.busy.saturating_add(spent.busy);
        self.waited = self.waited.saturating_add(spent.waited);
        // What stands alone loses nothing by a change.
        let in_lane = matches!(self.choice(), Choice::Sampled(LANE_LEVEL..)) && self.lane;
        if self.bytes >= if in_lane { DWELL * LANE_DWELL } else { DWELL } {
            *self = Effort::at(self.next(), self.lane);
        }
    }

    fn next(&self) -> usize {
        let share = if self.lane { LANE_SHARE } else { SHARE };
        let (busy, waited) = (self.busy.as_secs_f64(), self.waited.as_secs_f64());
        let dearer = |rung: &usize| {
            LADDER
                .get(*rung)
                .is_some_and(|(_, cost)| busy * cost / LADDER[self.rung].1 <= share * (busy + waited))
        };
        if waited < HURRY * busy && self.followed > self.bytes / 2 {
            self.rung.saturating_sub(1)
        } else {
            Some(self.rung + 1).filter(dearer).unwrap_or(self.rung)
        }
    }

    fn at(rung: usize, lane: bool) -> Self {
        Effort { lane, rung, bytes: 0, followed: 0, busy: Duration::ZERO, waited: Duration::ZERO }
    }
}

impl Default for Effort {
    fn default() -> Self {
        Effort::at(FIRST, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 512 << 10;

    /// Chunks of which each costs so much at level 1 and is sent so long after its beginning, on a machine that encodes three at a
    /// time; what is chosen in the end.
    fn settles(cost: Duration, period: Duration, followed: bool) -> Choice {
        settles_from(Effort::default(), cost, period, followed)
    }

    fn settles_from(mut effort: Effort, cost: Duration, period: Duration, followed: bool) -> Choice {
        for _ in 0..40 * LANE_DWELL * DWELL / CHUNK {
            let busy = cost.mul_f64(LADDER[effort.rung].1);
            effort.spent(Spent { bytes: CHUNK, busy, waited: (period * 3).saturating_sub(busy), followed });
        }
        effort.choice()
    }

    #[test]
    fn a_slow_link_has_time_and_a_fast_one_has_none() {
        let cost = Duration::from_millis(2);
        assert_eq!(settles(cost, Duration::from_millis(100), true), Choice::Sampled(9));
        assert_eq!(settles(cost, Duration::from_millis(5), true), Choice::Sampled(5));
        assert_eq!(settles(cost, Duration::from_millis(2), true), Choice::Sampled(3));
        assert_eq!(settles(cost, Duration::from_millis(1), true), Choice::Sampled(1));
        assert_eq!(settles(cost, Duration::ZERO, true), Choice::Sampled(-1));
    }

    #[test]
    fn a_lane_leaves_less_time_and_changes_less_often() {
        let settles = |period| {
            settles_from(Effort::in_lane(), Duration::from_millis(2), Duration::from_millis(period), true)
        };
        assert_eq!([100, 6, 2, 0].map(settles), [9, 3, 1, -1].map(Choice::Sampled));
        let mut effort = Effort::in_lane();
        let idle = Spent {
            bytes: DWELL,
            busy: Duration::from_millis(1),
            waited: Duration::from_secs(1),
            followed: true,
        };
        (1..LANE_DWELL).for_each(|_| effort.spent(idle));
        assert_eq!(effort.choice(), Choice::INTERNET);
        effort.spent(idle);
        assert_eq!(effort.choice(), Choice::Sampled(3));
        // Back from what is too cheap for a lane it comes as soon as without one.
        let mut effort = Effort::at(0, true);
        effort.spent(idle);
        assert_eq!(effort.choice(), Choice::Sampled(1));
    }

    #[test]
    fn a_vmm_that_is_slow_is_no_reason_to_hurry() {
        assert_eq!(settles(Duration::from_millis(2), Duration::ZERO, false), Choice::INTERNET);
    }

    #[test]
    fn it_begins_with_the_usual_and_waits_before_it_changes() {
        let mut effort = Effort::default();
        assert_eq!(effort.choice(), Choice::INTERNET);
        let idle = Spent {
            bytes: CHUNK,
            busy: Duration::from_millis(1),
            waited: Duration::from_secs(1),
            followed: true,
        };
        (1..DWELL / CHUNK).for_each(|_| effort.spent(idle));
        assert_eq!(effort.choice(), Choice::INTERNET);
        effort.spent(idle);
        assert_eq!(effort.choice(), Choice::Sampled(3));
    }
}
