//! Path v3 at the destination: chunks from several connections are verified, decoded by the pool, and applied in order.
//!
//! ```text
//! links (a task each): signed header ─► admit ─► payload ─┐
//!                                                         ▼ pool: digest, decode
//! Ack ◄── applied ◄── sink (the VMM's socket) ◄── in order
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::BytesMut;
use dwcp_hde::DecodeError;
use dwcp_link::Reader;
use dwcp_proto::chunk::{ChunkError, Kind, SIGNED_HEADER_LEN};
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Refusal};
use dwcp_proto::receiver::{Admission, Receiver};
use dwcp_proto::sender::MAX_NACKS;
use dwcp_proto::{Seq, Verifier};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use tracing::{Instrument, info, warn};

use super::{Arrived, Incoming, sink_failure};
use crate::error::{Blame, Failure};
use crate::handshake::Arrival;
use crate::pool::Share;
use crate::wire::{Frame, WireError, read_frame};

/// Refused chunks named in one acknowledgement: 256 take some 4 KiB of the 16 KiB that a control message may have.
const MAX_WANTED: usize = 256;

/// What became of a payload.
enum Decoded {
    Stream(Vec<u8>),
    Altered(ChunkError),
    Malformed(DecodeError),
}

/// What a connection's task tells.
enum LinkEvent {
    Chunk(Seq, oneshot::Receiver<Decoded>),
    Fatal(Failure),
}

/// Receives until the end of the stream was applied to `sink`.
pub(crate) async fn receive(
    incoming: Incoming,
    mut arrivals: mpsc::Receiver<Arrival>,
    mut sink: UnixStream,
    acks: &watch::Sender<Ack>,
) -> Result<Arrived, Failure> {
    let session = incoming.session.clone();
    let receiver = Arc::new(Mutex::new(Receiver::new(session.id, session.choice.window)));
    let verifier = Verifier::new(session.id, session.peer.clone());
    let (events_tx, mut events) = mpsc::channel(16);
    let mut links = JoinSet::new();
    let mut serving: HashMap<u32, AbortHandle> = HashMap::new();
    let mut decoding = FuturesUnordered::new();
    let mut ready: HashMap<Seq, Vec<u8>> = HashMap::new();
    let mut refusals: HashMap<Seq, u32> = HashMap::new();
    loop {
        tokio::select! {
            Some((seq, result)) = decoding.next() => {
                match result {
                    Ok(Decoded::Stream(bytes)) => {
                        // Another copy may have been faster.
                        if lock(&receiver).verified(seq) {
                            ready.insert(seq, bytes);
                        }
                    }
                    Ok(Decoded::Altered(error)) => {
                        incoming.metrics.byzantine_attempt("payload_flip");
                        let count = refusals.entry(seq).or_default();
                        *count += 1;
                        if *count >= MAX_NACKS {
                            return Err(attack("payload_flip", &error));
                        }
                        warn!(%seq, %error, "chunk refused, asking for it again");
                        lock(&receiver).refused(seq);
                        acks.send_modify(|ack| ack.refused = wanted(&receiver, &refusals));
                    }
                    Ok(Decoded::Malformed(error)) => {
                        incoming.metrics.byzantine_attempt(error.kind());
                        return Err(attack("malformed_chunk", &error));
                    }
                    Err(_) => {
                        return Err(Failure::new("decode", Blame::Local, "a codec thread failed", "please report this"));
                    }
                }
                refusals.retain(|seq, _| *seq >= lock(&receiver).next());
                if let Some(transfer) = apply(&receiver, &mut ready, &refusals, &mut sink, &incoming, acks).await? {
                    return Ok(Arrived { transfer, _sink: sink, _connections: Box::new(links) });
                }
            }
            event = events.recv() => match event {
                Some(LinkEvent::Chunk(seq, result)) => decoding.push(async move { (seq, result.await) }),
                Some(LinkEvent::Fatal(failure)) => {
                    incoming.metrics.byzantine_attempt(&failure.code);
                    return Err(failure);
                }
                // A sender is kept here.
                None => {}
            },
            arrival = arrivals.recv() => match arrival {
                Some(arrival) => {
                    let link = Link {
                        receiver: receiver.clone(),
                        verifier: verifier.clone(),
                        share: incoming.share.clone(),
                        incoming: incoming.clone(),
                        events: events_tx.clone(),
                    };
                    // The source has given the old connection up, though it may not look lost from here.
                    let index = arrival.link;
                    let task = links.spawn(link.serve(arrival).in_current_span());
                    if let Some(old) = serving.insert(index, task) {
                        old.abort();
                    }
                }
                None => return Err(Failure::new("ended", Blame::Local, "the migration has ended", "")),
            },
        }
    }
}

fn lock(receiver: &Mutex<Receiver>) -> MutexGuard<'_, Receiver> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An integrity failure: it ends the migration with the guest at the source, and never leads to v1.
fn attack(kind: &str, error: &dyn std::error::Error) -> Failure {
    let hint =
        "the guest is safe at the source; look for a faulty or hostile node or link before trying again";
    Failure::new(kind, Blame::PeerMisbehaving, error.to_string(), hint)
}

/// The refused chunks that have not come again since.
fn wanted(receiver: &Mutex<Receiver>, refusals: &HashMap<Seq, u32>) -> Vec<Refusal> {
    let receiver = lock(receiver);
    let lacking = refusals.iter().filter(|(seq, _)| receiver.lacks(**seq));
    let mut wanted: Vec<_> = lacking.map(|(seq, times)| Refusal { seq: seq.0, times: *times }).collect();
    // The oldest hold everything else up; the others have their turn in a later acknowledgement.
    wanted.sort_unstable_by_key(|refusal| refusal.seq);
    wanted.truncate(MAX_WANTED);
    wanted
}

/// Applies everything that is next in order; the transfer once the end was.
async fn apply(
    receiver: &Mutex<Receiver>,
    ready: &mut HashMap<Seq, Vec<u8>>,
    refusals: &HashMap<Seq, u32>,
    sink: &mut UnixStream,
    incoming: &Incoming,
    acks: &watch::Sender<Ack>,
) -> Result<Option<Transfer>, Failure> {
    loop {
        let next = lock(receiver).poll_apply();
        let header = match next {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(None),
            Err(violation) => {
                incoming.metrics.byzantine_attempt(violation.kind());
                return Err(attack(violation.kind(), &violation));
            }
        };
        let bytes = ready.remove(&header.seq).unwrap_or_default();
        sink.write_all(&bytes).await.map_err(sink_failure)?;
        incoming.counters.raw.add(bytes.len() as u64);
        let (ack, root) = {
            let mut receiver = lock(receiver);
            receiver.applied();
            let (next, applied) = (receiver.next().0, receiver.offset().0);
            (Ack { next, applied, refused: Vec::new() }, receiver.root())
        };
        let applied = ack.applied;
        let ack = Ack { refused: wanted(receiver, refusals), ..ack };
        if header.kind == Kind::Data {
            incoming.counters.rounds.set(u64::from(header.version.0) + 1);
            incoming.counters.chunks.add(1);
        }
        acks.send_replace(ack);
        if let Some(root) = root {
            return Ok(Some(Transfer { stream_len: applied, root }));
        }
    }
}

struct Link {
    receiver: Arc<Mutex<Receiver>>,
    verifier: Verifier,
    share: Share,
    incoming: Incoming,
    events: mpsc::Sender<LinkEvent>,
}

impl Link {
    async fn serve(self, arrival: Arrival) {
        let link = arrival.link;
        let (next, applied) = {
            let receiver = lock(&self.receiver);
            (receiver.next().0, receiver.offset().0)
        };
        // The writer is kept, silent: dropping it would close the connection.
        let Ok((mut reader, _writer)) = arrival.accept(&self.incoming.session, next, applied).await else {
            return;
        };
        loop {
            match self.read_chunk(&mut reader).await {
                Ok(()) => {}
                Err(ReadError::Wire(error)) if error.is_transient() => {
                    info!(link, %error, "data connection lost");
                    return;
                }
                Err(ReadError::Wire(error)) => {
                    let _ = self.events.send(LinkEvent::Fatal(error.failure())).await;
                    return;
                }
                Err(ReadError::Attack(failure)) => {
                    let _ = self.events.send(LinkEvent::Fatal(failure)).await;
                    return;
                }
                Err(ReadError::Over) => return,
            }
        }
    }

    async fn read_chunk(&self, reader: &mut Reader) -> Result<(), ReadError> {
        let signed = match read_frame(reader, 0).await? {
            Frame::Chunk(signed) => signed,
            Frame::Message(_) => {
                return Err(WireError::Unexpected { got: "a message", expected: "a chunk" }.into());
            }
        };
        let header = self.verifier.header(&signed).map_err(|error| {
            let kind = match error {
                ChunkError::Format => "header_flip",
                ChunkError::Signature(_) => "sig_forge",
                ChunkError::UnknownCodec(_) => "unknown_codec",
                ChunkError::Length { .. } => "len_overflow",
                ChunkError::Digest(_) => "payload_flip",
            };
            ReadError::Attack(attack(kind, &error))
        })?;
        let (seq, len) = (header.header().seq, header.header().wire_len as usize);
        let admission = lock(&self.receiver).admit(header.header());
        let admission = admission.map_err(|v| ReadError::Attack(attack(v.kind(), &v)))?;
        let guard = Admitted { receiver: &self.receiver, seq: (admission == Admission::Take).then_some(seq) };
        let mut payload = BytesMut::with_capacity(len);
        let mut limited = tokio::io::AsyncReadExt::take(&mut *reader, len as u64);
        while payload.len() < len {
            if limited.read_buf(&mut payload).await.map_err(WireError::from)? == 0 {
                return Err(WireError::Closed.into());
            }
        }
        self.incoming.counters.wire.add((SIGNED_HEADER_LEN + dwcp_proto::frame::HEAD_LEN + len) as u64);
        if admission == Admission::Duplicate {
            return Ok(());
        }
        let payload = payload.freeze();
        let result = self
            .share
            .run(move |worker| match header.payload(payload) {
                Err(error) => Decoded::Altered(error),
                Ok(chunk) if chunk.header().kind == Kind::End => Decoded::Stream(Vec::new()),
                Ok(chunk) => {
                    let mut stream = Vec::new();
                    match worker.decoder.decode(&chunk, &mut stream) {
                        Ok(()) => Decoded::Stream(stream),
                        Err(error) => Decoded::Malformed(error),
                    }
                }
            })
            .await;
        // This task may be ended in each wait above; only what is in the queue is sure to be judged.
        self.events.send(LinkEvent::Chunk(seq, result)).await.map_err(|_| ReadError::Over)?;
        guard.handed_on();
        Ok(())
    }
}

/// Takes an admission back when its copy is not handed on: the connection is lost, and the chunk comes again on another.
struct Admitted<'a> {
    receiver: &'a Mutex<Receiver>,
    seq: Option<Seq>,
}

impl Admitted<'_> {
    fn handed_on(mut self) {
        self.seq = None;
    }
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        if let Some(seq) = self.seq {
            lock(self.receiver).refused(seq);
        }
    }
}

enum ReadError {
    Wire(WireError),
    Attack(Failure),
    Over,
}

impl From<WireError> for ReadError {
    fn from(error: WireError) -> Self {
        ReadError::Wire(error)
    }
}
