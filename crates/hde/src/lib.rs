//! HDE, Hierarchical Delta Encoding: a stretch of a VMM's stream to the payload of a chunk, and back.
//!
//! ```text
//!            Encoder                                               Decoder
//! Segment ──► read: table │ opaque │ pages ──► write: codec ──► payload ──► unpack: codec ──► Content ──► replay ──► Sink
//!               ▲                                                                                          │  ▲
//!             Memory: what the receiver holds                              the VMM's socket and a Cache, or the guest's RAM
//! ```
//!
//! The layers of the hierarchy, from the cheapest:
//! 1. *zero*: a page of zeros costs its share of a run in the table;
//! 2. *unchanged*: a page that is sent again and is what it was;
//! 3. *dedup*: a page with the content of another page;
//! 4. *delta*: a page that is sent again, as the lines that changed;
//! 5. *compression*: every other page, and the changed lines, go through the chunk's [codec](dwcp_proto::Codec).
//!
//! Layers 2 to 4 refer to what the receiver holds. The source remembers that by keyed fingerprints in its [`Memory`],
//! and each reference carries a proof of the whole page, so a reference that is wrong is found out before the page
//! goes anywhere. [`format`](mod@format) specifies the payload byte by byte.
//!
//! Each worker thread owns one [`Encoder`] or one [`Decoder`]: contexts and buffers are reused, so a chunk
//! costs no allocation once they have grown to their bounded size. Reading a segment with a [`Memory`] and replaying
//! have to go in the stream's order; compressing and unpacking need not, but for a lane's chunks: a [`LaneEncoder`] and a [`LaneDecoder`]
//! go from chunk to chunk. This crate does no I/O and knows no clock.
//!
//! A [`Decoder`] takes a [`VerifiedChunk`](dwcp_proto::VerifiedChunk), whose digest and signature were
//! checked. It trusts nothing in it all the same: each length meets a limit of [`dwcp_proto::limits`] before
//! memory is taken for it.

mod codec;
mod content;
mod decode;
mod effort;
mod encode;
mod fingerprint;
pub mod format;
mod held;
mod lane;
mod layout;
mod memory;
mod sample;
mod weigh;
mod zstd_frame;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use content::{Content, Item};
pub use decode::{DecodeError, Decoder, Unpacked};
pub use effort::{Effort, Spent};
pub use encode::{
    Choice, EncodeError, Encoded, Encoder, Fallback, Gathered, LANE_LEVEL, LayerBytes, Reading, Stats,
    Written, verbatim,
};
pub use format::{HDE_VERSION, TableError};
pub use held::{Cache, CacheSize, Page, ReplayError, Sink, Span, StreamSink};
pub use lane::{LaneDecoder, LaneEncoder, LaneError, LaneWindow};
pub use memory::{Holding, Layers, Memory};
pub use weigh::{Glance, Glances, Scales};
pub use zstd_frame::FrameError;
