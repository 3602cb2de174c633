//! Measuring a link before a migration: a burst of bytes without meaning, over connections like those that would carry the data.
//!
//! ```text
//! source ── Probe ──► bytes ──► end of its direction         destination: counts what comes, and when
//!        ◄───────────────────────────────────────── Probed
//! ```
//! Both ends bound it: the source in time and bytes, the destination too, whoever asks. It reserves nothing and leaves nothing behind.

use std::time::{Duration, Instant};

use dwcp_link::{Gauge, Reader, Writer, dial};
use dwcp_proto::Mode;
use dwcp_proto::message::{Body, Probe, Probed};
use futures_util::future::{join_all, try_join_all};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{sleep, timeout};

use crate::error::{Blame, Failure};
use crate::handshake::{Dialler, Probing};
use crate::shared::Shared;
use crate::transport::SEGMENT;
use crate::wire::{WireError, read_message, write_message};

/// Probes that one node answers at once: each takes a buffer and its share of a processor.
pub(crate) const MAX_PROBES: usize = 16;
/// Bytes of one write or read.
const PIECE: usize = 64 << 10;
/// Bytes that the destination takes of one connection, and for how long.
const MAX_BYTES: u64 = 256 << 20;
const MAX_TIME: Duration = Duration::from_secs(8);
/// Bytes between two points of the curve: it has some thousand at most.
const GRAIN: u64 = 256 << 10;
/// Bytes over which the highest rate is taken: more than the burst that a shaper lets pass.
const STRETCH: u64 = 2 << 20;
/// How long the answer may take beyond the burst: what the kernel still holds must arrive first.
const GRACE: Duration = Duration::from_millis(500);

/// How much a probe may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Burst {
    /// Connections at once.
    pub(crate) streams: u32,
    /// Bytes over all of them.
    pub(crate) bytes: u64,
    /// Time, without connecting.
    pub(crate) time: Duration,
    /// As which kind of link it is treated.
    pub(crate) link: Mode,
    /// Over QUIC, not TCP.
    pub(crate) quic: bool,
    /// Bytes a second that may be taken of the link, over all connections.
    pub(crate) limit: Option<u64>,
}

impl Burst {
    /// Enough to tell a datacenter's link from another one where the round trip is short: 8 MiB take 70 ms at 1 Gbit/s.
    pub(crate) const QUICK: Burst = Burst {
        streams: 1,
        bytes: 8 << 20,
        time: Duration::from_millis(200),
        link: Mode::Datacenter,
        quic: false,
        limit: None,
    };
}

/// What a link carried. Rates are bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Carried {
    /// Over the second half of the burst, all connections together.
    pub(crate) steady: f64,
    /// The highest over a short stretch: what the link can do where the agents are what is slow.
    pub(crate) best: f64,
    /// The least round trip that the kernel saw meanwhile.
    pub(crate) rtt: Option<Duration>,
    /// What the round trip came to at the end, beyond the least one: packets that lay in a queue.
    pub(crate) queued: Duration,
    /// Parts of what was sent that had to be sent again.
    pub(crate) resent: f64,
}

/// Sends a burst to the node behind `dialler`.
pub(crate) async fn probe(dialler: &Dialler, burst: Burst) -> Result<Carried, Failure> {
    let streams = burst.streams.max(1);
    let share = burst.bytes / u64::from(streams);
    let made =
        try_join_all((0..streams).map(|_| connect(dialler, burst))).await.map_err(WireError::failure)?;
    let limit = burst.limit.map(|limit| limit as f64 / f64::from(streams));
    let sent = join_all(made.into_iter().map(|line| line.send(share, burst.time, limit))).await;
    let mut all = Carried { steady: 0.0, best: 0.0, rtt: None, queued: Duration::ZERO, resent: 0.0 };
    for one in sent {
        let one = one.map_err(WireError::failure)?;
        all.steady += one.steady;
        all.best = all.best.max(one.best);
        all.rtt = all.rtt.into_iter().chain(one.rtt).min();
        all.queued = all.queued.max(one.queued);
        all.resent += one.resent / f64::from(streams);
    }
    all.best = all.best.max(all.steady);
    match all.steady > 0.0 {
        true => Ok(all),
        false => Err(Failure::new("probe", Blame::Link, "nothing of the probe arrived", "")),
    }
}

/// One connection of a probe.
struct Line {
    reader: Reader,
    writer: Writer,
    gauge: Gauge,
}

async fn connect(dialler: &Dialler, Burst { link, quic, .. }: Burst) -> Result<Line, WireError> {
    let conn = match quic {
        true => dialler.dial_quic().await,
        false => dial(dialler.addr, &dialler.identity, &dialler.to, &dialler.for_data(link)).await,
    };
    let conn = conn.map_err(WireError::Link)?;
    let gauge = conn.gauge();
    let (reader, mut writer) = conn.into_split();
    write_message(&mut writer, Body::Probe(Probe {})).await?;
    Ok(Line { reader, writer, gauge })
}

impl Line {
    async fn send(mut self, bytes: u64, time: Duration, limit: Option<f64>) -> Result<Carried, WireError> {
        let started = Instant::now();
        let piece = vec![0; PIECE];
        let write = async {
            let mut sent = 0;
            while sent < bytes && started.elapsed() < time {
                self.writer.write_all(&piece).await?;
                sent += piece.len() as u64;
                if let Some(limit) = limit {
                    // A little more than may be taken at once is paid for before the next.
                    let due = Duration::from_secs_f64(sent as f64 / limit.max(1.0)).min(time);
                    sleep(due.saturating_sub(started.elapsed())).await;
                }
            }
            self.writer.shutdown().await
        };
        let wrote = timeout(time + GRACE, write).await;
        let told = match wrote {
            Ok(wrote) => {
                wrote?;
                timeout(GRACE.max(time), read_message(&mut self.reader)).await.ok()
            }
            // Not even a piece moved.
            Err(_) => None,
        };
        let sample = self.gauge.sample();
        let acked = sample.map_or(0, |s| s.bytes_acked);
        let (steady, best) = match told {
            Some(Ok((Body::Probed(probed), _))) => (probed.steady as f64, probed.best as f64),
            Some(Ok((body, _))) => {
                return Err(WireError::Unexpected { got: body.kind(), expected: "probed" });
            }
            Some(Err(error)) => return Err(error),
            // It waits behind what is queued before it: the link is slow enough to know without.
            None => {
                let rate = acked as f64 / started.elapsed().as_secs_f64();
                (rate, rate)
            }
        };
        let segments = (acked as f64 / SEGMENT).max(1.0);
        let resent = sample.map_or(0.0, |s| f64::from(s.retransmits) / segments);
        Ok(Carried {
            steady,
            best,
            rtt: sample.map(|s| s.min_rtt.min(s.rtt)),
            queued: sample.map_or(Duration::ZERO, |s| s.rtt.saturating_sub(s.min_rtt)),
            resent: resent.min(1.0),
        })
    }
}

/// Answers a node that probes.
pub(crate) async fn answer(shared: &Shared, mut probing: Probing) {
    let Ok(_place) = shared.probes.try_acquire() else {
        let text = "too many probes at once";
        return probing.refuse(&Failure::new("busy", Blame::Local, text, "try again")).await;
    };
    probing.reader.widen();
    let curve = match timeout(MAX_TIME, count(&mut probing.reader)).await {
        Ok(curve) => curve,
        // Whoever sends for longer is no node of this make.
        Err(_) => return,
    };
    probing.tell(curve.told()).await;
}

async fn count(reader: &mut Reader) -> Curve {
    let mut curve = Curve::default();
    let mut piece = vec![0; PIECE];
    let started = Instant::now();
    loop {
        match reader.read(&mut piece).await {
            // Errors end it as well: the count is right so far, and the answer will find nobody.
            Ok(0) | Err(_) => return curve,
            Ok(read) => curve.came(read as u64, started.elapsed()),
        }
        if curve.total >= MAX_BYTES {
            return curve;
        }
    }
}

/// What came by when.
#[derive(Debug, Default)]
struct Curve {
    /// Time and total, every [`GRAIN`] bytes; the first is that of the first byte.
    points: Vec<(Duration, u64)>,
    total: u64,
    last: Duration,
}

impl Curve {
    fn came(&mut self, bytes: u64, at: Duration) {
        self.total += bytes;
        self.last = at;
        if self.points.last().is_none_or(|(_, total)| self.total - total >= GRAIN) {
            self.points.push((at, self.total));
        }
    }

    fn told(&self) -> Probed {
        let first = self.points.first().copied().unwrap_or_default();
        let end = (self.last, self.total);
        let middle = first.0 + self.last.saturating_sub(first.0) / 2;
        // The last point before the middle, so that at least half of the time counts.
        let half = self.points.iter().rev().find(|(at, _)| *at <= middle).copied().unwrap_or(first);
        let mut best = rate(half, end);
        for (n, from) in self.points.iter().enumerate() {
            let to = self.points[n..].iter().find(|(_, total)| total - from.1 >= STRETCH);
            best = to.map_or(best, |to| best.max(rate(*from, *to)));
        }
        let micros = self.last.saturating_sub(first.0).as_micros() as u64;
        Probed { bytes: self.total, micros, steady: rate(half, end), best }
    }
}

/// Bytes a second between two points.
fn rate(from: (Duration, u64), to: (Duration, u64)) -> u64 {
    let time = to.0.saturating_sub(from.0).max(Duration::from_micros(1));
    ((to.1 - from.1) as f64 / time.as_secs_f64()) as u64
}

impl Probing {
    async fn tell(mut self, probed: Probed) {
        let _ = write_message(&mut self.writer, Body::Probed(probed)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_does_not_count_and_a_pause_does_not_hide_the_links_rate() {
        let mut curve = Curve::default();
        let mut at = Duration::ZERO;
        // A slow start of a second, then 100 MB/s but for one pause.
        for _ in 0..10 {
            curve.came(10_000, at);
            at += Duration::from_millis(100);
        }
        for n in 0..1000 {
            curve.came(100_000, at);
            at += Duration::from_millis(if n == 700 { 200 } else { 1 });
        }
        let told = curve.told();
        assert_eq!(told.bytes, 100_100_000);
        assert!((60_000_000..90_000_000).contains(&told.steady), "{told:?}");
        assert!((95_000_000..105_000_000).contains(&told.best), "{told:?}");
        assert!(curve.points.len() < 500);
        assert_eq!(Curve::default().told(), Probed { bytes: 0, micros: 0, steady: 0, best: 0 });
    }

    #[test]
    fn a_curve_is_bounded_whatever_comes() {
        let mut curve = Curve::default();
        (0..MAX_BYTES / 1024).for_each(|n| curve.came(1024, Duration::from_micros(n)));
        assert!(curve.points.len() as u64 <= MAX_BYTES / GRAIN + 1);
    }
}
