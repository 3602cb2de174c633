//! A migration that has a session, at its destination: one task that listens to the peer, the VMM, the data path, the clock and the
//! operator, and feeds the handover.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use dwcp_proto::Path;
use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::{AbortReason, Input, Outcome, Transfer, VmmState};
use dwcp_proto::message::{Ack, Body, Purpose, Restarted, Veto};
use dwcp_vmm::mapped::Ram;
use dwcp_vmm::qmp::{Event as QmpEvent, EventKind, MigrationStatus, Qemu, RunState};
use dwcp_vmm::socket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};
use tracing::{Instrument, info, warn};

use super::kept::{self, Kept};
use super::land::{Landing, Order, Sink};
use super::{ARRIVALS, Incoming};
use crate::config::Gate;
use crate::control::{Control, Event};
use crate::error::{Blame, Failure};
use crate::guest::{Guest, next_event, open_failure, qmp_failure};
use crate::handshake::Arrival;
use crate::metrics::InFlight;
use crate::pilot::{Pilot, Step};
use crate::reins::{Pull, Reins};
use crate::report::{Report, Turned, told};
use crate::shared::Shared;
use crate::source::closing;
use crate::status::Phase;
/// Between two looks at figures and clocks.
const TICK: Duration = Duration::from_millis(250);
/// Between two tries of what a VMM or the journal refused.
const RETRY: Duration = Duration::from_secs(1);
/// How long a lost link is waited for before the receipt: longer than any source waits, so that it is the source who decides.
const PATIENCE: Duration = Duration::from_secs(3900);
/// The same before the first byte came.
const EARLY_PATIENCE: Duration = Duration::from_secs(600);
/// Changes of path that may wait to be recorded.
const TURNS: usize = 16;
/// The source's orders that may wait for the data path: it looks at them between two pieces of the stream.
const ORDERS: usize = 16;
/// The veto of a destination to which a page did not prove itself.
const DISTRUST: &str = "a page that was put together from what the destination holds was not what was sent";
/// Characters of a veto's reason.
const MAX_VETO: usize = 120;

/// Everything was given to the VMM.
pub(super) struct Arrived {
    pub(super) transfer: Transfer,
    /// The VMM's socket: it stays open until the VMM has taken what is in it.
    pub(super) _sink: Sink,
    /// The data connections: closed before the source knows that it is done, they would look lost to it.
    pub(super) _connections: Box<dyn Send>,
}

/// The state of a migration that has a session.
pub(super) struct Run {
    shared: Arc<Shared>,
    report: Arc<Report>,
    pub(super) pilot: Pilot,
    guest: Arc<Guest>,
    control: Control,
    incoming: Incoming,
    acks: watch::Sender<Ack>,
    rejoins: mpsc::Sender<Arrival>,
    data: Option<mpsc::Sender<Arrival>>,
    /// The source's orders to the data path, which may come before it has begun.
    orders: mpsc::Sender<Order>,
    ordered: Option<mpsc::Receiver<Order>>,
    /// The changes of path that were made.
    turns_tx: mpsc::Sender<Turned>,
    turns: mpsc::Receiver<Turned>,
    /// The path that the data is on.
    path: Path,
    /// This node's flag, for its veto.
    gate: watch::Receiver<Gate>,
    /// The connection to the VMM that an earlier life of this agent made.
    pub(super) kept: Option<Sink>,
    /// A life before this one knew the leg; the source has not begun a new one yet.
    pub(super) again: bool,
    /// What the source was told last of the veto.
    vetoed: Option<String>,
    transport: JoinSet<Result<Arrived, Failure>>,
    /// The guest's RAM, until the data path takes it.
    pub(super) ram: Option<Ram>,
    arrived: Option<Arrived>,
    whole: bool,
    failure: Option<Failure>,
    outcome: Option<Outcome>,
    /// Counts as running until it has ended.
    pub(super) in_flight: Option<InFlight>,
    pub(super) dark_since: Option<Instant>,
}

impl Run {
    #[allow(clippy::too_many_arguments, reason = "the parts of one state, made in one place")]
    pub(super) fn new(
        shared: &Arc<Shared>,
        report: &Arc<Report>,
        pilot: Pilot,
        guest: Arc<Guest>,
        control: Control,
        incoming: Incoming,
        acks: watch::Sender<Ack>,
        rejoins: mpsc::Sender<Arrival>,
    ) -> Self {
        let (turns_tx, turns) = mpsc::channel(TURNS);
        let (orders, ordered) = mpsc::channel(ORDERS);
        Run {
            shared: shared.clone(),
            report: report.clone(),
            pilot,
            guest,
            control,
            acks,
            rejoins,
            data: None,
            orders,
            ordered: Some(ordered),
            turns_tx,
            turns,
            path: incoming.session.leg.path,
            gate: shared.config.gate.clone(),
            vetoed: None,
            kept: None,
            again: false,
            incoming,
            transport: JoinSet::new(),
            ram: None,
            arrived: None,
            whole: false,
            failure: None,
            outcome: None,
            in_flight: None,
            dark_since: None,
        }
    }

    pub(super) async fn drive(
        &mut self,
        mut events: mpsc::Receiver<Event>,
        mut arrivals: mpsc::Receiver<Arrival>,
        mut reins: Reins,
    ) {
        let mut qmp = self.guest.reach().await.ok().map(|qemu| qemu.events());
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut retry = interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let steps = self.pilot.begin().await;
        self.take(steps).await;
        let guest = self.guest.clone();
        let gone = guest.gone();
        tokio::pin!(gone);
        let mut gone_seen = false;
        while self.outcome.is_none() {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.control_event(event).await,
                    None => {
                        self.fail(AbortReason::LinkLost, ended()).await;
                        // Never again in this life: the journal goes on from here.
                        return;
                    }
                },
                Some(arrival) = arrivals.recv() => self.arrival(arrival).await,
                event = next_event(&mut qmp) => match event {
                    Some(event) => self.qmp_event(event).await,
                    None => qmp = None,
                },
                Some(done) = self.transport.join_next() => match done {
                    Ok(Ok(arrived)) => {
                        self.arrived = Some(arrived);
                        self.whole_if_so().await;
                    }
                    Ok(Err(failure)) => self.transport_failed(failure).await,
                    Err(error) => self.transport_failed(
                        Failure::new("task", Blame::Local, format!("the data path failed: {error}"), "please report this"),
                    ).await,
                },
                () = &mut gone, if !gone_seen => {
                    gone_seen = true;
                    let advice = AbortReason::VmmGoneDestination.advice();
                    let failure = Failure::new("vmm_gone_destination", Blame::Vmm, "the destination's VMM ended", advice);
                    self.failure.get_or_insert(failure);
                    self.feed(Input::Vmm(VmmState::Gone)).await;
                }
                pull = reins.pull() => match pull {
                    Pull::Cancel => {
                        let failure = Failure::new("cancelled", Blame::Operator, AbortReason::Cancelled.advice(), "");
                        self.fail(AbortReason::Cancelled, failure).await;
                    }
                    Pull::Order(order) => {
                        let steps = order.give(&mut self.pilot).await;
                        self.take(steps).await;
                    }
                },
                Some(turned) = self.turns.recv() => self.turned(turned).await,
                Ok(()) = self.gate.changed() => self.veto().await,
                _ = retry.tick() => self.feed(Input::Retry).await,
                _ = tick.tick() => {
                    self.veto().await;
                    self.look().await;
                }
                // What cannot be ended now is gone on with from the journal.
                true = closing(&self.shared) => return,
            }
        }
        self.finish().await;
        // The source must learn how it ended, whenever it comes back to ask; the journal answers for longer than this agent lives.
        while !self.pilot.settled() {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.control_event(event).await,
                    None => return,
                },
                Some(arrival) = arrivals.recv() => self.arrival(arrival).await,
                Pull::Order(order) = reins.pull() => {
                    let steps = order.give(&mut self.pilot).await;
                    self.take(steps).await;
                }
                _ = retry.tick() => self.feed(Input::Retry).await,
                true = closing(&self.shared) => return,
            }
        }
    }

    async fn feed(&mut self, input: Input) {
        match self.pilot.feed(input).await {
            Ok(steps) => self.take(steps).await,
            Err(refused) => self.violation(refused.to_string()).await,
        }
    }

    async fn violation(&mut self, text: String) {
        self.shared.metrics.byzantine_attempt("protocol");
        let failure =
            Failure::new("protocol", Blame::PeerMisbehaving, text, AbortReason::PeerViolation.advice());
        warn!("{failure}");
        self.failure.get_or_insert(failure);
        if let Ok(steps) = self.pilot.feed(Input::Abort(AbortReason::PeerViolation)).await {
            Box::pin(self.take(steps)).await;
        }
    }

    async fn fail(&mut self, reason: AbortReason, failure: Failure) {
        warn!(code = %failure.code, reason = reason.code(), "{failure}");
        self.failure.get_or_insert(failure);
        self.feed(Input::Abort(reason)).await;
    }

    async fn take(&mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::StartMigration => {}
                Step::AcceptStream => {
                    if let Err(failure) = self.start().await {
                        warn!("{failure}");
                        self.failure.get_or_insert(failure);
                        let refused = self.pilot.feed(Input::Abort(AbortReason::VmmFailedDestination)).await;
                        if let Ok(steps) = refused {
                            Box::pin(self.take(steps)).await;
                        }
                    }
                }
                Step::Finished(outcome) => self.outcome = Some(outcome),
            }
        }
    }

    /// Opens a connection into QEMU, and starts the data path.
    async fn start(&mut self) -> Result<(), Failure> {
        let qemu = self.guest.reach().await.map_err(qmp_failure)?;
        let off =
            ["return-path", "xbzrle", "compress", "multifd", "postcopy-ram", "x-ignore-shared", "x-colo"];
        let mut capabilities = vec![("events", true), ("late-block-activate", true)];
        capabilities.extend(off.map(|name| (name, false)));
        qemu.set_capabilities(&capabilities).await.map_err(qmp_failure)?;
        let sink = match self.kept.take() {
            Some(sink) => sink,
            None => self.open(&qemu).await?,
        };
        let Some(orders) = self.ordered.take() else { return Ok(()) };
        let (data_tx, data) = mpsc::channel(ARRIVALS);
        self.data = Some(data_tx);
        let (incoming, acks) = (self.incoming.clone(), self.acks.clone());
        let ram = self.ram.take();
        let control = self.control.clone();
        let landing = Landing::new(incoming, control, data, orders, acks, sink, ram, self.again);
        self.transport.spawn(landing.receive(self.turns_tx.clone()).in_current_span());
        self.report.set(|s| s.phase = Phase::Precopy);
        self.pilot.note("receiving", "").await;
        Ok(())
    }

    /// A new connection to the waiting VMM: one that outlives this agent where that may attach to the VMM.
    async fn open(&mut self, qemu: &Qemu) -> Result<Sink, Failure> {
        if !self.shared.config.outlive {
            return Ok(Sink::new(socket::open_incoming(qemu).await.map_err(open_failure)?));
        }
        let (stream, mark) = dwcp_vmm::kept::open_incoming(qemu).await.map_err(open_failure)?;
        match Kept::new(&stream, mark, &self.incoming.session.offers) {
            Ok(kept) => self.pilot.note(kept::KEPT, kept.to_text()).await,
            Err(error) => warn!(%error, "a restart of this agent will cost this migration"),
        }
        Ok(Sink::kept(stream, 0))
    }

    async fn control_event(&mut self, event: Event) {
        match event {
            Event::Up => {
                if self.again {
                    self.control.say(Body::Restarted(Restarted {})).await;
                }
                if self.dark_since.take().is_some() {
                    self.pilot.note("link_up", "").await;
                }
                self.vetoed = None;
                self.veto().await;
                if !Mechanism::SayAgain.is_off() {
                    self.feed(Input::Connected).await;
                }
            }
            Event::Down(why) => {
                self.dark_since.get_or_insert_with(Instant::now);
                self.pilot.note("link_down", why).await;
            }
            Event::Message(Body::StreamEnd(end)) => self.order(Order::End(end)).await,
            Event::Message(Body::Switch(switch)) => self.order(Order::Switch(switch)).await,
            Event::Message(Body::Signed(signed)) => match self.pilot.hear(&signed).await {
                Ok(steps) => self.take(steps).await,
                Err(text) => self.violation(text).await,
            },
            Event::Message(body) => {
                self.violation(format!("the peer sent {} out of place", body.kind())).await;
            }
            Event::Lost(failure) => self.fail(AbortReason::PeerAborted, failure).await,
        }
    }

    /// Passes the source's order on to the data path.
    async fn order(&mut self, order: Order) {
        if self.ordered.is_some() {
            // The data path has not begun. More than it can take is said again, or was never due.
            let _ = self.orders.try_send(order);
        } else {
            // An ended data path has everything.
            let _ = self.orders.send(order).await;
        }
    }

    /// Tells the source whether v3 is wanted here, if that is news to it.
    async fn veto(&mut self) {
        let veto = self.gate.borrow_and_update().veto.as_ref().map(|reason| reason.text.clone());
        let veto = veto.or_else(|| self.incoming.distrust.load(Relaxed).then(|| DISTRUST.to_owned()));
        if veto != self.vetoed && self.outcome.is_none() {
            let reason = veto.as_deref().unwrap_or_default().chars().take(MAX_VETO).collect();
            self.control.say(Body::Veto(Veto { reason })).await;
            self.vetoed = veto;
        }
    }

    /// The data is on another leg.
    async fn turned(&mut self, Turned { leg, change }: Turned) {
        let (path, cause) = (leg.path, change.cause);
        self.path = path;
        self.again = false;
        self.report.turned(&leg, cause, &change.reason);
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.path(path);
        }
        let (what, text) = told(&leg, &change);
        self.pilot.note(what, text).await;
    }

    /// A connection of this session.
    async fn arrival(&mut self, arrival: Arrival) {
        if arrival.purpose == Purpose::Chunks && !arrival.quic {
            self.report.over_tcp("TCP instead of QUIC: the source's data connections come over TCP");
        }
        let target = match arrival.purpose {
            Purpose::Control => Some(&self.rejoins),
            Purpose::Chunks | Purpose::Bytes => self.data.as_ref(),
        };
        match target {
            Some(target) => {
                if target.send(arrival).await.is_err() {
                    info!("a connection came after the end of the data");
                }
            }
            None => {
                let text = "the destination's VMM is not ready yet";
                arrival.refuse(&Failure::new("busy", Blame::Vmm, text, "try again")).await;
            }
        }
    }

    async fn qmp_event(&mut self, event: QmpEvent) {
        match event.kind() {
            EventKind::Migration(MigrationStatus::Completed) => self.whole_if_so().await,
            EventKind::Migration(MigrationStatus::Failed) => {
                let why = self.guest.last_error().await;
                let text =
                    format!("QEMU could not load the guest: {}", why.as_deref().unwrap_or("see its log"));
                let advice = AbortReason::VmmFailedDestination.advice();
                let failure = Failure::new("vmm_failed_destination", Blame::Vmm, text, advice);
                self.fail(AbortReason::VmmFailedDestination, failure).await;
            }
            _ => {}
        }
    }

    /// Whole: all was given to the VMM, and it says `completed` and stands paused.
    async fn whole_if_so(&mut self) {
        let Some(transfer) = self.arrived.as_ref().filter(|_| !self.whole).map(|a| a.transfer) else {
            return;
        };
        let Ok(qemu) = self.guest.reach().await else { return };
        let (Ok(info), Ok(state)) = (qemu.migration().await, qemu.run_state().await) else { return };
        if info.status != Some(MigrationStatus::Completed) || state == RunState::InMigrate {
            return;
        }
        if state != RunState::Paused {
            let text = format!(
                "the destination's guest is {state} where it should stand paused: somebody else commands its VMM"
            );
            let failure = Failure::new(
                "foreign_start",
                Blame::Vmm,
                text,
                "give the agent a QMP socket of its own, and let nobody else say `cont`",
            );
            return self.fail(AbortReason::VmmFailedDestination, failure).await;
        }
        self.whole = true;
        self.report.set(|s| s.phase = Phase::Handover);
        self.pilot.note("delivered", format!("{} bytes of the VMM's stream", transfer.stream_len)).await;
        self.feed(Input::Whole(transfer)).await;
    }

    async fn transport_failed(&mut self, failure: Failure) {
        let reason = match failure.blame {
            Blame::PeerMisbehaving => AbortReason::Integrity,
            Blame::Link => AbortReason::LinkLost,
            Blame::Operator | Blame::PeerIncompatible => AbortReason::PeerAborted,
            Blame::Vmm => AbortReason::VmmFailedDestination,
            Blame::Local => AbortReason::Resources,
        };
        if self.path == Path::V3 {
            self.shared.metrics.v3_error(self.incoming.session.leg.mode, failure.blame);
        }
        self.fail(reason, failure).await;
    }

    async fn look(&mut self) {
        let in_doubt = self.pilot.phase() == "in_doubt" && self.dark_since.is_some();
        self.report.set(|s| {
            if in_doubt {
                s.phase = Phase::InDoubt;
            } else if s.phase == Phase::InDoubt {
                s.phase = Phase::Handover;
            }
        });
        self.shared.count_unresolved();
        self.whole_if_so().await;
        // Nothing came yet: a source that died before it wrote anything down knows of no migration and never comes back.
        let patience = if self.incoming.counters.raw.load() == 0 { EARLY_PATIENCE } else { PATIENCE };
        if self.dark_since.is_some_and(|since| since.elapsed() > patience) && !self.whole {
            self.dark_since = None;
            let text = format!("the link to the source was lost for {} s", patience.as_secs());
            let failure = Failure::new("link_lost", Blame::Link, text, AbortReason::LinkLost.advice());
            self.fail(AbortReason::LinkLost, failure).await;
        }
    }

    async fn finish(&mut self) {
        self.transport.abort_all();
        // QEMU has the whole stream; its socket may close.
        self.arrived = None;
        forget_kept(&self.shared, &self.guest).await;
        match self.outcome {
            Some(Outcome::Moved) => self.report.end(Phase::Completed, None),
            Some(Outcome::Aborted(reason)) => {
                let failure = self.failure.take().unwrap_or_else(|| Failure::aborted(reason));
                self.report.end(Phase::Aborted, Some(failure));
            }
            Some(Outcome::Lost) | None => {
                let alarms = self.pilot.alarms.join(", ");
                let text = format!("the guest started here, or may have, and its VMM is gone ({alarms})");
                let hint = "the source's VMM still holds the guest as it was at the handover";
                self.report.end(Phase::Failed, Some(Failure::new("guest_lost", Blame::Vmm, text, hint)));
            }
        }
        // QMP serves one client a socket; the guest is somebody else's business now.
        self.guest.release();
        let status = self.report.status();
        self.in_flight = None;
        self.shared.metrics.ended(&status);
        self.shared.count_unresolved();
        self.pilot.note("ended", status.status.clone()).await;
    }
}

fn ended() -> Failure {
    Failure::new("ended", Blame::Local, "the control connection's task ended", "please report this")
}

/// A VMM that goes on must not keep a copy of a connection that is over.
async fn forget_kept(shared: &Shared, guest: &Guest) {
    if shared.config.outlive
        && let Ok(qemu) = guest.reach().await
    {
        // It may never have been given one.
        let _ = dwcp_vmm::kept::forget(&qemu).await;
    }
}

/// The VMM does not take its stream any more.
pub(super) fn sink_failure(error: io::Error) -> Failure {
    let text = format!("the destination's VMM closed its migration socket: {error}");
    Failure::new("vmm_failed_destination", Blame::Vmm, text, AbortReason::VmmFailedDestination.advice())
}
