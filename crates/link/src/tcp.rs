//! Tuning a TCP connection, and measuring connections.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;

use socket2::{Domain, SockRef, Socket as Socket2, TcpKeepalive, Type};
use tokio::net::TcpStream;

use crate::quic::Ends;
use crate::tcp_info::{queued, set_receive_low_water, tcp_info};

/// Settings of a TCP connection. `TCP_NODELAY` is always on: messages are written whole.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// `TCP_USER_TIMEOUT`: how long what was sent may stay unacknowledged before the connection counts as lost.
    pub user_timeout: Duration,
    /// How long a connection may be silent before the kernel asks whether the peer is still there, and how often it
    /// asks again; whole seconds. It gives up after `user_timeout`.
    pub keepalive: Duration,
    /// `TCP_NOTSENT_LOWAT`: bytes that may wait unsent in the kernel before a write has to wait. `None` leaves it to
    /// the size of the send buffer, which is best for throughput and worst for switching over quickly.
    pub notsent_lowat: Option<u32>,
    /// `TCP_CONGESTION`: how the kernel finds out what the network carries, by its name. `None` leaves it to the system, and so does a
    /// kernel that lacks it or does not allow it: see [`can_use`].
    pub congestion: Option<&'static str>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            user_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            notsent_lowat: Some(256 << 10),
            congestion: None,
        }
    }
}

impl Tuning {
    pub(crate) fn apply(&self, stream: &TcpStream) -> io::Result<()> {
        let socket = SockRef::from(stream);
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))?;
        let keepalive = self.keepalive.max(Duration::from_secs(1));
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(keepalive).with_interval(keepalive))?;
        if let Some(bytes) = self.notsent_lowat {
            socket.set_tcp_notsent_lowat(bytes)?;
        }
        if let Some(name) = self.congestion {
            // The connection is as good without; whoever wants to know has asked before.
            let _ = socket.set_tcp_congestion(name.as_bytes());
        }
        Ok(())
    }
}

/// Whether connections of this process can have this congestion control.
///
/// # Errors
/// They cannot: the kernel lacks it, or `net.ipv4.tcp_allowed_congestion_control` does not name it.
pub fn can_use(congestion: &str) -> io::Result<()> {
    let socket = Socket2::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_tcp_congestion(congestion.as_bytes())
}

/// The socket of a connection, held by both of its halves: gauges reach it for as long as one of them lives.
#[derive(Debug, Clone)]
pub(crate) struct Socket(Arc<OwnedFd>);

impl Socket {
    /// A second descriptor of the same socket, since the stream itself disappears into TLS.
    pub(crate) fn of(stream: &TcpStream) -> io::Result<Self> {
        Ok(Socket(Arc::new(stream.as_fd().try_clone_to_owned()?)))
    }

    pub(crate) fn gauge(&self) -> Gauge {
        Gauge(Measured::Tcp(Arc::downgrade(&self.0)))
    }
}

/// Bytes of a TLS record on the wire at most, as RFC 8446 has it: 2^14 and 256 of content, five of header.
const MAX_RECORD: usize = (1 << 14) + 256 + 5;
/// Bytes that a reader lets come together at most: far from what the kernel keeps for a connection, so that its peer is never held up.
const MAX_AWAITED: usize = 128 << 10;

/// Measures and adjusts a connection while others read from and write to it. Does not keep it open. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gauge(Measured);

#[derive(Debug, Clone)]
enum Measured {
    Nothing,
    Tcp(Weak<OwnedFd>),
    Quic(Weak<Ends>),
}

impl Gauge {
    /// A gauge of what has no socket: it measures nothing.
    pub(crate) fn none() -> Self {
        Gauge(Measured::Nothing)
    }

    /// The gauge of a QUIC connection.
    pub(crate) fn of_quic(ends: &Arc<Ends>) -> Self {
        Gauge(Measured::Quic(Arc::downgrade(ends)))
    }

    fn socket(&self) -> Option<Arc<OwnedFd>> {
        match &self.0 {
            Measured::Tcp(socket) => socket.upgrade(),
            _ => None,
        }
    }

    /// What is known now; `None` for a pipe, and once both halves are gone.
    pub fn sample(&self) -> Option<Sample> {
        if let Measured::Quic(ends) = &self.0 {
            return Some(ends.upgrade()?.sample());
        }
        let socket = self.socket()?;
        let info = tcp_info(socket.as_fd()).ok()?;
        let queued = queued(socket.as_fd()).ok()?;
        let micros = |us: u32| Duration::from_micros(us.into());
        Some(Sample {
            rtt: micros(info.tcpi_rtt),
            rtt_var: Some(micros(info.tcpi_rttvar)),
            min_rtt: micros(info.tcpi_min_rtt),
            queued: Some(queued),
            unsent: Some(info.tcpi_notsent_bytes),
            delivery_rate: info.tcpi_delivery_rate,
            retransmits: info.tcpi_total_retrans,
            congestion_window: u64::from(info.tcpi_snd_cwnd).saturating_mul(info.tcpi_snd_mss.into()),
            bytes_acked: info.tcpi_bytes_acked,
            bytes_received: info.tcpi_bytes_received,
            strained: Duration::from_micros(
                info.tcpi_busy_time
                    .saturating_sub(info.tcpi_rwnd_limited)
                    .saturating_sub(info.tcpi_sndbuf_limited),
            ),
        })
    }

    /// Whether the same bytes were sent again at least twice in vain, and each further try waits twice as long: over a link
    /// that is back the connection may then stay silent for as long again as the link was away. QUIC does not say so; there it is as much
    /// time without an acknowledgement as two tries take. `false` without a socket.
    pub fn backs_off(&self) -> bool {
        if let Measured::Quic(ends) = &self.0 {
            return ends.upgrade().is_some_and(|ends| ends.backs_off());
        }
        let info = self.socket().and_then(|socket| tcp_info(socket.as_fd()).ok());
        info.is_some_and(|info| info.tcpi_backoff >= 2)
    }

    /// Sets `TCP_NOTSENT_LOWAT`; `None` goes back to the system's default. Nothing happens without a TCP socket: what a QUIC connection
    /// holds unsent follows its congestion window.
    pub fn set_notsent_lowat(&self, bytes: Option<u32>) -> io::Result<()> {
        match self.socket() {
            // Zero is the kernel's word for "use the sysctl".
            Some(socket) => SockRef::from(&*socket).set_tcp_notsent_lowat(bytes.unwrap_or(0)),
            None => Ok(()),
        }
    }

    /// Lets a reader that wants so many bytes more sleep until most of them are here, however small the packets are that they come in. To be
    /// said before each wait, of bytes that come for certain: the reader of a connection whose peer says less waits for ever. Nothing happens
    /// without a TCP socket.
    pub fn awaits(&self, bytes: usize) {
        // A TLS connection may hold the beginning of a record; what is missing of it is less than what is wanted then.
        let most = bytes.saturating_sub(MAX_RECORD).clamp(1, MAX_AWAITED);
        if let Some(socket) = self.socket() {
            // A wish only: without it the reader is woken more often.
            let _ = set_receive_low_water(socket.as_fd(), most as u32);
        }
    }

    /// The congestion control in use; `None` without a socket.
    pub fn congestion(&self) -> Option<String> {
        if let Measured::Quic(ends) = &self.0 {
            return Some(ends.upgrade()?.controller().name().to_owned());
        }
        let name = SockRef::from(&*self.socket()?).tcp_congestion().ok()?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(String::from_utf8_lossy(name).into_owned())
    }

    /// Ends the connection at once, without a goodbye: whoever waits on it here or at the peer meets an end or an
    /// error. Nothing happens without a socket.
    pub fn cut(&self) {
        match &self.0 {
            Measured::Nothing => {}
            Measured::Tcp(socket) => {
                if let Some(socket) = socket.upgrade() {
                    // Already disconnected is as good as cut.
                    let _ = SockRef::from(&*socket).shutdown(Shutdown::Both);
                }
            }
            Measured::Quic(ends) => {
                if let Some(ends) = ends.upgrade() {
                    ends.cut();
                }
            }
        }
    }
}

/// Bytes that were ever written to a TCP socket, by whichever process: those that the other end's kernel has, and those on their way. A
/// socket counts its own opening as one byte, or not, by who connected; take the difference to a figure of before the first write.
///
/// # Errors
/// It is no TCP socket.
pub fn ever_written(socket: BorrowedFd<'_>) -> io::Result<u64> {
    // What is acknowledged between the two questions is counted twice or not at all: ask until nothing moved.
    loop {
        let before = tcp_info(socket)?.tcpi_bytes_acked;
        let queued = queued(socket)?;
        if tcp_info(socket)?.tcpi_bytes_acked == before {
            return Ok(before + u64::from(queued));
        }
    }
}

/// A connection at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Its mean deviation; not known over QUIC.
    pub rtt_var: Option<Duration>,
    /// The least round-trip time seen of late; over QUIC, ever.
    pub min_rtt: Duration,
    /// Bytes written and not yet acknowledged by the peer's kernel, `unsent` included; not known over QUIC.
    pub queued: Option<u32>,
    /// Bytes written and not sent at all yet; not known over QUIC.
    pub unsent: Option<u32>,
    /// The most recent rate at which the peer acknowledged, bytes a second. Over QUIC its packets' headers count.
    pub delivery_rate: u64,
    /// Segments sent more than once, since the start; over QUIC, packets lost.
    pub retransmits: u32,
    /// Bytes that may be under way.
    pub congestion_window: u64,
    /// Bytes that the peer acknowledged, since the start. Over QUIC its packets' headers count.
    pub bytes_acked: u64,
    /// Bytes received, since the start; over QUIC, UDP payload.
    pub bytes_received: u64,
    /// How long there was something to send and only the network held it up, since the start.
    pub strained: Duration,
}
