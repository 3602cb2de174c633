//! Connections come and go; each side notices in its own time, and the source makes them again.

use dwcp_proto::LinkId;
use dwcp_proto::handover::{AbortReason, DestinationPhase, Input};

use super::data::{Incoming, Way};
use super::net::{Conn, ConnId, Said};
use super::queue::{Event, MS, SECOND, Time};
use super::scenario::Mutant;
use super::seal::Seal;
use super::world::{D, S, SIDES, Side, World};

/// Between two attempts to connect again.
const RETRY: Time = 200 * MS;
/// After so long without a word or an acknowledgement of TCP's an end takes its connection for dead.
pub(crate) const SILENCE: Time = 4 * SECOND;

/// How a connection breaks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Break {
    /// What is on its way still arrives.
    pub(crate) delivers: bool,
    /// How long until each side notices.
    pub(crate) noticed: [Time; 2],
}

impl<X: Seal> World<'_, X> {
    /// Makes a connection: a data link, or the control connection. The destination gives up the one that it replaces.
    pub(crate) fn connect(&mut self, link: Option<LinkId>) -> Result<(), String> {
        let id = ConnId(self.conns.len() as u32);
        self.conns.push(Conn::new(link));
        self.tally.connections += 1;
        let Some(link) = link else {
            for side in SIDES {
                if let Some(old) = self.control[side as usize].replace(id) {
                    self.conns[old.0 as usize].held[side as usize] = false;
                }
                self.darkness[side as usize] += 1;
            }
            self.repeat();
            self.say_again();
            let first = if self.rng.one_in(2) { S } else { D };
            if !self.is(Mutant::NoResend) {
                self.feed(first, Input::Connected)?;
                self.feed(first.peer(), Input::Connected)?;
            }
            return Ok(());
        };
        if let Some(old) = self.incoming.as_mut().and_then(|i| i.conns.insert(link, id)) {
            self.leave(old, D);
        }
        let applied = self.incoming.as_mut().map(Incoming::goes_on_at);
        let keeps = self.is(Mutant::BytesNotRepeated);
        if let Some(out) = &mut self.outgoing {
            out.conns.insert(link, id);
            match &mut out.way {
                Way::Chunks(chunks) => chunks.sender.link_up(link),
                // The destination said where it goes on.
                Way::Bytes { written } if !keeps => *written = applied.unwrap_or(*written),
                Way::Bytes { .. } => {}
            }
        }
        self.pump()
    }

    /// A side lets go of a connection.
    fn leave(&mut self, id: ConnId, side: Side) {
        let conn = &mut self.conns[id.0 as usize];
        conn.held[side as usize] = false;
        if side == D
            && let Some(seq) = conn.reading.take()
        {
            self.breaks_off(seq);
        }
    }

    /// A connection breaks: what is said on it from now on is lost.
    pub(crate) fn break_off(&mut self, id: ConnId, how: Break) {
        let conn = &mut self.conns[id.0 as usize];
        conn.broken = [true; 2];
        if !how.delivers {
            conn.flight.clear();
            conn.said.iter_mut().for_each(|said| said.clear());
        }
        for side in SIDES {
            if conn.held[side as usize] {
                self.queue.after(how.noticed[side as usize], Event::Lost(id, side));
            }
        }
        self.tally.breaks += 1;
    }

    /// A side closes everything that it holds: it has ended, or died.
    pub(crate) fn close_all(&mut self, side: Side, data_only: bool, noticed: Time) {
        for n in 0..self.conns.len() as u32 {
            let conn = &mut self.conns[n as usize];
            if !conn.held[side as usize] || data_only && conn.link.is_none() {
                continue;
            }
            conn.held[side as usize] = false;
            conn.broken = [true; 2];
            conn.queue.clear();
            if conn.held[side.peer() as usize] {
                self.queue.after(noticed, Event::Lost(ConnId(n), side.peer()));
            }
        }
        if !data_only && self.control[side as usize].take().is_some() {
            self.darkness[side as usize] += 1;
        }
    }

    pub(crate) fn notices(&mut self, id: ConnId, side: Side) -> Result<(), String> {
        let conn = &mut self.conns[id.0 as usize];
        if !conn.held[side as usize] {
            return Ok(());
        }
        let link = conn.link;
        conn.queue.clear();
        self.leave(id, side);
        let Some(link) = link else {
            self.control[side as usize] = None;
            self.falls_dark(side);
            if side == S {
                self.redial(None);
            }
            return Ok(());
        };
        if side == S
            && let Some(out) = &mut self.outgoing
        {
            out.conns.remove(&link);
            if let Way::Chunks(chunks) = &mut out.way
                && self.scenario.mutant != Some(Mutant::LinkDownUntold)
            {
                chunks.sender.link_down(link);
            }
            self.redial(Some(link.0));
        }
        self.pump()
    }

    /// A side is without a control connection, and begins to lose patience.
    pub(crate) fn falls_dark(&mut self, side: Side) {
        let n = side as usize;
        self.darkness[n] += 1;
        let patience = self.scenario.clocks[n].lasts(self.scenario.patience[n]);
        self.queue.after(patience, Event::Dark(side, self.life(side), self.darkness[n]));
    }

    pub(crate) fn redial(&mut self, link: Option<u16>) {
        self.queue.after(RETRY + 2 * self.scenario.latency, Event::Dial(link, self.agents[0].life));
    }

    pub(crate) fn dial(&mut self, link: Option<u16>) -> Result<(), String> {
        let reachable = self.queue.now() >= self.cut_until && self.agents[1].machine.is_some();
        let Some(link) = link else {
            if self.agents[0].machine.is_none() || self.control[0].is_some() {
                return Ok(());
            }
            if !reachable {
                self.redial(None);
                return Ok(());
            }
            return self.connect(None);
        };
        let Some(out) = self.outgoing.as_ref().filter(|out| out.asked.is_none()) else { return Ok(()) };
        if out.conns.contains_key(&LinkId(link)) || u32::from(link) >= out.leg.choice.streams {
            return Ok(());
        }
        if reachable && self.agents[1].life > 0 && self.incoming.is_none() {
            // A restarted agent does not know the session's data path any more, and refuses.
            return self.feed(S, Input::Abort(AbortReason::PeerAborted));
        }
        let taken =
            self.incoming.is_some() && self.agents[1].destination_phase() != Some(DestinationPhase::Dropping);
        if !reachable || !taken {
            self.redial(Some(link));
            return Ok(());
        }
        self.connect(Some(LinkId(link)))
    }

    /// Says something on the control connection; lost if there is none.
    pub(crate) fn say(&mut self, from: Side, said: Said) {
        let Some(id) = self.control[from as usize] else { return };
        let conn = &mut self.conns[id.0 as usize];
        let to = from.peer();
        if conn.broken[to as usize] {
            return;
        }
        conn.said[to as usize].push_back(said);
        let late = self.scenario.latency + self.rng.below(self.scenario.jitter + 1);
        let at = conn.arrival(to, self.queue.now(), late);
        self.queue.at(at, Event::Heard(id, to));
    }

    pub(crate) fn heard(&mut self, id: ConnId, side: Side) -> Result<(), String> {
        let conn = &mut self.conns[id.0 as usize];
        let said = conn.said[side as usize].pop_front().filter(|_| conn.held[side as usize]);
        match said {
            None => Ok(()),
            Some(Said::Handover(message)) => self.feed(side, Input::Message(message)),
            Some(Said::Ack(ack)) => self.acknowledged(&ack),
            Some(Said::StreamEnd { leg, length }) => self.stream_ends(leg, length),
            Some(Said::Switch(switch)) => self.ordered(switch),
            Some(Said::Switched(switched)) => self.switched(switched),
            Some(Said::Veto(veto)) => self.vetoed(veto),
        }
    }
}
