//! Changes of path: the flag and the others who have a say, the order, the answer, and the leg after.

use std::time::Duration;

use dwcp_proto::handover::{AbortReason, Input};
use dwcp_proto::negotiate::{Wish, choose_again, permits_again};
use dwcp_proto::path::{Cause, LEAST, PathChoice, Permit};
use dwcp_proto::{Leg, LinkId, Mode, Path};

use super::agent::Vmm;
use super::data::{Landing, Switch, Switched, Way};
use super::net::Said;
use super::queue::{Event, MS, SECOND, Time};
use super::scenario::Mutant;
use super::seal::Seal;
use super::world::{D, S, World};

/// The source's choice of path, and what it was told.
pub(crate) struct Helm {
    choice: PathChoice,
    permit: bool,
    vetoed: bool,
    trouble: bool,
    /// Since when something forbids v3, as far as the source knows.
    forbidden: Option<Time>,
    /// When the path last changed.
    changed: Option<Time>,
}

impl Helm {
    pub(crate) fn new(fixed: Option<Path>, hesitation: Duration, now: Duration) -> Self {
        let choice = PathChoice::new(Path::V3, fixed, permit(true), hesitation, now);
        Helm { choice, permit: true, vetoed: false, trouble: false, forbidden: None, changed: None }
    }

    /// Nothing more may be sent on v3 before the path changes.
    pub(crate) fn holds(&self) -> bool {
        self.choice.leaving()
    }

    fn note(&mut self, now: Time) {
        let forbids = !self.permit || self.vetoed || self.trouble;
        self.forbidden = if forbids { self.forbidden.or(Some(now)) } else { None };
    }
}

fn permit(on: bool) -> Permit {
    Permit { stay: on, enter: on, allow: on, reason: String::new() }
}

/// Who changes their mind.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Word {
    Flag,
    Veto,
    Trouble,
    Operator(Path),
}

impl<X: Seal> World<'_, X> {
    fn clock(&self) -> Duration {
        self.scenario.clocks[0].reads(self.queue.now())
    }

    /// Somebody who has a say in the path changes their mind.
    pub(crate) fn word(&mut self, word: Word) -> Result<(), String> {
        let (now, clock) = (self.queue.now(), self.clock());
        let hesitation = self.scenario.hesitation.as_nanos() as Time;
        self.unfair_until(now + hesitation + 10 * SECOND);
        self.tally.words += 1;
        match word {
            Word::Flag => {
                self.helm.permit = !self.helm.permit;
                let permit = permit(self.helm.permit);
                self.helm.choice.permit(permit, clock);
            }
            Word::Trouble => {
                self.helm.trouble = !self.helm.trouble;
                let trouble = self.helm.trouble.then(|| (Cause::Memory, String::new()));
                self.helm.choice.trouble(trouble, clock);
            }
            // What may not be is refused to the operator.
            Word::Operator(path) => drop(self.helm.choice.ask(path)),
            Word::Veto => {
                self.veto = !self.veto;
                self.say(D, Said::Veto(self.veto));
            }
        }
        self.helm.note(now);
        self.steer()
    }

    pub(crate) fn vetoed(&mut self, veto: bool) -> Result<(), String> {
        let clock = self.clock();
        self.helm.vetoed = veto;
        self.helm.choice.veto(veto.then(String::new), clock);
        self.helm.note(self.queue.now());
        self.steer()
    }

    /// Changes the path if it should change now, else looks again when it may have to.
    pub(crate) fn steer(&mut self) -> Result<(), String> {
        let clock = self.clock();
        let migrating = self.agents[0].vmm == Vmm::Migrating;
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        if out.asked.is_some() || !migrating || out.ending(&self.scenario, &self.stream) {
            return Ok(());
        }
        if self.scenario.mutant == Some(Mutant::FlagIgnored) {
            return Ok(());
        }
        let Some(change) = self.helm.choice.poll(clock) else {
            if let Some(wait) = self.helm.choice.next_poll(clock) {
                let wait = self.scenario.clocks[0].lasts(wait.as_nanos() as Time) + MS;
                self.queue.after(wait, Event::Helm(self.agents[0].life));
            }
            return Ok(());
        };
        if change.to == out.leg.path {
            return Err(format!("a change from {:?} to itself", change.to));
        }
        let [source, destination] = &self.scenario.offers;
        let before = &out.leg.choice;
        let wish = Wish { path: Some(change.to), ..self.scenario.wish };
        let link = Mode::from_wire(before.mode).unwrap_or(Mode::Internet);
        let Ok(choice) = choose_again(source, destination, wish, link, before) else {
            // v1 is barred here: it ends at the source.
            self.excuse = Some("v1 is barred");
            return self.feed(S, Input::Abort(AbortReason::Policy));
        };
        let switch = Switch { leg: out.leg.number + 1, choice };
        out.asked = Some(switch.clone());
        out.conns.clear();
        let noticed = self.scenario.latency;
        self.close_all(S, true, noticed);
        self.say(S, Said::Switch(switch));
        Ok(())
    }

    /// The destination hears an order.
    pub(crate) fn ordered(&mut self, switch: Switch) -> Result<(), String> {
        let [source, destination] = &self.scenario.offers;
        permits_again(&switch.choice, source, destination)
            .map_err(|why| format!("the destination refuses an honest order: {why}"))?;
        let lost = self.is(Mutant::EarlyOrderLost);
        match &mut self.incoming {
            Some(incoming) => incoming.ordered = Some(switch),
            None if lost => {}
            None => self.early = Some(switch),
        }
        self.judge()
    }

    /// Obeys the last order, between two pieces that the VMM takes.
    pub(crate) fn judge(&mut self) -> Result<(), String> {
        let once = self.is(Mutant::SwitchedSaidOnce);
        let mutant = self.scenario.mutant;
        let Some(incoming) = self.incoming.as_mut().filter(|i| i.applying.is_none()) else { return Ok(()) };
        let Some(switch) = incoming.ordered.take() else { return Ok(()) };
        if switch.leg == incoming.leg.number {
            // Obeyed already; the answer was lost.
            if let Some(switched) = incoming.switched.filter(|_| !once) {
                self.say(D, Said::Switched(switched));
            }
            return Ok(());
        }
        let switched = incoming.turn(switch, mutant)?;
        incoming.conns.clear();
        let noticed = self.scenario.latency;
        self.close_all(D, true, noticed);
        self.say(D, Said::Switched(switched));
        Ok(())
    }

    /// The source hears where the next leg begins, and begins it.
    pub(crate) fn switched(&mut self, switched: Switched) -> Result<(), String> {
        let (now, clock) = (self.queue.now(), self.clock());
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        let before = out.leg.number;
        out.turned(switched, &self.scenario)?;
        if out.leg.number == before {
            return Ok(());
        }
        out.producing = false;
        let (path, streams) = (out.leg.path, out.leg.choice.streams);
        if self.helm.changed.is_some_and(|changed| clock_between(self, changed, now) < LEAST) {
            return Err("the path changed twice within a second".into());
        }
        self.helm.changed = Some(now);
        self.helm.choice.changed(path, clock);
        self.tally.turns[usize::from(path == Path::V1)] += 1;
        for link in 0..streams as u16 {
            self.dial(Some(LinkId(link).0))?;
        }
        self.steer()?;
        self.tell_end();
        self.pump()
    }

    /// Tells where the v1 stream ends, once that is known.
    pub(crate) fn tell_end(&mut self) {
        let Some(out) = &self.outgoing else { return };
        let whole = out.asked.is_none() && out.all_read(&self.scenario, &self.stream);
        if matches!(out.way, Way::Bytes { .. }) && whole {
            let end = Said::StreamEnd { leg: out.leg.number, length: self.stream.len() };
            self.say(S, end);
        }
    }

    pub(crate) fn stream_ends(&mut self, leg: u32, end: u64) -> Result<(), String> {
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        if let Landing::Bytes { length, .. } = &mut incoming.way
            && incoming.leg.number == leg
        {
            *length = Some(end);
        }
        self.arrives();
        self.apply()
    }

    /// What both sides say again on a new control connection.
    pub(crate) fn say_again(&mut self) {
        let once = |mutant| self.scenario.mutant == Some(mutant);
        let (switch_once, end_once) = (once(Mutant::SwitchSaidOnce), once(Mutant::StreamEndSaidOnce));
        if self.incoming.is_some() {
            self.say(D, Said::Veto(self.veto));
        }
        let asked = self.outgoing.as_ref().and_then(|out| out.asked.clone());
        if let Some(switch) = asked.filter(|_| !switch_once) {
            self.say(S, Said::Switch(switch));
        }
        if !end_once {
            self.tell_end();
        }
    }

    /// The leg on which the source's data is.
    pub(crate) fn leg(&self) -> Option<&Leg> {
        Some(&self.outgoing.as_ref()?.leg)
    }

    /// No chunk of v3 is sent later than a second after v3 was forbidden, but for a switchover that has begun.
    pub(crate) fn obedient(&self) -> Result<(), String> {
        let forbidden = self.helm.forbidden.filter(|_| self.agents[0].vmm == Vmm::Migrating);
        let late = forbidden.map(|since| self.queue.now() - since);
        // The source's own clock may be slow.
        match late.filter(|late| *late > LEAST.as_nanos() as Time * 11 / 10) {
            Some(late) => Err(format!("v3 sends on, {} ms after it was forbidden", late / MS)),
            None => Ok(()),
        }
    }
}

/// How long this was on the source's clock.
fn clock_between<X: Seal>(world: &World<'_, X>, from: Time, to: Time) -> Duration {
    let clock = &world.scenario.clocks[0];
    clock.reads(to).saturating_sub(clock.reads(from))
}
