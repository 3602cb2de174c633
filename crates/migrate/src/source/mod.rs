//! A migration at its source.
//!
//! ```text
//! checks ─► meet the destination ─► choose path and mode ─► confirm (session) ─► journal ─► VMM migrates
//!        ─► precopy ─► STOP ─► all delivered ─► receipt ─► commit ─► the destination runs it
//! ```

mod breaker;
mod bytes;
mod carry;
mod chunks;
mod direct;
mod encode;
mod helm;
mod ingest;
mod plan;
mod reel;
mod run;
mod survey;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_hde::Layers;
use dwcp_proto::handover::{AbortReason, Afterwards, Source, Transfer};
use dwcp_proto::journal::{Job, Prepared};
use dwcp_proto::negotiate::Wish;
use dwcp_proto::{Leg, MigrationId, Mode, Path, Side};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep_until, timeout};
use tracing::{Instrument, info, warn};

use crate::control::{Control, Data, Origin};
use crate::counters::Counters;
use crate::error::{Blame, Failure};
use crate::handshake::{Dialler, Session};
use crate::journal::Journal;
use crate::metrics::{InFlight, Metrics};
use crate::pilot::{Machine, Pilot};
use crate::pool::Share;
use crate::recovery::{self, Revived};
use crate::reins::Reins;
use crate::report::Report;
use crate::retry;
use crate::shared::Shared;
use crate::spec::{Leave, MigrateSpec, PathWish};
use crate::status::Phase;
use crate::throttle::Throttle;

pub(crate) use helm::SwitchOrder;
pub(crate) use ingest::Inlet;
pub(crate) use plan::{Downtime, Plan, check, failures, impossible, limit, mode, plan, wish};
pub(crate) use run::closing;

use run::Run;

/// What the peer may have said to the data path before that reads it; then its control connection waits.
const DATA_EVENTS: usize = 64;
/// How long the last word may take to reach the peer after the end.
const LINGER: Duration = Duration::from_secs(2);

/// What both data paths need.
#[derive(Clone)]
pub(crate) struct Outgoing {
    session: Arc<Session>,
    dialler: Dialler,
    share: Share,
    counters: Arc<Counters>,
    metrics: Metrics,
    /// Part of the downtime that bytes in flight may take.
    budget: Duration,
    throttle: Arc<Throttle>,
    /// Bytes that the memory of what the destination holds may take.
    remember: usize,
    /// The layers of HDE beside compression.
    layers: Layers,
    /// What the caller wished for, for the legs after the first.
    wish: Wish,
    /// Why QUIC or TCP, likewise.
    transport_reason: String,
    /// The link loses packets.
    lossy: bool,
    /// What the link counted as at the beginning, for policy.
    link: Mode,
    /// Bytes a second that may be taken of it.
    limit: Option<u64>,
    /// The leg that the data is on.
    leg: Arc<watch::Sender<Leg>>,
    /// What the destination has given its receipt for: acknowledged, whatever acknowledgements were lost.
    receipt: Arc<watch::Sender<Option<Transfer>>>,
}

impl Outgoing {
    /// Bytes were given to the network on v3.
    fn sent_v3(&self, mode: Mode, bytes: u64) {
        self.counters.wire.add(bytes);
        self.metrics.v3_wire(mode, bytes);
    }

    /// The leg that the data is on.
    fn leg(&self) -> Leg {
        self.leg.borrow().clone()
    }

    /// The data goes on as this leg.
    fn begin(&self, leg: &Leg) {
        self.leg.send_replace(leg.clone());
    }
}

/// Moves the VM. The report's status is final when this returns; an error is in it too.
pub(crate) async fn run(
    shared: Arc<Shared>,
    id: MigrationId,
    spec: MigrateSpec,
    report: Arc<Report>,
    reins: Reins,
) {
    let in_flight = shared.metrics.in_flight();
    if let Err(failure) = attempt(&shared, &id, spec, &report, reins, in_flight).await {
        warn!(code = %failure.code, "{failure}");
        report.end(Phase::Aborted, Some(failure));
        shared.metrics.ended(&report.status());
    }
}

/// An error is a failure before anything was touched.
async fn attempt(
    shared: &Arc<Shared>,
    id: &MigrationId,
    spec: MigrateSpec,
    report: &Arc<Report>,
    mut reins: Reins,
    mut in_flight: InFlight,
) -> Result<(), Failure> {
    let deadline = spec.deadline.map(|d| Instant::now() + d);
    let prepare = async {
        let mut plan = plan(shared, id, &spec, report.attempt(), false).await?;
        plan.refuse_problems()?;
        Ok::<_, Failure>(plan)
    };
    let plan = tokio::select! {
        plan = prepare => plan?,
        () = reins.cancelled() => return Err(cancelled()),
        () = passed(deadline) => return Err(deadline_failure()),
    };
    let Plan {
        guest,
        met,
        choice,
        dialler,
        guest_ran,
        downtime,
        wish,
        transport_reason,
        lossy,
        link,
        mode,
        offer,
        ram,
        direct,
        ..
    } = plan;
    // Before the destination is bound to the session: a disk that cannot take a journal is no reason to keep it waiting.
    if report.attempt() > 1 {
        recovery::retire(shared, id, Side::Source);
    }
    let journal =
        Journal::create(&shared.config.state_dir, id, Side::Source).await.map_err(journal_failure)?;
    let (session, reader, writer) = match met.confirm(shared.config.key.clone(), choice, offer).await {
        Ok(confirmed) => confirmed,
        Err(failure) => {
            journal.discard();
            return Err(failure);
        }
    };
    let session = Arc::new(session);
    info!(session = %session.id, path = session.leg.path.name(), mode = session.leg.mode.name(), "session stands");
    in_flight.path(session.leg.path);
    report.found(&transport_reason);
    report.session(&session);
    report.channels(spec.channels.count());
    report.set(|s| s.phase = Phase::Connecting);

    let counters = report.counters.clone();
    let first = (reader, writer);
    let (data_tx, data) = mpsc::channel(DATA_EVENTS);
    let (control, events, server) = Control::start(
        session.clone(),
        Some(first),
        Origin::Dial(dialler.clone()),
        Data::Sends(data_tx),
        counters.clone(),
    );
    let server = tokio::spawn(server.in_current_span());
    let prepared = Prepared {
        job: Job {
            migration: id.clone(),
            vm: spec.vm.clone(),
            peer: spec.to.clone(),
            peer_key: *session.peer.as_bytes(),
            peer_addr: Some(spec.addr),
            qmp: guest.path().display().to_string(),
            session: session.id,
            path: session.leg.path.name().to_owned(),
            started_unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            vmm: guest.process(),
            attempt: report.attempt(),
            again: retry::record(&spec, report.attempts_left()),
            halts: matches!(direct, Some(Ok(_))),
        },
        guest_ran,
        on_success: match spec.on_success {
            Leave::Leave => Afterwards::Leave,
            Leave::Quit => Afterwards::Quit,
        },
    };
    let guest = Arc::new(guest);
    let machine = Machine::Source(Source::new(prepared));
    let pilot = Pilot::new(machine, journal, session.clone(), control.clone(), guest.clone());
    let outgoing = Outgoing {
        leg: Arc::new(watch::Sender::new(session.leg.clone())),
        receipt: Arc::default(),
        session,
        dialler,
        share: shared.pool.share(),
        counters,
        metrics: shared.metrics.clone(),
        budget: downtime.in_flight,
        throttle: Arc::new(shared.bandwidth.throttle(spec.bandwidth_limit)),
        remember: crate::hde::allowance(ram, shared.config.limits.memory),
        layers: crate::hde::layers(shared.config.hde),
        wish,
        transport_reason,
        lossy,
        link,
        limit: plan::limit(shared, &spec),
    };
    let mut run = Run::new(shared, id, report, pilot, guest, control, outgoing);
    run.vmm_limit = downtime.vmm;
    run.channels = spec.channels;
    run.direct = direct;
    run.ram = ram;
    run.deadline = deadline;
    run.data = Some(data);
    run.fixed = match spec.path {
        PathWish::Auto => None,
        PathWish::V1 => Some(Path::V1),
        PathWish::V3 => Some(Path::V3),
    };
    run.mode = Some(mode);
    run.switches = reins.switches();
    run.in_flight = Some(in_flight);
    run.drive(events, reins).await;
    run.retire_if_settled().await;
    // Dropping the control lets its task say what is queued, then close.
    drop(run);
    let _ = timeout(LINGER, server).await;
    Ok(())
}

/// Goes on with a migration of an earlier life of this agent, from its journal: before the commit it is taken back, after it the
/// handover is finished. Returns once the destination, too, knows how it ended.
pub(crate) async fn resume(shared: Arc<Shared>, revived: Revived, report: Arc<Report>, reins: Reins) {
    let Revived { id, session, guest, journal, entries, peer_addr, .. } = revived;
    let guest = Arc::new(guest);
    let machine = match Source::recover(&entries, guest.at_source().await) {
        Ok(machine) => machine,
        Err(error) => return report.end(Phase::Failed, Some(recovery::undecided(&error))),
    };
    let Some(addr) = peer_addr else {
        return report.end(Phase::Failed, Some(recovery::undecided(&"the destination's address is missing")));
    };
    let dialler = shared.dialler(addr, session.peer.node().clone());
    let (data_tx, _data) = mpsc::channel(DATA_EVENTS);
    let counters = report.counters.clone();
    let origin = Origin::Dial(dialler.clone());
    let (control, events, server) =
        Control::start(session.clone(), None, origin, Data::Sends(data_tx), counters.clone());
    let server = tokio::spawn(server.in_current_span());
    let pilot =
        Pilot::new(Machine::Source(machine), journal, session.clone(), control.clone(), guest.clone());
    let outgoing = Outgoing {
        leg: Arc::new(watch::Sender::new(session.leg.clone())),
        receipt: Arc::default(),
        session,
        dialler,
        share: shared.pool.share(),
        counters,
        metrics: shared.metrics.clone(),
        budget: Duration::ZERO,
        throttle: Arc::new(shared.bandwidth.throttle(None)),
        remember: 0,
        layers: Layers::ZERO,
        wish: Wish::default(),
        transport_reason: String::new(),
        lossy: false,
        link: Mode::Internet,
        limit: None,
    };
    let mut run = Run::new(&shared, &id, &report, pilot, guest, control, outgoing);
    run.dark_since = Some(Instant::now());
    run.drive(events, reins).await;
    run.retire_if_settled().await;
    drop(run);
    let _ = timeout(LINGER, server).await;
}

/// Pending for ever without one.
async fn passed(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

fn deadline_failure() -> Failure {
    Failure::new("deadline", Blame::Operator, "the deadline passed", AbortReason::Deadline.advice())
}

fn cancelled() -> Failure {
    Failure::new("cancelled", Blame::Operator, AbortReason::Cancelled.advice(), "")
}

fn journal_failure(error: crate::journal::WriteError) -> Failure {
    Failure::new("journal_failed", Blame::Local, error.to_string(), AbortReason::JournalFailed.advice())
}
