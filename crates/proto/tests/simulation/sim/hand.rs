//! The agents: their machines are fed, and what they ask for is done.

use dwcp_proto::handover::{AbortReason, Action, Input, Message, Refused, SourcePhase, VmmCommand, VmmState};
use dwcp_proto::journal::Entry;
use dwcp_proto::{Leg, LinkId};

use super::agent::Vmm;
use super::data::{Incoming, Outgoing};
use super::net::Said;
use super::queue::{Event, MS, SECOND};
use super::scenario::Mutant;
use super::seal::Seal;
use super::world::{D, S, Side, World};

impl<X: Seal> World<'_, X> {
    /// Gives an input to a side's machine, if the agent lives, and does what it asks for.
    pub(crate) fn feed(&mut self, side: Side, input: Input) -> Result<(), String> {
        let Some(machine) = &mut self.agents[side as usize].machine else { return Ok(()) };
        match machine.handle(input) {
            Ok(_) | Err(Refused::PeerNotFenced) => {}
            Err(refused) => return Err(format!("{side:?} refused {input:?}: {refused}")),
        }
        self.drain(side)
    }

    pub(crate) fn drain(&mut self, side: Side) -> Result<(), String> {
        while let Some(action) = self.agent(side).machine.as_mut().and_then(|m| m.poll_action()) {
            self.act(side, action)?;
        }
        self.follow(side);
        Ok(())
    }

    fn act(&mut self, side: Side, action: Action) -> Result<(), String> {
        let life = self.life(side);
        match action {
            Action::Journal(entry) => {
                if let Entry::Commit(receipt) = &entry {
                    self.commit_requested = true;
                    if self.is(Mutant::CommitBeforeJournal) {
                        let run = self.scenario.guest_ran;
                        self.say(side, Said::Handover(Message::Commit { receipt: receipt.digest(), run }));
                    }
                }
                self.agent(side).writes.push_back(entry);
                let takes = self.rng.scale(MS / 10, 40 * MS);
                self.queue.after(takes, Event::Journal(side, life));
            }
            Action::Send(message) => {
                self.never_ran_said |= matches!(message, Message::NeverRan(_));
                self.say(side, Said::Handover(message));
            }
            Action::Vmm(command) => {
                self.agent(side).commands.push_back(command);
                let takes = self.rng.scale(MS / 10, 40 * MS);
                self.queue.after(takes, Event::Command(side, life));
            }
            Action::Alarm(_) => self.queue.after(SECOND, Event::Retry(side, life)),
            Action::Finish(outcome) => self.agent(side).outcome = Some(outcome),
        }
        Ok(())
    }

    /// The data path goes with the phase, and the second within which the guest must be back begins.
    fn follow(&mut self, side: Side) {
        let now = self.queue.now();
        let agent = self.agent(side);
        let Some(machine) = &agent.machine else { return };
        let phase = machine.phase();
        let over = match side {
            S => matches!(phase, "withdrawing" | "restoring" | "aborted" | "moved" | "lost"),
            D => matches!(phase, "dropping" | "dropped" | "moved"),
        };
        if agent.source_phase() != Some(SourcePhase::Restoring) || agent.refused {
            agent.restoring_since = None;
        } else if agent.restoring_since.is_none() {
            agent.restoring_since = Some(now);
        }
        let had = match side {
            S => over && self.outgoing.take().is_some(),
            D => over && self.incoming.take().is_some(),
        };
        if had {
            let noticed = self.scenario.latency;
            self.close_all(side, true, noticed);
        }
    }

    pub(crate) fn journal(&mut self, side: Side) -> Result<(), String> {
        let now = self.queue.now();
        let unix_ms = self.scenario.clocks[side as usize].wall_ms + now / MS;
        let fails = now < self.agent(side).bad_disk_until && !self.rng.one_in(3);
        self.tally.failed_writes += u64::from(fails);
        match self.agent(side).write(fails, unix_ms)? {
            Some(input) => self.feed(side, input),
            None => Ok(()),
        }
    }

    pub(crate) fn command(&mut self, side: Side) -> Result<(), String> {
        let stops = !self.is(Mutant::NoStopWhileIncoming);
        let ran = self.scenario.guest_ran;
        let agent = self.agent(side);
        let Some(command) = agent.commands.pop_front() else { return Ok(()) };
        let refusable = matches!(
            command,
            VmmCommand::Cont | VmmCommand::Quit | VmmCommand::StopWhileIncoming | VmmCommand::CancelMigration
        );
        let answer = if refusable && agent.refusals > 0 && agent.vmm != Vmm::Gone {
            agent.refusals -= 1;
            agent.refused = true;
            agent.restoring_since = None;
            self.tally.refused_commands += 1;
            Some(Input::VmmRefused)
        } else {
            agent.execute(command, ran, stops)
        };
        if let Some(answer) = answer {
            self.answers(side, answer);
        }
        match command {
            VmmCommand::StartMigration if self.agents[0].vmm == Vmm::Migrating => self.starts(),
            VmmCommand::AcceptStream => {
                let mut incoming = Incoming::new(self.first_leg()?)?;
                incoming.ordered = self.early.take();
                self.incoming = Some(incoming);
                self.say(D, Said::Veto(self.veto));
                self.judge()
            }
            _ => Ok(()),
        }
    }

    /// The source's VMM begins to put out its stream.
    fn starts(&mut self) -> Result<(), String> {
        if self.agents[0].source_phase() != Some(SourcePhase::Migrating) {
            return Ok(());
        }
        self.outgoing = Some(Outgoing::new(self.first_leg()?, &self.scenario)?);
        for link in 0..self.scenario.choice.streams as u16 {
            self.dial(Some(LinkId(link).0))?;
        }
        self.steer()?;
        self.pump()
    }

    fn first_leg(&self) -> Result<Leg, String> {
        Leg::first(self.session, self.scenario.choice.clone()).ok_or_else(|| "no first leg".into())
    }

    /// The agent will hear this of its VMM.
    pub(crate) fn answers(&mut self, side: Side, answer: Input) {
        let life = self.life(side);
        self.agent(side).answers.push_back(answer);
        let takes = self.rng.scale(MS / 100, 10 * MS);
        self.queue.after(takes, Event::Answer(side, life));
    }

    pub(crate) fn answer(&mut self, side: Side) -> Result<(), String> {
        match self.agent(side).answers.pop_front() {
            Some(answer) => self.feed(side, answer),
            None => Ok(()),
        }
    }

    pub(crate) fn retry(&mut self, side: Side) -> Result<(), String> {
        self.feed(side, Input::Retry)
    }

    pub(crate) fn dark(&mut self, side: Side, darkness: u32) -> Result<(), String> {
        if self.darkness[side as usize] != darkness || self.agent(side).whole {
            return Ok(());
        }
        self.excuse = Some("out of reach for too long");
        self.feed(side, Input::Abort(AbortReason::LinkLost))
    }

    pub(crate) fn deadline(&mut self) -> Result<(), String> {
        self.excuse = Some("deadline");
        self.feed(S, Input::Abort(AbortReason::Deadline))
    }

    /// Kills an agent: whatever it held is gone but for its journal; its VMM lives on.
    pub(crate) fn crash(&mut self, side: Side) -> Result<(), String> {
        let receiving = self.incoming.is_some();
        let all_made = self.sent_digest.is_some();
        let odd = self.rng.one_in(2);
        let agent = &mut self.agents[side as usize];
        if agent.machine.is_none() || !agent.knows() {
            return Ok(());
        }
        self.tally.crashes[side as usize] += 1;
        agent.kill(&mut self.rng)?;
        // What it left in its VMM's socket is carried out, up to some point.
        let carried_out = self.rng.below(agent.commands.len() as u64 + 1);
        let commands = std::mem::take(&mut agent.commands);
        for command in commands.into_iter().take(carried_out as usize) {
            agent.execute(command, self.scenario.guest_ran, true);
        }
        // A migration breaks off with its agent; the source's VMM may think that it is complete.
        agent.vmm = match (side, agent.vmm) {
            (S, Vmm::Migrating) if all_made && odd => Vmm::Post,
            (S, Vmm::Migrating) => Vmm::Idle,
            (D, Vmm::Incoming { .. }) if receiving && odd => Vmm::Gone,
            (_, vmm) => vmm,
        };
        match side {
            S => self.outgoing = None,
            D => self.incoming = None,
        }
        let noticed =
            if self.rng.one_in(3) { self.rng.scale(SECOND, 30 * SECOND) } else { self.scenario.latency };
        self.close_all(side, false, noticed);
        self.excuse = Some("an agent died");
        let back = self.rng.scale(50 * MS, 20 * SECOND);
        self.unfair_until(self.queue.now() + back + noticed);
        self.queue.after(back, Event::Restart(side));
        Ok(())
    }

    pub(crate) fn restart(&mut self, side: Side) -> Result<(), String> {
        let sees = !self.rng.one_in(4);
        let vmm = self.agents[side as usize].vmm.observed(self.scenario.guest_ran);
        self.agent(side).recover(sees.then_some(vmm))?;
        if !sees && vmm == VmmState::Gone {
            self.answers(side, Input::Vmm(VmmState::Gone));
        }
        self.drain(side)?;
        self.falls_dark(side);
        if side == S {
            self.redial(None);
        }
        Ok(())
    }
}
