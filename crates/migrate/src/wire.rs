//! Frames on a connection: reading and writing what `dwcp_proto::frame` describes.

use std::time::Duration;

use bytes::{Buf, Bytes};
use dwcp_link::{LinkError, Reader, Writer};
use dwcp_proto::chunk::{SIGNED_HEADER_LEN, SealedChunk};
use dwcp_proto::fault::Mechanism;
use dwcp_proto::frame::{FrameError, HEAD_LEN, Head, PLAIN_PREAMBLE, Tag};
use dwcp_proto::message::{Body, Message, Refused};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{Blame, Failure};

/// How long a peer may take over one message of the handshake.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long a source may take to choose: it looks at the link meanwhile, for [`LOOK`](crate::transport::LOOK) at most, and at its VM.
pub(crate) const CHOOSING: Duration = Duration::from_secs(20);
// A burst for the mode may come before the look, and has the peer's answer to wait for.
const _: () = assert!(CHOOSING.as_secs() >= crate::transport::LOOK.as_secs() + 2 * PATIENCE.as_secs());

/// Why nothing more can be read from, or written to, a connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// It broke, or the peer refused our key.
    #[error(transparent)]
    Link(LinkError),
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer waits for what was written to it long ago.
    #[error("nothing arrives any more of what is written to the connection")]
    Stalled,
    /// The peer took too long.
    #[error("the peer did not answer within {0:?}")]
    Timeout(Duration),
    /// The peer sent a frame that is none.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer sent a message that is none.
    #[error("the peer sent a message that cannot be decoded")]
    Message,
    /// The peer sent something that has no place here.
    #[error("the peer sent {got} where {expected} was expected")]
    Unexpected {
        /// What came.
        got: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// The peer refused, and said why.
    #[error("the peer refused: {0}")]
    Refused(Failure),
}

impl WireError {
    /// Whether trying again may help: the link broke, nobody erred.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            _ if Mechanism::Resume.is_off() => false,
            WireError::Link(error) => error.is_transient(),
            WireError::Closed | WireError::Stalled | WireError::Timeout(_) => true,
            WireError::Refused(failure) => failure.code == "busy",
            _ => false,
        }
    }

    /// As an operator meets it.
    pub(crate) fn failure(self) -> Failure {
        let text = self.to_string();
        match self {
            WireError::Link(error) => link_failure(error),
            WireError::Refused(failure) => failure,
            WireError::Closed => {
                Failure::new("peer_closed", Blame::Link, text, "look at the log of the peer's agent")
            }
            WireError::Timeout(_) | WireError::Stalled => {
                Failure::new("peer_timeout", Blame::Link, text, "check that the peer's agent is alive")
            }
            WireError::Frame(_) | WireError::Message | WireError::Unexpected { .. } => Failure::new(
                "protocol",
                Blame::PeerMisbehaving,
                text,
                "check that the address is a dwcpd's data address and compare both agents' versions",
            ),
        }
    }
}

impl From<std::io::Error> for WireError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::UnexpectedEof && error.get_ref().is_none() {
            return WireError::Closed;
        }
        WireError::Link(LinkError::from(error))
    }
}

/// A link's error as an operator meets it.
pub(crate) fn link_failure(error: LinkError) -> Failure {
    let blame = match error.blame() {
        dwcp_link::Blame::Link => Blame::Link,
        dwcp_link::Blame::Peer => Blame::PeerMisbehaving,
        dwcp_link::Blame::Us => Blame::Local,
    };
    Failure::new(error.code(), blame, error.to_string(), "")
}

/// What one frame holds.
#[derive(Debug)]
pub(crate) enum Frame {
    /// A message.
    Message(Body),
    /// A chunk's signed header; its payload follows.
    Chunk([u8; SIGNED_HEADER_LEN]),
}

/// Reads the next frame; messages may be `max_message` bytes long. A message of a kind unknown here is skipped.
pub(crate) async fn read_frame(reader: &mut Reader, max_message: usize) -> Result<Frame, WireError> {
    loop {
        let mut head = [0u8; HEAD_LEN];
        reader.read_exact(&mut head).await?;
        let head = Head::parse(head, max_message)?;
        match head.tag {
            Tag::Chunk => {
                let mut signed = [0u8; SIGNED_HEADER_LEN];
                reader.read_exact(&mut signed).await?;
                return Ok(Frame::Chunk(signed));
            }
            Tag::Message => {
                let mut body = vec![0u8; head.len as usize];
                reader.read_exact(&mut body).await?;
                if let Some(body) = Message::parse(&body).map_err(|_| WireError::Message)?.body {
                    return Ok(Frame::Message(body));
                }
            }
        }
    }
}

/// Reads one message of a handshake, with its bytes as they travelled. A refusal is an error.
pub(crate) async fn read_message(reader: &mut Reader) -> Result<(Body, Vec<u8>), WireError> {
    read_message_within(PATIENCE, reader).await
}

/// The same where the peer may take so long over it.
pub(crate) async fn read_message_within(
    patience: Duration,
    reader: &mut Reader,
) -> Result<(Body, Vec<u8>), WireError> {
    let read = async {
        let mut head = [0u8; HEAD_LEN];
        reader.read_exact(&mut head).await?;
        let head = Head::parse(head, dwcp_proto::limits::MAX_HANDSHAKE)?;
        if head.tag != Tag::Message {
            return Err(WireError::Unexpected { got: "a chunk", expected: "a message of the handshake" });
        }
        let mut bytes = vec![0u8; head.len as usize];
        reader.read_exact(&mut bytes).await?;
        match Message::parse(&bytes).map_err(|_| WireError::Message)?.body {
            Some(Body::Refused(refused)) => Err(WireError::Refused(refusal_failure(refused))),
            Some(body) => Ok((body, bytes)),
            None => Err(WireError::Message),
        }
    };
    tokio::time::timeout(patience, read).await.unwrap_or(Err(WireError::Timeout(patience)))
}

/// Writes one message and flushes it; returns the bytes that travelled.
pub(crate) async fn write_message(writer: &mut Writer, body: Body) -> Result<Vec<u8>, WireError> {
    let bytes = Message::from(body).to_bytes();
    let head = Head { tag: Tag::Message, len: bytes.len() as u32 };
    let frame = [&head.to_bytes()[..], &bytes].concat();
    writer.write_all(&frame).await?;
    writer.flush().await?;
    Ok(bytes)
}

/// The preamble of a plain connection.
pub(crate) async fn write_preamble(writer: &mut Writer) -> Result<(), WireError> {
    Ok(writer.write_all(&PLAIN_PREAMBLE).await?)
}

/// Reads and checks the preamble of a plain connection.
pub(crate) async fn read_preamble(reader: &mut Reader) -> Result<(), WireError> {
    let mut preamble = PLAIN_PREAMBLE;
    reader.read_exact(&mut preamble).await?;
    if preamble == PLAIN_PREAMBLE { Ok(()) } else { Err(FrameError::Magic.into()) }
}

/// Writes one chunk. Header and payload go in one vectored write where the connection can.
pub(crate) async fn write_chunk(writer: &mut Writer, chunk: &SealedChunk) -> Result<(), WireError> {
    let signed = [&Head::CHUNK.to_bytes()[..], &chunk.signed_header()[..]].concat();
    let [head, body] = chunk.parts();
    let mut parts = Bytes::from(signed).chain(head.clone()).chain(body.clone());
    while parts.has_remaining() {
        if writer.write_buf(&mut parts).await? == 0 {
            return Err(WireError::Closed);
        }
    }
    Ok(writer.flush().await?)
}

/// Bytes that a chunk takes on the wire, its frame included.
pub(crate) fn chunk_frame_len(chunk: &SealedChunk) -> u64 {
    HEAD_LEN as u64 + chunk.wire_len()
}

/// A failure as the peer is told.
pub(crate) fn refusal(failure: &Failure) -> Body {
    let cut = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
    Body::Refused(Refused {
        code: cut(&failure.code),
        message: cut(&failure.message),
        hint: cut(&failure.hint),
    })
}

/// Characters of a peer's text that are kept.
const MAX_TEXT: usize = 500;

/// A peer's refusal as a failure: its code only where it looks like one, its texts cut.
pub(crate) fn refusal_failure(refused: Refused) -> Failure {
    let cut = |text: &str| text.chars().take(MAX_TEXT).collect::<String>();
    let is_code = |c: &str| {
        !c.is_empty()
            && c.len() <= 64
            && c.bytes().all(|b| b.is_ascii_lowercase() || b == b'_' || b.is_ascii_digit())
    };
    let code = if is_code(&refused.code) { refused.code.clone() } else { "peer_refused".to_owned() };
    Failure::new(
        &code,
        Blame::PeerIncompatible,
        format!("the peer says: {}", cut(&refused.message)),
        cut(&refused.hint),
    )
}
