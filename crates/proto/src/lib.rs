//! The DWCP v3 protocol without I/O, clock or randomness.
//!
//! The vocabulary every other crate speaks ([`ids`], [`record`], [`limits`]), and the protocol itself.

pub mod identity;
pub mod ids;
pub mod limits;
pub mod record;

pub use identity::{KeyError, NodeKey, PeerKey};
pub use ids::*;
pub use record::{BlockNames, Record, Run, Segment};
