//! Chunks on their way: made, sent, verified, applied, acknowledged.

use dwcp_proto::Seq;
use dwcp_proto::chunk::Kind;
use dwcp_proto::handover::{AbortReason, DestinationPhase, Input};
use dwcp_proto::receiver::Admission;
use dwcp_proto::sender::{LINK_QUEUE, MAX_NACKS};

use super::agent::Vmm;
use super::data::wire_bytes;
use super::net::{ConnId, Said};
use super::queue::{Event, MS, Time};
use super::scenario::Mutant;
use super::seal::Seal;
use super::world::{Copy, D, S, World};

/// Between two acknowledgements.
const ACK_PAUSE: Time = 2 * MS;

impl<X: Seal> World<'_, X> {
    pub(crate) fn is(&self, mutant: Mutant) -> bool {
        self.scenario.mutant == Some(mutant)
    }

    /// Lets the source's data path do all that it can.
    pub(crate) fn pump(&mut self) -> Result<(), String> {
        let now = self.scenario.clocks[0].reads(self.queue.now());
        loop {
            let Some(out) = &mut self.outgoing else { return Ok(()) };
            let Some((link, seq)) = out.sender.poll_transmit(now) else { break };
            let chunk = seq.0.checked_sub(out.base).and_then(|i| out.kept.get(i as usize));
            let Some(chunk) = chunk.cloned() else {
                return Err(format!("chunk {seq} is sent, {} on are unacknowledged", out.base));
            };
            self.tally.sent += 1;
            let Some(&conn) = out.conns.get(&link) else {
                if self.is(Mutant::LinkDownUntold) {
                    continue;
                }
                return Err(format!("chunk {seq} is for {link}, which is down"));
            };
            let queue = &mut self.conns[conn.0 as usize].queue;
            queue.push_back(chunk);
            if queue.len() as u32 > LINK_QUEUE {
                return Err(format!("{} chunks wait for {link}", queue.len()));
            }
            self.write(conn);
        }
        let room = self.is(Mutant::RoomIgnored);
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        if out.end.is_none() && !out.producing && (room || out.sender.has_room()) {
            out.producing = true;
            let delay = self.rng.between(self.scenario.encode / 4, self.scenario.encode);
            let at = (self.queue.now() + delay).max(self.idle_until);
            self.queue.at(at, Event::Produced(self.agents[0].life));
        }
        let whole = out.finished().filter(|_| !out.delivered && self.agents[0].vmm != Vmm::Migrating);
        if let Some(transfer) = whole {
            out.delivered = true;
            self.agents[0].whole = true;
            self.feed(S, Input::Whole(transfer))?;
        }
        Ok(())
    }

    pub(crate) fn produced(&mut self) -> Result<(), String> {
        let vmm = self.agents[0].vmm;
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        out.producing = false;
        // The stream breaks off where the VMM has died; its agent will hear of it.
        let whole = out.made == self.scenario.chunks;
        if vmm != Vmm::Migrating && !(whole && vmm == Vmm::Post) {
            return Ok(());
        }
        let lengths = self.scenario.lengths(&mut self.rng);
        out.make(&self.scenario, lengths)?;
        if out.made == self.scenario.chunks && self.sent_digest.is_none() {
            self.sent_digest = Some(out.digest);
            self.agents[0].vmm = Vmm::Post;
        }
        self.pump()
    }

    /// Starts to write what waits for a connection.
    fn write(&mut self, id: ConnId) {
        let now = self.queue.now();
        let conn = &mut self.conns[id.0 as usize];
        let Some(chunk) = conn.queue.front().filter(|_| !conn.writing) else { return };
        conn.writing = true;
        let takes = wire_bytes(X::header(chunk)) * self.scenario.ps_per_byte / 1000;
        // A stall holds the writer up too, once the socket's buffer is full.
        let start = now.max(conn.floor[D as usize].saturating_sub(100 * MS));
        self.queue.at(start + takes, Event::Wrote(id));
    }

    pub(crate) fn wrote(&mut self, id: ConnId) -> Result<(), String> {
        let now = self.queue.now();
        let conn = &mut self.conns[id.0 as usize];
        conn.writing = false;
        let Some(mut chunk) = conn.queue.pop_front().filter(|_| conn.held[S as usize]) else { return Ok(()) };
        if !conn.broken[D as usize] {
            if self.rng.ppm(self.scenario.altered) && X::header(&chunk).kind == Kind::Data {
                chunk = X::altered(chunk, self.rng.next());
                self.tally.altered += 1;
            }
            let takes = wire_bytes(X::header(&chunk)) * self.scenario.ps_per_byte / 1000;
            conn.flight.push_back(chunk);
            let late = self.scenario.latency + self.rng.below(self.scenario.jitter + 1);
            let header = conn.arrival(D, now, late);
            let payload = conn.arrival(D, header, self.rng.below(takes / 2 + MS / 10));
            self.queue.at(header, Event::Header(id));
            self.queue.at(payload, Event::Payload(id));
        }
        if let (Some(out), Some(link)) = (&mut self.outgoing, conn.link) {
            out.sender.written(link);
        }
        self.write(id);
        self.pump()
    }

    pub(crate) fn header(&mut self, id: ConnId) -> Result<(), String> {
        let mutant = self.scenario.mutant;
        let conn = &mut self.conns[id.0 as usize];
        let Some(incoming) = self.incoming.as_mut().filter(|_| conn.held[D as usize]) else { return Ok(()) };
        let Some(chunk) = conn.flight.front() else { return Ok(()) };
        let header = incoming.seal.read(chunk)?;
        let lacks = incoming.receiver.lacks(header.seq);
        match incoming.admit(&header, mutant)? {
            Admission::Take if mutant == Some(Mutant::SecondCopyDropped) && !lacks => {
                incoming.receiver.refused(header.seq);
                self.tally.duplicates += 1;
            }
            Admission::Take => {
                self.tally.second_copies += u64::from(!lacks);
                conn.reading = Some(header.seq);
            }
            Admission::Duplicate => self.tally.duplicates += 1,
        }
        Ok(())
    }

    pub(crate) fn payload(&mut self, id: ConnId) -> Result<(), String> {
        let conn = &mut self.conns[id.0 as usize];
        if !conn.held[D as usize] || self.incoming.is_none() {
            return Ok(());
        }
        let Some(chunk) = conn.flight.pop_front() else { return Ok(()) };
        let Some(seq) = conn.reading.take() else { return Ok(()) };
        let copy = Some(Copy { life: self.agents[1].life, seq: seq.0, chunk });
        let number = match self.free.pop() {
            Some(number) => {
                self.copies[number as usize] = copy;
                number
            }
            None => {
                self.copies.push(copy);
                self.copies.len() as u32 - 1
            }
        };
        let takes = self.rng.below(self.scenario.verify + 1);
        self.queue.after(takes, Event::Judged(number));
        Ok(())
    }

    /// A copy of a chunk broke off with its connection.
    pub(crate) fn breaks_off(&mut self, seq: Seq) {
        if let Some(incoming) = &mut self.incoming
            && self.scenario.mutant != Some(Mutant::BrokenCopyKept)
        {
            incoming.receiver.refused(seq);
        }
    }

    pub(crate) fn judged(&mut self, number: u32) -> Result<(), String> {
        let copy = self.copies.get_mut(number as usize).and_then(Option::take);
        self.free.push(number);
        let Some(Copy { life, seq, chunk }) = copy else { return Err("a copy is judged twice".into()) };
        let ignored = self.is(Mutant::DigestUnchecked);
        let Some(incoming) = self.incoming.as_mut().filter(|_| life == self.agents[1].life) else {
            return Ok(());
        };
        match incoming.seal.word(chunk).or(ignored.then_some(7)) {
            Some(word) => incoming.verified(seq, word, &self.scenario)?,
            None => {
                if incoming.refused(seq) >= MAX_NACKS {
                    return self.hopeless();
                }
                self.acknowledge();
            }
        }
        self.apply()
    }

    /// One chunk came altered again and again: that is no accident, and ends the migration.
    fn hopeless(&mut self) -> Result<(), String> {
        self.excuse = Some("altered");
        self.feed(D, Input::Abort(AbortReason::Integrity))
    }

    fn apply(&mut self) -> Result<(), String> {
        let hasty = self.is(Mutant::OrderIgnored);
        let again = self.is(Mutant::DuplicateApplied);
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        if hasty || again {
            let next = incoming.receiver.next().0;
            let odd =
                incoming.ready.keys().copied().find(|seq| if hasty { *seq > next } else { *seq < next });
            if let Some(seq) = odd {
                let word = incoming.ready.remove(&seq);
                let offset = incoming.receiver.offset().0;
                return incoming.sink(seq, Kind::Data, offset, 1, word);
            }
        }
        if let Some(header) = incoming.apply()? {
            let takes = u64::from(header.stream_len) * self.scenario.sink_ps / 1000 + self.rng.below(20_000);
            let now = self.queue.now();
            // It stands still until then, or crawls.
            let late = self.slow_until.saturating_sub(now).min(self.slowness);
            self.queue.at(now + late + takes, Event::Applied(self.agents[1].life));
            if self.is(Mutant::AckBeforeApplied) {
                self.outdated_ack(header.seq.0 + 1);
            }
        }
        Ok(())
    }

    fn outdated_ack(&mut self, next: u64) {
        if let Some(incoming) = &mut self.incoming {
            incoming.ack.next = next;
            incoming.ack_waits = true;
            self.queue.after(0, Event::AckDue(self.agents[1].life));
        }
    }

    pub(crate) fn applied(&mut self) -> Result<(), String> {
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        incoming.applied()?;
        self.tally.applied += 1;
        if incoming.receiver.root().is_some() {
            let takes = self.rng.between(MS, 50 * MS);
            self.queue.after(takes, Event::Loaded(self.agents[1].life));
        }
        self.acknowledge();
        self.apply()
    }

    /// Says what was applied, soon.
    pub(crate) fn acknowledge(&mut self) {
        let Some(incoming) = self.incoming.as_mut().filter(|i| !i.ack_waits) else { return };
        incoming.ack_waits = true;
        self.queue.at(incoming.ack_said + ACK_PAUSE, Event::AckDue(self.agents[1].life));
    }

    pub(crate) fn ack_due(&mut self) -> Result<(), String> {
        let Some(incoming) = self.incoming.as_mut().filter(|i| i.ack_waits) else { return Ok(()) };
        incoming.ack_waits = false;
        incoming.ack_said = self.queue.now();
        let mut ack = incoming.ack.clone();
        if self.scenario.mutant == Some(Mutant::RefusalSaidOnce) {
            ack.refused.retain(|r| incoming.said.insert((r.seq, r.times)));
        }
        self.tally.acks += 1;
        self.say(D, Said::Ack(ack));
        Ok(())
    }

    /// Says again what the source may have missed.
    pub(crate) fn repeat(&mut self) {
        if !self.is(Mutant::AckNotRepeated) {
            self.acknowledge();
        }
    }

    /// The source hears what was applied or refused.
    pub(crate) fn told(&mut self, said: Said) -> Result<(), String> {
        let now = self.scenario.clocks[0].reads(self.queue.now());
        let ignored = self.is(Mutant::RefusalIgnored);
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        match said {
            Said::Ack(ack) => {
                out.acked(ack.next, ack.applied, now)?;
                for refusal in ack.refused.iter().filter(|_| !ignored) {
                    let refused = out.sender.nack(Seq(refusal.seq), refusal.times);
                    refused.map_err(|e| format!("an honest destination: {e}"))?;
                }
            }
            Said::Handover(_) => {}
        }
        self.tally.retransmitted = self.tally.retransmitted.max(out.sender.retransmitted());
        self.pump()
    }

    /// The destination's VMM has loaded everything that it was given: the same as the source's VMM gave.
    pub(crate) fn loaded(&mut self) -> Result<(), String> {
        let stops = !self.is(Mutant::NoStopWhileIncoming);
        let Some(incoming) = &self.incoming else { return Ok(()) };
        if Some(incoming.digest) != self.sent_digest {
            return Err("I3: the destination loaded something else than the source sent".into());
        }
        if !incoming.ready.is_empty() || incoming.applying.is_some() {
            return Err("something is left after the end".into());
        }
        let root = incoming.receiver.root().unwrap_or_default();
        let stream_len = incoming.receiver.offset().0;
        let agent = &mut self.agents[1];
        let receiving = agent.destination_phase() == Some(DestinationPhase::Receiving);
        let Vmm::Incoming { stopped } = agent.vmm else { return Ok(()) };
        let starts = !(stopped && stops) && self.scenario.guest_ran;
        agent.vmm = if starts { Vmm::Runs } else { Vmm::Loaded };
        agent.ran |= starts;
        if receiving {
            agent.whole = true;
            self.feed(D, Input::Whole(dwcp_proto::handover::Transfer { stream_len, root }))?;
        }
        Ok(())
    }
}
