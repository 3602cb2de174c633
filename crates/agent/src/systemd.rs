//! What systemd is told: READY, RELOADING, STOPPING, STATUS, WATCHDOG. Without systemd all of this does nothing.
//!
//! The unit is of `Type=notify`, since Debian 12's systemd (252) does not know `notify-reload` yet; RELOADING carries the
//! time stamp that the latter asks for, so either works.

use sd_notify::NotifyState;
use tokio::task::JoinHandle;

/// Started, or done with reloading.
pub(crate) fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("ready")]);
}

/// Reads peers and flag again; `ready` ends it.
pub(crate) fn reloading() {
    let mut state = vec![NotifyState::Reloading];
    state.extend(NotifyState::monotonic_usec_now());
    tell(&state);
}

/// On the way out.
pub(crate) fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("stopping: aborting what has not committed")]);
}

/// One line in `systemctl status`.
pub(crate) fn status(text: &str) {
    tell(&[NotifyState::Status(text)]);
}

/// Keeps the watchdog quiet for as long as the runtime turns, if the unit asks for one.
pub(crate) fn watchdog() -> Option<Watchdog> {
    let period = sd_notify::watchdog_enabled()? / 2;
    let task = tokio::spawn(async move {
        let mut ticks = tokio::time::interval(period);
        loop {
            ticks.tick().await;
            tell(&[NotifyState::Watchdog]);
        }
    });
    Some(Watchdog(task))
}

/// Stops feeding the watchdog when dropped.
#[derive(Debug)]
pub(crate) struct Watchdog(JoinHandle<()>);

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "systemd was not told");
    }
}
