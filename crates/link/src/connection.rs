//! One connection to a peer, of whatever kind.

use std::fmt;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use dwcp_proto::PeerKey;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_rustls::TlsStream;

use crate::error::{Dialled, LinkError, of_quic_stream};
use crate::quic::{Ends, Receiving, Sending};
use crate::tcp::{Gauge, Socket};
use crate::tls;

/// How the bytes of a connection travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TLS 1.3 over TCP, both ends authenticated.
    Tls {
        /// The negotiated cipher suite, as IANA writes it.
        suite: &'static str,
    },
    /// QUIC, whose TLS 1.3 has authenticated both ends. Which cipher suite it chose, of those that TLS would, its library does not say.
    Quic,
    /// TCP as it is.
    Plain,
    /// Within this process.
    Pipe,
}

impl Kind {
    /// One word for logs, metrics and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Tls { .. } => "tls",
            Kind::Quic => "quic",
            Kind::Plain => "plain",
            Kind::Pipe => "pipe",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Tls { suite } => write!(f, "tls ({suite})"),
            other => f.write_str(other.name()),
        }
    }
}

/// A two-way stream of bytes to a peer. Read and written as it is, or split in two for two tasks.
///
/// A write may keep its last bytes back: flush before waiting for an answer. `shutdown` says goodbye; a TLS or QUIC peer whose
/// stream ends without it reads [`LinkError::CutOff`], while on a plain connection an end is just an end. What was written
/// before both halves are dropped is still sent, over QUIC for two seconds at most.
pub struct Connection {
    reader: Reader,
    writer: Writer,
    kind: Kind,
    peer: Option<PeerKey>,
    exporter: Option<[u8; 32]>,
    addr: Option<SocketAddr>,
}

impl Connection {
    /// What travels underneath.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The key that the peer has proved to hold. `None` if plain: nothing was proved.
    pub fn peer(&self) -> Option<&PeerKey> {
        self.peer.as_ref()
    }

    /// A secret that both ends of this connection share with nobody else, for binding messages to it. `None` if plain.
    pub fn exporter(&self) -> Option<[u8; 32]> {
        self.exporter
    }

    /// The address of the other end; `None` for a pipe.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.addr
    }

    /// A handle that measures and adjusts the connection while it is in use.
    pub fn gauge(&self) -> Gauge {
        self.reader.gauge()
    }

    /// The two directions, to be used at once. The connection closes when both are dropped; a plain one tells the peer
    /// of its end already when the writer is.
    pub fn into_split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }

    /// Over an authenticated handshake; `dialled` is set where we are the client.
    pub(crate) fn tls(
        stream: TlsStream<TcpStream>,
        socket: Socket,
        addr: SocketAddr,
        peer: PeerKey,
        dialled: Option<Dialled>,
    ) -> Result<Self, LinkError> {
        let (_, session) = stream.get_ref();
        let suite = session.negotiated_cipher_suite().and_then(|suite| suite.suite().as_str());
        let kind = Kind::Tls { suite: suite.unwrap_or("unknown") };
        let exporter = match &stream {
            TlsStream::Client(client) => {
                client.get_ref().1.export_keying_material([0; 32], tls::EXPORTER, None)
            }
            TlsStream::Server(server) => {
                server.get_ref().1.export_keying_material([0; 32], tls::EXPORTER, None)
            }
        };
        let exporter = Some(exporter.map_err(LinkError::Tls)?);
        let (read, write) = tokio::io::split(stream);
        let reader =
            Reader { half: ReadHalf::Tls(read), socket: Some(Measurable::Tcp(socket.clone())), dialled };
        let writer = Writer { half: WriteHalf::Tls(write), _socket: Some(Measurable::Tcp(socket)) };
        Ok(Connection { reader, writer, kind, peer: Some(peer), exporter, addr: Some(addr) })
    }

    /// Over TCP as it is; `read` holds bytes that were taken off the stream already and belong to the reader.
    pub(crate) fn plain(stream: TcpStream, socket: Socket, addr: SocketAddr, read: Vec<u8>) -> Self {
        let (tcp, write) = stream.into_split();
        let half = ReadHalf::Plain { read: io::Cursor::new(read), tcp };
        Connection {
            reader: Reader { half, socket: Some(Measurable::Tcp(socket.clone())), dialled: None },
            writer: Writer { half: WriteHalf::Plain(write), _socket: Some(Measurable::Tcp(socket)) },
            kind: Kind::Plain,
            peer: None,
            exporter: None,
            addr: Some(addr),
        }
    }

    /// A stream of a QUIC connection; `dialled` is set where we are the client.
    pub(crate) fn quic(
        ends: Arc<Ends>,
        sending: Sending,
        receiving: Receiving,
        addr: SocketAddr,
        peer: PeerKey,
        exporter: [u8; 32],
        dialled: Option<Dialled>,
    ) -> Self {
        let socket = Some(Measurable::Quic(ends));
        Connection {
            reader: Reader { half: ReadHalf::Quic(receiving), socket: socket.clone(), dialled },
            writer: Writer { half: WriteHalf::Quic(sending), _socket: socket },
            kind: Kind::Quic,
            peer: Some(peer),
            exporter: Some(exporter),
            addr: Some(addr),
        }
    }

    /// One end of a pipe.
    pub(crate) fn pipe(stream: DuplexStream, peer: Option<PeerKey>, exporter: [u8; 32]) -> Self {
        let (read, write) = tokio::io::split(stream);
        Connection {
            reader: Reader { half: ReadHalf::Pipe(read), socket: None, dialled: None },
            writer: Writer { half: WriteHalf::Pipe(write), _socket: None },
            kind: Kind::Pipe,
            peer,
            exporter: Some(exporter),
            addr: None,
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Connection");
        out.field("kind", &self.kind)
            .field("peer", &self.peer)
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().writer).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().writer).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.writer.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writer).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().writer).poll_shutdown(cx)
    }
}

/// The receiving direction of a [`Connection`].
pub struct Reader {
    half: ReadHalf,
    socket: Option<Measurable>,
    /// Set if we dialled over TLS or QUIC: then the refusal of our key arrives here.
    dialled: Option<Dialled>,
}

/// What a gauge looks at, held by both halves.
#[derive(Clone)]
enum Measurable {
    Tcp(Socket),
    Quic(Arc<Ends>),
}

impl Reader {
    /// As [`Connection::gauge`].
    pub fn gauge(&self) -> Gauge {
        match &self.socket {
            Some(Measurable::Tcp(socket)) => socket.gauge(),
            Some(Measurable::Quic(ends)) => Gauge::of_quic(ends),
            None => Gauge::none(),
        }
    }

    /// Lets the peer send as far ahead as a long link needs. To be said once the connection is known to carry data: until then a QUIC peer
    /// can make us hold little. TCP's buffers are the kernel's to bound.
    pub fn widen(&self) {
        if let Some(Measurable::Quic(ends)) = &self.socket {
            ends.widen();
        }
    }
}

enum ReadHalf {
    Tls(tokio::io::ReadHalf<TlsStream<TcpStream>>),
    Quic(Receiving),
    Plain { read: io::Cursor<Vec<u8>>, tcp: OwnedReadHalf },
    Pipe(tokio::io::ReadHalf<DuplexStream>),
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match &mut this.half {
            ReadHalf::Tls(tls) => Pin::new(tls).poll_read(cx, buf).map_err(|error| {
                let refusal = this.dialled.as_ref().and_then(|dialled| dialled.refusal(&error));
                refusal.map_or(error, io::Error::from)
            }),
            ReadHalf::Quic(quic) => Pin::new(quic)
                .poll_read(cx, buf)
                .map_err(|error| of_quic_stream(error, this.dialled.as_ref())),
            ReadHalf::Plain { read, .. } if read.position() < read.get_ref().len() as u64 => {
                Pin::new(read).poll_read(cx, buf)
            }
            ReadHalf::Plain { tcp, .. } => Pin::new(tcp).poll_read(cx, buf),
            ReadHalf::Pipe(pipe) => Pin::new(pipe).poll_read(cx, buf),
        }
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Reader")
    }
}

/// The sending direction of a [`Connection`].
pub struct Writer {
    half: WriteHalf,
    _socket: Option<Measurable>,
}

enum WriteHalf {
    Tls(tokio::io::WriteHalf<TlsStream<TcpStream>>),
    Quic(Sending),
    Plain(OwnedWriteHalf),
    Pipe(tokio::io::WriteHalf<DuplexStream>),
}

impl Writer {
    fn stream(self: Pin<&mut Self>) -> Pin<&mut (dyn AsyncWrite + Unpin)> {
        Pin::new(match &mut self.get_mut().half {
            WriteHalf::Tls(tls) => tls,
            WriteHalf::Quic(quic) => quic,
            WriteHalf::Plain(tcp) => tcp,
            WriteHalf::Pipe(pipe) => pipe,
        })
    }
}

impl AsyncWrite for Writer {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.half {
            WriteHalf::Tls(tls) => tls.is_write_vectored(),
            WriteHalf::Quic(quic) => quic.is_write_vectored(),
            WriteHalf::Plain(tcp) => tcp.is_write_vectored(),
            WriteHalf::Pipe(pipe) => pipe.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Writer")
    }
}
