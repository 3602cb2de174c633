//! Path v1 at the source: one connection, the VMM's bytes as they are.
//!
//! What was written stays on the reel until the destination reports it as applied, so that a new connection goes on where
//! the old one was lost. What may be in flight is bounded; beyond it nothing more is read from the VMM.

use std::time::Duration;

use dwcp_link::{Gauge, Reader, Writer};
use dwcp_proto::Leg;
use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::Transfer;
use dwcp_proto::leg::BytesDigest;
use dwcp_proto::message::{Ack, Body, Purpose, StreamEnd};
use dwcp_proto::pace::Pace;
use dwcp_proto::path::Change;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::info;

use super::Outgoing;
use super::carry::{Carried, Peer, beyond_end, restarted};
use super::helm::Helm;
use super::reel::Reel;
use crate::control::{Control, DataEvent, RETRY, STALLED};
use crate::error::{Blame, Failure};
use crate::wire::WireError;

/// Bytes that were read and wait to be written: enough to keep the connection busy while the VMM is asked for more, few enough to be
/// still in the cache when they are written.
const AHEAD: u64 = 1 << 20;
/// What the kernel may hold unsent of the one connection: as `AHEAD`, seen from the other side.
const UNSENT: u32 = 1 << 20;

/// Sends one leg: to the end of the stream, or until the path should change.
pub(crate) async fn send(
    out: &Outgoing,
    control: &Control,
    leg: &Leg,
    reel: &mut Reel,
    peer: &mut Peer,
    helm: &mut Helm,
) -> Result<(Carried, Ring), Failure> {
    let mut ring = Ring::new(out.clone(), leg);
    let (mut next, mut connected) = (Instant::now(), false);
    loop {
        let begin = next;
        next = Instant::now().max(begin) + RETRY;
        let join = async {
            sleep_until(begin).await;
            out.dialler.join(&out.session, leg, Purpose::Bytes, 0).await
        };
        tokio::pin!(join);
        let joined = loop {
            if let Some(transfer) = ring.delivered(reel, control).await? {
                return Ok((Carried::All(transfer), ring));
            }
            let turns = reel.length().is_none();
            tokio::select! {
                biased;
                change = helm.turn(), if turns => return Ok((Carried::Turn(change), ring)),
                said = peer.recv() => if let Some(change) = ring.hear(said, reel, control, helm).await? {
                    return Ok((Carried::Turn(change), ring));
                },
                Ok(()) = ring.receipt.changed() => {}
                joined = &mut join => break joined,
            }
        };
        let error = match joined {
            Ok((reader, writer, joined, gauge)) => {
                ring.trim(reel, joined.applied)?;
                ring.written = reel.applied();
                if connected {
                    ring.out.counters.reconnects.add(1);
                    ring.out.metrics.reconnected();
                }
                connected = true;
                // A wish only: without it the connection is merely slower.
                let _ = gauge.set_notsent_lowat(Some(UNSENT));
                match ring.carry((reader, writer, gauge), reel, control, peer, helm).await? {
                    Ended::Leg(carried) => return Ok((carried, ring)),
                    Ended::Connection(error) => error,
                }
            }
            Err(error) => error,
        };
        if !error.is_transient() {
            return Err(error.failure());
        }
        info!(%error, "v1 connection lost or not made");
    }
}

enum Ended {
    Leg(Carried),
    Connection(WireError),
}

/// What a v1 leg knows beside the reel.
pub(crate) struct Ring {
    out: Outgoing,
    leg: Leg,
    started: Instant,
    pace: Pace,
    /// Of what was applied.
    digest: BytesDigest,
    /// Up to where it was written to the present connection.
    written: u64,
    /// The destination was told where the stream ends.
    told: bool,
    /// Since when something is unacknowledged.
    busy_since: Option<Instant>,
    /// When something was last written, or applied by the destination.
    moved: Instant,
    /// The destination waits for what was written to the present connection long ago.
    stalled: bool,
    receipt: watch::Receiver<Option<Transfer>>,
}

impl Ring {
    fn new(out: Outgoing, leg: &Leg) -> Self {
        let pace = Pace::new(out.budget).within(out.limit);
        Ring {
            receipt: out.receipt.subscribe(),
            digest: BytesDigest::new(leg),
            leg: leg.clone(),
            started: Instant::now(),
            pace,
            written: leg.from.0,
            told: false,
            busy_since: None,
            moved: Instant::now(),
            stalled: false,
            out,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn has_room(&self, reel: &Reel) -> bool {
        let held = reel.handed() - reel.applied();
        let may = self.pace.target().min(self.leg.choice.window);
        held == 0 || Mechanism::BackPressure.is_off() || (held < may && reel.handed() - self.written < AHEAD)
    }

    /// The whole transfer, once the destination has applied all of it. It is told where the stream ends first: the end may come after the last
    /// byte was acknowledged, and the destination waits for that word.
    async fn delivered(&mut self, reel: &mut Reel, control: &Control) -> Result<Option<Transfer>, Failure> {
        let Some(length) = reel.length() else { return Ok(None) };
        if !self.told {
            self.tell_end(length, control).await;
        }
        if self.receipt.borrow_and_update().is_some_and(|receipt| receipt.stream_len == length) {
            // Our own digest of all of it is held against the receipt before anything follows from it.
            self.trim(reel, length)?;
        }
        let whole = || Transfer { stream_len: length, root: self.digest.root() };
        Ok((reel.applied() == length).then(whole))
    }

    async fn hear(
        &mut self,
        said: Option<DataEvent>,
        reel: &mut Reel,
        control: &Control,
        helm: &mut Helm,
    ) -> Result<Option<Change>, Failure> {
        match said {
            Some(DataEvent::Ack(Ack { applied, leg, silent, .. })) if leg == self.leg.number => {
                let rtt = self.out.counters.rtt_us.load();
                if rtt > 0 {
                    self.pace.round_trip(Duration::from_micros(rtt));
                }
                self.trim(reel, applied)?;
                let waits = self.written > reel.applied() && self.moved.elapsed() >= STALLED;
                self.stalled = waits && !silent.is_empty();
            }
            Some(DataEvent::Up) => {
                if let Some(length) = reel.length() {
                    self.tell_end(length, control).await;
                }
            }
            Some(DataEvent::Veto(reason)) => helm.veto(&reason),
            Some(DataEvent::Restarted) => return Ok(Some(restarted(&self.leg))),
            Some(DataEvent::Ack(_) | DataEvent::Switched(_)) => {}
            None => return Err(Failure::new("ended", Blame::Local, "the migration has ended", "")),
        }
        Ok(None)
    }

    async fn tell_end(&mut self, length: u64, control: &Control) {
        self.told = true;
        control.say(Body::StreamEnd(StreamEnd { length, leg: self.leg.number })).await;
    }

    /// The destination has applied everything before `applied`. An older word may come after a newer one.
    fn trim(&mut self, reel: &mut Reel, applied: u64) -> Result<(), Failure> {
        let before = reel.applied();
        let digest = &mut self.digest;
        reel.trim(applied, |bytes| digest.update(bytes)).map_err(beyond_end)?;
        let bytes = reel.applied() - before;
        let idle = reel.applied() == reel.handed();
        if bytes > 0 {
            self.moved = Instant::now();
            self.pace.acked(bytes, self.now(), idle);
            self.out.counters.rate.set(self.pace.rate() as u64);
        }
        if idle && let Some(since) = self.busy_since.take() {
            self.out.metrics.busy(None, since.elapsed());
        }
        self.written = self.written.max(reel.applied());
        Ok(())
    }

    /// The digest of what this leg carried before `offset`, from which the next one goes on.
    pub(crate) fn carried_until(&mut self, reel: &mut Reel, offset: u64) -> Result<[u8; 32], Failure> {
        self.trim(reel, offset)?;
        if let Some(since) = self.busy_since.take() {
            self.out.metrics.busy(None, since.elapsed());
        }
        Ok(self.digest.root())
    }

    async fn carry(
        &mut self,
        (mut reader, mut writer, gauge): (Reader, Writer, Gauge),
        reel: &mut Reel,
        control: &Control,
        peer: &mut Peer,
        helm: &mut Helm,
    ) -> Result<Ended, Failure> {
        let silence = async move {
            match reader.read_u8().await {
                Ok(_) => WireError::Unexpected { got: "a byte", expected: "silence on a data connection" },
                Err(error) => WireError::from(error),
            }
        };
        tokio::pin!(silence);
        let mut flushed = true;
        (self.moved, self.stalled) = (Instant::now(), false);
        loop {
            if let Some(transfer) = self.delivered(reel, control).await? {
                return Ok(Ended::Leg(Carried::All(transfer)));
            }
            let length = reel.length();
            let unwritten = reel.bytes_from(self.written);
            let has_room = length.is_none() && self.has_room(reel);
            let wait = self.out.throttle.wait();
            tokio::select! {
                change = helm.turn(), if length.is_none() => {
                    gauge.cut();
                    return Ok(Ended::Leg(Carried::Turn(change)));
                }
                wrote = async {
                    match &unwritten {
                        Some(bytes) => writer.write(bytes).await,
                        None => writer.flush().await.map(|()| 0),
                    }
                }, if wait.is_zero() && (unwritten.is_some() || !flushed) => match wrote {
                    Ok(0) if unwritten.is_some() => return Ok(Ended::Connection(WireError::Closed)),
                    Ok(bytes) => {
                        self.moved = Instant::now();
                        flushed = unwritten.is_none();
                        self.written += bytes as u64;
                        let now = self.now();
                        self.pace.sent(now);
                        self.out.throttle.spend(bytes as u64);
                        self.out.counters.wire.add(bytes as u64);
                    }
                    Err(error) => return Ok(Ended::Connection(error.into())),
                },
                () = sleep(wait), if !wait.is_zero() => {}
                segment = reel.next(), if has_room => if segment.is_some() {
                    self.busy_since.get_or_insert_with(Instant::now);
                },
                said = peer.recv() => {
                    // Then the link is back, and the kernel's next try may be far off: a new connection goes on at once.
                    let back = matches!(said, Some(DataEvent::Up)) && !Mechanism::GiveUp.is_off();
                    let late = back && gauge.backs_off();
                    if let Some(change) = self.hear(said, reel, control, helm).await? {
                        gauge.cut();
                        return Ok(Ended::Leg(Carried::Turn(change)));
                    }
                    if late || std::mem::take(&mut self.stalled) {
                        gauge.cut();
                        return Ok(Ended::Connection(WireError::Stalled));
                    }
                },
                Ok(()) = self.receipt.changed() => {}
                error = &mut silence => return Ok(Ended::Connection(error)),
            }
        }
    }
}
