//! Connections: TLS where it is configured, HTTP/1.1 with keep-alive, each within limits.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{Acceptor, NoServerSessionStorage};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::api::Shared;
use crate::api::request::Origin;
use crate::turns::Turns;

/// Connections at once: two for each node of a large fleet. More wait to be accepted.
const CONNECTIONS: usize = 20_000;
/// Files that are no connections: the database, its log, certificates. Where files are the limit, connections wait too.
const OTHER_FILES: u64 = 128;
/// Connections that the kernel completes before we accept them: a fleet comes back all at once. The kernel has a limit of
/// its own, `net.core.somaxconn`.
const BACKLOG: i32 = 16_384;
/// For how long a connection may be silent, or take over the head of a request. Nodes ask every second.
const SILENCE: Duration = Duration::from_secs(30);
/// For how long a handshake may take, the wait for its turn included. A node has given up before.
const HANDSHAKE: Duration = Duration::from_secs(8);
/// Handshakes that are computed at once; the wait for the other side's word is none. When a whole fleet comes back it asks
/// for more than the cores can do, and in between those that are through have to be answered, or they would be back at the
/// door. The others wait for their turn until *they* give up: to close them would only make them come again.
const HANDSHAKES: usize = 16;
/// Once somebody has waited this long for a handshake the newest go first: a node that has just come gives up after 1.6 s.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of a request's head, and what is read at once.
const HEAD: usize = 16 << 10;
/// A pause when no connection can be accepted, which is when there are no files left.
const BREATH: Duration = Duration::from_millis(50);

/// The server's certificate, which can be replaced while it serves; cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// Reads certificate and key.
    pub(crate) fn load(cert: &Path, key: &Path) -> Result<Self> {
        let config = Arc::new(RwLock::new(config(cert, key)?));
        Ok(Tls { cert: cert.to_owned(), key: key.to_owned(), config })
    }

    /// Reads them again; if they are wrong they stay as they were.
    pub(crate) fn reload(&self) -> Result<()> {
        let config = config(&self.cert, &self.key)?;
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = config;
        Ok(())
    }

    fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Listens at once, so that nobody is refused while the server before us has just left.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Connections at once for a process that may open so many files.
fn connections(files: u64) -> usize {
    let most = usize::try_from(files.saturating_sub(OTHER_FILES)).unwrap_or(usize::MAX);
    most.clamp(1, CONNECTIONS)
}

/// Accepts connections until `stopping`; then returns when those that it has have finished what they are at. `files` is how
/// many the process may open.
///
/// To be run `unconstrained`. To accept costs little beside what a connection asks for afterwards; pausing for all of them
/// after every few, it would let the kernel's queue run over, and whoever is dropped there comes again after a second only.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    shared: Arc<Shared>,
    files: u64,
    mut stopping: watch::Receiver<bool>,
) {
    let connections = connections(files);
    let permits = Arc::new(Semaphore::new(connections));
    let handshakes = Turns::new(HANDSHAKES, PATIENCE);
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopping.wait_for(|stopping| *stopping) => break,
        };
        let (stream, origin) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "no connection accepted");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        let connection = Connection {
            router: router.clone(),
            shared: Arc::clone(&shared),
            origin,
            stopping: stopping.clone(),
            handshakes: Arc::clone(&handshakes),
        };
        let tls = tls.as_ref().map(Tls::config);
        tokio::spawn(async move {
            connection.serve(stream, tls).await;
            drop(permit);
        });
    }
    // From here on the address is free for the next server.
    drop(listener);
    let all = u32::try_from(connections).unwrap_or(u32::MAX);
    let _ = permits.acquire_many(all).await;
}

struct Connection {
    router: Router,
    shared: Arc<Shared>,
    origin: SocketAddr,
    stopping: watch::Receiver<bool>,
    handshakes: Arc<Turns>,
}

impl Connection {
    async fn serve(self, stream: TcpStream, tls: Option<Arc<ServerConfig>>) {
        // Answers are small and complete: waiting for more would only cost time.
        let _ = stream.set_nodelay(true);
        let Some(tls) = tls else { return self.http(stream).await };
        match tokio::time::timeout(HANDSHAKE, self.handshake(stream, tls)).await {
            Ok(Ok(stream)) => self.http(stream).await,
            Ok(Err(error)) => debug!(origin = %self.origin, %error, "no TLS"),
            Err(_) => debug!(origin = %self.origin, "the handshake took too long"),
        }
    }

    async fn handshake(&self, stream: TcpStream, tls: Arc<ServerConfig>) -> io::Result<TlsStream<TcpStream>> {
        // Whoever connects and says nothing waits here, and takes no turn.
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        let turn = tokio::select! {
            biased;
            () = given_up(&hello.io) => return Err(io::Error::other("it gave up before its turn")),
            turn = self.handshakes.take() => turn,
        };
        // Here keys are made and the certificate's is used; what follows is next to nothing, and is the other side's time.
        let handshake = hello.into_stream(tls);
        drop(turn);
        handshake.await
    }

    async fn http(mut self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let counts = &self.shared.counts.connections;
        counts.fetch_add(1, Ordering::Relaxed);
        let (router, origin) = (self.router, Origin(self.origin));
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let mut request: Request = request.map(Body::new);
            request.extensions_mut().insert(origin);
            router.clone().oneshot(request)
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(SILENCE)
            .max_buf_size(HEAD)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = std::pin::pin!(connection);
        let mut ended = None;
        tokio::select! {
            result = connection.as_mut() => ended = Some(result),
            _ = self.stopping.wait_for(|stopping| *stopping) => {}
        }
        let ended = match ended {
            Some(ended) => ended,
            None => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            debug!(origin = %self.origin, %error, "the connection broke");
        }
        counts.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits until the other side has closed the connection, which is to say nothing more after its first word.
async fn given_up(stream: &TcpStream) {
    match stream.peek(&mut [0]).await {
        Ok(0) | Err(_) => {}
        // It has more to say, so it is there; behind that nothing can be seen.
        Ok(_) => std::future::pending().await,
    }
}

/// TLS 1.3 for clients without certificates: nodes sign their reports, operators have tokens.
fn config(cert: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    let chain = CertificateDer::pem_file_iter(cert)
        .and_then(|certificates| certificates.collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("certificate {}", cert.display()))?;
    let secret = PrivateKeyDer::from_pem_file(key).with_context(|| format!("key {}", key.display()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(chain, secret)
        .with_context(|| format!("{} and {} do not fit together", cert.display(), key.display()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn connections_leave_files_for_the_rest() {
        assert_eq!(connections(1024), 896);
        assert_eq!(connections(1 << 20), CONNECTIONS);
        assert_eq!(connections(0), 1);
    }

    #[tokio::test]
    async fn who_hangs_up_is_noticed_and_who_waits_is_not_disturbed() {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        let mut gone = std::pin::pin!(given_up(&server));
        tokio::select! {
            biased;
            () = &mut gone => panic!("it is still there"),
            () = tokio::task::yield_now() => {}
        }
        client.shutdown().await.unwrap();
        gone.await;
    }
}
