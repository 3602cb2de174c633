//! A migration that has a session, at its source: one task that listens to the peer, the VMM, the data path, the clock and the
//! operator, and feeds the handover.

mod launch;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::{AbortReason, Input, Outcome, Transfer, VmmState};
use dwcp_proto::message::{Body, StreamEnd};
use dwcp_proto::mode::ModeChoice;
use dwcp_proto::path::Cause;
use dwcp_proto::{MigrationId, Mode, Path};
use dwcp_vmm::direct::Fit;
use dwcp_vmm::qmp::{Event as QmpEvent, EventKind, Events, MigrationInfo, MigrationStatus};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until};
use tracing::{debug, warn};

use super::carry::Peer;
use super::helm::SwitchOrder;
use super::ingest::Inlet;
use super::{Outgoing, cancelled};
use crate::control::{Control, Event};
use crate::error::{Blame, Failure};
use crate::guest::{Guest, next_event};
use crate::metrics::InFlight;
use crate::pilot::{Pilot, Step};
use crate::reins::{Pull, Reins};
use crate::report::{Report, Turned, told};
use crate::shared::Shared;
use crate::spec::Channels;
use crate::status::Phase;

pub(super) use launch::UNLIMITED;

/// Between two looks at the VMM's progress.
const TICK: Duration = Duration::from_millis(250);
/// Between two tries of what a VMM or the journal refused.
const RETRY: Duration = Duration::from_secs(1);
/// How long the guest may stand still waiting for a lost link before it is taken back.
const SWITCHOVER_PATIENCE: Duration = Duration::from_secs(10);
/// How long precopy waits for a lost link.
const PRECOPY_PATIENCE: Duration = Duration::from_secs(3600);
/// How long a migration that is asked to end at the agent's stop may take.
const GRACE: Duration = Duration::from_secs(8);
/// Changes of path that may wait to be recorded.
const TURNS: usize = 16;

/// The state of a migration that has a session.
pub(super) struct Run {
    shared: Arc<Shared>,
    id: MigrationId,
    report: Arc<Report>,
    pilot: Pilot,
    guest: Arc<Guest>,
    control: Control,
    outgoing: Outgoing,
    /// The downtime limit that QEMU is told.
    pub(super) vmm_limit: Duration,
    pub(super) deadline: Option<Instant>,
    /// What went wrong first, for the status.
    failure: Option<Failure>,
    outcome: Option<Outcome>,
    /// Counts as running until it has ended.
    pub(super) in_flight: Option<InFlight>,
    /// The VMM's end of the data path. Held here too: a data path that failed says why before the VMM notices that its stream is gone.
    stream: Option<Arc<Inlet>>,
    /// How the VMM gives its stream.
    pub(super) channels: Channels,
    /// The guest's RAM, where it is to be read directly, or why it is not.
    pub(super) direct: Option<Result<Fit, String>>,
    /// What the VMM announces.
    qmp: Option<Events>,
    /// Bytes of the guest's RAM.
    pub(super) ram: u64,
    /// The data path's task.
    transport: JoinSet<Result<Transfer, Failure>>,
    /// What the peer says to the data path, until that is started.
    pub(super) data: Option<Peer>,
    /// The path that the caller asked for by name.
    pub(super) fixed: Option<Path>,
    /// Which mode the link calls for, until the data path takes it.
    pub(super) mode: Option<ModeChoice>,
    /// An operator's wishes for a path, until the data path takes them.
    pub(super) switches: Option<mpsc::Receiver<SwitchOrder>>,
    /// The guest stands still for the switchover.
    stopped: watch::Sender<bool>,
    /// The changes of path that were made.
    turns_tx: mpsc::Sender<Turned>,
    turns: mpsc::Receiver<Turned>,
    /// The task that asks the VMM how far it is, and its answers.
    monitor: JoinSet<()>,
    info_tx: mpsc::Sender<MigrationInfo>,
    info: mpsc::Receiver<MigrationInfo>,
    /// Everything was applied at the destination.
    transfer: Option<Transfer>,
    /// The VMM is in `postmigrate`.
    vmm_done: bool,
    whole: bool,
    stopped_at: Option<Instant>,
    /// When the destination last said something of the handover.
    heard_at: Option<Instant>,
    pub(super) dark_since: Option<Instant>,
    fraction: f64,
    /// What was reported to the metrics so far: stream bytes, guest bytes.
    carried: (u64, u64),
    /// The path and mode that carried what is not reported yet.
    counted: (Path, Mode),
}

impl Run {
    pub(super) fn new(
        shared: &Arc<Shared>,
        id: &MigrationId,
        report: &Arc<Report>,
        pilot: Pilot,
        guest: Arc<Guest>,
        control: Control,
        outgoing: Outgoing,
    ) -> Self {
        let (info_tx, info) = mpsc::channel(1);
        let carried = (outgoing.counters.raw.load(), outgoing.counters.guest.load());
        let (turns_tx, turns) = mpsc::channel(TURNS);
        Run {
            shared: shared.clone(),
            id: id.clone(),
            report: report.clone(),
            pilot,
            guest,
            control,
            vmm_limit: Duration::ZERO,
            deadline: None,
            failure: None,
            outcome: None,
            in_flight: None,
            stream: None,
            channels: Channels::ONE,
            direct: None,
            qmp: None,
            ram: 0,
            transport: JoinSet::new(),
            data: None,
            fixed: None,
            mode: None,
            switches: None,
            stopped: watch::Sender::new(false),
            turns_tx,
            turns,
            monitor: JoinSet::new(),
            info_tx,
            info,
            transfer: None,
            vmm_done: false,
            whole: false,
            stopped_at: None,
            heard_at: None,
            dark_since: None,
            fraction: 0.0,
            // An earlier attempt has been counted.
            carried,
            counted: (outgoing.session.leg.path, outgoing.session.leg.mode),
            outgoing,
        }
    }

    pub(super) async fn drive(&mut self, mut events: mpsc::Receiver<Event>, mut reins: Reins) {
        self.qmp = self.guest.reach().await.ok().map(|qemu| qemu.events());
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
            let deadline = self.deadline.map(tokio::time::Instant::from_std);
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.control_event(event).await,
                    None => {
                        self.fail(AbortReason::LinkLost, ended()).await;
                        // Never again in this life: the journal goes on from here.
                        return;
                    }
                },
                event = next_event(&mut self.qmp) => match event {
                    Some(event) => self.qmp_event(event).await,
                    None => self.qmp = None,
                },
                Some(done) = self.transport.join_next() => match done {
                    Ok(Ok(transfer)) => {
                        self.transfer = Some(transfer);
                        self.whole_if_so().await;
                    }
                    Ok(Err(failure)) => self.transport_failed(failure).await,
                    Err(error) => self.transport_failed(
                        Failure::new("task", Blame::Local, format!("the data path failed: {error}"), "please report this"),
                    ).await,
                },
                () = &mut gone, if !gone_seen => {
                    gone_seen = true;
                    self.feed(Input::Vmm(VmmState::Gone)).await;
                }
                pull = reins.pull() => match pull {
                    Pull::Cancel => {
                        self.fail(AbortReason::Cancelled, cancelled()).await;
                    }
                    Pull::Order(order) => {
                        let steps = order.give(&mut self.pilot).await;
                        self.take(steps).await;
                    }
                },
                () = async { match deadline { Some(d) => sleep_until(d).await, None => std::future::pending().await } } => {
                    self.deadline = None;
                    let advice = AbortReason::Deadline.advice();
                    let text = self.deadline_text();
                    self.fail(AbortReason::Deadline, Failure::new("deadline", Blame::Operator, text, advice)).await;
                }
                Some(info) = self.info.recv() => self.progress(info).await,
                Some(turned) = self.turns.recv() => self.turned(turned).await,
                _ = retry.tick() => self.feed(Input::Retry).await,
                _ = tick.tick() => self.look().await,
                // What cannot be ended now is gone on with from the journal.
                true = closing(&self.shared) => return,
            }
        }
        self.finish().await;
        // Whoever is in doubt at the other end must be able to ask, for as long as this agent lives; its journal lives longer.
        while !self.pilot.settled() {
            tokio::select! {
                event = events.recv() => match event {
                    // It does not know the session: nobody is in doubt there.
                    Some(Event::Lost(_)) if self.report.is_due() => return,
                    Some(Event::Lost(_)) => return self.pilot.retire().await,
                    None => return,
                    Some(event) => self.control_event(event).await,
                },
                pull = reins.pull() => match pull {
                    Pull::Order(order) => {
                        let steps = order.give(&mut self.pilot).await;
                        self.take(steps).await;
                    }
                    // No further attempt, then.
                    Pull::Cancel if self.report.is_due() => return,
                    Pull::Cancel => {}
                },
                _ = retry.tick() => self.feed(Input::Retry).await,
                true = closing(&self.shared) => return,
            }
        }
    }

    /// Moves the journal to the archive if nobody will have a question any more.
    pub(super) async fn retire_if_settled(&mut self) {
        // One after which another attempt is due tells a restarted agent so.
        if !self.report.is_due() {
            self.pilot.retire_if_settled().await;
        }
    }

    /// Feeds the handover; a violation by the peer ends the migration.
    async fn feed(&mut self, input: Input) {
        match self.pilot.feed(input).await {
            Ok(steps) => self.take(steps).await,
            Err(refused) => self.violation(refused.to_string()).await,
        }
    }

    async fn violation(&mut self, text: String) {
        self.shared.metrics.byzantine_attempt("protocol");
        let hint = AbortReason::PeerViolation.advice();
        let failure = Failure::new("protocol", Blame::PeerMisbehaving, text, hint);
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
                Step::StartMigration => {
                    if let Err(failure) = self.start().await {
                        self.failure.get_or_insert(failure);
                        let refused = self.pilot.feed(Input::Abort(AbortReason::VmmFailedSource)).await;
                        if let Ok(steps) = refused {
                            Box::pin(self.take(steps)).await;
                        }
                    }
                }
                Step::AcceptStream => {}
                Step::Finished(outcome) => {
                    self.hold_receipt();
                    self.outcome = Some(outcome);
                }
            }
        }
    }

    /// A receipt for something else than what was delivered is the destination's own word, well signed, and a lie.
    fn hold_receipt(&mut self) {
        if let (Some(receipt), Some(delivered), None) = (self.pilot.receipt, self.transfer, &self.failure)
            && receipt != delivered
            && !Mechanism::Receipt.is_off()
        {
            self.shared.metrics.byzantine_attempt("forged_receipt");
            let text = "the destination gave a receipt for something else than what was delivered to it";
            let hint = AbortReason::Integrity.advice();
            self.failure = Some(Failure::new("forged_receipt", Blame::PeerMisbehaving, text, hint));
        }
    }

    async fn control_event(&mut self, event: Event) {
        match event {
            Event::Up => {
                if self.dark_since.take().is_some() {
                    self.pilot.note("link_up", "").await;
                }
                // The data path has ended with the last acknowledgement; that the stream ends there may have been lost.
                if let (Some(transfer), false) = (self.transfer, self.heard_at.is_some()) {
                    let leg = self.outgoing.leg();
                    if leg.path == Path::V1 {
                        let end = StreamEnd { length: transfer.stream_len, leg: leg.number };
                        self.control.say(Body::StreamEnd(end)).await;
                    }
                }
                if !Mechanism::SayAgain.is_off() {
                    self.feed(Input::Connected).await;
                }
            }
            Event::Down(why) => {
                self.dark_since.get_or_insert_with(Instant::now);
                self.pilot.note("link_down", why).await;
            }
            Event::Message(Body::Signed(signed)) => {
                self.heard_at = Some(Instant::now());
                match self.pilot.hear(&signed).await {
                    Ok(steps) => self.take(steps).await,
                    Err(text) => self.violation(text).await,
                }
                if let Some(receipt) = self.pilot.receipt {
                    self.outgoing.receipt.send_replace(Some(receipt));
                }
            }
            // The data path has ended, so all was applied; only the receipt is missing, and will not come.
            Event::Message(Body::Restarted(_)) => {
                let text = "the destination's agent was restarted between the last byte and its receipt";
                let failure = Failure::new(
                    "agent_restarted",
                    Blame::PeerIncompatible,
                    text,
                    AbortReason::AgentRestarted.advice(),
                );
                self.fail(AbortReason::AgentRestarted, failure).await;
            }
            Event::Message(body) => {
                self.violation(format!("the peer sent {} out of place", body.kind())).await;
            }
            Event::Lost(failure) => self.fail(AbortReason::PeerAborted, failure).await,
        }
    }

    /// That the deadline passed, and what else the operator should know of it.
    fn deadline_text(&self) -> String {
        let turned = self.report.status().fallback_reasons.into_iter().rfind(|_| self.counted.0 == Path::V1);
        match turned {
            Some(reason) => format!("the deadline passed; v1 could not keep it (why v1: {reason})"),
            None => "the deadline passed".to_owned(),
        }
    }

    /// The data is on another leg.
    async fn turned(&mut self, Turned { leg, change }: Turned) {
        // What was carried so far counts for the path that carried it.
        self.count();
        self.counted = (leg.path, leg.mode);
        let (path, cause) = (leg.path, change.cause);
        self.report.turned(&leg, cause, &change.reason);
        match Cause::OF_MODE.contains(&cause) {
            true => self.shared.metrics.mode_switched(leg.mode, cause),
            false => self.shared.metrics.switched(path, cause),
        }
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.path(path);
        }
        let (what, text) = told(&leg, &change);
        self.pilot.note(what, text).await;
    }

    async fn qmp_event(&mut self, event: QmpEvent) {
        match event.kind() {
            EventKind::Stop if self.stopped_at.is_none() && self.data.is_none() => {
                // The event's own time is nearer to the truth than its arrival here.
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let migration = self.report.started().elapsed();
                let age = event.at.and_then(|at| now.checked_sub(at)).filter(|age| *age < migration);
                self.stopped_at = Instant::now().checked_sub(age.unwrap_or_default());
                self.stopped.send_replace(true);
                self.outgoing.throttle.urgent(true);
                self.report.set(|s| s.phase = s.phase.max(Phase::Switchover));
                self.pilot.note("switchover", "the guest stopped").await;
            }
            EventKind::Resume => {
                self.stopped_at = None;
                self.stopped.send_replace(false);
                self.outgoing.throttle.urgent(false);
                let back = |p| if p == Phase::Switchover { Phase::Precopy } else { p };
                self.report.set(|s| s.phase = back(s.phase));
            }
            EventKind::Migration(MigrationStatus::Completed) => {
                self.vmm_done = true;
                self.whole_if_so().await;
            }
            EventKind::Migration(MigrationStatus::Failed | MigrationStatus::Cancelled)
                if self.outcome.is_none() =>
            {
                let why = self.guest.last_error().await;
                let text =
                    format!("QEMU's migration failed: {}", why.as_deref().unwrap_or("no reason given"));
                let hint = AbortReason::VmmFailedSource.advice();
                self.fail(
                    AbortReason::VmmFailedSource,
                    Failure::new("vmm_failed_source", Blame::Vmm, text, hint),
                )
                .await;
            }
            _ => {}
        }
    }

    async fn whole_if_so(&mut self) {
        if let (Some(transfer), true, false) = (self.transfer, self.vmm_done, self.whole) {
            self.whole = true;
            self.report.set(|s| s.phase = Phase::Handover);
            self.pilot.note("delivered", format!("{} bytes of the VMM's stream", transfer.stream_len)).await;
            self.feed(Input::Whole(transfer)).await;
        }
    }

    async fn transport_failed(&mut self, failure: Failure) {
        let reason = match failure.blame {
            Blame::PeerMisbehaving => {
                self.shared.metrics.byzantine_attempt(&failure.code);
                AbortReason::Integrity
            }
            Blame::Link => AbortReason::LinkLost,
            Blame::Operator if failure.code == "v1_barred" => AbortReason::Policy,
            Blame::Operator | Blame::PeerIncompatible => AbortReason::PeerAborted,
            Blame::Vmm => AbortReason::VmmFailedSource,
            Blame::Local => AbortReason::Resources,
        };
        let leg = self.outgoing.leg();
        if leg.path == Path::V3 {
            self.shared.metrics.v3_error(leg.mode, failure.blame);
        }
        self.failure.get_or_insert_with(|| failure.clone());
        self.stream = None;
        self.fail(reason, failure).await;
    }

    /// What the VMM says of its migration.
    async fn progress(&mut self, info: MigrationInfo) {
        if let Some(ram) = info.ram {
            if ram.total > 0 && self.stopped_at.is_none() {
                let done = 1.0 - ram.remaining as f64 / ram.total as f64;
                // The last percent is the switchover's.
                self.fraction = self.fraction.max(done.clamp(0.0, 0.99));
            }
            let dirty = ram.dirty_pages_rate as f64 * ram.page_size.max(1) as f64;
            self.report.progress(self.fraction, ram.remaining, (ram.dirty_sync_count > 1).then_some(dirty));
        }
        // An event may have been missed; the state is the truth.
        if info.status == Some(MigrationStatus::Completed) && !self.vmm_done {
            self.vmm_done = true;
            self.whole_if_so().await;
        }
    }

    /// Looks at the figures and at the clock.
    async fn look(&mut self) {
        self.count();
        if let Some(why) = self.outgoing.dialler.without_quic() {
            self.report.over_tcp(why);
        }
        let committed = matches!(self.pilot.phase(), "committed" | "withdrawing" | "source_lost");
        let in_doubt = committed && self.dark_since.is_some();
        self.report.set(|s| match (in_doubt, s.phase) {
            (true, Phase::Handover) => s.phase = Phase::InDoubt,
            (false, Phase::InDoubt) => s.phase = Phase::Handover,
            _ => {}
        });
        self.shared.count_unresolved();
        if let Some(since) = self.dark_since {
            let stopped = self.stopped_at.is_some();
            let patience = if stopped { SWITCHOVER_PATIENCE } else { PRECOPY_PATIENCE };
            let over = since.elapsed() > patience && !Mechanism::SwitchoverPatience.is_off();
            if over && self.outcome.is_none() && !committed {
                self.dark_since = None;
                let text = format!("the link to the destination was lost for {} s", patience.as_secs());
                let hint = AbortReason::LinkLost.advice();
                self.fail(AbortReason::LinkLost, Failure::new("link_lost", Blame::Link, text, hint)).await;
            }
        }
    }

    /// Brings the metrics up to what was carried.
    fn count(&mut self) {
        let counters = &self.outgoing.counters;
        let (raw, guest) = (counters.raw.load(), counters.guest.load());
        let metrics = &self.shared.metrics;
        match self.counted {
            (Path::V1, _) => metrics.v1_carried(raw - self.carried.0),
            (Path::V3, mode) => metrics.v3_carried(mode, raw - self.carried.0, guest - self.carried.1),
        }
        self.carried = (raw, guest);
        self.report.refresh();
    }

    async fn finish(&mut self) {
        self.transport.abort_all();
        self.stream = None;
        self.monitor.abort_all();
        self.count();
        // Whoever moves the guest next need not know how it was tried here, be it in an earlier life of this agent.
        if matches!(self.outcome, Some(Outcome::Aborted(_) | Outcome::Moved))
            && let Ok(qemu) = self.guest.reach().await
            && let Err(error) = qemu.set_capabilities(&[("multifd", false), ("x-ignore-shared", false)]).await
        {
            debug!(%error, "multifd or x-ignore-shared stays on");
        }
        let alarms = self.pilot.alarms.join(", ");
        match self.outcome {
            Some(Outcome::Moved) => {
                let downtime =
                    self.stopped_at.zip(self.heard_at).map(|(from, to)| to.saturating_duration_since(from));
                self.report.downtime(
                    downtime,
                    "from the source's STOP event to the arrival of the destination's report that the guest runs: an \
                     upper bound, too long by at most one way of the network",
                );
                self.report.end(Phase::Completed, None);
            }
            Some(Outcome::Aborted(reason)) => {
                let failure = self.failure.take().unwrap_or_else(|| {
                    let failure = Failure::aborted(reason);
                    let peer = self.outgoing.session.peer.node();
                    let hint =
                        format!("{}; `dwcpctl explain {}` at {peer} may tell more", failure.hint, self.id);
                    Failure { hint, ..failure }
                });
                self.report.end(Phase::Aborted, Some(failure));
            }
            Some(Outcome::Lost) | None => {
                let text = format!(
                    "the guest started at the destination, or may have, and its VMM is gone ({alarms})"
                );
                let hint = "the source's VMM still holds the guest as it was at the handover; look at both nodes before you run it";
                self.report.end(Phase::Failed, Some(Failure::new("guest_lost", Blame::Vmm, text, hint)));
            }
        }
        // QMP serves one client a socket; the guest is somebody else's business now.
        self.guest.release();
        let status = self.report.status();
        self.in_flight = None;
        self.shared.metrics.ended(&status);
        let how = if self.report.is_due() { "aborted, and another attempt follows" } else { &status.status };
        self.pilot.note("ended", how).await;
    }
}

fn ended() -> Failure {
    Failure::new("ended", Blame::Local, "the control connection's task ended", "please report this")
}

/// True once the agent has been stopping for so long that what has not ended will not end now.
pub(crate) async fn closing(shared: &Shared) -> bool {
    loop {
        sleep(TICK).await;
        if shared.closing_for() > GRACE {
            return true;
        }
    }
}
