//! Legs: the stretches of a session's data, each on one path.
//!
//! A session's data begins on the path that was negotiated. When the path changes, or the destination comes back without what it
//! knew, the next leg begins at an exact offset of the VMM's stream:
//!
//! ```text
//! source                                             destination
//!   | sends no more on the present leg, closes its connections
//!   | Switch: leg n+1, choice, reason                      |
//!   |                     applies nothing more, closes too |
//!   |                     Switched: leg n+1, X             |  X: all before it was applied
//!   | joins connections of leg n+1, goes on from X         |
//! ```
//! It needs no draining and works during a cut: `Switch` is said again on each control connection until it is answered. Both messages
//! are signed and name the session, so that nobody in between can force a path.
//!
//! Each leg has an id of its own, which stands in for the session's id in all that its data is bound to: chunks of one leg are worth
//! nothing in another. The id covers where the leg begins, and what both sides hold to have been carried on the leg before.

use crate::ids::{SessionId, StreamOffset};
use crate::message::Choice;
use crate::negotiate::{Mode, Path};

const LEG: &str = "dwcp 2026-11 leg id v3";
const LEG_ANEW: &str = "dwcp 2026-11 leg id v3 anew";
const BYTES: &str = "dwcp 2026-11 leg bytes v3";

/// One stretch of a session's data.
#[derive(Debug, Clone, PartialEq)]
pub struct Leg {
    /// Its number; the first is 0.
    pub number: u32,
    /// Stands for the session in everything that this leg's data is bound to.
    pub id: SessionId,
    /// The path.
    pub path: Path,
    /// The mode of v3; on v1 how the link counts.
    pub mode: Mode,
    /// What was agreed on.
    pub choice: Choice,
    /// Where it begins in the VMM's stream.
    pub from: StreamOffset,
}

impl Leg {
    /// The first leg of a session; `None` if the choice names no known path and mode.
    pub fn first(session: SessionId, choice: Choice) -> Option<Self> {
        let (path, mode) = (Path::from_wire(choice.path)?, Mode::from_wire(choice.mode)?);
        Some(Leg { number: 0, id: session, path, mode, choice, from: StreamOffset(0) })
    }

    /// What encrypts its data connections, in one word for status and metrics.
    pub fn encryption(&self) -> &'static str {
        if self.choice.plain { "none" } else { "tls" }
    }

    /// What its data connections were to be made over, in one word for status and metrics.
    pub fn transport(&self) -> &'static str {
        if self.choice.quic { "quic" } else { "tcp" }
    }

    /// The leg after this one. `carried` is the digest of what this leg carried, as both sides know it.
    pub fn next(&self, choice: Choice, from: StreamOffset, carried: [u8; 32]) -> Option<Self> {
        let number = self.number.checked_add(1)?;
        Self::after(&self.id, LEG, number, choice, from, &carried)
    }

    /// A leg that begins anew: the destination knows no more of the leg before than what its VMM was given.
    pub fn anew(session: &SessionId, number: u32, choice: Choice, from: StreamOffset) -> Option<Self> {
        Self::after(session, LEG_ANEW, number, choice, from, &[])
    }

    fn after(
        before: &SessionId,
        context: &str,
        number: u32,
        choice: Choice,
        from: StreamOffset,
        carried: &[u8],
    ) -> Option<Self> {
        let (path, mode) = (Path::from_wire(choice.path)?, Mode::from_wire(choice.mode)?);
        let mut hash = blake3::Hasher::new_derive_key(context);
        hash.update(&before.0).update(&number.to_be_bytes()).update(&from.0.to_be_bytes()).update(carried);
        let id = SessionId(*hash.finalize().as_bytes());
        Some(Leg { number, id, path, mode, choice, from })
    }
}

/// The digest of the bytes that a v1 leg carries: kept by both sides, compared before the guest changes hands.
///
/// The first leg of a session has none. Its bytes travel inside one TLS stream, or in the clear where policy trusts the wire, and
/// hashing them would cost the plain path what it is there for. After a change of path the bytes are worth it: they come from
/// more than one place.
#[derive(Debug, Clone)]
pub struct BytesDigest {
    hash: Option<blake3::Hasher>,
    leg: SessionId,
    end: u64,
}

impl BytesDigest {
    /// The digest of a leg, before its first byte.
    pub fn new(leg: &Leg) -> Self {
        let hash = (leg.number > 0).then(|| {
            let mut hash = blake3::Hasher::new_derive_key(BYTES);
            hash.update(&leg.id.0);
            hash
        });
        BytesDigest { hash, leg: leg.id, end: leg.from.0 }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.end += bytes.len() as u64;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
    }

    /// Whether the bytes are hashed; otherwise only their number counts.
    pub fn hashes(&self) -> bool {
        self.hash.is_some()
    }

    /// What was taken so far; with the whole stream it is the transfer's root.
    pub fn root(&self) -> [u8; 32] {
        match &self.hash {
            Some(hash) => *hash.finalize().as_bytes(),
            None => {
                let mut hash = blake3::Hasher::new_derive_key("dwcp 2026-11 v1 root");
                *hash.update(&self.leg.0).update(&self.end.to_be_bytes()).finalize().as_bytes()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(path: u32) -> Leg {
        Leg::first(SessionId([7; 32]), Choice { path, streams: 1, ..Choice::default() }).unwrap()
    }

    #[test]
    fn a_legs_id_covers_its_place_and_what_was_before() {
        let leg = first(3);
        let v1 = Choice { path: 1, streams: 1, ..Choice::default() };
        let next = |from, carried| leg.next(v1.clone(), StreamOffset(from), carried).unwrap();
        let base = next(10, [1; 32]);
        assert_eq!((base.number, base.path, base.from), (1, Path::V1, StreamOffset(10)));
        assert_ne!(base.id, leg.id);
        let anew = Leg::anew(&leg.id, 1, v1.clone(), StreamOffset(10)).unwrap();
        for other in [next(11, [1; 32]), next(10, [2; 32]), anew] {
            assert_ne!(other.id, base.id);
        }
        let after = base.next(v1.clone(), StreamOffset(10), [1; 32]).unwrap();
        assert_ne!(after.id, base.id, "the number counts");
        assert!(leg.next(Choice { path: 2, ..v1 }, StreamOffset(0), [0; 32]).is_none());
    }

    #[test]
    fn the_first_leg_counts_bytes_and_later_ones_hash_them() {
        let (first, mut other) = (first(1), BytesDigest::new(&first(1)));
        let mut digest = BytesDigest::new(&first);
        digest.update(b"abc");
        other.update(b"abd");
        assert!(!digest.hashes());
        assert_eq!(digest.root(), other.root(), "as many bytes");
        other.update(b"x");
        assert_ne!(digest.root(), other.root());

        let second = first.next(first.choice.clone(), StreamOffset(3), digest.root()).unwrap();
        let (mut whole, mut parts, mut wrong) =
            (BytesDigest::new(&second), BytesDigest::new(&second), BytesDigest::new(&second));
        whole.update(b"abc");
        parts.update(b"a");
        parts.update(b"bc");
        wrong.update(b"abd");
        assert_eq!(whole.root(), parts.root());
        assert_ne!(whole.root(), wrong.root());
    }
}
