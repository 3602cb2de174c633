//! The feature flag as a node sees it: may this migration use v3?
//!
//! ```text
//!  bytes --FlagDocument::parse()--> FlagDocument --FlagState::apply()--> FlagState --decide()--> Reason --path()--> Path
//!                                                   ^ epoch rule          ^ now: Moment, breaker, peer
//! ```
//!
//! - [`FlagDocument`]: what the operator wrote, or a server served.
//! - [`FlagChange`], [`NodeList`]: what an operator asks a server for.
//! - [`bucket()`]: where a node stands in a percentage.
//! - [`Lease`]: for how long an answer of a server holds.
//! - [`ofrep`]: a server that evaluates the flag itself.
//! - [`Schedule`]: when to poll a server, and at which of its endpoints.
//! - [`Comeback`]: when migrations that left v3 may return to it.
//! - [`FlagState`]: what this node knows at the moment. It starts in v1, and what it read from its disk can only restrict.
//! - [`poll`]: what a node and a flag server say to each other.
//! - [`Reason`]: the decision with its cause; the path follows from it, so the two cannot differ.
//!
//! There is no I/O, no clock and no randomness here: bytes and times come in as arguments.

mod bucket;
mod change;
mod comeback;
mod document;
mod lease;
pub mod ofrep;
pub mod poll;
mod schedule;
mod state;
#[cfg(test)]
mod tests;
mod text;

pub use bucket::bucket;
pub use change::{FlagChange, NodeList};
pub use comeback::Comeback;
pub use document::{BadDocument, Epoch, Fault, FlagDocument, OnStale, Percentage};
pub use lease::{LEASE, Lease, Moment};
pub use schedule::{ANSWER_TIMEOUT, LONGEST_PAUSE, POLL_TIMEOUT, Schedule, handshake_timeout};
pub use state::{Absence, Applied, Conditions, Evaluation, FlagState, Path, Reason, Refusal, Scope, Source};

/// The flag that the agent obeys.
pub const FEATURE: &str = "dwcp_v3_hde";

/// Bytes of a flag document: room for the longest lists of the longest names.
pub const MAX_DOCUMENT: usize = 1 << 20;

/// Nodes in one list of a document. Twice as many as this with 64 characters each, quoted, fit into [`MAX_DOCUMENT`].
pub const MAX_NODES: usize = 6_000;

/// Characters of a node's name, as everywhere in DWCP.
pub const MAX_NODE_NAME: usize = 64;
