//! Lanes: chunks that continue one zstd frame, so that a match may lie in the chunks before.
//!
//! Memory pages are like their neighbours in the address space, of which a chunk holds few. A lane's window reaches over several
//! chunks; for that its chunks are compressed by one [`LaneEncoder`] and decompressed by one [`LaneDecoder`], in the same order.
//! [`format`](crate::format) says what such a payload looks like.
//!
//! ```text
//! position    0        1        2                0        1
//!         ┌────────┬────────┬────────┐       ┌────────┬────────┐
//!         │ header │ blocks │ blocks │       │ header │ blocks │   a frame begins anew where the level changes
//!         │ blocks │        │        │       │ blocks │        │
//!         └────────┴────────┴────────┘       └────────┴────────┘
//! ```

use dwcp_proto::limits::{MAX_LANE_WINDOW, MAX_RAW_PAYLOAD, MAX_WIRE_PAYLOAD, MIN_LANE_WINDOW};
use dwcp_proto::{Codec, VerifiedChunk};
use zstd_safe::zstd_sys::ZSTD_EndDirective::ZSTD_e_flush;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::codec::scratch;
use crate::content::{Content, Table};
use crate::decode::{DecodeError, check_lengths};
use crate::zstd_frame;

/// Bytes of a payload before the frame's: the chunk's position.
const POSITION: usize = 4;
/// The longest content that a lane takes: if it cannot be compressed it still fits. (zstd spends 3 bytes on each block of 128 KiB, and a
/// header of some 20 on a frame.)
pub(crate) const MAX_LANE_RAW: usize = MAX_RAW_PAYLOAD - (4 << 10);
/// What a decoder takes beside its window: a block and the frame's tables.
const DECODER: usize = 512 << 10;

/// Bytes of a lane's window: a power of two within `MIN_LANE_WINDOW` and `MAX_LANE_WINDOW`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneWindow(u32);

impl LaneWindow {
    /// The window of so many bytes; `None` where there is no such window.
    pub fn new(bytes: u64) -> Option<Self> {
        let right = bytes.is_power_of_two() && (MIN_LANE_WINDOW..=MAX_LANE_WINDOW).contains(&bytes);
        right.then(|| LaneWindow(bytes.trailing_zeros()))
    }

    /// Its bytes.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Bytes that whoever decodes such a lane takes.
    pub fn decoder_bytes(self) -> usize {
        (1 << self.0) + DECODER
    }
}

/// The sending end of a lane.
pub struct LaneEncoder {
    zstd: CCtx<'static>,
    window: LaneWindow,
    /// The level of the frame under way, and the position of the chunk that comes next in it.
    frame: Option<(i32, u32)>,
    /// Grows to the bound of the largest payload and stays.
    out: Vec<u8>,
}

impl LaneEncoder {
    /// A lane that nothing went through. It takes memory with the first chunk.
    pub fn new(window: LaneWindow) -> Self {
        LaneEncoder { zstd: CCtx::create(), window, frame: None, out: Vec::new() }
    }

    /// Bytes taken, or that the first chunk will take at least.
    pub fn bytes(&self) -> usize {
        self.zstd.sizeof().max(self.window.decoder_bytes()) + self.out.capacity()
    }

    /// Puts the payload for `raw` into `payload`, whose content is replaced. It has to be sent, before any later one. `None` if the library
    /// fails; what was sent so far is whole, and a new lane can follow.
    pub(crate) fn compress(&mut self, raw: &[u8], level: i32, payload: &mut Vec<u8>) -> Option<()> {
        let position = match self.frame {
            Some((at, position)) if at == level => position,
            _ => {
                self.begin(level)?;
                0
            }
        };
        // Whatever fails below, the frame cannot go on.
        self.frame = None;
        let mut input = InBuffer::around(raw);
        let (mut len, mut left) = (0, zstd_safe::compress_bound(raw.len()));
        while left > 0 {
            let out = scratch(&mut self.out, len + left);
            let mut output = OutBuffer::around_pos(out, len);
            left = self.zstd.compress_stream2(&mut output, &mut input, ZSTD_e_flush).ok()?;
            len = output.pos();
        }
        if POSITION + len > MAX_WIRE_PAYLOAD {
            return None;
        }
        payload.clear();
        payload.extend_from_slice(&position.to_be_bytes());
        payload.extend_from_slice(&self.out[..len]);
        // After so many chunks another frame begins.
        self.frame = position.checked_add(1).map(|next| (level, next));
        Some(())
    }

    fn begin(&mut self, level: i32) -> Option<()> {
        self.zstd.reset(ResetDirective::SessionOnly).ok()?;
        self.zstd.set_parameter(CParameter::CompressionLevel(level)).ok()?;
        self.zstd.set_parameter(CParameter::WindowLog(self.window.0)).ok()?;
        Some(())
    }
}

/// Why a lane's payload is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// No lanes were agreed on.
    #[error("no lanes were agreed on")]
    None,
    /// There is no such lane.
    #[error("there is no lane {0}")]
    Lane(u16),
    /// It is not the lane's next chunk.
    #[error("the chunk is number {position} of its frame, where {expected} comes next")]
    Position {
        /// What it says.
        position: u32,
        /// What it should be; any chunk may begin a frame, too.
        expected: u32,
    },
    /// The payload is cut off before its frame begins.
    #[error("the payload is too short")]
    Short,
}

/// The receiving end of a lane. After a refusal nothing more can be decoded: the session ends.
pub struct LaneDecoder {
    zstd: DCtx<'static>,
    window: LaneWindow,
    /// The position of the chunk that comes next in the frame; 0 if none is under way.
    next: u32,
    raw: Vec<u8>,
    table: Table,
}

impl LaneDecoder {
    /// A lane that nothing came through. It takes memory with the first chunk: [`LaneWindow::decoder_bytes`], and the chunk's own.
    pub fn new(window: LaneWindow) -> Self {
        let mut zstd = DCtx::create();
        // A library that does not know its own parameter grants its usual limit; the frame's header is held against ours.
        let _ = zstd.set_parameter(DParameter::WindowLogMax(window.0));
        LaneDecoder { zstd, window, next: 0, raw: Vec::new(), table: Table::default() }
    }

    /// Opens the lane's next chunk: decompresses its payload, and checks all of it.
    pub fn open(&mut self, chunk: &VerifiedChunk) -> Result<Content<'_>, DecodeError> {
        let header = chunk.header();
        if header.lane.0 != 0 {
            return Err(LaneError::Lane(header.lane.0).into());
        }
        self.open_parts(chunk.payload(), header.raw_len as usize, header.stream_len as usize)
    }

    /// As [`open`](Self::open) for a payload that nobody signed.
    #[cfg(any(test, feature = "testing"))]
    pub fn open_unverified(
        &mut self,
        payload: &[u8],
        raw_len: usize,
        stream_len: usize,
    ) -> Result<Content<'_>, DecodeError> {
        self.open_parts(payload, raw_len, stream_len)
    }

    fn open_parts(
        &mut self,
        payload: &[u8],
        raw_len: usize,
        stream_len: usize,
    ) -> Result<Content<'_>, DecodeError> {
        check_lengths(payload.len(), raw_len, stream_len)?;
        let expected = std::mem::take(&mut self.next);
        let (position, blocks) = payload.split_first_chunk::<POSITION>().ok_or(LaneError::Short)?;
        let position = u32::from_be_bytes(*position);
        let corrupt = DecodeError::Corrupt { codec: Codec::Lane, raw_len };
        if position == 0 {
            zstd_frame::check_endless(blocks, self.window.bytes())?;
            self.zstd.reset(ResetDirective::SessionOnly).map_err(|_| corrupt)?;
        } else if position != expected {
            return Err(LaneError::Position { position, expected }.into());
        }
        self.decompress(blocks, raw_len).ok_or(corrupt)?;
        self.next = position.wrapping_add(1);
        let raw = &self.raw[..raw_len];
        let parts = Content::parse(raw, stream_len, true, &mut self.table)?;
        Ok(Content::of(raw, &parts, &self.table, stream_len))
    }

    /// Decompresses `blocks` to the first `raw_len` bytes of `self.raw`; `None` if they do not give exactly that.
    fn decompress(&mut self, blocks: &[u8], raw_len: usize) -> Option<()> {
        // One more byte than there should be: what would come after the end shows there.
        let mut output = OutBuffer::around(scratch(&mut self.raw, raw_len + 1));
        let mut input = InBuffer::around(blocks);
        loop {
            let before = (input.pos(), output.pos());
            // 0: the frame has ended, which a lane's does not.
            if self.zstd.decompress_stream(&mut output, &mut input).ok()? == 0 {
                return None;
            }
            if before == (input.pos(), output.pos()) {
                break;
            }
        }
        (input.pos() == blocks.len() && output.pos() == raw_len).then_some(())
    }
}
