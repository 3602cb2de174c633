//! Which mode a link calls for, before a migration and while it runs.
//!
//! # States and invariants
//! The choice knows the mode that holds, and since when without a break the link has called for the other one.
//! - Datacenter needs both: a round trip below the bound, and a rate that reaches the bound. Everything else is internet.
//! - Between what enters a mode and what leaves it lies a band in which nothing changes ([`FAR`], [`ENOUGH`], [`LITTLE`]).
//! - A change needs [`CONFIRM`] of measurements that agree, none of them more than that apart.
//! - After a change the next one waits for [`REST`], and after that each time twice as long, up to [`MAX_REST`]: a mode that fills
//!   the link's queues by itself cannot make a migration turn to and fro.
//! - A rate counts against the link only where the link was what bounded it: a guest with little to send, or a destination that is
//!   slow, says nothing about the link.
//! - A round trip that became long is doubted while it could be the queues that the migration itself fills: see
//!   [`ModeChoice::doubts`].
//! - What the caller fixed by name is never changed.
//!
//! No clock: time is given as the duration since a fixed moment.

use std::time::Duration;

use crate::negotiate::Mode;
use crate::path::Cause;
use crate::units;

/// A round trip counts as too long for a datacenter, once in its mode, from so many times the bound on.
pub const FAR: f64 = 1.5;
/// A link of the bound's nominal rate carries this share of it as payload.
pub const ENOUGH: f64 = 0.9;
/// A rate is too low for a datacenter, once in its mode, below this share of the bound.
pub const LITTLE: f64 = 0.7;
/// How long measurements must agree before the mode changes.
pub const CONFIRM: Duration = Duration::from_millis(750);
/// The least time between a change and the next one.
pub const REST: Duration = Duration::from_secs(3);
/// The most that it grows to.
pub const MAX_REST: Duration = Duration::from_secs(60);

/// What makes a link a datacenter's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The round trip must be shorter.
    pub rtt: Duration,
    /// It must carry as much: bytes a second, as the link is called by name.
    pub rate: u64,
}

impl Default for Bounds {
    /// Below 5 ms, and from 1 Gbit/s.
    fn default() -> Self {
        Bounds { rtt: Duration::from_millis(5), rate: 125_000_000 }
    }
}

impl Bounds {
    /// The mode of a link before anything flows, and why. `rate` is what it carried when it was probed, bytes a second; none if that
    /// could not be, then the round trip decides.
    pub fn judge(&self, rtt: Duration, rate: Option<f64>) -> (Mode, String) {
        let (trip, bound) = (millis(rtt), millis(self.rtt));
        if rtt >= self.rtt {
            return (Mode::Internet, format!("the round trip of {trip} is not below {bound}"));
        }
        let wanted = units::rate(self.rate as f64);
        match rate {
            None => (
                Mode::Datacenter,
                format!("the round trip of {trip} is below {bound}; the rate could not be probed"),
            ),
            Some(rate) if rate < self.enough() => {
                let carried = units::rate(rate);
                (Mode::Internet, format!("the link carries {carried}, less than {wanted} has"))
            }
            Some(rate) => {
                let carried = units::rate(rate);
                let text =
                    format!("the round trip of {trip} is below {bound}, and the link carries {carried}");
                (Mode::Datacenter, text)
            }
        }
    }

    /// Bytes a second of payload that a link of the bound's rate carries at least.
    pub fn enough(&self) -> f64 {
        self.rate as f64 * ENOUGH
    }
}

/// A link at one moment of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// The least round trip of late between the agents.
    pub rtt: Option<Duration>,
    /// The least round trip of late that the kernel saw on the data connections, which a busy agent does not prolong.
    pub kernel_rtt: Option<Duration>,
    /// Bytes a second that the link carried, at least.
    pub rate: f64,
    /// The link was what bounded `rate`.
    pub full: bool,
}

/// A change that should be made now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModeChange {
    /// To this mode.
    pub to: Mode,
    /// Why, by its stable code.
    pub cause: Cause,
    /// Why, in words.
    pub reason: String,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct ModeChoice {
    mode: Mode,
    /// The caller asked for it by name.
    fixed: bool,
    bounds: Bounds,
    /// Since when the other mode is called for, and when that was last seen.
    other: Option<(Duration, Duration)>,
    /// When the next change may be made, after the first.
    rested: Duration,
    rest: Duration,
    doubts: bool,
}

impl ModeChoice {
    /// The choice of a migration that begins in `mode`; `fixed` if the caller asked for it by name.
    pub fn new(mode: Mode, fixed: bool, bounds: Bounds) -> Self {
        ModeChoice { mode, fixed, bounds, other: None, rested: Duration::ZERO, rest: REST, doubts: false }
    }

    /// The mode that holds.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Takes a measurement of `now`, and says which change should be made. It is said again until it was made.
    pub fn measured(&mut self, link: Link, now: Duration) -> Option<ModeChange> {
        let change = self.against(link).filter(|_| !self.fixed);
        self.doubts = now >= self.rested && matches!(change, Some((Cause::LinkFar, _)));
        let Some((cause, reason)) = change else {
            self.other = None;
            return None;
        };
        let since = match self.other {
            Some((since, seen)) if now.saturating_sub(seen) <= CONFIRM => since,
            _ => now,
        };
        self.other = Some((since, now));
        let to = match self.mode {
            Mode::Internet => Mode::Datacenter,
            Mode::Datacenter => Mode::Internet,
        };
        let due = now.saturating_sub(since) >= CONFIRM && now >= self.rested;
        due.then_some(ModeChange { to, cause, reason })
    }

    /// The round trip looks long, and a change hangs on it: the sender should keep the link's queues short until that is decided, so
    /// that they are not what looks long ([`crate::pace::Pace::narrow`]).
    pub fn doubts(&self) -> bool {
        self.doubts
    }

    /// `mode` holds from now on.
    pub fn changed(&mut self, mode: Mode, now: Duration) {
        self.mode = mode;
        (self.other, self.doubts) = (None, false);
        self.rested = now + self.rest;
        self.rest = (self.rest * 2).min(MAX_REST);
    }

    /// What speaks against the mode that holds.
    fn against(&self, link: Link) -> Option<(Cause, String)> {
        let Bounds { rtt: bound, rate } = self.bounds;
        let wanted = units::rate(rate as f64);
        match self.mode {
            Mode::Datacenter => {
                let trip = link.rtt.zip(link.kernel_rtt).map(|(agents, kernel)| agents.min(kernel));
                if let Some(trip) = trip.filter(|trip| *trip >= bound.mul_f64(FAR)) {
                    let text = format!("the round trip has become {}", millis(trip));
                    return Some((Cause::LinkFar, text));
                }
                let little = link.full && link.rate < rate as f64 * LITTLE;
                let carried = units::rate(link.rate);
                little
                    .then(|| (Cause::LinkSlow, format!("the link carries {carried}, less than {wanted} has")))
            }
            Mode::Internet => {
                let trip = link.rtt.filter(|trip| *trip < bound)?;
                let text = || {
                    let (trip, carried) = (millis(trip), units::rate(link.rate));
                    format!("the round trip has become {trip}, and the link carries {carried}")
                };
                (link.rate >= self.bounds.enough()).then(|| (Cause::LinkNear, text()))
            }
        }
    }
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Duration = Duration::from_millis(250);
    const NEAR: Link = Link { rtt: Some(MS), kernel_rtt: Some(MS), rate: 1e9, full: true };
    const FAR_AWAY: Link = Link { rtt: Some(LONG), kernel_rtt: Some(LONG), rate: 25e6, full: true };
    const MS: Duration = Duration::from_millis(1);
    const LONG: Duration = Duration::from_millis(20);

    fn choice(mode: Mode) -> ModeChoice {
        ModeChoice::new(mode, false, Bounds::default())
    }

    /// Steps until there is a change; how long that took.
    fn steady(choice: &mut ModeChoice, link: Link, from: Duration) -> Option<(Duration, ModeChange)> {
        (0..400).map(|n| STEP * n).find_map(|t| choice.measured(link, from + t).map(|change| (t, change)))
    }

    #[test]
    fn both_bounds_make_a_datacenter() {
        let ms = Duration::from_millis;
        let bounds = Bounds::default();
        let mode = |rtt, rate| bounds.judge(rtt, rate).0;
        assert_eq!(mode(ms(5), Some(1e12)), Mode::Internet);
        assert_eq!(mode(ms(4), Some(25e6)), Mode::Internet);
        // What a link of 1 Gbit/s carries beside headers.
        assert_eq!(mode(ms(4), Some(117e6)), Mode::Datacenter);
        let (mode, why) = bounds.judge(ms(4), None);
        assert_eq!(mode, Mode::Datacenter);
        assert!(why.contains("could not be probed"), "{why}");
        assert!(bounds.judge(ms(20), None).1.contains("20.0 ms"));
    }

    #[test]
    fn a_link_that_becomes_far_or_near_changes_the_mode_within_a_second() {
        let mut choice = choice(Mode::Datacenter);
        assert_eq!(steady(&mut choice, NEAR, Duration::ZERO), None);
        assert!(!choice.doubts());
        let (took, change) = steady(&mut choice, FAR_AWAY, STEP * 400).unwrap();
        assert!(choice.doubts());
        assert_eq!((change.to, change.cause), (Mode::Internet, Cause::LinkFar));
        assert!(took <= Duration::from_secs(1), "{took:?}");
        choice.changed(Mode::Internet, STEP * 404);
        assert_eq!(steady(&mut choice, FAR_AWAY, STEP * 404), None);
        let (took, change) = steady(&mut choice, NEAR, STEP * 804).unwrap();
        assert_eq!((change.to, change.cause), (Mode::Datacenter, Cause::LinkNear));
        assert!(took <= Duration::from_secs(1), "{took:?}");
    }

    #[test]
    fn a_rate_counts_against_the_link_only_where_the_link_bounds_it() {
        let slow = Link { rate: 20e6, ..NEAR };
        let (_, change) = steady(&mut choice(Mode::Datacenter), slow, Duration::ZERO).unwrap();
        assert_eq!(change.cause, Cause::LinkSlow);
        // Queues that it fills by itself: the doubt empties them, and the measurements stop to agree.
        let (mut queues, mut changes) = (choice(Mode::Datacenter), 0);
        for n in 0..100 {
            let link = if queues.doubts() { NEAR } else { Link { rate: 1e9, ..FAR_AWAY } };
            changes += u32::from(queues.measured(link, STEP * n).is_some());
        }
        assert_eq!(changes, 0);
        assert_eq!(steady(&mut choice(Mode::Datacenter), Link { full: false, ..slow }, Duration::ZERO), None);
        // A busy agent answers late; the kernel knows better. And without data nothing is known.
        let late = Link { kernel_rtt: Some(MS), full: false, ..FAR_AWAY };
        assert_eq!(steady(&mut choice(Mode::Datacenter), late, Duration::ZERO), None);
        let silent = Link { kernel_rtt: None, ..late };
        assert_eq!(steady(&mut choice(Mode::Datacenter), silent, Duration::ZERO), None);
    }

    #[test]
    fn between_the_bounds_nothing_changes() {
        let ms = Duration::from_millis;
        let band = Link { rtt: Some(ms(6)), kernel_rtt: Some(ms(6)), rate: 100e6, full: true };
        for mode in [Mode::Internet, Mode::Datacenter] {
            assert_eq!(steady(&mut choice(mode), band, Duration::ZERO), None);
        }
    }

    #[test]
    fn a_mode_by_name_stays() {
        let mut choice = ModeChoice::new(Mode::Datacenter, true, Bounds::default());
        assert_eq!(steady(&mut choice, FAR_AWAY, Duration::ZERO), None);
    }

    #[test]
    fn a_single_measurement_is_not_believed_and_a_gap_begins_anew() {
        let mut choice = choice(Mode::Datacenter);
        for n in 0..20 {
            assert_eq!(choice.measured(FAR_AWAY, CONFIRM * 2 * n), None, "{n}");
        }
    }

    proptest! {
        /// Whatever the link does: changes keep their distance, which grows; each was called for without a break for as long as
        /// it takes; and a link that is steady for long enough gets its mode.
        #[test]
        fn it_never_flaps(looks in prop::collection::vec((0u64..600, 0usize..3), 1..300), start in any::<bool>()) {
            let mut choice = choice(if start { Mode::Datacenter } else { Mode::Internet });
            let (mut now, mut last, mut rest) = (Duration::ZERO, None::<Duration>, REST);
            let mut since = None::<Duration>;
            for (step, look) in looks {
                now += Duration::from_millis(step);
                let band = Link { rtt: Some(MS * 6), kernel_rtt: Some(MS * 6), rate: 1e9, full: false };
                let link = [NEAR, FAR_AWAY, band][look];
                let calls = match choice.mode() { Mode::Datacenter => look == 1, Mode::Internet => look == 0 };
                since = if calls { since.or(Some(now)) } else { None };
                let change = choice.measured(link, now);
                if let Some(change) = &change {
                    prop_assert!(change.to != choice.mode());
                    prop_assert!(since.is_some_and(|since| now >= since + CONFIRM));
                    prop_assert!(last.is_none_or(|last| now >= last + rest));
                    if last.is_some() {
                        rest = (rest * 2).min(MAX_REST);
                    }
                    choice.changed(change.to, now);
                    (last, since) = (Some(now), None);
                }
            }
            let settle = now + MAX_REST;
            prop_assert!(choice.mode() == Mode::Internet || steady(&mut choice, FAR_AWAY, settle).is_some());
        }
    }
}
