//! Further attempts at a migration that ended before its commit, where the caller asked for them.
//!
//! A killed source agent ends QEMU's own migration, and with it the destination's VMM: back again, the agent takes the
//! migration back, and begins anew under the same id as soon as a destination VMM waits. What was asked for is in the
//! journal, so an attempt needs no caller. The destination's agent takes part by waiting again for a fresh VMM.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_proto::handover::AbortReason;
use dwcp_proto::journal::{Entry, Job, Stamped};
use dwcp_proto::{MigrationId, Side};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::error::{Blame, Failure};
use crate::journal::{self, Journal};
use crate::reception;
use crate::recovery::Revived;
use crate::reins::Reins;
use crate::report::Report;
use crate::shared::Shared;
use crate::source;
use crate::spec::{IncomingSpec, MigrateSpec};
use crate::status::Phase;

/// Between two tries to begin a further attempt: a VMM takes longer to start.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a further attempt waits until it can begin: somebody starts the destination's VMM anew.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// The note in a journal that no further attempt is wanted.
const GIVEN_UP: &str = "given_up";

/// What was asked for, as a journal keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Again<S> {
    pub(crate) spec: S,
    /// Further attempts that are left after the one that the journal is of.
    pub(crate) left: u32,
    /// When that one began, milliseconds since 1970: a deadline goes on through restarts.
    begun_unix_ms: u64,
}

/// What goes into the journal of an attempt; `None` where it is the only one.
pub(crate) fn record<S: Serialize>(spec: &S, left: u32) -> Option<String> {
    if left == 0 {
        return None;
    }
    serde_json::to_string(&Again { spec, left, begun_unix_ms: now_unix_ms() }).ok()
}

/// Whether a journal says that no further attempt is wanted.
pub(crate) fn given_up(entries: &[Stamped]) -> bool {
    entries.iter().any(|stamped| matches!(&stamped.entry, Entry::Note(note) if note.what == GIVEN_UP))
}

/// What a journal says of further attempts. One that cannot be read has none: nothing is begun on a guess.
pub(crate) fn recorded<S: DeserializeOwned>(job: &Job) -> Option<Again<S>> {
    let read = serde_json::from_str(job.again.as_ref()?);
    read.inspect_err(|error| warn!(%error, "what to try again is not understood")).ok()
}

/// Whether another attempt may end better than one that ended for this.
pub(crate) fn helps(failure: &Failure) -> bool {
    let reason = AbortReason::from_code(&failure.code);
    let passing = matches!(
        reason,
        Some(
            AbortReason::AgentRestarted
                | AbortReason::PeerAborted
                | AbortReason::VmmGoneDestination
                | AbortReason::VmmFailedDestination
        )
    );
    passing || failure.blame == Blame::Link || failure.code == "unknown_session"
}

/// Moves the VM, in as many attempts as are allowed.
pub(crate) async fn run(
    shared: Arc<Shared>,
    id: MigrationId,
    spec: MigrateSpec,
    report: Arc<Report>,
    reins: Reins,
) {
    let begun = now_unix_ms();
    report.attempts(1, spec.retry);
    source::run(shared.clone(), id.clone(), spec.clone(), report.clone(), reins).await;
    again(shared, id, spec, begun, report).await;
}

/// Goes on with a migration of an earlier life of this agent, and tries again if that is asked for.
pub(crate) async fn resume(
    shared: Arc<Shared>,
    revived: Revived,
    again_spec: Option<Again<MigrateSpec>>,
    report: Arc<Report>,
    reins: Reins,
) {
    let id = revived.id.clone();
    source::resume(shared.clone(), revived, report.clone(), reins).await;
    if let Some(Again { spec, begun_unix_ms, .. }) = again_spec {
        again(shared, id, spec, begun_unix_ms, report).await;
    }
}

async fn again(
    shared: Arc<Shared>,
    id: MigrationId,
    mut spec: MigrateSpec,
    mut begun_unix_ms: u64,
    report: Arc<Report>,
) {
    while report.is_due() {
        sleep(PAUSE).await;
        // An agent that stops goes on from the journal in its next life.
        let Some(reins) = shared.rein(&id) else { return };
        if reins.is_cancelled() {
            let advice = AbortReason::Cancelled.advice();
            report.end(Phase::Aborted, Some(Failure::new("cancelled", Blame::Operator, advice, "")));
            break;
        }
        let now = now_unix_ms();
        let passed = Duration::from_millis(now.saturating_sub(begun_unix_ms));
        spec.deadline = spec.deadline.map(|deadline| deadline.saturating_sub(passed));
        begun_unix_ms = now;
        report.begin_again();
        debug!(attempt = report.attempt(), "trying again");
        source::run(shared.clone(), id.clone(), spec.clone(), report.clone(), reins).await;
    }
    // The journal of the last attempt that had a session still asks for another one.
    let live = journal::path(&shared.config.state_dir, &id, Side::Source);
    if let Ok((mut journal, _)) = Journal::open(&live) {
        journal.note(GIVEN_UP, "no further attempt").await;
    }
}

/// Receives a VM, and waits for it again, as often as `spec` says, where it was taken back: while the migration's task may still have
/// to tell its source.
pub(crate) async fn waiting_again(
    run: impl Future<Output = ()>,
    shared: Arc<Shared>,
    spec: Option<IncomingSpec>,
    report: Arc<Report>,
) {
    let again = async {
        let mut watched = report.watch();
        let ended = watched.wait_for(|status| status.phase.is_end()).await.is_ok();
        if let Some(spec) = spec.filter(|_| ended) {
            await_again(shared, spec, &report).await;
        }
    };
    tokio::pin!(run, again);
    tokio::select! {
        () = &mut again => run.await,
        // One that leaves the end to the next life of the agent leaves the rest to it, too.
        () = &mut run => if report.status().phase.is_end() {
            again.await;
        },
    }
}

/// Waits again for a VM whose migration was taken back: until there is a fresh VMM behind the same QMP socket.
async fn await_again(shared: Arc<Shared>, spec: IncomingSpec, report: &Report) {
    if report.status().phase != Phase::Aborted || spec.retry == 0 {
        return;
    }
    let cancelled = report.status().error.is_some_and(|failure| !helps(&failure));
    if cancelled {
        return;
    }
    let spec = IncomingSpec { retry: spec.retry - 1, ..spec };
    info!(vm = %spec.vm, left = spec.retry, "waiting for another attempt, with a fresh VMM");
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        match reception::prepare(&shared, spec.clone()).await {
            Ok(_) => return,
            Err(failure)
                if matches!(failure.code.as_str(), "stopping" | "already_incoming" | "unknown_peer") =>
            {
                return debug!(%failure, "not waiting again");
            }
            Err(failure) => debug!(%failure, "no fresh VMM yet"),
        }
        sleep(PAUSE).await;
    }
    warn!(vm = %spec.vm, "no fresh VMM came; not waiting for the VM any more");
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
