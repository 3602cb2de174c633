//! The destination's side: one address for all that wants to connect.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout, timeout_at};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tracing::{debug, warn};

use crate::connection::Connection;
use crate::error::LinkError;
use crate::identity::Identity;
use crate::quic::{Controller, Gate, Patience};
use crate::tcp::{Socket, Tuning};
use crate::tls;

/// The first byte of a TLS handshake record (RFC 8446, section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// The first bytes of a plain connection.
const PLAIN_PREAMBLE: &[u8; 4] = b"DWCP";

/// Connections that the kernel may hold before we accept them: a burst of streams from many nodes at once.
const BACKLOG: u32 = 1024;

/// Bytes that a refused peer may still send before we stop listening to it: more than it can have in flight after its
/// part of the handshake by honest means, its first message.
const MAX_LINGER: u64 = 64 << 10;

/// How long a refused peer may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// How long to wait when the process has no descriptors or memory for another connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// QUIC handshakes that may be pending before a further client has to prove that it is where it says: so many, and no more, can be
/// kept from others with forged addresses.
const UNPROVED: usize = 64;

/// Free ports of TCP that are tried until UDP's of the same number is free, too.
const PORTS: usize = 16;

/// Refusals written to the log in one second; further ones are only counted.
const MAX_LOGGED_A_SECOND: u32 = 10;

/// What a listener allows.
#[derive(Debug, Clone)]
pub struct ListenOptions {
    /// From accepting a connection until it is authenticated and taken up.
    pub handshake_timeout: Duration,
    /// Unfinished handshakes in all, of TCP and of QUIC each; one takes a descriptor (TCP) and up to some 50 KB.
    pub max_pending: usize,
    /// Unfinished handshakes from one source: an IPv4 address, or the /64 of an IPv6 one. A migration opens its streams
    /// at once, so this bounds how many streams a peer can start together.
    pub max_pending_per_source: usize,
    /// Finished connections that may wait for [`Listener::accept`].
    pub max_ready: usize,
    /// Whether plain connections are let in at all.
    pub plain: bool,
    /// Whether QUIC connections are let in, at the UDP port of the same number.
    pub quic: bool,
    /// Socket settings of accepted connections. Of QUIC connections, how long they may be silent and what they ask then.
    pub tuning: Tuning,
}

impl Default for ListenOptions {
    fn default() -> Self {
        ListenOptions {
            handshake_timeout: Duration::from_secs(5),
            max_pending: 512,
            max_pending_per_source: 64,
            max_ready: 64,
            plain: false,
            quic: false,
            tuning: Tuning::default(),
        }
    }
}

/// Listens on one address, makes handshakes side by side, and hands over what passed. Dropping it closes the address and
/// ends unfinished handshakes; connections already handed over stand.
#[derive(Debug)]
pub struct Listener {
    addr: SocketAddr,
    ready: mpsc::Receiver<Connection>,
    refusals: Refusals,
    gate: Result<Gate, Option<LinkError>>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens on `addr`; port 0 picks a free one. Where QUIC is wanted and cannot be had, TCP is listened on all the same: see
    /// [`without_quic`](Self::without_quic).
    pub async fn bind(
        addr: SocketAddr,
        identity: &Identity,
        options: ListenOptions,
    ) -> Result<Self, LinkError> {
        let failed = |error| LinkError::of_bind(addr, error);
        let mut listener = listen(addr).map_err(failed)?;
        let mut gate = quic(&listener, identity, &options);
        // Another process may have the UDP port of a number that TCP has free.
        for _ in 1..PORTS {
            if addr.port() == 0 && matches!(gate, Err(Some(LinkError::AddressInUse { .. }))) {
                listener = listen(addr).map_err(failed)?;
                gate = quic(&listener, identity, &options);
            }
        }
        let addr = listener.local_addr().map_err(failed)?;
        let (finished, ready) = mpsc::channel(options.max_ready.max(1));
        let refusals = Refusals::default();
        let door = Arc::new(Door {
            identity: identity.clone(),
            pending: Pending::default(),
            pending_quic: Pending::default(),
            gate: gate.as_ref().ok().cloned(),
            refusals: refusals.clone(),
            finished,
            options,
        });
        Ok(Listener { addr, ready, refusals, gate, task: tokio::spawn(door.run(listener)) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Why there is no QUIC here though it is wanted; `None` where there is, or where it is not wanted.
    pub fn without_quic(&self) -> Option<&LinkError> {
        self.gate.as_ref().err()?.as_ref()
    }

    /// The next connection: over TLS or QUIC with its peer known, or plain with nobody known. Cancel-safe.
    /// `None` only if the listening task has died.
    pub async fn accept(&mut self) -> Option<Connection> {
        self.ready.recv().await
    }

    /// Who was refused, counted; lives on its own.
    pub fn refusals(&self) -> Refusals {
        self.refusals.clone()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
        if let Ok(gate) = &self.gate {
            gate.close();
        }
    }
}

/// Counts refused connections by cause. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Refusals(Arc<Mutex<Log>>);

#[derive(Debug)]
struct Log {
    counts: BTreeMap<&'static str, u64>,
    second: Instant,
    logged: u32,
    silent: u64,
}

impl Refusals {
    /// Connections refused since the start, by [`LinkError::code`]; causes that a listener can meet start at 0.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().counts.clone()
    }

    fn record(&self, error: &LinkError) {
        let mut log = self.lock();
        *log.counts.entry(error.code()).or_default() += 1;
        if log.second.elapsed() >= Duration::from_secs(1) {
            if log.silent > 0 {
                warn!(count = log.silent, "more connections were refused than logged");
            }
            (log.second, log.logged, log.silent) = (Instant::now(), 0, 0);
        }
        if log.logged < MAX_LOGGED_A_SECOND {
            log.logged += 1;
            warn!(code = error.code(), "{error}");
        } else {
            log.silent += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Refusals {
    fn default() -> Self {
        let counts = LinkError::OF_LISTENER.into_iter().map(|code| (code, 0)).collect();
        Refusals(Arc::new(Mutex::new(Log { counts, second: Instant::now(), logged: 0, silent: 0 })))
    }
}

/// What all handshakes of a listener share.
struct Door {
    identity: Identity,
    options: ListenOptions,
    pending: Pending,
    /// Of QUIC: whoever forges addresses there keeps nobody out of TCP.
    pending_quic: Pending,
    gate: Option<Gate>,
    refusals: Refusals,
    finished: mpsc::Sender<Connection>,
}

impl Door {
    async fn run(self: Arc<Self>, listener: TcpListener) {
        // Dropped with this task, and its handshakes with it.
        let mut handshakes = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, addr)) => {
                        let caps = [self.options.max_pending, self.options.max_pending_per_source];
                        match self.pending.enter(addr, caps) {
                            Ok(guard) => {
                                let door = self.clone();
                                handshakes.spawn(async move {
                                    let _guard = guard;
                                    if let Err(refusal) = door.admit(addr, door.handshake(stream, addr)).await {
                                        door.refusals.record(&refusal);
                                    }
                                });
                            }
                            Err(refusal) => self.refusals.record(&refusal),
                        }
                    }
                    Err(error) => {
                        debug!(%error, "cannot accept");
                        if exhausted(&error) {
                            warn!(%error, "no resources for another connection");
                            sleep(EXHAUSTED_PAUSE).await;
                        }
                    }
                },
                incoming = incoming(self.gate.as_ref()) => self.quic(incoming, &mut handshakes),
                Some(_) = handshakes.join_next() => {}
            }
        }
    }

    /// Begins a QUIC handshake, or refuses it.
    fn quic(self: &Arc<Self>, incoming: Incoming, handshakes: &mut JoinSet<()>) {
        let addr = incoming.remote_address();
        let unproved = UNPROVED.min(self.options.max_pending);
        if !incoming.remote_address_validated() && self.pending_quic.count() >= unproved {
            // An error would mean that it is proved.
            let _ = incoming.retry();
            return;
        }
        let caps = [self.options.max_pending, self.options.max_pending_per_source];
        match self.pending_quic.enter(addr, caps) {
            Ok(guard) => {
                let door = self.clone();
                handshakes.spawn(async move {
                    let _guard = guard;
                    let Some(gate) = &door.gate else { return };
                    if let Err(refusal) = door.admit(addr, gate.admit(incoming, &door.identity)).await {
                        door.refusals.record(&refusal);
                    }
                });
            }
            Err(refusal) => {
                incoming.refuse();
                self.refusals.record(&refusal);
            }
        }
    }

    /// Brings one connection from the first byte to whoever waits in [`Listener::accept`].
    async fn admit(
        &self,
        addr: SocketAddr,
        handshake: impl Future<Output = Result<Connection, LinkError>>,
    ) -> Result<(), LinkError> {
        let after = self.options.handshake_timeout;
        let deadline = tokio::time::Instant::now() + after;
        let connection = match timeout_at(deadline, handshake).await {
            Ok(connection) => connection?,
            Err(_) => return Err(LinkError::HandshakeTimeout { addr, after }),
        };
        match timeout_at(deadline, self.finished.send(connection)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(LinkError::Busy { addr }),
        }
    }

    async fn handshake(&self, mut stream: TcpStream, addr: SocketAddr) -> Result<Connection, LinkError> {
        let closed = |_: io::Error| LinkError::HandshakeClosed { addr };
        self.options.tuning.apply(&stream).map_err(closed)?;
        let socket = Socket::of(&stream).map_err(closed)?;
        let mut first = [0];
        match stream.peek(&mut first).await.map_err(closed)? {
            0 => Err(LinkError::HandshakeClosed { addr }),
            _ if first[0] == TLS_HANDSHAKE => self.tls(stream, socket, addr).await,
            _ if first[0] == PLAIN_PREAMBLE[0] => {
                let mut preamble = [0; PLAIN_PREAMBLE.len()];
                stream.read_exact(&mut preamble).await.map_err(closed)?;
                match (&preamble == PLAIN_PREAMBLE, self.options.plain) {
                    (true, true) => Ok(Connection::plain(stream, socket, addr, preamble.to_vec())),
                    (true, false) => Err(LinkError::PlainRefused { addr }),
                    (false, _) => Err(LinkError::NotDwcp { addr }),
                }
            }
            _ => Err(LinkError::NotDwcp { addr }),
        }
    }

    async fn tls(
        &self,
        stream: TcpStream,
        socket: Socket,
        addr: SocketAddr,
    ) -> Result<Connection, LinkError> {
        let acceptor = TlsAcceptor::from(self.identity.server());
        let stream = match acceptor.accept(stream).into_fallible().await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                let refusal = LinkError::of_handshake(addr, None, error);
                linger(stream).await;
                return Err(refusal);
            }
        };
        let session = stream.get_ref().1;
        if !tls::speaks_dwcp(session) {
            return Err(LinkError::Protocol { addr });
        }
        // A key that left the roster since the handshake began is no longer anybody's.
        let peer =
            tls::peer(session, &self.identity.peers().roster()).ok_or(LinkError::HandshakeClosed { addr })?;
        Connection::tls(TlsStream::Server(stream), socket, addr, peer, None)
    }
}

/// Handshakes under way, by source.
#[derive(Debug, Clone, Default)]
struct Pending(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Pending {
    fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().sum()
    }

    /// Counts one more for as long as the guard lives, unless one of the caps (in all, per source) is met.
    fn enter(&self, addr: SocketAddr, [all, per_source]: [usize; 2]) -> Result<PendingGuard, LinkError> {
        let source = source(addr.ip());
        let mut pending = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.values().sum::<usize>() >= all {
            return Err(LinkError::Flooded { addr, pending: all });
        }
        let here = pending.entry(source).or_default();
        if *here >= per_source {
            return Err(LinkError::Flooded { addr, pending: per_source });
        }
        *here += 1;
        Ok(PendingGuard { pending: self.clone(), source })
    }
}

struct PendingGuard {
    pending: Pending,
    source: IpAddr,
}

impl Drop for PendingGuard {
    fn drop(&mut self) {
        let mut pending = self.pending.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = pending.get_mut(&self.source) {
            *here -= 1;
            if *here == 0 {
                pending.remove(&self.source);
            }
        }
    }
}

/// Who counts as one source: whoever has one IPv6 address has the /64 around it.
fn source(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

/// The next QUIC handshake; none ever comes where there is no QUIC.
async fn incoming(gate: Option<&Gate>) -> Incoming {
    match gate {
        Some(gate) => gate.next().await,
        None => std::future::pending().await,
    }
}

/// QUIC beside TCP's listener, where it is wanted; otherwise why not, if that is no wish.
fn quic(
    listener: &TcpListener,
    identity: &Identity,
    options: &ListenOptions,
) -> Result<Gate, Option<LinkError>> {
    if !options.quic {
        return Err(None);
    }
    let addr = listener.local_addr().map_err(|error| LinkError::Lost(Arc::new(error)))?;
    let patience = Patience { idle: options.tuning.user_timeout, keepalive: options.tuning.keepalive };
    // A destination says little on data connections: which controller hardly matters.
    Ok(Gate::open(addr, identity, patience, Controller::default())?)
}

fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // A restarted agent must not wait for the last connections of the one before to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Lets the peer read the alert that says why it is refused: closing while bytes of its own are unread would reset the
/// connection, and the alert would be lost.
async fn linger(mut stream: TcpStream) {
    // Whatever goes wrong here, the peer was refused already.
    if stream.shutdown().await.is_ok() {
        let _ = timeout(LINGER, tokio::io::copy(&mut stream.take(MAX_LINGER), &mut tokio::io::sink())).await;
    }
}

fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
