//! Reading the VMM's migration stream and cutting it into segments.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Mode, Record, Segment};
use dwcp_vmm::direct::DirectError;
use dwcp_vmm::multifd::{MIN_ROOM, MergeError, Merged, Merger, Source};
use dwcp_vmm::qmp::QmpError;
use dwcp_vmm::socket::{Channels, OpenError};
use dwcp_vmm::stream::{Cutter, OpaqueReason};
use rustix::net::{Shutdown, shutdown};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

use crate::counters::Counters;
use crate::error::{Blame, Failure};
use crate::guest::{open_failure, qmp_failure};
use crate::hde::words;
use crate::report::Report;

/// Bytes of guest pages in one chunk. Larger chunks cost less each; what lies in the pipeline when the guest stops adds to its
/// downtime. Compression gains less than half a percent from 256 KiB to 512 KiB.
const CHUNK: usize = 512 << 10;
/// The same where the network is fast and the guest has [`LARGE`] RAM: half as many signatures, checks of them, and hand-overs
/// between threads.
const LARGE_CHUNK: usize = 1 << 20;
/// Bytes of RAM of a large guest. With a smaller one too much of it would be under way before a path could change.
const LARGE: u64 = 1 << 30;

/// Bytes of guest pages in one chunk of a migration that begins in `mode`, of a guest with so much RAM.
pub(crate) fn chunk(mode: Mode, ram: u64) -> usize {
    match mode {
        Mode::Datacenter if ram >= LARGE => LARGE_CHUNK,
        _ => CHUNK,
    }
}

/// Segments that may wait for the next stage.
pub(crate) const QUEUE: usize = 1;

/// When the VMM says nothing for so long, what it said so far is sent on. Long enough that a VMM which is merely slower
/// than we are does not get its chunks chopped, short against any downtime.
const PAUSE: Duration = Duration::from_millis(2);

/// Where the VMM writes its stream to.
#[derive(Debug)]
pub(crate) enum Inlet {
    /// Its main channel.
    Main(UnixStream),
    /// With multifd.
    Channels(Channels),
}

impl Inlet {
    /// Ends the channels of multifd, whoever reads them: nobody wants the rest.
    pub(crate) fn shut(&self) {
        let Inlet::Channels(channels) = self else { return };
        for stream in channels.multifd.iter().chain([&channels.main]) {
            // It is over already, otherwise.
            let _ = shutdown(stream, Shutdown::Both);
        }
    }
}

/// Why the VMM's stream was not read to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IngestError {
    /// A connection failed, or the migration has ended.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its channels cannot be put together.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The guest's RAM cannot be read, or tracked.
    #[error(transparent)]
    Direct(#[from] DirectError),
    /// The VMM does not do as it is told at the end.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It does not migrate at the end.
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl IngestError {
    /// What the operator has to know of it. What becomes of a connection the VMM tells better.
    pub(crate) fn failure(self) -> Option<Failure> {
        match self {
            IngestError::Io(_) | IngestError::Direct(DirectError::Gone(_)) => None,
            IngestError::Direct(error) => {
                let hint = "use --source stream";
                Some(Failure::new("direct_source", Blame::Vmm, words(&error), hint))
            }
            IngestError::Qmp(error) => Some(qmp_failure(error)),
            IngestError::Open(error) => Some(open_failure(error)),
            IngestError::Merge(error) => {
                let hint = "leave --channels out: QEMU's main channel alone carries any VM";
                Some(Failure::new("multifd", Blame::Vmm, error.to_string(), hint))
            }
        }
    }
}

/// Reads `inlet` to its end, in segments of about `chunk` bytes; returns the stream's length. Back-pressure is by `segments` being full:
/// then nothing more is read, and the VMM waits.
pub(crate) async fn ingest(
    inlet: Arc<Inlet>,
    segments: mpsc::Sender<Segment>,
    report: Arc<Report>,
    chunk: usize,
) -> Result<u64, IngestError> {
    match &*inlet {
        Inlet::Main(stream) => Ok(ingest_main(stream, segments, report, chunk).await?),
        Inlet::Channels(channels) => {
            let outcome = ingest_channels(channels, segments, report, chunk).await;
            // Nothing more is read: a VMM that gave up must not wait for one of its threads that waits for room.
            inlet.shut();
            outcome
        }
    }
}

async fn ingest_main(
    stream: &UnixStream,
    segments: mpsc::Sender<Segment>,
    report: Arc<Report>,
    chunk: usize,
) -> io::Result<u64> {
    let counters = report.counters.clone();
    let mut cutter = Cutter::new(chunk);
    let mut told = false;
    loop {
        if let Some(reason) = cutter.opaque_reason().filter(|r| !told && *r != OpaqueReason::DeviceState) {
            told = true;
            warn!(%reason, offset = %cutter.offset(), "the rest of the VMM's stream is carried as opaque bytes");
            report.fallback(format!("opaque bytes instead of pages: {reason}"));
        }
        match stream.try_read(cutter.buffer()) {
            Ok(0) => break,
            Ok(read) => cutter.filled(read),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if timeout(PAUSE, stream.readable()).await.is_err() {
                    cutter.flush();
                    forward(&mut cutter, &segments, &counters).await?;
                    stream.readable().await?;
                }
                continue;
            }
            Err(error) => return Err(error),
        }
        forward(&mut cutter, &segments, &counters).await?;
    }
    let length = cutter.offset().0;
    cutter.finish();
    forward(&mut cutter, &segments, &counters).await?;
    Ok(length)
}

/// The same with multifd: what is cut is the one stream that the channels make. Pages are read to where they are sent from.
async fn ingest_channels(
    channels: &Channels,
    segments: mpsc::Sender<Segment>,
    report: Arc<Report>,
    chunk: usize,
) -> Result<u64, IngestError> {
    let counters = report.counters.clone();
    let mut cutter = Cutter::merged(chunk);
    let mut merger = Merger::new(channels.multifd.len());
    let all: Vec<(Source, &UnixStream)> = std::iter::once((Source::Main, &channels.main))
        .chain(channels.multifd.iter().enumerate().map(|(n, stream)| (Source::Channel(n), stream)))
        .collect();
    'stream: loop {
        // What is whole goes on before more is read.
        loop {
            if cutter.buffer().len() < MIN_ROOM {
                cutter.flush();
            }
            let merged = merger.merge(cutter.buffer())?;
            cutter.filled(merged.len);
            if merged.synchronised {
                cutter.synchronised();
            }
            forward(&mut cutter, &segments, &counters).await?;
            if merged == Merged::default() {
                break;
            }
        }
        let mut some = false;
        for &(source, stream) in &all {
            if !merger.wants(source) {
                continue;
            }
            match merger.fill(source, cutter.buffer(), |places| stream.try_read_vectored(places)) {
                Ok(filled) if filled.read > 0 => {
                    cutter.filled(filled.len);
                    some = true;
                }
                Ok(_) if merger.ended(source) && source != Source::Main => some = true,
                Ok(_) => {
                    if source != Source::Main {
                        warn!(?source, "a multifd channel ended before the stream");
                    }
                    break 'stream;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        if !some {
            let wanted = || all.iter().filter(|(source, _)| merger.wants(*source));
            let readable = poll_fn(|context| {
                let ready = wanted().map(|(_, stream)| stream.poll_read_ready(context));
                ready.filter(Poll::is_ready).last().unwrap_or(Poll::Pending)
            });
            tokio::pin!(readable);
            if timeout(PAUSE, &mut readable).await.is_err() {
                cutter.flush();
                forward(&mut cutter, &segments, &counters).await?;
                readable.await?;
            }
        }
    }
    let length = cutter.offset().0;
    cutter.finish();
    forward(&mut cutter, &segments, &counters).await?;
    Ok(length)
}

async fn forward(
    cutter: &mut Cutter,
    segments: &mpsc::Sender<Segment>,
    counters: &Counters,
) -> io::Result<()> {
    while let Some(segment) = cutter.pop() {
        count(&segment, counters);
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the migration has ended");
        segments.send(segment).await.map_err(gone)?;
    }
    Ok(())
}

/// A segment is about to go on.
pub(super) fn count(segment: &Segment, counters: &Counters) {
    counters.raw.add(segment.bytes.len() as u64);
    counters.guest.add(guest_bytes(segment));
    counters.rounds.set(u64::from(segment.version.0) + 1);
}

/// Guest memory in a segment, zero pages at full size.
fn guest_bytes(segment: &Segment) -> u64 {
    let pages: u64 = segment
        .records
        .iter()
        .map(|record| match record {
            Record::Opaque { .. } => 0,
            Record::Pages(run) | Record::Zeros(run) => u64::from(run.count),
        })
        .sum();
    pages * PAGE_SIZE as u64
}
