//! The direct source: the guest's RAM is read by the agent itself, in rounds that it decides on. `dwcp_vmm::direct` has the order
//! and what it rests on.
//!
//! ```text
//! begin:  head of QEMU's stream (its migration is cancelled) ─► tracking
//! ingest: all pages ─► look ─► few enough? ─no─► written pages ─► look ...
//!                                   └─yes─► still fit? ─► stop the guest ─► last look ─► last pages, QEMU's devices ─► end
//! ```

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_proto::Segment;
use dwcp_vmm::direct::{Direct, DirectError, Dirty, Fit, Gone, Head, MAX_REST};
use dwcp_vmm::qmp::{MigrationStatus, Parameters, Qemu, QmpError, RunState};
use dwcp_vmm::socket::{self, OpenError};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{interval, timeout};
use tracing::debug;

use super::ingest::{IngestError, count};
use super::run::UNLIMITED;
use crate::counters::Counters;
use crate::guest::Guest;
use crate::report::Report;

/// How long QEMU may take to write its list of RAM blocks, and to give that migration up.
const HEAD: Duration = Duration::from_secs(10);
/// Bytes a second that QEMU may write of that migration: a small guest, or one of zeros, must not be through before it is cancelled.
const SLOW: u64 = 1 << 20;
/// Bytes that are read at once of what QEMU writes.
const READ: usize = 256 << 10;

/// Makes the direct source ready. Its error says, in words for an operator, why the VMM's stream is taken instead; the guest is as it was.
pub(super) async fn begin(guest: &Guest, fit: Fit, chunk: usize) -> Result<Direct, String> {
    let qemu = guest.reach().await.map_err(|error| crate::hde::words(&error))?;
    let head = head(&qemu).await.map_err(|error| crate::hde::words(&error))?;
    let process = guest.handle().ok_or("the VMM's process is not known")?;
    let begun = spawn_blocking(move || Direct::begin(fit, &head, chunk, std::os::fd::AsFd::as_fd(&process)));
    begun.await.map_err(|error| error.to_string())?.map_err(|error| crate::hde::words(&error))
}

/// Why there is no head.
#[derive(Debug, thiserror::Error)]
enum NoHead {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Head(#[from] dwcp_vmm::direct::HeadError),
    #[error("QEMU's stream ended before its RAM")]
    Ended,
    #[error("QEMU did not write its list of RAM blocks in time")]
    Late,
    #[error("QEMU did not give up the migration that was to tell its RAM blocks in time")]
    NotGivenUp,
    #[error("QEMU had migrated all of the guest before that could be cancelled")]
    Completed,
    #[error("QEMU had migrated all of the guest before that could be cancelled, and does not let it go on")]
    Stands(#[source] QmpError),
    #[error("cannot read QEMU's stream")]
    Io(#[from] io::Error),
}

/// Lets QEMU begin to migrate, slowly, and cancels that.
async fn head(qemu: &Qemu) -> Result<Head, NoHead> {
    let head = match bandwidth(qemu, SLOW).await {
        Ok(()) => begun_and_cancelled(qemu).await,
        Err(error) => Err(error),
    };
    // In every case: QEMU may have heard an order that it did not answer, and its stream may be what is taken instead.
    bandwidth(qemu, UNLIMITED).await.and(head)
}

async fn bandwidth(qemu: &Qemu, limit: u64) -> Result<(), NoHead> {
    let parameters = Parameters { max_bandwidth: Some(limit), ..Parameters::default() };
    qemu.set_parameters(&parameters).await?;
    Ok(())
}

async fn begun_and_cancelled(qemu: &Qemu) -> Result<Head, NoHead> {
    let ran = qemu.run_state().await? == RunState::Running;
    let stream = socket::open_outgoing(qemu).await?;
    // It is cancelled all the same if it is late.
    let head = timeout(HEAD, read_head(&stream)).await.unwrap_or(Err(NoHead::Late));
    let given_up = timeout(HEAD, give_up(qemu, &stream)).await.unwrap_or(Err(NoHead::NotGivenUp));
    // Nobody has what it migrated, and the guest would stand still for as long as the rounds last.
    if ran && matches!(given_up, Err(NoHead::Completed)) {
        qemu.cont().await.map_err(NoHead::Stands)?;
    }
    given_up.and(head)
}

/// Cancels the migration that QEMU writes to `stream`, and waits until it has done so.
async fn give_up(qemu: &Qemu, stream: &UnixStream) -> Result<(), NoHead> {
    let cancel = async { qemu.cancel().await.map_err(NoHead::Qmp) };
    // QEMU may wait for room in the socket, and hears nothing until it has some. The stream has no end soon if it cannot be told.
    let drained = async {
        let _ = drain(stream).await;
        Ok::<(), NoHead>(())
    };
    tokio::try_join!(cancel, drained)?;
    loop {
        match qemu.migration().await?.status {
            Some(MigrationStatus::Cancelled | MigrationStatus::Failed) => return Ok(()),
            // The guest's state follows a little later, and `cont` is refused until then.
            Some(MigrationStatus::Completed) if qemu.run_state().await? != RunState::FinishMigrate => {
                return Err(NoHead::Completed);
            }
            _ => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Between two looks at whether QEMU has given up.
const LOOK: Duration = Duration::from_millis(5);

async fn read_head(stream: &UnixStream) -> Result<Head, NoHead> {
    let mut head = Head::new();
    let mut buffer = vec![0; READ];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Err(NoHead::Ended),
            Ok(read) if head.take(&buffer[..read])? => return Ok(head),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads to the end.
async fn drain(stream: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// What the rounds need beside the RAM.
pub(super) struct Rounds {
    pub(super) guest: Arc<Guest>,
    pub(super) segments: mpsc::Sender<Segment>,
    pub(super) report: Arc<Report>,
    /// How long what is left may take while the guest stands still.
    pub(super) limit: Duration,
    /// Told once QEMU begins to write the last of the stream.
    pub(super) last: oneshot::Sender<()>,
}

/// Reads the guest's RAM until little enough is left, stops the guest, and ends the stream; returns its length. Back-pressure is by
/// `segments` being full.
pub(super) async fn ingest(direct: Direct, rounds: Rounds) -> Result<u64, IngestError> {
    let Rounds { guest, segments, report, limit, last } = rounds;
    let counters = report.counters.clone();
    let (mut direct, mut dirty) = on_thread(direct, Direct::all).await?;
    let ram = dirty.bytes();
    loop {
        let round =
            Round { began: Instant::now(), raw: counters.raw.load(), guest: counters.guest.load(), ram };
        let bytes = dirty.bytes();
        direct = round.watch(&report, bytes, send(direct, dirty, &segments, &counters)).await?;
        (direct, dirty) = on_thread(direct, Direct::look).await?;
        let needed = dirty.bytes() as f64 / round.rate(&counters);
        debug!(bytes, took = ?round.began.elapsed(), left = dirty.bytes(), needed, "a round over the guest's RAM");
        let written = dirty.bytes() as f64 / round.seconds();
        report.progress(MOST, dirty.bytes(), Some(written));
        if needed <= limit.as_secs_f64() {
            break;
        }
    }
    let qemu = guest.reach().await?;
    // The guest runs, and goes on if not.
    let fit = fit_still(&qemu).await?;
    direct.fits(&fit)?;
    qemu.set_capabilities(&[("x-ignore-shared", true)]).await?;
    // Whoever takes the guest back does it now, or finds that it was stopped.
    let Some(stream) = guest.halt(&qemu).await? else {
        return Err(io::Error::new(io::ErrorKind::BrokenPipe, Gone).into());
    };
    let (mut direct, at_last) = on_thread(direct, Direct::look).await?;
    let holes;
    (direct, holes) = on_thread(direct, |direct| direct.holes()).await?;
    let dirty = dirty.and(at_last).and(holes);
    // It is told at all events, or nobody listens.
    let _ = last.send(());
    let (sent, rest) = tokio::join!(send(direct, dirty, &segments, &counters), read_rest(&stream));
    let (direct, rest) = (sent?, rest?);
    let out = forwarding(segments, counters);
    let (direct, length) = on_thread(direct, move |direct| direct.finish(&rest, &mut { out })).await?;
    // To end the tracking takes a while for a large guest, which stands still until this task has sent the last chunks: nobody waits for it.
    spawn_blocking(move || drop(direct));
    Ok(length)
}

/// Whether the RAM may still be read so: something may have been plugged in since the migration began.
async fn fit_still(qemu: &Qemu) -> Result<Fit, IngestError> {
    let qemu = qemu.clone();
    // It looks into every process of the machine, while the task that asks has chunks to send.
    let fit = tokio::spawn(async move { Fit::find(&qemu).await }).await.map_err(io::Error::other)?;
    Ok(fit.map_err(|why| DirectError::Unfit(Box::new(why)))?)
}

/// A round over RAM under way.
struct Round {
    began: Instant,
    /// What had been carried before: bytes of the stream, and of the guest.
    raw: u64,
    guest: u64,
    /// Bytes of RAM altogether.
    ram: u64,
}

impl Round {
    fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64().max(1e-6)
    }

    /// Reports how far the migration is while `sending` sends the `bytes` of this round.
    async fn watch<T>(&self, report: &Report, bytes: u64, sending: impl Future<Output = T>) -> T {
        tokio::pin!(sending);
        let mut tick = interval(TICK);
        loop {
            tokio::select! {
                done = &mut sending => return done,
                _ = tick.tick() => {
                    let guest = report.counters.guest.load();
                    let fraction = guest as f64 / self.ram.max(1) as f64;
                    report.progress(fraction.min(MOST), bytes.saturating_sub(guest - self.guest), None);
                }
            }
        }
    }

    /// Bytes of the stream that can be carried in a second of the kind that is left, after this round. What is sent again may compress much
    /// better than what was sent first, so a round that is long beside what lies in the pipeline counts for itself.
    fn rate(&self, counters: &Counters) -> f64 {
        let raw = counters.raw.load();
        let round = (raw - self.raw) as f64 / self.seconds();
        let ratio = raw as f64 / counters.wire.load().max(1) as f64;
        let all = counters.rate.load() as f64 * ratio;
        let long = raw - self.raw >= LONG;
        match all > 0.0 {
            true if long => all.max(round * CAREFUL),
            true => all,
            false => round,
        }
        .max(1.0)
    }
}

/// A round of so many bytes tells how fast such pages go.
const LONG: u64 = 32 << 20;
/// How far it is believed: some of it is still in the pipeline at its end.
const CAREFUL: f64 = 0.75;
/// As much as is done before the guest has stopped; the last percent is the switchover's.
const MOST: f64 = 0.99;
/// Between two reports of progress.
const TICK: Duration = Duration::from_millis(250);

async fn send(
    direct: Direct,
    dirty: Dirty,
    segments: &mpsc::Sender<Segment>,
    counters: &Arc<Counters>,
) -> Result<Direct, IngestError> {
    let mut out = forwarding(segments.clone(), counters.clone());
    let (direct, ()) = on_thread(direct, move |direct| direct.written(&dirty, &mut out)).await?;
    Ok(direct)
}

/// Hands segments on; the thread waits where nobody takes them.
fn forwarding(
    segments: mpsc::Sender<Segment>,
    counters: Arc<Counters>,
) -> impl FnMut(Segment) -> Result<(), Gone> + Send {
    move |segment| {
        count(&segment, &counters);
        segments.blocking_send(segment).map_err(|_| Gone)
    }
}

/// Reading RAM is work for a thread that may wait.
async fn on_thread<T: Send + 'static>(
    mut direct: Direct,
    work: impl FnOnce(&mut Direct) -> Result<T, DirectError> + Send + 'static,
) -> Result<(Direct, T), IngestError> {
    let done = spawn_blocking(move || work(&mut direct).map(|found| (direct, found))).await;
    Ok(done.map_err(io::Error::other)??)
}

/// All that QEMU writes.
async fn read_rest(stream: &UnixStream) -> Result<Vec<u8>, IngestError> {
    let mut rest = Vec::new();
    let mut buffer = vec![0; READ];
    loop {
        stream.readable().await?;
        match stream.try_read(&mut buffer) {
            Ok(0) => return Ok(rest),
            Ok(read) if rest.len() + read > MAX_REST => {
                let text = format!("QEMU writes more than {MAX_REST} bytes beside the RAM in files");
                return Err(io::Error::other(text).into());
            }
            Ok(read) => rest.extend_from_slice(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
    }
}
