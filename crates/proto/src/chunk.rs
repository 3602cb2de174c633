//! Chunks: the unit that is hashed, signed, sent, acknowledged and, if need be, sent again.
//!
//! Each stage has its own type and takes the one before by value:
//!
//! ```text
//! EncodedChunk --Sealer::seal--> SealedChunk ==network==> ChunkHeader::parse --Verifier::header--> SignedHeader
//!                                                          payload --SignedHeader::payload--> VerifiedChunk
//! ```
//!
//! Only a [`VerifiedChunk`] gives out its payload, so nothing can be decoded before it was verified.
//!
//! # Format
//! A chunk on the wire is a header of [`HEADER_LEN`] bytes, an Ed25519 signature of 64 bytes, and the payload. Integers are
//! big-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 1 | format, [`FORMAT`] |
//! | 1 | 1 | kind: 0 data, 1 end of stream |
//! | 2 | 1 | codec: 0 raw, 1 lz4 block, 2 zstd frame, 3 the next part of its lane's zstd frame |
//! | 3 | 1 | reserved, 0 |
//! | 4 | 2 | lane |
//! | 6 | 2 | reserved, 0 |
//! | 8 | 4 | page version |
//! | 12 | 4 | bytes of the VMM's stream that the chunk stands for |
//! | 16 | 4 | payload length before compression |
//! | 20 | 4 | payload length on the wire |
//! | 24 | 8 | sequence number |
//! | 32 | 8 | offset in the VMM's stream |
//! | 40 | 32 | BLAKE3 of the payload on the wire |
//! | 72 | 32 | BLAKE3 of the header before; in the first chunk the session id |
//!
//! The signature covers a context string, the session id and the header. Since each header holds the hash of the one before, the hash of the
//! end-of-stream header, the *root*, stands for the whole session: the receipt is signed over it.

use bytes::Bytes;

use crate::fault::Mechanism;
use crate::identity::{NodeKey, PeerKey};
use crate::ids::{Lane, PageVersion, Seq, SessionId, StreamOffset};
use crate::limits::{MAX_RAW_PAYLOAD, MAX_SEGMENT_BYTES, MAX_WIRE_PAYLOAD};

/// Version of this layout.
pub const FORMAT: u8 = 3;
/// Bytes of a header without its signature.
pub const HEADER_LEN: usize = 104;
/// Bytes of a header with its signature.
pub const SIGNED_HEADER_LEN: usize = HEADER_LEN + 64;

const CONTEXT: &[u8] = b"dwcp v3 chunk\0";

/// How a payload is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Codec {
    /// Not at all.
    Raw = 0,
    /// One LZ4 block.
    Lz4 = 1,
    /// One zstd frame with its content size.
    Zstd = 2,
    /// The next part of its lane's zstd frame: only where the choice has a `lane_window`.
    Lane = 3,
}

impl Codec {
    /// The codec of a wire number.
    pub fn from_wire(number: u8) -> Option<Self> {
        match number {
            0 => Some(Codec::Raw),
            1 => Some(Codec::Lz4),
            2 => Some(Codec::Zstd),
            3 => Some(Codec::Lane),
            _ => None,
        }
    }

    /// Its name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Raw => "raw",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
            Codec::Lane => "lane",
        }
    }
}

/// What a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A stretch of the VMM's stream.
    Data,
    /// The stream ended before this chunk; it has no payload.
    End,
}

/// What travels in front of a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkHeader {
    /// What it is.
    pub kind: Kind,
    /// How its payload is compressed.
    pub codec: Codec,
    /// Its lane.
    pub lane: Lane,
    /// The version of its pages.
    pub version: PageVersion,
    /// Bytes of the VMM's stream that it stands for.
    pub stream_len: u32,
    /// Bytes of its payload before compression.
    pub raw_len: u32,
    /// Bytes of its payload on the wire.
    pub wire_len: u32,
    /// Its place in the session.
    pub seq: Seq,
    /// Its place in the VMM's stream.
    pub offset: StreamOffset,
    /// BLAKE3 of its payload.
    pub digest: [u8; 32],
    /// Hash of the header before.
    pub prev: [u8; 32],
}

/// Why a chunk was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The layout is of another version or has reserved bits set.
    #[error("chunk header of an unknown format")]
    Format,
    /// Codec number unknown.
    #[error("chunk with unknown codec {0}")]
    UnknownCodec(u8),
    /// A length is above its limit, or lengths contradict each other.
    #[error("chunk {seq}: {what} is out of bounds")]
    Length {
        /// Which chunk.
        seq: u64,
        /// Which length.
        what: &'static str,
    },
    /// The signature is not the session peer's over this header.
    #[error("chunk {0}: the signature is not the peer's")]
    Signature(u64),
    /// The payload's hash is not the header's.
    #[error("chunk {0}: the payload does not match its digest")]
    Digest(u64),
}

impl ChunkHeader {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut out = [0u8; HEADER_LEN];
        out[0] = FORMAT;
        out[1] = match self.kind {
            Kind::Data => 0,
            Kind::End => 1,
        };
        out[2] = self.codec as u8;
        out[4..6].copy_from_slice(&self.lane.0.to_be_bytes());
        out[8..12].copy_from_slice(&self.version.0.to_be_bytes());
        out[12..16].copy_from_slice(&self.stream_len.to_be_bytes());
        out[16..20].copy_from_slice(&self.raw_len.to_be_bytes());
        out[20..24].copy_from_slice(&self.wire_len.to_be_bytes());
        out[24..32].copy_from_slice(&self.seq.0.to_be_bytes());
        out[32..40].copy_from_slice(&self.offset.0.to_be_bytes());
        out[40..72].copy_from_slice(&self.digest);
        out[72..104].copy_from_slice(&self.prev);
        out
    }

    /// Parses a header and holds every length in it against its limit. Nothing in it is to be believed before
    /// [`Verifier::header`] has accepted it.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Result<Self, ChunkError> {
        let u16_at = |i: usize| u16::from_be_bytes([bytes[i], bytes[i + 1]]);
        let u32_at = |i: usize| u32::from_be_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) << 32 | u64::from(u32_at(i + 4));
        let array_at = |i: usize| -> [u8; 32] { std::array::from_fn(|k| bytes[i + k]) };
        if bytes[0] != FORMAT || bytes[3] != 0 || u16_at(6) != 0 {
            return Err(ChunkError::Format);
        }
        let kind = match bytes[1] {
            0 => Kind::Data,
            1 => Kind::End,
            _ => return Err(ChunkError::Format),
        };
        let header = ChunkHeader {
            kind,
            codec: Codec::from_wire(bytes[2]).ok_or(ChunkError::UnknownCodec(bytes[2]))?,
            lane: Lane(u16_at(4)),
            version: PageVersion(u32_at(8)),
            stream_len: u32_at(12),
            raw_len: u32_at(16),
            wire_len: u32_at(20),
            seq: Seq(u64_at(24)),
            offset: StreamOffset(u64_at(32)),
            digest: array_at(40),
            prev: array_at(72),
        };
        header.check_lengths()?;
        Ok(header)
    }

    fn check_lengths(&self) -> Result<(), ChunkError> {
        let bad = |what| Err(ChunkError::Length { seq: self.seq.0, what });
        match self.kind {
            Kind::End if self.stream_len != 0 || self.raw_len != 0 || self.wire_len != 0 => {
                bad("the length of an end")
            }
            Kind::End => Ok(()),
            Kind::Data if self.stream_len == 0 || self.stream_len as usize > MAX_SEGMENT_BYTES => {
                bad("the stream length")
            }
            Kind::Data if self.raw_len == 0 || self.raw_len as usize > MAX_RAW_PAYLOAD => {
                bad("the raw length")
            }
            Kind::Data if self.wire_len == 0 || self.wire_len as usize > MAX_WIRE_PAYLOAD => {
                bad("the wire length")
            }
            Kind::Data if self.codec == Codec::Raw && self.raw_len != self.wire_len => bad("the raw length"),
            Kind::Data if self.offset.checked_add(u64::from(self.stream_len)).is_none() => bad("the offset"),
            Kind::Data => Ok(()),
        }
    }

    /// The offset in the VMM's stream just past this chunk.
    pub fn end(&self) -> StreamOffset {
        StreamOffset(self.offset.0.saturating_add(u64::from(self.stream_len)))
    }

    /// What the chunk takes of a memory bound, in bytes: its largest form. Both sides count by it.
    pub fn weight(&self) -> u64 {
        u64::from(self.stream_len.max(self.raw_len).max(self.wire_len))
    }

    /// What the next header carries as `prev`; of an end, the session's root.
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.to_bytes()).as_bytes()
    }
}

fn signed_message(session: &SessionId, header: &[u8; HEADER_LEN]) -> [u8; CONTEXT.len() + 32 + HEADER_LEN] {
    let mut message = [0u8; CONTEXT.len() + 32 + HEADER_LEN];
    message[..CONTEXT.len()].copy_from_slice(CONTEXT);
    message[CONTEXT.len()..CONTEXT.len() + 32].copy_from_slice(&session.0);
    message[CONTEXT.len() + 32..].copy_from_slice(header);
    message
}

/// A payload in two parts that travel one behind the other: what an encoder has written, and bytes that it did not have to copy.
/// Either may be empty.
#[derive(Debug, Clone, Default)]
pub struct Payload {
    head: Bytes,
    body: Bytes,
}

impl Payload {
    /// `body` behind `head`.
    pub fn new(head: Bytes, body: Bytes) -> Self {
        Payload { head, body }
    }

    /// Both parts, in order.
    pub fn parts(&self) -> [&Bytes; 2] {
        [&self.head, &self.body]
    }

    /// Bytes of both.
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for part in self.parts() {
            hasher.update(part);
        }
        *hasher.finalize().as_bytes()
    }
}

impl From<Bytes> for Payload {
    fn from(body: Bytes) -> Self {
        Payload { head: Bytes::new(), body }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(body: Vec<u8>) -> Self {
        Bytes::from(body).into()
    }
}

/// An encoded payload with its hash, before it has a place in the session.
#[derive(Debug, Clone)]
pub struct EncodedChunk {
    codec: Codec,
    lane: Lane,
    version: PageVersion,
    offset: StreamOffset,
    stream_len: u32,
    raw_len: u32,
    payload: Payload,
    digest: [u8; 32],
}

impl EncodedChunk {
    /// Hashes `payload`, which encodes `stream_len` bytes of the VMM's stream from `offset`.
    pub fn new(
        codec: Codec,
        lane: Lane,
        version: PageVersion,
        offset: StreamOffset,
        stream_len: u32,
        raw_len: u32,
        payload: impl Into<Payload>,
    ) -> Self {
        let payload = payload.into();
        let digest = payload.digest();
        EncodedChunk { codec, lane, version, offset, stream_len, raw_len, payload, digest }
    }
}

/// Gives chunks their place in the session and signs them.
#[derive(Debug)]
pub struct Sealer {
    session: SessionId,
    next: Seq,
    prev: [u8; 32],
    end: StreamOffset,
}

impl Sealer {
    /// The sealer of a session's first leg.
    pub fn new(session: SessionId) -> Self {
        Self::from(session, StreamOffset(0))
    }

    /// The sealer of a leg that begins at `offset` of the VMM's stream.
    pub fn from(leg: SessionId, offset: StreamOffset) -> Self {
        Sealer { session: leg, next: Seq(0), prev: leg.0, end: offset }
    }

    /// Seals the next chunk of the stream.
    pub fn seal(&mut self, key: &NodeKey, chunk: EncodedChunk) -> SealedChunk {
        let header = ChunkHeader {
            kind: Kind::Data,
            codec: chunk.codec,
            lane: chunk.lane,
            version: chunk.version,
            stream_len: chunk.stream_len,
            raw_len: chunk.raw_len,
            wire_len: chunk.payload.len() as u32,
            seq: self.next,
            offset: chunk.offset,
            digest: chunk.digest,
            prev: self.prev,
        };
        self.finish(key, header, chunk.payload)
    }

    /// Seals the end of the stream; its header's hash is the session's root.
    pub fn seal_end(&mut self, key: &NodeKey) -> SealedChunk {
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
            digest: *blake3::hash(&[]).as_bytes(),
            prev: self.prev,
        };
        self.finish(key, header, Payload::default())
    }

    fn finish(&mut self, key: &NodeKey, header: ChunkHeader, payload: Payload) -> SealedChunk {
        let bytes = header.to_bytes();
        let signature = key.sign(&signed_message(&self.session, &bytes));
        self.next = header.seq.next();
        self.prev = header.hash();
        self.end = header.end();
        let mut signed = [0u8; SIGNED_HEADER_LEN];
        signed[..HEADER_LEN].copy_from_slice(&bytes);
        signed[HEADER_LEN..].copy_from_slice(&signature);
        SealedChunk { header, signed, payload }
    }
}

/// A chunk ready for the network. Sent again, it is the same bytes.
#[derive(Debug, Clone)]
pub struct SealedChunk {
    header: ChunkHeader,
    signed: [u8; SIGNED_HEADER_LEN],
    payload: Payload,
}

impl SealedChunk {
    /// Its header.
    pub fn header(&self) -> &ChunkHeader {
        &self.header
    }

    /// Header and signature as they go on the wire.
    pub fn signed_header(&self) -> &[u8; SIGNED_HEADER_LEN] {
        &self.signed
    }

    /// The payload as it goes on the wire, part by part.
    pub fn parts(&self) -> [&Bytes; 2] {
        self.payload.parts()
    }

    /// The payload in one piece; copied if it has two parts.
    pub fn payload(&self) -> Bytes {
        match self.parts() {
            [head, body] if head.is_empty() => body.clone(),
            parts => parts.map(|part| &part[..]).concat().into(),
        }
    }

    /// Bytes on the wire, without the frame around them.
    pub fn wire_len(&self) -> u64 {
        (SIGNED_HEADER_LEN + self.payload.len()) as u64
    }
}

/// Checks what comes from the session's source.
#[derive(Debug, Clone)]
pub struct Verifier {
    session: SessionId,
    source: PeerKey,
}

impl Verifier {
    /// The verifier of a session whose chunks `source` signs.
    pub fn new(session: SessionId, source: PeerKey) -> Self {
        Verifier { session, source }
    }

    /// Parses and verifies a header. Done before memory is taken for the payload: from here on the header's numbers
    /// are the peer's own word.
    pub fn header(&self, signed: &[u8; SIGNED_HEADER_LEN]) -> Result<SignedHeader, ChunkError> {
        let (mut bytes, mut signature) = ([0u8; HEADER_LEN], [0u8; 64]);
        bytes.copy_from_slice(&signed[..HEADER_LEN]);
        signature.copy_from_slice(&signed[HEADER_LEN..]);
        let header = ChunkHeader::parse(&bytes)?;
        let signed = self.source.verify(&signed_message(&self.session, &bytes), &signature);
        if !signed && !Mechanism::ChunkSignature.is_off() {
            return Err(ChunkError::Signature(header.seq.0));
        }
        Ok(SignedHeader(header))
    }
}

/// A header that the session's source signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedHeader(ChunkHeader);

impl SignedHeader {
    /// The header.
    pub fn header(&self) -> &ChunkHeader {
        &self.0
    }

    /// Holds a payload against the header's digest.
    pub fn payload(self, payload: Bytes) -> Result<VerifiedChunk, ChunkError> {
        let whole = payload.len() as u64 == u64::from(self.0.wire_len)
            && blake3::hash(&payload).as_bytes() == &self.0.digest;
        if !whole && !Mechanism::PayloadDigest.is_off() {
            return Err(ChunkError::Digest(self.0.seq.0));
        }
        Ok(VerifiedChunk { header: self.0, payload })
    }
}

/// A chunk whose payload is what the session's source signed.
#[derive(Debug, Clone)]
pub struct VerifiedChunk {
    header: ChunkHeader,
    payload: Bytes,
}

impl VerifiedChunk {
    /// Its header.
    pub fn header(&self) -> &ChunkHeader {
        &self.header
    }

    /// Its payload, fit to be decoded.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::NodeName;

    fn key(n: u8) -> NodeKey {
        NodeKey::from_seed(NodeName::new(format!("n{n}")).unwrap(), &[n; 32])
    }

    fn chunk(offset: u64, payload: &'static [u8]) -> EncodedChunk {
        let len = payload.len() as u32;
        EncodedChunk::new(
            Codec::Raw,
            Lane(0),
            PageVersion(1),
            StreamOffset(offset),
            len,
            len,
            Bytes::from_static(payload),
        )
    }

    fn sealed() -> (Verifier, SealedChunk) {
        let session = SessionId([9; 32]);
        (Verifier::new(session, key(1).public()), Sealer::new(session).seal(&key(1), chunk(0, b"payload")))
    }

    #[test]
    fn what_was_sealed_verifies() {
        let (verifier, sealed) = sealed();
        let verified = verifier.header(sealed.signed_header()).unwrap().payload(sealed.payload()).unwrap();
        assert_eq!(verified.header(), sealed.header());
        assert_eq!(&verified.payload()[..], b"payload");
    }

    #[test]
    fn a_payload_in_two_parts_is_the_same_chunk() {
        let seal = |payload: Payload| {
            let chunk =
                EncodedChunk::new(Codec::Raw, Lane(0), PageVersion(1), StreamOffset(0), 7, 7, payload);
            Sealer::new(SessionId([9; 32])).seal(&key(1), chunk)
        };
        let two = seal(Payload::new(Bytes::from_static(b"pay"), Bytes::from_static(b"load")));
        assert_eq!(two.signed_header(), sealed().1.signed_header());
        assert_eq!((two.payload(), two.wire_len()), (Bytes::from_static(b"payload"), sealed().1.wire_len()));
    }

    #[test]
    fn header_flip_no_bit_of_a_header_can_change() {
        let (verifier, sealed) = sealed();
        for bit in 0..SIGNED_HEADER_LEN * 8 {
            let mut bad = *sealed.signed_header();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(verifier.header(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn payload_flip_no_bit_of_a_payload_can_change() {
        let (verifier, sealed) = sealed();
        let header = verifier.header(sealed.signed_header()).unwrap();
        for bit in 0..sealed.payload().len() * 8 {
            let mut bad = sealed.payload().to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(header.clone().payload(bad.into()).unwrap_err(), ChunkError::Digest(0));
        }
        assert!(header.payload(sealed.payload().slice(1..)).is_err());
    }

    #[test]
    fn another_key_or_session_is_refused() {
        let (_, sealed) = sealed();
        let wrong_signer = Verifier::new(SessionId([9; 32]), key(2).public());
        assert_eq!(wrong_signer.header(sealed.signed_header()), Err(ChunkError::Signature(0)));
        let replay_session = Verifier::new(SessionId([8; 32]), key(1).public());
        assert_eq!(replay_session.header(sealed.signed_header()), Err(ChunkError::Signature(0)));
    }

    #[test]
    fn headers_chain_to_the_root() {
        let session = SessionId([9; 32]);
        let mut sealer = Sealer::new(session);
        let first = sealer.seal(&key(1), chunk(0, b"one"));
        let second = sealer.seal(&key(1), chunk(3, b"two"));
        let end = sealer.seal_end(&key(1));
        assert_eq!(first.header().prev, session.0);
        assert_eq!(second.header().prev, first.header().hash());
        assert_eq!(end.header().prev, second.header().hash());
        assert_eq!(end.header().offset, StreamOffset(6));
    }

    #[test]
    fn len_overflow_lengths_meet_their_limits() {
        let (_, sealed) = sealed();
        let good = sealed.header().clone();
        let cases: [fn(&mut ChunkHeader); 6] = [
            |h| h.stream_len = u32::MAX,
            |h| h.raw_len = MAX_RAW_PAYLOAD as u32 + 1,
            |h| h.wire_len = u32::MAX,
            |h| h.wire_len = 0,
            |h| h.raw_len = 1,
            |h| h.offset = StreamOffset(u64::MAX),
        ];
        for (i, spoil) in cases.iter().enumerate() {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(
                matches!(ChunkHeader::parse(&bad.to_bytes()), Err(ChunkError::Length { .. })),
                "case {i}"
            );
        }
    }
}
