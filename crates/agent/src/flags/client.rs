//! One endpoint of a flag server: a connection that is kept from poll to poll, and requests with an end.
//!
//! A poll is worth nothing after its time, so there are no queues, no redirects and no pool: one request at a time on one
//! connection, HTTP/1.1, a new connection whenever anything at all went wrong with the last.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::poll::MAX_ANSWER;
use dwcp_flags::{ANSWER_TIMEOUT, POLL_TIMEOUT, handshake_timeout};
use dwcp_migrate::{Blame, Failure};
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;
use tokio_rustls::{Connect, TlsConnector};

use crate::config::Url;

/// Bytes of an answer's head.
const MAX_HEAD: usize = 16 << 10;
/// Lines of an answer's head.
const MAX_HEADERS: usize = 64;
/// Addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;
/// Bytes of a file of certificates: some ten times Debian's.
const MAX_CA: u64 = 4 << 20;

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    /// GET or POST.
    pub(super) method: Method,
    /// Below the endpoint's base.
    pub(super) path: String,
    /// All but `host`.
    pub(super) headers: Vec<(HeaderName, HeaderValue)>,
    /// Empty for none.
    pub(super) body: String,
}

/// What came back, whole.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Why nothing did.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreachable {
    #[error("no answer within {} ms", POLL_TIMEOUT.as_millis())]
    Timeout,
    #[error("cannot find its address: {0}")]
    Name(io::Error),
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    #[error("no TLS: {0}")]
    Tls(io::Error),
    #[error("no HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("an answer of more than {MAX_ANSWER} bytes")]
    TooLong,
}

/// One endpoint.
pub(super) struct Endpoint {
    url: Url,
    dial: Dial,
    connection: Option<Connection>,
}

enum Dial {
    Network {
        resolver: Resolver,
        tls: Option<TlsConnector>,
        /// A handshake that has outlasted its poll, and when it has to end.
        shaking: Option<(Instant, Box<Connect<TcpStream>>)>,
        /// How many in a row did not come to an end.
        failures: u32,
    },
    /// A wire within the process, for tests under a simulated clock.
    #[cfg(test)]
    Within(tokio::sync::mpsc::UnboundedSender<tokio::io::DuplexStream>),
}

impl Endpoint {
    /// An endpoint on the network; `tls` is needed where the URL says https.
    pub(super) fn new(url: Url, tls: Option<&Arc<ClientConfig>>) -> Self {
        let tls = tls.filter(|_| url.tls).map(|config| TlsConnector::from(Arc::clone(config)));
        let dial = Dial::Network { resolver: Resolver::default(), tls, shaking: None, failures: 0 };
        Endpoint { url, dial, connection: None }
    }

    /// An endpoint that is reached by handing over the far end of a pipe.
    #[cfg(test)]
    pub(super) fn within(
        url: Url,
        listener: tokio::sync::mpsc::UnboundedSender<tokio::io::DuplexStream>,
    ) -> Self {
        Endpoint { url, dial: Dial::Within(listener), connection: None }
    }

    /// Where it is.
    pub(super) fn url(&self) -> &Url {
        &self.url
    }

    /// Asks, and waits for the whole answer: [`POLL_TIMEOUT`] at most, the making of a connection included. Where that is too
    /// short the next call goes on with the same handshake, see [`handshake_timeout`], or on the same connection, see
    /// [`ANSWER_TIMEOUT`]: a server that is busy is not made busier.
    pub(super) async fn ask(&mut self, ask: &Ask) -> Result<Answer, Unreachable> {
        match tokio::time::timeout(POLL_TIMEOUT, self.try_both(ask)).await {
            Ok(answer) => answer.inspect_err(|_| self.connection = None),
            Err(_) => Err(Unreachable::Timeout),
        }
    }

    /// On the old connection, then on a new one: a server that restarted has closed the old one, which is no failure.
    async fn try_both(&mut self, ask: &Ask) -> Result<Answer, Unreachable> {
        if let Some(connection) = self.connection.as_mut().filter(|connection| !connection.sender.is_closed())
        {
            match self.url.send(connection, ask).await {
                Err(Unreachable::Http(error)) if !error.is_parse() => {}
                // The answer before, which it owed.
                Err(Unreachable::Timeout) => {}
                answer => return answer,
            }
        }
        // The old one goes before the new one comes: there is never more than one.
        self.connection = None;
        let connection = match &mut self.dial {
            Dial::Network { resolver, tls: Some(tls), shaking, failures } => {
                // As with connections: one that is too old goes before a new one comes.
                let begun = match shaking.take().filter(|(end, _)| Instant::now() < *end) {
                    Some(begun) => begun,
                    None => {
                        let name = ServerName::try_from(self.url.host.clone())
                            .map_err(|error| Unreachable::Tls(io::Error::other(error)))?;
                        let stream = resolver.connect(&self.url).await?;
                        let end = Instant::now() + handshake_timeout(*failures);
                        *failures = failures.saturating_add(1);
                        (end, Box::new(tls.connect(name, stream)))
                    }
                };
                let (end, handshake) = shaking.insert(begun);
                // Where the poll ends before it does, it goes on with the next one.
                let stream = tokio::time::timeout_at(*end, handshake).await;
                *shaking = None;
                let stream = stream.map_err(|_| Unreachable::Timeout)?.map_err(Unreachable::Tls)?;
                *failures = 0;
                Connection::over(stream).await?
            }
            Dial::Network { resolver, tls: None, .. } => {
                Connection::over(resolver.connect(&self.url).await?).await?
            }
            #[cfg(test)]
            Dial::Within(listener) => {
                let (near, far) = tokio::io::duplex(64 << 10);
                let refused = |_| Unreachable::Connect(io::ErrorKind::ConnectionRefused.into());
                listener.send(far).map_err(refused)?;
                Connection::over(near).await?
            }
        };
        let connection = self.connection.insert(connection);
        self.url.send(connection, ask).await
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({})", self.url)
    }
}

impl Url {
    async fn send(&self, connection: &mut Connection, ask: &Ask) -> Result<Answer, Unreachable> {
        if let Some((end, owed)) = &mut connection.owed {
            // It comes too late to be worth anything, but while it comes the connection is good.
            let late = tokio::time::timeout_at(*end, owed).await;
            connection.owed = None;
            late.map_err(|_| Unreachable::Timeout)??;
        }
        let mut request = Request::new(ask.body.clone());
        *request.method_mut() = ask.method.clone();
        // Both halves were checked when they were read; a path that is none asks for `/`, which no server answers as ours.
        *request.uri_mut() = format!("{}{}", self.base, ask.path).parse().unwrap_or_default();
        let headers = request.headers_mut();
        headers.extend(ask.headers.iter().cloned());
        if let Ok(host) = HeaderValue::from_str(self.authority()) {
            headers.insert(HOST, host);
        }
        connection.sender.ready().await?;
        let head = connection.sender.send_request(request);
        let answer = async {
            let (head, body) = head.await?.into_parts();
            Ok(Answer { status: head.status, headers: head.headers, body: read(body).await? })
        };
        let (_, owed) = connection.owed.insert((Instant::now() + ANSWER_TIMEOUT, Box::pin(answer)));
        let answer = owed.await;
        connection.owed = None;
        answer
    }
}

/// A connection and the task that drives it, which ends with it.
struct Connection {
    sender: SendRequest<String>,
    task: AbortHandle,
    /// The answer to a request that was given up, and until when it is waited for.
    owed: Option<(Instant, Owed)>,
}

type Owed = Pin<Box<dyn Future<Output = Result<Answer, Unreachable>> + Send>>;

impl Connection {
    async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Self, Unreachable> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await?;
        // Whatever ends it, the sender says so at the next request.
        let task = tokio::spawn(async move { drop(connection.await) }).abort_handle();
        Ok(Connection { sender, task, owed: None })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The body, unless it is too long.
async fn read(mut body: Incoming) -> Result<Vec<u8>, Unreachable> {
    let mut bytes = Vec::new();
    if body.size_hint().lower() > MAX_ANSWER as u64 {
        return Err(Unreachable::TooLong);
    }
    while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
        if let Ok(data) = frame?.into_data() {
            if bytes.len() + data.len() > MAX_ANSWER {
                return Err(Unreachable::TooLong);
            }
            bytes.extend_from_slice(&data);
        }
    }
    Ok(bytes)
}

/// The addresses of a name. A lookup cannot be called off, so there is never more than one under way.
#[derive(Default)]
struct Resolver {
    lookup: Option<JoinHandle<io::Result<Vec<SocketAddr>>>>,
    /// What the last good lookup found.
    known: Vec<SocketAddr>,
    /// Which of them comes first: the next one after each attempt, since one that hangs takes all the time there is.
    first: usize,
}

impl Resolver {
    async fn connect(&mut self, url: &Url) -> Result<TcpStream, Unreachable> {
        self.look_up(&url.host, url.port).await?;
        let mut failure = io::Error::from(io::ErrorKind::NotFound);
        for _ in 0..self.known.len() {
            let address = self.known[self.first % self.known.len()];
            self.first = self.first.wrapping_add(1);
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // The next connection begins with the address that worked.
                    self.first = self.first.wrapping_sub(1);
                    stream.set_nodelay(true).map_err(Unreachable::Connect)?;
                    return Ok(stream);
                }
                Err(error) => failure = error,
            }
        }
        Err(Unreachable::Connect(failure))
    }

    async fn look_up(&mut self, host: &str, port: u16) -> Result<(), Unreachable> {
        let lookup = self.lookup.get_or_insert_with(|| {
            let host = host.to_owned();
            tokio::spawn(async move {
                Ok(tokio::net::lookup_host((host, port)).await?.take(MAX_ADDRESSES).collect())
            })
        });
        let found = lookup.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        self.lookup = None;
        match found {
            Ok(addresses) if !addresses.is_empty() => self.known = addresses,
            // An address that was right is better than none.
            _ if !self.known.is_empty() => {}
            Ok(_) => return Err(Unreachable::Name(io::ErrorKind::NotFound.into())),
            Err(error) => return Err(Unreachable::Name(error)),
        }
        Ok(())
    }
}

/// TLS towards a flag server: 1.3, with certificates from this file.
pub(super) fn tls(ca: &Path) -> Result<Arc<ClientConfig>, Failure> {
    let fail = |what: String| {
        let message = format!("[flags] ca {}: {what}", ca.display());
        Failure::new(
            "flag_ca",
            Blame::Operator,
            message,
            "name a PEM file with the certificates of the authority",
        )
    };
    let size = std::fs::metadata(ca).map_err(|error| fail(error.to_string()))?.len();
    if size > MAX_CA {
        return Err(fail(format!("{size} bytes are too many")));
    }
    let pem = std::fs::read(ca).map_err(|error| fail(error.to_string()))?;
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().map_err(|e| fail(e.to_string()))?;
    let mut roots = RootCertStore::empty();
    // A system's collection may hold one that is too odd for us; the others still count.
    if roots.add_parsable_certificates(certificates).0 == 0 {
        return Err(fail("it holds no certificate".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| fail(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// What a server asks for with `retry-after`, in seconds; dates are passed over.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(hyper::header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}
