//! QEMU's main-channel migration stream: cut into segments, looked into, put together again. No I/O.
//!
//! ```text
//! bytes, any chunking --> Cutter --> Segment { bytes as they came, records: where the pages are }
//!                                        |  pieces()                    ^
//!                                        v                              |  equal
//!                               pages, zeros, opaque --> serialise() ---'
//! ```
//!
//! What the parser does not understand it passes on: from the first such byte to the end the stream is
//! [opaque](OpaqueReason).

mod cutter;
mod layout;
pub(crate) mod output;
mod parse;
mod serialise;
#[cfg(test)]
mod tests;
mod walk;

pub(crate) use parse::{FLAG_MULTIFD_FLUSH, Item, MAX_ITEM, PageItem, Parser, SECTION_START, Step};

pub use cutter::Cutter;
pub use layout::{Layout, StreamBlock};
pub use parse::OpaqueReason;
pub use serialise::{Piece, SerialiseError, content, pieces, serialise};
pub use walk::{Part, Walker};
