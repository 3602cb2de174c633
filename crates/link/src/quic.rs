//! QUIC: both ends of a handshake, with the keys and rules of TLS over TCP. What comes of it is in `stream`, how it fares
//! in `figures`.

mod figures;
mod stream;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dwcp_proto::NodeName;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;
use rustls::{Error, PeerIncompatible};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::connection::Connection;
use crate::dial::{BESIDE, DialOptions};
use crate::error::{Dialled, LinkError};
use crate::identity::Identity;
use crate::peers::Roster;
use crate::tls::{self, Told};

pub(crate) use stream::{Ends, Receiving, Sending};

use figures::{Factory, Figures};

/// Bytes that a peer may send ahead of whoever reads its stream, on a connection that carries data: what 80 MB/s need over
/// 100 ms. A session has sixteen connections at most, so it holds 128 MiB at worst.
const STREAM_WINDOW: u32 = 8 << 20;
/// The same before the connection is known to carry data: handshakes of sessions are far shorter.
const FIRST_WINDOW: u32 = 256 << 10;
/// Bytes of datagrams that are kept of a handshake which was not looked at yet, and of all of them: a client that keeps the
/// rules sends a few packets before it is answered.
const UNSEEN: u64 = 16 << 10;
const UNSEEN_IN_ALL: u64 = 1 << 20;
/// Handshakes that were not looked at yet: each waits for one turn of the listener's task.
const MAX_UNSEEN: usize = 256;
/// Before anything was measured: a first packet that was lost is then sent again after three times as long, and after a second at a
/// round trip of 300 ms nothing is lost but a few packets too many.
const FIRST_RTT: Duration = Duration::from_millis(100);
/// Bytes that the kernel may hold of a UDP socket, each way, if it is asked: a burst of all streams. It gives what it allows.
const SOCKET_BUFFER: usize = 4 << 20;
/// A cause that no caller sees: one of quinn's limits on what is configured.
const UNUSABLE: &str = "a setting that QUIC does not take";

/// How a QUIC connection finds out what the network carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Controller {
    /// By the rate at which the peer acknowledges: a lost packet is no sign of a full link. At 100 ms and 0.5 % loss it carries some twenty
    /// times what the others do (`docs/compare-tcp.md`).
    #[default]
    Bbr,
    /// By loss, as TCP does mostly.
    Cubic,
    /// By loss, as TCP did long ago.
    NewReno,
}

impl Controller {
    /// All of them.
    pub const ALL: [Controller; 3] = [Controller::Bbr, Controller::Cubic, Controller::NewReno];

    /// One word for tables and logs.
    pub fn name(self) -> &'static str {
        match self {
            Controller::Bbr => "bbr",
            Controller::Cubic => "cubic",
            Controller::NewReno => "newreno",
        }
    }
}

/// How long a connection may be silent, and when it asks for a sign of life.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub(crate) idle: Duration,
    pub(crate) keepalive: Duration,
}

/// Settings of one connection, and what will be known of it.
fn transport(
    patience: Patience,
    controller: Controller,
    streams: u8,
) -> Result<(Arc<TransportConfig>, Figures), LinkError> {
    let (factory, figures) = Factory::new(controller);
    let idle = patience.idle.try_into().map_err(|_| LinkError::Setup(Error::General(UNUSABLE.to_owned())))?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(streams.into())
        .max_concurrent_uni_streams(0u8.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(FIRST_WINDOW.into())
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(patience.keepalive))
        .initial_rtt(FIRST_RTT)
        .congestion_controller_factory(Arc::new(factory));
    Ok((Arc::new(transport), figures))
}

/// A UDP socket at `addr`.
fn socket(addr: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))?;
    // Wishes only: with less the kernel drops more of a burst, and congestion control does the rest.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&SockAddr::from(addr))?;
    Ok(socket.into())
}

fn endpoint(addr: SocketAddr, server: Option<ServerConfig>) -> io::Result<Endpoint> {
    Endpoint::new(EndpointConfig::default(), server, socket(addr)?, Arc::new(TokioRuntime))
}

/// Connects to the node `expected` at `addr`: see [`crate::dial_quic`].
pub(crate) async fn dial(
    addr: SocketAddr,
    identity: &Identity,
    expected: &NodeName,
    options: &DialOptions,
) -> Result<Connection, LinkError> {
    let told = Told::default();
    let (config, roster) = identity.client(expected, told.clone())?;
    let crypto = QuicClientConfig::try_from(config).map_err(|_| no_suite())?;
    let patience = Patience { idle: options.tuning.user_timeout, keepalive: options.tuning.keepalive };
    let (crypto, controller) = (Arc::new(crypto), options.controller);
    let anywhere: SocketAddr = match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A socket of its own, closed with the connection.
    let endpoint = endpoint(anywhere, None).map_err(|error| LinkError::Lost(Arc::new(error)))?;
    let mut attempts = JoinSet::new();
    // As over TCP: what was lost of one attempt, another one need not wait for.
    let first_to_stand = async {
        loop {
            let (transport, figures) = transport(patience, controller, 0)?;
            let mut config = ClientConfig::new(crypto.clone());
            config.transport_config(transport);
            // QUIC asks for a name; the verifier compares keys and does not look at it, and it is not sent.
            let connecting = endpoint
                .connect_with(config, addr, "0.0.0.0")
                .map_err(|error| LinkError::Lost(Arc::new(io::Error::other(error))))?;
            attempts.spawn(async move { (connecting.await, figures) });
            tokio::select! {
                Some(Ok((done, figures))) = attempts.join_next() => return Ok::<_, LinkError>((done, figures)),
                () = sleep(BESIDE) => {}
            }
        }
    };
    let dialled = Dialled { peer: expected.clone(), us: identity.node().clone() };
    let after = options.connect_timeout;
    let (done, figures) = match timeout(after, first_to_stand).await {
        Ok(done) => done?,
        Err(_) => return Err(LinkError::ConnectTimeout { addr, after }),
    };
    let failed = |error| LinkError::of_quic(addr, Some(&dialled), &told, error);
    let quic = done.map_err(failed)?;
    let peer =
        known(&quic, &roster, addr)?.ok_or_else(|| LinkError::UnknownNode { node: expected.clone() })?;
    let (send, receive) = quic.open_bi().await.map_err(failed)?;
    stand(quic, send, receive, figures, peer, Some(dialled))
}

/// The listener's end.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    endpoint: Endpoint,
    settings: ServerConfig,
    patience: Patience,
    controller: Controller,
}

impl Gate {
    /// Listens at `addr`, a UDP address.
    pub(crate) fn open(
        addr: SocketAddr,
        identity: &Identity,
        patience: Patience,
        controller: Controller,
    ) -> Result<Self, LinkError> {
        let mut settings = ServerConfig::with_crypto(crypto(identity, Told::default())?);
        settings
            .max_incoming(MAX_UNSEEN)
            .incoming_buffer_size(UNSEEN)
            .incoming_buffer_size_total(UNSEEN_IN_ALL);
        // Tokens for later connections: nobody asks for them, since each connection has a socket of its own.
        settings.validation_token.sent(0);
        // Until a handshake is taken up with settings of its own.
        settings.transport = transport(patience, controller, 1)?.0;
        let endpoint =
            endpoint(addr, Some(settings.clone())).map_err(|error| LinkError::of_bind(addr, error))?;
        Ok(Gate { endpoint, settings, patience, controller })
    }

    /// The next handshake; pending for ever once the socket is lost.
    pub(crate) async fn next(&self) -> Incoming {
        match self.endpoint.accept().await {
            Some(incoming) => incoming,
            None => std::future::pending().await,
        }
    }

    /// Makes the handshake, and waits for the stream.
    pub(crate) async fn admit(
        &self,
        incoming: Incoming,
        identity: &Identity,
    ) -> Result<Connection, LinkError> {
        let (addr, told) = (incoming.remote_address(), Told::default());
        let (transport, figures) = transport(self.patience, self.controller, 1)?;
        let mut settings = self.settings.clone();
        (settings.crypto, settings.transport) = (crypto(identity, told.clone())?, transport);
        let failed = |error| LinkError::of_quic(addr, None, &told, error);
        let quic = incoming.accept_with(Arc::new(settings)).map_err(failed)?.await.map_err(failed)?;
        // A key that left the roster since the handshake began is no longer anybody's.
        let peer =
            known(&quic, &identity.peers().roster(), addr)?.ok_or(LinkError::HandshakeClosed { addr })?;
        let (send, receive) = quic.accept_bi().await.map_err(failed)?;
        stand(quic, send, receive, figures, peer, None)
    }

    /// Takes no further handshakes; connections stand, and the socket is closed with the last of them.
    pub(crate) fn close(&self) {
        self.endpoint.set_server_config(None);
    }
}

fn crypto(identity: &Identity, told: Told) -> Result<Arc<QuicServerConfig>, LinkError> {
    let config = QuicServerConfig::try_from(identity.server_telling(told)?).map_err(|_| no_suite())?;
    Ok(Arc::new(config))
}

fn no_suite() -> LinkError {
    LinkError::Setup(PeerIncompatible::NoCipherSuitesInCommon.into())
}

/// Whom a finished handshake has authenticated, if the roster still holds it.
fn known(
    quic: &quinn::Connection,
    roster: &Roster,
    addr: SocketAddr,
) -> Result<Option<dwcp_proto::PeerKey>, LinkError> {
    let data = quic.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    if data.is_none_or(|data| data.protocol.as_deref() != Some(tls::ALPN)) {
        return Err(LinkError::Protocol { addr });
    }
    let presented =
        quic.peer_identity().and_then(|presented| presented.downcast::<Vec<CertificateDer<'static>>>().ok());
    Ok(presented.and_then(|presented| tls::peer_of(&presented, roster)))
}

fn stand(
    quic: quinn::Connection,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    figures: Figures,
    peer: dwcp_proto::PeerKey,
    dialled: Option<Dialled>,
) -> Result<Connection, LinkError> {
    let mut exporter = [0; 32];
    quic.export_keying_material(&mut exporter, tls::EXPORTER, &[])
        .map_err(|_| LinkError::Tls(Error::HandshakeNotComplete))?;
    let addr = quic.remote_address();
    let ends = Arc::new(Ends::new(quic, figures));
    let (sending, receiving) = (Sending::new(ends.clone(), send), Receiving::new(receive));
    Ok(Connection::quic(ends, sending, receiving, addr, peer, exporter, dialled))
}

/// The code with which a connection is closed.
fn code(code: u8) -> VarInt {
    code.into()
}
