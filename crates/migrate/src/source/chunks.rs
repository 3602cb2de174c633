//! Path v3 at the source: segments are encoded by the pool, sealed in order, and sent over several connections.
//!
//! ```text
//! reel ─► encode (pool, in parallel) ─► in order ─► Sealer ─► Sender ─► links (a task each) ═► network
//!                                                               ▲ Ack (control connection)
//! ```
//! What was sealed is kept until it is acknowledged. Back-pressure runs the other way: no room in the sender, so no result
//! is taken from the pool, so no segment is taken from the reel, and nothing from the VMM.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use dwcp_hde::{CacheSize, Effort, Holding, LaneEncoder, LaneWindow, Memory, Spent};
use dwcp_link::{Gauge, Reader, Writer};
use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Purpose};
use dwcp_proto::mode::Link;
use dwcp_proto::pace::Pace;
use dwcp_proto::sender::{LINK_QUEUE, Sender, SenderError};
use dwcp_proto::{EncodedChunk, Leg, LinkId, Mode, SealedChunk, Sealer, Seq, StreamOffset};
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};
use tracing::{Instrument, debug, info};

use super::Outgoing;
use super::carry::{Carried, Peer, restarted};
use super::encode::{Baton, Done, Encoding, encode};
use super::helm::Helm;
use super::reel::Reel;
use super::survey::Survey;
use crate::control::{DataEvent, RETRY, STALLED};
use crate::error::{Blame, Failure};
use crate::handshake::{Dialler, nonce};
use crate::wire::{WireError, chunk_frame_len, write_chunk};

/// Segments between the reel and the sealer: being encoded, or waiting for an earlier one.
const AHEAD: usize = 3;

/// What may be in flight in datacenter mode, as time. More is no faster there: what waits longer leaves the processor's caches before
/// its turn comes, and takes memory.
const NEAR_BUDGET: Duration = Duration::from_millis(20);

/// What a connection's task tells.
enum LinkEvent {
    Up(LinkId, mpsc::Sender<SealedChunk>, Gauge),
    Down(LinkId),
    Written(LinkId, u64),
    Failed(Failure),
}

/// Sends one leg: to the end of the stream, or until the path should change.
pub(crate) async fn send(
    out: &Outgoing,
    leg: &Leg,
    reel: &mut Reel,
    peer: &mut Peer,
    helm: &mut Helm,
) -> Result<(Carried, Stage), Failure> {
    let mut tasks = JoinSet::new();
    let (events_tx, mut events) = mpsc::channel(64);
    for n in 0..leg.choice.streams as u16 {
        let link = serve_link(out.clone(), leg.clone(), LinkId(n), events_tx.clone());
        tasks.spawn(link.in_current_span());
    }
    drop(events_tx);

    let lane = LaneWindow::new(leg.choice.lane_window).map(LaneEncoder::new);
    let mut effort = effort(leg.mode, lane.is_some());
    let mut baton = memory(out, leg)?.map(|memory| Baton::first(memory, lane, leg.choice.mapped));
    let mut stage = Stage::new(out.clone(), leg);
    let mut encoding = FuturesOrdered::new();
    let mut receipt = out.receipt.subscribe();
    let mut survey = Survey::new(out);
    loop {
        let wait = if helm.holds() && !stage.ending() { None } else { stage.pump() };
        if let Some(transfer) = stage.delivered(*receipt.borrow_and_update()) {
            return Ok((Carried::All(transfer), stage));
        }
        let all_read = reel.length().is_some();
        if all_read && encoding.is_empty() && !stage.ending() && stage.wants_more() {
            stage.push_end();
            continue;
        }
        if encoding.is_empty() && stage.wants_more() {
            let now = stage.now();
            stage.sender.pace().starved(now);
        }
        tokio::select! {
            biased;
            change = helm.turn(), if !stage.ending() => {
                // What the kernel still holds of v3 must not go out after this.
                stage.cut();
                return Ok((Carried::Turn(change), stage));
            }
            said = peer.recv() => match said {
                Some(DataEvent::Ack(ack)) if ack.leg == leg.number => stage.acked(ack, reel)?,
                Some(DataEvent::Veto(reason)) => helm.veto(&reason),
                Some(DataEvent::Restarted) => {
                    stage.cut();
                    return Ok((Carried::Turn(restarted(leg)), stage));
                }
                Some(DataEvent::Up) => stage.link_is_back(),
                Some(DataEvent::Ack(_) | DataEvent::Switched(_)) => {}
                None => return Err(ended()),
            },
            event = events.recv() => match event {
                Some(event) => stage.link(event)?,
                None => return Err(ended()),
            },
            Ok(()) = receipt.changed() => {}
            () = survey.due(), if !stage.ending() => {
                let narrow = helm.measured(stage.survey(&mut survey));
                stage.sender.pace().narrow(narrow);
            }
            Some(chunk) = encoding.next(), if stage.wants_more() => match chunk {
                Ok(Done { chunk, compressing, at, .. }) => {
                    if let (Some(effort), Some((bytes, busy))) = (&mut effort, compressing) {
                        let followed = encoding.len() + 1 >= AHEAD;
                        effort.spent(Spent { bytes, busy, waited: at.elapsed(), followed });
                    }
                    stage.push(chunk, at);
                }
                // The bytes are still here; v1 needs no encoder.
                Err(why) => helm.encoder_failed(why),
            },
            segment = reel.next(), if !all_read && encoding.len() < AHEAD => {
                if let Some(segment) = segment {
                    let baton = baton.as_mut().map(Baton::pass);
                    let compression = effort.as_ref().map(Effort::choice);
                    encoding.push_back(Encoding::start(encode(out.clone(), segment, compression, baton)));
                }
            }
            () = sleep(wait.unwrap_or_default()), if wait.is_some() => {}
        }
    }
}

fn ended() -> Failure {
    Failure::new("ended", Blame::Local, "the migration has ended", "")
}

/// Who chooses how hard to compress; `None` where nothing is compressed.
fn effort(mode: Mode, lane: bool) -> Option<Effort> {
    match mode {
        Mode::Internet if lane => Some(Effort::in_lane()),
        Mode::Internet => Some(Effort::default()),
        Mode::Datacenter => None,
    }
}

/// The part of the downtime that may be spent on bytes in flight.
fn budget(out: &Outgoing, mode: Mode) -> Duration {
    match mode {
        Mode::Internet => out.budget,
        Mode::Datacenter => out.budget.min(NEAR_BUDGET),
    }
}

/// What the destination holds on this leg, as far as chunks may refer to it.
fn memory(out: &Outgoing, leg: &Leg) -> Result<Option<Memory>, Failure> {
    if leg.mode == Mode::Datacenter {
        return Ok(None);
    }
    let holding = if leg.choice.mapped {
        let mapped = &out.session.offers.destination.mapped;
        Holding::Blocks(mapped.iter().map(|name| name.as_slice().into()).collect())
    } else {
        match CacheSize::new(leg.choice.cache_pages).filter(|_| out.layers.refer()) {
            Some(size) => Holding::Cache(size),
            // Nothing to refer to; a lane goes from chunk to chunk all the same.
            None => Holding::Blocks(Vec::new()),
        }
    };
    Ok(Some(Memory::new(out.layers, holding, &nonce()?, out.remember)))
}

/// The state between encoder and connections.
pub(crate) struct Stage {
    out: Outgoing,
    mode: Mode,
    started: Instant,
    sealer: Sealer,
    sender: Sender,
    /// What was sealed and not acknowledged, from `base` on.
    kept: VecDeque<SealedChunk>,
    /// When each of them was encoded.
    encoded: VecDeque<Instant>,
    base: Seq,
    /// The digest of what was acknowledged.
    carried: [u8; 32],
    links: HashMap<LinkId, (mpsc::Sender<SealedChunk>, Gauge)>,
    streams: u32,
    seen_links: u32,
    end: Option<(StreamOffset, [u8; 32])>,
    busy_since: Option<Instant>,
}

impl Stage {
    fn new(out: Outgoing, leg: &Leg) -> Self {
        let pace = Pace::new(budget(&out, leg.mode)).over_losses(out.lossy).within(out.limit);
        let sender = Sender::from(leg.from, leg.choice.window, pace);
        Stage {
            sealer: Sealer::from(leg.id, leg.from),
            out,
            mode: leg.mode,
            started: Instant::now(),
            sender,
            kept: VecDeque::new(),
            encoded: VecDeque::new(),
            base: Seq(0),
            carried: leg.id.0,
            links: HashMap::new(),
            streams: leg.choice.streams,
            seen_links: 0,
            end: None,
            busy_since: None,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// The end was sealed: the way leads forward only.
    fn ending(&self) -> bool {
        self.end.is_some()
    }

    fn wants_more(&self) -> bool {
        self.end.is_none() && self.sender.has_room()
    }

    /// Takes a chunk that was encoded at that time.
    fn push(&mut self, chunk: EncodedChunk, at: Instant) {
        let sealed = self.sealer.seal(&self.out.session.key, chunk);
        self.out.counters.chunks.add(1);
        self.keep(sealed, at);
    }

    fn push_end(&mut self) {
        let end = self.sealer.seal_end(&self.out.session.key);
        self.end = Some((end.header().offset, end.header().hash()));
        self.keep(end, Instant::now());
    }

    fn keep(&mut self, sealed: SealedChunk, encoded: Instant) {
        self.sender.push(sealed.wire_len(), sealed.header().weight(), sealed.header().end());
        self.kept.push_back(sealed);
        self.encoded.push_back(encoded);
        self.busy_since.get_or_insert_with(Instant::now);
    }

    /// Ends the connections at once, with all that was written to them and not sent yet.
    fn cut(&mut self) {
        self.links.values().for_each(|(_, gauge)| gauge.cut());
        self.links.clear();
        self.idle();
    }

    /// The digest of what this leg carried before `offset`, from which the next one goes on.
    pub(crate) fn carried_until(&mut self, offset: u64) -> Result<[u8; 32], Failure> {
        while self.kept.front().is_some_and(|chunk| chunk.header().end().0 <= offset) {
            // An end chunk ends where the last one did: it counts only if the peer had applied it, and then nothing turns.
            let Some(chunk) = self.kept.pop_front().filter(|c| c.header().stream_len > 0) else { break };
            self.carried = chunk.header().hash();
        }
        if self.kept.front().is_some_and(|chunk| chunk.header().offset.0 < offset) {
            let text = format!("the peer says it stopped at byte {offset}, within a chunk");
            return Err(Failure::new("forged_ack", Blame::PeerMisbehaving, text, ""));
        }
        Ok(self.carried)
    }

    /// Hands chunks to connections; how long to wait if the bandwidth limit holds them back.
    fn pump(&mut self) -> Option<Duration> {
        loop {
            let now = self.now();
            let wait = self.out.throttle.wait();
            if !wait.is_zero() {
                return Some(wait);
            }
            let (link, seq) = self.sender.poll_transmit(now)?;
            let chunk = self.kept.get((seq.0 - self.base.0) as usize).cloned();
            let (Some(chunk), Some((writer, _))) = (chunk, self.links.get(&link)) else { continue };
            self.out.throttle.spend(chunk_frame_len(&chunk));
            if writer.try_send(chunk).is_err() {
                // Its task has ended; its own word of it is on the way.
                self.links.remove(&link);
                self.sender.link_down(link);
            }
        }
    }

    /// What the link is like now.
    fn survey(&mut self, survey: &mut Survey) -> Link {
        let rate = self.sender.pace().rate();
        survey.look(self.links.iter().map(|(link, (_, gauge))| (*link, gauge)), rate)
    }

    fn acked(&mut self, ack: Ack, reel: &mut Reel) -> Result<(), Failure> {
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
        if let Some(last) = self.kept.drain(..freed.min(self.kept.len())).last() {
            self.carried = last.header().hash();
        }
        self.base = acked.to;
        reel.trim(ack.applied, |_| {}).map_err(super::carry::beyond_end)?;
        self.out.counters.rate.set(self.sender.pace().rate() as u64);
        self.count_again();
        for encoded in self.encoded.drain(..freed.min(self.encoded.len())) {
            self.out.metrics.v3_acknowledged(self.mode, encoded.elapsed());
        }
        for refusal in &ack.refused {
            debug!(
                seq = refusal.seq,
                times = refusal.times,
                "wanted again: its payload was altered on the way"
            );
            self.sender.nack(Seq(refusal.seq), refusal.times).map_err(broken)?;
        }
        self.sender.held(ack.held);
        self.stalled(&ack.silent);
        if self.sender.is_idle() {
            self.idle();
        }
        Ok(())
    }

    /// Ends the connection on which the oldest chunk has stalled, if the destination names it as silent: it goes on over another.
    fn stalled(&mut self, silent: &[u32]) {
        let now = self.now();
        let silent = silent.iter().filter_map(|link| u16::try_from(*link).ok()).map(LinkId);
        for link in silent.filter(|link| self.sender.waits_on(*link, STALLED, now)) {
            if let Some((_, gauge)) = self.links.get(&link) {
                info!(%link, "data connection has stalled");
                gauge.cut();
            }
        }
    }

    /// The control connection stands again: what the kernel waits to try again on others goes over new ones at once.
    fn link_is_back(&self) {
        if Mechanism::GiveUp.is_off() {
            return;
        }
        for (link, (_, gauge)) in self.links.iter().filter(|(_, (_, gauge))| gauge.backs_off()) {
            info!(%link, "data connection is given up: the link is back, and its next try is not");
            gauge.cut();
        }
    }

    /// Nothing is on its way any more.
    fn idle(&mut self) {
        if let Some(since) = self.busy_since.take() {
            self.out.metrics.busy(Some(self.mode), since.elapsed());
        }
    }

    fn count_again(&mut self) {
        let (now, before) = (self.sender.retransmitted(), self.out.counters.retransmitted.load());
        self.out.counters.retransmitted.set(now);
        self.out.metrics.retransmitted(now.saturating_sub(before));
    }

    fn link(&mut self, event: LinkEvent) -> Result<(), Failure> {
        match event {
            LinkEvent::Up(link, writer, gauge) => {
                self.links.insert(link, (writer, gauge));
                self.sender.link_up(link);
                self.seen_links += 1;
                if self.seen_links > self.streams {
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
                self.out.sent_v3(self.mode, bytes);
            }
            LinkEvent::Failed(failure) => return Err(failure),
        }
        Ok(())
    }

    /// The whole transfer, once the destination has acknowledged all of it, or given its receipt for it.
    fn delivered(&self, receipt: Option<Transfer>) -> Option<Transfer> {
        let (length, root) = self.end?;
        let all = Transfer { stream_len: length.0, root };
        (self.sender.is_idle() || receipt == Some(all)).then_some(all)
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
async fn serve_link(out: Outgoing, leg: Leg, link: LinkId, events: mpsc::Sender<LinkEvent>) {
    let dialler: &Dialler = &out.dialler;
    loop {
        let next = tokio::time::Instant::now() + RETRY;
        let error = match dialler.join(&out.session, &leg, Purpose::Chunks, link.0.into()).await {
            Ok((reader, writer, _, gauge)) => {
                let (chunks_tx, chunks) = mpsc::channel(LINK_QUEUE as usize);
                if events.send(LinkEvent::Up(link, chunks_tx, gauge)).await.is_err() {
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
        sleep_until(next).await;
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
