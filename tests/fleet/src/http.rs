//! As much HTTP/1.1 as the drill needs: one request at a time on a connection that stays open.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

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
    /// Connects, and shakes hands.
    pub(crate) async fn open(server: SocketAddr, tls: &Arc<ClientConfig>) -> Result<Self> {
        let stream = TcpStream::connect(server).await?;
        stream.set_nodelay(true)?;
        let stream = TlsConnector::from(Arc::clone(tls)).connect(ServerName::try_from(HOST)?, stream).await?;
        Ok(Connection { stream, buffer: Vec::new() })
    }

    /// Sends a request and waits for its answer. `headers` are whole lines.
    pub(crate) async fn send(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &str,
    ) -> Result<Answer> {
        let length =
            if method == "GET" { String::new() } else { format!("content-length: {}\r\n", body.len()) };
        let request = format!("{method} {path} HTTP/1.1\r\nhost: {HOST}\r\n{length}{headers}\r\n{body}");
        self.stream.write_all(request.as_bytes()).await?;
        self.stream.flush().await?;
        self.buffer.clear();
        let (mut answer, head, length) = loop {
            self.fill().await?;
            if let Some(parsed) = parse(&self.buffer)? {
                break parsed;
            }
        };
        while self.buffer.len() < head + length {
            self.fill().await?;
        }
        answer.body = self.buffer.split_off(head);
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
