//! The receiving side of v3, without I/O or clock: which chunks are taken, when they are applied, what is acknowledged.
//!
//! ```text
//!  header ──admit──► expected ──verified──► ready ──poll_apply (in order)──► applied ──► Ack
//!             │          └─────refused────► Nack, if no other copy is on its way in
//!             └► duplicate: dropped; violation: the session ends
//! ```
//! A chunk may come in several copies: when a connection breaks, the sender sends again what it has no acknowledgement for, while
//! this side may still be reading from the old connection. Until one copy is verified each is read, since any may break off.
//!
//! The driver verifies a header's signature before [`Receiver::admit`], so every violation below is the peer's own doing. It keeps the
//! payloads; the receiver sees headers only.
//!
//! Invariants: chunks are applied once, in the order of their sequence numbers, without a gap in the VMM's stream, each header holding the hash
//! of the one before; what waits to be given out never exceeds the window; nothing is applied after the end. How much is given out and not
//! applied yet is the driver's to bound.

use std::collections::{BTreeMap, VecDeque};

use crate::chunk::{ChunkHeader, Kind};
use crate::fault::Mechanism;
use crate::ids::{Seq, SessionId, StreamOffset};
use crate::limits::MAX_RAW_PAYLOAD;
use crate::negotiate::MAX_STREAMS;

/// Chunks that may wait for an earlier one, however small they are.
pub const MAX_REORDER: u64 = 4096;

/// Copies of one chunk that may be read and verified at a time: one on each connection, one more from the connection that it
/// replaced.
pub const MAX_COPIES: u32 = 2 * MAX_STREAMS;

/// How a peer with a good key broke the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More was sent than the window allows.
    #[error("chunk {0} is beyond the window that was agreed on")]
    Window(u64),
    /// Two different chunks with one number, both well signed.
    #[error("two different chunks were signed as number {0}")]
    Equivocation(u64),
    /// The hash chain or the stream's offsets have a gap.
    #[error("chunk {0} does not follow the one before it")]
    Chain(u64),
    /// Page versions went back.
    #[error("chunk {0} goes back to an older round")]
    OldRound(u64),
    /// A chunk after the end.
    #[error("chunk {0} comes after the end of the stream")]
    AfterEnd(u64),
}

impl Violation {
    /// The kind of attack that it would be, for the metric.
    pub fn kind(self) -> &'static str {
        match self {
            Violation::Window(_) => "extend",
            Violation::Equivocation(_) => "equivocation",
            Violation::Chain(_) => "omit",
            Violation::OldRound(_) => "old_round",
            Violation::AfterEnd(_) => "extend",
        }
    }
}

/// What to do with a chunk whose header is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Read and verify the payload.
    Take,
    /// Read the payload and drop it: the chunk is here, verified.
    Duplicate,
}

#[derive(Debug, Clone)]
struct Waiting {
    header: ChunkHeader,
    /// Admitted and neither verified nor refused yet; no matter once one was verified.
    copies: u32,
    verified: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Receiver {
    next: Seq,
    applied: StreamOffset,
    prev: [u8; 32],
    version: u32,
    waiting: BTreeMap<Seq, Waiting>,
    waiting_bytes: u64,
    /// Of those that are verified.
    held: u64,
    /// Given out and not applied yet, in order.
    applying: VecDeque<ChunkHeader>,
    ended: bool,
    window: u64,
}

impl Receiver {
    /// The receiver of a session's first leg with this window, in bytes.
    pub fn new(session: SessionId, window: u64) -> Self {
        Self::from(session, StreamOffset(0), window)
    }

    /// The receiver of a leg that begins at `offset` of the VMM's stream.
    pub fn from(leg: SessionId, offset: StreamOffset, window: u64) -> Self {
        Receiver {
            next: Seq(0),
            applied: offset,
            prev: leg.0,
            version: 0,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            held: 0,
            applying: VecDeque::new(),
            ended: false,
            window,
        }
    }

    /// Takes or refuses a chunk by its signed header, before its payload is read.
    pub fn admit(&mut self, header: &ChunkHeader) -> Result<Admission, Violation> {
        let seq = header.seq;
        if seq < self.due() {
            return Ok(Admission::Duplicate);
        }
        if self.ended {
            return Err(Violation::AfterEnd(seq.0));
        }
        if let Some(waiting) = self.waiting.get_mut(&seq) {
            if &waiting.header != header && !Mechanism::Equivocation.is_off() {
                return Err(Violation::Equivocation(seq.0));
            }
            if waiting.verified {
                return Ok(Admission::Duplicate);
            }
            if waiting.copies == MAX_COPIES {
                return Err(Violation::Window(seq.0));
            }
            waiting.copies += 1;
            return Ok(Admission::Take);
        }
        let bytes = header.weight();
        let fits = self.waiting_bytes + bytes <= self.window + MAX_RAW_PAYLOAD as u64;
        if seq.0 - self.next.0 > MAX_REORDER || !fits {
            return Err(Violation::Window(seq.0));
        }
        self.waiting_bytes += bytes;
        self.waiting.insert(seq, Waiting { header: header.clone(), copies: 1, verified: false });
        Ok(Admission::Take)
    }

    /// The payload of an admitted copy is what its header says. True if it is the first such copy, to be kept until `poll_apply`
    /// gives its chunk out; false if another one was faster.
    #[must_use]
    pub fn verified(&mut self, seq: Seq) -> bool {
        let Some(waiting) = self.waiting.get_mut(&seq).filter(|waiting| !waiting.verified) else {
            return false;
        };
        waiting.verified = true;
        self.held += u64::from(waiting.header.wire_len);
        true
    }

    /// Bytes on the wire of the chunks that are here, verified, and wait for one that is not. Those that merely wait for their turn do not
    /// count: a slow sink is to be felt by the sender.
    pub fn held(&self) -> u64 {
        if self.has_next() { 0 } else { self.held }
    }

    /// An admitted copy's payload did not arrive whole, or not as its header says. True if it was the last copy, so that a
    /// payload that was altered must be asked for again; one that broke off with its connection comes by itself.
    pub fn refused(&mut self, seq: Seq) -> bool {
        let Some(waiting) = self.waiting.get_mut(&seq).filter(|w| !w.verified) else { return false };
        waiting.copies -= 1;
        if waiting.copies > 0 {
            return false;
        }
        self.waiting_bytes -= waiting.header.weight();
        self.waiting.remove(&seq);
        true
    }

    /// Whether a chunk is neither applied nor here nor on its way in: only then does a refusal of it still stand, to be said
    /// again where it may have been lost.
    pub fn lacks(&self, seq: Seq) -> bool {
        seq >= self.due() && !self.waiting.contains_key(&seq)
    }

    /// Whether the next chunk is here, or being applied: then nothing is waited for.
    pub fn has_next(&self) -> bool {
        !self.applying.is_empty() || self.waiting.get(&self.next).is_some_and(|w| w.verified)
    }

    /// The next chunk to give out.
    fn due(&self) -> Seq {
        self.applying.back().map_or(self.next, |last| last.seq.next())
    }

    /// The next chunk to apply, if it is here. Several may be given out before the first of them is applied.
    pub fn poll_apply(&mut self) -> Result<Option<ChunkHeader>, Violation> {
        let due = self.due();
        if !self.waiting.get(&due).is_some_and(|w| w.verified) {
            return Ok(None);
        }
        let Some(Waiting { header, .. }) = self.waiting.remove(&due) else { return Ok(None) };
        self.waiting_bytes -= header.weight();
        self.held -= u64::from(header.wire_len);
        let seq = header.seq.0;
        let (prev, offset, version) = match self.applying.back() {
            Some(last) if last.kind == Kind::End => return Err(Violation::AfterEnd(seq)),
            Some(last) => (last.hash(), last.end(), last.version.0),
            None => (self.prev, self.applied, self.version),
        };
        let follows = header.prev == prev && header.offset == offset;
        if !follows && !Mechanism::Chain.is_off() {
            return Err(Violation::Chain(seq));
        }
        let old = header.kind == Kind::Data && header.version.0 < version;
        if old && !Mechanism::OldRound.is_off() {
            return Err(Violation::OldRound(seq));
        }
        if header.kind == Kind::End && !self.waiting.is_empty() {
            return Err(Violation::AfterEnd(seq + 1));
        }
        self.applying.push_back(header.clone());
        Ok(Some(header))
    }

    /// The first of the chunks that `poll_apply` gave out has been applied.
    pub fn applied(&mut self) {
        if let Some(header) = self.applying.pop_front() {
            self.next = header.seq.next();
            self.applied = header.end();
            self.prev = header.hash();
            self.version = self.version.max(header.version.0);
            self.ended = header.kind == Kind::End;
        }
    }

    /// The next chunk that was not applied: what an acknowledgement says.
    pub fn next(&self) -> Seq {
        self.next
    }

    /// The offset in the VMM's stream up to which all was applied.
    pub fn offset(&self) -> StreamOffset {
        self.applied
    }

    /// The digest of what was applied so far: the hash of the last header, which holds that of the one before.
    pub fn carried(&self) -> [u8; 32] {
        self.prev
    }

    /// The leg's root, once the end was applied.
    pub fn root(&self) -> Option<[u8; 32]> {
        self.ended.then_some(self.prev)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{Codec, EncodedChunk, SealedChunk, Sealer};
    use crate::identity::NodeKey;
    use crate::ids::{Lane, NodeName, PageVersion};

    const SESSION: SessionId = SessionId([9; 32]);
    const WINDOW: u64 = 1 << 20;

    fn stream(chunks: usize) -> Vec<SealedChunk> {
        let key = NodeKey::from_seed(NodeName::new("a").unwrap(), &[1; 32]);
        let mut sealer = Sealer::new(SESSION);
        let mut sealed: Vec<_> = (0..chunks as u64)
            .map(|i| {
                let payload = vec![i as u8; 10];
                let (version, offset) = (PageVersion(i as u32 / 2), StreamOffset(10 * i));
                sealer.seal(&key, EncodedChunk::new(Codec::Raw, Lane(0), version, offset, 10, 10, payload))
            })
            .collect();
        sealed.push(sealer.seal_end(&key));
        sealed
    }

    fn take(receiver: &mut Receiver, chunk: &SealedChunk) {
        assert_eq!(receiver.admit(chunk.header()), Ok(Admission::Take));
        assert!(receiver.verified(chunk.header().seq));
    }

    fn apply_all(receiver: &mut Receiver) -> Result<Vec<u64>, Violation> {
        let mut applied = Vec::new();
        while let Some(header) = receiver.poll_apply()? {
            receiver.applied();
            applied.push(header.seq.0);
        }
        Ok(applied)
    }

    #[test]
    fn reordered_chunks_are_applied_in_order_and_the_root_is_the_ends_hash() {
        let chunks = stream(4);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        let mut applied = Vec::new();
        for i in [2, 0, 4, 1, 3] {
            take(&mut receiver, &chunks[i]);
            applied.extend(apply_all(&mut receiver).unwrap());
        }
        assert_eq!(applied, [0, 1, 2, 3, 4]);
        assert_eq!(receiver.offset(), StreamOffset(40));
        assert_eq!(receiver.root(), Some(chunks[4].header().hash()));
    }

    #[test]
    fn several_are_given_out_before_the_first_is_applied() {
        let chunks = stream(3);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        for i in [0, 1, 3] {
            take(&mut receiver, &chunks[i]);
        }
        let mut given = Vec::new();
        while let Some(header) = receiver.poll_apply().unwrap() {
            given.push(header.seq.0);
        }
        assert_eq!((given, receiver.next(), receiver.offset()), (vec![0, 1], Seq(0), StreamOffset(0)));
        assert_eq!(receiver.admit(chunks[1].header()), Ok(Admission::Duplicate));
        assert!(!receiver.lacks(Seq(1)) && receiver.lacks(Seq(2)));
        receiver.applied();
        assert_eq!((receiver.next(), receiver.offset()), (Seq(1), StreamOffset(10)));
        take(&mut receiver, &chunks[2]);
        assert_eq!(receiver.poll_apply().unwrap().map(|header| header.seq), Some(Seq(2)));
        assert_eq!(receiver.poll_apply().unwrap().map(|header| header.kind), Some(Kind::End));
        assert_eq!((receiver.poll_apply(), receiver.root()), (Ok(None), None));
        (0..3).for_each(|_| receiver.applied());
        assert_eq!(receiver.root(), Some(chunks[3].header().hash()));
    }

    #[test]
    fn what_follows_a_chunk_that_is_being_applied_is_checked_against_it() {
        let chunks = stream(3);
        let after_first = |second: ChunkHeader| {
            let mut receiver = Receiver::new(SESSION, WINDOW);
            take(&mut receiver, &chunks[0]);
            receiver.admit(&second).unwrap();
            assert!(receiver.verified(Seq(1)));
            receiver.poll_apply().unwrap();
            receiver.poll_apply().map(|header| header.is_some())
        };
        let second = chunks[1].header().clone();
        assert_eq!(after_first(second.clone()), Ok(true));
        // One before it was left out, or another one was there.
        let omitted = ChunkHeader { prev: chunks[0].header().prev, ..second.clone() };
        assert_eq!(after_first(omitted), Err(Violation::Chain(1)));
        let gap = ChunkHeader { offset: StreamOffset(20), ..second };
        assert_eq!(after_first(gap), Err(Violation::Chain(1)));

        let mut receiver = Receiver::new(SESSION, WINDOW);
        let newer = ChunkHeader { version: PageVersion(7), ..chunks[0].header().clone() };
        let older = ChunkHeader { prev: newer.hash(), ..chunks[1].header().clone() };
        for header in [&newer, &older] {
            receiver.admit(header).unwrap();
            assert!(receiver.verified(header.seq));
        }
        receiver.poll_apply().unwrap();
        assert_eq!(receiver.poll_apply(), Err(Violation::OldRound(1)));

        // The end is being applied, and something comes after it.
        let ending = stream(1);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        ending.iter().for_each(|chunk| take(&mut receiver, chunk));
        (0..2).for_each(|_| assert!(receiver.poll_apply().unwrap().is_some()));
        let late = ChunkHeader { seq: Seq(2), ..chunks[2].header().clone() };
        receiver.admit(&late).unwrap();
        assert!(receiver.verified(Seq(2)));
        assert_eq!(receiver.poll_apply(), Err(Violation::AfterEnd(2)));
    }

    #[test]
    fn replay_chunk_is_dropped() {
        let chunks = stream(2);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        take(&mut receiver, &chunks[1]);
        assert_eq!(receiver.admit(chunks[1].header()), Ok(Admission::Duplicate));
        take(&mut receiver, &chunks[0]);
        apply_all(&mut receiver).unwrap();
        assert_eq!(receiver.admit(chunks[0].header()), Ok(Admission::Duplicate));
    }

    #[test]
    fn a_refused_payload_may_come_again_and_is_not_applied_before() {
        let chunks = stream(1);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        receiver.admit(chunks[0].header()).unwrap();
        assert!(receiver.refused(Seq(0)));
        assert!(!receiver.refused(Seq(0)));
        assert!(apply_all(&mut receiver).unwrap().is_empty());
        take(&mut receiver, &chunks[0]);
        assert_eq!(apply_all(&mut receiver).unwrap(), [0]);
    }

    #[test]
    fn a_copy_that_breaks_off_leaves_the_chunk_to_the_others() {
        let chunks = stream(1);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        for _ in 0..3 {
            assert_eq!(receiver.admit(chunks[0].header()), Ok(Admission::Take));
        }
        assert!(!receiver.refused(Seq(0)));
        assert!(receiver.verified(Seq(0)));
        assert!(!receiver.verified(Seq(0)), "one copy is enough");
        assert!(!receiver.refused(Seq(0)) && !receiver.lacks(Seq(0)));
        assert_eq!(receiver.admit(chunks[0].header()), Ok(Admission::Duplicate));
        assert_eq!(apply_all(&mut receiver).unwrap(), [0]);
        assert!(!receiver.verified(Seq(0)) && !receiver.lacks(Seq(0)));
    }

    #[test]
    fn copies_of_one_chunk_are_bounded() {
        let chunks = stream(1);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        for _ in 0..MAX_COPIES {
            assert_eq!(receiver.admit(chunks[0].header()), Ok(Admission::Take));
        }
        assert_eq!(receiver.admit(chunks[0].header()), Err(Violation::Window(0)));
        assert!((1..MAX_COPIES).all(|_| !receiver.refused(Seq(0))));
        assert!(receiver.refused(Seq(0)) && receiver.lacks(Seq(0)));
    }

    #[test]
    fn equivocation_old_round_and_extend_end_the_session() {
        let chunks = stream(3);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        take(&mut receiver, &chunks[0]);
        let other = ChunkHeader { digest: [0; 32], ..chunks[0].header().clone() };
        assert_eq!(receiver.admit(&other), Err(Violation::Equivocation(0)));

        let mut receiver = Receiver::new(SESSION, WINDOW);
        chunks.iter().for_each(|c| take(&mut receiver, c));
        apply_all(&mut receiver).unwrap();
        let late = ChunkHeader { seq: Seq(4), ..chunks[2].header().clone() };
        assert_eq!(receiver.admit(&late), Err(Violation::AfterEnd(4)));

        let mut receiver = Receiver::new(SESSION, WINDOW);
        take(&mut receiver, &chunks[0]);
        let newer = ChunkHeader { version: PageVersion(7), ..chunks[1].header().clone() };
        receiver.admit(&newer).unwrap();
        assert!(receiver.verified(Seq(1)));
        apply_all(&mut receiver).unwrap();
        let older = ChunkHeader { prev: newer.hash(), ..chunks[2].header().clone() };
        receiver.admit(&older).unwrap();
        assert!(receiver.verified(Seq(2)));
        assert_eq!(apply_all(&mut receiver), Err(Violation::OldRound(2)));
    }

    #[test]
    fn omit_a_gap_is_never_applied_over() {
        let chunks = stream(3);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        take(&mut receiver, &chunks[0]);
        // The second is left out and the third renumbered: its hash of the one before gives it away.
        let renumbered = ChunkHeader { seq: Seq(1), offset: StreamOffset(10), ..chunks[2].header().clone() };
        receiver.admit(&renumbered).unwrap();
        assert!(receiver.verified(Seq(1)));
        assert_eq!(apply_all(&mut receiver), Err(Violation::Chain(1)));
    }

    #[test]
    fn what_waits_for_a_chunk_that_is_not_here_is_held() {
        let chunks = stream(3);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        let wire = |n: usize| u64::from(chunks[n].header().wire_len);
        for n in [1, 2] {
            receiver.admit(chunks[n].header()).unwrap();
            assert!(receiver.verified(Seq(n as u64)));
            assert!(!receiver.verified(Seq(n as u64)), "a second copy counts for nothing");
        }
        assert_eq!(receiver.held(), wire(1) + wire(2));
        receiver.admit(chunks[0].header()).unwrap();
        assert_eq!(receiver.held(), wire(1) + wire(2), "it is not verified yet");
        assert!(receiver.verified(Seq(0)));
        assert_eq!(receiver.held(), 0, "they wait for the sink only");
        receiver.poll_apply().unwrap();
        receiver.applied();
        assert_eq!((receiver.held(), receiver.has_next()), (0, true));
    }

    #[test]
    fn the_window_bounds_what_waits() {
        let chunks = stream(1);
        let mut receiver = Receiver::new(SESSION, WINDOW);
        let far = ChunkHeader { seq: Seq(MAX_REORDER + 1), ..chunks[0].header().clone() };
        assert_eq!(receiver.admit(&far), Err(Violation::Window(MAX_REORDER + 1)));
        let big = |seq| ChunkHeader {
            seq: Seq(seq),
            stream_len: 1 << 20,
            raw_len: 1 << 20,
            wire_len: 1 << 20,
            ..chunks[0].header().clone()
        };
        let taken = (1..100).take_while(|i| receiver.admit(&big(*i)).is_ok()).count();
        assert_eq!(taken, 2);
    }
}
