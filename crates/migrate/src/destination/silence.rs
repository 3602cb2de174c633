//! Data connections on which nothing comes though it is waited for.
//!
//! A connection can stall and stay open: what stands between the agents has taken the bytes, acknowledged them to the source's TCP, and
//! passes nothing on. Neither end sees it: the source has written, the destination reads, and over the control connection both are
//! alive. So the destination tells on which connections it waits in vain, and the source, who knows what was sent there, gives
//! that connection up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use dwcp_proto::fault::Mechanism;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};

use crate::control::STALLED;

/// Between two looks at who waits.
const LOOK: Duration = Duration::from_millis(500);

/// The pulse of the looks.
pub(crate) fn look() -> Interval {
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look
}

/// Since when a connection's task has been waiting for its next byte. A task that waits for its own node, because the VMM reads slowly or
/// the pool is busy, does not count.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waiting(Arc<Mutex<Option<Instant>>>);

impl Waiting {
    /// From now on the next byte is waited for.
    pub(crate) fn begins(&self) {
        self.set(Some(Instant::now()));
    }

    /// Something else is waited for.
    pub(crate) fn ends(&self) {
        self.set(None);
    }

    /// Whether it has been waiting for too long.
    pub(crate) fn in_vain(&self) -> bool {
        if Mechanism::Stall.is_off() {
            return false;
        }
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        since.is_some_and(|since| since.elapsed() >= STALLED)
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}
