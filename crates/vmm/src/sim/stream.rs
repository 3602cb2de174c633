//! The simulated guest as a QEMU migration stream, and back.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{PageIndex, RamBlockId, Segment};

use super::guest::{CpuState, SimBlock, SimGuest};
use super::writer::StreamWriter;
use crate::stream::{Cutter, OpaqueReason, Piece, SerialiseError, pieces};

/// Name of the section with all that is not RAM.
const DEVICE: &str = "sim-guest";
/// The JSON that follows the stream's EOF.
const DESCRIPTION: &str = "{\"devices\": []}";
/// Bytes after RAM that a destination takes.
const MAX_TAIL: usize = 64 << 10;
/// Bytes of RAM that a destination takes.
const MAX_RAM: u64 = 5 << 30;

/// The machine type of simulated guests.
pub const MACHINE: &str = "pc-i440fx-7.2";

/// Writes a guest's migration, slice by slice; the guest may run between the slices.
#[derive(Debug)]
pub struct SimSource {
    writer: StreamWriter,
    /// By block and page: to be sent in this round.
    pending: Vec<Vec<bool>>,
    left: u64,
    next: (usize, usize),
    round: u64,
}

impl SimSource {
    /// Begins a migration: all pages are to be sent, and the guest's writes are noted from now on.
    pub fn begin(guest: &mut SimGuest) -> Self {
        guest.track();
        let pending: Vec<_> = guest.ram().iter().map(|b| vec![true; b.bytes.len() / PAGE_SIZE]).collect();
        let mut writer = StreamWriter::new();
        writer.header();
        writer.configuration(MACHINE);
        writer.ram_start(guest.ram().iter().map(|b| (b.name.as_bytes(), b.bytes.len() as u64)));
        let left = pending.iter().map(|pages| pages.len() as u64).sum();
        SimSource { writer, pending, left, next: (0, 0), round: 1 }
    }

    /// The next bytes of the stream: at most `pages` pages of this round, empty once the round is over.
    pub fn slice(&mut self, guest: &SimGuest, pages: usize) -> Vec<u8> {
        if self.left > 0 {
            self.writer.ram_part(false);
            self.send(guest, pages);
            self.writer.section_end();
        }
        self.writer.take()
    }

    /// Begins the next round with what the guest wrote since this one began; returns the pages in it.
    pub fn next_round(&mut self, guest: &mut SimGuest) -> u64 {
        self.left = guest.collect(&mut self.pending);
        self.next = (0, 0);
        self.round += 1;
        self.left
    }

    /// The round, counted from 1.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// Pages left in this round.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The end of the stream: the last round, device state, EOF. The guest must not run any more.
    pub fn finish(mut self, guest: &mut SimGuest) -> Vec<u8> {
        self.next_round(guest);
        guest.untrack();
        self.writer.ram_part(true);
        self.send(guest, usize::MAX);
        self.writer.section_end();
        // A structure of numbers always becomes JSON.
        let cpu = serde_json::to_vec(&guest.cpu()).unwrap_or_default();
        let state = [&(cpu.len() as u32).to_be_bytes()[..], &cpu].concat();
        self.writer.device(DEVICE, &state);
        self.writer.eof(DESCRIPTION);
        self.writer.take()
    }

    fn send(&mut self, guest: &SimGuest, most: usize) {
        let mut sent = 0;
        let (first_block, mut page) = self.next;
        for block in first_block..self.pending.len() {
            let SimBlock { name, bytes } = &guest.ram()[block];
            while page < self.pending[block].len() {
                if sent == most {
                    self.next = (block, page);
                    return;
                }
                if std::mem::take(&mut self.pending[block][page]) {
                    let contents = &bytes[page * PAGE_SIZE..][..PAGE_SIZE];
                    self.writer.page(name.as_bytes(), page as u64, contents);
                    self.left -= 1;
                    sent += 1;
                }
                page += 1;
            }
            page = 0;
        }
        self.next = (self.pending.len(), 0);
    }
}

/// A stream that does not become a guest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SimError {
    /// The stream ended early, or went on after its end.
    #[error("the stream ended before the guest was whole")]
    Incomplete,
    /// Not understood.
    #[error("the stream cannot be understood: {0}")]
    Opaque(OpaqueReason),
    /// Records that do not fit their bytes.
    #[error("bad segment")]
    Segment(#[from] SerialiseError),
    /// A page outside of the blocks, or too much RAM.
    #[error("page or block out of bounds")]
    Bounds,
    /// Device state that is none.
    #[error("bad device state")]
    Device,
    /// The RAM is not the one that the source had.
    #[error("the guest's memory is not the one that was sent")]
    Memory,
}

/// Takes a stream in and becomes a guest.
#[derive(Debug)]
pub struct SimDestination {
    cutter: Cutter,
    blocks: Vec<SimBlock>,
    tail: Vec<u8>,
}

impl Default for SimDestination {
    fn default() -> Self {
        Self::new()
    }
}

impl SimDestination {
    /// A destination that has received nothing.
    pub fn new() -> Self {
        SimDestination { cutter: Cutter::new(256 << 10), blocks: Vec::new(), tail: Vec::new() }
    }

    /// Takes bytes of the stream and applies what is whole.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), SimError> {
        while !bytes.is_empty() {
            bytes = &bytes[self.cutter.feed(bytes)..];
            self.apply_all()?;
        }
        self.cutter.flush();
        self.apply_all()
    }

    /// The guest, once the stream has come to its end; `None` before.
    pub fn guest(&mut self) -> Result<Option<SimGuest>, SimError> {
        let Some(cpu) = device_state(&self.tail)? else { return Ok(None) };
        let guest = SimGuest::restore(std::mem::take(&mut self.blocks), cpu);
        guest.map(Some).ok_or(SimError::Memory)
    }

    /// Bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.cutter.offset().0
    }

    fn apply_all(&mut self) -> Result<(), SimError> {
        match self.cutter.opaque_reason() {
            None | Some(OpaqueReason::DeviceState) => {}
            Some(reason) => return Err(SimError::Opaque(reason)),
        }
        if self.blocks.is_empty() {
            let layout = self.cutter.layout();
            if layout.ram_bytes() > MAX_RAM {
                return Err(SimError::Bounds);
            }
            // The list arrives piece by piece; blocks are made with the first segment behind it.
            let blocks = layout.blocks().iter().map(|block| SimBlock {
                name: String::from_utf8_lossy(&block.name).into_owned(),
                bytes: vec![0; block.used as usize],
            });
            if self.cutter.in_ram() {
                self.blocks = blocks.collect();
            }
        }
        while let Some(segment) = self.cutter.pop() {
            self.apply(&segment)?;
        }
        Ok(())
    }

    fn apply(&mut self, segment: &Segment) -> Result<(), SimError> {
        let tail_from = self.cutter.opaque_from().map_or(u64::MAX, |from| from.0);
        for piece in pieces(segment) {
            match piece? {
                Piece::Opaque(_) => {}
                Piece::Page { block, index, bytes, .. } => self.page(block, index)?.copy_from_slice(bytes),
                Piece::Zero { block, index, .. } => self.page(block, index)?.fill(0),
            }
        }
        if segment.end().0 > tail_from {
            let skip = tail_from.saturating_sub(segment.offset.0) as usize;
            self.tail.extend_from_slice(&segment.bytes[skip..]);
            if self.tail.len() > MAX_TAIL {
                return Err(SimError::Device);
            }
        }
        Ok(())
    }

    fn page(&mut self, block: RamBlockId, index: PageIndex) -> Result<&mut [u8], SimError> {
        let block = self.blocks.get_mut(usize::from(block.0)).ok_or(SimError::Bounds)?;
        let at = index.0 as usize * PAGE_SIZE;
        block.bytes.get_mut(at..at + PAGE_SIZE).ok_or(SimError::Bounds)
    }
}

/// What follows RAM: the device section, EOF and the description. `None` while it is not whole.
fn device_state(tail: &[u8]) -> Result<Option<CpuState>, SimError> {
    let mut frame = StreamWriter::new();
    frame.device(DEVICE, &[]);
    let frame = frame.take();
    // The section's head, then state and footer.
    let (head, footer) = frame.split_at(frame.len() - 5);
    let Some((at, len)) =
        tail.split_at_checked(head.len()).and_then(|(at, rest)| Some((at, rest.first_chunk()?)))
    else {
        return Ok(None);
    };
    let len = u32::from_be_bytes(*len) as usize;
    if at != head || len > MAX_TAIL {
        return Err(SimError::Device);
    }
    let mut end = StreamWriter::new();
    end.raw(footer);
    end.eof(DESCRIPTION);
    let rest = &tail[head.len() + 4..];
    if rest.len() < len + end.bytes().len() {
        return Ok(None);
    }
    let (cpu, rest) = rest.split_at(len);
    if rest != end.bytes() {
        return Err(SimError::Device);
    }
    serde_json::from_slice(cpu).map(Some).map_err(|_| SimError::Device)
}

#[cfg(test)]
mod tests {
    use super::super::GuestSpec;
    use super::*;

    fn migrate(guest: &mut SimGuest, rounds: u64) -> Vec<u8> {
        let mut source = SimSource::begin(guest);
        let mut stream = Vec::new();
        while source.round() <= rounds {
            match source.slice(guest, 64) {
                bytes if bytes.is_empty() => drop(source.next_round(guest)),
                bytes => stream.extend_from_slice(&bytes),
            }
            guest.step();
        }
        stream.extend_from_slice(&source.finish(guest));
        stream
    }

    #[test]
    fn a_guest_arrives_as_it_was_and_goes_on_as_it_would_have() {
        let mut guest = SimGuest::new(GuestSpec { pages: 512, ..GuestSpec::default() });
        let stream = migrate(&mut guest, 4);
        for size in [1000, 4096, stream.len()] {
            let mut destination = SimDestination::new();
            let mut pieces = stream.chunks(size).peekable();
            while let Some(piece) = pieces.next() {
                destination.feed(piece).unwrap();
                if pieces.peek().is_some_and(|last| size == 1000 || last.len() == size) {
                    assert!(destination.guest().unwrap().is_none());
                }
            }
            let mut moved = destination.guest().unwrap().unwrap();
            let mut stayed = guest.clone();
            assert_eq!(moved.ram(), stayed.ram());
            (0..10).for_each(|_| {
                moved.step();
                stayed.step();
            });
            assert_eq!((moved.ram(), moved.steps()), (stayed.ram(), stayed.steps()));
        }
    }

    #[test]
    fn a_changed_page_does_not_become_a_guest() {
        let mut guest = SimGuest::new(GuestSpec { pages: 64, zero_percent: 0, ..GuestSpec::default() });
        let mut stream = migrate(&mut guest, 1);
        // Within the last page of the main block, which is not hot and so is sent once.
        let at = 40 * 4104;
        stream[at] ^= 1;
        let mut destination = SimDestination::new();
        let outcome = destination.feed(&stream).and_then(|()| destination.guest().map(drop));
        assert!(outcome.is_err());
    }
}
