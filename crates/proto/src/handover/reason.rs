//! Why a migration ended without moving the guest: stable codes for the wire, the journal, metrics and scripts.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $advice:literal;)*) => {
        /// Why a migration ended without moving the guest. The set only grows; a code never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum AbortReason {
            $($(#[$doc])* #[serde(rename = $code)] $name,)*
        }

        impl AbortReason {
            /// Every reason, in the order of declaration.
            pub const ALL: &[AbortReason] = &[$(AbortReason::$name,)*];

            /// The stable code, in snake_case.
            pub fn code(self) -> &'static str {
                match self { $(AbortReason::$name => $code,)* }
            }

            /// What happened and what to do about it, for people.
            pub fn advice(self) -> &'static str {
                match self { $(AbortReason::$name => $advice,)* }
            }

            /// The reason with this code, or `None` if this build does not know it.
            pub fn from_code(code: &str) -> Option<Self> {
                match code { $($code => Some(AbortReason::$name),)* _ => None }
            }
        }
    };
}

reasons! {
    /// An operator or the orchestrator cancelled.
    Cancelled = "cancelled", "cancelled on request; start it again when wanted";
    /// The migration's own deadline passed before commit.
    Deadline = "deadline", "not finished in time; allow more time or more bandwidth";
    /// The dirty rate never allowed the downtime that was asked for.
    DowntimeUnreachable = "downtime_unreachable", "the guest writes faster than the link carries; raise the downtime limit or lower the load";
    /// The link stayed down past its deadline.
    LinkLost = "link_lost", "the peer could not be reached; check the network between the nodes";
    /// The source's VMM refused or failed its migration.
    VmmFailedSource = "vmm_failed_source", "the source's VMM reported an error; see its log";
    /// The source's VMM process ended.
    VmmGoneSource = "vmm_gone_source", "the source's VMM process ended, and the guest with it; see its log";
    /// The destination's VMM refused or failed.
    VmmFailedDestination = "vmm_failed_destination", "the destination's VMM reported an error; see its log and compare both VMMs' configuration";
    /// The destination's VMM process ended before it ran the guest.
    VmmGoneDestination = "vmm_gone_destination", "the destination's VMM process ended before the guest ran there; see its log";
    /// The destination's VMM holds the whole guest and refuses to run it.
    StartRefused = "start_refused", "the destination's VMM refused to run the guest; check its disks and their locks";
    /// A decision could not be made durable.
    JournalFailed = "journal_failed", "the journal could not be written; check the state folder's disk before the next migration";
    /// Bytes, digests or signatures do not match.
    Integrity = "integrity", "what arrived is not what was sent; look for a faulty or hostile node or link";
    /// The peer broke the protocol.
    PeerViolation = "peer_violation", "the peer broke the protocol; compare both nodes' versions";
    /// The peer ended it for a reason that this build does not know.
    PeerAborted = "peer_aborted", "the peer ended it; its log says why";
    /// Local policy forbids it.
    Policy = "policy", "policy forbids this migration; see [policy] in the configuration";
    /// This node has no room for it.
    Resources = "resources", "not enough memory, descriptors or slots; retry later or raise [limits]";
    /// The agent restarted before commit; an unfinished migration is taken back.
    AgentRestarted = "agent_restarted", "the agent restarted half-way and took the migration back; start it again";
    /// An operator decided by `resolve`.
    Operator = "operator", "an operator resolved it";
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_snake_case_and_the_same_everywhere() {
        for (i, reason) in AbortReason::ALL.iter().enumerate() {
            let code = reason.code();
            assert!(code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{code}");
            assert_eq!(AbortReason::from_code(code), Some(*reason));
            assert_eq!(serde_json::to_string(reason).unwrap(), format!("\"{code}\""));
            assert_eq!(AbortReason::ALL.iter().position(|r| r.code() == code), Some(i));
            assert!(reason.advice().len() > 10);
        }
        assert_eq!(AbortReason::from_code("no_such"), None);
    }
}
