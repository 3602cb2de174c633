//! The world that the two machines live in: what is in it, and what can happen to it.

use std::collections::VecDeque;

use dwcp_proto::handover::{
    Afterwards, Destination, Input, Outcome, Resolution, Source, Transfer, VmmCommand,
};

use crate::net::{Net, Wire};

pub(crate) const WHOLE: Transfer = Transfer { stream_len: 1, root: [1; 32] };

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}
use Side::{Destination as D, Source as S};

pub(crate) const SIDES: [Side; 2] = [S, D];

impl Side {
    pub(crate) fn peer(self) -> Side {
        if self == S { D } else { S }
    }
}

/// How often each thing may go wrong, per side (source, destination), and what else is tried.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setup {
    pub(crate) name: &'static str,
    pub(crate) guest_ran: bool,
    /// Messages may be lost and are delivered once or more often. Else nothing is ever lost, nor ever forgotten: every message may
    /// be delivered again at any time, which is the worst for safety.
    pub(crate) lossy: bool,
    pub(crate) crashes: [u8; 2],
    pub(crate) deaths: [u8; 2],
    pub(crate) failed_writes: [u8; 2],
    pub(crate) refusals: [u8; 2],
    pub(crate) operator: [u8; 2],
    /// The operator says `peer_fenced` also when it is not so.
    pub(crate) false_claims: bool,
    /// The side may be told to give up, by a cancel or a deadline.
    pub(crate) cancels: [bool; 2],
    /// A restarted agent may at first not reach its VMM.
    pub(crate) mute_vmm: bool,
    pub(crate) on_abort: Afterwards,
    pub(crate) mutant: Option<Mutant>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            name: "straight",
            guest_ran: true,
            lossy: false,
            crashes: [0; 2],
            deaths: [0; 2],
            failed_writes: [0; 2],
            refusals: [0; 2],
            operator: [0; 2],
            false_claims: false,
            cancels: [true; 2],
            mute_vmm: false,
            on_abort: Afterwards::Leave,
            mutant: None,
        }
    }
}

/// Rules broken on purpose, at the border between machine and world. The search must find each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// The source sends its commit when it requests the write, not when the write is durable.
    CommitBeforeJournal,
    /// The source takes a failed commit write for "not committed" and resumes at once.
    FailedWriteIsNoCommit,
    /// The source resumes at a deadline after its commit.
    SourceDeadlineAfterCommit,
    /// A deadline in doubt starts the guest.
    DestinationDeadlineStarts,
    /// `starting` is taken for durable before it is.
    StartingNotDurable,
    /// A guest that may have run is reported as never run.
    LostSaysNeverRan,
    /// The promise never to run is given although it could not be written and the VMM lives.
    UnwrittenPromise,
    /// The destination's VMM is not stopped while incoming.
    NoStopWhileIncoming,
    /// Nothing is sent again at a new connection.
    NoResend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Vmm {
    /// Source: guest as before the migration (running, or paused by its owner).
    Idle,
    /// Source: migrating, guest as before.
    Migrating,
    /// Source: `postmigrate`.
    Post,
    /// Destination: waits for the stream.
    Incoming {
        stopped: bool,
    },
    /// Destination: whole, paused.
    Loaded,
    /// Destination: runs.
    Runs,
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Node {
    pub(crate) vmm: Vmm,
    /// The guest ran on this side after the handover.
    pub(crate) ran: bool,
    /// Durable entries, by their number in the interner.
    pub(crate) disk: Vec<u8>,
    /// A failed write that may be on disk none the less.
    pub(crate) limbo: Option<u8>,
    pub(crate) writes: VecDeque<u8>,
    pub(crate) commands: VecDeque<VmmCommand>,
    pub(crate) answers: VecDeque<Input>,
    /// Commands that a dead agent left in its VMM's socket.
    pub(crate) orphans: VecDeque<VmmCommand>,
    pub(crate) outcome: Option<Outcome>,
    pub(crate) crashes: u8,
    pub(crate) deaths: u8,
    pub(crate) failed_writes: u8,
    pub(crate) refusals: u8,
    pub(crate) operator: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Option<Source>,
    pub(crate) destination: Option<Destination>,
    pub(crate) nodes: [Node; 2],
    pub(crate) net: Net,
    /// The source's VMM has put out its last byte.
    pub(crate) sent_all: bool,
    /// The destination's VMM has loaded it all, and the source was told.
    pub(crate) loaded: bool,
    pub(crate) commit_requested: bool,
    pub(crate) never_ran_said: bool,
    pub(crate) left_to_peer: bool,
    /// An operator said that the peer is fenced; it was not so.
    pub(crate) fenced: bool,
    pub(crate) false_claim: bool,
}

impl World {
    pub(crate) fn source_runs(&self) -> bool {
        matches!(self.nodes[0].vmm, Vmm::Idle | Vmm::Migrating)
    }
}

/// One step of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    Connect,
    Deliver(Wire, Keep),
    Lose(Wire),
    Write(Side),
    /// The write fails; whether it is on disk none the less stays open.
    FailWrite(Side),
    /// The VMM carries out the oldest command.
    Execute(Side),
    Refuse(Side),
    /// The agent hears of the VMM.
    Answer(Side),
    /// A dead agent's command reaches the VMM.
    Orphan(Side),
    /// The agent dies: so many of its writes become durable; its limbo does or not; its commands reach the VMM later or
    /// never; a migration that breaks off completes or not.
    Crash {
        side: Side,
        durable: u8,
        limbo: bool,
        orphans: bool,
        odd: bool,
    },
    /// The agent comes back, and sees its VMM or not.
    Restart {
        side: Side,
        sees: bool,
    },
    /// The destination's agent comes back, and the connection to its VMM has outlived it.
    GoOn,
    /// The VMM dies; the agent still reads the answers before, or not.
    Die {
        side: Side,
        told: bool,
    },
    Complete,
    Load,
    Whole(Side),
    Abort(Side),
    Retry(Side),
    Resolve(Side, Resolution),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    Yes,
    No,
}

impl Event {
    /// Whether it belongs to a fair world: no fault, no one's decision.
    pub(crate) fn fair(&self) -> bool {
        !matches!(
            self,
            Event::Lose(_)
                | Event::FailWrite(_)
                | Event::Refuse(_)
                | Event::Crash { .. }
                | Event::Die { .. }
                | Event::Abort(_)
                | Event::Resolve(..)
        )
    }

    /// Whether the source's side can do it alone, the peer being silent.
    pub(crate) fn source_alone(&self) -> bool {
        matches!(
            self,
            Event::Write(S)
                | Event::Execute(S)
                | Event::Answer(S)
                | Event::Orphan(S)
                | Event::Restart { side: S, .. }
                | Event::Retry(S)
                | Event::Abort(S)
        )
    }
}
