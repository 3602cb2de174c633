//! A payload whose every length was checked: what a chunk holds, in the order of the VMM's stream.

use std::ops::Range;

use dwcp_proto::limits::{
    MAX_BLOCKS, MAX_CHUNK_PAGES_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE,
};
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, RECORD_WORD};
use dwcp_proto::{PageIndex, RamBlockId, Run};

use crate::format::{
    Header, NAMED, OP_BLANKS, OP_OPAQUE, OP_PAGES, OP_ZEROS, PAGE_INDEX_END, TableError, read_varint,
};

/// One chunk's content, parsed and checked. A stream sink takes [`write_stream`](Self::write_stream), a sink
/// that maps the guest's RAM takes [`items`](Self::items); both see the same parse.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    table: &'a Table,
    names: &'a [u8],
    opaque: &'a [u8],
    pages: &'a [[u8; PAGE_SIZE]],
    stream_len: usize,
}

/// A part of a chunk's content. The `block` of a [`Run`] is an index into the chunk's own names:
/// [`Content::name`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// Bytes that are not a guest page.
    Opaque(&'a [u8]),
    /// Full-page records and their pages, as many as the run counts.
    Pages(Run, &'a [[u8; PAGE_SIZE]]),
    /// Zero-page records.
    Zeros(Run),
    /// Full-page records of pages that are all zero.
    Blanks(Run),
}

impl<'a> Content<'a> {
    /// Parses and checks a payload before compression; `table` is the parse's memory.
    pub(crate) fn parse(
        payload: &'a [u8],
        stream_len: usize,
        table: &'a mut Table,
    ) -> Result<Self, TableError> {
        let (header, rest) = Header::read(payload)?;
        let full_pages = header.pages as usize;
        if usize::from(header.names) > MAX_BLOCKS || full_pages > MAX_CHUNK_PAGES_BYTES / PAGE_SIZE {
            return Err(TableError::Lengths);
        }
        let (names, rest) = rest.split_at_checked(header.table_len as usize).ok_or(TableError::Lengths)?;
        let (opaque, rest) = rest.split_at_checked(header.opaque_len as usize).ok_or(TableError::Lengths)?;
        let (pages, tail) = rest.as_chunks::<PAGE_SIZE>();
        if pages.len() != full_pages || !tail.is_empty() {
            return Err(TableError::Lengths);
        }
        let operations = table.parse_names(names, header.names)?;
        let totals = table.parse_operations(operations)?;
        if totals.opaque != opaque.len() || totals.stored != pages.len() {
            return Err(TableError::Content);
        }
        if totals.stream != stream_len {
            return Err(TableError::StreamLength { actual: totals.stream, announced: stream_len });
        }
        Ok(Content { table, names, opaque, pages, stream_len })
    }

    /// Bytes of the VMM's stream that the chunk stands for.
    pub fn stream_len(&self) -> usize {
        self.stream_len
    }

    /// The block names of this chunk; a run's `block` counts along them.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &'a [u8]> {
        let (table, names) = (self.table, self.names);
        table.names.iter().map(move |range| &names[range.clone()])
    }

    /// The name of a run's block; `None` for an index that no run of this chunk has.
    pub fn name(&self, block: RamBlockId) -> Option<&'a [u8]> {
        self.table.names.get(usize::from(block.0)).map(|range| &self.names[range.clone()])
    }

    /// The content in the order of the VMM's stream.
    pub fn items(&self) -> impl Iterator<Item = Item<'a>> {
        let (mut opaque, mut pages) = (self.opaque, self.pages);
        // Parsing has shown that the operations use up exactly these two slices.
        self.table.operations.iter().map(move |operation| match *operation {
            Operation::Opaque(len) => {
                let (head, tail) = opaque.split_at(len);
                opaque = tail;
                Item::Opaque(head)
            }
            Operation::Pages(run) => {
                let (head, tail) = pages.split_at(run.count as usize);
                pages = tail;
                Item::Pages(run, head)
            }
            Operation::Zeros(run) => Item::Zeros(run),
            Operation::Blanks(run) => Item::Blanks(run),
        })
    }

    /// Appends the VMM's stream, byte for byte as it entered the encoder: [`stream_len`](Self::stream_len)
    /// bytes.
    pub fn write_stream(&self, out: &mut Vec<u8>) {
        out.reserve(self.stream_len);
        for item in self.items() {
            match item {
                Item::Opaque(bytes) => out.extend_from_slice(bytes),
                Item::Pages(run, pages) => {
                    for (page, place) in pages.iter().zip(0..) {
                        self.write_word(run, place, FLAG_PAGE, out);
                        out.extend_from_slice(page);
                    }
                }
                Item::Blanks(run) => {
                    for place in 0..run.count {
                        self.write_word(run, place, FLAG_PAGE, out);
                        out.resize(out.len() + PAGE_SIZE, 0);
                    }
                }
                Item::Zeros(run) => {
                    for place in 0..run.count {
                        self.write_word(run, place, FLAG_ZERO, out);
                        out.push(0);
                    }
                }
            }
        }
    }

    /// The word, and if need be the name, of the record at `place` of a run.
    fn write_word(&self, run: Run, place: u32, flag: u64, out: &mut Vec<u8>) {
        let named = place == 0 && !run.continued;
        let modifier = if named { 0 } else { FLAG_CONTINUE };
        let offset = (run.first.0 + u64::from(place)) * PAGE_SIZE as u64;
        out.extend_from_slice(&(offset | flag | modifier).to_be_bytes());
        if named {
            let name = self.name(run.block).unwrap_or_default();
            out.push(name.len() as u8);
            out.extend_from_slice(name);
        }
    }
}

/// The parsed table: memory that a decoder keeps from chunk to chunk.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// Where each name lies in the table's bytes.
    names: Vec<Range<usize>>,
    operations: Vec<Operation>,
    /// Per block, the first page that may come next.
    next: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Opaque(usize),
    Pages(Run),
    Zeros(Run),
    Blanks(Run),
}

/// What the operations so far add up to. None can overflow: each stays under a limit from step to step.
#[derive(Default)]
struct Totals {
    records: usize,
    opaque: usize,
    stored: usize,
    full_pages: usize,
    stream: usize,
}

impl Table {
    /// Parses the names at the head of the table; gives the operations after them.
    fn parse_names<'a>(&mut self, table: &'a [u8], count: u16) -> Result<&'a [u8], TableError> {
        self.names.clear();
        self.next.clear();
        let mut before: Option<&[u8]> = None;
        let mut at = 0;
        for _ in 0..count {
            let &len = table.get(at).ok_or(TableError::Names)?;
            let range = at + 1..at + 1 + usize::from(len);
            let name = table.get(range.clone()).ok_or(TableError::Names)?;
            if before.is_some_and(|before| before >= name) {
                return Err(TableError::Names);
            }
            before = Some(name);
            at = range.end;
            self.names.push(range);
            self.next.push(0);
        }
        table.get(at..).ok_or(TableError::Names)
    }

    fn parse_operations(&mut self, mut bytes: &[u8]) -> Result<Totals, TableError> {
        self.operations.clear();
        let mut totals = Totals::default();
        let mut last_block = None;
        while let Some((&code, rest)) = bytes.split_first() {
            bytes = rest;
            let operation = if code == OP_OPAQUE {
                let len = read_varint(&mut bytes)?;
                totals.add_opaque(len)?
            } else {
                let kind = match code & !NAMED {
                    OP_PAGES => Operation::Pages,
                    OP_ZEROS => Operation::Zeros,
                    OP_BLANKS => Operation::Blanks,
                    _ => return Err(TableError::Operation(code)),
                };
                let run = self.parse_run(&mut bytes, code & NAMED == 0, last_block)?;
                last_block = Some(run.block);
                totals.add_run(kind(run), run, self.head_len(run))?
            };
            self.operations.push(operation);
        }
        Ok(totals)
    }

    fn parse_run(
        &mut self,
        bytes: &mut &[u8],
        continued: bool,
        last_block: Option<RamBlockId>,
    ) -> Result<Run, TableError> {
        let (block, gap, count) = (read_varint(bytes)?, read_varint(bytes)?, read_varint(bytes)?);
        let unknown = TableError::Block(block);
        let next = usize::try_from(block).ok().and_then(|block| self.next.get_mut(block)).ok_or(unknown)?;
        let first = next.checked_add(gap).ok_or(TableError::PageIndex)?;
        let end = first.checked_add(count).ok_or(TableError::PageIndex)?;
        if end > PAGE_INDEX_END {
            return Err(TableError::PageIndex);
        }
        *next = end;
        let block = u16::try_from(block).map(RamBlockId).map_err(|_| unknown)?;
        if continued && last_block.is_some_and(|last| last != block) {
            return Err(TableError::Continues);
        }
        let count = u32::try_from(count).map_err(|_| TableError::TooMany)?;
        Ok(Run { block, first: PageIndex(first), count, continued })
    }

    /// Bytes of the name in the stream at a run's first record.
    fn head_len(&self, run: Run) -> usize {
        match self.names.get(usize::from(run.block.0)) {
            Some(name) if !run.continued => 1 + name.len(),
            _ => 0,
        }
    }
}

impl Totals {
    fn add_opaque(&mut self, len: u64) -> Result<Operation, TableError> {
        let len = match usize::try_from(len) {
            Ok(0) => return Err(TableError::Empty),
            Ok(len) if len <= MAX_SEGMENT_BYTES => len,
            _ => return Err(TableError::TooMany),
        };
        self.records += 1;
        self.opaque += len;
        self.stream += len;
        self.within_limits()?;
        Ok(Operation::Opaque(len))
    }

    fn add_run(&mut self, operation: Operation, run: Run, head: usize) -> Result<Operation, TableError> {
        let count = run.count as usize;
        if count == 0 {
            return Err(TableError::Empty);
        }
        if count > MAX_SEGMENT_RECORDS {
            return Err(TableError::TooMany);
        }
        self.records += count;
        let body = match operation {
            Operation::Pages(_) => {
                self.stored += count;
                self.full_pages += count;
                PAGE_SIZE
            }
            Operation::Blanks(_) => {
                self.full_pages += count;
                PAGE_SIZE
            }
            Operation::Zeros(_) | Operation::Opaque(_) => 1,
        };
        self.stream += head + count * (RECORD_WORD + body);
        self.within_limits()?;
        Ok(operation)
    }

    fn within_limits(&self) -> Result<(), TableError> {
        let fits = self.records <= MAX_SEGMENT_RECORDS
            && self.full_pages <= MAX_CHUNK_PAGES_BYTES / PAGE_SIZE
            && self.stream <= MAX_SEGMENT_BYTES;
        if fits { Ok(()) } else { Err(TableError::TooMany) }
    }
}
