//! Connections between the two agents: in order and reliable until they break, as TCP's are. Each end notices in its own time.

use std::collections::VecDeque;

use dwcp_proto::handover::Message;
use dwcp_proto::message::Ack;
use dwcp_proto::{LinkId, Seq};

use super::data::{Load, Switch, Switched};
use super::queue::Time;
use super::world::Side;

/// A connection, by its number in the order of their making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ConnId(pub(crate) u32);

/// What is said on a control connection.
#[derive(Debug, Clone)]
pub(crate) enum Said {
    Ack(Ack),
    Handover(Message),
    /// The v1 stream of this leg is complete, and so long.
    StreamEnd {
        leg: u32,
        length: u64,
    },
    /// Go on as another leg.
    Switch(Switch),
    Switched(Switched),
    /// The destination forbids v3, or does no longer.
    Veto(bool),
}

#[derive(Debug)]
pub(crate) struct Conn<C> {
    /// The data link, or `None` for the control connection.
    pub(crate) link: Option<LinkId>,
    /// Whether each side takes it for alive.
    pub(crate) held: [bool; 2],
    /// Whether what goes towards each side from now on is lost.
    pub(crate) broken: [bool; 2],
    /// Nothing towards each side arrives before: order is kept, and stalls last.
    pub(crate) floor: [Time; 2],
    /// The writer is at it.
    pub(crate) writing: bool,
    /// Handed to the writer.
    pub(crate) queue: VecDeque<Load<C>>,
    /// On the way to the destination.
    pub(crate) flight: VecDeque<Load<C>>,
    /// The copy whose header was admitted and whose payload is not here yet.
    pub(crate) reading: Option<Seq>,
    /// Messages on the way to each side.
    pub(crate) said: [VecDeque<Said>; 2],
}

impl<C> Conn<C> {
    pub(crate) fn new(link: Option<LinkId>) -> Self {
        Conn {
            link,
            held: [true; 2],
            broken: [false; 2],
            floor: [0; 2],
            writing: false,
            queue: VecDeque::new(),
            flight: VecDeque::new(),
            reading: None,
            said: [VecDeque::new(), VecDeque::new()],
        }
    }

    /// When what leaves now arrives at `side`, after `latency`.
    pub(crate) fn arrival(&mut self, side: Side, now: Time, latency: Time) -> Time {
        let floor = &mut self.floor[side as usize];
        *floor = (*floor).max(now + latency);
        *floor
    }
}
