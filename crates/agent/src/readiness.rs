//! Whether the agent takes work, and why not: for /readyz, gRPC health and status.

use tokio::sync::watch;

/// Shared by all who ask; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Readiness(watch::Sender<Option<&'static str>>);

impl Readiness {
    /// Not ready: starting.
    pub(crate) fn new() -> Self {
        Readiness(watch::Sender::new(Some("starting")))
    }

    /// Takes work from now on.
    pub(crate) fn ready(&self) {
        self.0.send_replace(None);
    }

    /// Takes no work from now on.
    pub(crate) fn not_ready(&self, reason: &'static str) {
        self.0.send_replace(Some(reason));
    }

    /// Why it takes no work; `None` when it does.
    pub(crate) fn reason(&self) -> Option<&'static str> {
        *self.0.borrow()
    }

    /// Follows it.
    pub(crate) fn watch(&self) -> watch::Receiver<Option<&'static str>> {
        self.0.subscribe()
    }
}
