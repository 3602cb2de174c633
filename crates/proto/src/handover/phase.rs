//! Where each machine stands.

/// Where the source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourcePhase {
    /// `prepared` is being written; the VMM is untouched.
    Preparing,
    /// The VMM migrates.
    Migrating,
    /// Everything is at the destination; its receipt is awaited.
    Delivered,
    /// As `Delivered`, but this side's VMM has died: the destination holds the only copy.
    SourceLost,
    /// `commit` is being written.
    Committing,
    /// The guest is the destination's; its word is awaited. In doubt while the peer is unreachable.
    Committed,
    /// A commit is or may be on disk and is being taken back. In doubt while neither journal nor peer answers.
    Withdrawing,
    /// Decided against; the VMM's migration is being cancelled and the guest resumed.
    Restoring,
    /// Ended: the guest is here.
    Aborted,
    /// Ended: the guest is the destination's.
    Moved,
    /// Ended: the guest died at the destination after it ran, or may have.
    Lost,
}

impl SourcePhase {
    /// The stable name, in snake_case.
    pub fn name(self) -> &'static str {
        match self {
            SourcePhase::Preparing => "preparing",
            SourcePhase::Migrating => "migrating",
            SourcePhase::Delivered => "delivered",
            SourcePhase::SourceLost => "source_lost",
            SourcePhase::Committing => "committing",
            SourcePhase::Committed => "committed",
            SourcePhase::Withdrawing => "withdrawing",
            SourcePhase::Restoring => "restoring",
            SourcePhase::Aborted => "aborted",
            SourcePhase::Moved => "moved",
            SourcePhase::Lost => "lost",
        }
    }

    /// Whether this is an end.
    pub fn ended(self) -> bool {
        matches!(self, SourcePhase::Aborted | SourcePhase::Moved | SourcePhase::Lost)
    }
}

/// Where the destination stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationPhase {
    /// `accepted` is being written; the VMM is untouched.
    Preparing,
    /// The VMM is told not to start by itself.
    Arming,
    /// The stream flows.
    Receiving,
    /// The guest is whole; `receipt` is being written.
    Signing,
    /// The receipt is out: only the source's word, the death of the VMM, or an operator ends this.
    InDoubt,
    /// Committed; `starting` is being written.
    Starting {
        /// Whether the guest shall run, or stay paused as it was.
        run: bool,
    },
    /// `cont` is issued, or the VMM is asked whether it was.
    Resuming,
    /// The VMM refused `cont`; a retry, a deadline or an operator goes on.
    StartRefused,
    /// Decided against; the promise never to run the guest is being made good.
    Dropping,
    /// Ended: the guest never ran here and never will, or it is lost.
    Dropped,
    /// Ended: the guest is here.
    Moved,
}

impl DestinationPhase {
    /// The stable name, in snake_case.
    pub fn name(self) -> &'static str {
        match self {
            DestinationPhase::Preparing => "preparing",
            DestinationPhase::Arming => "arming",
            DestinationPhase::Receiving => "receiving",
            DestinationPhase::Signing => "signing",
            DestinationPhase::InDoubt => "in_doubt",
            DestinationPhase::Starting { .. } => "starting",
            DestinationPhase::Resuming => "resuming",
            DestinationPhase::StartRefused => "start_refused",
            DestinationPhase::Dropping => "dropping",
            DestinationPhase::Dropped => "dropped",
            DestinationPhase::Moved => "moved",
        }
    }

    /// Whether this is an end.
    pub fn ended(self) -> bool {
        matches!(self, DestinationPhase::Dropped | DestinationPhase::Moved)
    }
}
