//! One live migration end to end, and the engine that runs all of a node's.
//!
//! ```text
//! Engine ── prepare_incoming ─► destination: waits for hello, receives, hands over
//!        └─ migrate ──────────► source: plan, session, precopy, switchover, handover
//!
//! source:       VMM ─► ingest ─► chunks (v3) | bytes (v1) ─► connections
//! destination:  connections ─► chunks | bytes ─► VMM
//! both:         control (messages, reconnection) ─► pilot (handover machine, journal, VMM commands)
//! ```
//!
//! The decisions are made by the state machines of `dwcp-proto`; this crate gives them I/O and a clock. Codec work runs on a
//! bounded pool of plain threads, everything else on tokio.

mod bucket;
pub mod config;
mod control;
mod counters;
mod destination;
pub mod engine;
pub mod error;
mod estimate;
mod explain;
mod fair;
mod fault;
mod guest;
mod handshake;
mod hde;
mod inquiry;
mod journal;
pub mod metrics;
mod pilot;
mod pool;
mod probe;
mod process;
mod reception;
mod recovery;
mod reins;
mod report;
mod retry;
mod shared;
mod source;
pub mod spec;
pub mod status;
mod throttle;
mod transport;
mod wire;

pub use config::{
    CheckReport, Congestion, EngineConfig, FlagReason, Gate, Hde, Limits, Policy, Running, Transport,
    V1Policy, Verdict,
};
pub use engine::Engine;
pub use error::{Blame, Failure};
pub use estimate::Estimate;
pub use metrics::Metrics;
