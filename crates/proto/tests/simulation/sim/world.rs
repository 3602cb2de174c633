//! The world: two agents, two VMMs, the connections between them, and a clock that jumps from event to event.

use std::fmt;

use dwcp_proto::SessionId;
use dwcp_proto::handover::{Destination, Outcome, Source};
use dwcp_proto::ids::{MigrationId, NodeName, VmName};
use dwcp_proto::journal::{Accepted, Job, Prepared};

use super::agent::{Agent, Machine, Vmm};
use super::data::{Digest, Incoming, Outgoing, Stream, Switch};
use super::net::{Conn, ConnId};
use super::queue::{Event, Queue, SECOND, Time};
use super::rng::Rng;
use super::scenario::Scenario;
use super::seal::Seal;
use super::turn::Helm;

/// Counts an agent's starts.
pub(crate) type Life = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Source,
    Destination,
}
pub(crate) use Side::{Destination as D, Source as S};

impl Side {
    pub(crate) fn peer(self) -> Side {
        if self == S { D } else { S }
    }
}

pub(crate) const SIDES: [Side; 2] = [S, D];

/// What happened, counted: it shows that the runs were not empty.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Events, the measure of work.
    pub(crate) events: u64,
    /// Worlds that were run to their end.
    pub(crate) worlds: u64,
    /// Their simulated time.
    pub(crate) simulated: Time,
    /// How they ended.
    pub(crate) moved: u64,
    pub(crate) aborted: u64,
    pub(crate) lost: u64,
    /// Migrations that were tried again after an abort, and moved.
    pub(crate) second: u64,
    /// Chunks applied.
    pub(crate) applied: u64,
    /// Chunks handed to connections.
    pub(crate) sent: u64,
    pub(crate) retransmitted: u64,
    pub(crate) duplicates: u64,
    pub(crate) second_copies: u64,
    pub(crate) altered: u64,
    pub(crate) acks: u64,
    pub(crate) breaks: u64,
    pub(crate) connections: u64,
    pub(crate) cuts: u64,
    pub(crate) crashes: [u64; 2],
    pub(crate) vmm_deaths: [u64; 2],
    pub(crate) failed_writes: u64,
    pub(crate) refused_commands: u64,
    /// Words on the path, and its changes to v3 and to v1.
    pub(crate) words: u64,
    pub(crate) turns: [u64; 2],
    /// The longest that a world took once it was fair, in percent of its bound.
    pub(crate) nearest: u64,
    /// Most events planned at one time.
    pub(crate) most_planned: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hours = self.simulated as f64 / SECOND as f64 / 3600.0;
        writeln!(
            f,
            "{} worlds, {hours:.0} simulated hours: {} moved, {} aborted, {} lost; {} moved at the second try",
            self.worlds, self.moved, self.aborted, self.lost, self.second
        )?;
        writeln!(
            f,
            "{} chunks applied of {} sent, {} duplicates, {} second copies, {} altered, {} acknowledgements",
            self.applied, self.sent, self.duplicates, self.second_copies, self.altered, self.acks
        )?;
        writeln!(
            f,
            "{} connections, {} broken, {} cuts of the path",
            self.connections, self.breaks, self.cuts
        )?;
        writeln!(
            f,
            "agents killed {:?}, VMMs {:?}, {} failed writes, {} refused commands",
            self.crashes, self.vmm_deaths, self.failed_writes, self.refused_commands
        )?;
        writeln!(
            f,
            "{} words on the path, {} changes to v1, {} to v3",
            self.words, self.turns[1], self.turns[0]
        )?;
        write!(
            f,
            "at most {} events planned; the slowest end took {} % of its bound",
            self.most_planned, self.nearest
        )
    }
}

/// A broken rule, and how to see it again.
#[derive(Debug)]
pub(crate) struct Broken {
    /// The world's seed.
    pub(crate) seed: u64,
    /// The rule.
    pub(crate) rule: String,
    how: String,
}

impl Broken {
    pub(crate) fn early(seed: u64, rule: String) -> Self {
        Broken { seed, rule, how: String::new() }
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {}\n{}", self.seed, self.rule, self.how)
    }
}

/// A copy of a chunk that is being verified and decoded.
pub(crate) struct Copy<C> {
    pub(crate) life: Life,
    pub(crate) leg: u32,
    pub(crate) seq: u64,
    pub(crate) chunk: C,
}

/// Events kept to tell how it came to a broken rule.
const REMEMBERED: usize = 60;

pub(crate) struct World<'t, X: Seal> {
    pub(crate) scenario: Scenario,
    pub(crate) rng: Rng,
    pub(crate) queue: Queue,
    pub(crate) session: SessionId,
    /// What the source's VMM has put out.
    pub(crate) stream: Stream,
    /// What the destination's VMM was given.
    pub(crate) digest: Digest,
    /// It has everything, and loads it.
    pub(crate) loading: bool,
    pub(crate) helm: Helm,
    /// The destination forbids v3.
    pub(crate) veto: bool,
    /// An order that came before the destination's data path began.
    pub(crate) early: Option<Switch>,
    pub(crate) agents: [Agent; 2],
    pub(crate) conns: Vec<Conn<X::Chunk>>,
    /// The control connection as each side has it.
    pub(crate) control: [Option<ConnId>; 2],
    /// Counts each side's control connections and their losses.
    pub(crate) darkness: [u32; 2],
    pub(crate) outgoing: Option<Outgoing<X>>,
    pub(crate) incoming: Option<Incoming<X>>,
    pub(crate) copies: Vec<Option<Copy<X::Chunk>>>,
    pub(crate) free: Vec<u32>,
    pub(crate) cut_until: Time,
    pub(crate) idle_until: Time,
    pub(crate) slow_until: Time,
    /// How long the destination's VMM takes for a chunk until then.
    pub(crate) slowness: Time,
    /// From here on nothing goes wrong any more.
    pub(crate) fair_from: Time,
    /// What the source's stream was, once its VMM has put out the last byte.
    pub(crate) sent_digest: Option<Digest>,
    pub(crate) commit_requested: bool,
    pub(crate) never_ran_said: bool,
    /// Why the migration may end without the guest moved.
    pub(crate) excuse: Option<&'static str>,
    pub(crate) tally: &'t mut Tally,
    recent: [(Time, Event); REMEMBERED],
    stepped: usize,
}

/// How a world ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) source: Vmm,
    pub(crate) moved: bool,
    /// How long it took from the last fault's end.
    pub(crate) fair: Time,
}

impl<'t, X: Seal> World<'t, X> {
    pub(crate) fn new(scenario: Scenario, mut rng: Rng, tally: &'t mut Tally) -> Result<Self, String> {
        let mut session = [0; 32];
        session.chunks_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()));
        let session = SessionId(session);
        let text = |e: dwcp_proto::ids::BadName| e.to_string();
        let job = Job {
            migration: MigrationId::new("m").map_err(text)?,
            vm: VmName::new("v").map_err(text)?,
            peer: NodeName::new("n").map_err(text)?,
            peer_key: [0; 32],
            peer_addr: None,
            qmp: "q".into(),
            session,
            path: "v3".into(),
            started_unix_ms: 0,
            vmm: None,
            attempt: 1,
            again: None,
            halts: false,
        };
        let (guest_ran, on_success) = (scenario.guest_ran, scenario.on_success);
        let source = Source::new(Prepared { job: job.clone(), guest_ran, on_success });
        let destination = Destination::new(Accepted { job, on_abort: scenario.on_abort });
        let mut world = World {
            stream: Stream::new(rng.next()),
            digest: Digest::default(),
            loading: false,
            helm: Helm::new(scenario.wish.path, scenario.hesitation, scenario.clocks[0].reads(0)),
            veto: false,
            early: None,
            session,
            agents: [
                Agent::new(S, Machine::Source(source), Vmm::Idle),
                Agent::new(D, Machine::Destination(destination), Vmm::Incoming { stopped: false }),
            ],
            conns: Vec::new(),
            control: [None; 2],
            darkness: [0; 2],
            outgoing: None,
            incoming: None,
            copies: Vec::new(),
            free: Vec::new(),
            queue: Queue::default(),
            cut_until: 0,
            idle_until: 0,
            slow_until: 0,
            slowness: 0,
            fair_from: scenario.faults_until,
            sent_digest: None,
            commit_requested: false,
            never_ran_said: false,
            excuse: None,
            tally,
            recent: [(0, Event::Fault); REMEMBERED],
            stepped: 0,
            scenario,
            rng,
        };
        world.begin()?;
        Ok(world)
    }

    fn begin(&mut self) -> Result<(), String> {
        for side in SIDES {
            self.drain(side)?;
        }
        self.connect(None)?;
        if let Some(deadline) = self.scenario.deadline {
            let deadline = self.scenario.clocks[0].lasts(deadline);
            self.queue.after(deadline, Event::Deadline);
        }
        if self.scenario.faults_until > 0 {
            let gap = self.rng.below(2 * self.scenario.fault_gap + 1);
            self.queue.after(gap, Event::Fault);
        }
        self.queue.at(self.fair_from + self.scenario.bound(), Event::Overdue);
        Ok(())
    }

    /// Runs to the end, holding every rule at every step.
    pub(crate) fn run(mut self, seed: u64) -> Result<End, Broken> {
        let result = self.steps();
        self.tally.worlds += 1;
        self.tally.simulated += self.queue.now();
        if let Ok(end) = &result {
            self.tally.nearest = self.tally.nearest.max(end.fair * 100 / self.scenario.bound());
        }
        result.map_err(|rule| Broken { seed, rule, how: self.story() })
    }

    fn steps(&mut self) -> Result<End, String> {
        loop {
            let Some(event) = self.queue.pop() else {
                return Err("stuck: nothing will ever happen again, and it has not ended".into());
            };
            self.recent[self.stepped % REMEMBERED] = (self.queue.now(), event);
            self.stepped += 1;
            self.tally.events += 1;
            self.step(event)?;
            self.check()?;
            if let Some(end) = self.end()? {
                return Ok(end);
            }
        }
    }

    fn step(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Produced(life, leg) if life == self.life(S) => self.produced(leg),
            Event::Helm(life) if life == self.life(S) => self.steer(),
            Event::Wrote(conn) => self.wrote(conn),
            Event::Header(conn) => self.header(conn),
            Event::Payload(conn) => self.payload(conn),
            Event::Judged(copy) => self.judged(copy),
            Event::Applied(life) if life == self.life(D) => self.applied(),
            Event::AckDue(life) if life == self.life(D) => self.ack_due(),
            Event::Loaded(life) if life == self.life(D) => self.loaded(),
            Event::Heard(conn, side) => self.heard(conn, side),
            Event::Lost(conn, side) => self.notices(conn, side),
            Event::Dial(link, life) if life == self.life(S) => self.dial(link),
            Event::Journal(side, life) if life == self.life(side) => self.journal(side),
            Event::Command(side, life) if life == self.life(side) => self.command(side),
            Event::Answer(side, life) if life == self.life(side) => self.answer(side),
            Event::Retry(side, life) if life == self.life(side) => self.retry(side),
            Event::Restart(side) => self.restart(side),
            Event::Dark(side, life, darkness) if life == self.life(side) => self.dark(side, darkness),
            Event::Deadline => self.deadline(),
            Event::Fault => self.fault(),
            Event::Overdue => self.overdue(),
            // Of an earlier life.
            _ => Ok(()),
        }
    }

    pub(crate) fn life(&self, side: Side) -> Life {
        self.agents[side as usize].life
    }

    pub(crate) fn agent(&mut self, side: Side) -> &mut Agent {
        &mut self.agents[side as usize]
    }

    /// Until `time` something is wrong.
    pub(crate) fn unfair_until(&mut self, time: Time) {
        self.fair_from = self.fair_from.max(time);
    }

    fn overdue(&mut self) -> Result<(), String> {
        let due = self.fair_from + self.scenario.bound();
        if self.queue.now() >= due {
            return Err(format!(
                "stuck: {} s after the last fault it has not ended",
                self.scenario.bound() / SECOND
            ));
        }
        self.queue.at(due, Event::Overdue);
        Ok(())
    }

    /// What must hold at every step.
    fn check(&mut self) -> Result<(), String> {
        let [source, destination] = &self.agents;
        let source_runs = matches!(source.vmm, Vmm::Idle | Vmm::Migrating);
        if self.scenario.guest_ran && source_runs && destination.vmm == Vmm::Runs {
            return Err("I1: two copies run".into());
        }
        if !self.scenario.guest_ran && destination.ran {
            return Err("a paused guest was started".into());
        }
        if self.never_ran_said && destination.ran {
            return Err("I1: never_ran was said of a guest that ran".into());
        }
        if let Some(since) = source.restoring_since
            && self.queue.now() > since + SECOND
        {
            return Err("I2: the source's guest did not resume within a second".into());
        }
        let planned = self.queue.len();
        if planned > self.tally.most_planned {
            self.tally.most_planned = planned;
            // A chunk that is being verified, two writes and a message for each connection; the rest is timers.
            if planned > 100_000 {
                return Err(format!("{planned} events are planned: something grows without bound"));
            }
        }
        Ok(())
    }

    /// The end, once both sides have ended and know of each other's; an error if it is none of the good ones.
    fn end(&mut self) -> Result<Option<End>, String> {
        let [source, destination] = &self.agents;
        let (Some(here), Some(there)) = (source.outcome, destination.outcome) else { return Ok(None) };
        if !self.agents.iter().all(|a| a.machine.as_ref().is_some_and(Machine::settled)) {
            return Ok(None);
        }
        // What the VMMs were told last is still on its way.
        if self.agents.iter().any(|a| !a.commands.is_empty() || !a.answers.is_empty()) {
            return Ok(None);
        }
        let ran = self.scenario.guest_ran;
        let back = source.vmm == Vmm::Idle || source.vmm == Vmm::Post && !ran;
        let good = match (here, there) {
            (Outcome::Moved, Outcome::Moved) => {
                let there = if ran { Vmm::Runs } else { Vmm::Loaded };
                source.vmm != Vmm::Idle && (destination.vmm == there || destination.vmm == Vmm::Gone)
            }
            (Outcome::Aborted(_), Outcome::Aborted(_)) => {
                (back || source.vmm == Vmm::Gone) && destination.vmm != Vmm::Runs
            }
            (Outcome::Lost | Outcome::Moved, Outcome::Lost) => destination.vmm == Vmm::Gone,
            (Outcome::Aborted(_), Outcome::Lost) => back || source.vmm == Vmm::Gone,
            _ => false,
        };
        if !good {
            let vmms = (source.vmm, destination.vmm);
            return Err(format!("a bad end: source {here:?}, destination {there:?}, VMMs {vmms:?}"));
        }
        let moved = there == Outcome::Moved;
        if !moved && self.excuse.is_none() {
            return Err(format!("ended for nothing: source {here:?}, destination {there:?}"));
        }
        match there {
            Outcome::Moved => self.tally.moved += 1,
            Outcome::Aborted(_) => self.tally.aborted += 1,
            Outcome::Lost => self.tally.lost += 1,
        }
        let source = source.vmm;
        let fair = self.queue.now().saturating_sub(self.fair_from);
        Ok(Some(End { source, moved, fair }))
    }

    /// The last events, and how things stand.
    fn story(&self) -> String {
        let mut story = format!("{:?}\n", self.scenario);
        for i in self.stepped.saturating_sub(REMEMBERED)..self.stepped {
            let (time, event) = self.recent[i % REMEMBERED];
            story += &format!("{:>16.6} ms {event:?}\n", time as f64 / 1e6);
        }
        for agent in &self.agents {
            let phase = agent.machine.as_ref().map_or("dead", Machine::phase);
            story += &format!("{:?}: {phase}, VMM {:?}, {:?}\n", agent.side, agent.vmm, agent.outcome);
        }
        if let Some(leg) = self.leg() {
            let (records, chunks) = (self.stream.records(), self.scenario.chunks);
            let asked = self.outgoing.as_ref().is_some_and(|out| out.asked.is_some());
            story += &format!("leg {} on {:?}, another asked for: {asked}\n", leg.number, leg.path);
            story += &format!("made {records} of {chunks}, {} bytes\n", self.stream.len());
        }
        if let Some(incoming) = &self.incoming {
            let leg = &incoming.leg;
            story += &format!("applied {} bytes, leg {} on {:?}\n", incoming.offset, leg.number, leg.path);
        }
        story + &format!("excuse: {:?}", self.excuse)
    }
}
