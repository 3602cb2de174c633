//! What a migration would take: a pure function of the guest, the link and the agents.
//!
//! Precopy is played through round by round, as QEMU does it: a round sends what was dirtied during the one before; when what is left
//! fits into the downtime at the speed of the last round, the guest is stopped. What is dirtied in a time `t` is
//! `hot * (1 - exp(-churn * t))`: writes that hit the same page twice count once, so that it saturates at the hot set.
//!
//! Rates are bytes a second, memory is bytes.

use std::time::Duration;

/// Rounds that are played through; what has not converged by then does not.
const MAX_ROUNDS: u32 = 200;
/// A round that is no smaller than this part of the one before makes no headway.
const HEADWAY: f64 = 0.97;
/// So many rounds without headway in a row are a migration that does not converge.
const STANDSTILL: u32 = 5;
/// Bytes on the wire for a zero page, of its 4096.
const ZERO_COST: f64 = 1.0 / 4096.0;

/// What a guest's memory is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Memory {
    /// All of it.
    pub bytes: f64,
    /// The share that is zero, 0 to 1.
    pub zero: f64,
    /// Bytes on the wire for each byte of a page that is sent for the first time and is not zero.
    pub first: f64,
    /// The same for a page that is sent again.
    pub again: f64,
    /// Memory that is written to again and again.
    pub hot: f64,
    /// The share of it that is dirtied in a short time, a second.
    pub churn: f64,
}

impl Memory {
    /// Memory dirtied in so many seconds.
    pub fn dirtied(&self, seconds: f64) -> f64 {
        self.hot * -(-self.churn * seconds).exp_m1()
    }
}

/// Hot set and churn of a guest that dirtied `short` bytes in `t` seconds and `long` in `times` as many; of memory of `all` bytes. The
/// first of two measurements is believed where they contradict each other.
pub fn hot_set(short: f64, long: f64, t: f64, times: f64, all: f64) -> (f64, f64) {
    if short <= 0.0 || t <= 0.0 {
        return (0.0, 0.0);
    }
    let ratio = long / short;
    if ratio <= 1.0 + 1e-6 {
        // All of it within the shorter time.
        return (short, 10.0 / t);
    }
    // (1 - q^times) / (1 - q) falls from `times` to 1 while q = exp(-churn t) falls from 1 to 0.
    let sum = |q: f64| (1.0 - q.powf(times)) / (1.0 - q);
    let (mut low, mut high) = (1e-9, 1.0 - 1e-9);
    for _ in 0..100 {
        let middle = (low + high) / 2.0;
        if sum(middle) < ratio { low = middle } else { high = middle }
    }
    let hot = (short / (1.0 - low)).min(all);
    let share = (short / hot).min(1.0 - 1e-9);
    (hot, -(-share).ln_1p() / t)
}

/// What carries it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Way {
    /// Bytes a second that the link takes.
    pub link: f64,
    /// Guest memory that the agents and the VMM get through in a second, however little of it is sent.
    pub agents: f64,
    /// Zero memory that the VMM gets through in a second.
    pub zeros: f64,
    /// From the request to the first byte.
    pub setup: Duration,
    /// Of the downtime: what may be left to send when the guest stops, as QEMU reckons.
    pub left: Duration,
    /// Of the downtime: handover, devices, journals.
    pub overhead: Duration,
}

/// What it comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Whether precopy comes to an end by itself. If not, the other figures are those at which it stands still.
    pub converges: bool,
    /// From the request to the guest's running at the destination, seconds.
    pub seconds: f64,
    /// Of these the guest stands still so long, seconds.
    pub downtime: f64,
    /// On the wire.
    pub wire: f64,
    /// Rounds over memory, the last one included.
    pub rounds: u32,
}

/// Plays a migration through.
pub fn forecast(memory: &Memory, way: &Way) -> Forecast {
    let cost = |bytes: f64, ratio: f64| (bytes * ratio / way.link.max(1.0)).max(bytes / way.agents.max(1.0));
    let zeros = memory.bytes * memory.zero;
    let whole = memory.bytes - zeros;
    let mut wire = whole * memory.first + zeros * ZERO_COST;
    let mut time = cost(whole, memory.first) + zeros / way.zeros.max(1.0);
    let mut seconds = way.setup.as_secs_f64() + time;
    // What is dirtied is mostly not zero; the first round's speed is that of what had to be sent.
    let mut speed = whole / cost(whole, memory.first).max(1e-9);
    let mut before = f64::INFINITY;
    let (mut rounds, mut still) = (1, 0);
    loop {
        let dirty = memory.dirtied(time);
        let last = dirty <= speed * way.left.as_secs_f64();
        let converges = last || dirty <= 0.0;
        still = if dirty > before * HEADWAY { still + 1 } else { 0 };
        if converges || still >= STANDSTILL || rounds >= MAX_ROUNDS {
            let rest = cost(dirty, memory.again);
            let downtime = way.overhead.as_secs_f64() + rest;
            wire += dirty * memory.again;
            seconds += downtime;
            return Forecast { converges, seconds, downtime, wire, rounds: rounds + 1 };
        }
        time = cost(dirty, memory.again).max(1e-6);
        wire += dirty * memory.again;
        seconds += time;
        speed = dirty / time;
        before = dirty;
        rounds += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: f64 = (1u64 << 30) as f64;

    fn idle() -> Memory {
        Memory { bytes: 2.0 * GIB, zero: 0.5, first: 0.4, again: 0.1, hot: 0.0, churn: 0.0 }
    }

    fn way() -> Way {
        Way {
            link: 25e6,
            agents: 100e6,
            zeros: 2e9,
            setup: Duration::from_millis(100),
            left: Duration::from_millis(100),
            overhead: Duration::from_millis(60),
        }
    }

    #[test]
    fn an_idle_guest_takes_its_bytes_over_the_links_rate() {
        let forecast = forecast(&idle(), &way());
        let expected = GIB * 0.4 / 25e6 + GIB / 2e9 + 0.16;
        assert!((forecast.seconds - expected).abs() < 0.1, "{forecast:?} {expected}");
        assert!(forecast.converges && forecast.rounds == 2);
        assert!((forecast.downtime - 0.06).abs() < 1e-9);
        assert!((forecast.wire / (GIB * 0.4) - 1.0).abs() < 0.01);
    }

    #[test]
    fn a_fast_link_leaves_the_agents_as_what_bounds_it() {
        let forecast = forecast(&idle(), &Way { link: 10e9, ..way() });
        assert!((forecast.seconds - (GIB / 100e6 + GIB / 2e9 + 0.16)).abs() < 0.1, "{forecast:?}");
    }

    #[test]
    fn a_hot_set_that_is_rewritten_faster_than_it_is_sent_does_not_converge() {
        let hot = Memory { hot: 256e6, churn: 0.3, again: 1.0, ..idle() };
        let stuck = forecast(&hot, &way());
        assert!(!stuck.converges, "{stuck:?}");
        assert!(stuck.downtime > 0.3);
        // As deltas the same guest is done in a few rounds.
        let deltas = forecast(&Memory { again: 0.03, ..hot }, &way());
        assert!(deltas.converges, "{deltas:?}");
        assert!(deltas.rounds > 2);
    }

    #[test]
    fn two_measurements_tell_the_hot_set() {
        let guest = Memory { hot: 256e6, churn: 0.3, ..idle() };
        let (hot, churn) = hot_set(guest.dirtied(1.0), guest.dirtied(3.0), 1.0, 3.0, GIB);
        assert!((hot / 256e6 - 1.0).abs() < 0.01 && (churn / 0.3 - 1.0).abs() < 0.01, "{hot} {churn}");
        assert_eq!(hot_set(0.0, 5.0, 1.0, 3.0, GIB), (0.0, 0.0));
        // Steady writes to fresh pages: the hot set is as large as memory, at the same rate.
        let (hot, churn) = hot_set(1e6, 3e6, 1.0, 3.0, GIB);
        assert!((hot * churn / 1e6 - 1.0).abs() < 0.01, "{hot} {churn}");
        let (hot, _) = hot_set(5e6, 5e6, 1.0, 3.0, GIB);
        assert_eq!(hot, 5e6);
    }

    proptest! {
        /// Always an answer of finite figures, and no less of a link is ever better.
        #[test]
        fn it_ends_and_is_monotonic(
            zero in 0.0f64..=1.0, first in 0.0f64..1.1, again in 0.0f64..1.1,
            hot in 0.0f64..2e9, churn in 0.0f64..100.0, link in 0.0f64..2e9,
        ) {
            let memory = Memory { bytes: 2.0 * GIB, zero, first, again, hot, churn };
            let slow = forecast(&memory, &Way { link, ..way() });
            let fast = forecast(&memory, &Way { link: link * 2.0, ..way() });
            prop_assert!(slow.seconds.is_finite() && slow.wire.is_finite() && slow.rounds <= MAX_ROUNDS + 1);
            prop_assert!(!slow.converges || fast.converges || slow.downtime >= fast.downtime);
        }

        #[test]
        fn a_hot_set_is_found_for_whatever_was_measured(short in 0.0f64..1e9, long in 0.0f64..3e9) {
            let (hot, churn) = hot_set(short, long, 1.0, 3.0, 2.0 * GIB);
            prop_assert!(hot.is_finite() && churn.is_finite() && hot >= 0.0 && churn >= 0.0);
            let again = hot * -(-churn).exp_m1();
            prop_assert!((again - short).abs() <= short * 0.02 + 1.0, "{again} {short}");
        }
    }
}
