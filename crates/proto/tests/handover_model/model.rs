//! How the world moves on: every step that is possible in it, and the two machines in its midst.

use std::cell::RefCell;
use std::collections::VecDeque;

use dwcp_proto::handover::{
    AbortReason, Action, Afterwards, Alarm, Destination, DestinationPhase, Handled, Input, Message, Refused,
    Resolution, Source, SourcePhase, VmmCommand, VmmState,
};
use dwcp_proto::ids::{MigrationId, NodeName, SessionId, VmName};
use dwcp_proto::journal::{Accepted, Entry, Job, Prepared};

use crate::net::{Net, Wire};
use crate::world::Side::{self, Destination as D, Source as S};
use crate::world::{Event, Keep, Mutant, Node, SIDES, Setup, Vmm, WHOLE, World};

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
            peer_key: [5; 32],
            peer_addr: None,
            qmp: "q".into(),
            session: SessionId([0; 32]),
            path: "v3".into(),
            started_unix_ms: 0,
            vmm: None,
            attempt: 1,
            again: None,
            halts: false,
        };
        let prepared =
            Prepared { job: job.clone(), guest_ran: setup.guest_ran, on_success: Afterwards::Quit };
        let mut world = World {
            source: Some(Source::new(prepared)),
            destination: Some(Destination::new(Accepted { job, on_abort: setup.on_abort })),
            nodes: [node(S, Vmm::Idle), node(D, Vmm::Incoming { stopped: false })],
            net: Net::default(),
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
            if side == D {
                events.push(Event::GoOn);
            }
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
            Event::Restart { side: D, .. } | Event::GoOn => world.destination.is_some(),
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
            Event::GoOn => {
                let node = &world.nodes[D as usize];
                if world.destination.is_some() || !matches!(node.vmm, Vmm::Incoming { .. }) {
                    return Ok(false);
                }
                let entries: Vec<Entry> = node.disk.iter().map(|number| self.entry(*number)).collect();
                world.destination = Destination::go_on(&entries);
                if world.destination.is_none() {
                    return Ok(false);
                }
                self.drain(world, D)?;
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
}
