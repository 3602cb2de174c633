//! (being laid)
pub mod engine;
pub mod error;
pub mod metrics;
pub mod spec;
pub mod status;

pub use engine::{CheckReport, Engine, EngineConfig, Gate, Limits, Policy, V1Policy};
pub use error::{Blame, Failure};
