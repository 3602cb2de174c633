//! Cuts a stream of bytes into segments.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use dwcp_proto::buffers::Buffers;
use dwcp_proto::limits::{MAX_CHUNK_PAGES_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE};
use dwcp_proto::record::RECORD_WORD;
use dwcp_proto::{BlockNames, PageVersion, Record, Run, Segment, StreamOffset};

use super::layout::Layout;
use super::parse::{Item, MAX_ITEM, OpaqueReason, PageItem, Parser, Step};

/// Pages of the smallest segment that may be asked for.
const MIN_TARGET_PAGES: usize = 16;
/// Room beside the pages of one segment for names, zero pages and framing: about two pages, which are carried over.
const SLACK: usize = 2 * MAX_ITEM;
/// Bytes of read buffers kept for the next use. On a long link much is in flight, and it comes back in bursts.
const KEEP: usize = 32 << 20;
/// A tail of at most this part of a buffer is copied to the next one instead of becoming a segment of its own, and
/// a flush of at most this part is copied out, so that a trickle does not pin a whole buffer per segment.
const SMALL_PART: usize = 16;

const _: () =
    assert!(MAX_CHUNK_PAGES_BYTES / PAGE_SIZE * (RECORD_WORD + PAGE_SIZE) + SLACK <= MAX_SEGMENT_BYTES);

/// Cuts the bytes of a VMM's migration stream into [`Segment`]s, whatever the sizes in which they arrive.
///
/// The caller reads into [`buffer`](Self::buffer) and tells by [`filled`](Self::filled) how much came, then takes
/// segments with [`pop`](Self::pop) until there are none. Segments come out once a buffer is full, so a caller that
/// has nothing more to read for now calls [`flush`](Self::flush) first. At the end of the stream it calls
/// [`finish`](Self::finish).
///
/// Page bytes are neither copied nor looked at: a segment's bytes are the buffer that was read into. Memory is
/// one buffer, of about the target size, beside what the caller holds on to.
///
/// ```
/// use dwcp_vmm::stream::Cutter;
///
/// let mut cutter = Cutter::new(256 << 10);
/// let mut stream: &[u8] = b"not a stream of QEMU's";
/// loop {
///     match std::io::Read::read(&mut stream, cutter.buffer()).unwrap() {
///         0 => break cutter.finish(),
///         n => cutter.filled(n),
///     }
///     while let Some(segment) = cutter.pop() {
///         drop(segment); // send it
///     }
/// }
/// assert_eq!(&cutter.pop().unwrap().bytes[..], b"not a stream of QEMU's");
/// ```
#[derive(Debug)]
pub struct Cutter {
    target_pages: usize,
    buffers: Arc<Buffers>,
    buffer: Vec<u8>,
    /// Stream offset of the buffer's first byte.
    base: u64,
    /// Positions in the buffer, ascending: what left it, what is in closed segments, what is parsed, what was read.
    taken: usize,
    start: usize,
    parsed: usize,
    filled: usize,
    parser: Parser,
    /// Why and from which stream offset on everything is opaque.
    opaque: Option<(OpaqueReason, u64)>,
    pages: PageOrder,
    open: Index,
    closed: Vec<Closed>,
    ready: VecDeque<Segment>,
}

/// A finished index over bytes that are still in the buffer.
#[derive(Debug)]
struct Closed {
    range: Range<usize>,
    records: Vec<Record>,
    names: BlockNames,
    version: PageVersion,
}

impl Cutter {
    /// A cutter whose segments hold at most `target` bytes of guest pages, brought into the range of 64 KiB to
    /// [`MAX_CHUNK_PAGES_BYTES`].
    pub fn new(target: usize) -> Self {
        let target_pages = (target / PAGE_SIZE).clamp(MIN_TARGET_PAGES, MAX_CHUNK_PAGES_BYTES / PAGE_SIZE);
        let size = target_pages * (RECORD_WORD + PAGE_SIZE) + SLACK;
        Cutter {
            target_pages,
            buffers: Buffers::new(KEEP),
            buffer: vec![0; size],
            base: 0,
            taken: 0,
            start: 0,
            parsed: 0,
            filled: 0,
            parser: Parser::new(),
            opaque: None,
            pages: PageOrder::default(),
            open: Index::default(),
            closed: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// The same for a stream that a [`Merger`](crate::multifd::Merger) puts out: within a round pages overtake each other there, but never
    /// past a [synchronisation](Self::synchronised), which the caller has to tell.
    pub fn merged(target: usize) -> Self {
        let mut cutter = Cutter::new(target);
        cutter.pages.overtaking = Some(Overtaking::default());
        cutter
    }

    /// Tells that the channels of a merged stream were synchronised after what was [`filled`](Self::filled) in so far: a page may be sent again
    /// from here on.
    pub fn synchronised(&mut self) {
        if let Some(overtaking) = &mut self.pages.overtaking {
            overtaking.synchronised.clone_from(&overtaking.floors);
        }
    }

    /// Where the next bytes of the stream belong; never empty.
    pub fn buffer(&mut self) -> &mut [u8] {
        &mut self.buffer[self.filled..]
    }

    /// Tells that `read` bytes were written to the front of [`buffer`](Self::buffer). More than its length counts
    /// as its length.
    pub fn filled(&mut self, read: usize) {
        self.filled = self.filled.saturating_add(read).min(self.buffer.len());
        self.parse();
        if self.filled == self.buffer.len() {
            // A sliver at the end of the buffer goes into the next one's first segment.
            if self.parsed - self.start > self.small() {
                self.close();
            }
            self.turn();
        }
    }

    /// Takes bytes from a slice: a copying alternative to [`buffer`](Self::buffer) for callers that hold the bytes
    /// already. Returns how many it took; 0 only for none.
    pub fn feed(&mut self, bytes: &[u8]) -> usize {
        let room = self.buffer();
        let len = room.len().min(bytes.len());
        room[..len].copy_from_slice(&bytes[..len]);
        self.filled(len);
        len
    }

    /// The next segment, in stream order.
    pub fn pop(&mut self) -> Option<Segment> {
        self.ready.pop_front()
    }

    /// Makes everything that is whole available to [`pop`](Self::pop). What remains is less than one record.
    pub fn flush(&mut self) {
        self.close();
        if self.start - self.taken > self.small() {
            return self.turn();
        }
        let bytes = Bytes::copy_from_slice(&self.buffer[self.taken..self.start]);
        self.release(&bytes, self.taken);
        let rest = self.start..self.filled;
        self.buffer.copy_within(rest.clone(), 0);
        self.rebase(rest);
    }

    /// Tells that the stream ended: all that is left becomes available, the start of an unfinished item as opaque
    /// bytes.
    pub fn finish(&mut self) {
        if self.parsed < self.filled {
            self.give_up(OpaqueReason::Truncated);
        }
        self.flush();
    }

    /// Stops looking into the stream: everything from the first byte not yet parsed is opaque. For a caller that
    /// found out on its own that the stream must not be taken apart.
    pub fn give_up(&mut self, reason: OpaqueReason) {
        self.turn_opaque(reason);
        self.parse();
    }

    /// Why the stream is opaque from some point on, once it is. [`OpaqueReason::DeviceState`] is the regular end of
    /// RAM.
    pub fn opaque_reason(&self) -> Option<OpaqueReason> {
        self.opaque.map(|(reason, _)| reason)
    }

    /// Where the stream became opaque, once it did.
    pub fn opaque_from(&self) -> Option<StreamOffset> {
        self.opaque.map(|(_, from)| StreamOffset(from))
    }

    /// The RAM blocks that the stream listed; empty before it did.
    pub fn layout(&self) -> &Layout {
        &self.parser.layout
    }

    /// Whether the list of RAM blocks is behind us, so that [`layout`](Self::layout) is whole.
    pub fn in_ram(&self) -> bool {
        self.parser.in_ram()
    }

    /// The machine type that the stream named, if it did.
    pub fn machine(&self) -> Option<&[u8]> {
        self.parser.machine.as_deref()
    }

    /// Version of the pages that come next: how often the source began again.
    pub fn version(&self) -> PageVersion {
        self.pages.version
    }

    /// Bytes taken in so far.
    pub fn offset(&self) -> StreamOffset {
        StreamOffset(self.base + self.filled as u64)
    }

    fn small(&self) -> usize {
        self.buffer.len() / SMALL_PART
    }

    fn parse(&mut self) {
        while self.parsed < self.filled && self.opaque.is_none() {
            match self.parser.step(&self.buffer[self.parsed..self.filled]) {
                Step::Item(len, Item::Page(page)) => {
                    match self.pages.admit(page) {
                        Admit::Ascends => {}
                        Admit::Behind => self.close(),
                        Admit::Again(next) => {
                            self.close();
                            self.pages.begin(next);
                        }
                        Admit::Exhausted => {
                            self.turn_opaque(OpaqueReason::TooManyRounds);
                            break;
                        }
                    }
                    if !self.open.has_room(page, self.target_pages) {
                        self.close();
                    }
                    self.pages.note(page);
                    self.open.page(page);
                    self.parsed += len;
                }
                Step::Item(len, _) => self.pass(len),
                Step::NeedMore => return,
                Step::Opaque(reason) => self.turn_opaque(reason),
            }
        }
        if self.opaque.is_some() {
            self.pass(self.filled - self.parsed);
        }
    }

    fn turn_opaque(&mut self, reason: OpaqueReason) {
        self.opaque.get_or_insert((reason, self.base + self.parsed as u64));
    }

    /// Goes over bytes that are not pages.
    fn pass(&mut self, bytes: usize) {
        if self.open.count >= MAX_SEGMENT_RECORDS {
            self.close();
        }
        self.open.framing(bytes);
        self.parsed += bytes;
    }

    /// Ends the open segment behind the last parsed item.
    fn close(&mut self) {
        if self.start == self.parsed {
            return;
        }
        let open = std::mem::take(&mut self.open);
        self.pages.next_segment();
        self.closed.push(Closed {
            range: self.start..self.parsed,
            records: open.records,
            names: self.parser.layout.names().clone(),
            version: self.pages.version,
        });
        self.start = self.parsed;
    }

    /// Gives the buffer away with the closed segments and goes on in a new one.
    fn turn(&mut self) {
        let mut next = self.buffers.take();
        // Zeroed once, when made.
        if next.is_empty() {
            next = vec![0; self.buffer.len()];
        }
        let rest = self.start..self.filled;
        next[..rest.len()].copy_from_slice(&self.buffer[rest.clone()]);
        let bytes = self.buffers.share(std::mem::replace(&mut self.buffer, next));
        self.release(&bytes, 0);
        self.rebase(rest);
    }

    /// Notes that `rest`, all that is not taken, now stands at the front of the buffer.
    fn rebase(&mut self, rest: Range<usize>) {
        self.base += rest.start as u64;
        self.parsed -= rest.start;
        self.filled = rest.len();
        (self.taken, self.start) = (0, 0);
    }

    /// Hands the closed segments out as parts of `bytes`, whose first byte stood at `from` in the buffer.
    fn release(&mut self, bytes: &Bytes, from: usize) {
        for Closed { range, records, names, version } in self.closed.drain(..) {
            self.taken = range.end;
            let offset = StreamOffset(self.base + range.start as u64);
            let bytes = bytes.slice(range.start - from..range.end - from);
            self.ready.push_back(Segment { offset, bytes, records, names, version });
        }
    }
}

/// The index of the segment that is being built.
#[derive(Debug, Default)]
struct Index {
    records: Vec<Record>,
    /// Entries that count against `MAX_SEGMENT_RECORDS`: every page, and every opaque stretch.
    count: usize,
    full_pages: usize,
}

impl Index {
    fn has_room(&self, page: PageItem, target_pages: usize) -> bool {
        self.count < MAX_SEGMENT_RECORDS && (page.zero || self.full_pages < target_pages)
    }

    fn framing(&mut self, bytes: usize) {
        match self.records.last_mut() {
            _ if bytes == 0 => {}
            Some(Record::Opaque { len }) => *len += bytes as u32,
            _ => {
                self.records.push(Record::Opaque { len: bytes as u32 });
                self.count += 1;
            }
        }
    }

    fn page(&mut self, page: PageItem) {
        self.count += 1;
        self.full_pages += usize::from(!page.zero);
        let follows = |run: &Run| {
            page.continued && run.block == page.block && run.first.0 + u64::from(run.count) == page.index.0
        };
        match self.records.last_mut() {
            Some(Record::Pages(run)) if !page.zero && follows(run) => run.count += 1,
            Some(Record::Zeros(run)) if page.zero && follows(run) => run.count += 1,
            _ => {
                let PageItem { block, index, continued, zero } = page;
                let run = Run { block, first: index, count: 1, continued };
                self.records.push(if zero { Record::Zeros(run) } else { Record::Pages(run) });
            }
        }
    }
}

/// Tells a page that was sent before from one that was not: within a version the pages of each block ascend.
#[derive(Debug, Default)]
struct PageOrder {
    version: PageVersion,
    /// By block: the lowest page that would ascend; of a merged stream, in this segment.
    floors: Vec<u64>,
    /// Of a merged stream.
    overtaking: Option<Overtaking>,
}

/// In a merged stream the pages of a version ascend from one synchronisation to the next, not between them.
#[derive(Debug, Default)]
struct Overtaking {
    /// By block: the lowest page above all of this version.
    floors: Vec<u64>,
    /// The same, as it was at the last synchronisation.
    synchronised: Vec<u64>,
}

enum Admit {
    Ascends,
    /// Belongs to this version, but not into this segment.
    Behind,
    Again(PageVersion),
    Exhausted,
}

impl PageOrder {
    fn admit(&self, page: PageItem) -> Admit {
        let ascends = page.index.0 >= floor(&self.floors, page);
        let again = match &self.overtaking {
            None => !ascends,
            Some(overtaking) => page.index.0 < floor(&overtaking.synchronised, page),
        };
        match self.version.0.checked_add(1) {
            Some(next) if again => Admit::Again(PageVersion(next)),
            None if again => Admit::Exhausted,
            _ if ascends => Admit::Ascends,
            _ => Admit::Behind,
        }
    }

    fn begin(&mut self, version: PageVersion) {
        self.version = version;
        self.floors.clear();
        if let Some(overtaking) = &mut self.overtaking {
            *overtaking = Overtaking::default();
        }
    }

    fn next_segment(&mut self) {
        if self.overtaking.is_some() {
            self.floors.clear();
        }
    }

    fn note(&mut self, page: PageItem) {
        raise(&mut self.floors, page);
        if let Some(overtaking) = &mut self.overtaking {
            raise(&mut overtaking.floors, page);
        }
    }
}

fn floor(floors: &[u64], page: PageItem) -> u64 {
    floors.get(usize::from(page.block.0)).copied().unwrap_or_default()
}

fn raise(floors: &mut Vec<u64>, page: PageItem) {
    let block = usize::from(page.block.0);
    if floors.len() <= block {
        floors.resize(block + 1, 0);
    }
    floors[block] = floors[block].max(page.index.0 + 1);
}
