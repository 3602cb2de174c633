//! The network: a set of messages in flight.

use dwcp_proto::handover::{AbortReason, Message};

use crate::world::{Side, WHOLE};

/// The set of messages in flight, a bit each. Their content is the same in all of a model's runs, save for the reasons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct Net(u64);

impl Net {
    pub(crate) fn iter(self) -> impl Iterator<Item = Wire> {
        (0..64).filter(move |bit| self.0 >> bit & 1 == 1).map(Wire)
    }

    pub(crate) fn insert(&mut self, wire: Wire) {
        self.0 |= 1 << wire.0;
    }

    pub(crate) fn remove(&mut self, wire: Wire) -> bool {
        let before = self.0;
        self.0 &= !(1 << wire.0);
        self.0 != before
    }
}

/// A message, by its bit.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Wire(u8);

impl Wire {
    const ABORT: u8 = 5;
    const NEVER_RAN: u8 = 32;

    pub(crate) fn new(message: &Message) -> Self {
        Wire(match message {
            Message::Receipt(_) => 0,
            Message::Commit { .. } => 1,
            Message::Running => 2,
            Message::Lost => 3,
            Message::Settled => 4,
            Message::Abort(reason) => Self::ABORT + *reason as u8,
            Message::NeverRan(reason) => Self::NEVER_RAN + *reason as u8,
        })
    }

    pub(crate) fn message(self, run: bool) -> Message {
        match self.0 {
            0 => Message::Receipt(WHOLE),
            1 => Message::Commit { receipt: WHOLE.digest(), run },
            2 => Message::Running,
            3 => Message::Lost,
            4 => Message::Settled,
            bit if bit < Self::NEVER_RAN => Message::Abort(AbortReason::ALL[usize::from(bit - Self::ABORT)]),
            bit => Message::NeverRan(AbortReason::ALL[usize::from(bit - Self::NEVER_RAN)]),
        }
    }

    pub(crate) fn to(self) -> Side {
        match self.message(true) {
            Message::Commit { .. } | Message::Abort(_) | Message::Settled => Side::Destination,
            Message::Receipt(_) | Message::NeverRan(_) | Message::Running | Message::Lost => Side::Source,
        }
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.message(true) {
            Message::Receipt(_) => f.write_str("Receipt"),
            Message::Commit { .. } => f.write_str("Commit"),
            message => write!(f, "{message:?}"),
        }
    }
}
