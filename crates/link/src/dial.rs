//! The source's side: connecting to the destination.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dwcp_proto::NodeName;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsConnector, TlsStream};

use crate::connection::Connection;
use crate::error::{Dialled, LinkError};
use crate::identity::Identity;
use crate::quic::{self, Controller};
use crate::tcp::{Socket, Tuning};
use crate::tls::{self, Told};

/// Between two attempts to connect that go on beside each other.
pub(crate) const BESIDE: Duration = Duration::from_millis(400);

/// How long to try, and how to tune what comes of it.
#[derive(Debug, Clone)]
pub struct DialOptions {
    /// For the TCP connection to stand.
    pub connect_timeout: Duration,
    /// For the TLS handshake after that.
    pub handshake_timeout: Duration,
    /// Socket settings.
    pub tuning: Tuning,
    /// The congestion control of a QUIC connection; TCP's is among the socket settings.
    pub controller: Controller,
}

impl Default for DialOptions {
    fn default() -> Self {
        DialOptions {
            connect_timeout: Duration::from_secs(5),
            handshake_timeout: Duration::from_secs(5),
            tuning: Tuning::default(),
            controller: Controller::default(),
        }
    }
}

/// Connects to the node `expected` at `addr`, and authenticates it. Whether it accepts *us* shows at the first read:
/// see the crate's documentation.
pub async fn dial(
    addr: SocketAddr,
    identity: &Identity,
    expected: &NodeName,
    options: &DialOptions,
) -> Result<Connection, LinkError> {
    let (config, roster) = identity.client(expected, Told::default())?;
    let dialled = Dialled { peer: expected.clone(), us: identity.node().clone() };
    let (stream, socket) = connect(addr, options).await?;
    // TLS asks for a name; the verifier compares keys and does not look at it, and it is not sent.
    let nobody = ServerName::from(IpAddr::from(Ipv4Addr::UNSPECIFIED));
    let after = options.handshake_timeout;
    let stream = match timeout(after, TlsConnector::from(config).connect(nobody, stream)).await {
        Ok(stream) => stream.map_err(|error| LinkError::of_handshake(addr, Some(&dialled), error))?,
        Err(_) => return Err(LinkError::HandshakeTimeout { addr, after }),
    };
    let session = stream.get_ref().1;
    if !tls::speaks_dwcp(session) {
        return Err(LinkError::Protocol { addr });
    }
    let peer =
        tls::peer(session, &roster).ok_or_else(|| LinkError::UnknownNode { node: expected.clone() })?;
    Connection::tls(TlsStream::Client(stream), socket, addr, peer, Some(dialled))
}

/// As [`dial`], over QUIC (UDP): the same keys, the same rules. The peer learns of the connection with the first byte
/// that is written. Of what is set only the time to connect, which holds for the handshake too, `user_timeout` and `keepalive`
/// of the tuning, and the controller count.
pub async fn dial_quic(
    addr: SocketAddr,
    identity: &Identity,
    expected: &NodeName,
    options: &DialOptions,
) -> Result<Connection, LinkError> {
    quic::dial(addr, identity, expected, options).await
}

/// Connects to `addr` without TLS. Nobody is authenticated: the caller does that, or policy says that it need not be.
/// The caller starts with the bytes `DWCP`.
pub async fn dial_plain(addr: SocketAddr, options: &DialOptions) -> Result<Connection, LinkError> {
    let (stream, socket) = connect(addr, options).await?;
    Ok(Connection::plain(stream, socket, addr, Vec::new()))
}

async fn connect(addr: SocketAddr, options: &DialOptions) -> Result<(TcpStream, Socket), LinkError> {
    let after = options.connect_timeout;
    let stream = match timeout(after, first_to_stand(addr)).await {
        Ok(stream) => stream.map_err(|error| LinkError::of_connect(addr, error))?,
        Err(_) => return Err(LinkError::ConnectTimeout { addr, after }),
    };
    let lost = |error| LinkError::Lost(Arc::new(error));
    options.tuning.apply(&stream).map_err(lost)?;
    let socket = Socket::of(&stream).map_err(lost)?;
    Ok((stream, socket))
}

/// A first packet that was lost the kernel sends again after 1, 2, then 4 s; over a link that is back meanwhile nothing would flow until
/// then. So a further attempt begins beside those before, and the first that stands is taken.
async fn first_to_stand(addr: SocketAddr) -> std::io::Result<TcpStream> {
    let mut attempts = JoinSet::new();
    loop {
        attempts.spawn(TcpStream::connect(addr));
        tokio::select! {
            Some(Ok(done)) = attempts.join_next() => return done,
            () = sleep(BESIDE) => {}
        }
    }
}
