//! The stream, written from the guest's RAM.

#[cfg(test)]
mod tests;

use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::BorrowedFd;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::record::{FLAG_PAGE, FLAG_ZERO, RECORD_WORD};
use dwcp_proto::{PageIndex, RamBlockId, Segment};
use rustix::io::Errno;

use super::fit::{Fit, Unfit};
use super::head::Head;
use super::track::{TrackError, Tracker};
use crate::mapped::{Backing, next_data};
use crate::stream::output::{Output, Room, block_name, write_head};
use crate::stream::{Cutter, Item, Layout, MAX_ITEM, OpaqueReason, Parser, Step};

/// Pages that one call reads: they are looked at while they are in the processor's cache.
const BATCH: usize = 64;
/// Room that the smallest batch needs: a section's head, a record with a name, a page.
const ROOM: usize = MAX_ITEM + 64;
/// Bytes that QEMU may write while the guest stands still: small blocks as far as they are not zero, and devices.
pub const MAX_REST: usize = 256 << 20;

const ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Pages that are sent at a time of each half of a block.
const TURN: u64 = 2048;

/// Whoever took the segments is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the migration has ended")]
pub struct Gone;

/// Why the RAM could not be read to the end.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// A RAM block of the file is not in QEMU's list, or has another length there.
    #[error("QEMU's stream does not list RAM block {block} as its memory backends do")]
    Layout {
        /// The block.
        block: String,
    },
    /// The file failed, or was cut short.
    #[error("cannot read the memory behind RAM block {block}")]
    Read {
        /// The block.
        block: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Which pages are written cannot be told (any more).
    #[error("cannot tell which pages the guest writes")]
    Track(#[source] io::Error),
    /// The segments are not wanted any more.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The RAM blocks are not those that the head lists, or have other lengths; or a balloon came, which nobody asked after.
    #[error(
        "the VM's memory is no longer what it was when the migration began: memory or a balloon was plugged in or out"
    )]
    Changed,
    /// Something came that writes it unseen.
    #[error("the guest's RAM may not be read directly any more")]
    Unfit(#[source] Box<Unfit>),
    /// What QEMU wrote at the end is not what its beginning promised.
    #[error("QEMU's last words are not understood: {0}")]
    Rest(OpaqueReason),
}

/// Pages of a block, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stretch {
    /// Which of [`Direct::blocks`].
    block: usize,
    first: u64,
    count: u64,
}

/// Pages that were written since they were last sent.
#[derive(Debug, Clone, Default)]
pub struct Dirty {
    stretches: Vec<Stretch>,
    pages: u64,
}

impl Dirty {
    /// How many.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Their bytes.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

/// A block that is read directly.
#[derive(Debug)]
struct Block {
    id: RamBlockId,
    name: Box<[u8]>,
    backing: Backing,
    /// Where it lies in the VMM's process.
    address: u64,
    /// Bit n of the words: page n was last sent as something else than zero. Empty where nobody asks.
    sent: Vec<u64>,
}

/// A guest's RAM, and the stream that is made of it.
#[derive(Debug)]
pub struct Direct {
    blocks: Vec<Block>,
    layout: Layout,
    section: u32,
    output: Output,
    cutter: Cutter,
    tracker: Option<Tracker>,
    /// Pages that the cutter's buffer holds, and how many it shall hold.
    buffered: usize,
    target: usize,
}

impl Direct {
    /// Begins to track, and begins the stream with `head`; chunks hold about `chunk` bytes of pages. `pidfd` is the VMM's process.
    ///
    /// # Errors
    /// The process cannot be attached to, or the head is of another VM.
    pub fn begin(fit: Fit, head: &Head, chunk: usize, pidfd: BorrowedFd<'_>) -> Result<Self, BeginError> {
        let pid = fit.pid;
        let mut direct = Self::over(fit, head, chunk)?;
        let ranges = direct.blocks.iter().map(|block| block.address..block.address + block.backing.len);
        direct.tracker = Some(Tracker::begin(pid, pidfd, ranges.collect())?);
        Ok(direct)
    }

    /// The same without tracking.
    pub(super) fn over(fit: Fit, head: &Head, chunk: usize) -> Result<Self, DirectError> {
        let layout = head.layout().clone();
        let mut blocks = Vec::new();
        for (name, backing) in fit.ram.into_backings() {
            let wrong = || DirectError::Layout { block: shown(&name) };
            let id = layout.id(&name).ok_or_else(wrong)?;
            let used = layout.blocks().get(usize::from(id.0)).map(|block| block.used);
            if used != Some(backing.len) || backing.len % PAGE_SIZE as u64 != 0 {
                return Err(wrong());
            }
            let address = backing.mapping.map_or(0, |mapping| mapping.address);
            let pages = backing.len / PAGE_SIZE as u64;
            let sent = if fit.balloon { vec![0; pages.div_ceil(64) as usize] } else { Vec::new() };
            blocks.push(Block { id, name, backing, address, sent });
        }
        blocks.sort_by_key(|block| block.address);
        let mut output = Output::new();
        output.footers = head.footers();
        // Within a round halves of a block overtake each other.
        let mut cutter = Cutter::merged(chunk);
        let mut bytes = head.bytes();
        while !bytes.is_empty() {
            let taken = cutter.feed(bytes);
            bytes = &bytes[taken..];
        }
        let target = (chunk / PAGE_SIZE).max(1);
        let section = head.section();
        Ok(Direct { blocks, layout, section, output, cutter, tracker: None, buffered: 0, target })
    }

    /// Whether what is read is still all that is to be read, by what a later [`Fit::find`] found.
    ///
    /// # Errors
    /// [`DirectError::Changed`].
    pub fn fits(&self, fit: &Fit) -> Result<(), DirectError> {
        let known = |(name, backing): (&[u8], &Backing)| {
            let same = |block: &Block| {
                *block.name == *name
                    && block.backing.len == backing.len
                    && block.backing.mapping == backing.mapping
            };
            self.blocks.iter().any(same)
        };
        // What was sent as something else than zero was noted only where there was a balloon.
        let noted = !fit.balloon || self.blocks.iter().all(|block| !block.sent.is_empty());
        match fit.ram.backings().count() == self.blocks.len() && fit.ram.backings().all(known) && noted {
            true => Ok(()),
            false => Err(DirectError::Changed),
        }
    }

    /// All pages; those that are written from here on a later [`look`](Self::look) reports.
    ///
    /// # Errors
    /// The kernel does not tell. The VMM may have ended.
    pub fn all(&mut self) -> Result<Dirty, DirectError> {
        self.look()?;
        let both = |(block, b): (usize, &Block)| both_halves(block, b.pages());
        Ok(Dirty::of(self.blocks.iter().enumerate().flat_map(both).collect()))
    }

    /// The pages that were written since the last look.
    ///
    /// # Errors
    /// The kernel does not tell. The VMM may have ended.
    pub fn look(&mut self) -> Result<Dirty, DirectError> {
        let Some(tracker) = &mut self.tracker else { return Ok(Dirty::default()) };
        let written = tracker.written().map_err(DirectError::Track)?;
        Ok(Dirty::of(written.into_iter().flat_map(|range| self.stretches(range)).collect()))
    }

    /// The pages that are holes in their files now and were something else when they were sent. For after the last look.
    ///
    /// # Errors
    /// A file failed.
    pub fn holes(&self) -> Result<Dirty, DirectError> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for (number, block) in self.blocks.iter().enumerate().filter(|(_, block)| !block.sent.is_empty()) {
            let (mut at, pages) = (0, block.pages());
            while at < pages {
                let data = block.data_from(at)?;
                for page in (at..data.unwrap_or(pages).min(pages)).filter(|&page| block.was_sent(page)) {
                    // A balloon may have taken gigabytes.
                    match stretches.last_mut() {
                        Some(last) if last.block == number && last.first + last.count == page => {
                            last.count += 1;
                        }
                        _ => stretches.push(Stretch { block: number, first: page, count: 1 }),
                    }
                }
                let Some(data) = data else { break };
                at = block.hole_from(data)?.max(data + 1);
            }
        }
        Ok(Dirty::of(stretches))
    }

    /// Writes these pages to the stream as they are now. Segments go to `out` as they are filled, in order.
    ///
    /// # Errors
    /// A file cannot be read, or `out` wants no more.
    pub fn written(
        &mut self,
        dirty: &Dirty,
        out: &mut dyn FnMut(Segment) -> Result<(), Gone>,
    ) -> Result<(), DirectError> {
        for stretch in &dirty.stretches {
            let (mut first, mut left) = (stretch.first, stretch.count);
            while left > 0 {
                let some = self.put(stretch.block, first, left)?;
                (first, left) = (first + some, left - some);
                self.drain(out)?;
            }
        }
        self.between();
        self.cutter.flush();
        self.buffered = 0;
        // Pages that are written from here on may have been sent before.
        self.cutter.synchronised();
        Ok(self.drain(out)?)
    }

    /// Takes all that QEMU wrote after the guest stopped, with x-ignore-shared, and ends the stream by it. Returns the stream's length.
    ///
    /// # Errors
    /// It is not what QEMU writes then, or lists other RAM blocks than the head; or `out` wants no more.
    pub fn finish(
        &mut self,
        rest: &[u8],
        out: &mut dyn FnMut(Segment) -> Result<(), Gone>,
    ) -> Result<u64, DirectError> {
        for block in &self.blocks {
            block.check_length()?;
        }
        self.between();
        // Ids of blocks are the parser's from here on.
        self.output.block = None;
        let mut parser = Parser::new();
        let (mut at, mut begun, mut whole) = (0, false, false);
        while at < rest.len() {
            let step = parser.step(&rest[at..]);
            let bytes = match step {
                Step::Item(len, _) => &rest[at..at + len],
                // All from here on is the devices'.
                Step::Opaque(OpaqueReason::DeviceState) if begun => {
                    whole = true;
                    &rest[at..]
                }
                Step::Opaque(reason) => return Err(DirectError::Rest(reason)),
                Step::NeedMore => return Err(DirectError::Rest(OpaqueReason::Truncated)),
            };
            at += bytes.len();
            match step {
                // What stands before the first pages is in the head already.
                Step::Item(_, Item::Section { .. }) if !begun => {
                    begun = bytes[0] != crate::stream::SECTION_START;
                    // The list is complete by now, and it is the head's that the destination was told.
                    if begun && !same_blocks(&parser.layout, &self.layout) {
                        return Err(DirectError::Changed);
                    }
                }
                Step::Item(_, Item::Page(page)) if begun => {
                    self.make_room(out)?;
                    let mut room = Room { bytes: self.cutter.buffer(), len: 0 };
                    self.output.page(page, bytes, &parser.layout, &mut room);
                    let len = room.len;
                    self.cutter.filled(len);
                    continue;
                }
                _ => {}
            }
            let mut bytes = if begun { bytes } else { &[] };
            while !bytes.is_empty() {
                let taken = self.cutter.feed(bytes);
                bytes = &bytes[taken..];
                self.drain(out)?;
            }
        }
        // Whether the devices' state is whole is QEMU's to say.
        if !whole {
            return Err(DirectError::Rest(OpaqueReason::Truncated));
        }
        let length = self.cutter.offset().0;
        self.cutter.finish();
        self.drain(out)?;
        Ok(length)
    }

    /// These pages of a block, by its number.
    #[cfg(test)]
    pub(super) fn place(&self, block: usize, first: u64, count: u64) -> Dirty {
        Dirty::of(vec![Stretch { block, first, count }])
    }

    /// Puts the first of `count` pages into the buffer; returns how many.
    fn put(&mut self, block: usize, first: u64, count: u64) -> Result<u64, DirectError> {
        if self.cutter.buffer().len() < ROOM || self.buffered >= self.target {
            self.cutter.flush();
            self.buffered = 0;
        }
        let block = &mut self.blocks[block];
        let room = self.cutter.buffer();
        let mut room = Room { bytes: room, len: 0 };
        if self.output.place == crate::stream::output::Place::Outside {
            self.output.begin_ours(self.section, &mut room);
        }
        let name = (self.output.block != Some(block.id)).then(|| block_name(&self.layout, block.id));
        self.output.block = Some(block.id);
        let named = name.map_or(0, |name| 1 + name.len());
        let fitting = (room.left() - named) / (RECORD_WORD + PAGE_SIZE);
        let some = (count.min(BATCH as u64) as usize).min(fitting).min(self.target - self.buffered);
        // A hole costs no look at its pages.
        let data = if block.backing.tells_holes { block.data_from(first)? } else { Some(first) };
        let hole = data.map_or(some as u64, |data| data - first).min(some as u64) as usize;
        if hole > 0 {
            for page in 0..hole as u64 {
                let name = name.filter(|_| page == 0);
                room.page(PageIndex(first + page), FLAG_ZERO, name, &[0]);
                block.note(first + page, false);
            }
            let len = room.len;
            self.cutter.filled(len);
            return Ok(hole as u64);
        }
        let start = room.len;
        let place = &mut room.bytes[start..start + named + some * (RECORD_WORD + PAGE_SIZE)];
        block.read(first, named, place)?;
        let (mut from, mut to, mut full) = (0, 0, 0);
        for page in 0..some {
            let name = name.filter(|_| page == 0);
            let head = RECORD_WORD + if page == 0 { named } else { 0 };
            let index = PageIndex(first + page as u64);
            let zero = place[from + head..from + head + PAGE_SIZE] == ZERO;
            let body = if zero { 1 } else { PAGE_SIZE };
            if to != from && !zero {
                place.copy_within(from + head..from + head + body, to + head);
            }
            if zero {
                place[to + head] = 0;
            }
            write_head(&mut place[to..to + head], index, if zero { FLAG_ZERO } else { FLAG_PAGE }, name);
            block.note(index.0, !zero);
            from += head + PAGE_SIZE;
            to += head + body;
            full += usize::from(!zero);
        }
        self.buffered += full;
        self.cutter.filled(start + to);
        Ok(some as u64)
    }

    /// Ends the section that is open.
    fn between(&mut self) {
        if self.cutter.buffer().len() < ROOM {
            self.cutter.flush();
        }
        let mut room = Room { bytes: self.cutter.buffer(), len: 0 };
        self.output.leave(Some(self.section), &mut room);
        let len = room.len;
        self.cutter.filled(len);
    }

    fn make_room(&mut self, out: &mut dyn FnMut(Segment) -> Result<(), Gone>) -> Result<(), Gone> {
        if self.cutter.buffer().len() < ROOM {
            self.cutter.flush();
            self.drain(out)?;
        }
        Ok(())
    }

    fn drain(&mut self, out: &mut dyn FnMut(Segment) -> Result<(), Gone>) -> Result<(), Gone> {
        while let Some(segment) = self.cutter.pop() {
            out(segment)?;
        }
        Ok(())
    }

    /// The pages in a range of the process's addresses.
    fn stretches(&self, range: Range<u64>) -> Vec<Stretch> {
        let within = |(number, block): (usize, &Block)| {
            let (start, end) = (block.address, block.address + block.backing.len);
            let (from, to) = (range.start.max(start), range.end.min(end));
            (from < to).then(|| {
                let first = (from - start) / PAGE_SIZE as u64;
                let count = (to - start).div_ceil(PAGE_SIZE as u64) - first;
                Stretch { block: number, first, count }
            })
        };
        self.blocks.iter().enumerate().filter_map(within).collect()
    }
}

/// Whether both list the same blocks, in the same order.
fn same_blocks(one: &Layout, other: &Layout) -> bool {
    let (one, other) = (one.blocks(), other.blocks());
    one.len() == other.len() && one.iter().zip(other).all(|(a, b)| a.name == b.name && a.used == b.used)
}

/// All pages of a block, in turns from its first and from its second half. Much of a guest's RAM is often zero, or copies, over long stretches, most at
/// one end: where that comes last the link waits for whoever finds out, and where it comes between pages that fill the link nobody waits.
fn both_halves(block: usize, pages: u64) -> Vec<Stretch> {
    let half = pages.div_ceil(2).next_multiple_of(TURN).min(pages);
    let turns = |from: u64, to: u64| {
        (from..to).step_by(TURN as usize).map(move |first| Stretch {
            block,
            first,
            count: TURN.min(to - first),
        })
    };
    let (mut first, mut second) = (turns(0, half), turns(half, pages));
    std::iter::from_fn(|| {
        let pair = [first.next(), second.next()];
        pair.iter().any(Option::is_some).then_some(pair)
    })
    .flatten()
    .flatten()
    .collect()
}

/// Why a guest's RAM is not read directly after all.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// It is not what it seemed.
    #[error(transparent)]
    Direct(#[from] DirectError),
    /// Its writes cannot be tracked.
    #[error(transparent)]
    Track(#[from] TrackError),
}

impl Dirty {
    /// These pages and those, once each, in the order of their places.
    pub fn and(self, other: Dirty) -> Dirty {
        let mut all: Vec<Stretch> = self.stretches.into_iter().chain(other.stretches).collect();
        all.sort_unstable_by_key(|stretch| (stretch.block, stretch.first));
        let mut joined: Vec<Stretch> = Vec::with_capacity(all.len());
        for next in all {
            match joined
                .last_mut()
                .filter(|last| last.block == next.block && next.first <= last.first + last.count)
            {
                Some(last) => last.count = last.count.max(next.first + next.count - last.first),
                None => joined.push(next),
            }
        }
        Dirty::of(joined)
    }

    fn of(stretches: Vec<Stretch>) -> Self {
        let pages = stretches.iter().map(|stretch| stretch.count).sum();
        Dirty { stretches, pages }
    }
}

impl Block {
    fn pages(&self) -> u64 {
        self.backing.len / PAGE_SIZE as u64
    }

    /// Reads the pages that fill `place`, each behind the room for its record's word, the first one behind that for a name, too.
    fn read(&self, first: u64, named: usize, place: &mut [u8]) -> Result<(), DirectError> {
        let mut at = self.backing.offset + first * PAGE_SIZE as u64;
        let (_, rest) = place.split_at_mut(named);
        let mut parts: Vec<IoSliceMut<'_>> = rest
            .chunks_exact_mut(RECORD_WORD + PAGE_SIZE)
            .map(|record| IoSliceMut::new(&mut record[RECORD_WORD..]))
            .collect();
        let mut parts = &mut parts[..];
        while !parts.is_empty() {
            match rustix::io::preadv(&self.backing.file, parts, at) {
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => {
                    at += read as u64;
                    IoSliceMut::advance_slices(&mut parts, read);
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        Ok(())
    }

    /// What lies beyond the end of a file that was cut short looks like a hole.
    fn check_length(&self) -> Result<(), DirectError> {
        let len = self.backing.file.metadata().map_err(|error| self.failed(error))?.len();
        match len.checked_sub(self.backing.offset) {
            Some(len) if len >= self.backing.len => Ok(()),
            _ => Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// The first page from `page` on that is in no hole.
    fn data_from(&self, page: u64) -> Result<Option<u64>, DirectError> {
        let at = self.backing.offset + page * PAGE_SIZE as u64;
        let data = next_data(&self.backing.file, at).map_err(|error| self.failed(error))?;
        Ok(data.map(|data| (data - self.backing.offset) / PAGE_SIZE as u64))
    }

    /// The first page from `page` on that is in a hole.
    fn hole_from(&self, page: u64) -> Result<u64, DirectError> {
        let at = self.backing.offset + page * PAGE_SIZE as u64;
        let hole = rustix::fs::seek(&self.backing.file, rustix::fs::SeekFrom::Hole(at))
            .map_err(|error| self.failed(error.into()))?;
        Ok((hole - self.backing.offset).div_ceil(PAGE_SIZE as u64))
    }

    fn note(&mut self, page: u64, full: bool) {
        if let Some(word) = self.sent.get_mut((page / 64) as usize) {
            let bit = 1 << (page % 64);
            *word = if full { *word | bit } else { *word & !bit };
        }
    }

    fn was_sent(&self, page: u64) -> bool {
        self.sent.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1)
    }

    fn failed(&self, source: io::Error) -> DirectError {
        DirectError::Read { block: shown(&self.name), source }
    }
}

fn shown(block: &[u8]) -> String {
    String::from_utf8_lossy(block).into_owned()
}
