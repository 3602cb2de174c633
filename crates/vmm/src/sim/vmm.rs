//! A simulated VMM: a guest behind a QMP socket, that migrates over unix sockets as QEMU does.
//!
//! Run states, events and answers are those of QEMU 10.0 as far as a migration needs them; see `tests/sim.rs` and
//! `tests/real.rs`, which ask both the same.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use super::guest::{GuestSpec, SimBlock, SimGuest};
use super::server;
use crate::qmp::{MigrationStatus, RunState};

/// Lines on their way to the QMP client. A client that leaves so many unread loses its connection.
pub(super) const MAX_UNREAD: usize = 4096;

/// Something that goes wrong with a simulated VMM. Offsets count the stream's bytes, written or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The migration fails at this offset; the VMM lives.
    FailAt(u64),
    /// The process dies at this offset, as by `kill -9`.
    DieAt(u64),
    /// Nothing more is written or read from this offset on, and nothing is closed.
    StallAt(u64),
    /// Nothing more is written, and nothing is closed, once the guest has stopped for the last round.
    StallAtStop,
    /// The stream is closed so long after its last byte was written.
    CloseLate(Duration),
    /// The process dies when it gets this command, before it answers.
    DieOn(String),
    /// This command gets no answer, nor does any after it.
    Hang(String),
    /// This command is refused.
    Refuse(String),
    /// Before it answers this command, the VMM sends this line.
    Say(String, String),
}

/// A simulated VMM in this process. It dies when dropped.
///
/// Its guest runs a step for each slice of a migration that is written, so the load on the migration depends on the
/// [`GuestSpec`] and not on the clock.
#[derive(Debug)]
pub struct SimVmm {
    core: Arc<Core>,
}

impl SimVmm {
    /// A VMM whose guest runs, with its QMP at `qmp`.
    pub fn running(qmp: &Path, spec: GuestSpec) -> std::io::Result<Self> {
        Self::start(qmp, Machine::new(RunState::Running, Some(SimGuest::new(spec.clone())), spec))
    }

    /// A VMM that waits in `-incoming defer`, for a guest of this spec.
    pub fn incoming(qmp: &Path, spec: GuestSpec) -> std::io::Result<Self> {
        Self::start(qmp, Machine::new(RunState::InMigrate, None, spec))
    }

    fn start(qmp: &Path, machine: Machine) -> std::io::Result<Self> {
        let listener = UnixListener::bind(qmp)?;
        let core = Arc::new(Core { machine: Mutex::new(machine), alive: watch::Sender::new(true) });
        tokio::spawn(core.clone().while_alive(server::serve(core.clone(), listener)));
        Ok(SimVmm { core })
    }

    /// Makes something go wrong, now or when it comes to it.
    pub fn inject(&self, fault: Fault) {
        self.core.machine().faults.push(fault);
    }

    /// Takes all faults back.
    pub fn heal(&self) {
        self.core.machine().faults.clear();
    }

    /// Dies as by `kill -9`: all sockets close.
    pub fn kill(&self) {
        self.core.die();
    }

    /// Whether the process lives.
    pub fn is_alive(&self) -> bool {
        *self.core.alive.borrow()
    }

    /// Waits until the process has ended.
    pub async fn died(&self) {
        // The sender lives in the core, so this cannot fail.
        let _ = self.core.alive.subscribe().wait_for(|alive| !alive).await;
    }

    /// The run state; of a dead VMM, the last one.
    pub fn run_state(&self) -> RunState {
        self.core.machine().state.clone()
    }

    /// The run state, as it changes. Two changes may be seen as one: see [`SimVmm::take_history`].
    pub fn states(&self) -> watch::Receiver<RunState> {
        self.core.machine().states.subscribe()
    }

    /// Each run state that was entered since the last call, and when by the monotonic clock, which all processes of a machine share.
    pub fn take_history(&self) -> Vec<(Duration, RunState)> {
        std::mem::take(&mut self.core.machine().history)
    }

    /// Whether a guest runs here now.
    pub fn is_running(&self) -> bool {
        self.is_alive() && self.run_state() == RunState::Running
    }

    /// Lets a running guest do some steps outside of a migration.
    pub fn step(&self, steps: usize) {
        let mut machine = self.core.machine();
        if machine.state == RunState::Running
            && let Some(guest) = &mut machine.guest
        {
            (0..steps).for_each(|_| guest.step());
        }
    }

    /// Waits for a run state; false if the VMM died instead.
    pub async fn reaches(&self, state: RunState) -> bool {
        let mut states = self.core.machine().states.subscribe();
        tokio::select! {
            reached = states.wait_for(|now| *now == state) => reached.is_ok(),
            () = self.died() => false,
        }
    }

    /// The guest, if there is a whole one.
    pub fn guest(&self) -> Option<SimGuest> {
        self.core.machine().guest.clone()
    }

    /// The guest's RAM, if there is a whole guest.
    pub fn ram(&self) -> Option<Vec<SimBlock>> {
        self.core.machine().guest.as_ref().map(|guest| guest.ram().to_vec())
    }
}

impl Drop for SimVmm {
    fn drop(&mut self) {
        self.core.die();
    }
}

/// What the tasks of one VMM share.
#[derive(Debug)]
pub(super) struct Core {
    machine: Mutex<Machine>,
    alive: watch::Sender<bool>,
}

impl Core {
    pub(super) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn die(&self) {
        self.alive.send_replace(false);
        let machine = &mut *self.machine();
        machine.client = None;
        machine.passed = None;
        machine.descriptors.clear();
    }

    /// Runs a task of this VMM, which ends when the VMM dies.
    pub(super) async fn while_alive(self: Arc<Self>, task: impl Future<Output = ()>) {
        let mut alive = self.alive.subscribe();
        tokio::select! {
            biased;
            _ = alive.wait_for(|alive| !alive) => {}
            () = task => {}
        }
    }
}

/// The state of one VMM.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) state: RunState,
    pub(super) states: watch::Sender<RunState>,
    history: Vec<(Duration, RunState)>,
    pub(super) guest: Option<SimGuest>,
    pub(super) spec: GuestSpec,
    pub(super) faults: Vec<Fault>,
    pub(super) client: Option<mpsc::Sender<String>>,
    pub(super) status: Option<MigrationStatus>,
    pub(super) error: Option<String>,
    /// Whether an incoming migration was begun.
    pub(super) incoming: bool,
    pub(super) listening: Option<String>,
    /// The descriptor that came last, with no name yet.
    pub(super) passed: Option<OwnedFd>,
    /// Those that have a name and are not yet used.
    pub(super) descriptors: HashMap<String, OwnedFd>,
    pub(super) progress: Value,
    pub(super) downtime: Option<Duration>,
    /// Whether an incoming guest starts by itself: until `stop`.
    pub(super) autostart: bool,
    /// Whether the guest ran until the migration's last round stopped it.
    pub(super) stopped_running: bool,
    /// Whether the outgoing migration is to be given up.
    pub(super) cancel: watch::Sender<bool>,
    pub(super) capabilities: serde_json::Map<String, Value>,
    pub(super) parameters: serde_json::Map<String, Value>,
    clock: u64,
}

impl Machine {
    fn new(state: RunState, guest: Option<SimGuest>, spec: GuestSpec) -> Self {
        let off = ["events", "xbzrle", "return-path", "multifd", "postcopy-ram", "late-block-activate"];
        let parameters = json!({
            "downtime-limit": 300,
            "max-bandwidth": 128 << 20,
            "avail-switchover-bandwidth": 0,
            "zero-page-detection": "multifd",
            "multifd-channels": 2,
            "multifd-compression": "none",
        });
        Machine {
            states: watch::Sender::new(state.clone()),
            history: vec![(monotonic(), state.clone())],
            state,
            guest,
            spec,
            faults: Vec::new(),
            client: None,
            status: None,
            error: None,
            incoming: false,
            listening: None,
            passed: None,
            descriptors: HashMap::new(),
            progress: Value::Null,
            downtime: None,
            autostart: true,
            stopped_running: false,
            cancel: watch::Sender::new(false),
            capabilities: off.into_iter().map(|name| (name.to_owned(), Value::Bool(false))).collect(),
            parameters: parameters.as_object().cloned().unwrap_or_default(),
            clock: 0,
        }
    }

    pub(super) fn enter(&mut self, state: RunState) {
        // Here and not where it is read: whoever reads may be kept from its processor while the guest starts elsewhere.
        self.history.push((monotonic(), state.clone()));
        self.state = state.clone();
        self.states.send_replace(state);
    }

    /// Stops the guest, or keeps an incoming one from starting.
    pub(super) fn stop(&mut self) {
        match self.state {
            RunState::InMigrate => self.autostart = false,
            RunState::Running => {
                self.enter(RunState::Paused);
                self.emit("STOP", Value::Null);
            }
            _ => {}
        }
    }

    /// Lets the guest run; false where there is none to run.
    pub(super) fn cont(&mut self) -> bool {
        match self.state {
            RunState::Running => {}
            // As QEMU: the guest then starts by itself.
            RunState::InMigrate => self.autostart = true,
            RunState::FinishMigrate => return false,
            _ => {
                self.enter(RunState::Running);
                self.emit("RESUME", Value::Null);
            }
        }
        true
    }

    pub(super) fn set_status(&mut self, status: MigrationStatus) {
        if self.capabilities.get("events") == Some(&Value::Bool(true)) {
            self.emit("MIGRATION", json!({ "status": status.as_str() }));
        }
        self.status = Some(status);
    }

    pub(super) fn emit(&mut self, name: &str, data: Value) {
        self.clock += 1;
        let timestamp = json!({ "seconds": 1_000_000_000 + self.clock, "microseconds": 0 });
        let mut event = json!({ "event": name, "timestamp": timestamp });
        if !data.is_null() {
            event["data"] = data;
        }
        self.say(event.to_string());
    }

    pub(super) fn say(&mut self, line: String) {
        if self.client.as_ref().is_some_and(|client| client.try_send(line).is_err()) {
            self.client = None;
        }
    }

    pub(super) fn parameter(&self, name: &str) -> u64 {
        self.parameters.get(name).and_then(Value::as_u64).unwrap_or_default()
    }
}

fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Since boot, so neither part is negative.
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default())
}
