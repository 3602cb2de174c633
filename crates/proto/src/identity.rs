//! Who a node is: an Ed25519 key pair, and the text files that hold its halves.
//!
//! Key file, one line each: `dwcp-ed25519-secret NODE HEX` in `NODE.key`, `dwcp-ed25519-public NODE HEX` in `NODE.pub`;
//! HEX is the 32-byte seed or public key in lower-case hexadecimal. Lines that start with `#` are comments.

use std::fmt;

use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use zeroize::Zeroizing;

use crate::ids::NodeName;

const SECRET: &str = "dwcp-ed25519-secret";
const PUBLIC: &str = "dwcp-ed25519-public";

/// Why a key file or key was refused. Never holds key bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text is not a key file.
    #[error("expected one line \"{expected} NODE HEX\"; make a pair with `dwcpctl keygen`")]
    Format {
        /// The first word that was expected.
        expected: &'static str,
    },
    /// The node's name in the file is not a legal one.
    #[error(transparent)]
    Name(#[from] crate::ids::BadName),
    /// The bytes are no Ed25519 public key, or one of low order (which would verify forged signatures).
    #[error("not a usable Ed25519 public key")]
    Weak,
}

/// A node's secret half. Its memory is wiped on drop.
pub struct NodeKey {
    node: NodeName,
    key: SigningKey,
}

impl NodeKey {
    /// Builds the key from a 32-byte seed of a cryptographic random source.
    pub fn from_seed(node: NodeName, seed: &[u8; 32]) -> Self {
        NodeKey { node, key: SigningKey::from_bytes(seed) }
    }

    /// Parses the content of `NODE.key`.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (node, bytes) = parse_line(text, SECRET)?;
        Ok(Self::from_seed(node, &bytes))
    }

    /// The content of `NODE.key`.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{SECRET} {} {}\n", self.node, hex(self.key.as_bytes())))
    }

    /// The node's name.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The public half.
    pub fn public(&self) -> PeerKey {
        PeerKey { node: self.node.clone(), key: self.key.verifying_key() }
    }

    /// The 32-byte seed, for handing the key to a TLS library.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }

    /// Signs `message`. Callers put a context string of their own in front: see `seal`.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({})", self.node)
    }
}

/// A node's public half, as it stands in a peer's `peers/NODE.pub`.
#[derive(Clone, PartialEq, Eq)]
pub struct PeerKey {
    node: NodeName,
    key: VerifyingKey,
}

impl PeerKey {
    /// Builds the key from its 32 bytes; keys of low order are refused.
    pub fn from_bytes(node: NodeName, bytes: &[u8; 32]) -> Result<Self, KeyError> {
        let key = VerifyingKey::from_bytes(bytes).map_err(|_| KeyError::Weak)?;
        if key.is_weak() {
            return Err(KeyError::Weak);
        }
        Ok(PeerKey { node, key })
    }

    /// Parses the content of `NODE.pub`.
    pub fn parse(text: &str) -> Result<Self, KeyError> {
        let (node, bytes) = parse_line(text, PUBLIC)?;
        Self::from_bytes(node, &bytes)
    }

    /// The content of `NODE.pub`.
    pub fn to_text(&self) -> String {
        format!("{PUBLIC} {} {}\n", self.node, hex(self.key.as_bytes()))
    }

    /// The node's name.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        self.key.as_bytes()
    }

    /// Whether `signature` over `message` is this node's, by the strict rules (no malleable or low-order forms).
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        self.key.verify_strict(message, &Signature::from_bytes(signature)).is_ok()
    }

    /// A short fingerprint for logs and status: the first 16 hex digits of the key's BLAKE3 hash.
    pub fn fingerprint(&self) -> String {
        hex(&blake3::hash(self.key.as_bytes()).as_bytes()[..8])
    }
}

impl fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerKey({} {})", self.node, self.fingerprint())
    }
}

fn parse_line(text: &str, expected: &'static str) -> Result<(NodeName, Zeroizing<[u8; 32]>), KeyError> {
    let format = || KeyError::Format { expected };
    let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
    let line = lines.next().ok_or_else(format)?;
    let mut words = line.split_ascii_whitespace();
    let (kind, node, digits) = (words.next(), words.next(), words.next());
    if kind != Some(expected) || words.next().is_some() || lines.next().is_some() {
        return Err(format());
    }
    let (node, digits) = node.zip(digits).ok_or_else(format)?;
    let mut bytes = Zeroizing::new([0u8; 32]);
    unhex(digits, &mut bytes).ok_or_else(format)?;
    Ok((NodeName::new(node)?, bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(digits: &str, out: &mut [u8; 32]) -> Option<()> {
    let digits = digits.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = [pair[0], pair[1]].map(|d| char::from(d).to_digit(16));
        *byte = (high? << 4 | low?) as u8;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> NodeKey {
        NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[7; 32])
    }

    #[test]
    fn key_files_round_trip() {
        let text = key().to_text();
        assert_eq!(NodeKey::parse(&text).unwrap().public(), key().public());
        let public = format!("# made today\n{}", key().public().to_text());
        assert_eq!(PeerKey::parse(&public).unwrap(), key().public());
    }

    #[test]
    fn halves_are_not_mixed_up_and_damage_is_refused() {
        assert!(PeerKey::parse(&key().to_text()).is_err());
        assert!(NodeKey::parse(&key().public().to_text()).is_err());
        let text = key().public().to_text();
        for bad in ["", "x", &text[..40], &text.replace(' ', ""), &format!("{text}{text}")] {
            assert!(PeerKey::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_low_order_key_is_refused() {
        let mut identity = [0u8; 32];
        identity[0] = 1;
        assert_eq!(PeerKey::from_bytes(NodeName::new("x").unwrap(), &identity), Err(KeyError::Weak));
    }

    #[test]
    fn a_signature_is_bound_to_key_and_message() {
        let signature = key().sign(b"message");
        assert!(key().public().verify(b"message", &signature));
        assert!(!key().public().verify(b"massage", &signature));
        let other = NodeKey::from_seed(NodeName::new("hv-02").unwrap(), &[8; 32]);
        assert!(!other.public().verify(b"message", &signature));
    }
}
