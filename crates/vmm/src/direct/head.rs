//! What QEMU's stream begins with, up to the first page.

use crate::stream::{Item, Layout, OpaqueReason, Parser, SECTION_START, Step};

/// Bytes of a head: header, configuration, and a list of at most some thousand blocks of 265 bytes.
const MAX_HEAD: usize = 1 << 20;

/// Why a stream's beginning cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// Something in it is not understood, and may take part in rounds.
    #[error("QEMU's stream holds more than RAM: {0}")]
    Opaque(OpaqueReason),
    /// No RAM section within the limit.
    #[error("QEMU's stream does not come to its RAM within {MAX_HEAD} bytes")]
    TooLong,
}

/// The beginning of a stream, as it comes: all before the first section with pages.
#[derive(Debug)]
pub struct Head {
    parser: Parser,
    bytes: Vec<u8>,
    parsed: usize,
    footers: bool,
    whole: bool,
}

impl Head {
    /// Nothing yet.
    pub fn new() -> Self {
        Head { parser: Parser::new(), bytes: Vec::new(), parsed: 0, footers: false, whole: false }
    }

    /// Takes the next bytes. True once the head is whole; the rest is of no use then.
    ///
    /// # Errors
    /// The stream is none that can be written without QEMU.
    pub fn take(&mut self, bytes: &[u8]) -> Result<bool, HeadError> {
        if self.whole {
            return Ok(true);
        }
        self.bytes.extend_from_slice(bytes);
        loop {
            let rest = &self.bytes[self.parsed..];
            match self.parser.step(rest) {
                Step::Item(_, Item::Section { .. }) if rest.first() != Some(&SECTION_START) => {
                    self.bytes.truncate(self.parsed);
                    self.whole = true;
                    return Ok(true);
                }
                Step::Item(len, item) => {
                    self.footers |= matches!(item, Item::Footer);
                    self.parsed += len;
                }
                Step::NeedMore if self.bytes.len() > MAX_HEAD => return Err(HeadError::TooLong),
                Step::NeedMore => return Ok(false),
                Step::Opaque(reason) => return Err(HeadError::Opaque(reason)),
            }
        }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The RAM blocks that it lists.
    pub(super) fn layout(&self) -> &Layout {
        &self.parser.layout
    }

    /// The id of RAM's sections.
    pub(super) fn section(&self) -> u32 {
        self.parser.ram_section().unwrap_or_default()
    }

    /// Whether sections have footers.
    pub(super) fn footers(&self) -> bool {
        self.footers
    }
}

impl Default for Head {
    fn default() -> Self {
        Self::new()
    }
}
