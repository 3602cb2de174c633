//! A payload whose every length was checked: what a chunk holds, in the order of the VMM's stream.

use std::ops::Range;

use dwcp_proto::limits::{
    MAX_BLOCKS, MAX_CHUNK_PAGES_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE,
};
use dwcp_proto::record::RECORD_WORD;
use dwcp_proto::{PageIndex, RamBlockId, Run};

use crate::fingerprint::{LINE, PROOF};
use crate::format::{
    Header, NAMED, OP_BLANKS, OP_COPIES, OP_DELTAS, OP_OPAQUE, OP_PAGES, OP_UNCHANGED, OP_ZEROS,
    PAGE_INDEX_END, TableError, read_varint,
};
use crate::held::Span;

/// One chunk's content, parsed and checked. [`replay`](Self::replay) delivers it to a sink;
/// [`items`](Self::items) shows it as it is, references unresolved.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    table: &'a Table,
    names: &'a [u8],
    opaque: &'a [u8],
    proofs: &'a [[u8; PROOF]],
    masks: &'a [[u8; 4]],
    pages: &'a [[u8; PAGE_SIZE]],
    lines: &'a [[u8; LINE]],
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
    /// Full-page records of pages that are as they were, and a proof each.
    Unchanged(Run, &'a [[u8; PROOF]]),
    /// Full-page records of pages that are as those of the second run are, and a proof each.
    Copies(Run, Run, &'a [[u8; PROOF]]),
    /// Full-page records of pages that are as they were but for some lines: a mask each, all the lines, a proof
    /// each.
    Deltas(Run, &'a [[u8; 4]], &'a [[u8; LINE]], &'a [[u8; PROOF]]),
}

/// Where the parts of a payload lie in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Parts {
    table: Range<usize>,
    opaque: Range<usize>,
    proofs: Range<usize>,
    masks: Range<usize>,
    pages: Range<usize>,
    lines: Range<usize>,
}

impl Parts {
    /// The parts that the header of `payload` announces, which have to fill it exactly.
    fn read(payload: &[u8]) -> Result<(Self, Header), TableError> {
        let (header, rest) = Header::read(payload)?;
        let mut at = payload.len() - rest.len();
        let mut part = |count: u32, size: usize| {
            let len = (count as usize).checked_mul(size).ok_or(TableError::Lengths)?;
            let end = at.checked_add(len).filter(|&end| end <= payload.len()).ok_or(TableError::Lengths)?;
            Ok(std::mem::replace(&mut at, end)..end)
        };
        let parts = Parts {
            table: part(header.table_len, 1)?,
            opaque: part(header.opaque_len, 1)?,
            proofs: part(header.proofs, PROOF)?,
            masks: part(header.masks, 4)?,
            pages: part(header.pages, PAGE_SIZE)?,
            lines: part(header.lines, LINE)?,
        };
        if at == payload.len() { Ok((parts, header)) } else { Err(TableError::Lengths) }
    }
}

impl<'a> Content<'a> {
    /// Parses and checks a payload before compression; `table` is the parse's memory. With `references` off, a
    /// payload with references is of an unknown version.
    pub(crate) fn parse(
        payload: &[u8],
        stream_len: usize,
        references: bool,
        table: &mut Table,
    ) -> Result<Parts, TableError> {
        let (parts, header) = Parts::read(payload)?;
        if header.has_references() && !references {
            return Err(TableError::Version(payload[0]));
        }
        let most = MAX_CHUNK_PAGES_BYTES / PAGE_SIZE;
        if usize::from(header.names) > MAX_BLOCKS
            || header.pages as usize > most
            || header.proofs as usize > most
        {
            return Err(TableError::Lengths);
        }
        let (masks, _) = payload[parts.masks.clone()].as_chunks::<4>();
        let operations = table.parse_names(&payload[parts.table.clone()], header.names)?;
        let last = if header.has_references() { OP_DELTAS } else { OP_BLANKS };
        let totals = table.parse_operations(operations, last, masks)?;
        let expected = (header.pages, header.proofs, header.masks, header.lines);
        if totals.opaque != parts.opaque.len() || totals.content() != expected {
            return Err(TableError::Content);
        }
        if totals.stream != stream_len {
            return Err(TableError::StreamLength { actual: totals.stream, announced: stream_len });
        }
        Ok(parts)
    }

    /// The content whose `parts` and `table` came out of parsing this payload.
    pub(crate) fn of(payload: &'a [u8], parts: &Parts, table: &'a Table, stream_len: usize) -> Self {
        Content {
            table,
            names: &payload[parts.table.clone()],
            opaque: &payload[parts.opaque.clone()],
            proofs: payload[parts.proofs.clone()].as_chunks().0,
            masks: payload[parts.masks.clone()].as_chunks().0,
            pages: payload[parts.pages.clone()].as_chunks().0,
            lines: payload[parts.lines.clone()].as_chunks().0,
            stream_len,
        }
    }

    /// Bytes of the VMM's stream that the chunk stands for.
    pub fn stream_len(&self) -> usize {
        self.stream_len
    }

    /// Whether there is no guest page in it.
    pub(crate) fn is_opaque(&self) -> bool {
        self.opaque.len() == self.stream_len
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
        let mut rest = *self;
        // Parsing has shown that the operations use up exactly these slices.
        self.table.operations.iter().map(move |operation| match *operation {
            Operation::Opaque(len) => Item::Opaque(front(&mut rest.opaque, len)),
            Operation::Pages(run) => Item::Pages(run, front(&mut rest.pages, run.count as usize)),
            Operation::Zeros(run) => Item::Zeros(run),
            Operation::Blanks(run) => Item::Blanks(run),
            Operation::Unchanged(run) => Item::Unchanged(run, front(&mut rest.proofs, run.count as usize)),
            Operation::Copies(run, from) => {
                Item::Copies(run, from, front(&mut rest.proofs, run.count as usize))
            }
            Operation::Deltas(run, lines) => Item::Deltas(
                run,
                front(&mut rest.masks, run.count as usize),
                front(&mut rest.lines, lines as usize),
                front(&mut rest.proofs, run.count as usize),
            ),
        })
    }

    /// A run with its block's name.
    pub(crate) fn span(&self, run: Run) -> Span<'a> {
        let block = self.name(run.block).unwrap_or_default();
        Span { block, first: run.first, count: run.count, named: !run.continued }
    }
}

fn front<'a, T>(rest: &mut &'a [T], len: usize) -> &'a [T] {
    let (head, tail) = rest.split_at(len);
    *rest = tail;
    head
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
    Unchanged(Run),
    /// The pages, and those whose content they have.
    Copies(Run, Run),
    /// With the number of lines that they change.
    Deltas(Run, u32),
}

/// What the operations so far add up to. None can overflow: each stays under a limit from step to step.
#[derive(Default)]
struct Totals {
    records: usize,
    opaque: usize,
    full_pages: usize,
    stored: u32,
    proofs: u32,
    masks: u32,
    lines: u32,
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

    /// Parses operations, of which those up to `last` are known.
    fn parse_operations(
        &mut self,
        mut bytes: &[u8],
        last: u8,
        masks: &[[u8; 4]],
    ) -> Result<Totals, TableError> {
        self.operations.clear();
        let mut totals = Totals::default();
        let mut masks = masks.iter();
        let mut last_block = None;
        while let Some((&code, rest)) = bytes.split_first() {
            bytes = rest;
            let operation = if code == OP_OPAQUE {
                let len = read_varint(&mut bytes)?;
                totals.add_opaque(len)?
            } else {
                let kind = code & !NAMED;
                if !(OP_PAGES..=last).contains(&kind) {
                    return Err(TableError::Operation(code));
                }
                let run = self.parse_run(&mut bytes, code & NAMED == 0, last_block)?;
                last_block = Some(run.block);
                let operation = match kind {
                    OP_ZEROS => Operation::Zeros(run),
                    OP_BLANKS => Operation::Blanks(run),
                    OP_UNCHANGED => Operation::Unchanged(run),
                    OP_COPIES => Operation::Copies(run, self.parse_from(&mut bytes, run.count)?),
                    OP_DELTAS => Operation::Deltas(run, count_lines(masks.by_ref(), run.count)?),
                    _ => Operation::Pages(run),
                };
                totals.add_run(operation, run, self.head_len(run))?
            };
            self.operations.push(operation);
        }
        Ok(totals)
    }

    /// The pages that a run of copies refers to.
    fn parse_from(&self, bytes: &mut &[u8], count: u32) -> Result<Run, TableError> {
        let (block, first) = (read_varint(bytes)?, read_varint(bytes)?);
        let known = usize::try_from(block).is_ok_and(|block| block < self.names.len());
        let block = u16::try_from(block).ok().filter(|_| known).ok_or(TableError::Block(block))?;
        match first.checked_add(u64::from(count)) {
            Some(end) if end <= PAGE_INDEX_END => {
                Ok(Run { block: RamBlockId(block), first: PageIndex(first), count, continued: true })
            }
            _ => Err(TableError::PageIndex),
        }
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
        match operation {
            Operation::Pages(_) => self.stored += run.count,
            Operation::Unchanged(_) | Operation::Copies(..) => self.proofs += run.count,
            Operation::Deltas(_, lines) => {
                self.proofs += run.count;
                self.masks += run.count;
                self.lines += lines;
            }
            Operation::Blanks(_) | Operation::Zeros(_) | Operation::Opaque(_) => {}
        }
        self.records += count;
        let body = match operation {
            Operation::Zeros(_) => 1,
            _ => {
                self.full_pages += count;
                PAGE_SIZE
            }
        };
        self.stream += head + count * (RECORD_WORD + body);
        self.within_limits()?;
        Ok(operation)
    }

    /// Pages, proofs, masks and lines that the payload has to hold.
    fn content(&self) -> (u32, u32, u32, u32) {
        (self.stored, self.proofs, self.masks, self.lines)
    }

    fn within_limits(&self) -> Result<(), TableError> {
        let fits = self.records <= MAX_SEGMENT_RECORDS
            && self.full_pages <= MAX_CHUNK_PAGES_BYTES / PAGE_SIZE
            && self.stream <= MAX_SEGMENT_BYTES;
        if fits { Ok(()) } else { Err(TableError::TooMany) }
    }
}

/// The lines that the next `count` masks change.
fn count_lines<'a>(masks: &mut impl Iterator<Item = &'a [u8; 4]>, count: u32) -> Result<u32, TableError> {
    let mut lines = 0;
    for _ in 0..count {
        let mask = u32::from_be_bytes(*masks.next().ok_or(TableError::Content)?);
        if mask == 0 || mask == u32::MAX {
            return Err(TableError::Mask);
        }
        lines += mask.count_ones();
    }
    Ok(lines)
}
