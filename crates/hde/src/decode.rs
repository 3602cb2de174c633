//! A chunk's payload back to records.

use bytes::Bytes;
use dwcp_proto::limits::{MAX_RAW_PAYLOAD, MAX_SEGMENT_BYTES, MAX_WIRE_PAYLOAD};
use dwcp_proto::{Codec, VerifiedChunk};

use crate::codec::{Decompressor, Refusal};
use crate::content::{Content, Parts, Table};
use crate::format::TableError;
use crate::lane::LaneError;
use crate::zstd_frame::FrameError;

/// Why a payload was refused. Its signature was right, so its sender is at fault: the session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A length is over its limit, or cannot belong to this payload.
    #[error("the payload's {what} of {len} bytes is out of bounds")]
    Length {
        /// Which length.
        what: &'static str,
        /// How much it says.
        len: usize,
    },
    /// The zstd frame asks for something that is not granted.
    #[error("zstd frame refused")]
    Frame(#[from] FrameError),
    /// The payload does not decompress to the announced length.
    #[error("the {} payload does not decompress to the announced {raw_len} bytes", codec.name())]
    Corrupt {
        /// The payload's codec.
        codec: Codec,
        /// The announced length.
        raw_len: usize,
    },
    /// The payload is not what comes next in its lane.
    #[error("lane refused")]
    Lane(#[from] LaneError),
    /// The payload's header or table of records is wrong.
    #[error("table of records refused")]
    Table(#[from] TableError),
}

impl DecodeError {
    /// The kind of attack that it would be, for the metric.
    pub fn kind(&self) -> &'static str {
        match self {
            DecodeError::Length { .. } | DecodeError::Frame(_) | DecodeError::Corrupt { .. } => "zip_bomb",
            DecodeError::Table(TableError::TooMany) => "zip_bomb",
            DecodeError::Table(TableError::PageIndex | TableError::Block(_)) => "oob_page",
            DecodeError::Table(_) | DecodeError::Lane(_) => "protocol",
        }
    }
}

/// A chunk that is ready to be applied, in memory of its own.
#[derive(Debug)]
pub struct Unpacked {
    raw: Bytes,
    parts: Parts,
    table: Table,
    stream_len: usize,
}

impl Unpacked {
    /// What is in it.
    pub fn content(&self) -> Content<'_> {
        Content::of(&self.raw, &self.parts, &self.table, self.stream_len)
    }
}

/// Decodes chunks, one after the other and in any order; each worker has its own.
pub struct Decoder {
    decompressor: Decompressor,
    table: Table,
}

impl Decoder {
    /// A decoder without memory yet.
    pub fn new() -> Self {
        Decoder { decompressor: Decompressor::new(), table: Table::default() }
    }

    /// Opens a chunk of data without references: decompresses its payload if need be and checks all of it. The
    /// content lends from the chunk (raw) or from the decoder's buffer, so no page is copied here. An end of
    /// stream has no content: it is refused.
    pub fn open<'a>(&'a mut self, chunk: &'a VerifiedChunk) -> Result<Content<'a>, DecodeError> {
        let header = chunk.header();
        self.open_parts(header.codec, chunk.payload(), header.raw_len as usize, header.stream_len as usize)
    }

    /// The stretch of the VMM's stream of a chunk without references: a part of the chunk itself where it holds the stream as it is
    /// (see [`verbatim`](crate::verbatim)), else a buffer of its own.
    pub fn stream(&mut self, chunk: &VerifiedChunk) -> Result<Bytes, DecodeError> {
        let content = self.open(chunk)?;
        let payload = chunk.payload();
        if chunk.header().codec == Codec::Raw && content.is_opaque() {
            // Nothing comes behind the opaque content then.
            return Ok(payload.slice(payload.len().saturating_sub(content.stream_len())..));
        }
        let mut out = Vec::new();
        write(content, &mut out);
        Ok(out.into())
    }

    /// Appends the stretch of the VMM's stream of a chunk without references to `out`, exactly as many bytes as its
    /// header announces; nothing if it is refused.
    pub fn decode(&mut self, chunk: &VerifiedChunk, out: &mut Vec<u8>) -> Result<(), DecodeError> {
        write(self.open(chunk)?, out);
        Ok(())
    }

    /// Decompresses a chunk of data and checks all of it, references included, so that it can be applied when its
    /// turn comes. It takes memory of its own: at most `MAX_RAW_PAYLOAD`, unless the chunk is raw.
    pub fn unpack(&mut self, chunk: &VerifiedChunk) -> Result<Unpacked, DecodeError> {
        let header = chunk.header();
        let (raw_len, stream_len) = (header.raw_len as usize, header.stream_len as usize);
        self.unpack_parts(header.codec, chunk.payload().clone(), raw_len, stream_len)
    }

    /// As [`decode`](Self::decode) for a payload that nobody signed, with the lengths that a header would announce.
    #[cfg(any(test, feature = "testing"))]
    pub fn decode_unverified(
        &mut self,
        codec: Codec,
        payload: &[u8],
        raw_len: usize,
        stream_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        write(self.open_parts(codec, payload, raw_len, stream_len)?, out);
        Ok(())
    }

    /// As [`unpack`](Self::unpack) for a payload that nobody signed.
    #[cfg(any(test, feature = "testing"))]
    pub fn unpack_unverified(
        &mut self,
        codec: Codec,
        payload: &[u8],
        raw_len: usize,
        stream_len: usize,
    ) -> Result<Unpacked, DecodeError> {
        self.unpack_parts(codec, Bytes::copy_from_slice(payload), raw_len, stream_len)
    }

    fn open_parts<'a>(
        &'a mut self,
        codec: Codec,
        payload: &'a [u8],
        raw_len: usize,
        stream_len: usize,
    ) -> Result<Content<'a>, DecodeError> {
        check_lengths(payload.len(), raw_len, stream_len)?;
        let raw = self.decompressor.decompress(codec, payload, raw_len);
        let raw = raw.map_err(|refusal| refused(refusal, codec, raw_len))?;
        let parts = Content::parse(raw, stream_len, false, &mut self.table)?;
        Ok(Content::of(raw, &parts, &self.table, stream_len))
    }

    fn unpack_parts(
        &mut self,
        codec: Codec,
        payload: Bytes,
        raw_len: usize,
        stream_len: usize,
    ) -> Result<Unpacked, DecodeError> {
        check_lengths(payload.len(), raw_len, stream_len)?;
        let raw = self.decompressor.decompress(codec, &payload, raw_len);
        let raw = raw.map_err(|refusal| refused(refusal, codec, raw_len))?;
        let mut table = Table::default();
        let parts = Content::parse(raw, stream_len, true, &mut table)?;
        let raw = if codec == Codec::Raw { payload.clone() } else { self.decompressor.give(raw_len) };
        Ok(Unpacked { raw, parts, table, stream_len })
    }

    /// Bytes held for decompression.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.decompressor.memory()
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

fn write(content: Content<'_>, out: &mut Vec<u8>) {
    out.reserve(content.stream_len());
    // Nothing in it refers to anything, and a Vec takes everything.
    let (Ok(()) | Err(_)) = content.replay(out);
}

pub(crate) fn check_lengths(wire: usize, raw: usize, stream: usize) -> Result<(), DecodeError> {
    within("wire length", wire, MAX_WIRE_PAYLOAD)?;
    within("raw length", raw, MAX_RAW_PAYLOAD)?;
    within("stream length", stream, MAX_SEGMENT_BYTES)
}

fn refused(refusal: Refusal, codec: Codec, raw_len: usize) -> DecodeError {
    match refusal {
        Refusal::Lane => LaneError::None.into(),
        Refusal::Length => DecodeError::Length { what: "raw length", len: raw_len },
        Refusal::Frame(error) => DecodeError::Frame(error),
        Refusal::Corrupt => DecodeError::Corrupt { codec, raw_len },
    }
}

fn within(what: &'static str, len: usize, limit: usize) -> Result<(), DecodeError> {
    if len <= limit { Ok(()) } else { Err(DecodeError::Length { what, len }) }
}
