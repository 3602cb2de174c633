//! Path v1 at the destination: the VMM's bytes go to its socket as they come.

use bytes::BytesMut;
use dwcp_link::Reader;
use dwcp_proto::Leg;
use dwcp_proto::handover::Transfer;
use dwcp_proto::leg::BytesDigest;
use dwcp_proto::message::Ack;
use tokio::io::AsyncReadExt;
use tracing::info;

use super::land::{Landed, Landing, Order, ended};
use super::silence::{Waiting, look};
use crate::error::{Blame, Failure};
use crate::wire::WireError;

/// Bytes read at once: enough that the system calls do not count, few enough to stay in the cache between the two.
const BUFFER: usize = 256 << 10;

/// Receives one leg: until the stream, whose length the source tells once it knows it, was applied whole.
pub(crate) async fn receive(landing: &mut Landing, leg: &Leg) -> Result<Landed, Failure> {
    let mut connection: Option<(Reader, _)> = None;
    let mut digest = BytesDigest::new(leg);
    let mut buffer = BytesMut::with_capacity(BUFFER);
    let mut length = None;
    let waiting = Waiting::default();
    let mut look = look();
    loop {
        let applied = landing.sink.applied();
        if let Some(length) = length {
            if applied == length {
                let transfer = Transfer { stream_len: length, root: digest.root() };
                return Ok(Landed::All(transfer, Box::new(connection)));
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
            _ = look.tick() => {
                let silent = connection.is_some() && waiting.in_vain();
                landing.silent(if silent { vec![0] } else { Vec::new() });
            }
            read = read(&mut connection, &mut buffer) => match read {
                Ok(0) => drop(lost(&mut connection, WireError::Closed)),
                Ok(bytes) => {
                    // Not cancelled: what was taken from the connection reaches the VMM before anything else is looked at.
                    landing.sink.apply(&buffer).await?;
                    digest.update(&buffer);
                    buffer.clear();
                    landing.incoming.counters.raw.add(bytes as u64);
                    landing.incoming.counters.wire.add(bytes as u64);
                    let applied = landing.sink.applied();
                    landing.acknowledge(Ack { applied, leg: leg.number, ..Ack::default() });
                    waiting.begins();
                }
                Err(error) => drop(lost(&mut connection, error.into())),
            },
            order = landing.orders.recv() => match order {
                Some(Order::End(end)) if end.leg == leg.number => length = Some(end.length),
                // Of a leg that is over.
                Some(Order::End(_)) => {}
                Some(Order::Switch(switch)) => if let Some(turn) = landing.judge(switch, leg).await? {
                    return Ok(Landed::Turn(turn, digest.root()));
                },
                None => return Err(ended()),
            },
            arrival = landing.arrivals.recv() => match arrival {
                Some(arrival) => if let Some(arrival) = landing.admit(arrival, leg).await {
                    // The one before, if any, is closed: from here on only the new one counts.
                    connection = arrival.accept(&landing.incoming.session, 0, applied).await.ok();
                    waiting.begins();
                },
                None => return Err(ended()),
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
