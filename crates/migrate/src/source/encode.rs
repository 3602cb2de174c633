//! Encoding segments on the pool, several at a time, where what they refer to and what they continue goes from one to the next.
//!
//! ```text
//! segment n    read ── memory ──┐    compress ── lane ──┐
//! segment n+1                   └──► read ── memory ──┐ └──► compress ── lane ──►
//! segment n+2                                         └──► read …
//! ```
//! A worker never waits for another one: where the lane is not free yet, another job goes on once it is.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use dwcp_hde::{
    Choice as Compression, EncodeError, Encoded, Fallback, Gathered, LaneEncoder, Memory, Stats, Written,
    verbatim,
};
use dwcp_proto::{Codec, EncodedChunk, Lane, PageVersion, Payload, Segment, StreamOffset};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::Outgoing;
use crate::pool::Worker;

/// What passes from segment to segment, in the order in which they are sent: the memory, and behind it the lane.
pub(super) struct Baton {
    memory: oneshot::Receiver<Memory>,
    lane: oneshot::Receiver<Option<LaneEncoder>>,
    mapped: bool,
}

/// One segment's turn with the memory and the lane.
pub(super) struct Turn {
    memory: oneshot::Receiver<Memory>,
    next: oneshot::Sender<Memory>,
    lane: LaneTurn,
    /// The destination writes to the guest's RAM: no page may go by as opaque bytes, it would come late.
    mapped: bool,
}

/// One segment's turn with the lane; there is none where it was given up, or never was.
struct LaneTurn {
    lane: oneshot::Receiver<Option<LaneEncoder>>,
    next: oneshot::Sender<Option<LaneEncoder>>,
}

impl Baton {
    pub(super) fn first(memory: Memory, lane: Option<LaneEncoder>, mapped: bool) -> Self {
        Baton { memory: ready(memory), lane: ready(lane), mapped }
    }

    /// The turn of the next segment.
    pub(super) fn pass(&mut self) -> Turn {
        let (next, memory) = oneshot::channel();
        let (lane_next, lane) = oneshot::channel();
        Turn {
            memory: std::mem::replace(&mut self.memory, memory),
            next,
            lane: LaneTurn { lane: std::mem::replace(&mut self.lane, lane), next: lane_next },
            mapped: self.mapped,
        }
    }
}

fn ready<T>(value: T) -> oneshot::Receiver<T> {
    let (sender, receiver) = oneshot::channel();
    // The receiver is right here.
    let _ = sender.send(value);
    receiver
}

/// A segment that is being encoded, whether anybody waits for it or not; it ends with this.
pub(super) struct Encoding(JoinHandle<Result<Done, String>>);

impl Encoding {
    pub(super) fn start(work: impl Future<Output = Result<Done, String>> + Send + 'static) -> Self {
        Encoding(tokio::spawn(work.in_current_span()))
    }
}

impl Future for Encoding {
    type Output = Result<Done, String>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|outcome| outcome.unwrap_or_else(|_| Err(FAILED.to_owned())))
    }
}

impl Drop for Encoding {
    fn drop(&mut self) {
        self.0.abort();
    }
}

const FAILED: &str = "a codec thread failed";

/// Encodes one segment on the pool. An error says, in words, what failed on this node.
pub(super) async fn encode(
    out: Outgoing,
    segment: Segment,
    compression: Option<Compression>,
    turn: Option<Turn>,
) -> Result<Done, String> {
    let (turn, lane) = match turn {
        Some(Turn { memory, next, lane, mapped }) => {
            let memory = memory.await.map_err(|_| FAILED)?;
            (Some(Reader { memory, next, limit: out.remember, mapped }), Some(lane))
        }
        None => (None, None),
    };
    let share = out.share.clone();
    let result = share.run(move |worker| encode_now(worker, &segment, compression, turn, lane)).await;
    let (done, stats) = match result.await.map_err(|_| FAILED)?.map_err(|error| error.to_string())? {
        Step::Done(done, stats) => (done, stats),
        Step::Skips(done, stats, LaneTurn { lane, next }) => {
            // Whoever is next may be gone with the leg, here and below.
            let _ = next.send(lane.await.map_err(|_| FAILED)?);
            (done, stats)
        }
        Step::Waits(waiting, LaneTurn { lane, next }) => {
            let lane = lane.await.map_err(|_| FAILED)?;
            share.run(move |worker| waiting.compress(worker, lane, next)).await.await.map_err(|_| FAILED)?
        }
    };
    out.counters.encoded(stats);
    out.metrics.encoded(&stats, done.codec);
    Ok(done)
}

/// An encoded segment.
pub(super) struct Done {
    pub(super) chunk: EncodedChunk,
    /// The codec's name, or why none was used.
    codec: &'static str,
    /// What was compressed and what it took, if it was not left raw without trying.
    pub(super) compressing: Option<(u64, Duration)>,
    /// When it was done.
    pub(super) at: Instant,
}

/// What reading a segment needs of its turn.
struct Reader {
    memory: Memory,
    next: oneshot::Sender<Memory>,
    /// Bytes that the memory and the lane may take together.
    limit: usize,
    mapped: bool,
}

/// How far a segment came on a worker.
enum Step {
    Done(Done, Stats),
    /// It does not go into the lane, which has to be passed on all the same.
    Skips(Done, Stats, LaneTurn),
    /// It waits for the lane.
    Waits(Waiting, LaneTurn),
}

/// A segment that was read, and goes into the lane.
struct Waiting {
    gathered: Gathered,
    place: Place,
    compression: Compression,
    /// Bytes that the memory leaves to the lane.
    left: usize,
}

impl Waiting {
    fn compress(
        self,
        worker: &mut Worker,
        mut lane: Option<LaneEncoder>,
        next: oneshot::Sender<Option<LaneEncoder>>,
    ) -> (Done, Stats) {
        let Waiting { gathered, place, compression, left } = self;
        let mut payload = Vec::new();
        let began = Instant::now();
        // What the memory needs it gets: a page that is a reference saves more than a window does.
        lane = lane.filter(|lane| lane.bytes() <= left);
        let encoded = gathered.write(&mut worker.encoder, &mut lane, &mut payload);
        let _ = next.send(lane);
        (finish(place, encoded, compression, payload, began), encoded.stats)
    }
}

fn encode_now(
    worker: &mut Worker,
    segment: &Segment,
    compression: Option<Compression>,
    turn: Option<Reader>,
    lane: Option<LaneTurn>,
) -> Result<Step, EncodeError> {
    let place = Place::of(segment);
    let Some(compression) = compression else {
        let (head, stats) = verbatim(segment);
        let payload = Payload::new(head.into(), segment.bytes.clone());
        let raw_len = payload.len() as u32;
        let chunk = place.chunk(Codec::Raw, raw_len, payload);
        let codec = Compression::DATACENTER.name();
        return Ok(Step::Done(Done { chunk, codec, compressing: None, at: Instant::now() }, stats));
    };
    let mut payload = Vec::new();
    let (mut memory, next, limit, mapped) = match turn {
        Some(Reader { memory, next, limit, mapped }) => (Some(memory), Some(next), limit, mapped),
        None => (None, None, 0, false),
    };
    let opaque;
    let reading = match worker.encoder.read(segment, memory.as_mut()) {
        Ok(reading) => reading,
        Err(error) if mapped => return Err(error),
        Err(error) => {
            // An index that does not fit its bytes is an error of ours; the bytes are right all the same.
            tracing::error!(%error, "segment sent as opaque bytes; please report this");
            opaque = Segment::opaque(segment.offset, segment.bytes.clone(), segment.version);
            worker.encoder.read(&opaque, None)?
        }
    };
    let taken = memory.as_ref().map_or(0, Memory::bytes);
    if let (Some(memory), Some(next)) = (memory, next) {
        // Whoever is next may be gone with the leg.
        let _ = next.send(memory);
    }
    let began = Instant::now();
    let Some(mut lane) = lane else {
        let encoded = reading.write(compression, &mut payload);
        return Ok(Step::Done(finish(place, encoded, compression, payload, began), encoded.stats));
    };
    // What follows goes on at once if the segment before is done with the lane, and is left to another job if it is not.
    match (reading.write_or_gather(compression, &mut payload), lane.lane.try_recv()) {
        (Written::Done(encoded), free) => {
            let done = finish(place, encoded, compression, payload, began);
            match free {
                Ok(free) => {
                    let _ = lane.next.send(free);
                    Ok(Step::Done(done, encoded.stats))
                }
                Err(_) => Ok(Step::Skips(done, encoded.stats, lane)),
            }
        }
        (Written::Gathered(gathered), free) => {
            let waiting = Waiting { gathered, place, compression, left: limit.saturating_sub(taken) };
            match free {
                Ok(free) => {
                    let (done, stats) = waiting.compress(worker, free, lane.next);
                    Ok(Step::Done(done, stats))
                }
                Err(_) => Ok(Step::Waits(waiting, lane)),
            }
        }
    }
}

fn finish(
    place: Place,
    encoded: Encoded,
    compression: Compression,
    payload: Vec<u8>,
    began: Instant,
) -> Done {
    let tried = encoded.codec != Codec::Raw || encoded.fallback == Some(Fallback::NoGain);
    let compressing = tried.then(|| (u64::from(encoded.raw_len), began.elapsed()));
    let codec = match (encoded.fallback, encoded.codec) {
        (Some(fallback), _) => fallback.name(),
        (None, Codec::Lane) => compression.lane_name(),
        (None, _) => compression.name(),
    };
    let chunk = place.chunk(encoded.codec, encoded.raw_len, payload);
    Done { chunk, codec, compressing, at: Instant::now() }
}

/// What a chunk says of its segment.
#[derive(Clone, Copy)]
struct Place {
    version: PageVersion,
    offset: StreamOffset,
    stream_len: u32,
}

impl Place {
    fn of(segment: &Segment) -> Self {
        let Segment { version, offset, .. } = *segment;
        Place { version, offset, stream_len: segment.bytes.len() as u32 }
    }

    fn chunk(self, codec: Codec, raw_len: u32, payload: impl Into<Payload>) -> EncodedChunk {
        EncodedChunk::new(codec, Lane(0), self.version, self.offset, self.stream_len, raw_len, payload)
    }
}

#[cfg(test)]
mod tests {
    use dwcp_hde::{Decoder, Encoder, Holding, LaneDecoder, LaneWindow, Layers};
    use dwcp_proto::limits::MIN_LANE_WINDOW;
    use dwcp_proto::{NodeKey, NodeName, Sealer, SessionId, VerifiedChunk, Verifier};

    use super::*;

    const LEN: usize = 50_000;
    const LEVEL: Compression = Compression::Zstd(3);

    fn worker() -> Worker {
        Worker { encoder: Encoder::new(), decoder: Decoder::new() }
    }

    fn window() -> LaneWindow {
        LaneWindow::new(MIN_LANE_WINDOW).unwrap()
    }

    fn segment(n: u64) -> Segment {
        let words = ["precopy", "dirty", "round", "switchover", "downtime"];
        let bytes: Vec<u8> = (0..).flat_map(|i| words[(i * i / 7 + i) % 5].bytes()).take(LEN).collect();
        Segment::opaque(StreamOffset(n * LEN as u64), bytes.into(), PageVersion(0))
    }

    /// A leg whose lane is not there yet, and what gives it.
    fn leg() -> (Baton, oneshot::Sender<Option<LaneEncoder>>) {
        let memory = Memory::new(Layers::ALL, Holding::Blocks(Vec::new()), &[7; 32], 1 << 20);
        let (give, lane) = oneshot::channel();
        (Baton { memory: ready(memory), lane, mapped: true }, give)
    }

    fn step(baton: &mut Baton, n: u64, compression: Compression, limit: usize) -> Step {
        let Turn { mut memory, next, lane, mapped } = baton.pass();
        let reader = Reader { memory: memory.try_recv().unwrap(), next, limit, mapped };
        encode_now(&mut worker(), &segment(n), Some(compression), Some(reader), Some(lane)).unwrap()
    }

    fn goes_on(step: Step) -> Done {
        match step {
            Step::Done(done, _) => done,
            Step::Skips(done, _, mut lane) => {
                let _ = lane.next.send(lane.lane.try_recv().unwrap());
                done
            }
            Step::Waits(waiting, mut lane) => {
                waiting.compress(&mut worker(), lane.lane.try_recv().unwrap(), lane.next).0
            }
        }
    }

    fn verified(done: Vec<Done>) -> Vec<VerifiedChunk> {
        let key = NodeKey::from_seed(NodeName::new("a").unwrap(), &[1; 32]);
        let id = SessionId([9; 32]);
        let (mut sealer, verifier) = (Sealer::new(id), Verifier::new(id, key.public()));
        let mut verify = |done: Done| {
            let sealed = sealer.seal(&key, done.chunk);
            verifier.header(sealed.signed_header()).unwrap().payload(sealed.payload()).unwrap()
        };
        done.into_iter().map(&mut verify).collect()
    }

    #[test]
    fn the_lane_goes_through_the_segments_in_order_whoever_waits_for_it() {
        let (mut baton, give) = leg();
        let limit = 64 << 20;
        let first = step(&mut baton, 0, LEVEL, limit);
        let second = step(&mut baton, 1, LEVEL, limit);
        let beside = step(&mut baton, 2, Compression::Zstd(-1), limit);
        assert!(matches!((&first, &second, &beside), (Step::Waits(..), Step::Waits(..), Step::Skips(..))));
        give.send(Some(LaneEncoder::new(window()))).unwrap_or_else(|_| panic!("it is waited for"));
        let mut done: Vec<Done> = [first, second, beside].into_iter().map(goes_on).collect();
        let third = step(&mut baton, 3, LEVEL, limit);
        assert!(matches!(third, Step::Done(..)), "the lane is free");
        done.push(goes_on(third));
        assert_eq!(
            done.iter().map(|d| d.codec).collect::<Vec<_>>(),
            ["lane-3", "lane-3", "zstd-fast", "lane-3"]
        );

        let chunks = verified(done);
        let (mut lane, mut decoder) = (LaneDecoder::new(window()), Decoder::new());
        for chunk in &chunks {
            let mut out = Vec::new();
            match chunk.header().codec {
                Codec::Lane => drop(lane.open(chunk).unwrap().replay(&mut out)),
                _ => decoder.decode(chunk, &mut out).unwrap(),
            }
            assert_eq!(out, segment(0).bytes);
        }
        assert!(chunks[1].payload().len() < chunks[0].payload().len() / 4, "it continues the first");
    }

    #[test]
    fn a_lane_whose_memory_is_needed_is_given_up() {
        let (mut baton, give) = leg();
        give.send(Some(LaneEncoder::new(window()))).unwrap_or_else(|_| panic!("it is waited for"));
        let (most, least) = (64 << 20, 1 << 20);
        let codecs = [most, least, most].into_iter().zip(0..);
        let codecs: Vec<_> =
            codecs.map(|(limit, n)| goes_on(step(&mut baton, n, LEVEL, limit)).codec).collect();
        assert_eq!(codecs, ["lane-3", "zstd-3", "zstd-3"]);
    }
}
