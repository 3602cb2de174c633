//! Path v1 at the source: one connection, the VMM's bytes as they are.
//!
//! What was written is kept in a ring until the destination reports it as applied, so that a new connection goes on where
//! the old one was lost. The ring is bounded by what may be in flight; when it is full nothing more is read from the VMM.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use dwcp_link::{Reader, Writer};
use dwcp_proto::Segment;
use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Body, Purpose, StreamEnd};
use dwcp_proto::pace::Pace;
use dwcp_proto::session::bytes_root;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::info;

use super::Outgoing;
use crate::control::{Control, DataEvent, RETRY};
use crate::error::{Blame, Failure};
use crate::wire::WireError;

/// Sends all `segments`; returns once the destination has applied every byte.
pub(crate) async fn send(
    out: Outgoing,
    control: Control,
    mut segments: mpsc::Receiver<Segment>,
    mut peer: mpsc::Receiver<DataEvent>,
) -> Result<Transfer, Failure> {
    let mut ring = Ring::new(out);
    let (mut again, mut connected) = (false, false);
    loop {
        let (dialler, session) = (ring.out.dialler.clone(), ring.out.session.clone());
        let pause = again;
        let join = async {
            if pause {
                sleep(RETRY).await;
            }
            dialler.join(&session, Purpose::Bytes, 0).await
        };
        tokio::pin!(join);
        let joined = loop {
            if let Some(transfer) = ring.delivered() {
                return Ok(transfer);
            }
            tokio::select! {
                joined = &mut join => break joined,
                said = peer.recv() => ring.hear(said, &control).await?,
            }
        };
        let error = match joined {
            Ok((reader, writer, joined)) => {
                ring.rewind(joined.applied)?;
                if connected {
                    ring.out.counters.reconnects.add(1);
                    ring.out.metrics.reconnected();
                }
                connected = true;
                match ring.carry(reader, writer, &control, &mut segments, &mut peer).await? {
                    Carried::All(transfer) => return Ok(transfer),
                    Carried::Until(error) => error,
                }
            }
            Err(error) => error,
        };
        if !error.is_transient() {
            return Err(error.failure());
        }
        info!(%error, "v1 connection lost or not made");
        again = true;
    }
}

enum Carried {
    All(Transfer),
    Until(WireError),
}

/// What was read from the VMM and not yet applied at the destination.
struct Ring {
    out: Outgoing,
    started: Instant,
    pace: Pace,
    /// In order; the first begins at `applied`.
    kept: VecDeque<Bytes>,
    applied: u64,
    /// Up to where it was written to the present connection.
    written: u64,
    /// The end of what was read.
    end: u64,
    ended: bool,
    /// Since when something is unacknowledged.
    busy_since: Option<Instant>,
}

impl Ring {
    fn new(out: Outgoing) -> Self {
        let pace = Pace::new(out.budget);
        Ring {
            out,
            started: Instant::now(),
            pace,
            kept: VecDeque::new(),
            applied: 0,
            written: 0,
            end: 0,
            ended: false,
            busy_since: None,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn has_room(&self) -> bool {
        let held = self.end - self.applied;
        held == 0 || held < self.pace.target().min(self.out.session.choice.window)
    }

    /// The whole transfer, once the destination has applied all of it.
    fn delivered(&self) -> Option<Transfer> {
        let root = || bytes_root(&self.out.session.id, self.end);
        (self.ended && self.applied == self.end).then(|| Transfer { stream_len: self.end, root: root() })
    }

    async fn hear(&mut self, said: Option<DataEvent>, control: &Control) -> Result<(), Failure> {
        match said {
            Some(DataEvent::Ack(Ack { applied, .. })) => {
                let rtt = self.out.counters.rtt_us.load();
                if rtt > 0 {
                    self.pace.round_trip(Duration::from_micros(rtt));
                }
                self.trim(applied)?;
            }
            Some(DataEvent::Up) if self.ended => {
                control.say(Body::StreamEnd(StreamEnd { length: self.end })).await;
            }
            Some(DataEvent::Up) => {}
            None => return Err(Failure::new("ended", Blame::Local, "the migration has ended", "")),
        }
        Ok(())
    }

    /// The destination has applied everything before `applied`.
    fn trim(&mut self, applied: u64) -> Result<(), Failure> {
        if applied > self.end {
            let text = format!("the peer acknowledged byte {applied} of {}", self.end);
            return Err(Failure::new("forged_ack", Blame::PeerMisbehaving, text, ""));
        }
        // An older acknowledgement may come after a newer join.
        let Some(mut bytes) = applied.checked_sub(self.applied) else { return Ok(()) };
        if bytes > 0 {
            self.pace.acked(bytes, self.now(), applied == self.end);
            self.out.counters.rate.set(self.pace.rate() as u64);
        }
        self.applied = applied;
        if self.applied == self.end
            && let Some(since) = self.busy_since.take()
        {
            self.out.metrics.busy(None, since.elapsed());
        }
        while let Some(first) = self.kept.front_mut().filter(|_| bytes > 0) {
            let part = bytes.min(first.len() as u64);
            first.advance(part as usize);
            bytes -= part;
            if first.is_empty() {
                self.kept.pop_front();
            }
        }
        self.written = self.written.max(applied);
        Ok(())
    }

    /// A new connection goes on from what the destination has applied.
    fn rewind(&mut self, applied: u64) -> Result<(), Failure> {
        self.trim(applied)?;
        self.written = self.applied;
        Ok(())
    }

    /// The next bytes to write.
    fn unwritten(&self) -> Option<Bytes> {
        let mut skip = self.written - self.applied;
        for bytes in &self.kept {
            if skip < bytes.len() as u64 {
                return Some(bytes.slice(skip as usize..));
            }
            skip -= bytes.len() as u64;
        }
        None
    }

    async fn carry(
        &mut self,
        mut reader: Reader,
        mut writer: Writer,
        control: &Control,
        segments: &mut mpsc::Receiver<Segment>,
        peer: &mut mpsc::Receiver<DataEvent>,
    ) -> Result<Carried, Failure> {
        let silence = async move {
            match reader.read_u8().await {
                Ok(_) => WireError::Unexpected { got: "a byte", expected: "silence on a data connection" },
                Err(error) => WireError::from(error),
            }
        };
        tokio::pin!(silence);
        let mut flushed = true;
        loop {
            if let Some(transfer) = self.delivered() {
                return Ok(Carried::All(transfer));
            }
            let unwritten = self.unwritten();
            let has_room = self.has_room() && !self.ended;
            let wait = self.out.bucket().wait(self.now());
            tokio::select! {
                wrote = async {
                    match &unwritten {
                        Some(bytes) => writer.write(bytes).await,
                        None => writer.flush().await.map(|()| 0),
                    }
                }, if wait.is_zero() && (unwritten.is_some() || !flushed) => match wrote {
                    Ok(0) if unwritten.is_some() => return Ok(Carried::Until(WireError::Closed)),
                    Ok(bytes) => {
                        flushed = unwritten.is_none();
                        self.written += bytes as u64;
                        let now = self.now();
                        self.pace.sent(now);
                        self.out.bucket().spend(bytes as u64, now);
                        self.out.sent(bytes as u64);
                    }
                    Err(error) => return Ok(Carried::Until(error.into())),
                },
                () = sleep(wait), if !wait.is_zero() => {}
                segment = segments.recv(), if has_room => match segment {
                    Some(segment) => {
                        self.busy_since.get_or_insert_with(Instant::now);
                        self.end += segment.bytes.len() as u64;
                        self.kept.push_back(segment.bytes);
                    }
                    None => {
                        self.ended = true;
                        control.say(Body::StreamEnd(StreamEnd { length: self.end })).await;
                    }
                },
                said = peer.recv() => self.hear(said, control).await?,
                error = &mut silence => return Ok(Carried::Until(error)),
            }
        }
    }
}
