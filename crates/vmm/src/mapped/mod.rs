//! A sink that writes pages into the destination guest's RAM itself, and leaves them out of the VMM's stream.
//!
//! ```text
//! records in stream order ──┬── pages of mapped blocks ──► Ram: the file behind the guest's memory
//!                           │          │ what names a block: as a marker
//!                           └── all other bytes ──► out ──► the VMM's socket
//! ```
//!
//! Where the guest's RAM is a shared file or memfd ([`Ram::open`] finds it), whatever is in it when the VMM has loaded the
//! device state is the guest's memory. QEMU 7.2 and 10.0 do not mind that page records are missing from their stream.
//! Written pages can be read again at once, so they serve as reference for later ones without a copy.
//!
//! # What stays in the stream
//!
//! Everything that is no page of a mapped block: header, sections, block list, small blocks such as ROMs, device state.
//! And *markers*. A record without a name belongs to the block of the record before it, and QEMU remembers that
//! block across sections. So that bytes of the original stream may follow at any time (another path takes over, or
//! the rest is opaque), a record that names a mapped block stays in the stream. But QEMU reads its socket at its
//! own pace, and would overwrite what was written to RAM meanwhile. Therefore each block has one page, its marker, that
//! *only* the stream writes: the first page named. Wherever the original names the block again, the marker is sent
//! again as it is at that point, and the page named is written to RAM.
//!
//! From the stream to a mapped sink there is no way back in one migration: QEMU may still have older pages unread.
//!
//! # Caution
//!
//! No memory is mapped here: pages are written and read with `pwrite` and `pread`, so that a file that shrinks is an
//! error instead of a signal, and the guest's memory never counts as the agent's.

mod find;
mod ram;
mod split;

#[cfg(test)]
mod tests;

use std::borrow::Borrow;
use std::collections::HashMap;
use std::io;

use dwcp_proto::PageIndex;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO};

pub use find::Unmapped;
pub(crate) use find::maps_file;
pub use ram::Ram;
pub(crate) use ram::{Backing, FileId, next_data};
pub use split::Splitter;

/// A page of guest memory.
pub type Page = [u8; PAGE_SIZE];

/// Why a page cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum MappedError {
    /// A page beyond the end of its block: the peer is at fault.
    #[error("page {index} lies beyond RAM block {block}")]
    Beyond {
        /// The block.
        block: String,
        /// The page.
        index: PageIndex,
    },
    /// The file behind the RAM failed.
    #[error("cannot reach the memory behind RAM block {block}")]
    Io {
        /// The block.
        block: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Consecutive page records of one block, as the stream has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The block's name.
    pub block: &'a [u8],
    /// The first page.
    pub first: PageIndex,
    /// How many, at least 1.
    pub count: u32,
    /// Whether the first record carries the block's name; all others continue.
    pub named: bool,
}

/// See the module. Called in the order of the stream.
#[derive(Debug)]
pub struct MappedSink {
    ram: Ram,
    /// By block: the page that only the stream writes, and what it holds.
    markers: HashMap<Box<[u8]>, (PageIndex, Box<Page>)>,
    out: Vec<u8>,
}

impl MappedSink {
    /// A sink for a stream from its beginning.
    pub fn new(ram: Ram) -> Self {
        MappedSink { ram, markers: HashMap::new(), out: Vec::new() }
    }

    /// The names of the blocks whose pages are written to RAM. Of these every page can be read that was written.
    pub fn blocks(&self) -> impl Iterator<Item = &[u8]> {
        self.ram.blocks()
    }

    /// What the VMM is to read, as far as it was not taken yet.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// Bytes that are no page.
    pub fn opaque(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Full-page records with their content, as many as `at` counts.
    pub fn pages(&mut self, at: Pages<'_>, pages: &[Page]) -> Result<(), MappedError> {
        self.content(at, pages, Ram::write)
    }

    /// The same for pages that do not lie beside each other.
    pub fn scattered(&mut self, at: Pages<'_>, pages: &[&Page]) -> Result<(), MappedError> {
        self.content(at, pages, Ram::write_scattered)
    }

    fn content<P: Borrow<Page>>(
        &mut self,
        at: Pages<'_>,
        pages: &[P],
        write: impl Fn(&Ram, &[u8], PageIndex, &[P]) -> Result<(), MappedError>,
    ) -> Result<(), MappedError> {
        if !self.ram.has(at.block) {
            at.each().zip(pages).for_each(|(at, page)| write_page(&mut self.out, at, page.borrow()));
            return Ok(());
        }
        self.ram.check(at.block, at.first, at.count)?;
        self.name(at);
        let Some(marker) = self.marker_within(at) else {
            return write(&self.ram, at.block, at.first, pages);
        };
        let (before, rest) = pages.split_at(pages.len().min(marker as usize));
        write(&self.ram, at.block, at.first, before)?;
        if let Some((page, after)) = rest.split_first() {
            self.mark(at.nth(marker), page.borrow());
            write(&self.ram, at.block, at.nth(marker + 1).first, after)?;
        }
        Ok(())
    }

    /// Pages of zeros: as zero-page records, or where they came as `full` pages, as these.
    pub fn zeros(&mut self, at: Pages<'_>, full: bool) -> Result<(), MappedError> {
        if !self.ram.has(at.block) {
            at.each().for_each(|at| write_zero(&mut self.out, at, full));
            return Ok(());
        }
        self.ram.check(at.block, at.first, at.count)?;
        self.name(at);
        match self.marker_within(at) {
            None => self.ram.zero(at.block, at.first, at.count),
            Some(marker) => {
                self.ram.zero(at.block, at.first, marker)?;
                self.mark(at.nth(marker), &[0; PAGE_SIZE]);
                self.ram.zero(at.block, at.nth(marker + 1).first, at.count - marker - 1)
            }
        }
    }

    /// Reads a page of a mapped block as it is after everything so far; `false` for other blocks.
    pub fn held(&self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<bool, MappedError> {
        if !self.ram.has(block) {
            return Ok(false);
        }
        match self.markers.get(block) {
            Some((marker, page)) if *marker == index => *into = **page,
            _ => self.ram.read(block, index, into)?,
        }
        Ok(true)
    }

    /// Lets the VMM know which block comes next, where the original stream does so.
    fn name(&mut self, at: Pages<'_>) {
        if !at.named {
            return;
        }
        match self.markers.get(at.block) {
            None => drop(self.markers.insert(at.block.into(), (at.first, Box::new([0; PAGE_SIZE])))),
            // It is in this very record.
            Some((marker, _)) if *marker == at.first => {}
            Some((marker, page)) => {
                let again = Pages { first: *marker, count: 1, ..at };
                write_page(&mut self.out, again, page);
            }
        }
    }

    /// How many pages of `at` come before its block's marker, if it is among them.
    fn marker_within(&self, at: Pages<'_>) -> Option<u32> {
        let (marker, _) = self.markers.get(at.block)?;
        let place = marker.0.checked_sub(at.first.0)?;
        u32::try_from(place).ok().filter(|&place| place < at.count)
    }

    /// Sends a new version of the marker at `at`.
    fn mark(&mut self, at: Pages<'_>, page: &Page) {
        write_page(&mut self.out, at, page);
        if let Some((_, held)) = self.markers.get_mut(at.block) {
            **held = *page;
        }
    }
}

impl<'a> Pages<'a> {
    fn each(self) -> impl Iterator<Item = Pages<'a>> {
        (0..self.count).map(move |place| self.nth(place))
    }

    /// The one page at this place.
    fn nth(self, place: u32) -> Self {
        let first = PageIndex(self.first.0.saturating_add(u64::from(place)));
        Pages { first, count: 1, named: self.named && place == 0, ..self }
    }
}

fn write_page(out: &mut Vec<u8>, at: Pages<'_>, page: &Page) {
    write_head(out, at, FLAG_PAGE);
    out.extend_from_slice(page);
}

fn write_zero(out: &mut Vec<u8>, at: Pages<'_>, full: bool) {
    write_head(out, at, if full { FLAG_PAGE } else { FLAG_ZERO });
    out.resize(out.len() + if full { PAGE_SIZE } else { 1 }, 0);
}

/// The record word of a page, and the block's name if it is named.
fn write_head(out: &mut Vec<u8>, at: Pages<'_>, kind: u64) {
    let modifier = if at.named { 0 } else { FLAG_CONTINUE };
    let offset = at.first.0.wrapping_mul(PAGE_SIZE as u64);
    out.extend_from_slice(&(offset | kind | modifier).to_be_bytes());
    if at.named {
        // A name comes out of a table of names of at most 255 bytes.
        out.push(at.block.len() as u8);
        out.extend_from_slice(at.block);
    }
}
