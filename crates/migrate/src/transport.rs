//! QUIC or TCP for the data connections of internet mode: measured before a migration, and given up for TCP where UDP does not get through.
//!
//! # States of a session's data connections
//! ```text
//! TCP                                   as chosen
//! QUIC ── no answer over UDP, while TCP stands and UDP is asked once more in vain ──► TCP, to the session's end
//! ```
//! A dark link answers over neither, and is no reason to leave QUIC.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use dwcp_link::{Connection, DialOptions, LinkError, dial, dial_quic};
use dwcp_proto::message::{Body, Choice, Offer, Probe};
use dwcp_proto::{Mode, Path, units};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::config::Transport;
use crate::error::Failure;
use crate::handshake::Dialler;
use crate::probe::{Burst, Carried, probe};
use crate::shared::Shared;
use crate::wire::{WireError, link_failure, read_message, write_message};

/// How long an answer over UDP may take: several packets of a handshake lost one after the other over the longest of lines.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long all of a look at the link may take, the connections' handshakes with it: where packets are lost one of those may take seconds.
pub(crate) const LOOK: Duration = Duration::from_secs(8);
/// Below this round trip TCP finds a lost packet out so soon that QUIC can only cost.
const NEAR: Duration = Duration::from_millis(10);
/// How much more QUIC must carry. A burst's figure is rough, and QUIC takes two to three times the processor's time for a byte.
const CLEARLY: f64 = 1.2;
/// So much of what may be taken of the link counts as all of it.
const ENOUGH: f64 = 0.9;
/// A part of what TCP sent that counts as nothing lost.
const NOTHING: f64 = 0.000_2;
/// Round trips that a burst takes, so that the link's rate is found in its first half, within bounds: a queue has to fill, and nobody
/// likes to wait, nor to pay for bytes that are not the guest's.
const TRIPS: u32 = 8;
const SHORTEST: Duration = Duration::from_millis(160);
const LONGEST: Duration = Duration::from_millis(1500);
/// Bytes of the first burst: two thousand packets, of which some are lost wherever it matters.
const FEW_BYTES: u64 = 3 << 20;
/// Bytes of a burst that is held against another one: what a link takes to be full comes on top.
const BYTES: u64 = 8 << 20;
/// Bytes of a segment on nearly every line.
pub(crate) const SEGMENT: f64 = 1448.0;
/// How many times as fast as losses that go on would leave it TCP must be for them to count as its own: a connection that looks for
/// the link's rate overflows its queue once, and loses hundreds of packets together. (At five times a link of
/// 100 ms that loses 0.5 % was taken for a full one: a burst begins faster than losses leave it in the end.)
const OWN_LOSSES: f64 = 10.0;
/// The same where its packets lay in a queue at the end, for this part of the least round trip: only a link that is full has one.
const FULL_LOSSES: f64 = 3.0;
const FULL_QUEUE: f64 = 0.25;

/// Why QUIC, where it was asked for.
const ASKED: &str = "[link] transport asks for QUIC";

/// Whether QUIC still gets through, for a dialler and its clones.
#[derive(Debug, Default)]
pub(crate) struct Quic {
    blocked: OnceLock<String>,
}

/// What came of looking at both.
pub(crate) struct Found {
    /// QUIC is wished for.
    pub(crate) quic: bool,
    /// Why, or why not.
    pub(crate) reason: String,
    /// It was asked for by name, and cannot be had.
    pub(crate) fallback: Option<String>,
    /// The link loses packets that nobody had too much in flight.
    pub(crate) lossy: bool,
}

impl Found {
    fn tcp(reason: impl Into<String>) -> Self {
        Found { quic: false, reason: reason.into(), fallback: None, lossy: false }
    }

    fn quic(reason: impl Into<String>) -> Self {
        Found { quic: true, reason: reason.into(), fallback: None, lossy: false }
    }
}

/// Whether a leg of this choice could go over QUIC.
pub(crate) fn possible(choice: &Choice) -> bool {
    let v3 = choice.path == Path::V3.to_wire() && choice.mode == Mode::Internet.to_wire();
    v3 && !choice.plain
}

/// Tells the destination why, if it can hear it: an older agent drops what it does not know, and would then hold another choice than ours.
pub(crate) fn tell(choice: &mut Choice, theirs: &Offer, found: &str) {
    if theirs.quic {
        choice.transport_reason = reason(choice, found);
    }
}

/// The reason for what a leg's connections are made over, where that is found to be `found` for those that could be either.
pub(crate) fn reason(choice: &Choice, found: &str) -> String {
    match (possible(choice), Path::from_wire(choice.path)) {
        (true, _) => found.to_owned(),
        (false, Some(Path::V1)) => "v1 is one TCP connection".to_owned(),
        (false, _) => "datacenter mode goes over TCP".to_owned(),
    }
}

/// Finds out whether the data of a migration that begins with `choice` should go over QUIC. `rtt` is the round trip, `limit` what may be
/// taken of the link, bytes a second. Where it measures it takes from a tenth of a second to some four, by the round trip and by what is lost,
/// and [`LOOK`] at most.
pub(crate) async fn find(
    shared: &Shared,
    dialler: &Dialler,
    theirs: &Offer,
    choice: &Choice,
    rtt: Duration,
    limit: Option<u64>,
) -> Found {
    let asked = shared.config.transport == Transport::Quic;
    let without = |why: String| {
        let fallback = asked.then(|| format!("TCP instead of QUIC: {why}"));
        Found { fallback, ..Found::tcp(why) }
    };
    match shared.config.transport {
        Transport::Tcp => Found::tcp("[link] transport asks for TCP"),
        _ if !theirs.quic => without(
            "the destination offers no QUIC: it is older, its UDP port is taken, or its [link] transport is tcp".to_owned(),
        ),
        // Nothing to try where the first leg cannot have it.
        Transport::Quic if !possible(choice) => Found::quic(ASKED),
        Transport::Quic => match dialler.answers_over_quic().await {
            Ok(()) => Found::quic(ASKED),
            Err(failure) => without(failure.message),
        },
        Transport::Auto if !possible(choice) => Found::tcp("it did not begin in internet mode, so QUIC was not measured"),
        Transport::Auto if rtt < NEAR => {
            let (trip, near) = (rtt.as_secs_f64() * 1e3, NEAR.as_millis());
            Found::tcp(format!("the round trip of {trip:.1} ms is below {near} ms"))
        }
        Transport::Auto => timeout(LOOK, compare(dialler, choice, rtt, limit)).await.unwrap_or_else(|_| {
            let why = format!("it could not be measured in {} s", LOOK.as_secs());
            Found { lossy: true, ..Found::tcp(why) }
        }),
    }
}

/// A burst over each, one after the other: beside each other they would share the link. Where TCP loses nothing, or only what it
/// had too much in flight, or fills what may be taken, a short one of its own is enough. Held against each other both get a long one: what a
/// short one carries is its slow beginning.
async fn compare(dialler: &Dialler, choice: &Choice, rtt: Duration, limit: Option<u64>) -> Found {
    let time = (rtt * TRIPS).clamp(SHORTEST, LONGEST);
    let burst =
        Burst { streams: choice.streams, bytes: BYTES, time, link: Mode::Internet, quic: false, limit };
    let tcp = match probe(dialler, Burst { bytes: FEW_BYTES, ..burst }).await {
        Ok(carried) => carried,
        Err(failure) => {
            warn!(%failure, "the link was not probed");
            return Found::tcp("it could not be measured");
        }
    };
    let carried = units::rate(tcp.steady);
    if limit.is_some_and(|limit| tcp.steady >= limit as f64 * ENOUGH) {
        return Found::tcp(format!("it carries {carried}, and no more may be taken of the link"));
    }
    if tcp.resent < NOTHING {
        return Found::tcp(format!("it carries {carried}, and loses nothing"));
    }
    if loses_its_own(&tcp, rtt, choice.streams) {
        return Found::tcp(format!("it carries {carried}, and loses only what it has too much in flight"));
    }
    let tcp = probe(dialler, burst).await.unwrap_or(tcp);
    let carried = units::rate(tcp.steady);
    let found = match probe(dialler, Burst { quic: true, ..burst }).await {
        Ok(quic) if quic.steady >= tcp.steady * CLEARLY => {
            Found::quic(format!("it carries {}, and TCP {carried}", units::rate(quic.steady)))
        }
        Ok(quic) => Found::tcp(format!("it carries {carried}, and QUIC {}", units::rate(quic.steady))),
        Err(failure) => Found::tcp(format!("QUIC carried nothing: {}", failure.message)),
    };
    Found { lossy: true, ..found }
}

/// Whether TCP lost only what it had too much in flight itself.
fn loses_its_own(carried: &Carried, rtt: Duration, streams: u32) -> bool {
    let queued = carried.queued.as_secs_f64() >= carried.rtt.unwrap_or(rtt).as_secs_f64() * FULL_QUEUE;
    let times = if queued { FULL_LOSSES } else { OWN_LOSSES };
    carried.steady >= left_by_losses(carried, rtt, streams) * times
}

/// Bytes a second that `streams` connections would carry if packets went on being lost as they were in the burst: Mathis, Semke, Mahdavi
/// and Ott, "The macroscopic behavior of the TCP congestion avoidance algorithm" (1997).
fn left_by_losses(carried: &Carried, rtt: Duration, streams: u32) -> f64 {
    let rtt = carried.rtt.unwrap_or(rtt).max(Duration::from_micros(1)).as_secs_f64();
    f64::from(streams) * 1.22 * SEGMENT / (rtt * carried.resent.sqrt())
}

impl Dialler {
    /// Makes a QUIC connection.
    pub(crate) async fn dial_quic(&self) -> Result<Connection, LinkError> {
        let options = DialOptions { connect_timeout: PATIENCE, ..self.options.clone() };
        dial_quic(self.addr, &self.identity, &self.to, &options).await
    }

    /// Whether the peer answers over UDP: an empty probe.
    async fn answers_over_quic(&self) -> Result<(), Failure> {
        let (mut reader, mut writer) = self.dial_quic().await.map_err(link_failure)?.into_split();
        write_message(&mut writer, Body::Probe(Probe {})).await.map_err(WireError::failure)?;
        writer.shutdown().await.map_err(|error| WireError::from(error).failure())?;
        read_message(&mut reader).await.map_err(WireError::failure).map(drop)
    }

    /// Makes a QUIC connection, or one of TLS over TCP where only UDP does not get through.
    pub(crate) async fn dial_quic_or_tcp(&self, options: &DialOptions) -> Result<Connection, LinkError> {
        let tcp = || dial(self.addr, &self.identity, &self.to, options);
        if self.without_quic().is_some() {
            return tcp().await;
        }
        let first = match self.dial_quic().await {
            Err(error) if error.is_transient() => error,
            done => return done,
        };
        let instead = tcp().await?;
        // The link may have come back between the two.
        match self.dial_quic().await {
            Err(_) => {
                let why = blocked(self.addr, &first);
                info!("{why}");
                // Several connections may find it out at once.
                let _ = self.quic.blocked.set(why);
                Ok(instead)
            }
            done => done,
        }
    }

    /// Why QUIC is not used any more though it was chosen.
    pub(crate) fn without_quic(&self) -> Option<&str> {
        self.quic.blocked.get().map(String::as_str)
    }
}

fn blocked(addr: SocketAddr, error: &LinkError) -> String {
    format!("TCP instead of QUIC: UDP does not get through to {addr}, and TCP does ({error})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_destination_is_told_nothing_that_it_does_not_know() {
        let before = Choice { path: 3, streams: 4, ..Choice::default() };
        let mut choice = before.clone();
        tell(&mut choice, &Offer::default(), "it carries more");
        assert_eq!(choice, before);
        tell(&mut choice, &Offer { quic: true, ..Offer::default() }, "it carries more");
        assert_eq!(choice.transport_reason, "it carries more");
    }

    #[test]
    fn losses_that_go_on_are_told_from_one_queue_that_overflowed() {
        let ms = Duration::from_millis;
        let own = |rate, rtt, resent| {
            let carried = Carried { steady: rate, best: rate, rtt: Some(rtt), queued: ms(0), resent };
            loses_its_own(&carried, rtt, 4)
        };
        // Full links whose queue ran over.
        assert!(own(24e6, ms(20), 0.03));
        assert!(own(110e6, ms(10), 0.02));
        // The beginning of a burst is faster than what comes after it.
        assert!(!own(4.7e6, ms(100), 0.006));
        // One packet of 200, and one of 2000, is lost whatever is in flight.
        assert!(!own(2e6, ms(100), 0.005));
        assert!(!own(10e6, ms(20), 0.000_5));
        // A burst at 200 Mbit/s that was slow at first: only the queue tells it from losses that go on.
        let carried = Carried { steady: 18e6, best: 25e6, rtt: Some(ms(20)), queued: ms(15), resent: 0.02 };
        assert!(loses_its_own(&carried, ms(20), 4));
        assert!(!loses_its_own(&Carried { queued: ms(2), ..carried }, ms(20), 4));
    }

    #[test]
    fn what_cannot_be_quic_has_a_reason_of_its_own() {
        let reason = |path, mode| super::reason(&Choice { path, mode, ..Choice::default() }, "found");
        assert_eq!(reason(3, Mode::Internet.to_wire()), "found");
        assert!(reason(3, Mode::Datacenter.to_wire()).contains("datacenter"));
        assert!(reason(1, Mode::Internet.to_wire()).contains("v1"));
    }
}
