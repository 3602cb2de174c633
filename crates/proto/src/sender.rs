//! The sending side of v3, without I/O or clock: which chunk goes to which connection, what is still unacknowledged, and
//! how much may be in flight.
//!
//! ```text
//!  push ──► waiting ──poll_transmit──► on a link ──ack──► gone
//!             ▲                            │
//!             └──── link_down, nack ───────┘
//! ```
//!
//! Invariants: a chunk is in exactly one of *waiting* and *on a link* until it is acknowledged; acknowledgements only
//! move forward; nothing acknowledged is sent again; unacknowledged bytes never exceed the window.
//!
//! The driver keeps the chunks' bytes; the sender sees numbers only. Time is given as the duration since a fixed moment.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::fault::Mechanism;
use crate::ids::{LinkId, Seq, StreamOffset};
use crate::limits::MAX_RAW_PAYLOAD;
use crate::pace::Pace;
use crate::receiver::MAX_REORDER;

/// Chunks handed to a connection's writer and not yet written: one being written, one behind it.
pub const LINK_QUEUE: u32 = 2;

/// How often the peer may refuse one chunk before the session is given up: line noise does not pass TLS's or TCP's checks thrice.
pub const MAX_NACKS: u32 = 3;

/// A peer that broke the protocol towards the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SenderError {
    /// An acknowledgement for what was never sent, or one that goes back.
    #[error("the peer acknowledged chunk {acked}, between {base} and {next} is possible")]
    BadAck {
        /// What it acknowledged.
        acked: u64,
        /// First unacknowledged chunk.
        base: u64,
        /// The next chunk to be made.
        next: u64,
    },
    /// A chunk was refused too often.
    #[error("the peer refused chunk {0} {MAX_NACKS} times: something between the agents alters data")]
    Refused(u64),
    /// A refusal of a chunk that was never sent.
    #[error("the peer refused chunk {0}, which was never sent")]
    BadNack(u64),
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    wire: u64,
    weight: u64,
    end: StreamOffset,
    link: Option<LinkId>,
    sent: bool,
    /// When it was handed to `link`.
    handed: Duration,
    nacks: u32,
}

/// What an acknowledgement freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acked {
    /// First chunk freed.
    pub from: Seq,
    /// The chunk after the last freed.
    pub to: Seq,
}

/// See the module.
#[derive(Debug)]
pub struct Sender {
    base: Seq,
    entries: VecDeque<Entry>,
    waiting: BTreeSet<Seq>,
    links: BTreeMap<LinkId, u32>,
    window: u64,
    unacked_weight: u64,
    unacked_wire: u64,
    /// Of those, what has arrived and waits for an earlier chunk, by the peer's word.
    held: u64,
    applied: StreamOffset,
    retransmitted: u64,
    pace: Pace,
}

impl Sender {
    /// A sender that keeps chunks of at most `window` bytes of weight unacknowledged.
    pub fn new(window: u64, pace: Pace) -> Self {
        Self::from(StreamOffset(0), window, pace)
    }

    /// The sender of a leg that begins at `offset` of the VMM's stream.
    pub fn from(offset: StreamOffset, window: u64, pace: Pace) -> Self {
        Sender {
            base: Seq(0),
            entries: VecDeque::new(),
            waiting: BTreeSet::new(),
            links: BTreeMap::new(),
            window,
            unacked_weight: 0,
            unacked_wire: 0,
            held: 0,
            applied: offset,
            retransmitted: 0,
            pace,
        }
    }

    /// Whether another chunk may be made now. One is always allowed when nothing is in flight.
    pub fn has_room(&self) -> bool {
        self.entries.is_empty()
            || Mechanism::BackPressure.is_off()
            || (self.unacked_weight + MAX_RAW_PAYLOAD as u64 <= self.window
                && (self.entries.len() as u64) < MAX_REORDER
                && self.unacked_wire.saturating_sub(self.held) < self.pace.target())
    }

    /// Takes the next chunk: its bytes on the wire, its [`weight`](crate::chunk::ChunkHeader::weight), and where it ends in the
    /// VMM's stream.
    pub fn push(&mut self, wire: u64, weight: u64, end: StreamOffset) -> Seq {
        let seq = Seq(self.base.0 + self.entries.len() as u64);
        self.entries.push_back(Entry {
            wire,
            weight,
            end,
            link: None,
            sent: false,
            handed: Duration::ZERO,
            nacks: 0,
        });
        self.unacked_weight += weight;
        self.unacked_wire += wire;
        self.waiting.insert(seq);
        seq
    }

    /// A connection is there to be used.
    pub fn link_up(&mut self, link: LinkId) {
        self.links.insert(link, 0);
    }

    /// A connection is gone; what was on it and not acknowledged waits for another.
    pub fn link_down(&mut self, link: LinkId) {
        self.links.remove(&link);
        for (i, entry) in self.entries.iter_mut().enumerate() {
            if entry.link == Some(link) {
                entry.link = None;
                self.waiting.insert(Seq(self.base.0 + i as u64));
            }
        }
    }

    /// The next chunk to hand to a connection's writer: the oldest one, to the connection with the shortest queue.
    pub fn poll_transmit(&mut self, now: Duration) -> Option<(LinkId, Seq)> {
        let (&link, _) = self.links.iter().filter(|(_, q)| **q < LINK_QUEUE).min_by_key(|(_, q)| **q)?;
        let seq = self.waiting.pop_first()?;
        self.pace.sent(now);
        *self.links.entry(link).or_default() += 1;
        if let Some(entry) = self.entries.get_mut((seq.0 - self.base.0) as usize) {
            (entry.link, entry.handed) = (Some(link), now);
            if std::mem::replace(&mut entry.sent, true) {
                self.retransmitted += 1;
            }
        }
        Some((link, seq))
    }

    /// A connection's writer has written one chunk and can take another.
    pub fn written(&mut self, link: LinkId) {
        if let Some(queue) = self.links.get_mut(&link) {
            *queue = queue.saturating_sub(1);
        }
    }

    /// The peer has applied everything before `next`, and the VMM's stream up to `applied`.
    pub fn ack(&mut self, next: Seq, applied: StreamOffset, now: Duration) -> Result<Acked, SenderError> {
        let end = self.base.0 + self.entries.len() as u64;
        if next < self.base || next.0 > end {
            return Err(SenderError::BadAck { acked: next.0, base: self.base.0, next: end });
        }
        let freed = (next.0 - self.base.0) as usize;
        // Chunks are first sent in order, so the last one speaks for all.
        if freed.checked_sub(1).and_then(|i| self.entries.get(i)).is_some_and(|e| !e.sent) {
            return Err(SenderError::BadAck { acked: next.0, base: self.base.0, next: end });
        }
        let acked = Acked { from: self.base, to: next };
        let mut bytes = 0;
        for entry in self.entries.drain(..freed) {
            bytes += entry.wire;
            self.unacked_weight -= entry.weight;
            self.unacked_wire -= entry.wire;
            self.applied = entry.end;
        }
        self.base = next;
        self.waiting = self.waiting.split_off(&next);
        if applied != self.applied {
            return Err(SenderError::BadAck { acked: next.0, base: acked.from.0, next: end });
        }
        if bytes > 0 {
            self.pace.acked(bytes, now, self.is_idle());
        }
        Ok(acked)
    }

    /// So many of the bytes that are not acknowledged have arrived, and wait for an earlier chunk: they do not count as on their way. On a link
    /// that loses packets one connection waits while the others go on; without this, that wait would be taken for the link's.
    pub fn held(&mut self, bytes: u64) {
        self.held = bytes;
    }

    /// The peer has refused a chunk's payload, `times` in all: it is sent again, a few times.
    ///
    /// A refusal is state, as an acknowledgement is: the peer says it again where it may have been lost. One that was heard
    /// before, or that crossed with a later word on the same chunk, changes nothing.
    pub fn nack(&mut self, seq: Seq, times: u32) -> Result<(), SenderError> {
        let Some(i) = seq.0.checked_sub(self.base.0) else { return Ok(()) };
        let entry = self.entries.get_mut(i as usize).filter(|e| e.sent);
        let entry = entry.ok_or(SenderError::BadNack(seq.0))?;
        if times <= entry.nacks {
            return Ok(());
        }
        entry.nacks = times;
        if times >= MAX_NACKS {
            return Err(SenderError::Refused(seq.0));
        }
        // Its connection may be lost already, and the chunk waiting.
        if entry.link.take().is_some() {
            self.waiting.insert(seq);
        }
        Ok(())
    }

    /// Whether the chunk that everything waits for was handed to this connection at least `patience` ago. A peer that says that
    /// nothing comes from there has not just missed it: the connection has stalled.
    pub fn waits_on(&self, link: LinkId, patience: Duration, now: Duration) -> bool {
        let oldest = self.entries.front().filter(|entry| entry.link == Some(link));
        oldest.is_some_and(|entry| now.saturating_sub(entry.handed) >= patience)
    }

    /// Whether everything pushed was acknowledged.
    pub fn is_idle(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes on the wire and not acknowledged.
    pub fn unacked(&self) -> u64 {
        self.unacked_wire
    }

    /// The offset in the VMM's stream up to which the peer has applied everything.
    pub fn applied(&self) -> StreamOffset {
        self.applied
    }

    /// Chunks sent more than once, counted each time.
    pub fn retransmitted(&self) -> u64 {
        self.retransmitted
    }

    /// The pace, to be fed with round trips and asked for the rate.
    pub fn pace(&mut self) -> &mut Pace {
        &mut self.pace
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Duration = Duration::from_millis(1);

    fn sender() -> Sender {
        Sender::new(64 << 20, Pace::new(Duration::from_secs(1)))
    }

    fn filled(chunks: u64) -> Sender {
        let mut sender = sender();
        for i in 0..chunks {
            assert_eq!(sender.push(100, 400, StreamOffset(1000 * (i + 1))), Seq(i));
        }
        sender
    }

    #[test]
    fn chunks_spread_over_the_links_oldest_first() {
        let mut sender = filled(5);
        assert_eq!(sender.poll_transmit(T), None);
        sender.link_up(LinkId(0));
        sender.link_up(LinkId(1));
        let sent: Vec<_> = std::iter::from_fn(|| sender.poll_transmit(T)).collect();
        let expected = [(0, 0), (1, 1), (0, 2), (1, 3)].map(|(link, seq)| (LinkId(link), Seq(seq))).to_vec();
        assert_eq!(sent, expected);
        sender.written(LinkId(1));
        assert_eq!(sender.poll_transmit(T), Some((LinkId(1), Seq(4))));
    }

    #[test]
    fn a_lost_link_sends_again_only_what_was_not_acknowledged() {
        let mut sender = filled(4);
        sender.link_up(LinkId(0));
        sender.link_up(LinkId(1));
        while sender.poll_transmit(T).is_some() {}
        sender.ack(Seq(1), StreamOffset(1000), T).unwrap();
        sender.link_down(LinkId(0));
        sender.link_up(LinkId(2));
        // 0 and 2 were on the lost link; 0 is acknowledged.
        assert_eq!(sender.poll_transmit(T), Some((LinkId(2), Seq(2))));
        assert_eq!(sender.poll_transmit(T), None);
        assert_eq!(sender.retransmitted(), 1);
    }

    #[test]
    fn a_connection_holds_up_only_what_it_was_handed() {
        let second = Duration::from_secs(1);
        let mut sender = filled(3);
        sender.link_up(LinkId(0));
        sender.link_up(LinkId(1));
        while sender.poll_transmit(T).is_some() {}
        assert!(sender.waits_on(LinkId(0), second, T + second));
        assert!(!sender.waits_on(LinkId(0), second, second), "it may be on its way");
        assert!(!sender.waits_on(LinkId(1), second, T + second), "chunk 1 is not what is missing");
        sender.link_down(LinkId(0));
        assert!(!sender.waits_on(LinkId(0), second, T + second));
        sender.link_up(LinkId(2));
        assert_eq!(sender.poll_transmit(second), Some((LinkId(2), Seq(0))));
        assert!(!sender.waits_on(LinkId(2), second, second), "it was handed there only now");
        sender.ack(Seq(1), StreamOffset(1000), second).unwrap();
        assert!(sender.waits_on(LinkId(1), second, T + second));
    }

    #[test]
    fn forged_ack_of_what_was_not_sent_is_refused() {
        let bad = |result| assert!(matches!(result, Err(SenderError::BadAck { .. })));
        let mut sender = filled(2);
        bad(sender.ack(Seq(3), StreamOffset(3000), T));
        bad(sender.ack(Seq(1), StreamOffset(1000), T));
        sender.link_up(LinkId(0));
        while sender.poll_transmit(T).is_some() {}
        bad(sender.ack(Seq(1), StreamOffset(9), T));
        let mut sender = filled(2);
        sender.link_up(LinkId(0));
        while sender.poll_transmit(T).is_some() {}
        sender.ack(Seq(2), StreamOffset(2000), T).unwrap();
        bad(sender.ack(Seq(1), StreamOffset(1000), T));
        assert!(sender.is_idle());
    }

    #[test]
    fn a_refused_chunk_goes_again_but_not_for_ever() {
        let mut sender = filled(1);
        sender.link_up(LinkId(0));
        assert_eq!(sender.nack(Seq(0), 1), Err(SenderError::BadNack(0)));
        for times in 1..MAX_NACKS {
            assert_eq!(sender.poll_transmit(T), Some((LinkId(0), Seq(0))));
            sender.written(LinkId(0));
            sender.nack(Seq(0), times).unwrap();
        }
        sender.poll_transmit(T).unwrap();
        assert_eq!(sender.nack(Seq(0), MAX_NACKS), Err(SenderError::Refused(0)));
    }

    #[test]
    fn a_refusal_said_again_or_too_late_changes_nothing() {
        let mut sender = filled(2);
        sender.link_up(LinkId(0));
        while sender.poll_transmit(T).is_some() {}
        // It crosses with the loss of the connection.
        sender.link_down(LinkId(0));
        sender.nack(Seq(0), 1).unwrap();
        sender.link_up(LinkId(0));
        assert_eq!(sender.poll_transmit(T), Some((LinkId(0), Seq(0))));
        assert_eq!(sender.poll_transmit(T), Some((LinkId(0), Seq(1))));
        sender.nack(Seq(0), 1).unwrap();
        sender.ack(Seq(1), StreamOffset(1000), T).unwrap();
        sender.nack(Seq(0), 2).unwrap();
        assert_eq!(sender.poll_transmit(T), None);
    }

    #[test]
    fn the_window_bounds_what_is_in_flight() {
        let window = 3 * MAX_RAW_PAYLOAD as u64;
        let mut sender = Sender::new(window, Pace::new(Duration::from_secs(1)));
        let mut pushed = 0;
        while sender.has_room() {
            pushed += 1;
            sender.push(10, MAX_RAW_PAYLOAD as u64, StreamOffset(pushed));
        }
        assert_eq!(pushed, 3);
        sender.link_up(LinkId(0));
        sender.poll_transmit(T).unwrap();
        sender.ack(Seq(1), StreamOffset(1), T).unwrap();
        assert!(sender.has_room());
    }

    #[test]
    fn what_has_arrived_is_not_in_flight() {
        let pace = || {
            let mut pace = Pace::new(Duration::from_millis(100));
            (1..=1000).for_each(|t| pace.acked(1000, Duration::from_millis(t), false));
            pace
        };
        let mut sender = Sender::new(64 << 20, pace());
        let target = sender.pace().target();
        sender.push(target, 1, StreamOffset(1));
        assert!(!sender.has_room());
        sender.held(target / 2);
        assert!(sender.has_room());
        sender.held(u64::MAX);
        sender.push(target, 1, StreamOffset(2));
        assert!(sender.has_room(), "whatever the peer says, the window holds");
    }

    #[test]
    fn small_chunks_do_not_run_ahead_of_what_the_receiver_reorders() {
        let mut sender = sender();
        let room = (1..).take_while(|end| {
            sender.push(1, 1, StreamOffset(*end));
            sender.has_room()
        });
        assert_eq!(room.count() as u64 + 1, MAX_REORDER);
    }
}
