//! Path v3 at the destination: chunks from several connections are verified, decoded by the pool, and applied in order.
//!
//! ```text
//! links (a task each): signed header ─► admit ─► payload ─┐
//!                                                         ▼ pool: digest, decode
//! Ack ◄── applied ◄── sink (the VMM's socket) ◄── in order
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use dwcp_hde::{DecodeError, Unpacked};
use dwcp_link::Reader;
use dwcp_proto::buffers::Buffers;
use dwcp_proto::chunk::{ChunkError, ChunkHeader, Kind, SIGNED_HEADER_LEN};
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Refusal};
use dwcp_proto::receiver::{Admission, Receiver};
use dwcp_proto::sender::MAX_NACKS;
use dwcp_proto::{Codec, Leg, Seq, VerifiedChunk, Verifier};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument, info, warn};

use super::Incoming;
use super::land::{Landed, Landing, Order, ended};
use super::replay::{Held, Replayed, unheld};
use super::silence::{Waiting, look};
use crate::error::{Blame, Failure};
use crate::handshake::Arrival;
use crate::pool::Share;
use crate::wire::{Frame, WireError, read_frame};

/// Refused chunks named in one acknowledgement: 256 take some 4 KiB of the 16 KiB that a control message may have.
const MAX_WANTED: usize = 256;

/// Where a chunk came at so many bytes a second, the next one is left to come together before it is read: to be woken for each packet
/// costs a tenth of this agent's time. On a slower connection each packet is a sign of life: see [`super::silence`].
const SWIFT: f64 = 1e6;

/// Bytes of payload buffers that are kept for the next chunks: as many as wait to be verified and applied where that goes on
/// as fast as they come.
const KEEP: usize = 8 << 20;
/// The shortest payload whose buffer is kept: memory for less does not go back to the system.
const KEPT: usize = 64 << 10;

/// Chunks that are applied together at most, if they wait. To hand one over to another thread and back costs as much as to apply a part of
/// it; acknowledgements and orders wait until all of them are applied.
const TOGETHER: usize = 4;

/// How long the source may take to begin another leg where a page did not prove itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// What became of a payload.
enum Decoded {
    Ready(Ready),
    Altered(ChunkError),
    Malformed(DecodeError),
}

/// What waits for its turn.
pub(super) enum Ready {
    /// Bytes of the VMM's stream.
    Stream(Bytes),
    /// A chunk that may refer to what is held when its turn comes.
    Unpacked(Unpacked),
    /// The same, which continues the chunks of its lane before it: it is unpacked when its turn comes.
    InLane(VerifiedChunk),
}

/// What a connection's task tells.
enum LinkEvent {
    Chunk(Seq, oneshot::Receiver<Decoded>),
    Fatal(Failure),
}

/// Receives one leg: until the end of the stream was applied.
pub(crate) async fn receive(landing: &mut Landing, leg: &Leg) -> Result<Landed, Failure> {
    let incoming = landing.incoming.clone();
    let receiver = Receiver::from(leg.id, leg.from, leg.choice.window);
    let mut stage = Stage {
        receiver: Arc::new(Mutex::new(receiver)),
        ready: HashMap::new(),
        refusals: HashMap::new(),
        leg: leg.number,
        held: Held::of(leg, &mut landing.ram)?,
        stuck: None,
    };
    let refers = stage.held.as_ref().is_some_and(Held::refers);
    let verifier = Verifier::new(leg.id, incoming.session.peer.clone());
    let buffers = Buffers::new(KEEP);
    let (events_tx, mut events) = mpsc::channel(16);
    let mut links = JoinSet::new();
    let mut serving: HashMap<u32, (AbortHandle, Waiting)> = HashMap::new();
    let mut look = look();
    let mut decoding = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some((seq, result)) = decoding.next() => {
                let altered = match result {
                    Ok(decoded) => stage.judge(seq, decoded, &incoming)?,
                    Err(_) => {
                        return Err(Failure::new("decode", Blame::Local, "a codec thread failed", "please report this"));
                    }
                };
                if altered {
                    let wanted = stage.wanted();
                    landing.acks.send_modify(|ack| ack.refused = wanted);
                }
                if let Some(transfer) = stage.apply(landing).await? {
                    return Ok(Landed::All(transfer, Box::new(links)));
                }
                landing.holds(lock(&stage.receiver).held());
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
            order = landing.orders.recv() => match order {
                Some(Order::Switch(switch)) => if let Some(turn) = landing.judge(switch, leg).await? {
                    return Ok(Landed::Turn(turn, lock(&stage.receiver).carried()));
                },
                // Of a leg that is over.
                Some(Order::End(_)) => {}
                None => return Err(ended()),
            },
            arrival = landing.arrivals.recv() => match arrival {
                Some(arrival) => if let Some(arrival) = landing.admit(arrival, leg).await {
                    let waiting = Waiting::default();
                    let link = Link {
                        waiting: waiting.clone(),
                        receiver: stage.receiver.clone(),
                        verifier: verifier.clone(),
                        buffers: buffers.clone(),
                        share: incoming.share.clone(),
                        refers,
                        incoming: incoming.clone(),
                        events: events_tx.clone(),
                    };
                    // The source has given the old connection up, though it may not look lost from here.
                    let index = arrival.link;
                    let task = links.spawn(link.serve(arrival).in_current_span());
                    if let Some((old, _)) = serving.insert(index, (task, waiting)) {
                        old.abort();
                    }
                },
                None => return Err(ended()),
            },
            _ = look.tick() => {
                let waits = stage.stuck.is_none() && !lock(&stage.receiver).has_next();
                let silent = serving.iter().filter(|(_, (_, waiting))| waits && waiting.in_vain());
                landing.silent(silent.map(|(index, _)| *index).collect());
            }
            () = async { sleep_until(stage.stuck.unwrap_or_else(Instant::now)).await }, if stage.stuck.is_some() => {
                let text = "a page did not prove itself, and the source did not go on without it";
                return Err(Failure::new("delta_base", Blame::PeerMisbehaving, text, "try again"));
            }
        }
    }
}

/// What waits to be applied.
struct Stage {
    receiver: Arc<Mutex<Receiver>>,
    ready: HashMap<Seq, Ready>,
    /// How often a chunk was refused.
    refusals: HashMap<Seq, u32>,
    leg: u32,
    /// What chunks may refer to.
    held: Option<Held>,
    /// A chunk cannot be applied; until when the source has time to begin another leg.
    stuck: Option<Instant>,
}

impl Stage {
    /// Takes in what the pool found; true if it was refused and is wanted again.
    fn judge(&mut self, seq: Seq, decoded: Decoded, incoming: &Incoming) -> Result<bool, Failure> {
        match decoded {
            Decoded::Ready(ready) => {
                // Another copy may have been faster.
                if lock(&self.receiver).verified(seq) {
                    self.ready.insert(seq, ready);
                }
                Ok(false)
            }
            Decoded::Altered(error) => {
                incoming.metrics.byzantine_attempt("payload_flip");
                let count = self.refusals.entry(seq).or_default();
                *count += 1;
                if *count >= MAX_NACKS {
                    return Err(attack("payload_flip", &error));
                }
                warn!(%seq, %error, "chunk refused, asking for it again");
                lock(&self.receiver).refused(seq);
                Ok(true)
            }
            Decoded::Malformed(error) => {
                incoming.metrics.byzantine_attempt(error.kind());
                Err(attack("malformed_chunk", &error))
            }
        }
    }

    /// The refused chunks that have not come again since.
    fn wanted(&self) -> Vec<Refusal> {
        let receiver = lock(&self.receiver);
        let lacking = self.refusals.iter().filter(|(seq, _)| receiver.lacks(**seq));
        let mut wanted: Vec<_> = lacking.map(|(seq, times)| Refusal { seq: seq.0, times: *times }).collect();
        // The oldest hold everything else up; the others have their turn in a later acknowledgement.
        wanted.sort_unstable_by_key(|refusal| refusal.seq);
        wanted.truncate(MAX_WANTED);
        wanted
    }

    /// Applies everything that is next in order; the transfer once the end was.
    async fn apply(&mut self, landing: &mut Landing) -> Result<Option<Transfer>, Failure> {
        while self.stuck.is_none() {
            let (headers, chunks) = self.next(&landing.incoming)?;
            if headers.is_empty() {
                return Ok(None);
            }
            let replayed = match self.held.take() {
                Some(held) => {
                    let (held, replayed) = held.replay(chunks).await;
                    self.held = held;
                    replayed?
                }
                None => chunks.into_iter().map(unheld).collect::<Result<_, _>>()?,
            };
            for (header, replayed) in headers.into_iter().zip(replayed) {
                let bytes = match replayed {
                    Replayed::Bytes(bytes) => bytes,
                    Replayed::Unproved(index) => {
                        warn!(seq = %header.seq, page = %index, "a page did not prove itself, asking for another leg");
                        landing.incoming.metrics.byzantine_attempt("delta_base");
                        landing.distrust();
                        self.stuck = Some(Instant::now() + PATIENCE);
                        return Ok(None);
                    }
                };
                if let Some(transfer) = self.applied(landing, &header, &bytes).await? {
                    return Ok(Some(transfer));
                }
            }
        }
        Ok(None)
    }

    /// The chunks that are next in order, with their headers.
    fn next(&mut self, incoming: &Incoming) -> Result<(Vec<ChunkHeader>, Vec<Ready>), Failure> {
        let mut receiver = lock(&self.receiver);
        let (mut headers, mut chunks) = (Vec::new(), Vec::new());
        while headers.len() < TOGETHER {
            match receiver.poll_apply() {
                Ok(Some(header)) => {
                    chunks.push(self.ready.remove(&header.seq).unwrap_or(Ready::Stream(Bytes::new())));
                    headers.push(header);
                }
                Ok(None) => break,
                Err(violation) => {
                    incoming.metrics.byzantine_attempt(violation.kind());
                    return Err(attack(violation.kind(), &violation));
                }
            }
        }
        Ok((headers, chunks))
    }

    /// Gives the VMM what is its of a chunk, and acknowledges it; the transfer if it was the end.
    async fn applied(
        &mut self,
        landing: &mut Landing,
        header: &ChunkHeader,
        bytes: &[u8],
    ) -> Result<Option<Transfer>, Failure> {
        let stream_len = u64::from(header.stream_len);
        let counters = &landing.incoming.counters;
        counters.raw.add(stream_len);
        if header.kind == Kind::Data {
            counters.rounds.set(u64::from(header.version.0) + 1);
            counters.chunks.add(1);
        }
        landing.sink.apply_for(bytes, stream_len).await?;
        let (next, applied, held, root) = {
            let mut receiver = lock(&self.receiver);
            receiver.applied();
            (receiver.next(), receiver.offset().0, receiver.held(), receiver.root())
        };
        self.refusals.retain(|seq, _| *seq >= next);
        let refused = self.wanted();
        landing.acknowledge(Ack { next: next.0, applied, refused, leg: self.leg, silent: Vec::new(), held });
        Ok(root.map(|root| Transfer { stream_len: applied, root }))
    }
}

fn lock(receiver: &Mutex<Receiver>) -> MutexGuard<'_, Receiver> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An integrity failure: it ends the migration with the guest at the source, and never leads to v1.
pub(super) fn attack(kind: &str, error: &dyn std::error::Error) -> Failure {
    let hint =
        "the guest is safe at the source; look for a faulty or hostile node or link before trying again";
    Failure::new(kind, Blame::PeerMisbehaving, error.to_string(), hint)
}

struct Link {
    receiver: Arc<Mutex<Receiver>>,
    verifier: Verifier,
    /// What payloads are read into.
    buffers: Arc<Buffers>,
    share: Share,
    /// Whether chunks may refer to what is held.
    refers: bool,
    incoming: Incoming,
    events: mpsc::Sender<LinkEvent>,
    waiting: Waiting,
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
        let mut swift = false;
        loop {
            self.waiting.begins();
            let read = self.read_chunk(&mut reader, &mut swift).await;
            self.waiting.ends();
            match read {
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

    async fn read_chunk(&self, reader: &mut Reader, swift: &mut bool) -> Result<(), ReadError> {
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
        let mut payload = if len < KEPT { Vec::with_capacity(len) } else { self.buffers.take_for(len) };
        let mut limited = tokio::io::AsyncReadExt::take(&mut *reader, len as u64);
        let (gauge, began) = (limited.get_ref().gauge(), Instant::now());
        while payload.len() < len {
            if *swift {
                gauge.awaits(len - payload.len());
            }
            if limited.read_buf(&mut payload).await.map_err(WireError::from)? == 0 {
                return Err(WireError::Closed.into());
            }
            self.waiting.begins();
        }
        self.waiting.ends();
        if *swift {
            gauge.awaits(1);
        }
        *swift = len as f64 >= SWIFT * began.elapsed().as_secs_f64();
        self.incoming.counters.wire.add((SIGNED_HEADER_LEN + dwcp_proto::frame::HEAD_LEN + len) as u64);
        let payload = if len < KEPT { Bytes::from(payload) } else { self.buffers.share(payload) };
        if admission == Admission::Duplicate {
            return Ok(());
        }
        let refers = self.refers;
        let result = self
            .share
            .run(move |worker| match header.payload(payload) {
                Err(error) => Decoded::Altered(error),
                Ok(chunk) if chunk.header().kind == Kind::End => Decoded::Ready(Ready::Stream(Bytes::new())),
                Ok(chunk) if refers && chunk.header().codec == Codec::Lane => {
                    Decoded::Ready(Ready::InLane(chunk))
                }
                Ok(chunk) => {
                    let ready = match refers {
                        true => worker.decoder.unpack(&chunk).map(Ready::Unpacked),
                        false => worker.decoder.stream(&chunk).map(Ready::Stream),
                    };
                    ready.map_or_else(Decoded::Malformed, Decoded::Ready)
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
