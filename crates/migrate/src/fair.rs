//! The node's bandwidth, shared fairly among the migrations that leave it.
//!
//! All of them together stay within one rate. Who is held back by it gets the same share as the others that are, whatever the size of
//! their writes; who wants less (its own limit, a slow link) takes less, and what it leaves goes to the others. Whoever is urgent goes
//! first: its guest stands still.

use std::collections::HashMap;
use std::time::Duration;

use crate::bucket::Bucket;

/// How far ahead of a migration that waits another may get, bytes: about one chunk, which is what is written at once.
const LEAD: u64 = 1 << 20;
/// The most that one who asked for little may catch up on the others: well above the lead that each may have.
const CREDIT: u64 = 4 * LEAD;
/// How long one that is ahead lets those behind go first, before it asks again.
const TURN: Duration = Duration::from_millis(1);
/// How long one that was told to wait may take to come back, before nobody waits for it any more.
const GRACE: Duration = Duration::from_millis(50);

/// A place in the sharing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Flow(u64);

/// See the module. Without a clock: time is the duration since a fixed moment, the same for all flows.
#[derive(Debug)]
pub(crate) struct Fair {
    all: Bucket,
    flows: HashMap<Flow, State>,
    next: u64,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Bytes written, or forgone: who asks for little saves no more up than [`CREDIT`].
    served: u64,
    /// It is held back, and was told to ask again before this moment.
    waits_until: Option<Duration>,
    urgent: bool,
    /// When it last wrote.
    wrote: Duration,
}

impl Fair {
    /// So many bytes a second for all; `None` is no limit.
    pub(crate) fn new(rate: Option<u64>) -> Self {
        Fair { all: Bucket::new(rate), flows: HashMap::new(), next: 0 }
    }

    /// A migration begins. To be taken out by [`leave`](Self::leave).
    pub(crate) fn join(&mut self) -> Flow {
        let flow = Flow(self.next);
        self.next += 1;
        self.flows.insert(flow, State { served: 0, waits_until: None, urgent: false, wrote: Duration::ZERO });
        flow
    }

    /// A migration has ended.
    pub(crate) fn leave(&mut self, flow: Flow) {
        self.flows.remove(&flow);
    }

    /// What this flow has to write goes before what the others have, or as theirs.
    pub(crate) fn urgent(&mut self, flow: Flow, urgent: bool) {
        if let Some(state) = self.flows.get_mut(&flow) {
            state.urgent = urgent;
        }
    }

    /// How long this flow is to wait before it asks again; zero: it may write now.
    pub(crate) fn wait(&mut self, flow: Flow, now: Duration) -> Duration {
        let behind = self.least_waiting(flow, now);
        let gives_way = self.all.is_limited() && self.others_are_urgent(flow, now);
        let Some(mut state) = self.flows.get(&flow).copied() else { return Duration::ZERO };
        if state.urgent || gives_way {
            let wait = self.all.wait(now);
            let wait = if state.urgent { wait } else { wait.max(TURN) };
            state.waits_until = (!wait.is_zero()).then(|| now + wait + GRACE);
            self.flows.insert(flow, state);
            return wait;
        }
        if let Some(behind) = behind {
            state.served = state.served.max(behind.saturating_sub(CREDIT));
        }
        let wait = match behind {
            Some(behind) if state.served > behind.saturating_add(LEAD) => self.all.wait(now).max(TURN),
            _ => self.all.wait(now),
        };
        state.waits_until = (!wait.is_zero()).then(|| now + wait + GRACE);
        self.flows.insert(flow, state);
        wait
    }

    /// This flow has written `bytes`.
    pub(crate) fn spend(&mut self, flow: Flow, bytes: u64, now: Duration) {
        self.all.spend(bytes, now);
        if let Some(state) = self.flows.get_mut(&flow) {
            state.served = state.served.saturating_add(bytes);
            state.wrote = now;
        }
    }

    /// Whether another flow is urgent and has something to write: it did a moment ago, or is held back. It may ask without.
    fn others_are_urgent(&self, flow: Flow, now: Duration) -> bool {
        let mut others = self.flows.iter().filter(|(other, _)| **other != flow);
        others.any(|(_, state)| {
            state.urgent
                && (state.wrote + GRACE >= now || state.waits_until.is_some_and(|until| until >= now))
        })
    }

    /// What the least served of the others that are held back has got.
    fn least_waiting(&self, flow: Flow, now: Duration) -> Option<u64> {
        let waits = |state: &&State| state.waits_until.is_some_and(|until| until >= now);
        let others = self.flows.iter().filter(|(other, _)| **other != flow);
        others.map(|(_, state)| state).filter(waits).map(|state| state.served).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: u64 = 100_000_000;

    /// A sender: the bytes of its writes, and the least time between two of them that its own link takes.
    struct Sender {
        flow: Flow,
        write: u64,
        pause: Duration,
        due: Duration,
        sent: u64,
    }

    fn sender(fair: &mut Fair, write: u64, pause_ms: u64, begins_ms: u64) -> Sender {
        let (pause, due) = (Duration::from_millis(pause_ms), Duration::from_millis(begins_ms));
        Sender { flow: fair.join(), write, pause, due, sent: 0 }
    }

    /// Lets them send until `end`, each woken when it asked to be.
    fn run(fair: &mut Fair, senders: &mut [Sender], end: Duration) {
        while let Some(sender) = senders.iter_mut().min_by_key(|s| s.due).filter(|s| s.due < end) {
            let now = sender.due;
            let wait = fair.wait(sender.flow, now);
            sender.due = now + wait;
            if wait.is_zero() {
                fair.spend(sender.flow, sender.write, now);
                sender.sent += sender.write;
                sender.due = now + sender.pause.max(Duration::from_micros(10));
            }
        }
    }

    fn assert_near(actual: u64, expected: f64, what: &str) {
        assert!((actual as f64 / expected - 1.0).abs() < 0.1, "{what}: {actual}, not {expected}");
    }

    #[test]
    fn all_together_stay_within_the_rate_and_each_gets_the_same() {
        let mut fair = Fair::new(Some(RATE));
        let mut senders: Vec<_> =
            (0..8).map(|n| sender(&mut fair, [10_000, 300_000, 1 << 20][n % 3], 0, 0)).collect();
        run(&mut fair, &mut senders, Duration::from_secs(10));
        assert_near(senders.iter().map(|s| s.sent).sum(), 10.0 * RATE as f64, "all");
        senders.iter().for_each(|s| assert_near(s.sent, 10.0 * RATE as f64 / 8.0, "each"));
    }

    #[test]
    fn what_one_does_not_want_the_others_get() {
        let mut fair = Fair::new(Some(RATE));
        // The first writes 100 KB each 20 ms: 5 MB a second.
        let mut senders = [
            sender(&mut fair, 100_000, 20, 0),
            sender(&mut fair, 1 << 20, 0, 0),
            sender(&mut fair, 1 << 20, 0, 0),
        ];
        run(&mut fair, &mut senders, Duration::from_secs(10));
        let [slow, one, other] = senders.map(|s| s.sent);
        assert!((40_000_000..=50_000_000).contains(&slow), "{slow}");
        assert_near(one, 475e6, "one");
        assert_near(other, 475e6, "other");
    }

    #[test]
    fn who_comes_later_has_saved_nothing_up_and_owes_nothing() {
        let mut fair = Fair::new(Some(RATE));
        let mut senders = [sender(&mut fair, 1 << 20, 0, 0), sender(&mut fair, 1 << 20, 0, 5_000)];
        run(&mut fair, &mut senders, Duration::from_secs(10));
        assert_near(senders[0].sent, 750e6, "the first");
        assert_near(senders[1].sent, 250e6, "the second");
    }

    #[test]
    fn who_is_gone_or_does_not_come_back_holds_nobody_up() {
        let mut fair = Fair::new(Some(RATE));
        let (gone, lost) = (fair.join(), fair.join());
        let mut senders = [sender(&mut fair, 1 << 20, 0, 0)];
        fair.spend(gone, 1 << 20, Duration::ZERO);
        for flow in [gone, lost] {
            assert!(!fair.wait(flow, Duration::ZERO).is_zero());
        }
        fair.leave(gone);
        run(&mut fair, &mut senders, Duration::from_secs(1));
        assert_near(senders[0].sent, RATE as f64, "the one that is left");
    }

    #[test]
    fn whoever_is_urgent_goes_before_the_others_while_it_has_something_to_say() {
        let mut fair = Fair::new(Some(RATE));
        let mut senders: Vec<_> = (0..8).map(|_| sender(&mut fair, 1 << 20, 0, 0)).collect();
        run(&mut fair, &mut senders, Duration::from_secs(1));
        let before = senders[0].sent;
        fair.urgent(senders[0].flow, true);
        run(&mut fair, &mut senders, Duration::from_secs(2));
        let urgent = senders[0].sent - before;
        assert!(urgent as f64 > 0.9 * RATE as f64, "{urgent}");
        // It says nothing more.
        senders[0].due = Duration::from_secs(100);
        let others = |senders: &[Sender]| senders[1..].iter().map(|s| s.sent).sum::<u64>();
        let before = others(&senders);
        run(&mut fair, &mut senders, Duration::from_secs(3));
        assert_near(others(&senders) - before, 0.95 * RATE as f64, "the others");
        // Asking alone holds nobody up.
        fair.wait(senders[0].flow, Duration::from_secs(4));
        assert!(fair.wait(senders[1].flow, Duration::from_secs(4)).is_zero());
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let mut fair = Fair::new(None);
        let (one, other) = (fair.join(), fair.join());
        fair.spend(one, u64::MAX, Duration::ZERO);
        assert_eq!(fair.wait(one, Duration::ZERO), Duration::ZERO);
        fair.urgent(one, true);
        assert_eq!(fair.wait(one, Duration::ZERO), Duration::ZERO);
        assert_eq!(fair.wait(other, Duration::ZERO), Duration::ZERO);
    }
}
