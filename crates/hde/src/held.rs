//! The receiver's side of *unchanged*, *dedup* and *delta*: where held pages come from, and how a chunk is applied.
//!
//! A sink that writes to the guest's RAM holds every page and reads it there. A sink that feeds a VMM's socket
//! cannot look back; it keeps a [`Cache`], whose content follows from the stream alone, so that the source knows
//! what is in it without asking.

use std::convert::Infallible;

use dwcp_proto::limits::{MAX_BLOCKS, PAGE_SIZE};
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};
use dwcp_proto::{BlockNames, PageIndex, RamBlockId};

use crate::content::{Content, Item};
use crate::fingerprint::{LINE, proof};

/// A page of guest memory.
pub type Page = [u8; PAGE_SIZE];

/// Consecutive records of one block in the VMM's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span<'a> {
    /// The block's name.
    pub block: &'a [u8],
    /// The first page.
    pub first: PageIndex,
    /// How many pages, at least 1.
    pub count: u32,
    /// Whether the first record carries the block's name. All others have the CONTINUE flag.
    pub named: bool,
}

/// What becomes of a chunk's content: the VMM's socket, or the guest's RAM. Called in the order of the stream.
pub trait Sink {
    /// Why something cannot be delivered.
    type Error;

    /// Bytes that are no page.
    fn opaque(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;

    /// Full-page records, as many as the span counts.
    fn pages(&mut self, span: Span<'_>, pages: &[Page]) -> Result<(), Self::Error>;

    /// Pages of zeros: as zero-page records, or where they came as `full` pages, as these.
    fn zeros(&mut self, span: Span<'_>, full: bool) -> Result<(), Self::Error>;

    /// Reads a page as it is after everything so far; `false` if it is not held.
    fn held(&mut self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<bool, Self::Error>;
}

/// Why a chunk cannot be applied. What came before the record in question has been delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError<E = Infallible> {
    /// A reference to a page that is not held here. A right source knows what is held: this is its fault.
    #[error("page {index} is referred to, but not held here")]
    Unheld {
        /// The page referred to.
        index: PageIndex,
    },
    /// What was put together is not the page that the source had: what one side holds is not what the other thinks.
    /// The page has to come whole.
    #[error("page {index}, put together from what is held, is not what was sent")]
    Proof {
        /// The page.
        index: PageIndex,
    },
    /// The sink failed.
    #[error("the sink failed")]
    Sink(#[source] E),
}

impl<'a> Content<'a> {
    /// Delivers everything to `sink`, in order, resolving references and holding them against their proofs.
    pub fn replay<S: Sink>(&self, sink: &mut S) -> Result<(), ReplayError<S::Error>> {
        let mut page = [0; PAGE_SIZE];
        for item in self.items() {
            match item {
                Item::Opaque(bytes) => sink.opaque(bytes).map_err(ReplayError::Sink)?,
                Item::Pages(run, pages) => sink.pages(self.span(run), pages).map_err(ReplayError::Sink)?,
                Item::Zeros(run) => sink.zeros(self.span(run), false).map_err(ReplayError::Sink)?,
                Item::Blanks(run) => sink.zeros(self.span(run), true).map_err(ReplayError::Sink)?,
                Item::Unchanged(run, proofs) => {
                    for (span, proof) in self.span(run).each().zip(proofs) {
                        read(sink, span.block, span.first, &mut page)?;
                        deliver(sink, span, &page, proof)?;
                    }
                }
                Item::Copies(run, from, proofs) => {
                    let from = self.span(from).each();
                    for ((span, from), proof) in self.span(run).each().zip(from).zip(proofs) {
                        read(sink, from.block, from.first, &mut page)?;
                        deliver(sink, span, &page, proof)?;
                    }
                }
                Item::Deltas(run, masks, lines, proofs) => {
                    let mut lines = lines.iter();
                    for ((span, mask), proof) in self.span(run).each().zip(masks).zip(proofs) {
                        read(sink, span.block, span.first, &mut page)?;
                        let (places, _) = page.as_chunks_mut::<LINE>();
                        let mask = u32::from_be_bytes(*mask);
                        for (place, line) in places.iter_mut().enumerate() {
                            if mask >> line_bit(place) & 1 == 1
                                && let Some(changed) = lines.next()
                            {
                                *line = *changed;
                            }
                        }
                        deliver(sink, span, &page, proof)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn line_bit(place: usize) -> u32 {
    place as u32
}

fn read<S: Sink>(
    sink: &mut S,
    block: &[u8],
    index: PageIndex,
    page: &mut Page,
) -> Result<(), ReplayError<S::Error>> {
    match sink.held(block, index, page) {
        Ok(true) => Ok(()),
        Ok(false) => Err(ReplayError::Unheld { index }),
        Err(error) => Err(ReplayError::Sink(error)),
    }
}

fn deliver<S: Sink>(
    sink: &mut S,
    span: Span<'_>,
    page: &Page,
    expected: &[u8],
) -> Result<(), ReplayError<S::Error>> {
    if proof(page) != expected {
        return Err(ReplayError::Proof { index: span.first });
    }
    sink.pages(span, std::slice::from_ref(page)).map_err(ReplayError::Sink)
}

impl<'a> Span<'a> {
    /// The pages one by one.
    pub fn each(self) -> impl Iterator<Item = Span<'a>> {
        (0..self.count).map(move |place| Span {
            first: PageIndex(self.first.0 + u64::from(place)),
            count: 1,
            named: self.named && place == 0,
            ..self
        })
    }

    /// Appends the word, and if need be the name, of the span's only or first record.
    pub fn write_head(&self, full: bool, out: &mut Vec<u8>) {
        let kind = if full { FLAG_PAGE } else { FLAG_ZERO };
        let modifier = if self.named { 0 } else { FLAG_CONTINUE };
        let offset = self.first.0 * PAGE_SIZE as u64;
        out.extend_from_slice(&(offset | kind | modifier).to_be_bytes());
        if self.named {
            out.push(self.block.len() as u8);
            out.extend_from_slice(self.block);
        }
    }

    /// Appends full-page records with these pages.
    pub fn write_pages(self, pages: &[Page], out: &mut Vec<u8>) {
        for (span, page) in self.each().zip(pages) {
            span.write_head(true, out);
            out.extend_from_slice(page);
        }
    }

    /// Appends records of zero pages.
    pub fn write_zeros(self, full: bool, out: &mut Vec<u8>) {
        for span in self.each() {
            span.write_head(full, out);
            out.resize(out.len() + if full { PAGE_SIZE } else { 1 }, 0);
        }
    }
}

/// Writes the VMM's stream and holds nothing: for chunks without references.
impl Sink for Vec<u8> {
    type Error = Infallible;

    fn opaque(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.extend_from_slice(bytes);
        Ok(())
    }

    fn pages(&mut self, span: Span<'_>, pages: &[Page]) -> Result<(), Infallible> {
        span.write_pages(pages, self);
        Ok(())
    }

    fn zeros(&mut self, span: Span<'_>, full: bool) -> Result<(), Infallible> {
        span.write_zeros(full, self);
        Ok(())
    }

    fn held(&mut self, _: &[u8], _: PageIndex, _: &mut Page) -> Result<bool, Infallible> {
        Ok(false)
    }
}

/// Slots of a [`Cache`], at least 1. Both sides have to use the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSize(u32);

impl CacheSize {
    /// Bytes that each page of a full cache takes beside its content, about.
    pub const OVERHEAD: usize = 48;

    /// A cache of so many pages; `None` for none.
    pub fn new(pages: u32) -> Option<Self> {
        (pages > 0).then_some(CacheSize(pages))
    }

    /// How many pages it holds.
    pub fn pages(self) -> u32 {
        self.0
    }

    /// The slot of a page whose block has this home.
    pub(crate) fn slot(self, home: u64, index: PageIndex) -> usize {
        (home.wrapping_add(index.0) % u64::from(self.0)) as usize
    }
}

/// A number from a block's name (FNV-1a), so that both sides put a page into the same slot.
pub(crate) fn home(name: &[u8]) -> u64 {
    name.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// The pages that a sink without access to the guest's RAM holds. A page goes to the slot (home of its block + its
/// index) modulo the number of slots and replaces what was there; a page that becomes zero leaves. Memory is taken
/// as slots are filled.
pub struct Cache {
    size: CacheSize,
    names: BlockNames,
    slots: Vec<Slot>,
}

type Slot = Option<Box<(RamBlockId, PageIndex, Page)>>;

impl Cache {
    /// An empty one.
    pub fn new(size: CacheSize) -> Self {
        Cache { size, names: BlockNames::default(), slots: Vec::new() }
    }

    /// A page was delivered.
    pub fn put(&mut self, block: &[u8], index: PageIndex, page: &Page) {
        // A stream has no more blocks than the table of names: Content's names meet the same limit, and a source
        // that goes beyond it over several chunks finds its references unheld.
        let Some(id) = self.names.intern(block) else { return };
        let slot = self.slot(block, index);
        if self.slots.len() <= slot {
            self.slots.resize_with(slot + 1, || None);
        }
        match &mut self.slots[slot] {
            Some(held) => (held.0, held.1, held.2) = (id, index, *page),
            empty => *empty = Some(Box::new((id, index, *page))),
        }
    }

    /// A page became zero.
    pub fn remove(&mut self, block: &[u8], index: PageIndex) {
        let slot = self.slot(block, index);
        if self.find(block, index).is_some() {
            self.slots[slot] = None;
        }
    }

    /// The page, if it is held.
    pub fn find(&self, block: &[u8], index: PageIndex) -> Option<&Page> {
        let held = self.slots.get(self.slot(block, index))?.as_ref()?;
        (held.1 == index && self.names.name(held.0) == Some(block)).then_some(&held.2)
    }

    fn slot(&self, block: &[u8], index: PageIndex) -> usize {
        self.size.slot(home(block), index)
    }
}

const _: () = assert!(MAX_BLOCKS <= 1 << 12, "a page's owner has 12 bits for its block");

/// The VMM's stream, with a cache to refer to.
pub struct StreamSink {
    /// What the VMM is to read, as far as it was not taken yet.
    pub out: Vec<u8>,
    cache: Option<Cache>,
}

impl StreamSink {
    /// A sink whose cache has this size, if it has one.
    pub fn new(cache: Option<CacheSize>) -> Self {
        StreamSink { out: Vec::new(), cache: cache.map(Cache::new) }
    }
}

impl Sink for StreamSink {
    type Error = Infallible;

    fn opaque(&mut self, bytes: &[u8]) -> Result<(), Infallible> {
        self.out.opaque(bytes)
    }

    fn pages(&mut self, span: Span<'_>, pages: &[Page]) -> Result<(), Infallible> {
        if let Some(cache) = &mut self.cache {
            for (span, page) in span.each().zip(pages) {
                cache.put(span.block, span.first, page);
            }
        }
        self.out.pages(span, pages)
    }

    fn zeros(&mut self, span: Span<'_>, full: bool) -> Result<(), Infallible> {
        if let Some(cache) = &mut self.cache {
            for span in span.each() {
                cache.remove(span.block, span.first);
            }
        }
        self.out.zeros(span, full)
    }

    fn held(&mut self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<bool, Infallible> {
        let page = self.cache.as_ref().and_then(|cache| cache.find(block, index));
        if let Some(page) = page {
            *into = *page;
        }
        Ok(page.is_some())
    }
}
