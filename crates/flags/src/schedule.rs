//! When to poll, and whom.

use std::time::Duration;

use crate::comeback::spread;
use crate::lease::Moment;

/// The least time between two polls that the first answers.
const LEAST: Duration = Duration::from_millis(800);
/// What chance adds to it: the nodes of a fleet drift apart.
const SPREAD: Duration = Duration::from_millis(400);
/// What chance adds before another endpoint is asked in place of one that failed.
const DETOUR: Duration = Duration::from_millis(200);

/// For how long a poll may take in all. Less than the least pause between two polls, so that polls do not overlap.
pub const POLL_TIMEOUT: Duration = LEAST;

/// For how long a connection is kept whose answer does not come; an answer that comes after [`POLL_TIMEOUT`] is passed over.
/// To connect anew costs a busy server ten times what a poll costs, so nodes that did so right away would keep it busy. Two
/// polls and not more: after one that hangs there is time for another before the lease ends.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(1600);

/// The longest [`handshake_timeout`].
const LONGEST_HANDSHAKE: Duration = Duration::from_millis(6400);

/// For how long a TLS handshake may take, from poll to poll, after so many in a row that took too long: 1.6 s, then 3.2 s, then
/// 6.4 s. A server to which a whole fleet comes back shakes hands for longer than a poll waits, and each handshake that its
/// node no longer waits for was work for nothing. So nodes that find it busy wait longer, until it gets to the end of the line.
pub fn handshake_timeout(failures: u32) -> Duration {
    (ANSWER_TIMEOUT * (1 << failures.min(8))).min(LONGEST_HANDSHAKE)
}

/// The longest pause that a server can ask for. It costs the lease, so a longer one would be a way to switch nodes off.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Polls of one flag at several endpoints: every 1.0 s +- 0.2, counted from sending to sending. An endpoint is kept for as
/// long as it answers. If it fails the others are asked right away, once each; then the pace is the usual one again.
#[derive(Debug, Clone)]
pub struct Schedule {
    endpoints: usize,
    endpoint: usize,
    /// Failures in a row.
    failures: usize,
    due: Moment,
}

impl Schedule {
    /// The first poll is due at `now`. At least one endpoint is assumed.
    pub fn new(endpoints: usize, now: Moment) -> Self {
        Schedule { endpoints: endpoints.max(1), endpoint: 0, failures: 0, due: now }
    }

    /// When the next poll is due.
    pub fn due(&self) -> Moment {
        self.due
    }

    /// Whom to ask then, from 0.
    pub fn endpoint(&self) -> usize {
        self.endpoint
    }

    /// A poll was sent at `now`.
    pub fn sent(&mut self, now: Moment, random: u32) {
        self.due = Moment(now.0 + LEAST + spread(SPREAD, random));
    }

    /// It was answered by the right server, whatever the answer.
    pub fn answered(&mut self) {
        self.failures = 0;
    }

    /// It was not answered, or by a wrong one: the next goes elsewhere, if there is an elsewhere.
    pub fn failed(&mut self, now: Moment, random: u32) {
        self.endpoint = (self.endpoint + 1) % self.endpoints;
        self.failures = self.failures.saturating_add(1);
        if self.failures < self.endpoints {
            self.due = self.due.min(Moment(now.0 + spread(DETOUR, random)));
        }
    }

    /// The server asks to be left alone for so long, and is, up to [`LONGEST_PAUSE`].
    pub fn pause(&mut self, now: Moment, pause: Duration) {
        self.due = self.due.max(Moment(now.0 + pause.min(LONGEST_PAUSE)));
    }

    /// The next poll is due at once: somebody asked for it.
    pub fn hurry(&mut self, now: Moment) {
        self.due = self.due.min(now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{LEASE, Lease};

    fn at(millis: u64) -> Moment {
        Moment(Duration::from_millis(millis))
    }

    #[test]
    fn a_busy_server_is_waited_for_longer() {
        let millis = [0, 1, 2, 3, u32::MAX].map(|failures| handshake_timeout(failures).as_millis());
        assert_eq!(millis, [1600, 3200, 6400, 6400, 6400]);
        // One that hangs costs no lease where the next connection works: asked anew before that of the last good poll is over.
        assert!(ANSWER_TIMEOUT + LEAST + SPREAD < LEASE);
    }

    #[test]
    fn the_pace_counts_from_sending() {
        let mut schedule = Schedule::new(1, at(5));
        assert_eq!(schedule.due(), at(5));
        schedule.sent(at(10), 0);
        assert_eq!(schedule.due(), at(810));
        schedule.sent(at(10), u32::MAX / 2 + 1);
        assert_eq!(schedule.due(), at(1010));
        schedule.pause(at(10), Duration::from_secs(3600));
        assert_eq!(schedule.due(), at(5010));
        schedule.hurry(at(700));
        assert_eq!(schedule.due(), at(700));
    }

    #[test]
    fn a_failure_alone_changes_nothing() {
        let mut schedule = Schedule::new(1, at(0));
        schedule.sent(at(0), 0);
        schedule.failed(at(1), 0);
        assert_eq!((schedule.due(), schedule.endpoint()), (at(800), 0));
    }

    #[test]
    fn the_others_are_asked_at_once_and_once_each() {
        let mut schedule = Schedule::new(3, at(0));
        let mut asked = Vec::new();
        for _ in 0..5 {
            let now = schedule.due();
            asked.push((now, schedule.endpoint()));
            schedule.sent(now, 0);
            schedule.failed(Moment(now.0 + Duration::from_millis(10)), 0);
        }
        // Two detours of 10 ms, and then there is nobody left to ask in a hurry.
        assert_eq!(asked, [(at(0), 0), (at(10), 1), (at(20), 2), (at(820), 0), (at(1620), 1)]);
        schedule.answered();
        assert_eq!(schedule.endpoint(), 2);
    }

    proptest! {
        /// With one of two endpoints alive the lease never ends, whichever it is, and however long the dead one hangs.
        #[test]
        fn one_endpoint_alive_keeps_the_lease(
            randoms in proptest::collection::vec(any::<u32>(), 40),
            alive in 0usize..2,
            hang in 1u64..800,
            answer in 1u64..300,
        ) {
            let mut schedule = Schedule::new(2, at(0));
            let mut lease = Lease::default();
            lease.confirm(at(0));
            for pair in randoms.chunks(2) {
                let now = schedule.due();
                prop_assert!(lease.holds(now), "{now:?}");
                schedule.sent(now, pair[0]);
                if schedule.endpoint() == alive {
                    prop_assert!(lease.holds(Moment(now.0 + Duration::from_millis(answer))));
                    lease.confirm(now);
                    schedule.answered();
                } else {
                    schedule.failed(Moment(now.0 + Duration::from_millis(hang)), pair[1]);
                }
            }
        }

        /// A server is never asked faster than its pace, whatever fails.
        #[test]
        fn nobody_is_asked_too_often(
            steps in proptest::collection::vec((any::<bool>(), any::<u32>(), 0u64..800), 60),
            endpoints in 1usize..4,
        ) {
            let mut schedule = Schedule::new(endpoints, at(0));
            let mut sent = Vec::new();
            for (answered, random, took) in steps {
                let now = schedule.due();
                sent.push((now, schedule.endpoint()));
                schedule.sent(now, random);
                match answered {
                    true => schedule.answered(),
                    false => schedule.failed(Moment(now.0 + Duration::from_millis(took)), random),
                }
            }
            for endpoint in 0..endpoints {
                let times: Vec<Moment> =
                    sent.iter().filter(|(_, to)| *to == endpoint).map(|(at, _)| *at).collect();
                prop_assert!(times.windows(2).all(|pair| pair[1].0 - pair[0].0 >= LEAST));
            }
            prop_assert!(LEASE > POLL_TIMEOUT * 3);
        }
    }
}
