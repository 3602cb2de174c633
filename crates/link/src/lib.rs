//! Connections between two agents: mutually authenticated TLS 1.3 over TCP, QUIC, plain TCP, and an in-process pipe.
//!
//! The source agent dials; the destination listens on one address for everything. What travels on a connection, and
//! how many belong together, is not known here.
//!
//! ```text
//!  source                                        destination
//!  Identity + NodeName --dial()----------------> Listener::bind()      first byte 0x16: TLS, 'D': plain
//!     |                      TLS 1.3, raw keys      |  pending: capped in all and per source, with a deadline
//!     v                                             v
//!  Connection  <==================================> Listener::accept() -> Connection
//!     |-- peer(), exporter(), kind()
//!     |-- gauge() -> Gauge: round-trip time, bytes queued, TCP_NOTSENT_LOWAT, cut
//!     '-- into_split() -> (Reader, Writer)
//! ```
//!
//! # Trust
//! A node is its Ed25519 key. Both ends present it as a raw public key (RFC 7250): there are no certificates, no
//! authorities, no names to match and no expiry. A dialler accepts only the keys that its [`Peers`] hold for the node it
//! wants; a listener accepts any key in its [`Peers`] and says whose it was. TLS 1.3 only, no resumption, no tickets,
//! no early data; the key exchange is hybrid (X25519 with ML-KEM-768) where both ends have it, because a recorded
//! migration is a guest's memory and stays worth decrypting. ALPN `dwcp/3` is required, not only offered.
//!
//! [`Connection::exporter`] is equal at both ends of one TLS connection and of no other (label `EXPORTER-dwcp-v3`, no
//! context): a signature over it binds a message to this connection.
//!
//! # When the peer refuses our key
//! In TLS 1.3 the client is done before the server has looked at the client's key. So [`dial()`] succeeds, and the
//! refusal arrives with the first read: it fails with an [`io::Error`](std::io::Error) that
//! [`LinkError::from`] turns into [`LinkError::KeyRefused`]. A write may fail first, with a mere reset: whoever meets
//! an error while writing should let the reader say why. Learn of it early by reading early.
//!
//! # QUIC
//! A QUIC connection carries one two-way stream, and each [`Connection`] is a QUIC connection of its own, from a UDP socket of its
//! own: the streams of a migration then lose, recover, and are given up independently, each with a congestion window of its own, and
//! nothing above this crate has to know what is underneath. The listener's UDP port is TCP's; where it cannot be had TCP goes on
//! alone ([`Listener::without_quic`]). Handshakes are bounded as TCP's are, by counts of their own, so that UDP, whose senders can lie about
//! where they are, keeps nobody out of TCP; once many are pending a sender has to prove its address first (a retry packet).
//!
//! There is no 0-RTT and no ticket. What an authenticated peer can make us hold of a connection is 256 KiB, and 8 MiB once
//! [`Reader::widen`] was called; not yet authenticated ones, 1 MiB together beside their handshakes.
//!
//! # Plain connections
//! A plain connection starts with the bytes `DWCP` (left in the stream for the reader) and proves nothing: whoever
//! accepts one must authenticate its peer, with a deadline and a bound on how many may be waiting.

mod connection;
mod dial;
mod error;
mod identity;
mod listener;
mod peers;
mod pipe;
mod quic;
mod tcp;
#[allow(unsafe_code)]
mod tcp_info;
mod tls;

pub use connection::{Connection, Kind, Reader, Writer};
pub use dial::{DialOptions, dial, dial_plain, dial_quic};
pub use error::{Blame, LinkError, Stranger};
pub use identity::Identity;
pub use listener::{ListenOptions, Listener, Refusals};
pub use peers::{Peers, Roster, RosterChange, RosterError};
pub use pipe::{pipe, pipe_between};
pub use quic::Controller;
pub use tcp::{Gauge, Sample, Tuning, can_use, ever_written};
