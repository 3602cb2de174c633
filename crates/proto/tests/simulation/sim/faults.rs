//! What goes wrong.

use dwcp_proto::Path;
use dwcp_proto::handover::{AbortReason, Input, VmmState};

use super::agent::Vmm;
use super::links::{Break, SILENCE};
use super::net::ConnId;
use super::queue::{Event, MS, SECOND, Time};
use super::seal::Seal;
use super::turn::Word;
use super::world::{D, S, SIDES, Side, World};

#[derive(Debug, Clone, Copy)]
enum Fault {
    Reset,
    ResetControl,
    ResetAll,
    BlackHole,
    Cut,
    Stall,
    SlowSink,
    IdleGuest,
    Crash(Side),
    VmmDeath(Side),
    Refusal(Side),
    BadDisk(Side),
    ClockJump,
    Cancel(Side),
    Word(Word),
}

impl<X: Seal> World<'_, X> {
    /// One fault, and the time of the next.
    pub(crate) fn fault(&mut self) -> Result<(), String> {
        let now = self.queue.now();
        let gap = self.rng.below(2 * self.scenario.fault_gap + 1).max(MS);
        if now + gap < self.scenario.faults_until {
            self.queue.after(gap, Event::Fault);
        }
        if let Some(fault) = self.draw() {
            self.happens(fault)?;
        }
        Ok(())
    }

    fn draw(&mut self) -> Option<Fault> {
        let w = &self.scenario.weights;
        let weighted = [
            (w.reset, Fault::Reset),
            (w.reset_control, Fault::ResetControl),
            (w.reset_all, Fault::ResetAll),
            (w.black_hole, Fault::BlackHole),
            (w.cut, Fault::Cut),
            (w.stall, Fault::Stall),
            (w.slow_sink, Fault::SlowSink),
            (w.idle_guest, Fault::IdleGuest),
            (w.clock_jump, Fault::ClockJump),
            (w.crash[0], Fault::Crash(S)),
            (w.crash[1], Fault::Crash(D)),
            (w.vmm_death[0], Fault::VmmDeath(S)),
            (w.vmm_death[1], Fault::VmmDeath(D)),
            (w.refusal[0], Fault::Refusal(S)),
            (w.refusal[1], Fault::Refusal(D)),
            (w.bad_disk[0], Fault::BadDisk(S)),
            (w.bad_disk[1], Fault::BadDisk(D)),
            (w.cancel[0], Fault::Cancel(S)),
            (w.cancel[1], Fault::Cancel(D)),
            (w.flag, Fault::Word(Word::Flag)),
            (w.veto, Fault::Word(Word::Veto)),
            (w.trouble, Fault::Word(Word::Trouble)),
            (w.operator, Fault::Word(Word::Operator(Path::V1))),
            (w.operator, Fault::Word(Word::Operator(Path::V3))),
        ];
        let mut at = self.rng.below(weighted.iter().map(|(weight, _)| weight).sum());
        weighted.iter().find_map(|&(weight, fault)| {
            let here = at < weight;
            at = at.saturating_sub(weight);
            here.then_some(fault)
        })
    }

    fn happens(&mut self, fault: Fault) -> Result<(), String> {
        let now = self.queue.now();
        match fault {
            Fault::Reset => {
                if let Some(conn) = self.some_conn() {
                    let how = self.reset();
                    self.breaks(conn, how);
                }
            }
            Fault::ResetControl => {
                let side = if self.rng.one_in(2) { S } else { D };
                if let Some(conn) = self.control[side as usize] {
                    let how = self.reset();
                    self.breaks(conn, how);
                }
            }
            Fault::ResetAll => {
                for conn in self.held_conns() {
                    let how = self.reset();
                    self.breaks(conn, how);
                }
            }
            Fault::BlackHole => self.black_hole(),
            Fault::Cut => self.cut(now),
            Fault::Stall => {
                if let Some(conn) = self.some_conn() {
                    let span = self.rng.scale(10 * MS, SILENCE);
                    self.stall(conn, now + span);
                }
            }
            Fault::SlowSink => {
                self.slow_until = now + self.rng.scale(10 * MS, 30 * SECOND);
                self.slowness =
                    if self.rng.one_in(2) { Time::MAX } else { self.rng.scale(10 * MS, 3 * SECOND) };
                self.unfair_until(self.slow_until);
            }
            Fault::IdleGuest => {
                self.idle_until = now + self.rng.scale(10 * MS, 30 * SECOND);
                self.unfair_until(self.idle_until);
            }
            Fault::Crash(side) => self.crash(side)?,
            Fault::VmmDeath(side) => self.vmm_dies(side),
            Fault::Refusal(side) => {
                self.agent(side).refusals += 1;
                self.excuse = Some("a VMM refused");
            }
            Fault::BadDisk(side) => {
                let until = now + self.rng.scale(10 * MS, 10 * SECOND);
                self.agent(side).bad_disk_until = until;
                self.unfair_until(until);
                self.excuse = Some("a disk failed");
            }
            Fault::ClockJump => {
                let side = self.rng.below(2) as usize;
                let jump = self.rng.scale(3_600_000, 315_360_000_000);
                let wall = &mut self.scenario.clocks[side].wall_ms;
                *wall = if self.rng.one_in(2) { *wall + jump } else { wall.saturating_sub(jump) };
            }
            Fault::Word(word) => self.word(word)?,
            Fault::Cancel(side) => {
                let reason = if side == S { AbortReason::Cancelled } else { AbortReason::Deadline };
                self.excuse = Some("cancelled");
                self.feed(side, Input::Abort(reason))?;
            }
        }
        Ok(())
    }

    fn held_conns(&self) -> Vec<ConnId> {
        let held = |n: &u32| {
            let conn = &self.conns[*n as usize];
            conn.held != [false; 2] && conn.broken == [false; 2]
        };
        (0..self.conns.len() as u32).filter(held).map(ConnId).collect()
    }

    fn some_conn(&mut self) -> Option<ConnId> {
        let held = self.held_conns();
        self.rng.pick(&held)
    }

    fn breaks(&mut self, conn: ConnId, how: Break) {
        let latest = how.noticed[0].max(how.noticed[1]);
        self.unfair_until(self.queue.now() + latest);
        self.break_off(conn, how);
    }

    /// As by RST: each end notices soon, or only once it is silent for too long.
    fn reset(&mut self) -> Break {
        let noticed = SIDES.map(|_| match self.rng.below(3) {
            0 => self.rng.scale(SECOND, 2 * SILENCE),
            _ => self.rng.below(2 * self.scenario.latency + 1),
        });
        Break { delivers: self.rng.one_in(2), noticed }
    }

    /// In one direction everything disappears; neither end notices before it has been silent for long. What the other
    /// direction carries still arrives until then.
    fn black_hole(&mut self) {
        let Some(id) = self.some_conn() else { return };
        let towards = if self.rng.one_in(2) { S } else { D };
        let source = self.rng.scale(SECOND, 2 * SILENCE);
        let destination = self.rng.scale(SECOND, 60 * SECOND);
        let conn = &mut self.conns[id.0 as usize];
        conn.broken[towards as usize] = true;
        if self.rng.one_in(2) {
            conn.said[towards as usize].clear();
            if towards == D {
                conn.flight.clear();
            }
        }
        for (side, after) in [(S, source), (D, destination)] {
            if conn.held[side as usize] {
                self.queue.after(after, Event::Lost(id, side));
            }
        }
        self.tally.breaks += 1;
        self.unfair_until(self.queue.now() + source.max(destination));
    }

    fn stall(&mut self, id: ConnId, until: Time) {
        for floor in &mut self.conns[id.0 as usize].floor {
            *floor = (*floor).max(until);
        }
        self.unfair_until(until);
    }

    /// The whole path is dark. A short darkness TCP outlasts; a long one costs all connections.
    fn cut(&mut self, now: Time) {
        let until = now + self.rng.scale(100 * MS, 1200 * SECOND);
        self.tally.cuts += 1;
        self.cut_until = self.cut_until.max(until);
        self.unfair_until(until);
        let survives = until - now < SILENCE && self.rng.one_in(2);
        for id in self.held_conns() {
            if survives {
                self.stall(id, until);
                continue;
            }
            let noticed = SIDES.map(|_| self.rng.scale(100 * MS, 2 * SILENCE));
            self.breaks(id, Break { delivers: false, noticed });
        }
    }

    fn vmm_dies(&mut self, side: Side) {
        let forgets = self.rng.one_in(2);
        let agent = &mut self.agents[side as usize];
        if agent.vmm == Vmm::Gone {
            return;
        }
        agent.vmm = Vmm::Gone;
        if forgets {
            agent.answers.clear();
        }
        let lives = agent.machine.is_some();
        self.tally.vmm_deaths[side as usize] += 1;
        self.excuse = Some("a VMM died");
        if lives {
            self.answers(side, Input::Vmm(VmmState::Gone));
        }
    }
}
