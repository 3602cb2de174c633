//! Codecs: how a chunk's payload is compressed, with contexts that are made once and reused.

use std::sync::Arc;

use bytes::Bytes;
use dwcp_proto::Codec;
use dwcp_proto::buffers::Buffers;
use lz4_flex::block::{self, CompressTable};
use zstd_safe::{CCtx, DCtx};

use crate::zstd_frame::{self, FrameError};

/// The contexts of one encoding worker.
pub(crate) struct Compressor {
    lz4: CompressTable,
    zstd: CCtx<'static>,
    /// Grows to the bound of the largest payload and stays.
    out: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new() -> Self {
        Compressor { lz4: CompressTable::large(), zstd: CCtx::create(), out: Vec::new() }
    }

    /// `raw` as one LZ4 block; `None` if the library refuses, which leaves the payload raw.
    pub(crate) fn lz4(&mut self, raw: &[u8]) -> Option<&[u8]> {
        let out = scratch(&mut self.out, block::get_maximum_output_size(raw.len()));
        let len = block::compress_into_with_table(raw, out, &mut self.lz4).ok()?;
        out.get(..len)
    }

    /// `raw` as one zstd frame with its content size; `None` as with [`lz4`](Self::lz4).
    pub(crate) fn zstd(&mut self, raw: &[u8], level: i32) -> Option<&[u8]> {
        let out = scratch(&mut self.out, zstd_safe::compress_bound(raw.len()));
        let len = self.zstd.compress(out, raw, level).ok()?;
        out.get(..len)
    }
}

/// The contexts of one decoding worker.
pub(crate) struct Decompressor {
    zstd: DCtx<'static>,
    out: Vec<u8>,
    buffers: Arc<Buffers>,
}

/// Bytes of decompressed chunks kept for the next use, by each worker: four full ones of 512 KiB, and a little.
const KEEP: usize = 5 << 19;

/// Why a payload does not decompress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Lane,
    Length,
    Frame(FrameError),
    Corrupt,
}

/// LZ4 spends a byte on at most this many of output, so a length announced beyond it is a lie.
const LZ4_MAX_RATIO: usize = 255;

impl Decompressor {
    pub(crate) fn new() -> Self {
        Decompressor { zstd: DCtx::create(), out: Vec::new(), buffers: Buffers::new(KEEP) }
    }

    /// Gives away the first `len` bytes of what was decompressed last from another codec than [`Codec::Raw`]. Their memory comes back
    /// when they are dropped, and is no more than twice as much: what waits is counted by its length.
    pub(crate) fn give(&mut self, len: usize) -> Bytes {
        let len = len.min(self.out.len());
        if self.out.capacity() > len.saturating_mul(2) {
            return Bytes::copy_from_slice(&self.out[..len]);
        }
        let buffer = std::mem::replace(&mut self.out, self.buffers.take());
        self.buffers.share(buffer).slice(..len)
    }

    /// The `raw_len` bytes that `payload` stands for. The caller has held `raw_len` against its limit;
    /// everything else that can be known from the payload's own header is checked before memory is taken.
    pub(crate) fn decompress<'a>(
        &'a mut self,
        codec: Codec,
        payload: &'a [u8],
        raw_len: usize,
    ) -> Result<&'a [u8], Refusal> {
        match codec {
            // Only a lane's decoder knows what came before.
            Codec::Lane => Err(Refusal::Lane),
            Codec::Raw if payload.len() == raw_len => Ok(payload),
            Codec::Raw => Err(Refusal::Length),
            Codec::Lz4 => {
                if raw_len > payload.len().saturating_mul(LZ4_MAX_RATIO) {
                    return Err(Refusal::Length);
                }
                let out = scratch(&mut self.out, raw_len);
                match block::decompress_into(payload, out) {
                    Ok(len) if len == raw_len => Ok(out),
                    _ => Err(Refusal::Corrupt),
                }
            }
            Codec::Zstd => {
                zstd_frame::check(payload, raw_len).map_err(Refusal::Frame)?;
                let out = scratch(&mut self.out, raw_len);
                match self.zstd.decompress(out, payload) {
                    Ok(len) if len == raw_len => Ok(out),
                    _ => Err(Refusal::Corrupt),
                }
            }
        }
    }
}

#[cfg(test)]
impl Decompressor {
    pub(crate) fn memory(&self) -> usize {
        self.out.capacity()
    }
}

/// The first `len` bytes of a buffer that only ever grows; its bytes are zeroed once, not per chunk.
pub(crate) fn scratch(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_away_stays_and_its_memory_comes_back() {
        let (first, second) = (vec![1; 5000], vec![2; 3000]);
        let mut compressor = Compressor::new();
        let payloads = [&first, &second].map(|raw| compressor.zstd(raw, 1).unwrap().to_vec());
        let mut decompressor = Decompressor::new();
        let mut unpack = |payload: &[u8], len| {
            decompressor.decompress(Codec::Zstd, payload, len).unwrap();
            decompressor.give(len)
        };
        let held = unpack(&payloads[0], 5000);
        let other = unpack(&payloads[1], 3000);
        assert_eq!((&held[..], &other[..]), (&first[..], &second[..]));
        let place = held.as_ptr();
        drop(held);
        // In place of what is decompressed next but one.
        let third = unpack(&payloads[1], 3000);
        let fourth = unpack(&payloads[1], 3000);
        assert!(third.as_ptr() == place || fourth.as_ptr() == place);
        assert_eq!((&third[..], &fourth[..]), (&second[..], &second[..]));
    }

    #[test]
    fn a_small_chunk_takes_no_large_buffer_away() {
        let mut compressor = Compressor::new();
        let (large, small) = (vec![1; 1 << 20], vec![2; 3000]);
        let payloads = [&large, &small].map(|raw| compressor.zstd(raw, 1).unwrap().to_vec());
        let mut decompressor = Decompressor::new();
        decompressor.decompress(Codec::Zstd, &payloads[0], large.len()).unwrap();
        let place = decompressor.give(large.len()).as_ptr();
        // The buffer has come back, and these are held.
        let given: Vec<Bytes> = (0..8)
            .map(|_| {
                decompressor.decompress(Codec::Zstd, &payloads[1], small.len()).unwrap();
                decompressor.give(small.len())
            })
            .collect();
        assert!(given.iter().all(|bytes| bytes[..] == small));
        decompressor.decompress(Codec::Zstd, &payloads[0], large.len()).unwrap();
        assert_eq!(decompressor.give(large.len()).as_ptr(), place, "one of the small ones has it");
    }
}
