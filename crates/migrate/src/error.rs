//! Failures as an operator meets them: a stable code, who erred, what happened, what to do.

use std::fmt;

use dwcp_proto::handover::AbortReason;
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

impl From<AbortReason> for Blame {
    fn from(reason: AbortReason) -> Self {
        match reason {
            AbortReason::Cancelled
            | AbortReason::Deadline
            | AbortReason::DowntimeUnreachable
            | AbortReason::Policy
            | AbortReason::Operator => Blame::Operator,
            AbortReason::VmmFailedSource
            | AbortReason::VmmGoneSource
            | AbortReason::VmmFailedDestination
            | AbortReason::VmmGoneDestination
            | AbortReason::StartRefused => Blame::Vmm,
            AbortReason::PeerAborted => Blame::PeerIncompatible,
            AbortReason::Integrity | AbortReason::PeerViolation => Blame::PeerMisbehaving,
            AbortReason::LinkLost => Blame::Link,
            AbortReason::JournalFailed | AbortReason::Resources | AbortReason::AgentRestarted => Blame::Local,
        }
    }
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
        Failure { code: code.to_owned(), blame, message: clean(message.into()), hint: clean(hint.into()) }
    }

    /// A migration that was aborted, of which no more is known than why.
    pub(crate) fn aborted(reason: AbortReason) -> Self {
        let text = format!("the migration was aborted: {reason}");
        Failure::new(reason.code(), reason.into(), text, reason.advice())
    }
}

/// Characters of a message or hint.
const MAX_TEXT: usize = 2000;

/// Texts hold words of peers and VMMs: none may break a log line or a terminal.
pub(crate) fn clean(text: String) -> String {
    let fits = text.len() <= MAX_TEXT && !text.chars().any(char::is_control);
    if fits {
        text
    } else {
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_TEXT).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_inject_a_failure_holds_no_control_characters_and_is_bounded() {
        let failure = Failure::new("x", Blame::Vmm, "a\nERROR \x1b[31mb", "y".repeat(10 * MAX_TEXT));
        assert_eq!(failure.message, "a ERROR  [31mb");
        assert_eq!(failure.hint.len(), MAX_TEXT);
    }
}
