//! SIGTERM and SIGINT stop the agent, SIGHUP has it read peers and flag again.

use dwcp_migrate::Failure;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::local;

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Read peers and flag again.
    Reload,
    /// Stop.
    Stop,
}

/// The signals of this process.
#[derive(Debug)]
pub(crate) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Catches them from now on.
    pub(crate) fn catch() -> Result<Self, Failure> {
        let catch =
            |kind| signal(kind).map_err(|e| local("signals", format!("cannot catch signals: {e}"), ""));
        Ok(Signals {
            term: catch(SignalKind::terminate())?,
            int: catch(SignalKind::interrupt())?,
            hup: catch(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub(crate) async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.term.recv() => Event::Stop,
            _ = self.int.recv() => Event::Stop,
            _ = self.hup.recv() => Event::Reload,
        }
    }

    /// Waits for the agent to be stopped; reloads meanwhile are lost, as there is nothing to reload yet.
    pub(crate) async fn terminated(&mut self) {
        while self.next().await != Event::Stop {}
    }
}
