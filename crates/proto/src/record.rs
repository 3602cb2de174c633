//! Records: what a VMM's migration stream consists of, in its order.
//!
//! A source cuts the stream into [`Segment`]s: the bytes exactly as they came, beside an index that says where the
//! guest's pages lie in them. Path v1 sends a segment's bytes; path v3 encodes its pages. Because the bytes
//! stay, either path can take over from the other at any offset.

use std::sync::Arc;

use bytes::Bytes;

use crate::ids::{PageIndex, PageVersion, RamBlockId, StreamOffset};
use crate::limits::{MAX_BLOCK_NAME, MAX_BLOCKS, PAGE_SIZE};

/// Bytes of a record's flags-and-offset word in QEMU's stream.
pub const RECORD_WORD: usize = 8;
/// Flag of a zero-page record.
pub const FLAG_ZERO: u64 = 0x02;
/// Flag of a full-page record.
pub const FLAG_PAGE: u64 = 0x08;
/// Modifier: same block as the record before; no name follows.
pub const FLAG_CONTINUE: u64 = 0x20;

/// The names of the RAM blocks that a stream has mentioned so far, by [`RamBlockId`].
/// Append-only; each segment holds the table as it stood at its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockNames(Arc<Vec<Box<[u8]>>>);

impl BlockNames {
    /// The name (bytes as in the stream) of a block, or `None` for an id outside the table.
    pub fn name(&self, id: RamBlockId) -> Option<&[u8]> {
        self.0.get(usize::from(id.0)).map(|n| &**n)
    }

    /// The id of a name, if it is in the table.
    pub fn id(&self, name: &[u8]) -> Option<RamBlockId> {
        self.0.iter().position(|n| &**n == name).map(|i| RamBlockId(i as u16))
    }

    /// The id of `name`, adding it if it is new; `None` when the table is full or the name too long.
    pub fn intern(&mut self, name: &[u8]) -> Option<RamBlockId> {
        if let Some(id) = self.id(name) {
            return Some(id);
        }
        if self.0.len() >= MAX_BLOCKS || name.len() > MAX_BLOCK_NAME {
            return None;
        }
        Arc::make_mut(&mut self.0).push(name.into());
        Some(RamBlockId((self.0.len() - 1) as u16))
    }

    /// How many names the table holds.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no block was named yet.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What lies at one place of a segment. Runs keep the index small: a run of `count` records covers consecutive
/// pages of one block in ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// Bytes that are not a guest page, passed on untouched.
    Opaque {
        /// How many; at least 1.
        len: u32,
    },
    /// Full pages: each a record word, for the first perhaps the block's name, and [`PAGE_SIZE`] bytes.
    Pages(Run),
    /// Pages of zeros: each a record word, for the first perhaps the block's name, and one zero byte.
    Zeros(Run),
}

/// Consecutive pages of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The block.
    pub block: RamBlockId,
    /// The first page.
    pub first: PageIndex,
    /// How many pages; at least 1.
    pub count: u32,
    /// Whether the *first* record has the CONTINUE flag (its name left out). All further ones have it.
    pub continued: bool,
}

impl Run {
    fn head(&self, names: &BlockNames) -> usize {
        if self.continued { 0 } else { 1 + names.name(self.block).map_or(0, <[u8]>::len) }
    }
}

impl Record {
    /// Bytes that this record takes in the VMM's stream.
    pub fn stream_len(&self, names: &BlockNames) -> usize {
        match self {
            Record::Opaque { len } => *len as usize,
            Record::Pages(run) => run.count as usize * (RECORD_WORD + PAGE_SIZE) + run.head(names),
            Record::Zeros(run) => run.count as usize * (RECORD_WORD + 1) + run.head(names),
        }
    }
}

/// A stretch of the VMM's stream and the records in it.
///
/// Invariants, kept by the source that cuts it:
/// - the records' [`stream_len`](Record::stream_len)s sum up to `bytes.len()`, in order;
/// - within one segment the pages of each block ascend strictly, so no page is in it twice;
/// - `version` rises whenever a page may have been sent before in the current one;
/// - the limits `MAX_CHUNK_PAGES_BYTES`, `MAX_SEGMENT_RECORDS` and `MAX_SEGMENT_BYTES` hold.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Where the first byte stands in the VMM's stream.
    pub offset: StreamOffset,
    /// The stream's bytes, exactly.
    pub bytes: Bytes,
    /// What the bytes are.
    pub records: Vec<Record>,
    /// The block names that `records` refer to.
    pub names: BlockNames,
    /// Version of all pages in this segment.
    pub version: PageVersion,
}

impl Segment {
    /// The offset just past this segment.
    pub fn end(&self) -> StreamOffset {
        StreamOffset(self.offset.0 + self.bytes.len() as u64)
    }

    /// A segment of opaque bytes only.
    pub fn opaque(offset: StreamOffset, bytes: Bytes, version: PageVersion) -> Self {
        let records = match bytes.len() {
            0 => Vec::new(),
            len => vec![Record::Opaque { len: len as u32 }],
        };
        Segment { offset, bytes, records, names: BlockNames::default(), version }
    }
}
