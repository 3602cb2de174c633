//! The one stream of a QUIC connection, in halves that behave as those of TLS over TCP.
//!
//! # States
//! ```text
//! both halves ── one dropped ──► one half ── the other dropped ──► parting ── what was written is acknowledged, the peer
//!      │                             │                                │       has closed, or two seconds ──► closed
//!      └──────────── cut ────────────┴──────────── cut ───────────────┴──► closed
//! ```
//! - Only `shutdown` ends the stream; it is the goodbye. A stream that is dropped without it ends with its connection, which
//!   the peer reads as cut off. (A `SendStream` ends its stream when it is dropped: so none is dropped before the connection is closed.)
//! - QUIC forgets what is unacknowledged once a connection closes. So the connection outlives its halves until it is acknowledged,
//!   as in the kernel with TCP: a refusal must arrive though nobody waits here for that.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use quinn::{Connection, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::figures::Figures;
use super::{Controller, STREAM_WINDOW, code};
use crate::tcp::Sample;

/// How long what was written before the end may take to be acknowledged: a few round trips of any line.
const PARTING: Duration = Duration::from_secs(2);
/// The connection is closed after its stream's goodbye.
const GOODBYE: u8 = 0;
/// The connection is closed without one.
const CUT: u8 = 1;
/// Bytes that may wait unsent beyond what congestion control lets go, as TCP connections have it: enough to keep the connection busy, few
/// enough that a chunk is soon on its way.
const UNSENT: u64 = 256 << 10;
/// Bounds on what a connection holds of what was written: while nothing is known, and at most.
const LEAST_HELD: u64 = 512 << 10;
const MOST_HELD: u64 = 16 << 20;
/// Between two looks at the congestion window.
const LOOK: Duration = Duration::from_millis(20);

/// What both halves share: the connection, and the sending half once that is dropped.
#[derive(Debug)]
pub(crate) struct Ends {
    quic: Connection,
    figures: Figures,
    parting: Mutex<Option<Parting>>,
}

#[derive(Debug)]
struct Parting {
    send: SendStream,
    goodbye: bool,
}

impl Ends {
    pub(super) fn new(quic: Connection, figures: Figures) -> Self {
        Ends { quic, figures, parting: Mutex::default() }
    }

    pub(crate) fn controller(&self) -> Controller {
        self.figures.controller
    }

    /// Ends the connection at once.
    pub(crate) fn cut(&self) {
        self.quic.close(code(CUT), &[]);
    }

    /// Lets the peer send as far ahead as a long link needs.
    pub(crate) fn widen(&self) {
        self.quic.set_receive_window(STREAM_WINDOW.into());
    }

    /// Whether what is sent has not been acknowledged for long.
    pub(crate) fn backs_off(&self) -> bool {
        self.figures.backs_off(Instant::now())
    }

    /// What is known now.
    pub(crate) fn sample(&self) -> Sample {
        let stats = self.quic.stats();
        Sample {
            rtt: stats.path.rtt,
            rtt_var: None,
            min_rtt: stats.path.min_rtt,
            queued: None,
            unsent: None,
            delivery_rate: self.figures.rate(),
            retransmits: stats.path.lost_packets.try_into().unwrap_or(u32::MAX),
            congestion_window: stats.path.cwnd,
            bytes_acked: self.figures.acked(),
            bytes_received: stats.udp_rx.bytes,
            strained: self.figures.strained(),
        }
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        let parting = self.parting.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(Parting { send, goodbye }), Ok(runtime)) = (parting, Handle::try_current()) else {
            return self.cut();
        };
        let quic = self.quic.clone();
        runtime.spawn(async move {
            let done = async {
                match goodbye {
                    true => drop(send.stopped().await),
                    false => drop(quic.closed().await),
                }
            };
            let _ = timeout(PARTING, done).await;
            quic.close(code(if goodbye { GOODBYE } else { CUT }), &[]);
            drop(send);
        });
    }
}

/// The sending half.
#[derive(Debug)]
pub(crate) struct Sending {
    ends: Arc<Ends>,
    /// There until it is dropped.
    send: Option<SendStream>,
    goodbye: bool,
    looked: Option<Instant>,
}

impl Sending {
    pub(super) fn new(ends: Arc<Ends>, send: SendStream) -> Self {
        Sending { ends, send: Some(send), goodbye: false, looked: None }
    }

    /// Holds no more of what is written than congestion control will soon let go: what waits here can go over no other connection.
    fn fit(&mut self) {
        let now = Instant::now();
        if self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK) {
            self.looked = Some(now);
            let window = self.ends.quic.stats().path.cwnd;
            self.ends.quic.set_send_window(window.saturating_add(UNSENT).clamp(LEAST_HELD, MOST_HELD));
        }
    }

    fn send(&mut self) -> io::Result<Pin<&mut SendStream>> {
        match &mut self.send {
            Some(send) => Ok(Pin::new(send)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let parting = self.send.take().map(|send| Parting { send, goodbye: self.goodbye });
        *self.ends.parting.lock().unwrap_or_else(PoisonError::into_inner) = parting;
    }
}

impl AsyncWrite for Sending {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.fit();
        let written = this.send()?.poll_write(cx, buf);
        written.map_err(|error| crate::error::of_quic_stream(error.into(), None))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is kept back.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.goodbye = true;
        // Said before is as good.
        let _ = this.send()?.finish();
        Poll::Ready(Ok(()))
    }
}

/// The receiving half.
#[derive(Debug)]
pub(crate) struct Receiving(RecvStream);

impl Receiving {
    pub(super) fn new(receive: RecvStream) -> Self {
        Receiving(receive)
    }
}

impl AsyncRead for Receiving {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        AsyncRead::poll_read(Pin::new(&mut self.get_mut().0), cx, buf)
    }
}
