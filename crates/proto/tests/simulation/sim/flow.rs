//! Chunks and bytes on their way: made, sent, verified, applied, acknowledged.

use dwcp_proto::chunk::Kind;
use dwcp_proto::handover::{AbortReason, DestinationPhase, Input};
use dwcp_proto::message::Ack;
use dwcp_proto::receiver::Admission;
use dwcp_proto::sender::{LINK_QUEUE, MAX_NACKS};
use dwcp_proto::{LinkId, Seq};

use super::agent::Vmm;
use super::data::{Applying, Digest, Incoming, Landing, Load, Piece, Way, wire_bytes};
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
        let Some(out) = &self.outgoing else { return Ok(()) };
        match out.way {
            Way::Chunks(_) => self.transmit()?,
            Way::Bytes { .. } => self.stream_out(),
        }
        let room = self.is(Mutant::RoomIgnored);
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        let wants = out.wants_more(&self.scenario, &self.stream);
        let hasty = room && out.asked.is_none() && !out.ending(&self.scenario, &self.stream);
        if !out.producing && (wants || hasty) {
            out.producing = true;
            let delay = self.rng.between(self.scenario.encode / 4, self.scenario.encode);
            let at = (self.queue.now() + delay).max(self.idle_until);
            self.queue.at(at, Event::Produced(self.agents[0].life, out.leg.number));
        }
        let whole = out.finished(&self.scenario, &self.stream);
        let whole = whole.filter(|_| !out.delivered && self.agents[0].vmm != Vmm::Migrating);
        if let Some(transfer) = whole {
            out.delivered = true;
            self.agents[0].whole = true;
            self.feed(S, Input::Whole(transfer))?;
        }
        Ok(())
    }

    /// Hands chunks to connections.
    fn transmit(&mut self) -> Result<(), String> {
        let now = self.scenario.clocks[0].reads(self.queue.now());
        loop {
            let Some(out) = &mut self.outgoing else { return Ok(()) };
            let Way::Chunks(chunks) = &mut out.way else { return Ok(()) };
            let forward = self.agents[0].vmm != Vmm::Migrating || chunks.end.is_some();
            let holds = self.helm.holds() && !forward && self.scenario.mutant != Some(Mutant::FlagIgnored);
            if out.asked.is_some() || holds {
                return Ok(());
            }
            let Some((link, seq)) = chunks.sender.poll_transmit(now) else { return Ok(()) };
            let chunk = seq.0.checked_sub(chunks.base).and_then(|i| chunks.kept.get(i as usize));
            let Some(chunk) = chunk.cloned() else {
                return Err(format!("chunk {seq} is sent, {} on are unacknowledged", chunks.base));
            };
            if X::header(&chunk).kind == Kind::Data && X::header(&chunk).end().0 <= out.reel.applied {
                return Err(format!("chunk {seq} is sent, though it was acknowledged"));
            }
            self.tally.sent += 1;
            let Some(&conn) = out.conns.get(&link) else {
                if self.is(Mutant::LinkDownUntold) {
                    continue;
                }
                return Err(format!("chunk {seq} is for {link}, which is down"));
            };
            let queue = &mut self.conns[conn.0 as usize].queue;
            queue.push_back(Load::Chunk(chunk));
            if queue.len() as u32 > LINK_QUEUE {
                return Err(format!("{} chunks wait for {link}", queue.len()));
            }
            self.obedient()?;
            self.write(conn);
        }
    }

    /// Hands bytes to the one connection of v1.
    fn stream_out(&mut self) {
        let Some(out) = &mut self.outgoing else { return };
        let Some(&id) = out.conns.get(&LinkId(0)).filter(|_| out.asked.is_none()) else { return };
        while self.conns[id.0 as usize].queue.len() < LINK_QUEUE as usize
            && let Some((piece, word)) = out.next_bytes(&self.stream, &mut self.rng)
        {
            self.conns[id.0 as usize].queue.push_back(Load::Bytes(piece, word));
        }
        self.write(id);
    }

    pub(crate) fn produced(&mut self, leg: u32) -> Result<(), String> {
        let vmm = self.agents[0].vmm;
        let Some(out) = self.outgoing.as_mut().filter(|out| out.leg.number == leg) else { return Ok(()) };
        out.producing = false;
        // The stream breaks off where the VMM has died; its agent will hear of it.
        let whole = self.stream.records() == self.scenario.chunks;
        if vmm != Vmm::Migrating && !(whole && vmm == Vmm::Post) {
            return Ok(());
        }
        if out.asked.is_none() {
            out.take(&self.scenario, &mut self.stream, &mut self.rng)?;
        }
        if self.stream.records() == self.scenario.chunks && self.sent_digest.is_none() {
            self.sent_digest = Some(Digest::of(&self.stream));
            self.agents[0].vmm = Vmm::Post;
        }
        self.tell_end();
        self.pump()
    }

    /// Starts to write what waits for a connection.
    fn write(&mut self, id: ConnId) {
        let now = self.queue.now();
        let conn = &mut self.conns[id.0 as usize];
        let Some(load) = conn.queue.front().filter(|_| !conn.writing) else { return };
        conn.writing = true;
        let takes = on_the_wire::<X>(load) * self.scenario.ps_per_byte / 1000;
        // A stall holds the writer up too, once the socket's buffer is full.
        let start = now.max(conn.floor[D as usize].saturating_sub(100 * MS));
        self.queue.at(start + takes, Event::Wrote(id));
    }

    pub(crate) fn wrote(&mut self, id: ConnId) -> Result<(), String> {
        let now = self.queue.now();
        let conn = &mut self.conns[id.0 as usize];
        conn.writing = false;
        let Some(mut load) = conn.queue.pop_front().filter(|_| conn.held[S as usize]) else { return Ok(()) };
        if !conn.broken[D as usize] {
            if let Load::Chunk(chunk) = &mut load
                && self.rng.ppm(self.scenario.altered)
                && X::header(chunk).kind == Kind::Data
            {
                *chunk = X::altered(chunk.clone(), self.rng.next());
                self.tally.altered += 1;
            }
            let takes = on_the_wire::<X>(&load) * self.scenario.ps_per_byte / 1000;
            let late = self.scenario.latency + self.rng.below(self.scenario.jitter + 1);
            let header = conn.arrival(D, now, late);
            let payload = conn.arrival(D, header, self.rng.below(takes / 2 + MS / 10));
            if matches!(load, Load::Chunk(_)) {
                self.queue.at(header, Event::Header(id));
            }
            conn.flight.push_back(load);
            self.queue.at(payload, Event::Payload(id));
        }
        if let (Some(out), Some(link)) = (&mut self.outgoing, conn.link)
            && let Way::Chunks(chunks) = &mut out.way
            && out.conns.get(&link) == Some(&id)
        {
            chunks.sender.written(link);
        }
        self.write(id);
        self.pump()
    }

    pub(crate) fn header(&mut self, id: ConnId) -> Result<(), String> {
        let mutant = self.scenario.mutant;
        let conn = &mut self.conns[id.0 as usize];
        let Some(incoming) = self.incoming.as_mut().filter(|_| conn.held[D as usize]) else { return Ok(()) };
        let Some(Load::Chunk(chunk)) = conn.flight.front() else { return Ok(()) };
        let Some(arriving) = incoming.arriving() else { return Err("a chunk on a leg of bytes".into()) };
        let header = arriving.seal.read(chunk)?;
        let lacks = arriving.receiver.lacks(header.seq);
        match arriving.admit(&header, mutant)? {
            Admission::Take if mutant == Some(Mutant::SecondCopyDropped) && !lacks => {
                arriving.receiver.refused(header.seq);
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
        let Some(incoming) = self.incoming.as_mut().filter(|_| conn.held[D as usize]) else { return Ok(()) };
        let chunk = match conn.flight.pop_front() {
            Some(Load::Chunk(chunk)) => chunk,
            Some(Load::Bytes(piece, word)) => {
                let Landing::Bytes { pending, .. } = &mut incoming.way else {
                    return Err("bytes on a leg of chunks".into());
                };
                pending.push_back((piece, word));
                return self.apply();
            }
            None => return Ok(()),
        };
        let Some(seq) = conn.reading.take() else { return Ok(()) };
        let copy = Some(Copy { life: self.agents[1].life, leg: incoming.leg.number, seq: seq.0, chunk });
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
        if let Some(arriving) = self.incoming.as_mut().and_then(Incoming::arriving)
            && self.scenario.mutant != Some(Mutant::BrokenCopyKept)
        {
            arriving.receiver.refused(seq);
        }
    }

    pub(crate) fn judged(&mut self, number: u32) -> Result<(), String> {
        let copy = self.copies.get_mut(number as usize).and_then(Option::take);
        self.free.push(number);
        let Some(Copy { life, leg, seq, chunk }) = copy else { return Err("a copy is judged twice".into()) };
        let ignored = self.is(Mutant::DigestUnchecked);
        let Some(incoming) = self.incoming.as_mut().filter(|_| life == self.agents[1].life) else {
            return Ok(());
        };
        // Of a leg that is over.
        let Some(arriving) = Some(incoming).filter(|i| i.leg.number == leg).and_then(Incoming::arriving)
        else {
            return Ok(());
        };
        match arriving.seal.word(chunk).or(ignored.then_some(7)) {
            Some(word) => {
                arriving.verified(seq, word, &self.scenario)?;
                if let Some(incoming) = &mut self.incoming {
                    incoming.state();
                }
                self.acknowledge();
            }
            None => {
                if arriving.refused(seq) >= MAX_NACKS {
                    return self.hopeless();
                }
                if let Some(incoming) = &mut self.incoming {
                    incoming.state();
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

    pub(crate) fn apply(&mut self) -> Result<(), String> {
        let hasty = self.is(Mutant::OrderIgnored);
        let again = self.is(Mutant::DuplicateApplied);
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        if (hasty || again)
            && let Some(arriving) = incoming.arriving()
        {
            let next = arriving.receiver.next().0;
            let odd =
                arriving.ready.keys().copied().find(|seq| if hasty { *seq > next } else { *seq < next });
            if let Some(seq) = odd {
                let word = arriving.ready.remove(&seq);
                let piece = Piece { offset: incoming.offset + 1, len: 1 };
                return incoming.sink(piece, word, &self.stream, &mut self.digest);
            }
        }
        if let Some(applying) = incoming.apply()? {
            let takes = applying.len() * self.scenario.sink_ps / 1000 + self.rng.below(20_000);
            let now = self.queue.now();
            // It stands still until then, or crawls.
            let late = self.slow_until.saturating_sub(now).min(self.slowness);
            self.queue.at(now + late + takes, Event::Applied(self.agents[1].life));
            if let Applying::Chunk(header) = &applying
                && self.is(Mutant::AckBeforeApplied)
            {
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
        incoming.applied(&self.stream, &mut self.digest)?;
        self.tally.applied += 1;
        self.acknowledge();
        self.arrives();
        self.judge()?;
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

    /// The VMM has everything, and loads it.
    pub(crate) fn arrives(&mut self) {
        let Some(incoming) = &self.incoming else { return };
        if incoming.finished().is_some() && !self.loading {
            self.loading = true;
            let takes = self.rng.between(MS, 50 * MS);
            self.queue.after(takes, Event::Loaded(self.agents[1].life));
        }
    }

    /// The source hears what was applied or refused.
    pub(crate) fn acknowledged(&mut self, ack: &Ack) -> Result<(), String> {
        let now = self.scenario.clocks[0].reads(self.queue.now());
        let ignored = self.is(Mutant::RefusalIgnored);
        let Some(out) = &mut self.outgoing else { return Ok(()) };
        if out.asked.is_some() || ack.leg != out.leg.number {
            return Ok(());
        }
        match &mut out.way {
            Way::Chunks(chunks) => {
                if ack.next >= chunks.base {
                    chunks.sender.held(ack.held);
                    chunks.acked(ack.next, ack.applied, now)?;
                    for refusal in ack.refused.iter().filter(|_| !ignored) {
                        let refused = chunks.sender.nack(Seq(refusal.seq), refusal.times);
                        refused.map_err(|e| format!("an honest destination: {e}"))?;
                    }
                    out.reel.trim(ack.applied);
                }
                self.tally.retransmitted = self.tally.retransmitted.max(chunks.sender.retransmitted());
            }
            Way::Bytes { .. } => out.reel.trim(ack.applied),
        }
        self.pump()
    }

    /// The destination's VMM has loaded everything that it was given: the same as the source's VMM gave.
    pub(crate) fn loaded(&mut self) -> Result<(), String> {
        let stops = !self.is(Mutant::NoStopWhileIncoming);
        let Some(incoming) = &self.incoming else { return Ok(()) };
        if Some(self.digest) != self.sent_digest {
            return Err("I3: the destination loaded something else than the source sent".into());
        }
        let left = match &incoming.way {
            Landing::Chunks(arriving) => !arriving.ready.is_empty(),
            Landing::Bytes { pending, .. } => !pending.is_empty(),
        };
        if left || incoming.applying.is_some() {
            return Err("something is left after the end".into());
        }
        let Some(transfer) = incoming.finished() else { return Err("it loads what is not whole".into()) };
        let agent = &mut self.agents[1];
        let receiving = agent.destination_phase() == Some(DestinationPhase::Receiving);
        let Vmm::Incoming { stopped } = agent.vmm else { return Ok(()) };
        let starts = !(stopped && stops) && self.scenario.guest_ran;
        agent.vmm = if starts { Vmm::Runs } else { Vmm::Loaded };
        agent.ran |= starts;
        if receiving {
            agent.whole = true;
            self.feed(D, Input::Whole(transfer))?;
        }
        Ok(())
    }
}

fn on_the_wire<X: Seal>(load: &Load<X::Chunk>) -> u64 {
    match load {
        Load::Chunk(chunk) => wire_bytes(X::header(chunk)),
        Load::Bytes(piece, _) => piece.len,
    }
}
