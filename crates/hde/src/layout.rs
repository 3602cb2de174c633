//! A segment read against its index: where each part of a payload lies in the VMM's stream.

use std::ops::Range;

use dwcp_proto::limits::{MAX_CHUNK_PAGES_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE};
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};
use dwcp_proto::{BlockNames, PageIndex, RamBlockId, Record, Run, Segment};

use crate::encode::{EncodeError, Stats};
use crate::fingerprint::{LINE, PROOF, proof};
use crate::format::{
    Header, NAMED, OP_BLANKS, OP_COPIES, OP_DELTAS, OP_OPAQUE, OP_PAGES, OP_UNCHANGED, OP_ZEROS,
    PAGE_INDEX_END, write_varint,
};
use crate::memory::{Layers, Memory, Verdict};

static ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// The table of a payload, and the places in the segment's bytes that its content comes from. An encoder
/// keeps it from chunk to chunk.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// Names and operations, as in the payload.
    table: Vec<u8>,
    /// The blocks in this chunk, in the order of their names.
    used: Vec<RamBlockId>,
    /// Per block of the segment's names: its place in `used`.
    slots: Vec<Option<u16>>,
    /// Per place in `used`: the first page that may come next.
    next: Vec<u64>,
    last_block: Option<RamBlockId>,
    opaque: Vec<Range<usize>>,
    /// Where each stored page begins.
    pages: Vec<usize>,
    /// Where each page that is sent as a reference begins.
    referenced: Vec<usize>,
    /// Where each delta's page begins, and which lines changed.
    deltas: Vec<(usize, u32)>,
    stats: Stats,
}

/// How some consecutive pages of a run are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pages,
    Blanks,
    Unchanged,
    /// The content of the pages of this block, from this one on.
    Copies(RamBlockId, PageIndex),
    Deltas,
}

impl Kind {
    fn operation(self) -> u8 {
        match self {
            Kind::Pages => OP_PAGES,
            Kind::Blanks => OP_BLANKS,
            Kind::Unchanged => OP_UNCHANGED,
            Kind::Copies(..) => OP_COPIES,
            Kind::Deltas => OP_DELTAS,
        }
    }

    /// Whether a page of kind `next`, `after` pages behind the first of this kind, can share its operation.
    fn goes_on(self, next: Kind, after: u32) -> bool {
        match (self, next) {
            (Kind::Copies(block, first), Kind::Copies(other, index)) => {
                block == other && first.0.checked_add(u64::from(after)) == Some(index.0)
            }
            _ => self == next,
        }
    }
}

/// What is wrong with one record of a segment.
enum Fault {
    Mismatch,
    Order,
}

impl Layout {
    /// Reads `segment`, holding every word and name in its bytes against the index: whatever is read so
    /// decodes to the same bytes. With a `memory` pages become references, and are noted there; after an error it
    /// has to forget.
    pub(crate) fn read(
        &mut self,
        segment: &Segment,
        mut memory: Option<&mut Memory>,
    ) -> Result<(), EncodeError> {
        let offset = segment.offset;
        check_limits(segment)?;
        if let Some(memory) = &mut memory {
            memory.learn(&segment.names);
        }
        self.reset(&segment.names);
        let fault = |(record, fault)| match fault {
            Fault::Mismatch => EncodeError::Mismatch { offset, record },
            Fault::Order => EncodeError::Order { offset, record },
        };
        self.write_names(segment).map_err(fault)?;
        let mut cursor = Cursor { bytes: &segment.bytes, at: 0 };
        for (index, record) in segment.records.iter().enumerate() {
            let memory = memory.as_deref_mut();
            self.read_record(record, &segment.names, &mut cursor, memory).map_err(|f| fault((index, f)))?;
        }
        if cursor.at != segment.bytes.len() {
            return Err(EncodeError::Mismatch { offset, record: segment.records.len() });
        }
        self.stats.stream_bytes = segment.bytes.len() as u64;
        Ok(())
    }

    /// What was counted while reading.
    pub(crate) fn stats(&self) -> Stats {
        self.stats
    }

    /// Appends the payload before compression; `bytes` are the segment's.
    pub(crate) fn gather(&self, bytes: &[u8], out: &mut Vec<u8>) {
        let header = self.header();
        out.reserve(self.gathered_len());
        header.write(out);
        out.extend_from_slice(&self.table);
        self.opaque.iter().for_each(|range| out.extend_from_slice(&bytes[range.clone()]));
        // Each place was taken from these bytes as a whole page.
        let page = |at: usize| bytes[at..].first_chunk().unwrap_or(&ZERO_PAGE);
        self.referenced.iter().for_each(|&at| out.extend_from_slice(&proof(page(at))));
        self.deltas.iter().for_each(|(_, mask)| out.extend_from_slice(&mask.to_be_bytes()));
        self.pages.iter().for_each(|&at| out.extend_from_slice(page(at)));
        self.lines(bytes).for_each(|line| out.extend_from_slice(line));
    }

    fn header(&self) -> Header {
        Header {
            names: self.used.len() as u16,
            table_len: self.table.len() as u32,
            opaque_len: self.stats.opaque_bytes as u32,
            pages: self.pages.len() as u32,
            proofs: self.referenced.len() as u32,
            masks: self.deltas.len() as u32,
            lines: self.stats.delta_lines as u32,
        }
    }

    /// Bytes of the payload before compression, or a few more.
    pub(crate) fn gathered_len(&self) -> usize {
        Header::MAX_LEN
            + self.table.len()
            + self.stats.opaque_bytes as usize
            + self.referenced.len() * PROOF
            + self.deltas.len() * size_of::<u32>()
            + self.pages.len() * PAGE_SIZE
            + self.stats.delta_lines as usize * LINE
    }

    /// The content that a codec could shorten, slice by slice.
    pub(crate) fn content<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let opaque = self.opaque.iter().map(move |range| &bytes[range.clone()]);
        let pages = self.pages.iter().map(move |&at| &bytes[at..at + PAGE_SIZE]);
        opaque.chain(pages).chain(self.lines(bytes))
    }

    fn lines<'a>(&'a self, bytes: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        self.deltas.iter().flat_map(move |&(at, mask)| {
            let lines = bytes[at..at + PAGE_SIZE].chunks(LINE).zip(0..);
            lines.filter(move |(_, n)| mask >> n & 1 == 1).map(|(line, _)| line)
        })
    }

    fn reset(&mut self, names: &BlockNames) {
        self.table.clear();
        self.used.clear();
        self.slots.clear();
        self.slots.resize(names.len(), None);
        self.next.clear();
        self.last_block = None;
        self.opaque.clear();
        self.pages.clear();
        self.referenced.clear();
        self.deltas.clear();
        self.stats = Stats::default();
    }

    /// Finds the blocks in use and writes their names, in ascending order.
    fn write_names(&mut self, segment: &Segment) -> Result<(), (usize, Fault)> {
        for (index, record) in segment.records.iter().enumerate() {
            let (Record::Pages(run) | Record::Zeros(run)) = record else { continue };
            let slot = self.slots.get_mut(usize::from(run.block.0)).ok_or((index, Fault::Mismatch))?;
            if slot.is_none() {
                *slot = Some(0);
                self.used.push(run.block);
            }
        }
        let name = |block: &RamBlockId| segment.names.name(*block).unwrap_or_default();
        self.used.sort_unstable_by(|a, b| name(a).cmp(name(b)));
        for (place, block) in (0..).zip(&self.used) {
            self.slots[usize::from(block.0)] = Some(place);
            self.next.push(0);
            let name = name(block);
            self.table.push(name.len() as u8);
            self.table.extend_from_slice(name);
        }
        Ok(())
    }

    fn read_record(
        &mut self,
        record: &Record,
        names: &BlockNames,
        cursor: &mut Cursor<'_>,
        memory: Option<&mut Memory>,
    ) -> Result<(), Fault> {
        match *record {
            Record::Opaque { len } => {
                let start = cursor.at;
                cursor.take(len as usize)?;
                if len == 0 {
                    return Err(Fault::Mismatch);
                }
                self.table.push(OP_OPAQUE);
                write_varint(u64::from(len), &mut self.table);
                self.opaque.push(start..cursor.at);
                self.stats.opaque_bytes += u64::from(len);
                Ok(())
            }
            Record::Zeros(run) => {
                self.enter(run)?;
                for place in 0..run.count {
                    cursor.word(run, place, FLAG_ZERO, names)?;
                    cursor.expect(&[0])?;
                }
                if let Some(memory) = memory {
                    (0..run.count).for_each(|place| memory.zero(run.block, page_of(run, place)));
                }
                self.stats.zero_pages += u64::from(run.count);
                self.put(OP_ZEROS, run, 0..run.count)
            }
            Record::Pages(run) => self.read_pages(run, names, cursor, memory),
        }
    }

    /// Splits a run where pages of different kinds meet.
    fn read_pages(
        &mut self,
        run: Run,
        names: &BlockNames,
        cursor: &mut Cursor<'_>,
        mut memory: Option<&mut Memory>,
    ) -> Result<(), Fault> {
        self.enter(run)?;
        let (mut start, mut kind) = (0, Kind::Pages);
        for place in 0..run.count {
            cursor.word(run, place, FLAG_PAGE, names)?;
            let at = cursor.at;
            let page = cursor.page()?;
            let next = self.judge(run.block, page_of(run, place), page, at, memory.as_deref_mut());
            if !kind.goes_on(next, place - start) {
                self.put_kind(kind, run, start..place)?;
                (start, kind) = (place, next);
            }
        }
        self.put_kind(kind, run, start..run.count)
    }

    /// How the page at `at` is sent; notes what that takes.
    fn judge(
        &mut self,
        block: RamBlockId,
        index: PageIndex,
        page: &[u8; PAGE_SIZE],
        at: usize,
        memory: Option<&mut Memory>,
    ) -> Kind {
        let layers = memory.as_ref().map_or(Layers::ZERO, |memory| memory.layers());
        if layers.zero && *page == ZERO_PAGE {
            self.stats.blank_pages += 1;
            if let Some(memory) = memory {
                memory.zero(block, index);
            }
            return Kind::Blanks;
        }
        let untracked = memory.as_ref().map_or(0, |memory| memory.untracked());
        let verdict = match memory {
            Some(memory) => {
                let verdict = memory.page(block, index, page);
                self.stats.untracked_pages += memory.untracked() - untracked;
                verdict
            }
            None => Verdict::Whole,
        };
        match verdict {
            Verdict::Unchanged => {
                self.stats.unchanged_pages += 1;
                self.referenced.push(at);
                Kind::Unchanged
            }
            // A chunk names only the blocks that it has pages of.
            Verdict::Copy(from, first) if self.slot(from).is_some() => {
                self.stats.copied_pages += 1;
                self.referenced.push(at);
                Kind::Copies(from, first)
            }
            Verdict::Delta(mask) => {
                self.stats.delta_pages += 1;
                self.stats.delta_lines += u64::from(mask.count_ones());
                self.referenced.push(at);
                self.deltas.push((at, mask));
                Kind::Deltas
            }
            Verdict::Whole | Verdict::Copy(..) => {
                self.stats.pages += 1;
                self.pages.push(at);
                Kind::Pages
            }
        }
    }

    fn slot(&self, block: RamBlockId) -> Option<u16> {
        self.slots.get(usize::from(block.0)).copied().flatten()
    }

    /// Checks what holds for a run as a whole.
    fn enter(&mut self, run: Run) -> Result<(), Fault> {
        let continues_another = run.continued && self.last_block.is_some_and(|last| last != run.block);
        let in_range = run.first.0.checked_add(u64::from(run.count)).is_some_and(|end| end <= PAGE_INDEX_END);
        if run.count == 0 || continues_another || !in_range {
            return Err(Fault::Mismatch);
        }
        self.last_block = Some(run.block);
        Ok(())
    }

    /// Writes the operation for a part of a run of full pages.
    fn put_kind(&mut self, kind: Kind, run: Run, part: Range<u32>) -> Result<(), Fault> {
        if part.is_empty() {
            return Ok(());
        }
        self.put(kind.operation(), run, part)?;
        if let Kind::Copies(block, first) = kind {
            write_varint(u64::from(self.slot(block).ok_or(Fault::Mismatch)?), &mut self.table);
            write_varint(first.0, &mut self.table);
        }
        Ok(())
    }

    /// Writes the operation for a part of a run.
    fn put(&mut self, operation: u8, run: Run, part: Range<u32>) -> Result<(), Fault> {
        if part.is_empty() {
            return Ok(());
        }
        let slot = self.slots[usize::from(run.block.0)].unwrap_or_default();
        let next = &mut self.next[usize::from(slot)];
        let first = run.first.0 + u64::from(part.start);
        let gap = first.checked_sub(*next).ok_or(Fault::Order)?;
        *next = run.first.0 + u64::from(part.end);
        let named = part.start == 0 && !run.continued;
        self.table.push(if named { operation | NAMED } else { operation });
        write_varint(u64::from(slot), &mut self.table);
        write_varint(gap, &mut self.table);
        write_varint(u64::from(part.end - part.start), &mut self.table);
        Ok(())
    }
}

fn check_limits(segment: &Segment) -> Result<(), EncodeError> {
    let (mut records, mut full_pages) = (0u64, 0u64);
    for record in &segment.records {
        match record {
            Record::Opaque { .. } => records += 1,
            Record::Zeros(run) => records += u64::from(run.count),
            Record::Pages(run) => {
                records += u64::from(run.count);
                full_pages += u64::from(run.count);
            }
        }
    }
    let too_large = |what| Err(EncodeError::TooLarge { offset: segment.offset, what });
    if segment.bytes.len() > MAX_SEGMENT_BYTES {
        return too_large("bytes");
    }
    if records > MAX_SEGMENT_RECORDS as u64 {
        return too_large("records");
    }
    if full_pages > (MAX_CHUNK_PAGES_BYTES / PAGE_SIZE) as u64 {
        return too_large("pages");
    }
    Ok(())
}

fn page_of(run: Run, place: u32) -> PageIndex {
    PageIndex(run.first.0 + u64::from(place))
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..len)).ok_or(Fault::Mismatch)?;
        self.at += len;
        Ok(taken)
    }

    fn page(&mut self) -> Result<&'a [u8; PAGE_SIZE], Fault> {
        self.take(PAGE_SIZE)?.first_chunk().ok_or(Fault::Mismatch)
    }

    fn expect(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.take(bytes.len())? == bytes { Ok(()) } else { Err(Fault::Mismatch) }
    }

    /// The word, and if need be the name, of the record at `place` of a run.
    fn word(&mut self, run: Run, place: u32, flag: u64, names: &BlockNames) -> Result<(), Fault> {
        let named = place == 0 && !run.continued;
        let modifier = if named { 0 } else { FLAG_CONTINUE };
        let offset = (run.first.0 + u64::from(place)) * PAGE_SIZE as u64;
        self.expect(&(offset | flag | modifier).to_be_bytes())?;
        if named {
            let name = names.name(run.block).ok_or(Fault::Mismatch)?;
            self.expect(&[name.len() as u8])?;
            self.expect(name)?;
        }
        Ok(())
    }
}
