//! The data path at both ends: what the drivers do around [`Sender`] and [`Receiver`], and the source and sink beside them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dwcp_proto::chunk::Kind;
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Refusal};
use dwcp_proto::pace::Pace;
use dwcp_proto::receiver::{Admission, MAX_REORDER, Receiver};
use dwcp_proto::sender::Sender;
use dwcp_proto::{ChunkHeader, LinkId, PageVersion, Seq, SessionId, StreamOffset};

use super::net::ConnId;
use super::queue::Time;
use super::rng::mix;
use super::scenario::{Mutant, Scenario};
use super::seal::{Content, Seal};

/// What a stream was, in one number: the order and the content of its chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Digest(u64);

impl Digest {
    fn add(&mut self, word: u64) {
        self.0 = mix(self.0.rotate_left(9) ^ word);
    }
}

/// The source's data path.
pub(crate) struct Outgoing<S: Seal> {
    pub(crate) sender: Sender,
    pub(crate) seal: S,
    /// Sealed and not acknowledged.
    pub(crate) kept: VecDeque<S::Chunk>,
    pub(crate) base: u64,
    pub(crate) conns: BTreeMap<LinkId, ConnId>,
    pub(crate) made: u64,
    /// Length and root, once the end is sealed.
    pub(crate) end: Option<Transfer>,
    pub(crate) digest: Digest,
    pub(crate) producing: bool,
    /// The machine was told.
    pub(crate) delivered: bool,
    weight: u64,
    offset: u64,
    words: u64,
}

impl<S: Seal> Outgoing<S> {
    pub(crate) fn new(session: SessionId, scenario: &Scenario, words: u64) -> Result<Self, String> {
        Ok(Outgoing {
            sender: Sender::new(scenario.choice.window, Pace::new(scenario.budget)),
            seal: S::new(session)?,
            kept: VecDeque::new(),
            base: 0,
            conns: BTreeMap::new(),
            made: 0,
            end: None,
            digest: Digest::default(),
            producing: false,
            delivered: false,
            weight: 0,
            offset: 0,
            words,
        })
    }

    /// Seals the next chunk, or the end after the last.
    pub(crate) fn make(
        &mut self,
        scenario: &Scenario,
        [stream_len, raw_len, wire_len]: [u32; 3],
    ) -> Result<(), String> {
        let chunk = if self.made == scenario.chunks {
            let chunk = self.seal.seal_end();
            let header = S::header(&chunk);
            self.end = Some(Transfer { stream_len: header.offset.0, root: header.hash() });
            chunk
        } else {
            let word = mix(self.words.wrapping_add(self.made));
            self.digest.add(word);
            let version = PageVersion((self.made * scenario.rounds / scenario.chunks) as u32);
            let offset = StreamOffset(self.offset);
            self.offset += u64::from(stream_len);
            self.made += 1;
            self.seal.seal(Content { word, offset, version, stream_len, raw_len, wire_len })
        };
        let header = S::header(&chunk);
        let seq = self.sender.push(wire_bytes(header), header.weight(), header.end());
        if seq != header.seq {
            return Err(format!("sealed as {}, pushed as {seq}", header.seq));
        }
        self.weight += header.weight();
        self.kept.push_back(chunk);
        let window = scenario.choice.window;
        if self.weight > window {
            return Err(format!("{} bytes unacknowledged, the window is {window}", self.weight));
        }
        if self.kept.len() as u64 > MAX_REORDER {
            return Err(format!("{} chunks unacknowledged", self.kept.len()));
        }
        Ok(())
    }

    /// Takes an acknowledgement, as it came; the chunks that it freed.
    pub(crate) fn acked(&mut self, next: u64, applied: u64, now: std::time::Duration) -> Result<u64, String> {
        if next < self.base {
            return Ok(0);
        }
        let acked = self.sender.ack(Seq(next), StreamOffset(applied), now).map_err(|e| e.to_string())?;
        if acked.from.0 != self.base || acked.to.0 != next {
            return Err(format!("freed {} to {}, not {} to {next}", acked.from, acked.to, self.base));
        }
        for chunk in self.kept.drain(..(next - self.base) as usize) {
            self.weight -= S::header(&chunk).weight();
        }
        let freed = next - self.base;
        self.base = next;
        Ok(freed)
    }

    pub(crate) fn finished(&self) -> Option<Transfer> {
        self.end.filter(|_| self.sender.is_idle())
    }
}

/// A chunk's bytes on the wire.
pub(crate) fn wire_bytes(header: &ChunkHeader) -> u64 {
    u64::from(header.wire_len) + 168
}

/// The destination's data path.
pub(crate) struct Incoming<S> {
    pub(crate) seal: S,
    pub(crate) receiver: Receiver,
    pub(crate) conns: BTreeMap<LinkId, ConnId>,
    /// Verified words that wait for their turn.
    pub(crate) ready: BTreeMap<u64, u64>,
    /// The chunk that the VMM is taking.
    pub(crate) applying: Option<ChunkHeader>,
    /// How often each chunk came altered.
    pub(crate) altered: BTreeMap<u64, u32>,
    pub(crate) digest: Digest,
    pub(crate) applied: u64,
    pub(crate) ack: Ack,
    /// Refusals that were said, where each is said only once.
    pub(crate) said: BTreeSet<(u64, u32)>,
    pub(crate) ack_waits: bool,
    pub(crate) ack_said: Time,
    offset: u64,
    words: u64,
}

impl<S: Seal> Incoming<S> {
    pub(crate) fn new(session: SessionId, scenario: &Scenario, words: u64) -> Result<Self, String> {
        Ok(Incoming {
            seal: S::new(session)?,
            receiver: Receiver::new(session, scenario.choice.window),
            conns: BTreeMap::new(),
            ready: BTreeMap::new(),
            applying: None,
            altered: BTreeMap::new(),
            digest: Digest::default(),
            applied: 0,
            ack: Ack::default(),
            said: BTreeSet::new(),
            ack_waits: false,
            ack_said: 0,
            offset: 0,
            words,
        })
    }

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
        self.state();
        times
    }

    /// Gives the sink the next chunk, if it is there.
    pub(crate) fn apply(&mut self) -> Result<Option<ChunkHeader>, String> {
        if self.applying.is_some() {
            return Ok(None);
        }
        let header = self.receiver.poll_apply().map_err(|v| format!("an honest sender: {v}"))?;
        self.applying.clone_from(&header);
        Ok(header)
    }

    /// The sink has taken the chunk. It sees for itself that each comes once, in order, without a gap, as it was made.
    pub(crate) fn applied(&mut self) -> Result<(), String> {
        let Some(header) = self.applying.take() else { return Err("nothing was being applied".into()) };
        let word = self.ready.remove(&header.seq.0);
        self.sink(header.seq.0, header.kind, header.offset.0, header.stream_len.into(), word)?;
        self.receiver.applied();
        if !self.altered.is_empty() {
            self.altered = self.altered.split_off(&self.receiver.next().0);
        }
        self.state();
        Ok(())
    }

    /// What is to be acknowledged: the whole state towards the sender.
    pub(crate) fn state(&mut self) {
        let (next, applied) = (self.receiver.next().0, self.receiver.offset().0);
        let lacking = self.altered.iter().filter(|(seq, _)| self.receiver.lacks(Seq(**seq)));
        let refused = lacking.map(|(seq, times)| Refusal { seq: *seq, times: *times }).collect();
        self.ack = Ack { next, applied, refused, leg: 0 };
    }

    pub(crate) fn sink(
        &mut self,
        seq: u64,
        kind: Kind,
        offset: u64,
        len: u64,
        word: Option<u64>,
    ) -> Result<(), String> {
        if seq != self.applied || offset != self.offset {
            return Err(format!(
                "chunk {seq} at {offset} applied after {} chunks and {} bytes",
                self.applied, self.offset
            ));
        }
        self.applied += 1;
        self.offset += len;
        if kind == Kind::Data {
            let word = word.ok_or_else(|| format!("chunk {seq} applied without its payload"))?;
            if word != mix(self.words.wrapping_add(seq)) {
                return Err(format!("chunk {seq} applied altered"));
            }
            self.digest.add(word);
        }
        Ok(())
    }
}
