//! What happens when: the simulated clock jumps from one event to the next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::net::ConnId;
use super::world::{Life, Side};

/// Nanoseconds since the world began.
pub(crate) type Time = u64;

pub(crate) const MS: Time = 1_000_000;
pub(crate) const SECOND: Time = 1000 * MS;

/// Something that is due. What belongs to an agent's earlier life, or to a connection that is gone, has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// The source has taken and encoded what comes next on this leg.
    Produced(Life, u32),
    /// A connection's writer has written one.
    Wrote(ConnId),
    /// The header of the oldest chunk in flight has arrived.
    Header(ConnId),
    /// And its payload.
    Payload(ConnId),
    /// The destination has verified and decoded a copy, by its number.
    Judged(u32),
    /// The destination's VMM has taken a chunk.
    Applied(Life),
    /// An acknowledgement may be said.
    AckDue(Life),
    /// The destination's VMM has loaded everything.
    Loaded(Life),
    /// A message on a control connection has arrived at a side.
    Heard(ConnId, Side),
    /// A side notices that a connection is dead.
    Lost(ConnId, Side),
    /// The source tries to connect: a data link, or the control connection.
    Dial(Option<u16>, Life),
    /// A journal write ends.
    Journal(Side, Life),
    /// The VMM comes to its oldest command.
    Command(Side, Life),
    /// The agent hears of its VMM.
    Answer(Side, Life),
    /// The source looks whether the path should change.
    Helm(Life),
    /// A timer for what failed.
    Retry(Side, Life),
    /// A dead agent comes back.
    Restart(Side),
    /// A side has been without a control connection for too long, if it still is without the same one.
    Dark(Side, Life, u32),
    /// The source's own deadline.
    Deadline,
    /// Something goes wrong.
    Fault,
    /// By now a fair world has ended.
    Overdue,
}

/// The events to come, in order of time; of those at one time the one that was planned first.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    heap: BinaryHeap<Reverse<(Time, u64, Event)>>,
    planned: u64,
    now: Time,
}

impl Queue {
    pub(crate) fn now(&self) -> Time {
        self.now
    }

    pub(crate) fn at(&mut self, time: Time, event: Event) {
        self.planned += 1;
        self.heap.push(Reverse((time.max(self.now), self.planned, event)));
    }

    pub(crate) fn after(&mut self, delay: Time, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        let Reverse((time, _, event)) = self.heap.pop()?;
        self.now = time;
        Some(event)
    }

    pub(crate) fn len(&self) -> usize {
        self.heap.len()
    }
}
