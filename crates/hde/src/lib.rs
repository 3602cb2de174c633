//! HDE, Hierarchical Delta Encoding: a stretch of a VMM's stream to the payload of a chunk, and back.
//!
//! ```text
//!            Encoder                                               Decoder
//! Segment ──► table │ opaque │ pages ──► codec ──► payload ──► codec ──► Content ──► write_stream: the bytes
//!             of records, like by like    raw, lz4, zstd                       └──► items: pages for mapped RAM
//! ```
//!
//! The layers of the hierarchy, from the cheapest: a *zero* page costs nothing but its share of a run in the
//! table; every other page goes through the chunk's [codec](dwcp_proto::Codec), chosen per chunk.
//! [`format`](mod@format) specifies the payload byte by byte and names the layers that have a reserved place.
//!
//! Each worker thread owns one [`Encoder`] or one [`Decoder`]: contexts and buffers are reused, so a chunk
//! costs no allocation once they have grown to their bounded size. This crate does no I/O and knows no clock.
//!
//! A [`Decoder`] takes a [`VerifiedChunk`](dwcp_proto::VerifiedChunk), whose digest and signature were
//! checked. It trusts nothing in it all the same: each length meets a limit of [`dwcp_proto::limits`] before
//! memory is taken for it.

mod codec;
mod content;
mod decode;
mod encode;
pub mod format;
mod layout;
mod sample;
mod zstd_frame;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

pub use content::{Content, Item};
pub use decode::{DecodeError, Decoder};
pub use encode::{Choice, EncodeError, Encoded, Encoder, Fallback, Stats};
pub use format::{HDE_VERSION, TableError};
pub use zstd_frame::FrameError;
