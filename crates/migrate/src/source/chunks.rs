//! Path v3 at the source: segments are encoded by the pool, sealed in order, and sent over several connections.
//!
//! ```text
//! segments ─► encode (pool, in parallel) ─► in order ─► Sealer ─► Sender ─► links (a task each) ═► network
//!                                                                   ▲ Ack, Nack (control connection)
//! ```
//! What was sealed is kept until it is acknowledged. Back-pressure runs the other way: no room in the sender, so no result
//! is taken from the pool, so no segment is taken from the VMM.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use dwcp_hde::Choice as Compression;
use dwcp_link::{Reader, Writer};
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Purpose};
use dwcp_proto::pace::Pace;
use dwcp_proto::sender::{LINK_QUEUE, Sender, SenderError};
use dwcp_proto::{EncodedChunk, Lane, LinkId, Mode, SealedChunk, Sealer, Segment, Seq, StreamOffset};
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tracing::{Instrument, debug, info};

use super::Outgoing;
use crate::control::{DataEvent, RETRY};
use crate::error::{Blame, Failure};
use crate::handshake::Dialler;
use crate::pool::Share;
use crate::wire::{WireError, chunk_frame_len, write_chunk};

/// What a connection's task tells.
enum LinkEvent {
    Up(LinkId, mpsc::Sender<SealedChunk>),
    Down(LinkId),
    Written(LinkId, u64),
    Failed(Failure),
}

/// Sends all `segments`; returns once the destination has applied every byte and the end.
pub(crate) async fn send(
    out: Outgoing,
    segments: mpsc::Receiver<Segment>,
    mut peer: mpsc::Receiver<DataEvent>,
) -> Result<Transfer, Failure> {
    let mut tasks = JoinSet::new();
    let (encoded_tx, mut encoded) = mpsc::channel(super::ingest::QUEUE);
    let encoder = encode(segments, out.share.clone(), compression(out.session.mode), encoded_tx);
    tasks.spawn(encoder.in_current_span());
    let streams = out.session.choice.streams;
    let (events_tx, mut events) = mpsc::channel(64);
    for n in 0..streams as u16 {
        let link = serve_link(out.dialler.clone(), out.clone(), LinkId(n), events_tx.clone());
        tasks.spawn(link.in_current_span());
    }
    drop(events_tx);

    let mut stage = Stage::new(out);
    let mut pending = None;
    loop {
        let wait = stage.pump();
        if let Some(transfer) = stage.delivered() {
            return Ok(transfer);
        }
        tokio::select! {
            biased;
            said = peer.recv() => match said {
                Some(DataEvent::Ack(ack)) => stage.acked(ack)?,
                Some(DataEvent::Up) => {}
                None => return Err(ended()),
            },
            event = events.recv() => match event {
                Some(event) => stage.link(event)?,
                None => return Err(ended()),
            },
            chunk = next(&mut pending, &mut encoded), if stage.wants_more() => stage.push(chunk?),
            () = sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
}

fn ended() -> Failure {
    Failure::new("ended", Blame::Local, "the migration has ended", "")
}

/// What v3 does to a chunk, by mode.
fn compression(mode: Mode) -> Compression {
    match mode {
        Mode::Internet => Compression::INTERNET,
        Mode::Datacenter => Compression::Raw,
    }
}

type Encoded = Result<EncodedChunk, dwcp_hde::EncodeError>;

/// Encodes segments side by side; their results are handed on in the segments' order.
async fn encode(
    mut segments: mpsc::Receiver<Segment>,
    share: Share,
    compression: Compression,
    encoded: mpsc::Sender<oneshot::Receiver<Encoded>>,
) {
    while let Some(segment) = segments.recv().await {
        let result = share
            .run(move |worker| {
                let mut payload = Vec::new();
                let done = match worker.encoder.encode(&segment, compression, &mut payload) {
                    Ok(done) => done,
                    Err(error) => {
                        // An index that does not fit its bytes is an error of ours; the bytes are right all the same.
                        tracing::error!(%error, "segment sent as opaque bytes; please report this");
                        let segment = Segment::opaque(segment.offset, segment.bytes.clone(), segment.version);
                        worker.encoder.encode(&segment, compression, &mut payload)?
                    }
                };
                Ok(EncodedChunk::new(
                    done.codec,
                    Lane(0),
                    segment.version,
                    segment.offset,
                    segment.bytes.len() as u32,
                    done.raw_len,
                    payload.into(),
                ))
            })
            .await;
        if encoded.send(result).await.is_err() {
            return;
        }
    }
}

/// The next encoded chunk in order, `None` after the last. Keeps its place when it is cancelled.
async fn next(
    pending: &mut Option<oneshot::Receiver<Encoded>>,
    encoded: &mut mpsc::Receiver<oneshot::Receiver<Encoded>>,
) -> Result<Option<EncodedChunk>, Failure> {
    if pending.is_none() {
        *pending = encoded.recv().await;
    }
    let Some(result) = pending else { return Ok(None) };
    let outcome = result.await;
    *pending = None;
    match outcome {
        Ok(Ok(chunk)) => Ok(Some(chunk)),
        Ok(Err(error)) => Err(Failure::new("encode", Blame::Local, error.to_string(), "please report this")),
        Err(_) => Err(Failure::new("encode", Blame::Local, "a codec thread failed", "please report this")),
    }
}

/// The state between encoder and connections.
struct Stage {
    out: Outgoing,
    started: Instant,
    sealer: Sealer,
    sender: Sender,
    /// What was sealed and not acknowledged, from `base` on.
    kept: VecDeque<SealedChunk>,
    base: Seq,
    links: HashMap<LinkId, mpsc::Sender<SealedChunk>>,
    seen_links: u32,
    end: Option<(StreamOffset, [u8; 32])>,
    busy_since: Option<Instant>,
}

impl Stage {
    fn new(out: Outgoing) -> Self {
        let sender = Sender::new(out.session.choice.window, Pace::new(out.budget));
        Stage {
            sealer: Sealer::new(out.session.id),
            out,
            started: Instant::now(),
            sender,
            kept: VecDeque::new(),
            base: Seq(0),
            links: HashMap::new(),
            seen_links: 0,
            end: None,
            busy_since: None,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn wants_more(&self) -> bool {
        self.end.is_none() && self.sender.has_room()
    }

    fn push(&mut self, chunk: Option<EncodedChunk>) {
        let sealed = match chunk {
            Some(chunk) => self.sealer.seal(&self.out.session.key, chunk),
            None => {
                let end = self.sealer.seal_end(&self.out.session.key);
                self.end = Some((end.header().offset, end.header().hash()));
                end
            }
        };
        self.sender.push(sealed.wire_len(), sealed.header().weight(), sealed.header().end());
        self.kept.push_back(sealed);
        if self.end.is_none() {
            self.out.counters.chunks.add(1);
        }
        self.busy_since.get_or_insert_with(Instant::now);
    }

    /// Hands chunks to connections; how long to wait if the bandwidth limit holds them back.
    fn pump(&mut self) -> Option<Duration> {
        loop {
            let now = self.now();
            let wait = self.out.bucket().wait(now);
            if !wait.is_zero() {
                return Some(wait);
            }
            let (link, seq) = self.sender.poll_transmit(now)?;
            let chunk = self.kept.get((seq.0 - self.base.0) as usize).cloned();
            let (Some(chunk), Some(writer)) = (chunk, self.links.get(&link)) else { continue };
            self.out.bucket().spend(chunk_frame_len(&chunk), now);
            if writer.try_send(chunk).is_err() {
                // Its task has ended; its own word of it is on the way.
                self.links.remove(&link);
                self.sender.link_down(link);
            }
        }
    }

    fn acked(&mut self, ack: Ack) -> Result<(), Failure> {
        let now = self.now();
        let rtt = self.out.counters.rtt_us.load();
        if rtt > 0 {
            self.sender.pace().round_trip(Duration::from_micros(rtt));
        }
        // Acknowledgements are state; after a reconnection the last one comes again.
        if Seq(ack.next) < self.base {
            return Ok(());
        }
        let acked = self.sender.ack(Seq(ack.next), StreamOffset(ack.applied), now).map_err(broken)?;
        let freed = (acked.to.0 - acked.from.0) as usize;
        self.kept.drain(..freed.min(self.kept.len()));
        self.base = acked.to;
        self.out.counters.rate.set(self.sender.pace().rate() as u64);
        self.count_again();
        for latency in acked.latencies {
            self.out.metrics.v3_acknowledged(self.out.session.mode, latency);
        }
        for refusal in ack.refused {
            debug!(
                seq = refusal.seq,
                times = refusal.times,
                "wanted again: its payload was altered on the way"
            );
            self.sender.nack(Seq(refusal.seq), refusal.times).map_err(broken)?;
        }
        if self.sender.is_idle()
            && let Some(since) = self.busy_since.take()
        {
            self.out.metrics.busy(Some(self.out.session.mode), since.elapsed());
        }
        Ok(())
    }

    fn count_again(&mut self) {
        let (now, before) = (self.sender.retransmitted(), self.out.counters.retransmitted.load());
        self.out.counters.retransmitted.set(now);
        self.out.metrics.retransmitted(now.saturating_sub(before));
    }

    fn link(&mut self, event: LinkEvent) -> Result<(), Failure> {
        match event {
            LinkEvent::Up(link, writer) => {
                self.links.insert(link, writer);
                self.sender.link_up(link);
                self.seen_links += 1;
                if self.seen_links > self.out.session.choice.streams {
                    self.out.counters.reconnects.add(1);
                    self.out.metrics.reconnected();
                }
            }
            LinkEvent::Down(link) => {
                self.links.remove(&link);
                self.sender.link_down(link);
                self.count_again();
            }
            LinkEvent::Written(link, bytes) => {
                self.sender.written(link);
                self.out.sent(bytes);
            }
            LinkEvent::Failed(failure) => return Err(failure),
        }
        Ok(())
    }

    fn delivered(&self) -> Option<Transfer> {
        let (length, root) = self.end?;
        self.sender.is_idle().then_some(Transfer { stream_len: length.0, root })
    }
}

fn broken(error: SenderError) -> Failure {
    let code = match error {
        SenderError::Refused(_) => "payload_flip",
        SenderError::BadAck { .. } | SenderError::BadNack(_) => "forged_ack",
    };
    Failure::new(
        code,
        Blame::PeerMisbehaving,
        error.to_string(),
        "look at the log of the destination's agent",
    )
}

/// Keeps one data connection up and writes the chunks that it is given.
async fn serve_link(dialler: Dialler, out: Outgoing, link: LinkId, events: mpsc::Sender<LinkEvent>) {
    loop {
        let error = match dialler.join(&out.session, Purpose::Chunks, link.0.into()).await {
            Ok((reader, writer, _)) => {
                let (chunks_tx, chunks) = mpsc::channel(LINK_QUEUE as usize);
                if events.send(LinkEvent::Up(link, chunks_tx)).await.is_err() {
                    return;
                }
                let Some(error) = write_link(reader, writer, link, chunks, &events).await else { return };
                info!(%link, %error, "data connection lost");
                if events.send(LinkEvent::Down(link)).await.is_err() {
                    return;
                }
                error
            }
            Err(error) => {
                debug!(%link, %error, "data connection not made");
                error
            }
        };
        if !error.is_transient() {
            let _ = events.send(LinkEvent::Failed(error.failure())).await;
            return;
        }
        sleep(RETRY).await;
    }
}

/// Writes chunks until the connection fails; `None` once no more are wanted.
async fn write_link(
    mut reader: Reader,
    mut writer: Writer,
    link: LinkId,
    mut chunks: mpsc::Receiver<SealedChunk>,
    events: &mpsc::Sender<LinkEvent>,
) -> Option<WireError> {
    // The destination says nothing on a data connection: whatever is read is its end.
    let silence = async move {
        match reader.read_u8().await {
            Ok(_) => WireError::Unexpected { got: "a byte", expected: "silence on a data connection" },
            Err(error) => WireError::from(error),
        }
    };
    tokio::pin!(silence);
    loop {
        let chunk = tokio::select! {
            chunk = chunks.recv() => chunk?,
            error = &mut silence => return Some(error),
        };
        tokio::select! {
            wrote = write_chunk(&mut writer, &chunk) => if let Err(error) = wrote {
                return Some(error);
            },
            error = &mut silence => return Some(error),
        }
        events.send(LinkEvent::Written(link, chunk_frame_len(&chunk))).await.ok()?;
    }
}
