//! A VMM's stream as it came, split into pages for the guest's RAM and the rest for the VMM's socket.

use dwcp_proto::{PageIndex, RamBlockId};

use super::{MappedError, MappedSink, Page, Pages, Ram};
use crate::stream::{OpaqueReason, Part, Walker};

/// Takes a stream apart and feeds a [`MappedSink`]. Called in the order of the stream, from its beginning on, with stretches that end
/// where an item ends.
///
/// What it does not understand goes to the VMM's socket, and so does all that follows; the VMM can read that on, since the
/// stream it was given names its blocks where the original does.
#[derive(Debug)]
pub struct Splitter {
    walker: Walker,
    sink: MappedSink,
}

/// Consecutive page records of one kind, about to be written.
#[derive(Debug, Clone, Copy)]
struct Run {
    block: RamBlockId,
    first: PageIndex,
    count: u32,
    named: bool,
    zero: bool,
}

impl Run {
    /// Whether a record goes on where this run ends.
    fn goes_on(&self, block: RamBlockId, index: PageIndex, named: bool, zero: bool) -> bool {
        let next = self.first.0.checked_add(u64::from(self.count));
        !named && block == self.block && zero == self.zero && next == Some(index.0)
    }
}

impl Splitter {
    /// For a stream from its beginning.
    pub fn new(ram: Ram) -> Self {
        Splitter { walker: Walker::new(), sink: MappedSink::new(ram) }
    }

    /// Writes the pages of this stretch to RAM; [`take`](Self::take) has the rest.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<(), MappedError> {
        let mut rest = bytes;
        let mut run: Option<Run> = None;
        let mut pages: Vec<&Page> = Vec::new();
        while let Some(part) = self.walker.next(&mut rest) {
            let Part::Page { block, index, named, content } = part else {
                self.write(run.take(), &mut pages)?;
                if let Part::Other(bytes) = part {
                    self.sink.opaque(bytes);
                }
                continue;
            };
            let zero = content.is_none();
            match &mut run {
                Some(run) if run.goes_on(block, index, named, zero) => run.count += 1,
                other => {
                    let before = other.replace(Run { block, first: index, count: 1, named, zero });
                    self.write(before, &mut pages)?;
                }
            }
            pages.extend(content);
        }
        self.write(run, &mut pages)
    }

    /// What the VMM is to read, as far as it was not taken yet.
    pub fn take(&mut self) -> Vec<u8> {
        self.sink.take()
    }

    /// Why the stream is not taken apart any more, once it is not. [`OpaqueReason::DeviceState`] is the regular end of RAM.
    pub fn opaque_reason(&self) -> Option<OpaqueReason> {
        self.walker.opaque_reason()
    }

    fn write(&mut self, run: Option<Run>, pages: &mut Vec<&Page>) -> Result<(), MappedError> {
        let Some(Run { block, first, count, named, zero }) = run else { return Ok(()) };
        let at = Pages { block: self.walker.name(block), first, count, named };
        if zero {
            return self.sink.zeros(at, false);
        }
        let written = self.sink.scattered(at, pages);
        pages.clear();
        written
    }
}
