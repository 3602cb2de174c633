//! Reading the VMM's migration stream and cutting it into segments.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Record, Segment};
use dwcp_vmm::stream::{Cutter, OpaqueReason};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::warn;

use crate::counters::Counters;
use crate::report::Report;

/// Bytes of guest pages in one chunk. Larger chunks cost less each; what lies in the pipeline when the guest stops adds to its
/// downtime. Compression gains less than half a percent from 256 KiB to 512 KiB.
pub(crate) const CHUNK: usize = 512 << 10;

/// Segments that may wait for the next stage.
pub(crate) const QUEUE: usize = 1;

/// When the VMM says nothing for so long, what it said so far is sent on. Long enough that a VMM which is merely slower
/// than we are does not get its chunks chopped, short against any downtime.
const PAUSE: Duration = Duration::from_millis(2);

/// Reads `stream` to its end. Back-pressure is by `segments` being full: then nothing more is read, and the VMM waits.
pub(crate) async fn ingest(
    stream: Arc<UnixStream>,
    segments: mpsc::Sender<Segment>,
    report: Arc<Report>,
) -> io::Result<u64> {
    let counters = report.counters.clone();
    let mut cutter = Cutter::new(CHUNK);
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

async fn forward(
    cutter: &mut Cutter,
    segments: &mpsc::Sender<Segment>,
    counters: &Counters,
) -> io::Result<()> {
    while let Some(segment) = cutter.pop() {
        counters.raw.add(segment.bytes.len() as u64);
        counters.guest.add(guest_bytes(&segment));
        counters.rounds.set(u64::from(segment.version.0) + 1);
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the migration has ended");
        segments.send(segment).await.map_err(gone)?;
    }
    Ok(())
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
