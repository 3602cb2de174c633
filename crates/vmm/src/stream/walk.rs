//! Goes over a stream whose bytes are at hand, item by item, without a copy.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{PageIndex, RamBlockId};

use super::parse::{Item, OpaqueReason, Parser, Step};

/// What a stretch of the stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// No guest page.
    Other(&'a [u8]),
    /// A record of a page; without content one of zeros.
    Page {
        /// Its block: [`Walker::name`].
        block: RamBlockId,
        /// Its place in the block.
        index: PageIndex,
        /// Whether the record carries the block's name.
        named: bool,
        /// What is in it.
        content: Option<&'a [u8; PAGE_SIZE]>,
    },
}

/// Takes a stream apart that comes in stretches of whole items, as [`Segment`](dwcp_proto::Segment)s are. A stretch that ends within
/// an item makes all that follows opaque, as anything else does that is not understood.
#[derive(Debug)]
pub struct Walker {
    parser: Parser,
    opaque: Option<OpaqueReason>,
}

impl Walker {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        Walker { parser: Parser::new(), opaque: None }
    }

    /// The next part of `rest`, which is what is left of the stretch; `None` at its end.
    pub fn next<'a>(&mut self, rest: &mut &'a [u8]) -> Option<Part<'a>> {
        if rest.is_empty() {
            return None;
        }
        let step = match self.opaque {
            Some(reason) => Step::Opaque(reason),
            None => self.parser.step(rest),
        };
        let (len, item) = match step {
            Step::Item(len, item) => (len, item),
            Step::NeedMore => return Some(self.give_up(rest, OpaqueReason::Truncated)),
            Step::Opaque(reason) => return Some(self.give_up(rest, reason)),
        };
        let (bytes, after) = rest.split_at(len.min(rest.len()));
        *rest = after;
        Some(match item {
            Item::Page(page) => Part::Page {
                block: page.block,
                index: page.index,
                named: !page.continued,
                content: if page.zero { None } else { bytes.last_chunk() },
            },
            _ => Part::Other(bytes),
        })
    }

    /// The name of a block that a part named.
    pub fn name(&self, block: RamBlockId) -> &[u8] {
        self.parser.layout.names().name(block).unwrap_or_default()
    }

    /// Why the stream is opaque from some point on, once it is.
    pub fn opaque_reason(&self) -> Option<OpaqueReason> {
        self.opaque
    }

    fn give_up<'a>(&mut self, rest: &mut &'a [u8], reason: OpaqueReason) -> Part<'a> {
        self.opaque = Some(reason);
        Part::Other(std::mem::take(rest))
    }
}

impl Default for Walker {
    fn default() -> Self {
        Self::new()
    }
}
