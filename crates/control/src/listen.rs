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

/// Connections at once: two for each node of a large fleet. More wait to be accepted.
const CONNECTIONS: usize = 20_000;
/// Connections that the kernel completes before we accept them: a fleet comes back all at once. The kernel has a limit of
/// its own, `net.core.somaxconn`.
const BACKLOG: i32 = 16_384;
/// For how long a connection may be silent, or take over the head of a request. Nodes ask every second.
const SILENCE: Duration = Duration::from_secs(30);
/// For how long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Handshakes at once. A fleet that comes back all at once asks for more than the cores can do; those that are begun must
/// end while their node still waits, or all the work is for nothing.
const HANDSHAKES: usize = 256;
/// For how long a connection waits for its handshake. A node gives up a poll after 0.8 s, so later it is not worth the work.
const PATIENCE: Duration = Duration::from_millis(500);
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

/// Accepts connections until `stopping`; then returns when those that it has have finished what they are at.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    router: Router,
    shared: Arc<Shared>,
    mut stopping: watch::Receiver<bool>,
) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
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
    let all = u32::try_from(CONNECTIONS).unwrap_or(u32::MAX);
    let _ = permits.acquire_many(all).await;
}

struct Connection {
    router: Router,
    shared: Arc<Shared>,
    origin: SocketAddr,
    stopping: watch::Receiver<bool>,
    handshakes: Arc<Semaphore>,
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
        let turn = tokio::time::timeout(PATIENCE, self.handshakes.acquire()).await;
        let _turn = turn.map_err(|_| io::Error::other("too many handshakes at once"))?;
        hello.into_stream(tls).await
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
