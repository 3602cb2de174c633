//! The session: what its id covers, and what is signed in its name.
//!
//! The id is a hash over everything both sides said before it and over the first connection's TLS exporter secret. Whatever
//! is signed later names the id, so that nothing can be replayed into another session, spliced from one, or negotiated down
//! unseen. Each kind of signature has its own context string and its author's role, so that none can be taken for another
//! or reflected to its author.

use crate::ids::SessionId;
use prost::Message as _;

use crate::message::{Purpose, Switch, Switched};

const SESSION: &str = "dwcp 2026-11 session id v3";

/// Which side signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The guest leaves here.
    Source,
    /// The guest comes here.
    Destination,
}

/// What the session id is made of. The messages are taken as the bytes that travelled.
#[derive(Debug, Clone, Copy)]
pub struct Transcript<'a> {
    /// The TLS exporter secret of the first connection.
    pub exporter: &'a [u8; 32],
    /// The source's public key.
    pub source: &'a [u8; 32],
    /// The destination's public key.
    pub destination: &'a [u8; 32],
    /// `Hello`: node names, VM, migration id, RAM layout, the source's offer and flag epoch.
    pub hello: &'a [u8],
    /// `Welcome`: the destination's offer, layout and flag epoch.
    pub welcome: &'a [u8],
    /// The choice, encoded.
    pub choice: &'a [u8],
}

impl Transcript<'_> {
    /// The session's id.
    pub fn id(&self) -> SessionId {
        let mut hasher = blake3::Hasher::new_derive_key(SESSION);
        hasher.update(self.exporter).update(self.source).update(self.destination);
        for part in [self.hello, self.welcome, self.choice] {
            hasher.update(&(part.len() as u64).to_be_bytes()).update(part);
        }
        SessionId(*hasher.finalize().as_bytes())
    }
}

/// What `Confirm` and `Confirmed` sign.
pub fn confirm_message(side: Side, session: &SessionId) -> Vec<u8> {
    compose("confirm", side, session, &[])
}

/// What `Join` signs. `binding` is the connection's TLS exporter secret, or the challenge on a plain one: both are this connection's
/// alone, so no join can be used twice.
pub fn join_message(
    session: &SessionId,
    purpose: Purpose,
    leg: u32,
    link: u32,
    binding: &[u8; 32],
) -> Vec<u8> {
    let numbers = [&(purpose as i32).to_be_bytes()[..], &leg.to_be_bytes(), &link.to_be_bytes()].concat();
    compose("join", Side::Source, session, &[&numbers, binding])
}

/// What `Joined` signs.
pub fn joined_message(session: &SessionId, next: u64, applied: u64, binding: &[u8; 32]) -> Vec<u8> {
    let numbers = [next.to_be_bytes(), applied.to_be_bytes()].concat();
    compose("joined", Side::Destination, session, &[&numbers, binding])
}

/// What a message of the handover signs.
pub fn handover_message(side: Side, session: &SessionId, body: &[u8]) -> Vec<u8> {
    compose("handover", side, session, &[body])
}

/// What `Switch` signs: all of it but the signature.
pub fn switch_message(session: &SessionId, switch: &Switch) -> Vec<u8> {
    let unsigned = Switch { signature: Vec::new(), ..switch.clone() };
    compose("switch", Side::Source, session, &[&unsigned.encode_to_vec()])
}

/// What `Switched` signs: all of it but the signature.
pub fn switched_message(session: &SessionId, switched: &Switched) -> Vec<u8> {
    let unsigned = Switched { signature: Vec::new(), ..switched.clone() };
    compose("switched", Side::Destination, session, &[&unsigned.encode_to_vec()])
}

fn compose(kind: &str, side: Side, session: &SessionId, parts: &[&[u8]]) -> Vec<u8> {
    let side = match side {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    let mut message = format!("dwcp v3 {kind} {side}\0").into_bytes();
    message.extend_from_slice(&session.0);
    for part in parts {
        message.extend_from_slice(part);
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript() -> Transcript<'static> {
        Transcript {
            exporter: &[1; 32],
            source: &[2; 32],
            destination: &[3; 32],
            hello: b"hello",
            welcome: b"welcome",
            choice: b"choice",
        }
    }

    #[test]
    fn the_id_covers_every_part() {
        let base = transcript().id();
        let others = [
            Transcript { exporter: &[9; 32], ..transcript() },
            Transcript { source: &[9; 32], ..transcript() },
            Transcript { destination: &[9; 32], ..transcript() },
            Transcript { hello: b"hellp", ..transcript() },
            Transcript { welcome: b"welcomf", ..transcript() },
            Transcript { choice: b"choicf", ..transcript() },
            // A byte that moves from one part to the next must not go unnoticed.
            Transcript { hello: b"hellow", welcome: b"elcome", ..transcript() },
        ];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(other.id(), base, "part {i}");
        }
    }

    #[test]
    fn no_signed_message_can_stand_for_another() {
        let (id, bind) = (SessionId([5; 32]), [6; 32]);
        let messages = [
            confirm_message(Side::Source, &id),
            confirm_message(Side::Destination, &id),
            join_message(&id, Purpose::Control, 0, 0, &bind),
            join_message(&id, Purpose::Chunks, 0, 0, &bind),
            join_message(&id, Purpose::Chunks, 0, 1, &bind),
            join_message(&id, Purpose::Chunks, 1, 0, &bind),
            switch_message(&id, &Switch { leg: 1, ..Switch::default() }),
            switch_message(&id, &Switch { leg: 1, reason: "x".into(), ..Switch::default() }),
            switched_message(&id, &Switched { leg: 1, ..Switched::default() }),
            switched_message(&id, &Switched { leg: 1, applied: 1, ..Switched::default() }),
            joined_message(&id, 0, 0, &bind),
            handover_message(Side::Source, &id, b"x"),
            handover_message(Side::Destination, &id, b"x"),
        ];
        for (i, a) in messages.iter().enumerate() {
            for b in &messages[i + 1..] {
                assert_ne!(a, b);
            }
        }
    }
}
