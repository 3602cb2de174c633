//! The DWCP v3 protocol without I/O, clock or randomness.
//!
//! | module | what it holds |
//! |---|---|
//! | [`ids`], [`record`], [`limits`], [`identity`] | the vocabulary that every other crate speaks |
//! | [`chunk`] | the unit that is hashed and signed: `EncodedChunk -> SealedChunk -> VerifiedChunk` |
//! | [`frame`], [`message`] | what follows what on a connection; the sequence of a migration |
//! | [`negotiate`], [`session`] | what both sides agree on, and the id that binds everything signed later to it |
//! | [`sender`], [`receiver`], [`pace`] | the state machines of path v3 |
//! | [`leg`], [`path`], [`mode`] | how a running migration changes its path or its mode, and when |
//! | [`forecast`] | what a migration would take |
//! | [`buffers`] | memory that is used again |
//! | [`fault`] | what a test can switch off |
//! | [`units`] | sizes, rates and durations as people write them |

pub mod buffers;
pub mod chunk;
pub mod fault;
pub mod forecast;
pub mod frame;
pub mod handover;
pub mod identity;
pub mod ids;
pub mod journal;
pub mod leg;
pub mod limits;
pub mod message;
pub mod mode;
pub mod negotiate;
pub mod pace;
pub mod path;
pub mod receiver;
pub mod record;
pub mod sender;
pub mod session;
pub mod signed;
pub mod units;

pub use chunk::{ChunkHeader, Codec, EncodedChunk, Payload, SealedChunk, Sealer, VerifiedChunk, Verifier};
pub use identity::{KeyError, NodeKey, PeerKey};
pub use ids::*;
pub use leg::Leg;
pub use negotiate::{Mode, Path};
pub use record::{BlockNames, Record, Run, Segment};
pub use session::Side;
