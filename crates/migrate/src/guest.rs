//! The VMM beside this agent, in the words of the handover.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use dwcp_proto::handover::VmmState;
use dwcp_vmm::qmp::{MigrationStatus, Qemu, QmpConfig, QmpError, RunState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::time::{sleep, timeout};

use crate::error::{Blame, Failure};

/// How long a VMM whose QMP connection ended may take to end itself.
const DYING: Duration = Duration::from_secs(5);
/// How long a cancelled migration may take to end.
const CANCELLING: Duration = Duration::from_secs(10);
/// Between two looks at a state that QMP announces with no event.
const LOOK: Duration = Duration::from_millis(20);

/// A VMM and its process.
pub(crate) struct Guest {
    pub(crate) qemu: Qemu,
    /// The process, held so that its number cannot come to mean another.
    process: Option<OwnedFd>,
}

impl Guest {
    /// Connects to the QMP socket at `path`.
    pub(crate) async fn connect(path: &Path) -> Result<Self, Failure> {
        let qemu = Qemu::connect(path, QmpConfig::default()).await.map_err(qmp_failure)?;
        let pid = qemu.qmp().pid().and_then(Pid::from_raw);
        let process = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Ok(Guest { qemu, process })
    }

    /// Waits until the process has ended. For ever if that cannot be observed.
    pub(crate) async fn gone(&self) {
        while !self.is_gone() {
            sleep(LOOK).await;
        }
    }

    /// Whether the process is known to have ended.
    pub(crate) fn is_gone(&self) -> bool {
        let Some(process) = &self.process else { return false };
        // A pidfd is readable once its process has ended: pidfd_open(2).
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }

    async fn gone_within(&self, limit: Duration) -> bool {
        timeout(limit, self.gone()).await.is_ok()
    }

    /// The source's guest, as the handover sees it; `None` if it cannot be asked.
    pub(crate) async fn at_source(&self) -> Option<VmmState> {
        self.observe(|state| match state {
            RunState::Running => VmmState::Running,
            RunState::PostMigrate | RunState::FinishMigrate => VmmState::Stopped,
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
        match self.qemu.run_state().await {
            Ok(state) => Some(meaning(state)),
            Err(QmpError::Closed { .. }) if self.gone_within(DYING).await => Some(VmmState::Gone),
            Err(_) => None,
        }
    }

    /// Cancels the outgoing migration and waits for its end.
    pub(crate) async fn cancel(&self) -> Result<Option<VmmState>, QmpError> {
        match self.qemu.cancel().await {
            Err(error) if error.is_refusal() => return Err(error),
            _ => {}
        }
        let ended = async {
            loop {
                match self.qemu.migration().await {
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
        match self.qemu.cont().await {
            Err(error) if error.is_refusal() => Err(error),
            _ if at_source => Ok(self.at_source().await),
            _ => Ok(self.at_destination().await),
        }
    }

    /// Ends the VMM.
    pub(crate) async fn quit(&self) -> Result<Option<VmmState>, QmpError> {
        match self.qemu.quit().await {
            Err(error) if error.is_refusal() => Err(error),
            _ => Ok(self.gone_within(DYING).await.then_some(VmmState::Gone)),
        }
    }
}

fn is_over(status: &MigrationStatus) -> bool {
    status.is_final() || *status == MigrationStatus::None
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
        QmpError::Closed { .. } => ("qmp_closed", Blame::Vmm, "look at the VMM's log"),
        QmpError::Timeout { .. } => ("qmp_timeout", Blame::Vmm, "look whether the VMM hangs"),
        QmpError::Refused { .. } => ("qmp_refused", Blame::Vmm, "look at the VMM's log"),
        _ => ("qmp_unexpected", Blame::Vmm, "this VMM may be too new or too old for this agent"),
    };
    Failure::new(code, blame, text, hint)
}
