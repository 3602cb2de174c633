//! A migration at its destination.
//!
//! ```text
//! incoming: the VMM waits ─► the source says hello ─► session ─► journal ─► `stop` while incoming
//!         ─► stream to the VMM ─► completed and paused ─► receipt ─► (in doubt) ─► commit ─► `cont`
//! ```

mod bytes;
mod chunks;
mod kept;
mod land;
mod replay;
mod run;
mod silence;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_link::{Reader, Writer};
use dwcp_proto::MigrationId;
use dwcp_proto::Side;
use dwcp_proto::handover::{AbortReason, Afterwards, Destination, VmmState};
use dwcp_proto::journal::{Accepted, Job};
use dwcp_proto::message::Ack;
use dwcp_vmm::mapped::Ram;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{Instrument, info, warn};

use crate::control::{Control, Data, Event, Origin};
use crate::counters::Counters;
use crate::error::{Blame, Failure};
use crate::guest::Guest;
use crate::handshake::{Arrival, Session};
use crate::journal::{Journal, WriteError};
use crate::metrics::{InFlight, Metrics};
use crate::pilot::{Machine, Pilot};
use crate::pool::Share;
use crate::recovery::{self, Revived};
use crate::reins::Reins;
use crate::report::Report;
use crate::retry;
use crate::shared::Shared;
use crate::spec::{IncomingSpec, Leave};
use crate::status::Phase;

pub(crate) use kept::Kept;

use land::Sink;
use run::{Arrived, Run, sink_failure};

/// How long the last word may take to be acknowledged after the end.
const LINGER: Duration = Duration::from_secs(5);
/// Connections that may wait to be taken up: all streams and the control connection, twice.
pub(crate) const ARRIVALS: usize = 36;

/// What both data paths need.
#[derive(Clone)]
pub(crate) struct Incoming {
    session: Arc<Session>,
    share: Share,
    counters: Arc<Counters>,
    metrics: Metrics,
    /// Set while a page that did not prove itself keeps this node from going on with v3.
    distrust: Arc<AtomicBool>,
}

/// A session that was agreed on, with the VMM that waits for it.
pub(crate) struct Agreed {
    pub(crate) id: MigrationId,
    pub(crate) spec: IncomingSpec,
    pub(crate) guest: Guest,
    pub(crate) session: Session,
    /// Where the source's agent can be asked, if it says so.
    pub(crate) peer_addr: Option<SocketAddr>,
    /// The guest's RAM, where it can be written.
    pub(crate) ram: Option<Ram>,
    pub(crate) control: (Reader, Writer),
    pub(crate) arrivals: mpsc::Receiver<Arrival>,
}

/// Receives the VM. The report's status is final when this returns.
pub(crate) async fn run(shared: Arc<Shared>, agreed: Agreed, report: Arc<Report>, reins: Reins) {
    let mut in_flight = shared.metrics.in_flight();
    in_flight.path(agreed.session.leg.path);
    let session = agreed.session.id;
    if let Err(error) = attempt(&shared, agreed, &report, reins, in_flight).await {
        let failure = Failure::new(
            "journal_failed",
            Blame::Local,
            error.to_string(),
            AbortReason::JournalFailed.advice(),
        );
        warn!("{failure}");
        report.end(Phase::Aborted, Some(failure));
        shared.metrics.ended(&report.status());
    }
    shared.forget(&session);
}

async fn attempt(
    shared: &Arc<Shared>,
    agreed: Agreed,
    report: &Arc<Report>,
    reins: Reins,
    in_flight: InFlight,
) -> Result<(), WriteError> {
    let Agreed { id, spec, guest, session, peer_addr, ram, control: first, arrivals } = agreed;
    let session = Arc::new(session);
    info!(session = %session.id, path = session.leg.path.name(), mode = session.leg.mode.name(), "session stands");
    report.session(&session);
    report.set(|s| s.phase = Phase::Connecting);
    let journal = Journal::create(&shared.config.state_dir, &id, Side::Destination).await?;
    let accepted = Accepted {
        job: Job {
            migration: id.clone(),
            vm: spec.vm.clone(),
            peer: spec.from.clone(),
            peer_key: *session.peer.as_bytes(),
            peer_addr,
            qmp: guest.path().display().to_string(),
            session: session.id,
            path: session.leg.path.name().to_owned(),
            started_unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            vmm: guest.process(),
            attempt: report.attempt(),
            again: retry::record(&spec, spec.retry),
            halts: false,
        },
        on_abort: match spec.on_abort {
            Leave::Leave => Afterwards::Leave,
            Leave::Quit => Afterwards::Quit,
        },
    };
    let guest = Arc::new(guest);
    let machine = Machine::Destination(Destination::new(accepted));
    let joins = Joins { first: Some(first), arrivals };
    let mut opened = Opened::new(shared, report, machine, journal, session, guest, joins, Ack::default());
    let run = &mut opened.run;
    run.in_flight = Some(in_flight);
    run.ram = ram;
    opened.drive(reins).await;
    Ok(())
}

/// Goes on with a migration of an earlier life of this agent, from its journal: before the receipt it is dropped, after it the source
/// is asked, after the commit the guest is run. Returns once the source, too, knows how it ended.
pub(crate) async fn resume(
    shared: Arc<Shared>,
    revived: Revived,
    arrivals: mpsc::Receiver<Arrival>,
    report: Arc<Report>,
    reins: Reins,
) {
    let Revived { session, guest, journal, entries, kept, .. } = revived;
    let guest = Arc::new(guest);
    let state = guest.at_destination().await;
    let kept = kept.filter(|_| state == Some(VmmState::Incoming)).and_then(|kept| take_up(&kept, &guest));
    let goes_on = kept.as_ref().and_then(|_| Destination::go_on(&entries));
    let again = goes_on.is_some();
    let machine = match goes_on.map_or_else(|| Destination::recover(&entries, state), Ok) {
        Ok(machine) => Machine::Destination(machine),
        Err(error) => return report.end(Phase::Failed, Some(recovery::undecided(&error))),
    };
    let known = session.id;
    // No leg's: the source goes by it only once it has begun a new one.
    let ack = Ack { leg: u32::MAX, ..Ack::default() };
    let joins = Joins { first: None, arrivals };
    let mut opened = Opened::new(&shared, &report, machine, journal, session, guest, joins, ack);
    let run = &mut opened.run;
    run.dark_since = Some(Instant::now());
    (run.kept, run.again) = (kept.filter(|_| again), again);
    opened.drive(reins).await;
    shared.forget(&known);
}

/// The session's connections: the one that opened it, if it stands, and those that come.
struct Joins {
    first: Option<(Reader, Writer)>,
    arrivals: mpsc::Receiver<Arrival>,
}

/// A migration whose control connection is served, ready to be driven to its end.
struct Opened {
    run: Run,
    events: mpsc::Receiver<Event>,
    arrivals: mpsc::Receiver<Arrival>,
    server: JoinHandle<()>,
}

impl Opened {
    #[allow(clippy::too_many_arguments, reason = "what both beginnings have, brought together in one place")]
    fn new(
        shared: &Arc<Shared>,
        report: &Arc<Report>,
        machine: Machine,
        journal: Journal,
        session: Arc<Session>,
        guest: Arc<Guest>,
        joins: Joins,
        ack: Ack,
    ) -> Self {
        let (acks_tx, acks) = watch::channel(ack);
        let (rejoins_tx, rejoins) = mpsc::channel(ARRIVALS);
        let counters = report.counters.clone();
        let origin = Origin::Accept(rejoins, acks_tx.subscribe());
        let (control, events, server) =
            Control::start(session.clone(), joins.first, origin, Data::Receives(acks), counters.clone());
        let server = tokio::spawn(server.in_current_span());
        let incoming = Incoming {
            session: session.clone(),
            share: shared.pool.share(),
            counters,
            metrics: shared.metrics.clone(),
            distrust: Arc::default(),
        };
        let pilot = Pilot::new(machine, journal, session, control.clone(), guest.clone());
        let run = Run::new(shared, report, pilot, guest, control, incoming, acks_tx, rejoins_tx);
        Opened { run, events, arrivals: joins.arrivals, server }
    }

    async fn drive(self, reins: Reins) {
        let Opened { mut run, events, arrivals, server } = self;
        run.drive(events, arrivals, reins).await;
        run.pilot.retire_if_settled().await;
        // Dropping the control lets its task say what is queued, then close.
        drop(run);
        let _ = timeout(LINGER, server).await;
    }
}

/// The connection that an earlier life made, if it still stands.
fn take_up(kept: &Kept, guest: &Guest) -> Option<Sink> {
    match kept.take_up(guest) {
        Ok(sink) => {
            info!(applied = sink.applied(), "the connection to the VMM stands: receiving goes on");
            Some(sink)
        }
        Err(error) => {
            warn!(%error, "the connection to the VMM is lost: the migration is taken back");
            None
        }
    }
}
