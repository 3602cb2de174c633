//! Mechanisms that a test can switch off, to see that it would fail without them.
//!
//! With the feature `fault-points` only, which no released program has; without it each of them is on for good, and nothing is asked.

/// What keeps a guest safe or a migration going, each at one place in the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// A chunk's header has to be signed by the session's source.
    ChunkSignature,
    /// A payload has to be the one that its header was signed for.
    PayloadDigest,
    /// A chunk has to follow the one before it, by its hash and its place in the stream.
    Chain,
    /// Page versions do not go back.
    OldRound,
    /// One number, one chunk.
    Equivocation,
    /// A word of the handover has to be signed by whoever may say it.
    WordSignature,
    /// A receipt has to be for what was delivered.
    Receipt,
    /// Whoever joins a session has to hold its source's key.
    JoinSignature,
    /// A connection that is lost is made again.
    Resume,
    /// Connections on which nothing gets through are given up.
    GiveUp,
    /// A data connection that stalls is noticed.
    Stall,
    /// What was said is said again on a new connection.
    SayAgain,
    /// A restarted agent goes on from its journals.
    Recovery,
    /// A last line that was never written whole does not count.
    TornLine,
    /// What could not be written down was not decided.
    JournalFailure,
    /// A guest that stands still for a lost link is taken back.
    SwitchoverPatience,
    /// Nothing is taken from the VMM that the other side does not take.
    BackPressure,
    /// A migration that was started already is not started again.
    Idempotence,
}

impl Mechanism {
    /// All of them.
    pub const ALL: [Mechanism; 18] = [
        Mechanism::ChunkSignature,
        Mechanism::PayloadDigest,
        Mechanism::Chain,
        Mechanism::OldRound,
        Mechanism::Equivocation,
        Mechanism::WordSignature,
        Mechanism::Receipt,
        Mechanism::JoinSignature,
        Mechanism::Resume,
        Mechanism::GiveUp,
        Mechanism::Stall,
        Mechanism::SayAgain,
        Mechanism::Recovery,
        Mechanism::TornLine,
        Mechanism::JournalFailure,
        Mechanism::SwitchoverPatience,
        Mechanism::BackPressure,
        Mechanism::Idempotence,
    ];

    /// Its name, by which a test switches it off.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::ChunkSignature => "chunk_signature",
            Mechanism::PayloadDigest => "payload_digest",
            Mechanism::Chain => "chain",
            Mechanism::OldRound => "old_round",
            Mechanism::Equivocation => "equivocation",
            Mechanism::WordSignature => "word_signature",
            Mechanism::Receipt => "receipt",
            Mechanism::JoinSignature => "join_signature",
            Mechanism::Resume => "resume",
            Mechanism::GiveUp => "give_up",
            Mechanism::Stall => "stall",
            Mechanism::SayAgain => "say_again",
            Mechanism::Recovery => "recovery",
            Mechanism::TornLine => "torn_line",
            Mechanism::JournalFailure => "journal_failure",
            Mechanism::SwitchoverPatience => "switchover_patience",
            Mechanism::BackPressure => "back_pressure",
            Mechanism::Idempotence => "idempotence",
        }
    }

    /// Whether it was switched off.
    #[cfg(feature = "fault-points")]
    pub fn is_off(self) -> bool {
        OFF.get() == Some(&self)
    }

    /// Whether it was switched off.
    #[cfg(not(feature = "fault-points"))]
    pub const fn is_off(self) -> bool {
        false
    }
}

#[cfg(feature = "fault-points")]
static OFF: std::sync::OnceLock<Mechanism> = std::sync::OnceLock::new();

/// Switches the mechanism of this name off, for the life of the process; false if there is none, or another one is off.
#[cfg(feature = "fault-points")]
pub fn switch_off(name: &str) -> bool {
    let named = Mechanism::ALL.into_iter().find(|mechanism| mechanism.name() == name);
    named.is_some_and(|mechanism| OFF.set(mechanism).is_ok())
}
