//! The world that the two machines live in: VMMs, disks, a network, and everything that can go wrong.

use std::cell::RefCell;
use std::collections::VecDeque;

use dwcp_proto::handover::{
    AbortReason, Action, Afterwards, Alarm, Destination, DestinationPhase, Handled, Input, Message, Outcome,
    Refused, Resolution, Source, SourcePhase, Transfer, VmmCommand, VmmState,
};
use dwcp_proto::ids::{MigrationId, NodeName, SessionId, VmName};
use dwcp_proto::journal::{Accepted, Entry, Job, Prepared};

pub(crate) const WHOLE: Transfer = Transfer { stream_len: 1, root: [1; 32] };

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}
use Side::{Destination as D, Source as S};

pub(crate) const SIDES: [Side; 2] = [S, D];

impl Side {
    fn peer(self) -> Side {
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
    limbo: Option<u8>,
    writes: VecDeque<u8>,
    commands: VecDeque<VmmCommand>,
    answers: VecDeque<Input>,
    /// Commands that a dead agent left in its VMM's socket.
    orphans: VecDeque<VmmCommand>,
    pub(crate) outcome: Option<Outcome>,
    crashes: u8,
    deaths: u8,
    failed_writes: u8,
    refusals: u8,
    operator: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Option<Source>,
    pub(crate) destination: Option<Destination>,
    pub(crate) nodes: [Node; 2],
    pub(crate) net: Net,
    /// The source's VMM has put out its last byte.
    sent_all: bool,
    /// The destination's VMM has loaded it all, and the source was told.
    loaded: bool,
    pub(crate) commit_requested: bool,
    pub(crate) never_ran_said: bool,
    pub(crate) left_to_peer: bool,
    /// An operator said that the peer is fenced; it was not so.
    pub(crate) fenced: bool,
    pub(crate) false_claim: bool,
}

/// The set of messages in flight, a bit each. Their content is the same in all of a model's runs, save for the reasons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Net(u64);

impl Net {
    fn iter(self) -> impl Iterator<Item = Wire> {
        (0..64).filter(move |bit| self.0 >> bit & 1 == 1).map(Wire)
    }

    fn insert(&mut self, wire: Wire) {
        self.0 |= 1 << wire.0;
    }

    fn remove(&mut self, wire: Wire) -> bool {
        let before = self.0;
        self.0 &= !(1 << wire.0);
        self.0 != before
    }
}

/// A message, by its bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Wire(u8);

impl Wire {
    const ABORT: u8 = 5;
    const NEVER_RAN: u8 = 32;

    fn new(message: &Message) -> Self {
        Wire(match message {
            Message::Receipt(_) => 0,
            Message::Commit { .. } => 1,
            Message::Running => 2,
            Message::Lost => 3,
            Message::Settled => 4,
            Message::Abort(reason) => Self::ABORT + *reason as u8,
            Message::NeverRan(reason) => Self::NEVER_RAN + *reason as u8,
        })
    }

    fn message(self, run: bool) -> Message {
        match self.0 {
            0 => Message::Receipt(WHOLE),
            1 => Message::Commit { receipt: WHOLE.digest(), run },
            2 => Message::Running,
            3 => Message::Lost,
            4 => Message::Settled,
            bit if bit < Self::NEVER_RAN => Message::Abort(AbortReason::ALL[usize::from(bit - Self::ABORT)]),
            bit => Message::NeverRan(AbortReason::ALL[usize::from(bit - Self::NEVER_RAN)]),
        }
    }

    fn to(self) -> Side {
        match self.message(true) {
            Message::Commit { .. } | Message::Abort(_) | Message::Settled => D,
            Message::Receipt(_) | Message::NeverRan(_) | Message::Running | Message::Lost => S,
        }
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.message(true) {
            Message::Receipt(_) => f.write_str("Receipt"),
            Message::Commit { .. } => f.write_str("Commit"),
            message => write!(f, "{message:?}"),
        }
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

/// What the world checks at each step.
pub(crate) type Step = Result<Option<World>, String>;

pub(crate) struct Model {
    pub(crate) setup: Setup,
    entries: RefCell<Vec<Entry>>,
}

impl Model {
    pub(crate) fn new(setup: Setup) -> Self {
        Model { setup, entries: RefCell::default() }
    }

    pub(crate) fn start(&self) -> Result<World, String> {
        let setup = &self.setup;
        let node = |side: Side, vmm| Node {
            vmm,
            ran: false,
            disk: Vec::new(),
            limbo: None,
            writes: VecDeque::new(),
            commands: VecDeque::new(),
            answers: VecDeque::new(),
            orphans: VecDeque::new(),
            outcome: None,
            crashes: setup.crashes[side as usize],
            deaths: setup.deaths[side as usize],
            failed_writes: setup.failed_writes[side as usize],
            refusals: setup.refusals[side as usize],
            operator: setup.operator[side as usize],
        };
        let job = Job {
            migration: MigrationId::new("m").map_err(|e| e.to_string())?,
            vm: VmName::new("v").map_err(|e| e.to_string())?,
            peer: NodeName::new("n").map_err(|e| e.to_string())?,
            qmp: "q".into(),
            session: SessionId([0; 32]),
            path: "v3".into(),
            started_unix_ms: 0,
        };
        let prepared =
            Prepared { job: job.clone(), guest_ran: setup.guest_ran, on_success: Afterwards::Quit };
        let mut world = World {
            source: Some(Source::new(prepared)),
            destination: Some(Destination::new(Accepted { job, on_abort: setup.on_abort })),
            nodes: [node(S, Vmm::Idle), node(D, Vmm::Incoming { stopped: false })],
            net: Net(0),
            sent_all: false,
            loaded: false,
            commit_requested: false,
            never_ran_said: false,
            left_to_peer: false,
            fenced: false,
            false_claim: false,
        };
        self.drain(&mut world, S)?;
        self.drain(&mut world, D)?;
        Ok(world)
    }

    /// Every event that might happen; [`Model::step`] sorts out those that cannot.
    pub(crate) fn events(&self, world: &World) -> Vec<Event> {
        let mut events = vec![Event::Connect, Event::Complete, Event::Load];
        for wire in world.net.iter() {
            if self.setup.lossy {
                let deliver = [Keep::Yes, Keep::No].map(|keep| Event::Deliver(wire, keep));
                events.extend(deliver.into_iter().chain([Event::Lose(wire)]));
            } else {
                events.push(Event::Deliver(wire, Keep::Yes));
            }
        }
        for side in SIDES {
            let node = &world.nodes[side as usize];
            events.extend([
                Event::Write(side),
                Event::FailWrite(side),
                Event::Execute(side),
                Event::Refuse(side),
            ]);
            events.extend([Event::Answer(side), Event::Orphan(side), Event::Whole(side)]);
            events.extend([true, false].map(|told| Event::Die { side, told }));
            events.extend([Event::Retry(side), Event::Restart { side, sees: true }]);
            if self.setup.mute_vmm {
                events.push(Event::Restart { side, sees: false });
            }
            if self.setup.cancels[side as usize] {
                events.push(Event::Abort(side));
            }
            if node.operator > 0 {
                let truths = [[false, false], [false, true]][usize::from(
                    self.setup.false_claims || world.nodes[side.peer() as usize].vmm == Vmm::Gone,
                )];
                let starts = truths.map(|peer_fenced| Resolution::StartHere { peer_fenced });
                let decisions = starts.into_iter().chain([Resolution::LeaveToPeer]);
                events.extend(decisions.map(|decision| Event::Resolve(side, decision)));
            }
            if node.crashes > 0 {
                for durable in 0..=node.writes.len() as u8 {
                    for bits in 0..8u8 {
                        let [limbo, orphans, odd] = [1, 2, 4].map(|bit| bits & bit != 0);
                        events.push(Event::Crash { side, durable, limbo, orphans, odd });
                    }
                }
            }
        }
        events
    }

    /// What follows from `event`: `None` if it cannot happen or changes nothing, an error if a rule is broken.
    pub(crate) fn step(&self, world: &World, event: Event) -> Step {
        if self.idle(world, event) {
            return Ok(None);
        }
        let mut next = world.clone();
        if !self.apply(&mut next, event)? || next == *world {
            return Ok(None);
        }
        self.check(&next)?;
        Ok(Some(next))
    }

    /// Sorts out cheaply what cannot happen, before the world is copied.
    fn idle(&self, world: &World, event: Event) -> bool {
        let node = |side: Side| &world.nodes[side as usize];
        match event {
            Event::Write(side) => node(side).writes.is_empty(),
            Event::FailWrite(side) => node(side).failed_writes == 0 || node(side).writes.is_empty(),
            Event::Execute(side) => node(side).commands.is_empty(),
            Event::Refuse(side) => node(side).refusals == 0 || node(side).commands.is_empty(),
            Event::Answer(side) => node(side).answers.is_empty(),
            Event::Orphan(side) => node(side).orphans.is_empty(),
            Event::Die { side, told } => node(side).deaths == 0 || !told && node(side).answers.is_empty(),
            Event::Crash { side, limbo, orphans, .. } => {
                limbo && node(side).limbo.is_none() || orphans && node(side).commands.is_empty()
            }
            Event::Restart { side: S, .. } => world.source.is_some(),
            Event::Restart { side: D, .. } => world.destination.is_some(),
            Event::Complete => node(S).vmm != Vmm::Migrating,
            Event::Load => world.loaded,
            Event::Whole(_) => !world.loaded,
            _ => false,
        }
    }

    fn apply(&self, world: &mut World, event: Event) -> Result<bool, String> {
        let up = |world: &World, side| {
            if side == S { world.source.is_some() } else { world.destination.is_some() }
        };
        match event {
            Event::Connect => {
                if !up(world, S) || !up(world, D) || self.setup.mutant == Some(Mutant::NoResend) {
                    return Ok(false);
                }
                self.feed(world, S, Input::Connected)?;
                self.feed(world, D, Input::Connected)?;
            }
            Event::Deliver(wire, keep) => {
                if !up(world, wire.to()) {
                    return Ok(false);
                }
                if keep == Keep::No {
                    world.net.remove(wire);
                }
                self.feed(world, wire.to(), Input::Message(wire.message(self.setup.guest_ran)))?;
            }
            Event::Lose(wire) => return Ok(world.net.remove(wire)),
            Event::Write(side) => {
                let Some(entry) = world.nodes[side as usize].writes.pop_front() else { return Ok(false) };
                // The failed entry before it was cut off.
                world.nodes[side as usize].limbo = None;
                world.nodes[side as usize].disk.push(entry);
                self.feed(world, side, Input::Journaled)?;
            }
            Event::FailWrite(side) => {
                let node = &mut world.nodes[side as usize];
                if node.failed_writes == 0 || node.writes.is_empty() {
                    return Ok(false);
                }
                node.failed_writes -= 1;
                node.limbo = node.writes.pop_front();
                let entry = node.limbo.map(|number| self.entry(number));
                self.failed(world, side, entry)?;
            }
            Event::Execute(side) => {
                let Some(command) = world.nodes[side as usize].commands.pop_front() else { return Ok(false) };
                // The VMM serves one client at a time: what the one before left unread is thrown away.
                world.nodes[side as usize].orphans.clear();
                let answer = self.execute(world, side, command);
                world.nodes[side as usize].answers.extend(answer);
            }
            Event::Refuse(side) => {
                let node = &mut world.nodes[side as usize];
                let refusable = matches!(
                    node.commands.front(),
                    Some(
                        VmmCommand::Cont
                            | VmmCommand::Quit
                            | VmmCommand::StopWhileIncoming
                            | VmmCommand::CancelMigration
                    )
                );
                if node.refusals == 0 || !refusable || node.vmm == Vmm::Gone {
                    return Ok(false);
                }
                node.refusals -= 1;
                node.commands.pop_front();
                node.answers.push_back(Input::VmmRefused);
            }
            Event::Answer(side) => {
                let Some(answer) = world.nodes[side as usize].answers.pop_front() else { return Ok(false) };
                self.feed(world, side, answer)?;
            }
            Event::Orphan(side) => {
                let Some(command) = world.nodes[side as usize].orphans.pop_front() else { return Ok(false) };
                let agent = up(world, side);
                let before = world.nodes[side as usize].vmm;
                self.execute(world, side, command);
                let node = &mut world.nodes[side as usize];
                if before != Vmm::Gone && node.vmm == Vmm::Gone && agent {
                    node.answers.push_back(Input::Vmm(VmmState::Gone));
                }
            }
            Event::Crash { side, durable, limbo, orphans, odd } => {
                return Ok(up(world, side) && self.crash(world, side, durable, limbo, orphans, odd));
            }
            Event::Restart { side, sees } => {
                if up(world, side) {
                    return Ok(false);
                }
                self.restart(world, side, sees)?;
            }
            Event::Die { side, told } => {
                let agent = up(world, side);
                let node = &mut world.nodes[side as usize];
                if node.deaths == 0 || node.vmm == Vmm::Gone {
                    return Ok(false);
                }
                node.deaths -= 1;
                node.vmm = Vmm::Gone;
                node.orphans.clear();
                if !told {
                    node.answers.clear();
                }
                if agent {
                    node.answers.push_back(Input::Vmm(VmmState::Gone));
                }
            }
            Event::Complete => {
                let migrating = world.source.as_ref().is_some_and(|s| s.phase() == SourcePhase::Migrating);
                if !migrating || world.nodes[0].vmm != Vmm::Migrating {
                    return Ok(false);
                }
                world.nodes[0].vmm = Vmm::Post;
                world.sent_all = true;
            }
            Event::Load => {
                let flows = world.source.as_ref().is_some_and(|s| s.phase() == SourcePhase::Migrating)
                    && world.destination.as_ref().is_some_and(|d| d.phase() == DestinationPhase::Receiving);
                let Vmm::Incoming { stopped } = world.nodes[1].vmm else { return Ok(false) };
                if !flows || !world.sent_all {
                    return Ok(false);
                }
                let starts = !stopped && self.setup.guest_ran;
                world.nodes[1].vmm = if starts { Vmm::Runs } else { Vmm::Loaded };
                world.nodes[1].ran |= starts;
                world.loaded = true;
            }
            Event::Whole(side) => {
                let ready = match side {
                    S => world.source.as_ref().is_some_and(|s| s.phase() == SourcePhase::Migrating),
                    D => {
                        world.destination.as_ref().is_some_and(|d| d.phase() == DestinationPhase::Receiving)
                            && matches!(world.nodes[1].vmm, Vmm::Loaded | Vmm::Runs)
                    }
                };
                if !ready || !world.loaded {
                    return Ok(false);
                }
                self.feed(world, side, Input::Whole(WHOLE))?;
            }
            Event::Abort(side) => {
                if !up(world, side) {
                    return Ok(false);
                }
                self.cancel(world, side)?;
            }
            Event::Retry(side) => {
                if !up(world, side) {
                    return Ok(false);
                }
                self.feed(world, side, Input::Retry)?;
            }
            Event::Resolve(side, decision) => return self.resolve(world, side, decision),
        }
        Ok(true)
    }

    fn failed(&self, world: &mut World, side: Side, entry: Option<Entry>) -> Result<(), String> {
        let mutant = self.setup.mutant;
        match entry {
            Some(Entry::NeverRan { .. }) if mutant == Some(Mutant::UnwrittenPromise) => {
                self.feed(world, side, Input::Journaled)
            }
            Some(Entry::Commit(_)) if mutant == Some(Mutant::FailedWriteIsNoCommit) => {
                let promise = Message::NeverRan(AbortReason::JournalFailed);
                self.feed(world, side, Input::Message(promise))?;
                self.feed(world, side, Input::JournalFailed)
            }
            _ => self.feed(world, side, Input::JournalFailed),
        }
    }

    fn cancel(&self, world: &mut World, side: Side) -> Result<(), String> {
        let reason = if side == S { AbortReason::Cancelled } else { AbortReason::Deadline };
        let committed = world.source.as_ref().is_some_and(|s| s.phase() == SourcePhase::Committed);
        let in_doubt = world.destination.as_ref().is_some_and(|d| d.phase() == DestinationPhase::InDoubt);
        match self.setup.mutant {
            Some(Mutant::SourceDeadlineAfterCommit) if side == S && committed => {
                self.feed(world, S, Input::Message(Message::NeverRan(reason)))
            }
            Some(Mutant::DestinationDeadlineStarts) if side == D && in_doubt => {
                let commit = Message::Commit { receipt: WHOLE.digest(), run: true };
                self.feed(world, D, Input::Message(commit))
            }
            _ => self.feed(world, side, Input::Abort(reason)),
        }
    }

    fn resolve(&self, world: &mut World, side: Side, decision: Resolution) -> Result<bool, String> {
        let explained = match side {
            S => world.source.as_ref().map(|s| s.explain(decision)),
            D => world.destination.as_ref().map(|d| d.explain(decision)),
        };
        if !matches!(explained, Some(Ok(_))) {
            return Ok(false);
        }
        world.nodes[side as usize].operator -= 1;
        world.left_to_peer |= decision == Resolution::LeaveToPeer;
        world.fenced |= decision == Resolution::StartHere { peer_fenced: true };
        world.false_claim |= decision == Resolution::StartHere { peer_fenced: true }
            && world.nodes[side.peer() as usize].vmm != Vmm::Gone;
        self.feed(world, side, Input::Resolve(decision))?;
        Ok(true)
    }

    fn execute(&self, world: &mut World, side: Side, command: VmmCommand) -> Option<Input> {
        let node = &mut world.nodes[side as usize];
        let gone = node.vmm == Vmm::Gone;
        node.vmm = match (command, node.vmm) {
            (VmmCommand::StartMigration, Vmm::Idle) => Vmm::Migrating,
            (VmmCommand::CancelMigration, Vmm::Migrating) | (VmmCommand::Cont, Vmm::Post) => Vmm::Idle,
            (VmmCommand::StopWhileIncoming, Vmm::Incoming { .. }) => {
                Vmm::Incoming { stopped: self.setup.mutant != Some(Mutant::NoStopWhileIncoming) }
            }
            (VmmCommand::Cont, Vmm::Loaded) => Vmm::Runs,
            (VmmCommand::Quit, _) => Vmm::Gone,
            (_, vmm) => vmm,
        };
        node.ran |= node.vmm == Vmm::Runs;
        match command {
            VmmCommand::StartMigration | VmmCommand::AcceptStream | VmmCommand::AnnounceSelf => None,
            VmmCommand::Cont if matches!(node.vmm, Vmm::Incoming { .. }) => Some(Input::VmmRefused),
            // Its death was told already.
            _ if gone => None,
            _ => Some(Input::Vmm(self.observed(node.vmm))),
        }
    }

    fn observed(&self, vmm: Vmm) -> VmmState {
        match vmm {
            Vmm::Idle | Vmm::Migrating if self.setup.guest_ran => VmmState::Running,
            Vmm::Idle | Vmm::Migrating | Vmm::Loaded => VmmState::Paused,
            Vmm::Post => VmmState::Stopped,
            Vmm::Incoming { .. } => VmmState::Incoming,
            Vmm::Runs => VmmState::Running,
            Vmm::Gone => VmmState::Gone,
        }
    }

    fn crash(
        &self,
        world: &mut World,
        side: Side,
        durable: u8,
        limbo: bool,
        orphans: bool,
        odd: bool,
    ) -> bool {
        let receiving = world.destination.as_ref().is_some_and(|d| d.phase() == DestinationPhase::Receiving);
        let node = &mut world.nodes[side as usize];
        let breaks = match side {
            S => node.vmm == Vmm::Migrating,
            D => receiving && matches!(node.vmm, Vmm::Incoming { .. }),
        };
        // Each difference must make one.
        if limbo && node.limbo.is_none() || orphans && node.commands.is_empty() || odd && !breaks {
            return false;
        }
        // Without its first entry the agent knows nothing of the migration: the layer above answers "unknown".
        if node.disk.is_empty() && durable == 0 {
            return false;
        }
        node.crashes -= 1;
        // A later write cuts the failed one off.
        if limbo && durable == 0 {
            node.disk.extend(node.limbo);
        } else if limbo {
            return false;
        }
        node.limbo = None;
        node.disk.extend(node.writes.drain(..).take(usize::from(durable)));
        let commands = std::mem::take(&mut node.commands);
        if orphans {
            node.orphans.extend(commands);
        }
        node.answers.clear();
        node.outcome = None;
        if breaks {
            node.vmm = match (side, odd) {
                (S, true) => Vmm::Post,
                (S, false) => Vmm::Idle,
                (D, true) => Vmm::Gone,
                (D, false) => node.vmm,
            };
        }
        match side {
            S => world.source = None,
            D => world.destination = None,
        }
        true
    }

    fn restart(&self, world: &mut World, side: Side, sees: bool) -> Result<(), String> {
        let node = &world.nodes[side as usize];
        let entries: Vec<Entry> = node.disk.iter().map(|number| self.entry(*number)).collect();
        let vmm = sees.then(|| self.observed(node.vmm));
        match side {
            S => world.source = Some(Source::recover(&entries, vmm).map_err(|e| e.to_string())?),
            D => world.destination = Some(Destination::recover(&entries, vmm).map_err(|e| e.to_string())?),
        }
        if !sees && node.vmm == Vmm::Gone {
            world.nodes[side as usize].answers.push_back(Input::Vmm(VmmState::Gone));
        }
        self.drain(world, side)
    }

    /// Gives an input to a machine and carries its actions into the world.
    fn feed(&self, world: &mut World, side: Side, input: Input) -> Result<(), String> {
        let handled = match side {
            S => world.source.as_mut().map(|s| s.handle(input)),
            D => world.destination.as_mut().map(|d| d.handle(input)),
        };
        match handled {
            None | Some(Ok(Handled::Taken | Handled::Ignored(_))) => {}
            // Only an operator may be refused; honest machines never break the protocol.
            Some(Err(Refused::PeerNotFenced)) => {}
            Some(Err(refused)) => return Err(format!("{side:?} refused {input:?}: {refused}")),
        }
        self.drain(world, side)
    }

    fn drain(&self, world: &mut World, side: Side) -> Result<(), String> {
        loop {
            let action = match side {
                S => world.source.as_mut().and_then(Source::poll_action),
                D => world.destination.as_mut().and_then(Destination::poll_action),
            };
            let Some(action) = action else { return Ok(()) };
            self.act(world, side, action)?;
        }
    }

    fn act(&self, world: &mut World, side: Side, action: Action) -> Result<(), String> {
        let mutant = self.setup.mutant;
        match action {
            Action::Journal(entry) => {
                if matches!(entry, Entry::Commit(_)) {
                    world.commit_requested = true;
                    if mutant == Some(Mutant::CommitBeforeJournal) {
                        let run = self.setup.guest_ran;
                        self.send(world, Message::Commit { receipt: WHOLE.digest(), run });
                    }
                }
                let skip =
                    matches!(entry, Entry::Starting { .. }) && mutant == Some(Mutant::StartingNotDurable);
                if skip {
                    return self.feed(world, side, Input::Journaled);
                }
                let number = self.number(entry);
                world.nodes[side as usize].writes.push_back(number);
            }
            Action::Send(Message::Lost) if mutant == Some(Mutant::LostSaysNeverRan) => {
                self.send(world, Message::NeverRan(AbortReason::VmmGoneDestination));
            }
            Action::Send(message) => self.send(world, message),
            Action::Vmm(command) => world.nodes[side as usize].commands.push_back(command),
            // A source that does not know yet that its VMM is gone may raise it rightly.
            Action::Alarm(Alarm::Conflict) if !world.fenced && mutant.is_none() => {
                return Err("both sides claim the guest".into());
            }
            Action::Alarm(_) => {}
            Action::Finish(outcome) => world.nodes[side as usize].outcome = Some(outcome),
        }
        Ok(())
    }

    fn send(&self, world: &mut World, message: Message) {
        world.never_ran_said |= matches!(message, Message::NeverRan(_));
        world.net.insert(Wire::new(&message));
    }

    fn number(&self, entry: Entry) -> u8 {
        let mut entries = self.entries.borrow_mut();
        let number = entries.iter().position(|known| *known == entry).unwrap_or_else(|| {
            entries.push(entry);
            entries.len() - 1
        });
        number as u8
    }

    pub(crate) fn entry(&self, number: u8) -> Entry {
        self.entries.borrow()[usize::from(number)].clone()
    }

    /// An operator's claim stands in a journal.
    fn claimed(&self, world: &World) -> bool {
        let claim = Entry::Resolved(Resolution::StartHere { peer_fenced: true });
        world.nodes.iter().flat_map(|n| &n.disk).any(|number| self.entry(*number) == claim)
    }

    /// What must hold in every state.
    fn check(&self, world: &World) -> Result<(), String> {
        let runs = world.source_runs() as u8 + (world.nodes[1].vmm == Vmm::Runs) as u8;
        if self.setup.guest_ran && runs > 1 && !(world.false_claim && self.claimed(world)) {
            return Err("I1: two copies run, and no operator's false claim is on record".into());
        }
        if !self.setup.guest_ran && world.nodes[1].ran {
            return Err("a paused guest was started".into());
        }
        if world.never_ran_said && world.nodes[1].ran && !world.false_claim {
            return Err("I3: never_ran was said of a guest that ran".into());
        }
        Ok(())
    }
}

impl World {
    pub(crate) fn source_runs(&self) -> bool {
        matches!(self.nodes[0].vmm, Vmm::Idle | Vmm::Migrating)
    }
}

impl Model {
    /// Both ended, and the guest is where they say, or its loss has a name.
    pub(crate) fn settled(&self, world: &World) -> bool {
        let (Some(source), Some(destination)) = (&world.source, &world.destination) else { return false };
        let [Some(here), Some(there)] = world.nodes.each_ref().map(|n| n.outcome) else { return false };
        if !source.phase().ended() || !destination.phase().ended() {
            return false;
        }
        let [at_source, at_destination] = world.nodes.each_ref().map(|n| n.vmm);
        let back = world.source_runs() || at_source == Vmm::Post && !self.setup.guest_ran;
        match (here, there) {
            (Outcome::Moved, Outcome::Moved) => {
                let there = if self.setup.guest_ran { Vmm::Runs } else { Vmm::Loaded };
                !world.source_runs() && (at_destination == there || at_destination == Vmm::Gone)
            }
            (Outcome::Aborted(_), Outcome::Aborted(_)) => {
                (back || at_source == Vmm::Gone) && at_destination != Vmm::Runs
            }
            // The VMM died after `cont`, or nobody knows whether before.
            (Outcome::Lost | Outcome::Moved, Outcome::Lost) => at_destination == Vmm::Gone,
            // The source's guest went on, on an earlier promise or an operator's word.
            (Outcome::Aborted(_), Outcome::Lost) => back || at_source == Vmm::Gone,
            // An operator moved it while the source's VMM was gone, or took it back when the destination's had died.
            (Outcome::Aborted(_), Outcome::Moved) => {
                at_source == Vmm::Gone || world.false_claim || world.fenced && at_destination == Vmm::Gone
            }
            (Outcome::Moved | Outcome::Lost, Outcome::Aborted(_)) => world.left_to_peer,
            (Outcome::Lost, Outcome::Moved) => false,
        }
    }

    /// The source's guest has not been given away, so the source must be able to run it without anybody's help.
    pub(crate) fn source_owns(&self, world: &World) -> bool {
        !world.commit_requested && world.nodes[0].vmm != Vmm::Gone
    }
}
