//! A segment of the VMM's stream to a chunk's payload.

use std::ops::AddAssign;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Codec, Record, Segment, StreamOffset};

use crate::codec::Compressor;
use crate::fingerprint::{LINE, PROOF};
use crate::format::{Header, OP_OPAQUE, write_varint};
use crate::lane::{LaneEncoder, MAX_LANE_RAW};
use crate::layout::Layout;
use crate::memory::Memory;
use crate::sample;

/// Compression that saves less than one part in this many is not worth the receiver's time.
const MIN_SAVING: usize = 32;

/// The lowest level of a lane. Where less is chosen the link waits for the CPU, and a lane is compressed by one thread.
pub const LANE_LEVEL: i32 = 1;

/// Which codec a chunk is to get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// None: as fast as memory can be copied.
    Raw,
    /// LZ4.
    Lz4,
    /// zstd at this level; negative ones are faster.
    Zstd(i32),
    /// zstd at this level, but raw without trying where a sample of the chunk looks incompressible.
    Sampled(i32),
}

impl Choice {
    /// For internet mode, until an [`Effort`](crate::Effort) has learned what link and CPU can do.
    ///
    /// Share saved, and GB/s of guest memory encoded and decoded by one thread, in chunks of 512 KiB:
    ///
    /// | | programs, libraries | compiler's heap | interpreter's heap |
    /// |---|---|---|---|
    /// | lz4 | 48 %, 0.39, 1.7 | 70 %, 0.57, 1.7 | 76 %, 0.71, 2.3 |
    /// | zstd -1 | 55 %, 0.44, 1.3 | 78 %, 0.44, 1.1 | 86 %, 0.70, 1.7 |
    /// | zstd 1 | 59 %, 0.31, 0.9 | 80 %, 0.42, 1.0 | 88 %, 0.66, 1.6 |
    /// | zstd 3 | 63 %, 0.19, 0.9 | 81 %, 0.27, 1.0 | 88 %, 0.39, 1.3 |
    ///
    /// Level 1 is the knee: one worker fills some 80 to 125 MB/s of link, level 3 takes two thirds more time
    /// for at most 3 points, and lz4 is hardly faster and loses 10. The sample makes incompressible chunks
    /// three times as fast (6.9 against 2.4 GB/s) and was wrong about none of these. Chunks of 256 KiB save
    /// 0.3 points less, of 1 MiB 0.2 more. (`cargo run --release -p dwcp-benches --example codecs -- FILE...`
    /// makes such figures.)
    pub const INTERNET: Choice = Choice::Sampled(1);

    /// For datacenter mode: links there outrun every codec.
    pub const DATACENTER: Choice = Choice::Raw;

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Choice::Raw => "raw",
            Choice::Lz4 => "lz4",
            Choice::Zstd(level) | Choice::Sampled(level) => match level {
                ..1 => "zstd-fast",
                1 => "zstd-1",
                2..=3 => "zstd-3",
                4..=5 => "zstd-5",
                6..=7 => "zstd-7",
                8.. => "zstd-9",
            },
        }
    }

    /// All of these names.
    pub const NAMES: [&'static str; 8] =
        ["raw", "lz4", "zstd-fast", "zstd-1", "zstd-3", "zstd-5", "zstd-7", "zstd-9"];

    /// Its name in metrics for a chunk that goes into a lane.
    pub fn lane_name(self) -> &'static str {
        match self.name() {
            "zstd-1" => "lane-1",
            "zstd-3" => "lane-3",
            "zstd-5" => "lane-5",
            "zstd-7" => "lane-7",
            _ => "lane-9",
        }
    }

    /// All of these names.
    pub const LANE_NAMES: [&'static str; 5] = ["lane-1", "lane-3", "lane-5", "lane-7", "lane-9"];
}

/// What became of a segment, beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoded {
    /// How the payload is compressed.
    pub codec: Codec,
    /// Bytes of the payload before compression.
    pub raw_len: u32,
    /// Why the payload is raw although compression was wanted.
    pub fallback: Option<Fallback>,
    /// What was in it.
    pub stats: Stats,
}

/// Why a chunk that was to be compressed is sent raw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fallback {
    /// A sample looked incompressible.
    Incompressible,
    /// It was tried and saved too little.
    NoGain,
}

impl Fallback {
    /// All of them.
    pub const ALL: [Fallback; 2] = [Fallback::Incompressible, Fallback::NoGain];

    /// Its name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Fallback::Incompressible => "incompressible",
            Fallback::NoGain => "no_gain",
        }
    }
}

/// What the layers saw and did; sums up over chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Full-page records that went through the codec.
    pub pages: u64,
    /// Full-page records of pages that were all zero: only their place is sent.
    pub blank_pages: u64,
    /// Full-page records of pages that had not changed.
    pub unchanged_pages: u64,
    /// Full-page records of pages with the content of another.
    pub copied_pages: u64,
    /// Full-page records of pages that were sent as changed lines.
    pub delta_pages: u64,
    /// The lines that these changed, of 128 bytes.
    pub delta_lines: u64,
    /// Of `pages`, `copied_pages` and `delta_pages`: those that could not be remembered for want of memory.
    pub untracked_pages: u64,
    /// Zero-page records.
    pub zero_pages: u64,
    /// Bytes that are not guest pages.
    pub opaque_bytes: u64,
    /// Bytes of the VMM's stream.
    pub stream_bytes: u64,
    /// Bytes of the payload as it is sent.
    pub payload_bytes: u64,
    /// Bytes that went through a codec.
    pub compressed_from: u64,
    /// What became of these.
    pub compressed_to: u64,
    /// Bytes that went through none.
    pub raw_bytes: u64,
}

/// What a layer made of its share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBytes {
    /// Its name in status and metrics.
    pub layer: &'static str,
    /// Pages; 0 for the two that take a chunk as a whole.
    pub pages: u64,
    /// Bytes before it: guest memory, or for the last two the bytes that the others leave.
    pub before: u64,
    /// Bytes that it leaves.
    pub after: u64,
}

impl Stats {
    /// Layer by layer. The first five divide the guest's pages among them; what they leave, together with the table and what is no
    /// page, is divided between `compressed` and `raw`.
    pub fn layers(&self) -> [LayerBytes; 7] {
        let proofs = |pages: u64| pages * PROOF as u64;
        let of =
            |layer, pages: u64, after| LayerBytes { layer, pages, before: pages * PAGE_SIZE as u64, after };
        let masks = self.delta_pages * size_of::<u32>() as u64;
        let lines = self.delta_lines * LINE as u64;
        [
            of("zero", self.zero_pages + self.blank_pages, 0),
            of("unchanged", self.unchanged_pages, proofs(self.unchanged_pages)),
            of("dedup", self.copied_pages, proofs(self.copied_pages)),
            of("delta", self.delta_pages, proofs(self.delta_pages) + masks + lines),
            of("whole", self.pages, self.pages * PAGE_SIZE as u64),
            LayerBytes {
                layer: "compressed",
                pages: 0,
                before: self.compressed_from,
                after: self.compressed_to,
            },
            LayerBytes { layer: "raw", pages: 0, before: self.raw_bytes, after: self.raw_bytes },
        ]
    }
}

impl AddAssign for Stats {
    fn add_assign(&mut self, other: Stats) {
        self.pages += other.pages;
        self.blank_pages += other.blank_pages;
        self.unchanged_pages += other.unchanged_pages;
        self.copied_pages += other.copied_pages;
        self.delta_pages += other.delta_pages;
        self.delta_lines += other.delta_lines;
        self.untracked_pages += other.untracked_pages;
        self.zero_pages += other.zero_pages;
        self.opaque_bytes += other.opaque_bytes;
        self.stream_bytes += other.stream_bytes;
        self.payload_bytes += other.payload_bytes;
        self.compressed_from += other.compressed_from;
        self.compressed_to += other.compressed_to;
        self.raw_bytes += other.raw_bytes;
    }
}

/// Why a segment cannot be encoded: its source cut it wrongly, which is an error of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More than a chunk may hold.
    #[error("the segment at stream offset {offset} has more {what} than a chunk may hold")]
    TooLarge {
        /// Where the segment begins.
        offset: StreamOffset,
        /// What there is too much of.
        what: &'static str,
    },
    /// The index does not give the segment's bytes.
    #[error("record {record} of the segment at stream offset {offset} is not what its bytes say")]
    Mismatch {
        /// Where the segment begins.
        offset: StreamOffset,
        /// The record's place in the index, or its length if bytes are left over.
        record: usize,
    },
    /// A page comes twice, or after a later page of its block.
    #[error("record {record} of the segment at stream offset {offset} goes back within its RAM block")]
    Order {
        /// Where the segment begins.
        offset: StreamOffset,
        /// The record's place in the index.
        record: usize,
    },
}

/// What comes before a segment's bytes in a payload that holds them as they are, as one opaque record: nothing of them is copied
/// or read, and nothing is at the receiver ([`Decoder::stream`](crate::Decoder::stream)). The segment's index goes into the stats only.
pub fn verbatim(segment: &Segment) -> (Vec<u8>, Stats) {
    let len = segment.bytes.len();
    let mut table = vec![OP_OPAQUE];
    write_varint(len as u64, &mut table);
    let header = Header { table_len: table.len() as u32, opaque_len: len as u32, ..Header::default() };
    let mut head = Vec::with_capacity(Header::MAX_LEN + table.len());
    header.write(&mut head);
    head.extend_from_slice(&table);

    let payload_bytes = (head.len() + len) as u64;
    let mut stats =
        Stats { stream_bytes: len as u64, payload_bytes, raw_bytes: payload_bytes, ..Stats::default() };
    for record in &segment.records {
        match record {
            Record::Pages(run) => stats.pages += u64::from(run.count),
            Record::Zeros(run) => stats.zero_pages += u64::from(run.count),
            Record::Opaque { len } => stats.opaque_bytes += u64::from(*len),
        }
    }
    (head, stats)
}

/// Encodes segments, one after the other; each worker has its own.
pub struct Encoder {
    layout: Layout,
    compressor: Compressor,
    raw: Vec<u8>,
}

impl Encoder {
    /// An encoder without memory yet.
    pub fn new() -> Self {
        Encoder { layout: Layout::default(), compressor: Compressor::new(), raw: Vec::new() }
    }

    /// Encodes `segment` into `payload`, whose content is replaced. A payload is never longer than it would
    /// be raw.
    ///
    /// Every record is held against the segment's bytes on the way, so what is encoded decodes to exactly
    /// these bytes; on an error the bytes can still be sent as [`Segment::opaque`].
    pub fn encode(
        &mut self,
        segment: &Segment,
        choice: Choice,
        payload: &mut Vec<u8>,
    ) -> Result<Encoded, EncodeError> {
        Ok(self.read(segment, None)?.write(choice, payload))
    }

    /// The first half of [`encode`](Self::encode), in which pages may become references to what the receiver holds.
    /// A `memory` has to see all segments, in the order in which they are sent: it is the half that cannot be done
    /// side by side, and the lesser one. After an error the memory has forgotten everything.
    pub fn read<'a>(
        &'a mut self,
        segment: &'a Segment,
        memory: Option<&mut Memory>,
    ) -> Result<Reading<'a>, EncodeError> {
        match memory {
            None => self.layout.read(segment, None)?,
            Some(memory) => self.layout.read(segment, Some(memory)).inspect_err(|_| memory.forget())?,
        }
        Ok(Reading { encoder: self, segment })
    }
}

/// A segment that was read and is to be written: see [`Encoder::read`].
pub struct Reading<'a> {
    encoder: &'a mut Encoder,
    segment: &'a Segment,
}

impl Reading<'_> {
    /// The second half of [`Encoder::encode`].
    pub fn write(self, choice: Choice, payload: &mut Vec<u8>) -> Encoded {
        let Reading { encoder: Encoder { layout, compressor, raw }, segment } = self;
        payload.clear();
        let fallback = match choice {
            Choice::Raw => None,
            Choice::Sampled(_) if sample::incompressible(layout.content(&segment.bytes)) => {
                Some(Fallback::Incompressible)
            }
            Choice::Lz4 | Choice::Zstd(_) | Choice::Sampled(_) => {
                raw.clear();
                layout.gather(&segment.bytes, raw);
                return compress(compressor, raw, choice, layout.stats(), payload);
            }
        };
        layout.gather(&segment.bytes, payload);
        encoded(Codec::Raw, payload.len(), fallback, layout.stats(), payload)
    }

    /// The same where there is a lane, which takes all that is compressed at level [`LANE_LEVEL`] and above.
    pub fn write_or_gather(self, choice: Choice, payload: &mut Vec<u8>) -> Written {
        let (Choice::Zstd(level) | Choice::Sampled(level)) = choice else {
            return Written::Done(self.write(choice, payload));
        };
        let Reading { encoder: Encoder { layout, .. }, segment } = &self;
        let sampled = matches!(choice, Choice::Sampled(_));
        let dense = sampled && sample::incompressible(layout.content(&segment.bytes));
        if level < LANE_LEVEL || dense || layout.gathered_len() > MAX_LANE_RAW {
            return Written::Done(self.write(choice, payload));
        }
        let Reading { encoder: Encoder { layout, raw, .. }, segment } = self;
        let mut raw = std::mem::take(raw);
        raw.clear();
        layout.gather(&segment.bytes, &mut raw);
        Written::Gathered(Gathered { raw, level, stats: layout.stats() })
    }
}

/// What [`Reading::write_or_gather`] made of a segment.
pub enum Written {
    /// The payload is there.
    Done(Encoded),
    /// It is to go into the lane, when its turn comes.
    Gathered(Gathered),
}

/// A payload before compression.
pub struct Gathered {
    raw: Vec<u8>,
    level: i32,
    stats: Stats,
}

impl Gathered {
    /// Compresses it as the lane's next chunk, or alone where the lane is gone. `encoder` is any: it gets the buffer.
    pub fn write(
        self,
        encoder: &mut Encoder,
        lane: &mut Option<LaneEncoder>,
        payload: &mut Vec<u8>,
    ) -> Encoded {
        let Gathered { raw, level, stats } = self;
        let done = match lane.as_mut().map(|lane| lane.compress(&raw, level, payload)) {
            Some(Some(())) => encoded(Codec::Lane, raw.len(), None, stats, payload),
            failed => {
                if failed.is_some() {
                    *lane = None;
                }
                encoder.raw = raw;
                return compress(
                    &mut encoder.compressor,
                    &mut encoder.raw,
                    Choice::Zstd(level),
                    stats,
                    payload,
                );
            }
        };
        encoder.raw = raw;
        done
    }

    /// Bytes before compression.
    pub fn raw_len(&self) -> usize {
        self.raw.len()
    }
}

/// Compresses `raw` alone; where that gains nothing the two are exchanged.
fn compress(
    compressor: &mut Compressor,
    raw: &mut Vec<u8>,
    choice: Choice,
    stats: Stats,
    payload: &mut Vec<u8>,
) -> Encoded {
    payload.clear();
    let raw_len = raw.len();
    let (codec, compressed) = match choice {
        Choice::Zstd(level) | Choice::Sampled(level) => (Codec::Zstd, compressor.zstd(raw, level)),
        Choice::Raw | Choice::Lz4 => (Codec::Lz4, compressor.lz4(raw)),
    };
    match compressed {
        Some(compressed) if compressed.len() < raw_len - raw_len / MIN_SAVING => {
            payload.extend_from_slice(compressed);
            encoded(codec, raw_len, None, stats, payload)
        }
        _ => {
            std::mem::swap(payload, raw);
            encoded(Codec::Raw, raw_len, Some(Fallback::NoGain), stats, payload)
        }
    }
}

fn encoded(
    codec: Codec,
    raw_len: usize,
    fallback: Option<Fallback>,
    stats: Stats,
    payload: &[u8],
) -> Encoded {
    let payload_bytes = payload.len() as u64;
    let (compressed_from, compressed_to, raw_bytes) = match codec {
        Codec::Raw => (0, 0, payload_bytes),
        Codec::Lz4 | Codec::Zstd | Codec::Lane => (raw_len as u64, payload_bytes, 0),
    };
    let stats = Stats { payload_bytes, compressed_from, compressed_to, raw_bytes, ..stats };
    Encoded { codec, raw_len: raw_len as u32, fallback, stats }
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}
