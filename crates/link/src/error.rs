//! What can go wrong with a connection, by cause.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dwcp_proto::NodeName;
use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};
use rustls::{AlertDescription, CertificateError, PeerIncompatible};

use crate::tls::Told;

/// Who has to act.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blame {
    /// This node's own configuration or resources.
    Us,
    /// The node at the other end, or someone who pretends to be it.
    Peer,
    /// What lies between.
    Link,
}

/// Why there is no connection, or no longer one. Cheap to clone, so that several waiters can be told.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Someone else listens there.
    #[error("{addr} is in use: stop the process that listens there, or listen on another address")]
    AddressInUse {
        /// Where we wanted to listen.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {addr}: it must be an address of this host, and a port that we may open")]
    Bind {
        /// Where we wanted to listen.
        addr: SocketAddr,
        /// What the kernel said.
        source: Arc<io::Error>,
    },
    /// The expected peer has no key in our folder, so nothing was dialled.
    #[error("no key of node {node} in our peers folder: copy its {node}.pub there")]
    UnknownNode {
        /// The node to be dialled.
        node: NodeName,
    },
    /// Our own key or TLS settings are unusable.
    #[error("cannot set up TLS with our own key")]
    Setup(#[source] rustls::Error),

    /// Nobody listens there.
    #[error("{addr} refused the connection: check that dwcpd runs there and listens on that address")]
    Refused {
        /// Who was dialled.
        addr: SocketAddr,
    },
    /// No answer to the connection attempt.
    #[error("no answer from {addr} within {after:?}: check the address, the route and firewalls")]
    ConnectTimeout {
        /// Who was dialled.
        addr: SocketAddr,
        /// How long we waited.
        after: Duration,
    },
    /// The network knows no way there.
    #[error("no route to {addr}")]
    NoRoute {
        /// Who was dialled.
        addr: SocketAddr,
    },
    /// Connected, but the handshake did not end in time.
    #[error("{addr} did not finish the handshake within {after:?}")]
    HandshakeTimeout {
        /// The other end.
        addr: SocketAddr,
        /// How long we waited.
        after: Duration,
    },
    /// The connection ended in the middle of the handshake, without a word.
    #[error("{addr} closed the connection during the handshake: it may be shedding load, or speak no TLS")]
    HandshakeClosed {
        /// The other end.
        addr: SocketAddr,
    },
    /// An established connection was reset, timed out or lost its route.
    #[error("connection lost")]
    Lost(#[source] Arc<io::Error>),
    /// An established connection ended without saying goodbye: bytes may be missing.
    #[error("connection cut off before its end")]
    CutOff,

    /// The node that answered is not the one that was wanted.
    #[error(
        "{addr} is not {expected}: it is {actual}; check the address, or {expected}.pub in our peers folder"
    )]
    WrongPeer {
        /// Who was dialled.
        addr: SocketAddr,
        /// Who should have answered.
        expected: NodeName,
        /// Whose key it is.
        actual: Stranger,
    },
    /// A peer with a key that our folder does not hold wants to connect.
    #[error("refused {addr}: {stranger} is not in our peers folder")]
    UnknownPeer {
        /// Where it connects from.
        addr: SocketAddr,
        /// Whose key it is.
        stranger: Stranger,
    },
    /// The peer does not know our key.
    #[error("{peer} refused our key: put {us}.pub of this node into its peers folder")]
    KeyRefused {
        /// Who refused.
        peer: NodeName,
        /// Our own name.
        us: NodeName,
    },
    /// The peer speaks a TLS older than 1.3.
    #[error("{addr} does not speak TLS 1.3, which is required")]
    TlsVersion {
        /// The other end.
        addr: SocketAddr,
    },
    /// TLS, but not for DWCP v3.
    #[error("{addr} speaks TLS, but not DWCP version 3")]
    Protocol {
        /// The other end.
        addr: SocketAddr,
    },
    /// Neither TLS nor the plain preamble.
    #[error("{addr} sent neither TLS nor a DWCP preamble")]
    NotDwcp {
        /// Where it connects from.
        addr: SocketAddr,
    },
    /// A plain connection where policy demands TLS.
    #[error("refused {addr}: plain connections are not allowed here")]
    PlainRefused {
        /// Where it connects from.
        addr: SocketAddr,
    },
    /// The connection was good, but this node did not take it up in time.
    #[error("dropped {addr}: this node is too busy to take up new connections")]
    Busy {
        /// Where it connects from.
        addr: SocketAddr,
    },
    /// Too many unfinished handshakes, from this source or in all.
    #[error("refused {addr}: {pending} handshakes are pending already")]
    Flooded {
        /// Where it connects from.
        addr: SocketAddr,
        /// The cap that was met.
        pending: usize,
    },
    /// TLS failed in a way that has no more particular name: damage, attack or a defect.
    #[error("TLS failed")]
    Tls(#[source] rustls::Error),
}

impl LinkError {
    /// A stable name of the cause for metrics, JSON and the wire.
    pub fn code(&self) -> &'static str {
        match self {
            LinkError::AddressInUse { .. } => "address_in_use",
            LinkError::Bind { .. } => "bind_failed",
            LinkError::UnknownNode { .. } => "unknown_node",
            LinkError::Setup(_) => "tls_setup",
            LinkError::Refused { .. } => "connection_refused",
            LinkError::ConnectTimeout { .. } => "connect_timeout",
            LinkError::NoRoute { .. } => "no_route",
            LinkError::HandshakeTimeout { .. } => "handshake_timeout",
            LinkError::HandshakeClosed { .. } => "handshake_closed",
            LinkError::Lost(_) => "connection_lost",
            LinkError::CutOff => "cut_off",
            LinkError::WrongPeer { .. } => "wrong_peer",
            LinkError::UnknownPeer { .. } => "unknown_peer",
            LinkError::KeyRefused { .. } => "key_refused",
            LinkError::TlsVersion { .. } => "tls_version",
            LinkError::Protocol { .. } => "protocol",
            LinkError::NotDwcp { .. } => "not_dwcp",
            LinkError::PlainRefused { .. } => "plain_refused",
            LinkError::Busy { .. } => "busy",
            LinkError::Flooded { .. } => "flooded",
            LinkError::Tls(_) => "tls_failed",
        }
    }

    /// Who has to act.
    pub fn blame(&self) -> Blame {
        match self {
            LinkError::AddressInUse { .. }
            | LinkError::Bind { .. }
            | LinkError::UnknownNode { .. }
            | LinkError::Setup(_)
            | LinkError::Busy { .. } => Blame::Us,
            LinkError::Refused { .. }
            | LinkError::ConnectTimeout { .. }
            | LinkError::NoRoute { .. }
            | LinkError::HandshakeTimeout { .. }
            | LinkError::HandshakeClosed { .. }
            | LinkError::Lost(_)
            | LinkError::CutOff => Blame::Link,
            LinkError::WrongPeer { .. }
            | LinkError::UnknownPeer { .. }
            | LinkError::KeyRefused { .. }
            | LinkError::TlsVersion { .. }
            | LinkError::Protocol { .. }
            | LinkError::NotDwcp { .. }
            | LinkError::PlainRefused { .. }
            | LinkError::Flooded { .. }
            | LinkError::Tls(_) => Blame::Peer,
        }
    }

    /// The [`code`](Self::code)s of all refusals of a listener, for counters that start at zero.
    pub(crate) const OF_LISTENER: [&'static str; 11] = [
        "handshake_timeout",
        "handshake_closed",
        "connection_lost",
        "unknown_peer",
        "tls_version",
        "protocol",
        "not_dwcp",
        "plain_refused",
        "tls_failed",
        "busy",
        "flooded",
    ];

    /// Whether the same attempt may succeed later without anyone changing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self.blame(), Blame::Link)
            || matches!(self, LinkError::Busy { .. } | LinkError::Flooded { .. })
    }

    /// Sorts an error of connecting to `addr`.
    pub(crate) fn of_connect(addr: SocketAddr, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => LinkError::Refused { addr },
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => LinkError::NoRoute { addr },
            _ => LinkError::Lost(Arc::new(error)),
        }
    }

    /// Sorts an error of the QUIC handshake with `addr`; `dialled` is set where we are the client, `told` knows whom it refused.
    pub(crate) fn of_quic(
        addr: SocketAddr,
        dialled: Option<&Dialled>,
        told: &Told,
        error: ConnectionError,
    ) -> Self {
        match (&error, told.stranger(), dialled) {
            (ConnectionError::TransportError(_), Some(actual), Some(dialled)) => {
                return LinkError::WrongPeer { addr, expected: dialled.peer.clone(), actual: actual.clone() };
            }
            (ConnectionError::TransportError(_), Some(stranger), None) => {
                return LinkError::UnknownPeer { addr, stranger: stranger.clone() };
            }
            _ => {}
        }
        if let Some(refusal) = dialled.and_then(|dialled| dialled.quic_refusal(&error)) {
            return refusal;
        }
        let alert = match &error {
            ConnectionError::TransportError(error) => alert(error.code),
            ConnectionError::ConnectionClosed(close) => alert(close.error_code),
            _ => None,
        };
        match (&error, alert) {
            (_, Some(AlertDescription::NoApplicationProtocol | AlertDescription::CertificateRequired))
            | (ConnectionError::VersionMismatch, _) => LinkError::Protocol { addr },
            (_, Some(alert)) => LinkError::Tls(rustls::Error::AlertReceived(alert)),
            (ConnectionError::TransportError(error), None) => {
                LinkError::Tls(rustls::Error::General(error.to_string()))
            }
            (ConnectionError::TimedOut | ConnectionError::CidsExhausted, None) => {
                LinkError::Lost(Arc::new(error.into()))
            }
            (
                ConnectionError::ConnectionClosed(_)
                | ConnectionError::ApplicationClosed(_)
                | ConnectionError::Reset
                | ConnectionError::LocallyClosed,
                None,
            ) => LinkError::HandshakeClosed { addr },
        }
    }

    /// Sorts an error of listening on `addr`.
    pub(crate) fn of_bind(addr: SocketAddr, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => LinkError::AddressInUse { addr },
            _ => LinkError::Bind { addr, source: Arc::new(error) },
        }
    }

    /// Sorts an error of the handshake with `addr`; `dialled` is set where we are the client.
    pub(crate) fn of_handshake(addr: SocketAddr, dialled: Option<&Dialled>, error: io::Error) -> Self {
        use rustls::Error as Tls;
        let expected = dialled.map(|dialled| &dialled.peer);
        if let Some(refusal) = dialled.and_then(|dialled| dialled.refusal(&error)) {
            return refusal;
        }
        let closed = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
        );
        let tls = match tls_error(&error) {
            Some(tls) => tls,
            None if closed => return LinkError::HandshakeClosed { addr },
            None => return LinkError::Lost(Arc::new(error)),
        };
        match tls {
            Tls::InvalidCertificate(CertificateError::Other(other)) => {
                match (other.0.downcast_ref::<Stranger>(), expected) {
                    (Some(actual), Some(expected)) => {
                        LinkError::WrongPeer { addr, expected: expected.clone(), actual: actual.clone() }
                    }
                    (Some(stranger), None) => LinkError::UnknownPeer { addr, stranger: stranger.clone() },
                    (None, _) => LinkError::Tls(tls.clone()),
                }
            }
            Tls::PeerIncompatible(
                PeerIncompatible::Tls12NotOffered
                | PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            )
            | Tls::AlertReceived(AlertDescription::ProtocolVersion) => LinkError::TlsVersion { addr },
            Tls::PeerIncompatible(PeerIncompatible::IncorrectCertificateTypeExtension)
            | Tls::NoApplicationProtocol
            | Tls::NoCertificatesPresented
            | Tls::AlertReceived(AlertDescription::NoApplicationProtocol) => LinkError::Protocol { addr },
            Tls::InvalidMessage(_) if expected.is_some() => LinkError::NotDwcp { addr },
            other => LinkError::Tls(other.clone()),
        }
    }
}

/// Sorts an error of reading or writing on an established connection.
impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        if let Some(inner) = error.get_ref() {
            if let Some(link) = inner.downcast_ref::<LinkError>() {
                return link.clone();
            }
            if let Some(tls) = inner.downcast_ref::<rustls::Error>() {
                return LinkError::Tls(tls.clone());
            }
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof => LinkError::CutOff,
            _ => LinkError::Lost(Arc::new(error)),
        }
    }
}

/// So that it can travel through `AsyncRead` and come out again by `LinkError::from`.
impl From<LinkError> for io::Error {
    fn from(error: LinkError) -> Self {
        io::Error::new(io::ErrorKind::PermissionDenied, error)
    }
}

/// The names at both ends of a connection that we dialled over TLS.
#[derive(Debug, Clone)]
pub(crate) struct Dialled {
    pub(crate) peer: NodeName,
    pub(crate) us: NodeName,
}

impl Dialled {
    /// The peer's refusal of our key, if the error is one.
    pub(crate) fn refusal(&self, error: &io::Error) -> Option<LinkError> {
        match tls_error(error) {
            Some(rustls::Error::AlertReceived(alert)) => self.refused(*alert),
            _ => None,
        }
    }

    /// The same of a QUIC connection's error.
    pub(crate) fn quic_refusal(&self, error: &ConnectionError) -> Option<LinkError> {
        match error {
            ConnectionError::ConnectionClosed(close) => self.refused(alert(close.error_code)?),
            _ => None,
        }
    }

    fn refused(&self, alert: AlertDescription) -> Option<LinkError> {
        let of_our_key = matches!(
            alert,
            AlertDescription::CertificateUnknown
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateRequired
                | AlertDescription::UnknownCA
                | AlertDescription::AccessDenied
        );
        of_our_key.then(|| LinkError::KeyRefused { peer: self.peer.clone(), us: self.us.clone() })
    }
}

/// An error of a QUIC stream, so that [`LinkError::from`] sorts it as one of TLS over TCP: an end without goodbye is cut off.
pub(crate) fn of_quic_stream(error: io::Error, dialled: Option<&Dialled>) -> io::Error {
    let inner = error.get_ref();
    let read = inner.and_then(|inner| inner.downcast_ref::<ReadError>());
    let write = inner.and_then(|inner| inner.downcast_ref::<WriteError>());
    let lost = match (read, write) {
        (Some(ReadError::ConnectionLost(lost)), _) | (_, Some(WriteError::ConnectionLost(lost))) => lost,
        (Some(ReadError::Reset(_)), _) => return cut_off(),
        _ => return error,
    };
    if let Some(refusal) = dialled.and_then(|dialled| dialled.quic_refusal(lost)) {
        return refusal.into();
    }
    match (lost, read) {
        (ConnectionError::ApplicationClosed(_) | ConnectionError::LocallyClosed, Some(_)) => cut_off(),
        _ => lost.clone().into(),
    }
}

fn cut_off() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended without goodbye")
}

/// The TLS alert in a QUIC error code (RFC 9001, section 4.8).
fn alert(code: TransportErrorCode) -> Option<AlertDescription> {
    let code = u64::from(code).checked_sub(0x100)?;
    u8::try_from(code).ok().map(AlertDescription::from)
}

/// The TLS error inside of an I/O error, if that is what it is.
fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

/// A key that is not the one to be accepted, as the other end presented it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stranger {
    /// Another node's, by our folder.
    Node(NodeName),
    /// An Ed25519 key that is in nobody's file.
    Key([u8; 32]),
    /// No Ed25519 key at all.
    Other,
}

impl fmt::Display for Stranger {
    /// A key is shown by its first digits as they stand in its `.pub` file, so that it can be found with grep.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stranger::Node(node) => write!(f, "{node}"),
            Stranger::Key(key) => {
                f.write_str("the key ")?;
                key.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
                f.write_str("...")
            }
            Stranger::Other => f.write_str("a key that is not Ed25519"),
        }
    }
}

impl std::error::Error for Stranger {}
