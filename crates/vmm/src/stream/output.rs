//! The stream that is put out: which section is open, and what its last page was.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_CONTINUE, FLAG_PAGE, FLAG_ZERO, RECORD_WORD};
use dwcp_proto::{PageIndex, RamBlockId};

use super::layout::Layout;
use super::parse::{FLAG_EOS, PageItem, SECTION_FOOTER, SECTION_PART};

/// What stands in the stream that is put out.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) place: Place,
    /// The end of the main channel's section, which is held back.
    pub(crate) held: Option<End>,
    /// Whether sections have footers.
    pub(crate) footers: bool,
    /// The block of the last page.
    pub(crate) block: Option<RamBlockId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Between sections.
    Outside,
    /// In a section of the main channel.
    Theirs,
    /// In a section of our own.
    Ours,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Eos,
    Footer,
}

impl Output {
    pub(crate) fn new() -> Self {
        Output { place: Place::Outside, held: None, footers: false, block: None }
    }

    /// Begins a section of our own.
    pub(crate) fn begin_ours(&mut self, section: u32, room: &mut Room<'_>) {
        room.put(&[SECTION_PART]);
        room.put(&section.to_be_bytes());
        self.place = Place::Ours;
    }

    /// Ends the section that is open, if its end is known or it is ours: something else follows.
    pub(crate) fn leave(&mut self, section: Option<u32>, room: &mut Room<'_>) {
        let end = match (self.place, self.held.take()) {
            (Place::Theirs, Some(end)) => end,
            (Place::Ours, _) if self.footers => End::Footer,
            (Place::Ours, _) => End::Eos,
            _ => return,
        };
        room.put(&FLAG_EOS.to_be_bytes());
        if let (End::Footer, Some(section)) = (end, section) {
            room.put(&[SECTION_FOOTER]);
            room.put(&section.to_be_bytes());
        }
        self.place = Place::Outside;
    }

    /// A page of the main channel. What it calls the last page's block may not be that any more.
    pub(crate) fn page(&mut self, page: PageItem, bytes: &[u8], layout: &Layout, room: &mut Room<'_>) {
        let names = page.continued && self.block != Some(page.block);
        if names {
            let body = &bytes[RECORD_WORD.min(bytes.len())..];
            let flag = if page.zero { FLAG_ZERO } else { FLAG_PAGE };
            room.page(page.index, flag, Some(block_name(layout, page.block)), body);
        } else {
            room.put(bytes);
        }
        self.block = Some(page.block);
    }
}

/// Where output goes. Whoever puts something there has made sure that it fits.
pub(crate) struct Room<'a> {
    pub(crate) bytes: &'a mut [u8],
    pub(crate) len: usize,
}

impl Room<'_> {
    pub(crate) fn left(&self) -> usize {
        self.bytes.len() - self.len
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    pub(crate) fn page(&mut self, page: PageIndex, flag: u64, name: Option<&[u8]>, body: &[u8]) {
        let head = RECORD_WORD + name.map_or(0, |name| 1 + name.len());
        write_head(&mut self.bytes[self.len..self.len + head], page, flag, name);
        self.len += head;
        self.put(body);
    }
}

/// The head of a page's record, as long as the place.
pub(crate) fn write_head(place: &mut [u8], page: PageIndex, flag: u64, name: Option<&[u8]>) {
    let (word, after) = place.split_at_mut(RECORD_WORD);
    let modifier = if name.is_some() { 0 } else { FLAG_CONTINUE };
    // Within its block, so the product is less than a block's length.
    let offset = page.0 * PAGE_SIZE as u64;
    word.copy_from_slice(&(offset | flag | modifier).to_be_bytes());
    if let (Some(name), Some((len, place))) = (name, after.split_first_mut()) {
        // At most 255: it came with one byte of length.
        *len = name.len() as u8;
        place.copy_from_slice(name);
    }
}

pub(crate) fn block_name(layout: &Layout, block: RamBlockId) -> &[u8] {
    layout.names().name(block).unwrap_or_default()
}
