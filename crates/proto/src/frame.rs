//! Frames: how messages and chunks follow each other on a connection.
//!
//! ```text
//! +--------+-----+----------+---------------+----------------
//! | "D3"   | tag | reserved | length u32 BE | body
//! +--------+-----+----------+---------------+----------------
//!   2 bytes  1      1          4
//! ```
//!
//! A frame of tag *message* holds one [`Message`](crate::message::Message). A frame of tag *chunk* holds a signed header; the payload
//! follows with the length that the header gives. A plain TCP connection begins with [`PLAIN_PREAMBLE`], which no TLS
//! record can begin with.
//!
//! After the handshake of a v1 data connection there are no frames: the VMM's bytes follow as they are.

use crate::chunk::SIGNED_HEADER_LEN;

/// The first bytes of a plain TCP connection.
pub const PLAIN_PREAMBLE: [u8; 8] = *b"DWCPv3\0\0";

/// Bytes of a frame's head.
pub const HEAD_LEN: usize = 8;

const MAGIC: [u8; 2] = *b"D3";

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// A message.
    Message,
    /// A chunk.
    Chunk,
}

/// A frame's head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What follows.
    pub tag: Tag,
    /// Bytes of the body, a chunk's payload not counted.
    pub len: u32,
}

/// Why a frame's head was refused: the peer does not speak this protocol, or broke it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The magic is not there.
    #[error("the peer sent something that is not DWCP v3")]
    Magic,
    /// The tag is unknown.
    #[error("frame with unknown tag {0}")]
    Tag(u8),
    /// The body is longer than its kind may be here.
    #[error("frame of {len} bytes where {max} are allowed")]
    TooLong {
        /// The announced length.
        len: u32,
        /// The limit in force.
        max: usize,
    },
}

impl Head {
    /// The head of a chunk's frame.
    pub const CHUNK: Head = Head { tag: Tag::Chunk, len: SIGNED_HEADER_LEN as u32 };

    /// Its bytes.
    pub fn to_bytes(self) -> [u8; HEAD_LEN] {
        let tag = match self.tag {
            Tag::Message => 1,
            Tag::Chunk => 2,
        };
        let len = self.len.to_be_bytes();
        [MAGIC[0], MAGIC[1], tag, 0, len[0], len[1], len[2], len[3]]
    }

    /// Parses a head; a message may be `max_message` bytes long.
    pub fn parse(bytes: [u8; HEAD_LEN], max_message: usize) -> Result<Self, FrameError> {
        if bytes[..2] != MAGIC || bytes[3] != 0 {
            return Err(FrameError::Magic);
        }
        let len = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let (tag, max, exact) = match bytes[2] {
            1 => (Tag::Message, max_message, false),
            2 => (Tag::Chunk, SIGNED_HEADER_LEN, true),
            tag => return Err(FrameError::Tag(tag)),
        };
        if len as usize > max || (exact && len as usize != max) {
            return Err(FrameError::TooLong { len, max });
        }
        Ok(Head { tag, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_round_trip_and_lengths_are_limited() {
        let head = Head { tag: Tag::Message, len: 100 };
        assert_eq!(Head::parse(head.to_bytes(), 100), Ok(head));
        assert_eq!(Head::parse(head.to_bytes(), 99), Err(FrameError::TooLong { len: 100, max: 99 }));
        assert_eq!(Head::parse(Head::CHUNK.to_bytes(), 0), Ok(Head::CHUNK));
        assert_eq!(Head::parse(*b"GET / HT", 100), Err(FrameError::Magic));
        assert_eq!(Head::parse([b'D', b'3', 9, 0, 0, 0, 0, 0], 100), Err(FrameError::Tag(9)));
    }
}
