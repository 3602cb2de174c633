//! When running migrations may return to v3.

use std::time::Duration;

use crate::lease::Moment;

/// The shortest wait that may be asked for: it bounds how often the path of a migration changes.
const SHORTEST: Duration = Duration::from_secs(1);

/// The wait before migrations return to v3: v3 must have been allowed without a break for a random time, from `least` to
/// three times that. So a flag that flaps moves nothing to and fro, and a fleet does not turn as one.
#[derive(Debug, Clone)]
pub struct Comeback {
    least: Duration,
    at: Option<Moment>,
}

impl Comeback {
    /// 60 to 180 seconds.
    pub const LEAST: Duration = Duration::from_secs(60);

    /// With a wait from `least`, which is a second at the least, to three times that.
    pub fn new(least: Duration) -> Self {
        Comeback { least: least.max(SHORTEST), at: None }
    }

    /// Says whether v3 is allowed now. `random` is asked when that begins: any number, each as likely as another.
    pub fn observe(&mut self, now: Moment, allowed: bool, random: impl FnOnce() -> u32) {
        self.at = match (allowed, self.at) {
            (false, _) => None,
            (true, Some(at)) => Some(at),
            (true, None) => Some(Moment(now.0 + self.least + spread(self.least * 2, random()))),
        };
    }

    /// Whether the wait is over.
    pub fn is_due(&self, now: Moment) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// When it will be over, if it goes on.
    pub fn due(&self) -> Option<Moment> {
        self.at
    }
}

impl Default for Comeback {
    fn default() -> Self {
        Comeback::new(Self::LEAST)
    }
}

/// A part of `most`, from none to nearly all, as large as `random` among all numbers.
pub(crate) fn spread(most: Duration, random: u32) -> Duration {
    most.mul_f64(f64::from(random) / (f64::from(u32::MAX) + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }

    #[test]
    fn it_comes_after_sixty_to_a_hundred_and_eighty_seconds() {
        for (random, wait) in [(0, 60), (u32::MAX / 2, 120), (u32::MAX, 180)] {
            let mut comeback = Comeback::default();
            comeback.observe(at(100), true, || random);
            assert!(!comeback.is_due(at(100 + wait - 1)) && comeback.is_due(at(100 + wait)), "{random}");
        }
    }

    #[test]
    fn a_break_starts_the_wait_anew() {
        let mut comeback = Comeback::default();
        comeback.observe(at(0), true, || 0);
        comeback.observe(at(59), false, || 0);
        comeback.observe(at(59), true, || 0);
        // The wait is not drawn again while it lasts.
        comeback.observe(at(60), true, || u32::MAX);
        assert!(!comeback.is_due(at(118)) && comeback.is_due(at(119)));
        comeback.observe(at(119), false, || 0);
        assert!(!comeback.is_due(at(119)) && comeback.due().is_none());
    }

    #[test]
    fn it_takes_a_second_whatever_is_asked_for() {
        let mut comeback = Comeback::new(Duration::ZERO);
        comeback.observe(at(7), true, || 0);
        assert!(!comeback.is_due(at(7)) && comeback.is_due(at(8)));
    }
}
