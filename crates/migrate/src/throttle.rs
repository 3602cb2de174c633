//! How fast one migration may write to the network: its own limit, and its share of the node's.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::bucket::Bucket;
use crate::fair::{Fair, Flow};

/// What all migrations that leave this node may write together.
#[derive(Debug)]
pub(crate) struct NodeBandwidth {
    started: Instant,
    fair: Mutex<Fair>,
}

impl NodeBandwidth {
    /// So many bytes a second; `None` is no limit.
    pub(crate) fn new(rate: Option<u64>) -> Arc<Self> {
        Arc::new(NodeBandwidth { started: Instant::now(), fair: Mutex::new(Fair::new(rate)) })
    }

    /// The throttle of a migration, which may have a limit of its own.
    pub(crate) fn throttle(self: &Arc<Self>, own: Option<u64>) -> Throttle {
        let flow = self.fair().join();
        Throttle { node: self.clone(), flow, own: Mutex::new(Bucket::new(own)) }
    }

    fn fair(&self) -> MutexGuard<'_, Fair> {
        self.fair.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module. It goes with the migration, over all of its legs.
#[derive(Debug)]
pub(crate) struct Throttle {
    node: Arc<NodeBandwidth>,
    flow: Flow,
    own: Mutex<Bucket>,
}

impl Throttle {
    /// How long to wait before asking again; zero: a write may go out now.
    pub(crate) fn wait(&self) -> Duration {
        let now = self.node.started.elapsed();
        match self.own().wait(now) {
            // Its own limit holds it back: it is not one that waits for the others.
            Duration::ZERO => self.node.fair().wait(self.flow, now),
            wait => wait,
        }
    }

    /// The guest stands still (or runs again): its last bytes go before what guests that run have to send.
    pub(crate) fn urgent(&self, urgent: bool) {
        self.node.fair().urgent(self.flow, urgent);
    }

    /// `bytes` were written.
    pub(crate) fn spend(&self, bytes: u64) {
        let now = self.node.started.elapsed();
        self.own().spend(bytes, now);
        self.node.fair().spend(self.flow, bytes, now);
    }

    fn own(&self) -> MutexGuard<'_, Bucket> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.node.fair().leave(self.flow);
    }
}
