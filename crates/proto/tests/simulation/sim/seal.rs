//! Two ways to seal: the real one, and a stand-in that leaves out Ed25519 and the payload's BLAKE3 for speed.
//!
//! In both a chunk carries one *word*, from which the sink tells whether it was given what the source made. The headers
//! are the real ones, with their real chain.

use bytes::Bytes;
use dwcp_proto::chunk::{ChunkHeader, Codec, EncodedChunk, Kind, SealedChunk, Sealer, Verifier};
use dwcp_proto::{Lane, Leg, NodeKey, NodeName, PageVersion, Seq, StreamOffset};

use super::rng::mix;

/// What the source puts into a chunk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content {
    pub(crate) word: u64,
    pub(crate) offset: StreamOffset,
    pub(crate) version: PageVersion,
    pub(crate) stream_len: u32,
    pub(crate) raw_len: u32,
    /// The real seal makes its own payload of the word, and is as long as that.
    pub(crate) wire_len: u32,
}

/// How chunks are sealed and verified.
pub(crate) trait Seal: Sized {
    /// A chunk with its seal: what the sender keeps and the network carries.
    type Chunk: Clone;

    fn new(leg: &Leg) -> Result<Self, String>;
    fn seal(&mut self, content: Content) -> Self::Chunk;
    fn seal_end(&mut self) -> Self::Chunk;
    fn header(chunk: &Self::Chunk) -> &ChunkHeader;
    /// The chunk with one bit of its payload changed; which one, `random` says.
    fn altered(chunk: Self::Chunk, random: u64) -> Self::Chunk;
    /// The header as the destination reads it.
    fn read(&self, chunk: &Self::Chunk) -> Result<ChunkHeader, String>;
    /// The word in a payload that is what its header says.
    fn word(&self, chunk: Self::Chunk) -> Option<u64>;
}

/// Headers are real; the digest is a mixed word and nothing is signed.
pub(crate) struct StandIn {
    next: Seq,
    prev: [u8; 32],
    end: StreamOffset,
}

#[derive(Clone)]
pub(crate) struct Plain {
    header: ChunkHeader,
    word: u64,
}

fn digest(word: u64) -> [u8; 32] {
    let mut digest = [0; 32];
    digest[..8].copy_from_slice(&mix(word).to_le_bytes());
    digest
}

impl StandIn {
    fn finish(&mut self, header: ChunkHeader, word: u64) -> Plain {
        self.next = header.seq.next();
        self.prev = header.hash();
        self.end = header.end();
        Plain { header, word }
    }
}

impl Seal for StandIn {
    type Chunk = Plain;

    fn new(leg: &Leg) -> Result<Self, String> {
        Ok(StandIn { next: Seq(0), prev: leg.id.0, end: leg.from })
    }

    fn seal(&mut self, content: Content) -> Plain {
        let header = ChunkHeader {
            kind: Kind::Data,
            codec: Codec::Zstd,
            lane: Lane(0),
            version: content.version,
            stream_len: content.stream_len,
            raw_len: content.raw_len,
            wire_len: content.wire_len,
            seq: self.next,
            offset: content.offset,
            digest: digest(content.word),
            prev: self.prev,
        };
        self.finish(header, content.word)
    }

    fn seal_end(&mut self) -> Plain {
        let header = ChunkHeader {
            kind: Kind::End,
            codec: Codec::Raw,
            lane: Lane(0),
            version: PageVersion(0),
            stream_len: 0,
            raw_len: 0,
            wire_len: 0,
            seq: self.next,
            offset: self.end,
            digest: digest(0),
            prev: self.prev,
        };
        self.finish(header, 0)
    }

    fn header(chunk: &Plain) -> &ChunkHeader {
        &chunk.header
    }

    fn altered(chunk: Plain, random: u64) -> Plain {
        Plain { word: chunk.word ^ 1 << (random % 64), ..chunk }
    }

    fn read(&self, chunk: &Plain) -> Result<ChunkHeader, String> {
        ChunkHeader::parse(&chunk.header.to_bytes()).map_err(|e| e.to_string())
    }

    fn word(&self, chunk: Plain) -> Option<u64> {
        (digest(chunk.word) == chunk.header.digest).then_some(chunk.word)
    }
}

/// Everything as in a migration.
pub(crate) struct Real {
    key: NodeKey,
    sealer: Sealer,
    verifier: Verifier,
}

/// A chunk whose payload on the wire may have been altered since it was sealed.
#[derive(Clone)]
pub(crate) struct Signed {
    sealed: SealedChunk,
    payload: Bytes,
}

impl From<SealedChunk> for Signed {
    fn from(sealed: SealedChunk) -> Self {
        let payload = sealed.payload();
        Signed { sealed, payload }
    }
}

impl Seal for Real {
    type Chunk = Signed;

    fn new(leg: &Leg) -> Result<Self, String> {
        let name = NodeName::new("source").map_err(|e| e.to_string())?;
        // Both sides know the key that the test was given.
        let key = NodeKey::from_seed(name, &[7; 32]);
        let verifier = Verifier::new(leg.id, key.public());
        Ok(Real { key, sealer: Sealer::from(leg.id, leg.from), verifier })
    }

    fn seal(&mut self, c: Content) -> Signed {
        let len = 8 + c.word % 256;
        let payload: Vec<u8> = c.word.to_le_bytes().into_iter().cycle().take(len as usize).collect();
        let raw = c.raw_len.max(payload.len() as u32);
        let chunk = EncodedChunk::new(Codec::Zstd, Lane(0), c.version, c.offset, c.stream_len, raw, payload);
        self.sealer.seal(&self.key, chunk).into()
    }

    fn seal_end(&mut self) -> Signed {
        self.sealer.seal_end(&self.key).into()
    }

    fn header(chunk: &Signed) -> &ChunkHeader {
        chunk.sealed.header()
    }

    fn altered(mut chunk: Signed, random: u64) -> Signed {
        let mut payload = chunk.payload.to_vec();
        let bits = payload.len().max(1) * 8;
        let bit = random as usize % bits;
        if let Some(byte) = payload.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        chunk.payload = payload.into();
        chunk
    }

    fn read(&self, chunk: &Signed) -> Result<ChunkHeader, String> {
        let header = self.verifier.header(chunk.sealed.signed_header()).map_err(|e| e.to_string())?;
        Ok(header.header().clone())
    }

    fn word(&self, chunk: Signed) -> Option<u64> {
        let header = self.verifier.header(chunk.sealed.signed_header()).ok()?;
        let verified = header.payload(chunk.payload).ok()?;
        Some(verified.payload().get(..8).map_or(0, |b| b.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b))))
    }
}
