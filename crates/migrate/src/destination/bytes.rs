//! Path v1 at the destination: the VMM's bytes go to its socket as they come.

use bytes::BytesMut;
use dwcp_link::Reader;
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::Ack;
use dwcp_proto::session::bytes_root;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tracing::info;

use super::{Arrived, Incoming, sink_failure};
use crate::error::{Blame, Failure};
use crate::handshake::Arrival;
use crate::wire::WireError;

/// Bytes read at once: enough that the system calls do not count, few enough to stay in the cache between the two.
const BUFFER: usize = 256 << 10;

/// Receives until the stream, whose length `end` tells once it is known, was applied to `sink` whole.
pub(crate) async fn receive(
    incoming: Incoming,
    mut end: watch::Receiver<Option<u64>>,
    mut arrivals: mpsc::Receiver<Arrival>,
    mut sink: UnixStream,
    acks: &watch::Sender<Ack>,
) -> Result<Arrived, Failure> {
    let mut connection: Option<(Reader, _)> = None;
    let mut applied = 0;
    let mut buffer = BytesMut::with_capacity(BUFFER);
    loop {
        if let Some(length) = *end.borrow_and_update() {
            if applied == length {
                let root = bytes_root(&incoming.session.id, length);
                let transfer = Transfer { stream_len: length, root };
                return Ok(Arrived { transfer, _sink: sink, _connections: Box::new(connection) });
            }
            if applied > length {
                let text = format!("{applied} bytes came of a stream of {length}");
                return Err(Failure::new(
                    "extend",
                    Blame::PeerMisbehaving,
                    text,
                    "compare both agents' versions",
                ));
            }
        }
        tokio::select! {
            read = read(&mut connection, &mut buffer) => match read {
                Ok(0) => drop(lost(&mut connection, WireError::Closed)),
                Ok(bytes) => {
                    // Not cancelled: what was taken from the connection reaches the VMM before anything else is looked at.
                    sink.write_all(&buffer).await.map_err(sink_failure)?;
                    buffer.clear();
                    applied += bytes as u64;
                    incoming.counters.raw.add(bytes as u64);
                    incoming.counters.wire.add(bytes as u64);
                    acks.send_replace(Ack { applied, ..Ack::default() });
                }
                Err(error) => drop(lost(&mut connection, error.into())),
            },
            changed = end.changed() => if changed.is_err() {
                return Err(Failure::new("ended", Blame::Local, "the migration has ended", ""));
            },
            arrival = arrivals.recv() => match arrival {
                // The one before, if any, is closed: from here on only the new one counts.
                Some(arrival) => connection = arrival.accept(&incoming.session, 0, applied).await.ok(),
                None => return Err(Failure::new("ended", Blame::Local, "the migration has ended", "")),
            },
        }
    }
}

async fn read<W>(connection: &mut Option<(Reader, W)>, buffer: &mut BytesMut) -> std::io::Result<usize> {
    match connection {
        Some((reader, _)) => reader.read_buf(buffer).await,
        None => std::future::pending().await,
    }
}

fn lost<W>(connection: &mut Option<(Reader, W)>, error: WireError) -> Option<(Reader, W)> {
    info!(%error, "v1 connection ended");
    connection.take()
}
