//! The data path of a migration at its source: one leg after another, each on its path, from one reel.
//!
//! ```text
//! leg n ── the helm turns ──► Switch (said on each control connection) ──► Switched: X ──► leg n+1 from X
//! ```
//! Invariants: one leg's connections exist at a time; no byte of a leg is sent after its turn; what the destination applied before X
//! is what was sent, by the digest of both sides.

use dwcp_proto::handover::Transfer;
use dwcp_proto::message::{Body, Switch, Switched};
use dwcp_proto::negotiate::{Wish, choose_again};
use dwcp_proto::path::{Cause, Change};
use dwcp_proto::session::{switch_message, switched_message};
use dwcp_proto::{Leg, Mode, Path, StreamOffset};
use tokio::sync::mpsc;
use tracing::info;

use super::helm::Helm;
use super::reel::{BeyondEnd, Reel};
use super::{Outgoing, bytes, chunks};
use crate::control::{Control, DataEvent};
use crate::error::{Blame, Failure};
use crate::report::Turned;
use crate::transport;

/// What the peer says to the data path.
pub(crate) type Peer = mpsc::Receiver<DataEvent>;

/// How a leg ended.
pub(crate) enum Carried {
    /// Everything was applied at the destination.
    All(Transfer),
    /// The path or the mode should change.
    Turn(Change),
}

/// A path's state after its leg, as far as the turn needs it.
enum Before {
    Chunks(Box<chunks::Stage>),
    Bytes(Box<bytes::Ring>),
}

/// Carries the VMM's stream; returns once the destination has applied every byte. Each turn is told to `turns`.
pub(crate) async fn carry(
    out: Outgoing,
    control: Control,
    mut reel: Reel,
    mut peer: Peer,
    mut helm: Helm,
    turns: mpsc::Sender<Turned>,
) -> Result<Transfer, Failure> {
    let mut leg = out.leg();
    let mut link = out.link;
    loop {
        out.metrics.begins(&leg);
        let (carried, mut before) = match leg.path {
            Path::V3 => {
                let (carried, stage) = chunks::send(&out, &leg, &mut reel, &mut peer, &mut helm).await?;
                (carried, Before::Chunks(Box::new(stage)))
            }
            Path::V1 => {
                let (carried, ring) =
                    bytes::send(&out, &control, &leg, &mut reel, &mut peer, &mut helm).await?;
                (carried, Before::Bytes(Box::new(ring)))
            }
        };
        let change = match carried {
            Carried::All(transfer) => return Ok(transfer),
            Carried::Turn(change) => change,
        };
        let mode = helm.mode();
        info!(to = change.to.name(), mode = mode.name(), cause = %change.cause, reason = %change.reason, "the leg ends");
        // A link that was an internet's once is not trusted again in this session: what was TLS stays TLS.
        if matches!(change.cause, Cause::LinkFar | Cause::LinkSlow) {
            link = Mode::Internet;
        }
        let switch = order(&out, &leg, &change, mode, link)?;
        let switched = ask(&out, &control, &switch, &mut peer, &mut helm).await?;
        let from = StreamOffset(switched.applied);
        let choice = switch.choice.unwrap_or_default();
        let next = if switched.carried.is_empty() {
            // It was restarted: what its VMM was given is all that it knows, and nothing was signed for it yet.
            Leg::anew(&out.session.id, switch.leg, choice, from)
        } else {
            let carried = match &mut before {
                Before::Chunks(stage) => stage.carried_until(from.0)?,
                Before::Bytes(ring) => ring.carried_until(&mut reel, from.0)?,
            };
            if switched.carried != carried {
                let text =
                    "what the destination applied is not what was sent, by the digest at the change of path";
                let hint = "the guest is safe here";
                return Err(Failure::new("lying_destination", Blame::PeerMisbehaving, text, hint));
            }
            leg.next(choice, from, carried)
        };
        reel.trim(from.0, |_| {}).map_err(beyond_end)?;
        leg =
            next.ok_or_else(|| Failure::new("leg", Blame::Local, "no further leg", "please report this"))?;
        reel.rewind();
        helm.turned(&leg, change.cause);
        info!(leg = leg.number, path = leg.path.name(), mode = leg.mode.name(), offset = %leg.from, "goes on");
        out.begin(&leg);
        // A full queue means that the migration's task waits for a VMM; the status tells all the same.
        let _ = turns.try_send(Turned { leg: leg.clone(), change });
    }
}

/// The order to go on as another leg, where v3 has this mode and policy sees this link.
fn order(out: &Outgoing, leg: &Leg, change: &Change, mode: Mode, link: Mode) -> Result<Switch, Failure> {
    let (source, destination) = (&out.session.offers.source, &out.session.offers.destination);
    let quic = out.wish.quic && out.dialler.without_quic().is_none();
    let wish = Wish { path: Some(change.to), mode: Some(mode), quic, ..out.wish };
    let mut choice = match change.cause {
        Cause::Restarted => leg.choice.clone(),
        _ => choose_again(source, destination, wish, link, &leg.choice).map_err(|why| {
            let text = format!("{} ({}), and {why}", change.reason, change.cause);
            let code = if change.to == Path::V1 { "v1_barred" } else { "no_path" };
            Failure::new(code, Blame::Operator, text, "change [policy] v1, or the flag")
        })?,
    };
    choice.mode_reason = match Cause::OF_MODE.contains(&change.cause) {
        true => change.reason.clone(),
        false => leg.choice.mode_reason.clone(),
    };
    let found = out.dialler.without_quic().unwrap_or(&out.transport_reason);
    transport::tell(&mut choice, destination, found);
    let mut switch = Switch {
        leg: leg.number + 1,
        choice: Some(choice),
        cause: change.cause.code().to_owned(),
        reason: change.reason.clone(),
        signature: Vec::new(),
    };
    switch.signature = out.session.key.sign(&switch_message(&out.session.id, &switch)).to_vec();
    Ok(switch)
}

/// Says the order until it is answered.
async fn ask(
    out: &Outgoing,
    control: &Control,
    switch: &Switch,
    peer: &mut Peer,
    helm: &mut Helm,
) -> Result<Switched, Failure> {
    control.say(Body::Switch(switch.clone())).await;
    loop {
        match peer.recv().await {
            Some(DataEvent::Up) => control.say(Body::Switch(switch.clone())).await,
            Some(DataEvent::Veto(reason)) => helm.veto(&reason),
            Some(DataEvent::Switched(switched)) if switched.leg == switch.leg => {
                let message = switched_message(&out.session.id, &switched);
                let signature = <&[u8; 64]>::try_from(switched.signature.as_slice());
                if signature.is_ok_and(|signature| out.session.peer.verify(&message, signature)) {
                    return Ok(switched);
                }
                let text = "the signature of the peer's switched is wrong";
                return Err(Failure::new("sig_forge", Blame::PeerMisbehaving, text, ""));
            }
            // Of the leg that is over; or a restart, after which the order is said again as on any new connection.
            Some(DataEvent::Ack(_) | DataEvent::Switched(_) | DataEvent::Restarted) => {}
            None => return Err(Failure::new("ended", Blame::Local, "the migration has ended", "")),
        }
    }
}

/// The change that a restart of the destination's agent makes necessary.
pub(crate) fn restarted(leg: &Leg) -> Change {
    let reason = "the destination's agent was restarted".to_owned();
    Change { to: leg.path, cause: Cause::Restarted, reason }
}

/// The peer claims to have applied what it was never sent.
pub(crate) fn beyond_end(error: BeyondEnd) -> Failure {
    Failure::new("forged_ack", Blame::PeerMisbehaving, error.to_string(), "")
}
