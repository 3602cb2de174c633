//! After a restart: every journal whose migration is not over is gone on with.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dwcp_proto::fault::Mechanism;
use dwcp_proto::journal::{Entry, Job};
use dwcp_proto::message::Choice;
use dwcp_proto::{Leg, MigrationId, Mode, Path, PeerKey, Side};
use tokio::sync::mpsc;
use tracing::{Instrument, error, info, info_span, warn};

use crate::destination::{self, Kept};
use crate::error::{Blame, Failure};
use crate::guest::Guest;
use crate::handshake::{Offers, Session};
use crate::journal::{self, Journal};
use crate::reins::reins;
use crate::report::Report;
use crate::shared::Shared;
use crate::spec::{IncomingSpec, MigrateSpec};
use crate::status::{Phase, Role};
use crate::{explain, retry};

/// A migration of an earlier life of this agent.
pub(crate) struct Revived {
    pub(crate) id: MigrationId,
    pub(crate) session: Arc<Session>,
    pub(crate) guest: Guest,
    pub(crate) journal: Journal,
    pub(crate) entries: Vec<Entry>,
    pub(crate) peer_addr: Option<SocketAddr>,
    /// Where the destination's connection to its VMM is.
    pub(crate) kept: Option<Kept>,
}

/// How long an ended migration still answers its peer.
const REMEMBERED: Duration = Duration::from_secs(7 * 24 * 3600);

/// Reads all journals and starts a task for each migration that is not over.
pub(crate) async fn recover(shared: &Arc<Shared>) {
    if Mechanism::Recovery.is_off() {
        return;
    }
    let folder = journal::folder(&shared.config.state_dir);
    let files = match std::fs::read_dir(&folder) {
        Ok(files) => files,
        Err(error) => return error!(%error, folder = %folder.display(), "journals not read"),
    };
    for file in files.flatten() {
        let path = file.path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            revive(shared, &path);
        }
    }
}

fn revive(shared: &Arc<Shared>, path: &FilePath) {
    let (journal, replay) = match Journal::open(path) {
        Ok(opened) => opened,
        Err(error) => {
            error!(%error, path = %path.display(), "a journal decides nothing; resolve it by hand");
            return damaged(shared, path, &error);
        }
    };
    if let Some(torn) = replay.torn {
        warn!(torn, path = %path.display(), "the last line was never written whole; it does not count");
    }
    let entries = replay.decisions();
    let (job, side) = match entries.first() {
        Some(Entry::Prepared(prepared)) => (&prepared.job, Side::Source),
        Some(Entry::Accepted(accepted)) => (&accepted.job, Side::Destination),
        // Nothing was decided, so nothing was touched and nothing was said.
        None => return drop(std::fs::remove_file(path)),
        Some(_) => return error!(path = %path.display(), "a journal with no beginning; resolve it by hand"),
    };
    let last = replay.entries.iter().rev().find(|stamped| !matches!(stamped.entry, Entry::Note(_)));
    if last.is_some_and(|last| is_over(&last.entry, last.unix_ms)) {
        return archive(path);
    }
    let kept =
        Kept::find(replay.entries.iter().map(|stamped| &stamped.entry)).filter(|_| shared.config.outlive);
    let offers = kept.as_ref().and_then(Kept::offers).unwrap_or_default();
    let session = match session_of(shared, job, side, offers) {
        Ok(session) => Arc::new(session),
        Err(error) => return error!(error, path = %path.display(), "a journal names no usable peer"),
    };
    let role = match side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    };
    let id = job.migration.clone();
    info!(%id, vm = %job.vm, ?role, "going on with a migration of an earlier life");
    let report = Arc::new(Report::new(id.clone(), job.vm.clone(), role, job.peer.clone()));
    report.set(|s| {
        s.phase = Phase::Handover;
        s.path = Some(job.path.clone());
    });
    let span = info_span!("migration", id = %id, vm = %job.vm, role = ?role);
    let (held, reins) = reins();
    let guest = Guest::at(FilePath::new(&job.qmp), job.vmm.as_ref());
    let revived = Revived {
        id,
        session: session.clone(),
        guest: if job.halts { guest.halted_before() } else { guest },
        journal,
        peer_addr: job.peer_addr,
        entries: entries.clone(),
        kept,
    };
    let shared_too = shared.clone();
    match side {
        Side::Source => {
            let again = retry::recorded::<MigrateSpec>(job).filter(|_| !retry::given_up(&replay.entries));
            report.attempts(job.attempt, again.as_ref().map_or(0, |again| again.left));
            report.stands();
            let run = retry::resume(shared_too, revived, again, report.clone(), reins);
            let task = tokio::spawn(run.instrument(span));
            shared.adopt(report, None, held, task);
        }
        Side::Destination => {
            let (arrivals_tx, arrivals) = mpsc::channel(destination::ARRIVALS);
            report.attempts(job.attempt, 0);
            let again = retry::recorded::<IncomingSpec>(job);
            let run = destination::resume(shared_too.clone(), revived, arrivals, report.clone(), reins);
            let again = again.map(|again| again.spec);
            let run = retry::waiting_again(run, shared_too, again, report.clone());
            let task = tokio::spawn(run.instrument(span));
            shared.adopt(report, Some((session, arrivals_tx)), held, task);
        }
    }
}

/// Archives the journal of an attempt before, if it is there still.
pub(crate) fn retire(shared: &Shared, id: &MigrationId, side: Side) {
    let path = journal::path(&shared.config.state_dir, id, side);
    if path.exists() {
        archive(&path);
    }
}

fn archive(path: &FilePath) {
    if let Err(error) = journal::retire(path) {
        warn!(%error, path = %path.display(), "journal not archived");
    }
}

/// A migration of which nobody can say how it stands is shown, so that it is not overlooked.
fn damaged(shared: &Shared, path: &FilePath, error: &journal::OpenError) {
    let Some((id, _)) = journal::named(path) else { return };
    for tale in explain::tales(&shared.config.state_dir, &id, None) {
        let story = tale.explanation;
        let (Some(vm), Some(peer)) = (story.vm, story.peer) else { continue };
        let report = Arc::new(Report::new(id.clone(), vm, story.role, peer));
        report.end(Phase::Failed, Some(undecided(error)));
        shared.adopt(report, None, reins().0, tokio::spawn(async {}));
    }
}

/// Whether nobody will have a question any more: a source that knows its guest has moved is done. Any other end may still be asked for by
/// a peer that comes back, but not for ever.
fn is_over(last: &Entry, unix_ms: u64) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
    match last {
        Entry::Done { .. } => now.saturating_sub(unix_ms) > REMEMBERED.as_millis() as u64,
        _ => false,
    }
}

fn session_of(shared: &Shared, job: &Job, side: Side, offers: Offers) -> Result<Session, &'static str> {
    let peer = PeerKey::from_bytes(job.peer.clone(), &job.peer_key).map_err(|_| "its key is not usable")?;
    if !shared.config.peers.roster().trusts(&peer) {
        return Err("its key is no longer in the peers folder");
    }
    let path = if job.path == Path::V3.name() { Path::V3 } else { Path::V1 };
    let choice = Choice { path: path.to_wire(), mode: Mode::Internet.to_wire(), ..Choice::default() };
    let leg = Leg::first(job.session, choice).ok_or("its path is none")?;
    let key = shared.config.key.clone();
    Ok(Session { id: job.session, side, key, peer, leg, offers })
}

/// A journal from which no state follows.
pub(crate) fn undecided(why: &dyn Display) -> Failure {
    Failure::new(
        "journal_undecided",
        Blame::Local,
        format!("the journal of this migration decides nothing: {why}"),
        "look at both nodes' VMMs and run the guest by hand on one of them only",
    )
}
