//! The payload of a chunk before compression: its specification, and the pieces both directions share.
//!
//! # Layout
//!
//! Fixed integers are big-endian. Like lies by like, because that compresses best and because the pages, by
//! far the most of it, are then one slice:
//!
//! ```text
//! offset  bytes                what
//!      0  1                    version: 1, or 2 if the table has references
//!      1  1                    0
//!      2  2                    names: how many block names the table begins with
//!      4  4                    table_len: bytes of the table
//!      8  4                    opaque_len: bytes of opaque content
//!     12  4                    pages: how many stored pages
//!    (16  4                    proofs: how many pages are references)   from here to (28): in version 2 only
//!    (20  4                    masks: how many of these are deltas)
//!    (24  4                    lines: how many lines the deltas change)
//!      …  table_len            table: names, then operations up to its end
//!      …  opaque_len           the opaque content, joined in stream order
//!    ( …  proofs × 8           the first 8 bytes of the BLAKE3 hash of each referenced page's content)
//!    ( …  masks × 4            per delta: bit n (of value 2ⁿ) is set if line n changed)
//!      …  pages × PAGE_SIZE    the stored pages, joined in stream order
//!    ( …  lines × 128          the changed lines, joined in stream order, in each page ascending)
//! ```
//!
//! The parts fill the payload exactly; its length is at most `MAX_RAW_PAYLOAD`.
//!
//! # Table
//!
//! A *name* is one byte of length and as many bytes, as in QEMU's stream. Names ascend strictly, byte by
//! byte, so each occurs once. A chunk carries every name it needs, so it can be decoded alone, in any order.
//!
//! An *operation* is a byte and then unsigned varints (LEB128, seven bits a byte, low bits first, shortest
//! form only). It stands for one or more records of the VMM's stream; operations are in stream order.
//!
//! | byte | operation | varints | stands for |
//! |---|---|---|---|
//! | 0x01 | opaque | `len` | the next `len` bytes of the opaque content |
//! | 0x02 | pages | `block gap count` | `count` full-page records, content from the stored pages |
//! | 0x03 | zeros | `block gap count` | `count` zero-page records |
//! | 0x04 | blanks | `block gap count` | `count` full-page records whose content is all zero; nothing is stored |
//! | 0x05 | unchanged | `block gap count` | `count` full-page records; each page has the content that it had |
//! | 0x06 | copies | `block gap count from page` | `count` full-page records with the content of the pages of block `from`, from index `page` on |
//! | 0x07 | deltas | `block gap count` | `count` full-page records; each page has the content that it had, but for the changed lines |
//!
//! 0x05 to 0x07 are *references*, known to version 2 only, in which there is at least one.
//! Bit 0x80 (`NAMED`) may be set on 0x02 to 0x07: the first record of the run carries the block's name.
//! Otherwise it has the CONTINUE flag, as all further records of a run have; then its block must be that of
//! the run before it in the chunk, if there is one. Any other byte is refused.
//!
//! `block` is an index into the chunk's names. `gap` counts the pages of that block between the run before it
//! in this chunk (at first: the start of the block) and this run. So the pages of a block ascend strictly
//! within a chunk, and a page that occurs twice cannot be written down. `len` and `count` are at least 1.
//!
//! # References
//!
//! A reference means content *as it is after all of the stream before its own record*, earlier records of the same
//! chunk included: chunks are applied in order, and so are a chunk's records. The receiver has that content in the
//! guest's RAM, or in a [`Cache`](crate::Cache) of a size that both sides know, or the reference is refused. What it
//! puts together it holds against the page's proof before it goes anywhere. A delta's mask is neither empty nor
//! are all of its bits set. Content that travelled as opaque bytes is nobody's reference: a source forgets such pages.
//!
//! # What the records become in the stream
//!
//! Per page a big-endian word, page index × `PAGE_SIZE` | flags; the name's length and bytes if `NAMED`; then
//! the page, or for a zero-page record one zero byte (see [`dwcp_proto::record`]).
//!
//! # Limits
//!
//! Full-page records: `MAX_CHUNK_PAGES_BYTES`. Records, each opaque run counting as one:
//! `MAX_SEGMENT_RECORDS`. Names: `MAX_BLOCKS`. Bytes of the stream: `MAX_SEGMENT_BYTES`, and exactly what the
//! chunk's header announces. Page index: below 2⁵². A receiver that writes to RAM checks a page against the
//! size of its block besides.
//!
//! # Codecs
//!
//! The chunk's codec covers the whole payload: *raw* as it is; *lz4*, one block; *zstd*, one frame with its
//! content size, without dictionary id, its window at most [`MAX_WINDOW`]. The announced raw length is exact.
//!
//! *lane*: the chunk continues the one before it in its lane. It is a big-endian position of 4 bytes, and then the blocks (RFC 8878,
//! section 3.1.1.2) that bring the lane's frame to the end of this chunk's content. Position 0 begins a frame: its header comes first,
//! with a window of at most what was agreed on, and without content size, checksum or dictionary. Any other position is that of the
//! lane's chunk before plus one. A frame never ends; the next one, and the next leg, just begin. There is one lane, number 0; chunks of
//! other codecs may lie between its chunks, and are not part of it. It is decoded in the order of the chunks' sequence numbers, so a chunk
//! that is lost or late is waited for, and one that comes twice is dropped, before anything is decoded; and what was put into a lane has to
//! be sent as it is. A lane's chunk may be of version 1 or 2.
//!
//! # Versions
//!
//! A decoder refuses a version or an operation that it does not know. A new operation, codec or lane with a
//! longer window needs a new version or codec number, agreed at negotiation. The codec *lane* is sent only where the
//! choice has a `lane_window`, which both sides offered; an older agent offers none. Version 2 is sent only where both
//! sides offered it and the receiver has said what it holds.

use crate::fingerprint::{LINE, PROOF};
use crate::memory::MAX_CHANGED;
use dwcp_proto::limits::{
    MAX_BLOCK_NAME, MAX_RAW_PAYLOAD, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE,
};

/// The newest version of the payload that this crate writes and reads.
pub const HDE_VERSION: u8 = 2;

/// The version without references.
pub(crate) const PLAIN: u8 = 1;
/// The version with references.
pub(crate) const REFERENCES: u8 = 2;

/// Bytes of a zstd frame's window: what a payload of the greatest length can use, rounded up to a power of
/// two.
pub const MAX_WINDOW: u64 = (MAX_RAW_PAYLOAD as u64).next_power_of_two();

/// Page indexes end here: a record word holds index × page size in 64 bits.
pub(crate) const PAGE_INDEX_END: u64 = 1 << (64 - PAGE_SIZE.trailing_zeros());

pub(crate) const OP_OPAQUE: u8 = 0x01;
pub(crate) const OP_PAGES: u8 = 0x02;
pub(crate) const OP_ZEROS: u8 = 0x03;
pub(crate) const OP_BLANKS: u8 = 0x04;
pub(crate) const OP_UNCHANGED: u8 = 0x05;
pub(crate) const OP_COPIES: u8 = 0x06;
pub(crate) const OP_DELTAS: u8 = 0x07;
pub(crate) const NAMED: u8 = 0x80;

/// An operation is a byte, a block (2 bytes of varint), a gap (8) and a count (2).
const MAX_OPERATION: usize = 13;
/// What a copy has besides, a block and a page index, and a proof: the page itself is not there.
const MAX_REFERENCE: usize = 2 + 8 + PROOF;

// What stands for a page is never longer than the page.
const _: () = assert!(MAX_REFERENCE + 4 + MAX_CHANGED as usize * LINE <= PAGE_SIZE);

// Whatever segment keeps the limits has a payload that does: its names and content are in the stream as well,
// but for one name that an earlier segment wrote.
const _: () = assert!(
    MAX_SEGMENT_BYTES + Header::MAX_LEN + MAX_SEGMENT_RECORDS * MAX_OPERATION + 1 + MAX_BLOCK_NAME
        <= MAX_RAW_PAYLOAD
);

/// The lengths that a payload begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) names: u16,
    pub(crate) table_len: u32,
    pub(crate) opaque_len: u32,
    pub(crate) pages: u32,
    pub(crate) proofs: u32,
    pub(crate) masks: u32,
    pub(crate) lines: u32,
}

impl Header {
    /// Bytes of the longer version.
    pub(crate) const MAX_LEN: usize = 28;

    /// Whether there are references, which makes it version 2.
    pub(crate) fn has_references(&self) -> bool {
        self.proofs > 0
    }

    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[if self.has_references() { REFERENCES } else { PLAIN }, 0]);
        out.extend_from_slice(&self.names.to_be_bytes());
        for number in [self.table_len, self.opaque_len, self.pages] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        if self.has_references() {
            for number in [self.proofs, self.masks, self.lines] {
                out.extend_from_slice(&number.to_be_bytes());
            }
        }
    }

    /// The header and what follows it.
    pub(crate) fn read(payload: &[u8]) -> Result<(Self, &[u8]), TableError> {
        let ([version, zero], rest) = split(payload)?;
        if !(PLAIN..=REFERENCES).contains(&version) || zero != 0 {
            return Err(TableError::Version(version));
        }
        let (names, mut rest) = split(rest)?;
        let mut number = || {
            let (bytes, after) = split(rest)?;
            rest = after;
            Ok(u32::from_be_bytes(bytes))
        };
        let mut header = Header {
            names: u16::from_be_bytes(names),
            table_len: number()?,
            opaque_len: number()?,
            pages: number()?,
            ..Header::default()
        };
        if version == REFERENCES {
            (header.proofs, header.masks, header.lines) = (number()?, number()?, number()?);
            if !header.has_references() {
                return Err(TableError::Lengths);
            }
        }
        Ok((header, rest))
    }
}

fn split<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), TableError> {
    bytes.split_first_chunk().map(|(head, rest)| (*head, rest)).ok_or(TableError::Lengths)
}

/// What is wrong with a payload's header or table. The sender is at fault: a right one never writes such a
/// payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TableError {
    /// The payload's version is not known, or not agreed on.
    #[error("payload version {0} is not known here")]
    Version(u8),
    /// The header's lengths do not fill the payload exactly, or exceed a limit.
    #[error("the payload's lengths do not fit it")]
    Lengths,
    /// A name is cut off, or does not come after the one before it.
    #[error("the table's block names are cut off or out of order")]
    Names,
    /// A byte that starts no known operation.
    #[error("operation {0:#04x} is not known")]
    Operation(u8),
    /// A varint is cut off, too long, or not in its shortest form.
    #[error("a number in the table is malformed")]
    Number,
    /// A run that is empty.
    #[error("an operation stands for nothing")]
    Empty,
    /// More records or more bytes of pages than a chunk may hold.
    #[error("the table holds more records than a chunk may")]
    TooMany,
    /// A run of a block that the table does not name.
    #[error("a run refers to block {0}, which the table does not name")]
    Block(u64),
    /// A run that claims to continue another block than the one before it.
    #[error("a run continues another block than the one before it")]
    Continues,
    /// A page index past what a record word can hold.
    #[error("a page lies outside any RAM block")]
    PageIndex,
    /// The table uses more or fewer opaque bytes or stored pages than there are.
    #[error("the table does not use up the content exactly")]
    Content,
    /// A delta that changes nothing, or everything.
    #[error("a delta's mask is empty or full")]
    Mask,
    /// The records give another number of stream bytes than the chunk announces.
    #[error("the records give {actual} bytes of stream, not {announced}")]
    StreamLength {
        /// What the records give.
        actual: usize,
        /// What the chunk's header says.
        announced: usize,
    },
}

pub(crate) fn write_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads a varint off the front of `bytes`.
pub(crate) fn read_varint(bytes: &mut &[u8]) -> Result<u64, TableError> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or(TableError::Number)?;
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        if (bits << shift) >> shift != bits || (byte == 0 && shift > 0) {
            return Err(TableError::Number);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(TableError::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_varint_has_one_form() {
        for value in [0, 1, 127, 128, 300, 1 << 52, u64::MAX] {
            let mut bytes = Vec::new();
            write_varint(value, &mut bytes);
            assert_eq!(read_varint(&mut &bytes[..]), Ok(value));
            assert_eq!(read_varint(&mut &bytes[..bytes.len() - 1]), Err(TableError::Number));
        }
        let too_long: [&[u8]; 4] = [&[0x80, 0], &[0xff, 0x80, 0], &[0xff; 10], &[0xff; 11]];
        for bytes in too_long {
            assert_eq!(read_varint(&mut &bytes[..]), Err(TableError::Number), "{bytes:x?}");
        }
        let past_64_bits = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02];
        assert_eq!(read_varint(&mut &past_64_bits[..]), Err(TableError::Number));
    }

    #[test]
    fn the_header_round_trips_and_refuses_another_version() {
        let plain = Header { names: 2, table_len: 300, opaque_len: 70_000, pages: 256, ..Header::default() };
        for (header, version, len) in
            [(plain, 1, 16), (Header { proofs: 9, masks: 7, lines: 8, ..plain }, 2, 28)]
        {
            let mut bytes = Vec::new();
            header.write(&mut bytes);
            assert_eq!((bytes[0], bytes.len()), (version, len));
            assert_eq!(Header::read(&bytes), Ok((header, &[][..])));
            for cut in 0..len {
                assert_eq!(Header::read(&bytes[..cut]), Err(TableError::Lengths));
            }
            bytes[0] = 3;
            assert_eq!(Header::read(&bytes), Err(TableError::Version(3)));
        }
    }
}
