//! Who owns the guest: the handover between two agents, as two state machines without I/O and clock.
//!
//! [`Source`] and [`Destination`] take an [`Input`] and leave [`Action`]s to be carried out in order. Deadlines,
//! retries and the outcome of every journal write and VMM command are inputs. The messages are those that the frame
//! layer has verified: signed by the session's peer, bound to the session.
//!
//! ```text
//! loop { machine.handle(input)?; while let Some(action) = machine.poll_action() { carry it out } }
//! ```
//!
//! # The idea
//! A guest has one owner at any time: the source until its journal says `commit`, the destination afterwards. Between
//! its receipt and the commit the destination is *in doubt*: it holds a whole guest and may not run it.
//!
//! ```text
//! source                                                       destination
//!   prepared*                                                    accepted*, `stop` while incoming
//!   VMM migrates  ───────────── the VMM's stream ──────────────▶ VMM loads
//!   VMM in postmigrate                                           VMM completed and paused
//!                 ◀───────────────── Receipt ─────────────────── receipt*                        (in doubt)
//!   commit*       ────────────────── Commit ───────────────────▶ starting*, `cont`
//!                 ◀───────────────── Running ─────────────────── running*, `announce-self`
//!   done*         ────────────────── Settled ──────────────────▶ may forget
//!                                                                      * durable in the journal before the next step
//! ```
//!
//! # Source
//! ```text
//! Preparing ─prepared*─▶ Migrating ─whole─▶ Delivered ─receipt─▶ Committing ─commit*─▶ Committed ─Running─▶ Moved
//!     │                      │                  │ VMM gone           │ write failed,      │  │
//!     │ any failure, cancel, deadline           ▼                    │ cancel, deadline   │  └─Lost──────▶ Lost
//!     ▼                      ▼               SourceLost ─receipt─▶   ▼                    │
//!  Restoring ◀───────────────┴─────────────────┘  Committing     Withdrawing ◀──resolve───┤
//!     │ VMM runs, stays paused, or is gone                           │ aborted* while     │
//!     ▼                                                              │ Commit was never   │
//!  Aborted ◀───────────────────── Restoring ◀────────────────────────┴─sent; or NeverRan◀─┘
//! ```
//! - Before the commit's write is *requested* the journal replays to "abort" whatever is written later, so a failure
//!   resumes the guest at once, also with a full or hanging disk; `aborted` is written beside it, not before it.
//! - Once it is requested nothing resumes the guest but: `aborted` durable while `Commit` was never sent; the
//!   destination's `NeverRan`; or an operator. A failed fsync leaves the entry's fate open, so it counts as requested: the
//!   machine is [`Withdrawing`](SourcePhase::Withdrawing), writes `aborted`, and sends `Abort`, whichever works first.
//! - A source VMM that dies after all was delivered leaves the only copy at the destination: cancel and deadlines are then
//!   ignored by name, and the commit goes on (even unwritten: a guest that is gone cannot run twice).
//! - `Commit` is sent again at each connection until the destination's last word: `Running`, `NeverRan` or `Lost`.
//!
//! # Destination
//! ```text
//! Preparing ─accepted*─▶ Arming ─stopped─▶ Receiving ─whole─▶ Signing ─receipt*─▶ InDoubt ─Commit─▶ Starting
//!     │                     │                 │                  │                   │                 │ starting*
//!     │  any failure, cancel, deadline, Abort │                  │   Abort, VMM gone │                 ▼
//!     ▼                     ▼                 ▼                  ▼                   ▼     gone     Resuming ⇄ StartRefused
//!  Dropping ◀───────────────┴─────────────────┴──────────────────┴───────────────────┴──────┴──────────┤
//!     │ never_ran*, or the VMM proven gone                                                             ▼ runs
//!     ▼                                                                                              Moved
//!  Dropped: answers NeverRan (Lost, if the guest may have run)
//! ```
//! - In doubt only `Commit`, `Abort`, the death of its own VMM, or an operator counts. The receipt sent again is the
//!   question to the source.
//! - `NeverRan` is a promise for ever. It is given only when the guest certainly did not run here, and when it certainly
//!   will not: the promise is durable, or the VMM is gone. Where the journal fails the VMM is therefore quit, whatever
//!   the policy says.
//! - `cont` *refused* (an error from a VMM that stands paused) is not "may have run": the machine waits in
//!   [`StartRefused`](DestinationPhase::StartRefused) for a retry; a deadline or cancel there gives the guest back with
//!   `NeverRan`. After a restart with `starting` in the journal that is no longer certain (the life before may
//!   have run the guest, and an I/O error or an operator paused it since), so then only a retry or an operator helps. A VMM that dies after
//!   `cont` was issued ends in `Lost`, never in `NeverRan`.
//!
//! # Invariants
//! 1. Never two running copies, in no interleaving of crashes, losses and failed writes (an operator's false
//!    `peer_fenced` excepted).
//! 2. The source's guest runs, or can be resumed by it alone, until `commit` is requested.
//! 3. `NeverRan` only if it never ran and never will.
//! 4. From every state a fair network and live VMMs lead to one running guest and two ended machines.
//! 5. Every state is named, each input is taken, ignored with a reason ([`Ignored`]) or refused by name ([`Refused`]).
//!
//! `tests/handover_model` checks them exhaustively.
//!
//! # Contract with the driver
//! - Actions are carried out in order. [`Action::Journal`] is answered by `Journaled` or `JournalFailed`, in the order of the
//!   writes; after a failure the file is cut back to its last durable length before the next write.
//! - VMM commands are answered as [`VmmCommand`] says; [`VmmState::Gone`] comes unasked too, and means *proven*: the
//!   process has ended. "Cannot be reached" is not gone.
//! - A message that cannot be sent is dropped; `Connected` brings it back.
//! - A finished machine, or one recovered from its journal, goes on answering the peer until [`Source::settled`].
//! - One unfinished migration per VM: a journal without `done` may command its VMM when it is recovered.

mod destination;
mod phase;
mod reason;
mod source;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use destination::Destination;
pub use phase::{DestinationPhase, SourcePhase};
pub use reason::AbortReason;
pub use source::Source;

use crate::journal::Entry;

/// The whole transfer, as one side saw it. Both sides must have seen the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Transfer {
    /// Bytes of the VMM's stream, or of what stands in for it.
    pub stream_len: u64,
    /// Digest over everything that was transferred.
    #[serde(with = "crate::journal::hex32")]
    pub root: [u8; 32],
}

impl Transfer {
    /// What a commit names: BLAKE3 (derive_key) over length (u64, little-endian) and root.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_derive_key("dwcp v3 2026 handover receipt");
        hash.update(&self.stream_len.to_le_bytes());
        hash.update(&self.root);
        *hash.finalize().as_bytes()
    }
}

/// A verified message between the two machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    /// Destination: I hold the whole guest, paused. Sent again it asks for the source's decision.
    Receipt(Transfer),
    /// Source: the guest is yours.
    Commit {
        /// [`Transfer::digest`] of the receipt.
        receipt: [u8; 32],
        /// Whether the guest shall run; a guest that was paused stays so.
        run: bool,
    },
    /// Source: drop it. Takes effect unless a commit came first.
    Abort(AbortReason),
    /// Destination: the guest never ran here and never will.
    NeverRan(AbortReason),
    /// Destination: the guest is mine; it runs (or stays paused, as it was).
    Running,
    /// Destination: the VMM is gone, and the guest may have run.
    Lost,
    /// Source: your last word is on record; you may forget.
    Settled,
}

/// What a VMM does with its guest, as observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmmState {
    /// Destination: waits for or reads the stream (`inmigrate`), start suppressed by `stop`.
    Incoming,
    /// Whole and paused, not by the migration at the source; `completed` and `paused` at the destination.
    Paused,
    /// Source: stopped by the migration (`postmigrate`, `finish-migrate`, or the agent's own `stop`).
    Stopped,
    /// The guest runs.
    Running,
    /// The process has ended, proven.
    Gone,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// The oldest unanswered journal write is durable.
    Journaled,
    /// It failed: it may be on disk or not.
    JournalFailed,
    /// This side has the whole guest. Source: VMM in `postmigrate` and all bytes acknowledged as applied. Destination: VMM
    /// `completed` and `paused`, all applied.
    Whole(Transfer),
    /// From the peer.
    Message(Message),
    /// The link to the peer stands, for the first time or again.
    Connected,
    /// Answer to a [`VmmCommand`]; unasked only [`VmmState::Gone`].
    Vmm(VmmState),
    /// The VMM answered a command with an error and stands as it stood. A timeout is no answer.
    VmmRefused,
    /// Cancel, a deadline, or a failure anywhere else in the migration.
    Abort(AbortReason),
    /// Try again what failed (from a timer).
    Retry,
    /// An operator decides.
    Resolve(Resolution),
}

/// What the driver has to do, in order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Action {
    /// Append to the journal durably (fsync), then answer.
    Journal(Entry),
    /// Sign and send; drop it if there is no link.
    Send(Message),
    /// Command this side's VMM.
    Vmm(VmmCommand),
    /// Tell the operator: log, status, metric.
    Alarm(Alarm),
    /// This side has ended. Comes again if an operator resolves a migration that had ended as lost.
    Finish(Outcome),
}

/// Commands to the VMM, and how each is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmmCommand {
    /// Source: begin. No answer; a failure is [`Input::Abort`].
    StartMigration,
    /// Source: cancel if a migration is active, wait for its end, answer the state (also if none was active).
    CancelMigration,
    /// Destination: QMP `stop` while `inmigrate`. [`VmmState::Incoming`] once done.
    StopWhileIncoming,
    /// Destination: the stream may flow. No answer; a failure is [`Input::Abort`].
    AcceptStream,
    /// QMP `cont`. [`VmmState::Running`] at RESUME.
    Cont,
    /// QMP `announce-self`. No answer.
    AnnounceSelf,
    /// Answer the state, as soon as the VMM can be asked.
    Query,
    /// End the VMM. [`VmmState::Gone`] once the process has ended.
    Quit,
}

/// What becomes of a VMM that no longer holds the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Afterwards {
    /// It stays as it is.
    Leave,
    /// It is told to quit.
    Quit,
}

/// An operator's decision where the machines may not decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "snake_case")]
pub enum Resolution {
    /// The guest runs on this side.
    StartHere {
        /// The operator's word that the peer's VMM has ended and stays so.
        peer_fenced: bool,
    },
    /// This side never runs the guest, whatever the peer does.
    LeaveToPeer,
}

/// How one side ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The guest is the destination's.
    Moved,
    /// The guest is the source's (or died with the source's VMM: then `vmm_gone_source` is the reason, or in the alarms).
    Aborted(AbortReason),
    /// The guest started at the destination, or may have, and is gone there. The source's VMM still holds its state of
    /// the handover; only an operator may run it.
    Lost,
}

/// Something an operator must know although no decision depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alarm {
    /// Both sides claim the guest: somebody's `peer_fenced` was false, or somebody started a VMM by hand.
    Conflict,
    /// The guest runs although this side's journal does not allow it.
    ForeignStart,
    /// Left to the peer by an operator, and the peer will never run it.
    NobodyRuns,
    /// The guest died with this side's VMM.
    GuestGone,
    /// A decision could not be written; the machine holds.
    JournalFailing,
    /// The operator's decision could not be recorded, so it was not obeyed.
    ResolveNotRecorded,
    /// The source's VMM refuses to cancel or to resume.
    RestoreRefused,
    /// The destination's VMM refuses to run the guest.
    StartRefused,
    /// The VMM refuses to quit.
    QuitRefused,
}

impl Alarm {
    /// The stable code, in snake_case.
    pub fn code(self) -> &'static str {
        match self {
            Alarm::Conflict => "conflict",
            Alarm::ForeignStart => "foreign_start",
            Alarm::NobodyRuns => "nobody_runs",
            Alarm::GuestGone => "guest_gone",
            Alarm::JournalFailing => "journal_failing",
            Alarm::ResolveNotRecorded => "resolve_not_recorded",
            Alarm::RestoreRefused => "restore_refused",
            Alarm::StartRefused => "start_refused",
            Alarm::QuitRefused => "quit_refused",
        }
    }
}

/// The input was legal and changed nothing, or an input had a part without effect; why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ignored {
    /// Said before.
    Duplicate,
    /// The commit is decided; only the destination's word or an operator ends it now.
    CommitDecided,
    /// In doubt: neither cancel nor deadline counts. The source decides, or `resolve`.
    InDoubt,
    /// The only copy is at the destination; aborting would lose the guest.
    OnlyCopyAtPeer,
    /// It is ending already.
    Ending,
    /// It has ended.
    Ended,
    /// Nothing waits for a retry.
    NothingToRetry,
    /// The step that this belongs to is over.
    Late,
}

/// How an input was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Handled {
    /// It had its effect.
    Taken,
    /// It had none, and should not.
    Ignored(Ignored),
}

/// An input that must not happen in this phase. The machine is unchanged, save for a question to the peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The peer's fault: end the session, with [`Input::Abort`]`(`[`AbortReason::PeerViolation`]`)`.
    #[error("the peer broke the protocol: {message} while {phase}")]
    Violation {
        /// What came.
        message: &'static str,
        /// Where this side stood.
        phase: &'static str,
    },
    /// The driver's fault.
    #[error("{input} while {phase}: the driver is out of step")]
    Unexpected {
        /// What came.
        input: &'static str,
        /// Where this side stood.
        phase: &'static str,
    },
    /// The operator must fence the peer first.
    #[error(
        "the peer may still run the guest: end its VMM for good, then say --peer-fenced; the peer was asked meanwhile"
    )]
    PeerNotFenced,
    /// Nothing is in doubt here.
    #[error("{phase}: nothing for an operator to resolve; use cancel, or wait")]
    NotInDoubt {
        /// Where this side stands.
        phase: &'static str,
    },
    /// Another decision is being written.
    #[error("a decision is being written; try again in a moment")]
    Busy,
}

/// A journal from which no state follows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the journal decides nothing: {0}; resolve it by hand")]
pub struct BadJournal(pub(crate) &'static str);

impl Message {
    fn name(&self) -> &'static str {
        match self {
            Message::Receipt(_) => "receipt",
            Message::Commit { .. } => "commit",
            Message::Abort(_) => "abort",
            Message::NeverRan(_) => "never_ran",
            Message::Running => "running",
            Message::Lost => "lost",
            Message::Settled => "settled",
        }
    }
}
