//! Failures as an operator meets them: a stable code, who erred, what happened, what to do.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Who has to act for the next attempt to go better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blame {
    /// The caller: the request cannot be served as it was made.
    Operator,
    /// The hypervisor.
    Vmm,
    /// The peer is of another make: no common version, path or codec.
    PeerIncompatible,
    /// The peer broke the protocol.
    PeerMisbehaving,
    /// The network.
    Link,
    /// This agent or its machine.
    Local,
}

/// A failure of a request or a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable, snake_case; what scripts and alerts match on.
    pub code: String,
    /// Who erred.
    pub blame: Blame,
    /// What happened, in one sentence.
    pub message: String,
    /// What to do, in one sentence; empty where there is nothing.
    pub hint: String,
}

impl Failure {
    /// A failure with a hint.
    pub fn new(code: &str, blame: Blame, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Failure { code: code.to_owned(), blame, message: message.into(), hint: hint.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)?;
        if !self.hint.is_empty() {
            write!(f, " ({})", self.hint)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}
