//! Migrations of a simulated VMM: out of it and into it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_proto::limits::PAGE_SIZE;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::scatter::{Scatter, Scattered, Style};
use super::stream::{SimDestination, SimError, SimSource};
use super::vmm::{Core, Fault, Machine};
use crate::qmp::{MigrationStatus, RunState};

/// Pages of one slice: between two, the guest runs a step and a cancellation is noticed.
const SLICE: usize = 64;
/// Rounds after which the guest is stopped, converged or not.
const MAX_ROUNDS: u64 = 30;
/// Bytes read at once by a destination.
const READ: usize = 64 << 10;

/// Where a stream goes to or comes from.
pub(super) enum Connection {
    /// `unix:`
    Path(String),
    /// `fd:`
    Given(OwnedFd),
}

impl Connection {
    async fn open(self) -> io::Result<UnixStream> {
        match self {
            Connection::Path(path) => UnixStream::connect(path).await,
            Connection::Given(descriptor) => adopt(descriptor),
        }
    }
}

/// What an incoming VMM waits at.
enum Entrance {
    Listens(UnixListener),
    Stands(UnixStream),
}

fn adopt(descriptor: OwnedFd) -> io::Result<UnixStream> {
    let stream = std::os::unix::net::UnixStream::from(descriptor);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Begins an outgoing migration, which goes on in a task.
pub(super) fn begin(core: &Arc<Core>, machine: &mut Machine, to: Connection) {
    machine.error = None;
    machine.downtime = None;
    machine.cancel.send_replace(false);
    machine.set_status(MigrationStatus::Setup);
    let task = core.clone();
    tokio::spawn(core.clone().while_alive(async move {
        let outcome = send(&task, to).await;
        let machine = &mut *task.machine();
        match outcome {
            Ok(()) => {
                machine.enter(RunState::PostMigrate);
                machine.set_status(MigrationStatus::Completed);
            }
            Err(stopped) => {
                if let Some(guest) = &mut machine.guest {
                    guest.untrack();
                }
                if machine.state == RunState::FinishMigrate {
                    machine.enter(RunState::Paused);
                    if machine.stopped_running {
                        machine.cont();
                    }
                }
                let status = match stopped {
                    Stopped::Cancelled => MigrationStatus::Cancelled,
                    Stopped::Failed(error) => {
                        machine.error = Some(error.to_string());
                        MigrationStatus::Failed
                    }
                };
                machine.set_status(status);
            }
        }
    }));
}

/// Lets an incoming VMM listen at a path or read from a connection, for one stream.
pub(super) fn listen(core: &Arc<Core>, machine: &mut Machine, from: Connection) -> io::Result<()> {
    let entrance = match from {
        Connection::Path(path) => {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(&path)?;
            machine.listening = Some(path);
            Entrance::Listens(listener)
        }
        Connection::Given(descriptor) => Entrance::Stands(adopt(descriptor)?),
    };
    machine.incoming = true;
    machine.set_status(MigrationStatus::Setup);
    let task = core.clone();
    tokio::spawn(core.clone().while_alive(async move {
        let stream = match entrance {
            Entrance::Listens(listener) => listener.accept().await.map(|(stream, _)| stream),
            Entrance::Stands(stream) => Ok(stream),
        };
        let outcome = match stream {
            Ok(stream) => receive(&task, stream).await,
            Err(error) => Err(error.into()),
        };
        if let Err(error) = outcome {
            // As QEMU: a destination whose stream fails is of no use any more.
            tracing::debug!(%error, "simulated destination exits");
            task.die();
        }
    }));
    Ok(())
}

enum Stopped {
    Cancelled,
    Failed(io::Error),
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        Stopped::Failed(error)
    }
}

async fn send(core: &Arc<Core>, to: Connection) -> Result<(), Stopped> {
    let mut cancelled = core.machine().cancel.subscribe();
    tokio::select! {
        biased;
        _ = cancelled.wait_for(|cancelled| *cancelled) => Err(Stopped::Cancelled),
        outcome = send_all(core, to) => outcome.map_err(Stopped::from),
    }
}

async fn send_all(core: &Arc<Core>, to: Connection) -> io::Result<()> {
    let mut out = Output::open(core, to).await?;
    let began = Instant::now();
    let gone = || io::Error::other("no guest");
    let mut source = {
        let machine = &mut *core.machine();
        let source = SimSource::begin(machine.guest.as_mut().ok_or_else(gone)?);
        machine.set_status(MigrationStatus::Active);
        announce_round(machine, source.round());
        source
    };
    let stopped = loop {
        let slice = {
            let machine = &mut *core.machine();
            let running = machine.state == RunState::Running;
            let guest = machine.guest.as_mut().ok_or_else(gone)?;
            let slice = source.slice(guest, SLICE);
            if running {
                guest.step();
            }
            let pending = if slice.is_empty() { source.next_round(guest) } else { source.left() };
            let total = guest.ram().iter().map(|b| b.bytes.len() as u64).sum::<u64>();
            machine.progress = progress(total, pending, &out, &source, began);
            if slice.is_empty() {
                announce_round(machine, source.round());
                if converged(machine, pending, out.offset, began) || source.round() > MAX_ROUNDS {
                    break stop(machine);
                }
            }
            slice
        };
        out.write(&slice).await?;
    };
    let last = {
        let machine = &mut *core.machine();
        announce_round(machine, source.round() + 1);
        source.finish(machine.guest.as_mut().ok_or_else(gone)?)
    };
    if core.machine().faults.contains(&Fault::StallAtStop) {
        std::future::pending::<()>().await;
    }
    out.write(&last).await?;
    let late = core.machine().faults.iter().find_map(|fault| match fault {
        Fault::CloseLate(by) => Some(*by),
        _ => None,
    });
    if let Some(late) = late {
        tokio::time::sleep(late).await;
    }
    out.stream.shutdown().await?;
    core.machine().downtime = Some(stopped.elapsed());
    Ok(())
}

/// Stops the guest for the last round.
fn stop(machine: &mut Machine) -> Instant {
    machine.stopped_running = machine.state == RunState::Running;
    machine.enter(RunState::FinishMigrate);
    if machine.stopped_running {
        machine.emit("STOP", Value::Null);
    }
    machine.set_status(MigrationStatus::Device);
    Instant::now()
}

fn announce_round(machine: &mut Machine, round: u64) {
    if machine.capabilities.get("events") == Some(&Value::Bool(true)) {
        machine.emit("MIGRATION_PASS", json!({ "pass": round }));
    }
}

/// Whether the pending pages fit into the downtime limit at the rate that is known or was measured.
fn converged(machine: &Machine, pending: u64, written: u64, began: Instant) -> bool {
    let rate = match machine.parameter("avail-switchover-bandwidth") {
        0 => written as f64 / began.elapsed().as_secs_f64().max(1e-6),
        known => known as f64,
    };
    let limit = Duration::from_millis(machine.parameter("downtime-limit")).as_secs_f64();
    (pending * PAGE_SIZE as u64) as f64 <= rate * limit
}

fn progress(total: u64, pending: u64, out: &Output, source: &SimSource, began: Instant) -> Value {
    json!({
        "total": total,
        "remaining": pending * PAGE_SIZE as u64,
        "transferred": out.offset,
        "dirty-sync-count": source.round(),
        "page-size": PAGE_SIZE,
        "mbps": out.offset as f64 * 8e-6 / began.elapsed().as_secs_f64().max(1e-6),
    })
}

/// The source's end of a stream.
struct Output {
    core: Arc<Core>,
    stream: UnixStream,
    /// Bytes on it.
    offset: u64,
    /// With multifd.
    multifd: Option<(Scatter, Vec<UnixStream>)>,
}

impl Output {
    async fn open(core: &Arc<Core>, to: Connection) -> io::Result<Self> {
        let channels = {
            let machine = core.machine();
            let on = machine.capabilities.get("multifd") == Some(&Value::Bool(true));
            on.then(|| machine.parameter("multifd-channels"))
        };
        let multifd = match (&to, channels) {
            (_, None) => None,
            (Connection::Given(_), Some(_)) => return Err(io::Error::other("multifd needs a path")),
            (Connection::Path(path), Some(channels)) => {
                let mut streams = Vec::new();
                for _ in 0..channels {
                    streams.push(UnixStream::connect(path).await?);
                }
                Some((Scatter::new(streams.len(), Style::Eos), streams))
            }
        };
        Ok(Output { core: core.clone(), stream: to.open().await?, offset: 0, multifd })
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Some((scatter, streams)) = &mut self.multifd else { return self.write_main(bytes).await };
        let Scattered { main, channels } = scatter.feed(bytes);
        // Beside each other, as by threads of their own: whoever reads may want another one first.
        let mut writers = JoinSet::new();
        for (n, (mut stream, bytes)) in streams.drain(..).zip(channels).enumerate() {
            writers.spawn(async move { stream.write_all(&bytes).await.map(|()| (n, stream)) });
        }
        self.write_main(&main).await?;
        let mut written = Vec::new();
        while let Some(done) = writers.join_next().await {
            written.push(done.map_err(io::Error::other)??);
        }
        written.sort_by_key(|(n, _)| *n);
        if let Some((_, streams)) = &mut self.multifd {
            streams.extend(written.into_iter().map(|(_, stream)| stream));
        }
        Ok(())
    }

    async fn write_main(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let len = pass(&self.core, self.offset, rest.len()).await?;
            self.stream.write_all(&rest[..len]).await?;
            rest = &rest[len..];
            self.offset += len as u64;
        }
        Ok(())
    }
}

/// How many of the next `len` bytes of a stream may pass before a fault strikes; strikes if it is now.
async fn pass(core: &Core, offset: u64, len: usize) -> io::Result<usize> {
    let mut pass = len;
    let faults = core.machine().faults.clone();
    for fault in faults {
        let (Fault::FailAt(at) | Fault::DieAt(at) | Fault::StallAt(at)) = fault else { continue };
        let Some(left) = at.checked_sub(offset) else { continue };
        if left > 0 {
            pass = pass.min(usize::try_from(left).unwrap_or(usize::MAX));
            continue;
        }
        match fault {
            Fault::FailAt(_) => return Err(io::Error::other("failed by the simulation")),
            Fault::DieAt(_) => core.die(),
            _ => {}
        }
        std::future::pending::<()>().await;
    }
    Ok(pass)
}

#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error("reading failed")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Stream(#[from] SimError),
}

async fn receive(core: &Core, mut stream: UnixStream) -> Result<(), ReceiveError> {
    core.machine().set_status(MigrationStatus::Active);
    let mut destination = SimDestination::new();
    let mut buffer = vec![0; READ];
    let guest = loop {
        let len = pass(core, destination.offset(), READ).await?;
        let read = stream.read(&mut buffer[..len]).await?;
        if read == 0 {
            return Err(SimError::Incomplete.into());
        }
        destination.feed(&buffer[..read])?;
        if let Some(guest) = destination.guest()? {
            break guest;
        }
    };
    let machine = &mut *core.machine();
    machine.guest = Some(guest);
    machine.set_status(MigrationStatus::Completed);
    machine.enter(RunState::Paused);
    if machine.autostart {
        machine.cont();
    }
    Ok(())
}
