//! Messages: everything between two agents that is not a chunk.
//!
//! # Sequence
//! ```text
//! source                                             destination
//!   | ------------ control connection (TLS) ------------> |
//!   | Hello: who, which VM, offer, layout                 |
//!   |                     Welcome: offer, layout          |  or Refused
//!   | Confirm: choice, signature                          |
//!   |                     Confirmed: signature            |  both now hold the session id
//!   | ------- data connections (TLS, QUIC or plain) ----> |
//!   |                     Challenge                       |  first on every plain connection
//!   | Join: session, purpose, signature                   |
//!   |                     Joined: where to go on          |  or Refused
//!   | chunks (v3), or the VMM's bytes as they are (v1)    |
//!   |              Ack        (on the control connection) |
//!   | Switch, at any moment: see `leg`                    |
//!   |                     Switched: from where on         |
//!   |                     Veto: v3 is not wanted any more |
//!   | StreamEnd (v1), or a chunk of kind end (v3)         |
//!   |              Signed(Receipt)                        |
//!   | Signed(Commit)                                      |
//!   |              Signed(Running)                        |
//! ```
//! Beside all that either node may `Ask` the other what it knows of a migration, and is `Told`; and before a migration the source may
//! `Probe` the link on connections of their own: bytes without meaning up to the end of its direction, after which it is told what
//! came of them (`Probed`).
//!
//! A control connection that was lost is made again with a `Join` of its own; whoever came back first repeats what
//! the other may have missed. Messages are Protocol Buffers, so that a newer minor may add fields that an older one skips.

use prost::{Message as _, Oneof};

/// The minor version of this protocol that is spoken here; the lower of both sides' is used.
pub const MINOR: u32 = 0;

/// One message.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Message {
    /// What it says; a body unknown here (a newer peer's) decodes as `None`.
    #[prost(
        oneof = "Body",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 30, 31"
    )]
    pub body: Option<Body>,
}

/// The kinds of messages.
#[derive(Clone, PartialEq, Oneof)]
pub enum Body {
    /// Opens a session.
    #[prost(message, tag = "1")]
    Hello(Hello),
    /// Answers `Hello`.
    #[prost(message, tag = "2")]
    Welcome(Welcome),
    /// Ends a handshake or a session with a reason.
    #[prost(message, tag = "3")]
    Refused(Refused),
    /// Fixes the choice and so the session.
    #[prost(message, tag = "4")]
    Confirm(Confirm),
    /// Agrees.
    #[prost(message, tag = "5")]
    Confirmed(Confirmed),
    /// What the joining side must sign on a connection without TLS.
    #[prost(message, tag = "6")]
    Challenge(Challenge),
    /// Adds a connection to a session.
    #[prost(message, tag = "7")]
    Join(Join),
    /// Accepts a join.
    #[prost(message, tag = "8")]
    Joined(Joined),
    /// What was applied.
    #[prost(message, tag = "9")]
    Ack(Ack),
    /// The v1 stream is complete.
    #[prost(message, tag = "11")]
    StreamEnd(StreamEnd),
    /// A message of the handover.
    #[prost(message, tag = "12")]
    Signed(Signed),
    /// Asks for a sign of life.
    #[prost(message, tag = "13")]
    Ping(Ping),
    /// Gives it.
    #[prost(message, tag = "14")]
    Pong(Ping),
    /// The data goes on as a new leg.
    #[prost(message, tag = "15")]
    Switch(Switch),
    /// From where on.
    #[prost(message, tag = "16")]
    Switched(Switched),
    /// Whether the destination wants v3 at all.
    #[prost(message, tag = "17")]
    Veto(Veto),
    /// Asks, outside of any session, what the other side knows of a migration.
    #[prost(message, tag = "18")]
    Ask(Ask),
    /// Answers `Ask`.
    #[prost(message, tag = "19")]
    Told(Told),
    /// The destination came back without what it knew of the present leg.
    #[prost(message, tag = "20")]
    Restarted(Restarted),
    /// Announces a burst by which the link is measured.
    #[prost(message, tag = "30")]
    Probe(Probe),
    /// What came of it.
    #[prost(message, tag = "31")]
    Probed(Probed),
}

/// What one side can and may do. Numbers are the wire's; `negotiate` reads them.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Offer {
    /// Lowest and highest minor of v3 spoken.
    #[prost(uint32, tag = "1")]
    pub minor_min: u32,
    /// Highest minor of v3 spoken.
    #[prost(uint32, tag = "2")]
    pub minor_max: u32,
    /// v1 is allowed by policy: 0 never, 1 on datacenter links, 2 anywhere.
    #[prost(uint32, tag = "3")]
    pub v1: u32,
    /// v1 may run on plain TCP on datacenter links.
    #[prost(bool, tag = "4")]
    pub v1_plain: bool,
    /// v3 is allowed by the flag.
    #[prost(bool, tag = "5")]
    pub v3: bool,
    /// Why it is or is not, as the flag words it.
    #[prost(string, tag = "6")]
    pub v3_reason: String,
    /// v3 may run on plain TCP on datacenter links.
    #[prost(bool, tag = "7")]
    pub v3_plain: bool,
    /// Codecs known, a bit each (bit n is wire number n).
    #[prost(uint32, tag = "8")]
    pub codecs: u32,
    /// Version of the payload encoding (HDE) known.
    #[prost(uint32, tag = "9")]
    pub hde: u32,
    /// Most data connections taken.
    #[prost(uint32, tag = "10")]
    pub streams: u32,
    /// Bytes that may be in flight towards this side, before and after compression alike.
    #[prost(uint64, tag = "11")]
    pub window: u64,
    /// The flag document's epoch, incarnation and counter.
    #[prost(uint64, tag = "12")]
    pub epoch_incarnation: u64,
    /// The flag document's epoch, counter.
    #[prost(uint64, tag = "13")]
    pub epoch_counter: u64,
    /// As a destination: the RAM blocks whose pages can be written straight into the guest's RAM, and read there.
    #[prost(bytes = "vec", repeated, tag = "20")]
    pub mapped: Vec<Vec<u8>>,
    /// As a destination: why there are none, in words.
    #[prost(string, tag = "21")]
    pub unmapped: String,
    /// As a destination: pages that it would keep for reference where no block is mapped.
    #[prost(uint32, tag = "22")]
    pub cache_pages: u32,
    /// Data connections over QUIC can be made (source) and taken (destination).
    #[prost(bool, tag = "40")]
    pub quic: bool,
    /// Bytes of window that a lane may have here: compressed (source) and decompressed (destination); 0 for no lanes.
    #[prost(uint64, tag = "50")]
    pub lane_window: u64,
}

/// Opens a session. The destination holds the node names against the TLS identities.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// The source node.
    #[prost(string, tag = "1")]
    pub source: String,
    /// The destination node that is meant.
    #[prost(string, tag = "2")]
    pub destination: String,
    /// The VM.
    #[prost(string, tag = "3")]
    pub vm: String,
    /// The migration.
    #[prost(string, tag = "4")]
    pub migration: String,
    /// Random, 32 bytes.
    #[prost(bytes = "vec", tag = "5")]
    pub nonce: Vec<u8>,
    /// What the source can do.
    #[prost(message, optional, tag = "6")]
    pub offer: Option<Offer>,
    /// The source VM as its VMM describes it (machine, CPUs, RAM blocks): JSON of `dwcp-vmm`.
    #[prost(bytes = "vec", tag = "7")]
    pub description: Vec<u8>,
    /// Only ask; nothing is prepared at the destination.
    #[prost(bool, tag = "8")]
    pub check: bool,
    /// The port of the source's own data address, where it answers `Ask`; 0 where it does not say.
    #[prost(uint32, tag = "9")]
    pub listens: u32,
    /// Which attempt at this migration, counted from 1; 0 is the first, too.
    #[prost(uint32, tag = "10")]
    pub attempt: u32,
}

/// Answers `Hello`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Welcome {
    /// Random, 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub nonce: Vec<u8>,
    /// What the destination can do.
    #[prost(message, optional, tag = "2")]
    pub offer: Option<Offer>,
    /// The waiting VM as its VMM describes it.
    #[prost(bytes = "vec", tag = "3")]
    pub description: Vec<u8>,
}

/// Ends a handshake or a session.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Refused {
    /// Stable code, snake_case.
    #[prost(string, tag = "1")]
    pub code: String,
    /// One sentence for the operator.
    #[prost(string, tag = "2")]
    pub message: String,
    /// What to do.
    #[prost(string, tag = "3")]
    pub hint: String,
}

/// What both sides will do.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Choice {
    /// Path: 1 or 3.
    #[prost(uint32, tag = "1")]
    pub path: u32,
    /// Mode of v3: 0 internet, 1 datacenter. On v1 it says how the link counts.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    /// Data connections are plain TCP.
    #[prost(bool, tag = "3")]
    pub plain: bool,
    /// Number of data connections.
    #[prost(uint32, tag = "4")]
    pub streams: u32,
    /// Minor of the protocol.
    #[prost(uint32, tag = "5")]
    pub minor: u32,
    /// Version of the payload encoding.
    #[prost(uint32, tag = "6")]
    pub hde: u32,
    /// Bytes that may be in flight.
    #[prost(uint64, tag = "7")]
    pub window: u64,
    /// Why something simpler than wished for was chosen.
    #[prost(string, repeated, tag = "8")]
    pub reasons: Vec<String>,
    /// The guest was running when the migration began, and shall run after it.
    #[prost(bool, tag = "9")]
    pub guest_runs: bool,
    /// Chunks may refer to pages of the blocks that the destination has mapped.
    #[prost(bool, tag = "20")]
    pub mapped: bool,
    /// Chunks may refer to pages in a cache of so many; 0 for none.
    #[prost(uint32, tag = "21")]
    pub cache_pages: u32,
    /// Why this mode, in words.
    #[prost(string, tag = "30")]
    pub mode_reason: String,
    /// Data connections are QUIC's; where UDP does not get through they may be TLS over TCP all the same.
    #[prost(bool, tag = "40")]
    pub quic: bool,
    /// Why QUIC or TCP, in words. Only to a destination that offers QUIC: an older one, which does not know the field, would drop it, and the
    /// two sides would sign different choices.
    #[prost(string, tag = "41")]
    pub transport_reason: String,
    /// Bytes of the lane's window, a power of two; 0 for no lane.
    #[prost(uint64, tag = "50")]
    pub lane_window: u64,
}

/// Fixes the choice.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Confirm {
    /// The choice.
    #[prost(message, optional, tag = "1")]
    pub choice: Option<Choice>,
    /// The source's signature over the session id.
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

/// Agrees to the choice.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Confirmed {
    /// The destination's signature over the session id.
    #[prost(bytes = "vec", tag = "1")]
    pub signature: Vec<u8>,
}

/// What the joining side must sign where no TLS binds the connection.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Challenge {
    /// Random, 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub nonce: Vec<u8>,
}

/// What a joining connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Purpose {
    /// Messages.
    Control = 0,
    /// Chunks.
    Chunks = 1,
    /// The VMM's bytes as they are.
    Bytes = 2,
}

/// Adds a connection to a session.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Join {
    /// The session id, 32 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub session: Vec<u8>,
    /// What for.
    #[prost(enumeration = "Purpose", tag = "2")]
    pub purpose: i32,
    /// Which data connection of the session.
    #[prost(uint32, tag = "3")]
    pub link: u32,
    /// The source's signature: see `session::join_message`.
    #[prost(bytes = "vec", tag = "4")]
    pub signature: Vec<u8>,
    /// Which leg's data; 0 for the control connection.
    #[prost(uint32, tag = "5")]
    pub leg: u32,
}

/// Accepts a join.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Joined {
    /// The next chunk that the destination has not applied.
    #[prost(uint64, tag = "1")]
    pub next: u64,
    /// The offset in the VMM's stream up to which it has applied everything.
    #[prost(uint64, tag = "2")]
    pub applied: u64,
    /// The destination's signature: see `session::joined_message`.
    #[prost(bytes = "vec", tag = "3")]
    pub signature: Vec<u8>,
}

/// What was verified and applied, and what was refused: the receiver's whole state towards the sender. A later one replaces an
/// earlier one, so it may be said again at any time, and must be on each new connection.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ack {
    /// The next chunk that was not; all before it were.
    #[prost(uint64, tag = "1")]
    pub next: u64,
    /// The offset in the VMM's stream up to which all was applied.
    #[prost(uint64, tag = "2")]
    pub applied: u64,
    /// Chunks that are wanted again.
    #[prost(message, repeated, tag = "3")]
    pub refused: Vec<Refusal>,
    /// The leg that it speaks of.
    #[prost(uint32, tag = "4")]
    pub leg: u32,
    /// The data connections on which nothing came for some seconds, while the next chunk or byte was waited for. If that was sent on one
    /// of them, it has stalled, though it may not look so from either end. Said again for as long as it is so.
    #[prost(uint32, repeated, tag = "5")]
    pub silent: Vec<u32>,
    /// Bytes on the wire of chunks that have arrived and wait for an earlier one: they are on their way no more.
    #[prost(uint64, tag = "6")]
    pub held: u64,
}

/// A chunk is wanted again: its payload did not match its digest.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Refusal {
    /// Which chunk.
    #[prost(uint64, tag = "1")]
    pub seq: u64,
    /// How often it was refused so far.
    #[prost(uint32, tag = "2")]
    pub times: u32,
}

/// The v1 stream is complete.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct StreamEnd {
    /// Its length in bytes, from the stream's very beginning.
    #[prost(uint64, tag = "1")]
    pub length: u64,
    /// The leg that it ends on.
    #[prost(uint32, tag = "2")]
    pub leg: u32,
}

/// A message of the handover with its author's signature.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Signed {
    /// The message, encoded.
    #[prost(bytes = "vec", tag = "1")]
    pub body: Vec<u8>,
    /// The signature: see `session::handover_message`.
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

/// The data goes on as a new leg: on another path, or on the same one from what the destination really holds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Switch {
    /// The new leg's number: the present one's, plus 1.
    #[prost(uint32, tag = "1")]
    pub leg: u32,
    /// What holds from there on.
    #[prost(message, optional, tag = "2")]
    pub choice: Option<Choice>,
    /// Why, by the code of `path::Cause`.
    #[prost(string, tag = "3")]
    pub cause: String,
    /// Why, in words.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// The source's signature: see `session::switch_message`.
    #[prost(bytes = "vec", tag = "5")]
    pub signature: Vec<u8>,
}

/// The destination has stopped applying the leg before, and says from where on the new one goes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Switched {
    /// The new leg's number.
    #[prost(uint32, tag = "1")]
    pub leg: u32,
    /// The offset in the VMM's stream up to which all was applied.
    #[prost(uint64, tag = "2")]
    pub applied: u64,
    /// The digest of what the leg before carried, 32 bytes; empty if it is not known, after a restart.
    #[prost(bytes = "vec", tag = "3")]
    pub carried: Vec<u8>,
    /// The destination's signature: see `session::switched_message`.
    #[prost(bytes = "vec", tag = "4")]
    pub signature: Vec<u8>,
}

/// Whether the destination wants v3 at all. State: a later one replaces an earlier one, and each new connection begins with it
/// where there is a veto.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Veto {
    /// Why v3 must not be used; empty if it may.
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Asks what the other side knows of a migration, on a TLS connection of its own. Only the two nodes of a migration tell each
/// other.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ask {
    /// The migration.
    #[prost(string, tag = "1")]
    pub migration: String,
}

/// The other side's story, for people; or `Refused` with `unknown_migration`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Told {
    /// JSON of the agent's own: the reader takes what it understands.
    #[prost(bytes = "vec", tag = "1")]
    pub story: Vec<u8>,
}

/// The destination's agent was restarted, and its VMM still takes the stream: it asks for a new leg, whose `Switched` will say what the
/// VMM was given. Said on each control connection until the leg begins.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Restarted {}

/// Announces bytes without meaning, which end with the sender's direction of the connection.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Probe {}

/// What came of a probe. Rates are bytes a second.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Probed {
    /// Bytes that came.
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
    /// Microseconds from the first to the last of them.
    #[prost(uint64, tag = "2")]
    pub micros: u64,
    /// The rate over the second half of that time.
    #[prost(uint64, tag = "3")]
    pub steady: u64,
    /// The highest rate over any 2 MiB.
    #[prost(uint64, tag = "4")]
    pub best: u64,
}

/// A sign of life.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Ping {
    /// Returned as it came.
    #[prost(uint64, tag = "1")]
    pub token: u64,
}

impl Message {
    /// Its bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// Parses a message, whose length a frame's limit has bounded.
    pub fn parse(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        Self::decode(bytes)
    }
}

impl From<Body> for Message {
    fn from(body: Body) -> Self {
        Message { body: Some(body) }
    }
}

impl Body {
    /// Its kind, for errors and logs.
    pub fn kind(&self) -> &'static str {
        match self {
            Body::Hello(_) => "hello",
            Body::Welcome(_) => "welcome",
            Body::Refused(_) => "refused",
            Body::Confirm(_) => "confirm",
            Body::Confirmed(_) => "confirmed",
            Body::Challenge(_) => "challenge",
            Body::Join(_) => "join",
            Body::Joined(_) => "joined",
            Body::Ack(_) => "ack",
            Body::StreamEnd(_) => "stream_end",
            Body::Signed(_) => "signed",
            Body::Ping(_) => "ping",
            Body::Pong(_) => "pong",
            Body::Switch(_) => "switch",
            Body::Switched(_) => "switched",
            Body::Veto(_) => "veto",
            Body::Ask(_) => "ask",
            Body::Told(_) => "told",
            Body::Restarted(_) => "restarted",
            Body::Probe(_) => "probe",
            Body::Probed(_) => "probed",
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn fields_that_are_unknown_here_are_passed_over() {
        let ack = Ack { next: 7, applied: 9, ..Ack::default() };
        let mut newer = ack.encode_to_vec();
        // Field 2047, a number.
        newer.extend([0xf8, 0x7f, 5]);
        assert_eq!(Ack::decode(newer.as_slice()), Ok(ack));
    }
}
