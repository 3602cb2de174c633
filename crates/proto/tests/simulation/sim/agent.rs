//! A node: its agent with the handover machine and its journal, and its VMM.

use std::collections::VecDeque;

use dwcp_proto::handover::{
    Action, Destination, DestinationPhase, Handled, Input, Outcome, Refused, Source, SourcePhase, VmmCommand,
    VmmState,
};
use dwcp_proto::journal::{self, Chain, Entry};

use super::queue::Time;
use super::rng::Rng;
use super::world::{Life, Side};

/// One of the two machines.
pub(crate) enum Machine {
    Source(Source),
    Destination(Destination),
}

impl Machine {
    pub(crate) fn handle(&mut self, input: Input) -> Result<Handled, Refused> {
        match self {
            Machine::Source(m) => m.handle(input),
            Machine::Destination(m) => m.handle(input),
        }
    }

    pub(crate) fn poll_action(&mut self) -> Option<Action> {
        match self {
            Machine::Source(m) => m.poll_action(),
            Machine::Destination(m) => m.poll_action(),
        }
    }

    pub(crate) fn settled(&self) -> bool {
        match self {
            Machine::Source(m) => m.settled(),
            Machine::Destination(m) => m.settled(),
        }
    }

    pub(crate) fn phase(&self) -> &'static str {
        match self {
            Machine::Source(m) => m.phase().name(),
            Machine::Destination(m) => m.phase().name(),
        }
    }
}

/// What the VMM does; as in the exhaustive model of the handover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmm {
    /// Source: guest as before the migration.
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

impl Vmm {
    /// As its agent sees it.
    pub(crate) fn observed(self, guest_ran: bool) -> VmmState {
        match self {
            Vmm::Idle | Vmm::Migrating if guest_ran => VmmState::Running,
            Vmm::Idle | Vmm::Migrating | Vmm::Loaded => VmmState::Paused,
            Vmm::Post => VmmState::Stopped,
            Vmm::Incoming { .. } => VmmState::Incoming,
            Vmm::Runs => VmmState::Running,
            Vmm::Gone => VmmState::Gone,
        }
    }
}

pub(crate) struct Agent {
    pub(crate) side: Side,
    /// `None` while the agent is dead.
    pub(crate) machine: Option<Machine>,
    pub(crate) life: Life,
    pub(crate) vmm: Vmm,
    /// The guest ran on this side after the handover.
    pub(crate) ran: bool,
    pub(crate) outcome: Option<Outcome>,
    /// The machine was told that the guest is whole.
    pub(crate) whole: bool,
    pub(crate) writes: VecDeque<Entry>,
    pub(crate) commands: VecDeque<VmmCommand>,
    pub(crate) answers: VecDeque<Input>,
    /// Commands that the VMM will refuse.
    pub(crate) refusals: u32,
    /// It has refused one.
    pub(crate) refused: bool,
    pub(crate) bad_disk_until: Time,
    /// When it last began to give the guest back, if it is at it.
    pub(crate) restoring_since: Option<Time>,
    disk: Vec<u8>,
    chain: Chain,
    /// A failed line that may be on disk none the less.
    limbo: Vec<u8>,
}

impl Agent {
    pub(crate) fn new(side: Side, machine: Machine, vmm: Vmm) -> Self {
        Agent {
            side,
            machine: Some(machine),
            life: 0,
            vmm,
            ran: false,
            outcome: None,
            whole: false,
            writes: VecDeque::new(),
            commands: VecDeque::new(),
            answers: VecDeque::new(),
            refusals: 0,
            refused: false,
            bad_disk_until: 0,
            restoring_since: None,
            disk: Vec::new(),
            chain: Chain::default(),
            limbo: Vec::new(),
        }
    }

    pub(crate) fn source_phase(&self) -> Option<SourcePhase> {
        match &self.machine {
            Some(Machine::Source(m)) => Some(m.phase()),
            _ => None,
        }
    }

    pub(crate) fn destination_phase(&self) -> Option<DestinationPhase> {
        match &self.machine {
            Some(Machine::Destination(m)) => Some(m.phase()),
            _ => None,
        }
    }

    /// Without its first line an agent that dies knows nothing of the migration: the layer above answers "unknown".
    pub(crate) fn knows(&self) -> bool {
        !self.disk.is_empty()
    }

    /// Carries out the oldest write; what the machine is told of it.
    pub(crate) fn write(&mut self, fails: bool, unix_ms: u64) -> Result<Option<Input>, String> {
        let Some(entry) = self.writes.pop_front() else { return Ok(None) };
        let line = journal::encode(&entry, unix_ms, &self.chain).map_err(|e| e.to_string())?;
        // What the failed write before left is cut off first.
        self.limbo.clear();
        if fails {
            self.limbo = line.text.into_bytes();
            return Ok(Some(Input::JournalFailed));
        }
        self.disk.extend(line.text.as_bytes());
        self.chain = line.next;
        Ok(Some(Input::Journaled))
    }

    /// Kills the agent. Of its writes some become durable, and one more may be torn.
    pub(crate) fn kill(&mut self, rng: &mut Rng) -> Result<(), String> {
        self.machine = None;
        self.life += 1;
        self.outcome = None;
        self.whole = false;
        self.restoring_since = None;
        self.answers.clear();
        let durable = rng.below(self.writes.len() as u64 + 1);
        for _ in 0..durable {
            self.write(false, 0)?;
        }
        if rng.one_in(2) && durable == 0 {
            let limbo = std::mem::take(&mut self.limbo);
            self.disk.extend(limbo);
        } else if let Some(entry) = self.writes.front()
            && self.limbo.is_empty()
        {
            let line = journal::encode(entry, 0, &self.chain).map_err(|e| e.to_string())?.text.into_bytes();
            let torn = rng.below(line.len() as u64) as usize;
            self.disk.extend(&line[..torn]);
        }
        self.limbo.clear();
        self.writes.clear();
        Ok(())
    }

    /// Brings the agent back from its journal.
    pub(crate) fn recover(&mut self, vmm: Option<VmmState>) -> Result<(), String> {
        let replay = journal::replay(&self.disk).map_err(|e| e.to_string())?;
        self.disk.truncate(replay.len as usize);
        self.chain = replay.chain;
        let entries = replay.decisions();
        let bad = |e: dwcp_proto::handover::BadJournal| e.to_string();
        self.machine = Some(match self.side {
            Side::Source => Machine::Source(Source::recover(&entries, vmm).map_err(bad)?),
            Side::Destination => Machine::Destination(Destination::recover(&entries, vmm).map_err(bad)?),
        });
        Ok(())
    }

    /// The VMM carries out a command; what its agent is told, sooner or later.
    pub(crate) fn execute(&mut self, command: VmmCommand, guest_ran: bool, stops: bool) -> Option<Input> {
        let gone = self.vmm == Vmm::Gone;
        self.vmm = match (command, self.vmm) {
            (VmmCommand::StartMigration, Vmm::Idle) => Vmm::Migrating,
            (VmmCommand::CancelMigration, Vmm::Migrating) | (VmmCommand::Cont, Vmm::Post) => Vmm::Idle,
            (VmmCommand::StopWhileIncoming, Vmm::Incoming { .. }) => Vmm::Incoming { stopped: stops },
            (VmmCommand::Cont, Vmm::Loaded) => Vmm::Runs,
            (VmmCommand::Quit, _) => Vmm::Gone,
            (_, vmm) => vmm,
        };
        self.ran |= self.vmm == Vmm::Runs;
        match command {
            VmmCommand::StartMigration | VmmCommand::AcceptStream | VmmCommand::AnnounceSelf => None,
            VmmCommand::Cont if matches!(self.vmm, Vmm::Incoming { .. }) => Some(Input::VmmRefused),
            // Its death was told already.
            _ if gone => None,
            _ => Some(Input::Vmm(self.vmm.observed(guest_ran))),
        }
    }
}
