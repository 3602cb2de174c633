//! The VMM beside this agent, in the words of the handover.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use dwcp_proto::handover::VmmState;
use dwcp_proto::journal::Process;
use dwcp_vmm::kept::{self, Mark};
use dwcp_vmm::qmp::{Event, Events, MigrationStatus, Qemu, QmpConfig, QmpError, RunState};
use dwcp_vmm::socket::{self, OpenError, SocketError};
use rustix::process::Pid;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{sleep, timeout};

use crate::error::{Blame, Failure};
use crate::fault::fault_point;
use crate::process::Running;
use crate::source::Inlet;

/// How long a VMM whose QMP connection ended may take to end itself.
const DYING: Duration = Duration::from_secs(5);
/// How long a VMM may take to hear that its migration is cancelled; one that writes the last of its stream hears nothing.
const CANCEL_HEARD: Duration = Duration::from_millis(500);
/// How long a cancelled migration may take to end.
const CANCELLING: Duration = Duration::from_secs(10);
/// Between two looks at a state that QMP announces with no event.
const LOOK: Duration = Duration::from_millis(20);

/// A VMM, over one QMP connection after another, and its process.
pub(crate) struct Guest {
    path: PathBuf,
    state: Mutex<State>,
    /// The migration is being taken back: from then on nothing stops the guest any more. Held while it is stopped.
    taken_back: tokio::sync::Mutex<bool>,
}

/// What is known of a VMM.
#[derive(Default)]
struct State {
    /// The connection, if there is one.
    qemu: Option<Qemu>,
    /// Its process, if it could be told. Whoever answers at the path later and is another, is not this VMM.
    process: Option<Running>,
    /// The process has ended.
    ended: bool,
    /// With multifd: what its migration writes to.
    inlet: Weak<Inlet>,
    /// It stands still because this agent, or an earlier life of it, stopped it for the switchover: see [`Guest::halt`].
    halted: bool,
}

impl Guest {
    /// Connects to the QMP socket at `path`.
    pub(crate) async fn connect(path: &Path) -> Result<Self, Failure> {
        let guest = Self::at(path, None);
        guest.reach().await.map_err(qmp_failure)?;
        Ok(guest)
    }

    /// A VMM that may be out of reach for now, or have ended; `known` is its process, as a journal names it.
    pub(crate) fn at(path: &Path, known: Option<&Process>) -> Self {
        let process = known.and_then(Running::find);
        let ended = known.is_some() && process.is_none();
        let state = State { process, ended, ..State::default() };
        Guest { path: path.to_owned(), state: Mutex::new(state), taken_back: tokio::sync::Mutex::default() }
    }

    /// One that stands paused does so because an earlier life of this agent stopped it.
    pub(crate) fn halted_before(self) -> Self {
        self.state().halted = true;
        self
    }

    /// The QMP socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The process, for the journal.
    pub(crate) fn process(&self) -> Option<Process> {
        self.state().process.as_ref().map(|process| process.identity().clone())
    }

    /// The process, held so that its number cannot come to mean another.
    pub(crate) fn handle(&self) -> Option<OwnedFd> {
        self.state().process.as_ref()?.handle().try_clone_to_owned().ok()
    }

    /// The agent's end of a connection into this VMM that an earlier life made.
    pub(crate) fn kept(&self, mark: Mark) -> io::Result<TcpStream> {
        match &self.state().process {
            Some(process) => kept::find_again(process.identity().pid, process.handle(), mark),
            None => Err(io::Error::new(io::ErrorKind::NotFound, "the VMM's process is not known")),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VMM, connected to anew if its last connection ended and the process lives.
    pub(crate) async fn reach(&self) -> Result<Qemu, QmpError> {
        {
            let state = &mut *self.state();
            let ended = state.has_ended();
            match &state.qemu {
                Some(qemu) if ended || qemu.qmp().ended().is_none() => return Ok(qemu.clone()),
                _ if ended => return Err(QmpError::Gone { path: self.path.clone() }),
                _ => {}
            }
        }
        let qemu = Qemu::connect(&self.path, QmpConfig::default()).await?;
        let process = qemu.qmp().pid().and_then(Pid::from_raw).and_then(Running::of);
        let state = &mut *self.state();
        match (&state.process, process) {
            (Some(known), Some(now)) if known.identity() != now.identity() => {
                state.ended = true;
                return Err(QmpError::Gone { path: self.path.clone() });
            }
            (None, now) => state.process = now,
            _ => {}
        }
        state.qemu = Some(qemu.clone());
        Ok(qemu)
    }

    /// Gives the QMP connection up, so that somebody else can have it; a later command makes a new one.
    pub(crate) fn release(&self) {
        self.state().qemu = None;
    }

    /// Waits until the process has ended. For ever if that cannot be observed.
    pub(crate) async fn gone(&self) {
        while !self.is_gone() {
            sleep(LOOK).await;
        }
    }

    /// Whether the process is known to have ended.
    pub(crate) fn is_gone(&self) -> bool {
        self.state().has_ended()
    }

    async fn gone_within(&self, limit: Duration) -> bool {
        timeout(limit, self.gone()).await.is_ok()
    }

    /// The source's guest, as the handover sees it; `None` if it cannot be asked.
    pub(crate) async fn at_source(&self) -> Option<VmmState> {
        let halted = self.state().halted;
        self.observe(|state| match state {
            RunState::Running => VmmState::Running,
            RunState::PostMigrate | RunState::FinishMigrate => VmmState::Stopped,
            RunState::Paused if halted => VmmState::Stopped,
            _ => VmmState::Paused,
        })
        .await
    }

    /// The destination's guest, as the handover sees it; `None` if it cannot be asked.
    pub(crate) async fn at_destination(&self) -> Option<VmmState> {
        self.observe(|state| match state {
            RunState::Running => VmmState::Running,
            RunState::InMigrate => VmmState::Incoming,
            _ => VmmState::Paused,
        })
        .await
    }

    async fn observe(&self, meaning: impl Fn(RunState) -> VmmState) -> Option<VmmState> {
        if self.is_gone() {
            return Some(VmmState::Gone);
        }
        let state = match self.reach().await {
            Ok(qemu) => qemu.run_state().await,
            // The socket is there and nobody has it open: whoever made it has ended. connect(2).
            Err(QmpError::Connect { source: SocketError::NobodyListens { .. }, .. }) => {
                return Some(VmmState::Gone);
            }
            Err(error) => Err(error),
        };
        match state {
            Ok(state) => Some(meaning(state)),
            Err(QmpError::Gone { .. }) => Some(VmmState::Gone),
            Err(QmpError::Closed { .. }) if self.gone_within(DYING).await => Some(VmmState::Gone),
            Err(_) => None,
        }
    }

    /// The VMM's own words for why its migration failed.
    pub(crate) async fn last_error(&self) -> Option<String> {
        self.reach().await.ok()?.migration().await.ok()?.error
    }

    /// Notes what the outgoing migration writes to.
    pub(crate) fn writes_to(&self, inlet: &Arc<Inlet>) {
        self.state().inlet = Arc::downgrade(inlet);
    }

    /// For the direct source: stops the guest, and lets QEMU write what is left to the stream that is returned; nothing where the migration is
    /// being taken back. Either this comes first, and the guest is known to have been stopped by it, or [`cancel`](Self::cancel) does.
    pub(crate) async fn halt(&self, qemu: &Qemu) -> Result<Option<UnixStream>, OpenError> {
        let taken_back = self.taken_back.lock().await;
        if *taken_back {
            return Ok(None);
        }
        self.state().halted = true;
        qemu.stop().await?;
        fault_point!("after", "halt", &RunState::Paused);
        socket::open_outgoing(qemu).await.map(Some)
    }

    /// Cancels the outgoing migration and waits for its end.
    pub(crate) async fn cancel(&self) -> Result<Option<VmmState>, QmpError> {
        *self.taken_back.lock().await = true;
        let Ok(qemu) = self.reach().await else { return Ok(self.at_source().await) };
        let asked = qemu.cancel();
        tokio::pin!(asked);
        let heard = timeout(CANCEL_HEARD, &mut asked).await;
        // QEMU closes its main channel when it cancels. A thread that waits for room on another channel it would wait for.
        let inlet = self.state().inlet.upgrade();
        if let Some(inlet) = inlet {
            inlet.shut();
        }
        let asked = match heard {
            Ok(asked) => asked,
            Err(_) => asked.await,
        };
        match asked {
            Err(error) if error.is_refusal() => return Err(error),
            _ => {}
        }
        let ended = async {
            loop {
                match qemu.migration().await {
                    Ok(info) if info.status.as_ref().is_none_or(is_over) => return,
                    Ok(_) => sleep(LOOK).await,
                    Err(_) => return,
                }
            }
        };
        if timeout(CANCELLING, ended).await.is_err() {
            return Ok(None);
        }
        Ok(self.at_source().await)
    }

    /// Lets the guest run; the state after it.
    pub(crate) async fn cont(&self, at_source: bool) -> Result<Option<VmmState>, QmpError> {
        let outcome = match self.reach().await {
            Ok(qemu) => qemu.cont().await,
            Err(error) => Err(error),
        };
        match outcome {
            Err(error) if error.is_refusal() => Err(error),
            _ if at_source => Ok(self.at_source().await),
            _ => Ok(self.at_destination().await),
        }
    }

    /// Ends the VMM.
    pub(crate) async fn quit(&self) -> Result<Option<VmmState>, QmpError> {
        let Ok(qemu) = self.reach().await else {
            return Ok(self.at_source().await.filter(|s| *s == VmmState::Gone));
        };
        match qemu.quit().await {
            Err(error) if error.is_refusal() => Err(error),
            _ => Ok(self.gone_within(DYING).await.then_some(VmmState::Gone)),
        }
    }
}

impl State {
    fn has_ended(&mut self) -> bool {
        self.ended |= self.process.as_ref().is_some_and(Running::has_ended);
        self.ended
    }
}

/// The next event of a VMM, `None` once there are no more; pending where there never were.
pub(crate) async fn next_event(events: &mut Option<Events>) -> Option<Event> {
    match events {
        Some(events) => events.recv().await.ok(),
        None => std::future::pending().await,
    }
}

fn is_over(status: &MigrationStatus) -> bool {
    status.is_final() || *status == MigrationStatus::None
}

/// A VMM without a connection for its migration, as an operator meets it.
pub(crate) fn open_failure(error: OpenError) -> Failure {
    match error {
        OpenError::Pair(source) => {
            let text = format!("no pair of sockets for the migration: {source}");
            Failure::new("socket", Blame::Local, text, "check the agent's limit of open files")
        }
        OpenError::Qmp(error) => qmp_failure(error),
        OpenError::Socket(error) => socket_failure(error),
        OpenError::Connections { .. } => Failure::new(
            "multifd_unreachable",
            Blame::Vmm,
            format!("QEMU did not connect: {error}"),
            "multifd needs a path that QEMU's user and sandbox can enter: set [vmm] sockets to such a folder, or leave --channels out",
        ),
        OpenError::Roles(_) => Failure::new("multifd", Blame::Vmm, error.to_string(), "leave --channels out"),
    }
}

/// A socket of ours that cannot be listened on, as an operator meets it.
pub(crate) fn socket_failure(error: SocketError) -> Failure {
    let text = match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    Failure::new("socket", Blame::Local, text, "set [vmm] sockets to a folder that the agent may write to")
}

/// A QMP error as an operator meets it.
pub(crate) fn qmp_failure(error: QmpError) -> Failure {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    let (code, blame, hint) = match &error {
        QmpError::Connect { .. } => {
            ("qmp_connect", Blame::Operator, "give the path of a QMP socket that this VM's QEMU listens on")
        }
        QmpError::NoGreeting { .. } => {
            ("qmp_busy", Blame::Operator, "give the VM a second -qmp socket for the agent")
        }
        QmpError::NotQmp { .. } => ("qmp_not_qmp", Blame::Operator, "give the path of the VM's QMP socket"),
        QmpError::Gone { .. } => ("vmm_gone", Blame::Vmm, "look at the VMM's log"),
        QmpError::Closed { .. } => ("qmp_closed", Blame::Vmm, "look at the VMM's log"),
        QmpError::Timeout { .. } => ("qmp_timeout", Blame::Vmm, "look whether the VMM hangs"),
        QmpError::Refused { .. } => ("qmp_refused", Blame::Vmm, "look at the VMM's log"),
        _ => ("qmp_unexpected", Blame::Vmm, "this VMM may be too new or too old for this agent"),
    };
    Failure::new(code, blame, text, hint)
}

#[cfg(test)]
mod tests {
    use dwcp_vmm::sim::{GuestSpec, SimVmm};

    use super::*;

    #[tokio::test]
    async fn another_process_at_the_same_socket_is_not_the_vmm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let _vmm = SimVmm::running(&path, GuestSpec { pages: 8, ..GuestSpec::default() }).unwrap();
        let guest = Guest::connect(&path).await.unwrap();
        let process = guest.process().unwrap();
        assert_eq!(process.pid, std::process::id());
        guest.release();
        // The next life of the agent finds it again, or one that had the same number.
        let again = Guest::at(&path, Some(&process));
        assert_eq!(again.at_source().await, Some(VmmState::Running));
        again.release();
        let earlier = Process { started: process.started - 1, ..process };
        let other = Guest::at(&path, Some(&earlier));
        assert_eq!(other.at_source().await, Some(VmmState::Gone));
        assert!(matches!(other.reach().await, Err(QmpError::Gone { .. })));
        // One that outlived its socket, which somebody else has now.
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let running = Running::of(Pid::from_child(&child)).unwrap();
        let replaced = Guest::at(&path, Some(running.identity()));
        assert!(!replaced.is_gone());
        assert_eq!(replaced.at_destination().await, Some(VmmState::Gone));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
