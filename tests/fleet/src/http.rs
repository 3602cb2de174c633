//! As much HTTP/1.1 as the drill needs: one request at a time on a connection that stays open.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use dwcp_flags::{ANSWER_TIMEOUT, handshake_timeout};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;
use tokio_rustls::{Connect, TlsConnector};

/// The name in the server's certificate.
pub(crate) const HOST: &str = "api.novacron.io";

/// Bytes of an answer.
const MAX_ANSWER: usize = 8 << 20;
/// Headers of an answer.
const MAX_HEADERS: usize = 32;

/// A connection to the server.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TlsStream<TcpStream>,
    buffer: Vec<u8>,
    owed: Owed,
}

/// What a request that was given up has left behind.
#[derive(Debug, Clone, Copy)]
enum Owed {
    Nothing,
    /// Half a request: there is nothing to be done with this connection any more.
    Request,
    /// An answer, which is waited for until then.
    Answer(Instant),
}

/// A handshake under way, and how many in a row before it took too long.
#[derive(Default)]
pub(crate) struct Shaking {
    begun: Option<(Instant, Connect<TcpStream>)>,
    failures: u32,
}

impl fmt::Debug for Shaking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shaking until {:?}", self.begun.as_ref().map(|(end, _)| end))
    }
}

/// An answer.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) etag: String,
    pub(crate) cluster: String,
    pub(crate) body: Vec<u8>,
    /// The server ends the connection.
    pub(crate) close: bool,
}

impl Connection {
    /// Connects, and shakes hands. A handshake that is given up goes on with the next call, as an agent's does: `shaking` is
    /// where it waits. The connection comes from the address `from`: one address has not enough ports for a fleet, and long
    /// before they are used up the kernel takes long to find a free one.
    pub(crate) async fn open(
        from: Ipv4Addr,
        server: SocketAddr,
        tls: &Arc<ClientConfig>,
        shaking: &mut Shaking,
    ) -> Result<Self> {
        let begun = match shaking.begun.take().filter(|(end, _)| Instant::now() < *end) {
            Some(begun) => begun,
            None => {
                let socket = TcpSocket::new_v4()?;
                socket.bind((from, 0).into())?;
                let stream = socket.connect(server).await?;
                stream.set_nodelay(true)?;
                let name = ServerName::try_from(HOST)?;
                let end = Instant::now() + handshake_timeout(shaking.failures);
                shaking.failures = shaking.failures.saturating_add(1);
                (end, TlsConnector::from(Arc::clone(tls)).connect(name, stream))
            }
        };
        let (end, handshake) = shaking.begun.insert(begun);
        let stream = tokio::time::timeout_at(*end, handshake).await;
        shaking.begun = None;
        let stream = stream??;
        shaking.failures = 0;
        Ok(Connection { stream, buffer: Vec::new(), owed: Owed::Nothing })
    }

    /// Sends a request and waits for its answer. `headers` are whole lines. Where the request before was given up, its answer
    /// is waited for and passed over, as an agent does.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Result<Answer> {
        match self.owed {
            Owed::Nothing => {}
            Owed::Request => bail!("a request was given up half way"),
            Owed::Answer(end) => drop(tokio::time::timeout_at(end, self.answer()).await??),
        }
        let length =
            if method == "GET" { String::new() } else { format!("content-length: {}\r\n", body.len()) };
        let request = format!("{method} {path} HTTP/1.1\r\nhost: {HOST}\r\n{length}{headers}\r\n{body}");
        self.owed = Owed::Request;
        self.stream.write_all(request.as_bytes()).await?;
        self.stream.flush().await?;
        self.owed = Owed::Answer(Instant::now() + ANSWER_TIMEOUT);
        self.answer().await
    }

    /// The answer that is owed. What was read of it stays where this is given up.
    async fn answer(&mut self) -> Result<Answer> {
        let (mut answer, head, length) = loop {
            if let Some(parsed) = parse(&self.buffer)? {
                break parsed;
            }
            self.fill().await?;
        };
        while self.buffer.len() < head + length {
            self.fill().await?;
        }
        answer.body = self.buffer.split_off(head);
        self.buffer.clear();
        self.owed = Owed::Nothing;
        // One request at a time: what follows would be an answer to nothing.
        ensure!(answer.body.len() == length, "more than one answer");
        Ok(answer)
    }

    async fn fill(&mut self) -> Result<()> {
        ensure!(self.buffer.len() < MAX_ANSWER, "an answer without an end");
        let read = self.stream.read_buf(&mut self.buffer).await?;
        ensure!(read > 0, "the connection ended");
        Ok(())
    }
}

/// The answer without its body, where the body begins, and how long it is; `None` if the head is not complete.
fn parse(bytes: &[u8]) -> Result<Option<(Answer, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes)? else { return Ok(None) };
    let mut answer = Answer { status: response.code.context("no status")?, ..Answer::default() };
    let mut length = 0;
    for header in response.headers.iter() {
        let value = std::str::from_utf8(header.value)?;
        match header.name.to_ascii_lowercase().as_str() {
            "etag" => answer.etag = value.to_owned(),
            "content-length" => length = value.parse()?,
            "connection" => answer.close = value.eq_ignore_ascii_case("close"),
            "transfer-encoding" => bail!("transfer-encoding {value}"),
            name if name == dwcp_flags::poll::CLUSTER_ID => answer.cluster = value.to_owned(),
            _ => {}
        }
    }
    ensure!(length <= MAX_ANSWER, "an answer of {length} bytes");
    Ok(Some((answer, head, length)))
}
