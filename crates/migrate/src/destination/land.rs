//! The data path of a migration at its destination: one leg after another, into one sink.
//!
//! ```text
//! leg n ── Switch (from the source) ──► nothing more is applied: X ──► Switched: X ──► leg n+1 from X
//! ```
//! What came on a leg and was not applied when it ended is forgotten: the source sends it again on the next.

use std::sync::atomic::Ordering::Relaxed;

use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Ack, Body, StreamEnd, Switch, Switched};
use dwcp_proto::negotiate::permits_again;
use dwcp_proto::path::{Cause, Change};
use dwcp_proto::session::{switch_message, switched_message};
use dwcp_proto::{Leg, Path, StreamOffset};
use dwcp_vmm::mapped::Ram;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tracing::info;

use super::{Arrived, Incoming, bytes, chunks, sink_failure};
use crate::control::Control;
use crate::error::{Blame, Failure};
use crate::handshake::Arrival;
use crate::report::Turned;

/// What the source says to the data path on the control connection.
#[derive(Debug)]
pub(crate) enum Order {
    /// Go on as another leg.
    Switch(Switch),
    /// The v1 stream is complete.
    End(StreamEnd),
}

/// How a leg ended.
pub(crate) enum Landed {
    /// Everything was applied.
    All(Transfer, Box<dyn Send>),
    /// The source goes on as another leg; with the digest of what was applied on this one.
    Turn(Turn, [u8; 32]),
}

/// A leg that the source asked for and that may be.
#[derive(Debug)]
pub(crate) struct Turn {
    switch: Switch,
    cause: Cause,
}

/// The VMM's socket, and how much of the stream it was given.
pub(crate) struct Sink {
    stream: Stream,
    applied: u64,
}

enum Stream {
    Unix(UnixStream),
    /// One whose other holder is the VMM itself: it must be told that the end has come.
    Kept(TcpStream),
}

impl Sink {
    /// A connection that ends with this agent.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Sink { stream: Stream::Unix(stream), applied: 0 }
    }

    /// A connection that outlives this agent, over which so much was given already.
    pub(crate) fn kept(stream: TcpStream, applied: u64) -> Self {
        Sink { stream: Stream::Kept(stream), applied }
    }

    /// Gives the VMM the next bytes of its stream. Not to be cancelled: what is half written is neither applied nor not.
    pub(crate) async fn apply(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.apply_for(bytes, bytes.len() as u64).await
    }

    /// The same where `bytes` are what is left of `stream_len` bytes of the stream, without the pages that went into RAM.
    pub(crate) async fn apply_for(&mut self, bytes: &[u8], stream_len: u64) -> Result<(), Failure> {
        let written = match &mut self.stream {
            Stream::Unix(stream) => stream.write_all(bytes).await,
            Stream::Kept(stream) => stream.write_all(bytes).await,
        };
        written.map_err(sink_failure)?;
        self.applied += stream_len;
        Ok(())
    }

    /// Up to where it was given everything.
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        if let Stream::Kept(stream) = &self.stream {
            // An end that was reached already is as good.
            let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
        }
    }
}

/// What every leg needs.
pub(crate) struct Landing {
    pub(crate) incoming: Incoming,
    pub(crate) control: Control,
    pub(crate) arrivals: mpsc::Receiver<Arrival>,
    pub(crate) orders: mpsc::Receiver<Order>,
    pub(crate) acks: watch::Sender<Ack>,
    pub(crate) sink: Sink,
    /// The guest's RAM, until a leg takes it.
    pub(crate) ram: Option<Ram>,
    /// Pages that did not prove themselves.
    pub(crate) unproved: u32,
    /// A life of the agent before this one began to receive.
    again: bool,
    /// The answer to the last order, said again where it may have been lost.
    switched: Option<Switched>,
}

impl Landing {
    #[allow(clippy::too_many_arguments, reason = "the parts of one state, made in one place")]
    pub(crate) fn new(
        incoming: Incoming,
        control: Control,
        arrivals: mpsc::Receiver<Arrival>,
        orders: mpsc::Receiver<Order>,
        acks: watch::Sender<Ack>,
        sink: Sink,
        ram: Option<Ram>,
        again: bool,
    ) -> Self {
        let (unproved, switched) = (0, None);
        Landing { incoming, control, arrivals, orders, acks, sink, ram, unproved, again, switched }
    }

    /// Receives until the whole stream was applied. Each turn is told to `turns`.
    pub(crate) async fn receive(mut self, turns: mpsc::Sender<Turned>) -> Result<Arrived, Failure> {
        let mut leg = match self.again {
            false => self.incoming.session.leg.clone(),
            true => self.anew(&turns).await?,
        };
        loop {
            self.acks.send_replace(Ack { applied: leg.from.0, leg: leg.number, ..Ack::default() });
            let landed = match leg.path {
                Path::V3 => chunks::receive(&mut self, &leg).await?,
                Path::V1 => bytes::receive(&mut self, &leg).await?,
            };
            let (turn, carried) = match landed {
                Landed::All(transfer, connections) => {
                    return Ok(Arrived { transfer, _sink: self.sink, _connections: connections });
                }
                Landed::Turn(turn, carried) => (turn, carried),
            };
            let applied = StreamOffset(self.sink.applied);
            let next = turn.switch.choice.clone().and_then(|choice| leg.next(choice, applied, carried));
            leg = next.ok_or_else(|| protocol("the source asked for a leg that cannot be"))?;
            self.answer(&leg, carried.to_vec(), turn, &turns).await;
            self.incoming.distrust.store(self.unproved > 1, Relaxed);
        }
    }

    /// After a restart: the source orders a new leg, which begins at what the VMM was given.
    async fn anew(&mut self, turns: &mpsc::Sender<Turned>) -> Result<Leg, Failure> {
        loop {
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(Order::Switch(switch)) => {
                        let turn = self.check(switch)?;
                        let (number, choice) = (turn.switch.leg, turn.switch.choice.clone().unwrap_or_default());
                        let session = &self.incoming.session.id;
                        let leg = Leg::anew(session, number, choice, StreamOffset(self.sink.applied));
                        let leg = leg.ok_or_else(|| protocol("the source asked for a leg that cannot be"))?;
                        self.answer(&leg, Vec::new(), turn, turns).await;
                        return Ok(leg);
                    }
                    // Of a leg that is over.
                    Some(Order::End(_)) => {}
                    None => return Err(ended()),
                },
                arrival = self.arrivals.recv() => match arrival {
                    Some(arrival) => {
                        let text = "the destination's agent was restarted and waits for the source's word";
                        arrival.refuse(&Failure::new("busy", Blame::Local, text, "try again")).await;
                    }
                    None => return Err(ended()),
                },
            }
        }
    }

    /// Says where the new leg begins.
    async fn answer(&mut self, leg: &Leg, carried: Vec<u8>, turn: Turn, turns: &mpsc::Sender<Turned>) {
        let applied = leg.from;
        info!(leg = leg.number, path = leg.path.name(), offset = %applied, cause = %turn.cause, "the path changes");
        let session = self.incoming.session.clone();
        let mut switched = Switched { leg: leg.number, applied: applied.0, carried, signature: Vec::new() };
        switched.signature = session.key.sign(&switched_message(&session.id, &switched)).to_vec();
        self.control.say(Body::Switched(switched.clone())).await;
        self.switched = Some(switched);
        let change = Change { to: leg.path, cause: turn.cause, reason: turn.switch.reason };
        // A full queue means that the migration's task waits for a VMM; the status tells all the same.
        let _ = turns.try_send(Turned { leg: leg.clone(), change });
    }

    /// A data connection, if it is one of `leg`'s; another one is refused.
    pub(crate) async fn admit(&self, arrival: Arrival, leg: &Leg) -> Option<Arrival> {
        if arrival.belongs(leg) {
            return Some(arrival);
        }
        // An honest source is merely late here; it knows by now, or will soon, on which leg the data is.
        let text = format!("this connection does not belong to leg {}, on {}", leg.number, leg.path.name());
        arrival.refuse(&Failure::new("wrong_leg", Blame::PeerMisbehaving, text, "")).await;
        None
    }

    /// Judges an order to go on as another leg than `leg`; none if it was obeyed already.
    pub(crate) async fn judge(&self, switch: Switch, leg: &Leg) -> Result<Option<Turn>, Failure> {
        let turn = self.check(switch)?;
        let switch = &turn.switch;
        if switch.leg == leg.number {
            if let Some(switched) = &self.switched {
                self.control.say(Body::Switched(switched.clone())).await;
            }
            return Ok(None);
        }
        // The number may be the peer's own, after a restart.
        if leg.number.checked_add(1) != Some(switch.leg) {
            return Err(protocol("the source asked for a leg out of turn"));
        }
        Ok(Some(turn))
    }

    /// Checks who ordered a leg, and whether it stays within what was offered.
    fn check(&self, switch: Switch) -> Result<Turn, Failure> {
        let session = &self.incoming.session;
        let signature = <&[u8; 64]>::try_from(switch.signature.as_slice());
        let message = switch_message(&session.id, &switch);
        if !signature.is_ok_and(|signature| session.peer.verify(&message, signature)) {
            let text = "the signature of the source's switch is wrong";
            return Err(Failure::new("sig_forge", Blame::PeerMisbehaving, text, ""));
        }
        let cause = Cause::ALL.into_iter().find(|cause| cause.code() == switch.cause);
        let cause = cause.ok_or_else(|| protocol("the source gave no known cause for its switch"))?;
        if switch.reason.len() > MAX_REASON || switch.reason.chars().any(char::is_control) {
            return Err(protocol("the source gave too many words for its switch"));
        }
        let choice = switch.choice.clone().unwrap_or_default();
        let offers = &session.offers;
        permits_again(&choice, &offers.source, &offers.destination).map_err(|why| {
            let text = format!("the source chose what was not offered: {why}");
            Failure::new("downgrade_v1", Blame::PeerMisbehaving, text, "compare both agents' policies")
        })?;
        Ok(Turn { switch, cause })
    }

    /// A page did not prove itself: this leg cannot go on. The source learns it as a veto, which ends with the leg; but not
    /// a second time, then v1 is where it stays.
    pub(crate) fn distrust(&mut self) {
        self.unproved += 1;
        self.incoming.distrust.store(true, Relaxed);
    }

    /// The data connections on which nothing comes though it is waited for; said again at each look for as long as there are any.
    pub(crate) fn silent(&self, silent: Vec<u32>) {
        self.acks.send_if_modified(|ack| {
            let news = !silent.is_empty() || !ack.silent.is_empty();
            ack.silent = silent;
            news
        });
    }

    /// So many bytes have arrived and wait for a chunk that has not.
    pub(crate) fn holds(&self, held: u64) {
        self.acks.send_if_modified(|ack| std::mem::replace(&mut ack.held, held) != held);
    }

    /// Something was applied: the source may forget it.
    pub(crate) fn acknowledge(&self, ack: Ack) {
        self.acks.send_replace(ack);
    }
}

/// Bytes of a switch's reason: it is shown in status.
const MAX_REASON: usize = 1024;

fn protocol(text: &str) -> Failure {
    Failure::new("protocol", Blame::PeerMisbehaving, text, "compare both agents' versions")
}

/// The migration's task has ended.
pub(crate) fn ended() -> Failure {
    Failure::new("ended", Blame::Local, "the migration has ended", "")
}
