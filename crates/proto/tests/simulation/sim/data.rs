//! The data path at both ends: what the drivers do around [`Sender`] and [`Receiver`], the v1 path beside them, and the VMMs at either
//! end of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dwcp_proto::chunk::Kind;
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Choice, Refusal};
use dwcp_proto::pace::Pace;
use dwcp_proto::receiver::{Admission, MAX_REORDER, Receiver};
use dwcp_proto::sender::Sender;
use dwcp_proto::{ChunkHeader, Leg, LinkId, PageVersion, Path, Seq, StreamOffset};

use super::net::ConnId;
use super::queue::Time;
use super::rng::{Rng, mix};
use super::scenario::{Mutant, Scenario};
use super::seal::{Content, Seal};

/// What the source's VMM has put out: where each record of its stream ends. The sink is held against it.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    ends: Vec<u64>,
    words: u64,
}

impl Stream {
    pub(crate) fn new(words: u64) -> Self {
        Stream { ends: Vec::new(), words }
    }

    /// The VMM puts out its next record.
    fn put(&mut self, len: u64) -> Piece {
        let offset = self.len();
        self.ends.push(offset + len);
        Piece { offset, len }
    }

    pub(crate) fn records(&self) -> u64 {
        self.ends.len() as u64
    }

    pub(crate) fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The record that holds this byte, and where it ends.
    fn at(&self, offset: u64) -> Option<(u64, u64)> {
        let index = self.ends.partition_point(|end| *end <= offset);
        Some((index as u64, *self.ends.get(index)?))
    }

    /// What the piece holds, if it is a piece of one record.
    fn word(&self, piece: Piece) -> Option<u64> {
        let (index, end) = self.at(piece.offset)?;
        (piece.end() <= end).then(|| mix(self.words.wrapping_add(index)))
    }
}

/// A record of the VMM's stream, or the rest of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Piece {
    pub(crate) fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// What a data connection carries.
#[derive(Debug, Clone)]
pub(crate) enum Load<C> {
    Chunk(C),
    /// Bytes of the VMM's stream as they are, with what they hold.
    Bytes(Piece, u64),
}

/// What was read from the VMM and is not known to be applied.
#[derive(Debug, Default)]
pub(crate) struct Reel {
    kept: VecDeque<Piece>,
    handed: usize,
    pub(crate) applied: u64,
}

impl Reel {
    fn next(&mut self) -> Option<Piece> {
        let piece = self.kept.get(self.handed).copied()?;
        self.handed += 1;
        Some(piece)
    }

    fn keep(&mut self, piece: Piece) {
        self.kept.push_back(piece);
    }

    pub(crate) fn trim(&mut self, offset: u64) {
        while let Some(first) = self.kept.front_mut().filter(|first| first.offset < offset) {
            if first.end() <= offset {
                self.kept.pop_front();
                self.handed = self.handed.saturating_sub(1);
            } else {
                *first = Piece { offset, len: first.end() - offset };
            }
        }
        self.applied = self.applied.max(offset);
    }

    fn rewind(&mut self) {
        self.handed = 0;
    }

    /// Up to where pieces were handed out on this leg.
    fn handed(&self) -> u64 {
        let last = self.handed.checked_sub(1).and_then(|last| self.kept.get(last));
        last.map_or(self.applied, |piece| piece.end())
    }

    fn all_handed(&self) -> bool {
        self.handed == self.kept.len()
    }

    /// The kept bytes from `offset` on that were handed out, up to the end of their piece.
    fn from(&self, offset: u64) -> Option<Piece> {
        let piece = self.kept.iter().take(self.handed).find(|piece| piece.end() > offset)?;
        Some(Piece { offset, len: piece.end() - offset })
    }
}

/// What a v1 leg carried up to an offset, as both sides know it: here the bytes themselves are checked by the sink.
fn bytes_root(leg: &Leg, end: u64) -> [u8; 32] {
    let mut root = leg.id.0;
    root[..8].copy_from_slice(&mix(end ^ u64::from(leg.number)).to_le_bytes());
    root
}

/// The order to go on as another leg.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Switch {
    pub(crate) leg: u32,
    pub(crate) choice: Choice,
}

/// Where it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Switched {
    pub(crate) leg: u32,
    pub(crate) applied: u64,
    pub(crate) carried: [u8; 32],
}

/// The source's data path.
pub(crate) struct Outgoing<S: Seal> {
    pub(crate) leg: Leg,
    pub(crate) reel: Reel,
    pub(crate) way: Way<S>,
    pub(crate) conns: BTreeMap<LinkId, ConnId>,
    pub(crate) producing: bool,
    /// The machine was told.
    pub(crate) delivered: bool,
    /// The source has ordered another leg, and waits for the answer.
    pub(crate) asked: Option<Switch>,
}

/// What the present leg's path needs.
pub(crate) enum Way<S: Seal> {
    Chunks(Box<Chunks<S>>),
    Bytes {
        /// Up to where it was handed to the present connection.
        written: u64,
    },
}

/// A v3 leg.
pub(crate) struct Chunks<S: Seal> {
    pub(crate) sender: Sender,
    seal: S,
    /// Sealed and not acknowledged.
    pub(crate) kept: VecDeque<S::Chunk>,
    pub(crate) base: u64,
    /// Length and root, once the end is sealed.
    pub(crate) end: Option<Transfer>,
    /// The digest of what was acknowledged.
    carried: [u8; 32],
    weight: u64,
}

impl<S: Seal> Way<S> {
    fn new(leg: &Leg, scenario: &Scenario) -> Result<Self, String> {
        if leg.path == Path::V1 {
            return Ok(Way::Bytes { written: leg.from.0 });
        }
        let pace = Pace::new(scenario.budget);
        Ok(Way::Chunks(Box::new(Chunks {
            sender: Sender::from(leg.from, leg.choice.window, pace),
            seal: S::new(leg)?,
            kept: VecDeque::new(),
            base: 0,
            end: None,
            carried: leg.id.0,
            weight: 0,
        })))
    }
}

impl<S: Seal> Outgoing<S> {
    pub(crate) fn new(leg: Leg, scenario: &Scenario) -> Result<Self, String> {
        Ok(Outgoing {
            way: Way::new(&leg, scenario)?,
            leg,
            reel: Reel::default(),
            conns: BTreeMap::new(),
            producing: false,
            delivered: false,
            asked: None,
        })
    }

    /// Everything was read from the VMM and handed to this leg.
    pub(crate) fn all_read(&self, scenario: &Scenario, stream: &Stream) -> bool {
        stream.records() == scenario.chunks && self.reel.all_handed()
    }

    /// Whether the leg leads forward only: its end was sealed, or told.
    pub(crate) fn ending(&self, scenario: &Scenario, stream: &Stream) -> bool {
        match &self.way {
            Way::Chunks(chunks) => chunks.end.is_some(),
            Way::Bytes { .. } => self.all_read(scenario, stream),
        }
    }

    pub(crate) fn wants_more(&self, scenario: &Scenario, stream: &Stream) -> bool {
        self.asked.is_none()
            && match &self.way {
                Way::Chunks(chunks) => chunks.end.is_none() && chunks.sender.has_room(),
                Way::Bytes { .. } => {
                    let held = self.reel.handed() - self.reel.applied;
                    !self.all_read(scenario, stream) && (held == 0 || held < self.leg.choice.window)
                }
            }
    }

    /// Takes what comes next onto the leg: from the reel, else from the VMM, else the end.
    pub(crate) fn take(
        &mut self,
        scenario: &Scenario,
        stream: &mut Stream,
        rng: &mut Rng,
    ) -> Result<(), String> {
        let [stream_len, raw_len, wire_len] = scenario.lengths(rng);
        let mut piece = self.reel.next();
        if piece.is_none() && stream.records() < scenario.chunks {
            let new = stream.put(stream_len.into());
            self.reel.keep(new);
            piece = self.reel.next();
        }
        let Way::Chunks(chunks) = &mut self.way else { return Ok(()) };
        let chunk = match piece {
            None => {
                let chunk = chunks.seal.seal_end();
                let header = S::header(&chunk);
                chunks.end = Some(Transfer { stream_len: header.offset.0, root: header.hash() });
                chunk
            }
            Some(piece) => {
                let word = stream.word(piece).ok_or("a piece of no record")?;
                let record = stream.at(piece.offset).map_or(0, |(index, _)| index);
                let version = PageVersion((record * scenario.rounds / scenario.chunks) as u32);
                let stream_len = piece.len as u32;
                // Drawn for a record of another length, perhaps.
                let raw_len = raw_len.max(stream_len);
                let offset = StreamOffset(piece.offset);
                chunks.seal.seal(Content { word, offset, version, stream_len, raw_len, wire_len })
            }
        };
        chunks.keep(chunk, self.leg.choice.window)
    }

    /// The leg has carried everything, and the destination has said so.
    pub(crate) fn finished(&self, scenario: &Scenario, stream: &Stream) -> Option<Transfer> {
        match &self.way {
            Way::Chunks(chunks) => chunks.end.filter(|_| chunks.sender.is_idle()),
            Way::Bytes { .. } => {
                let len = stream.len();
                let all = self.all_read(scenario, stream) && self.reel.applied == len;
                all.then(|| Transfer { stream_len: len, root: bytes_root(&self.leg, len) })
            }
        }
    }

    /// The next bytes for a v1 connection, at most one piece; what they hold.
    pub(crate) fn next_bytes(&mut self, stream: &Stream, rng: &mut Rng) -> Option<(Piece, u64)> {
        let Way::Bytes { written } = &mut self.way else { return None };
        let mut piece = self.reel.from(*written)?;
        // A write takes what fits.
        if rng.one_in(4) {
            piece.len = rng.between(1, piece.len);
        }
        *written = piece.end();
        Some((piece, stream.word(piece)?))
    }

    /// The destination says where it goes on; the leg after this one.
    pub(crate) fn turned(&mut self, switched: Switched, scenario: &Scenario) -> Result<(), String> {
        let Some(switch) = self.asked.clone().filter(|asked| asked.leg == switched.leg) else {
            return Ok(());
        };
        let carried = match &mut self.way {
            Way::Chunks(chunks) => chunks.carried_until(switched.applied)?,
            Way::Bytes { .. } => bytes_root(&self.leg, switched.applied),
        };
        if carried != switched.carried {
            return Err("both sides carried something else".into());
        }
        self.asked = None;
        self.leg = self.leg.next(switch.choice, StreamOffset(switched.applied), carried).ok_or("no leg")?;
        if scenario.mutant != Some(Mutant::ReelNotRewound) {
            self.reel.trim(switched.applied);
            self.reel.rewind();
        }
        self.way = Way::new(&self.leg, scenario)?;
        Ok(())
    }
}

impl<S: Seal> Chunks<S> {
    fn keep(&mut self, chunk: S::Chunk, window: u64) -> Result<(), String> {
        let header = S::header(&chunk);
        let seq = self.sender.push(wire_bytes(header), header.weight(), header.end());
        if seq != header.seq {
            return Err(format!("sealed as {}, pushed as {seq}", header.seq));
        }
        self.weight += header.weight();
        self.kept.push_back(chunk);
        if self.weight > window {
            return Err(format!("{} bytes unacknowledged, the window is {window}", self.weight));
        }
        if self.kept.len() as u64 > MAX_REORDER {
            return Err(format!("{} chunks unacknowledged", self.kept.len()));
        }
        Ok(())
    }

    /// Takes an acknowledgement, as it came.
    pub(crate) fn acked(&mut self, next: u64, applied: u64, now: std::time::Duration) -> Result<(), String> {
        if next < self.base {
            return Ok(());
        }
        let acked = self.sender.ack(Seq(next), StreamOffset(applied), now).map_err(|e| e.to_string())?;
        if acked.from.0 != self.base || acked.to.0 != next {
            return Err(format!("freed {} to {}, not {} to {next}", acked.from, acked.to, self.base));
        }
        for chunk in self.kept.drain(..(next - self.base) as usize) {
            self.weight -= S::header(&chunk).weight();
            self.carried = S::header(&chunk).hash();
        }
        self.base = next;
        Ok(())
    }

    fn carried_until(&mut self, offset: u64) -> Result<[u8; 32], String> {
        while self.kept.front().is_some_and(|chunk| S::header(chunk).end().0 <= offset) {
            let Some(chunk) = self.kept.pop_front() else { break };
            self.carried = S::header(&chunk).hash();
        }
        match self.kept.front().is_some_and(|chunk| S::header(chunk).offset.0 < offset) {
            true => Err(format!("the destination stopped at byte {offset}, within a chunk")),
            false => Ok(self.carried),
        }
    }
}

/// A chunk's bytes on the wire.
pub(crate) fn wire_bytes(header: &ChunkHeader) -> u64 {
    u64::from(header.wire_len) + 168
}

/// The destination's data path.
pub(crate) struct Incoming<S> {
    pub(crate) leg: Leg,
    pub(crate) way: Landing<S>,
    pub(crate) conns: BTreeMap<LinkId, ConnId>,
    /// What the VMM is taking.
    pub(crate) applying: Option<Applying>,
    /// What it was given so far.
    pub(crate) offset: u64,
    pub(crate) ack: Ack,
    /// Refusals that were said, where each is said only once.
    pub(crate) said: BTreeSet<(u64, u32)>,
    pub(crate) ack_waits: bool,
    pub(crate) ack_said: Time,
    /// An order that came while the VMM was taking something.
    pub(crate) ordered: Option<Switch>,
    /// The answer to the last order.
    pub(crate) switched: Option<Switched>,
}

/// What the present leg's path needs.
pub(crate) enum Landing<S> {
    Chunks(Box<Arriving<S>>),
    Bytes {
        /// What has come and was not taken yet.
        pending: VecDeque<(Piece, u64)>,
        /// Where the stream ends, once the source has said so.
        length: Option<u64>,
    },
}

/// A v3 leg.
pub(crate) struct Arriving<S> {
    pub(crate) seal: S,
    pub(crate) receiver: Receiver,
    /// Verified words that wait for their turn.
    pub(crate) ready: BTreeMap<u64, u64>,
    /// How often each chunk came altered.
    altered: BTreeMap<u64, u32>,
}

/// What the VMM is taking: a chunk, or bytes.
#[derive(Debug, Clone)]
pub(crate) enum Applying {
    Chunk(ChunkHeader),
    Bytes(Piece, u64),
}

impl Applying {
    pub(crate) fn len(&self) -> u64 {
        match self {
            Applying::Chunk(header) => header.stream_len.into(),
            Applying::Bytes(piece, _) => piece.len,
        }
    }
}

impl<S: Seal> Landing<S> {
    fn new(leg: &Leg) -> Result<Self, String> {
        if leg.path == Path::V1 {
            return Ok(Landing::Bytes { pending: VecDeque::new(), length: None });
        }
        Ok(Landing::Chunks(Box::new(Arriving {
            seal: S::new(leg)?,
            receiver: Receiver::from(leg.id, leg.from, leg.choice.window),
            ready: BTreeMap::new(),
            altered: BTreeMap::new(),
        })))
    }
}

impl<S: Seal> Incoming<S> {
    pub(crate) fn new(leg: Leg) -> Result<Self, String> {
        Ok(Incoming {
            way: Landing::new(&leg)?,
            leg,
            conns: BTreeMap::new(),
            applying: None,
            offset: 0,
            ack: Ack::default(),
            said: BTreeSet::new(),
            ack_waits: false,
            ack_said: 0,
            ordered: None,
            switched: None,
        })
    }

    /// A v3 leg's receiver and what belongs to it.
    pub(crate) fn arriving(&mut self) -> Option<&mut Arriving<S>> {
        match &mut self.way {
            Landing::Chunks(arriving) => Some(arriving),
            Landing::Bytes { .. } => None,
        }
    }

    /// Up to where a new v1 connection goes on: what is being taken will have been.
    pub(crate) fn goes_on_at(&mut self) -> u64 {
        if let Landing::Bytes { pending, .. } = &mut self.way {
            pending.clear();
        }
        self.offset + self.applying.as_ref().map_or(0, Applying::len)
    }

    /// Gives the sink what is next, if it is there.
    pub(crate) fn apply(&mut self) -> Result<Option<Applying>, String> {
        if self.applying.is_some() {
            return Ok(None);
        }
        self.applying = match &mut self.way {
            Landing::Chunks(arriving) => {
                let header = arriving.receiver.poll_apply().map_err(|v| format!("an honest sender: {v}"))?;
                header.map(Applying::Chunk)
            }
            Landing::Bytes { pending, .. } => pending.pop_front().map(|(p, word)| Applying::Bytes(p, word)),
        };
        Ok(self.applying.clone())
    }

    /// The sink has taken it. It sees for itself that each byte comes once, in order, without a gap, as it was made.
    pub(crate) fn applied(&mut self, stream: &Stream, digest: &mut Digest) -> Result<(), String> {
        let (piece, word) = match self.applying.take() {
            None => return Err("nothing was being applied".into()),
            Some(Applying::Bytes(piece, word)) => (piece, Some(word)),
            Some(Applying::Chunk(header)) => {
                let arriving = self.arriving().ok_or("a chunk on a leg of bytes")?;
                let word = arriving.ready.remove(&header.seq.0);
                arriving.receiver.applied();
                if !arriving.altered.is_empty() {
                    arriving.altered = arriving.altered.split_off(&arriving.receiver.next().0);
                }
                let piece = Piece { offset: header.offset.0, len: header.stream_len.into() };
                (piece, word.filter(|_| header.kind == Kind::Data))
            }
        };
        self.sink(piece, word, stream, digest)?;
        self.state();
        Ok(())
    }

    pub(crate) fn sink(
        &mut self,
        piece: Piece,
        word: Option<u64>,
        stream: &Stream,
        digest: &mut Digest,
    ) -> Result<(), String> {
        if piece.offset != self.offset {
            return Err(format!("byte {} applied after {} bytes", piece.offset, self.offset));
        }
        if piece.len == 0 {
            return Ok(());
        }
        self.offset += piece.len;
        let word = word.ok_or_else(|| format!("byte {} applied without its payload", piece.offset))?;
        if stream.word(piece) != Some(word) {
            return Err(format!("byte {} applied altered", piece.offset));
        }
        if stream.at(piece.offset).is_some_and(|(_, end)| end == piece.end()) {
            digest.add(word);
        }
        Ok(())
    }

    /// The whole transfer, once it was applied.
    pub(crate) fn finished(&self) -> Option<Transfer> {
        let stream_len = self.offset;
        match &self.way {
            Landing::Chunks(arriving) => arriving.receiver.root().map(|root| Transfer { stream_len, root }),
            Landing::Bytes { length, .. } => {
                let whole = *length == Some(stream_len) && self.applying.is_none();
                whole.then(|| Transfer { stream_len, root: bytes_root(&self.leg, stream_len) })
            }
        }
    }

    /// Obeys an order to go on as another leg; what to answer.
    pub(crate) fn turn(&mut self, switch: Switch, mutant: Option<Mutant>) -> Result<Switched, String> {
        let (carried, mut applied) = match &self.way {
            Landing::Chunks(arriving) => (arriving.receiver.carried(), self.offset),
            Landing::Bytes { .. } => (bytes_root(&self.leg, self.offset), self.offset),
        };
        if mutant == Some(Mutant::TurnsBehind) {
            // Where the next chunk would have ended.
            applied += 1;
        }
        let next = self.leg.next(switch.choice, StreamOffset(applied), carried);
        self.leg = next.filter(|leg| leg.number == switch.leg).ok_or("a leg out of turn")?;
        self.way = Landing::new(&self.leg)?;
        self.said.clear();
        let switched = Switched { leg: self.leg.number, applied, carried };
        self.switched = Some(switched);
        self.state();
        Ok(switched)
    }

    /// What is to be acknowledged: the whole state towards the sender.
    pub(crate) fn state(&mut self) {
        let (mut next, mut held, mut refused) = (0, 0, Vec::new());
        if let Landing::Chunks(arriving) = &self.way {
            (next, held) = (arriving.receiver.next().0, arriving.receiver.held());
            let lacking = arriving.altered.iter().filter(|(seq, _)| arriving.receiver.lacks(Seq(**seq)));
            refused = lacking.map(|(seq, times)| Refusal { seq: *seq, times: *times }).collect();
        }
        self.ack = Ack { next, applied: self.offset, refused, leg: self.leg.number, held, ..Ack::default() };
    }
}

impl<S> Arriving<S> {
    pub(crate) fn admit(
        &mut self,
        header: &ChunkHeader,
        mutant: Option<Mutant>,
    ) -> Result<Admission, String> {
        let admission = self.receiver.admit(header).map_err(|v| format!("an honest sender: {v}"))?;
        Ok(match mutant {
            Some(Mutant::DuplicateApplied) => Admission::Take,
            _ => admission,
        })
    }

    /// A copy's payload is what its header says.
    pub(crate) fn verified(&mut self, seq: u64, word: u64, scenario: &Scenario) -> Result<(), String> {
        if self.receiver.verified(Seq(seq)) || scenario.mutant == Some(Mutant::DuplicateApplied) {
            self.ready.insert(seq, word);
        }
        let most = scenario.choice.window / 200 + MAX_REORDER;
        if self.ready.len() as u64 > most {
            return Err(format!("{} chunks wait to be applied", self.ready.len()));
        }
        Ok(())
    }

    /// A copy came altered; how often that was.
    pub(crate) fn refused(&mut self, seq: u64) -> u32 {
        let times = self.altered.entry(seq).or_default();
        *times += 1;
        let times = *times;
        self.receiver.refused(Seq(seq));
        times
    }
}

/// What a stream was, in one number: the order and the content of its records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Digest(u64);

impl Digest {
    fn add(&mut self, word: u64) {
        self.0 = mix(self.0.rotate_left(9) ^ word);
    }

    /// Of a whole stream.
    pub(crate) fn of(stream: &Stream) -> Self {
        let mut digest = Digest::default();
        (0..stream.records()).for_each(|index| digest.add(mix(stream.words.wrapping_add(index))));
        digest
    }
}
