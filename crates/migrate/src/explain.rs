//! What happened to a migration, told from its journal: also after a restart, also long after its end.

use std::path::Path;

use dwcp_proto::handover::AbortReason;
use dwcp_proto::handover::Resolution::{LeaveToPeer, StartHere};
use dwcp_proto::journal::{Entry, Job, MAX_JOURNAL, Stamped, replay};
use dwcp_proto::{MigrationId, Side};

use crate::error::{Blame, Failure};
use crate::journal;
use crate::recovery::undecided;
use crate::status::{Explanation, Moment, Role, Status};

/// Tells what the journals of this node say about `id`, one story for each side; `status` is what is known besides.
pub(crate) fn explain(
    state_dir: &Path,
    id: &MigrationId,
    status: Option<Status>,
) -> Result<Vec<Explanation>, Failure> {
    let mut stories = Vec::new();
    for side in [Side::Source, Side::Destination] {
        let bytes = match std::fs::read(journal::path(state_dir, id, side)) {
            Ok(bytes) if bytes.len() <= MAX_JOURNAL => bytes,
            _ => continue,
        };
        let replayed = replay(&bytes).map_err(|error| undecided(&error))?;
        stories.extend(tell(side, &replayed.entries, status.clone()));
    }
    if stories.is_empty() {
        let text = format!("there is no journal of a migration {id} here");
        return Err(Failure::new("unknown_migration", Blame::Operator, text, "see dwcpctl list"));
    }
    Ok(stories)
}

fn tell(side: Side, entries: &[Stamped], status: Option<Status>) -> Option<Explanation> {
    let job = entries.iter().find_map(|stamped| job(&stamped.entry))?;
    let decisions: Vec<&Entry> =
        entries.iter().map(|s| &s.entry).filter(|e| !matches!(e, Entry::Note(_))).collect();
    let role = match side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    };
    let status = status.filter(|s| s.role == role);
    let owner = decisions.iter().fold("source", |owner, entry| owner_after(side, entry).unwrap_or(owner));
    let reason = decisions.iter().rev().find_map(|entry| match entry {
        Entry::Aborted { reason } | Entry::NeverRan { reason } => Some(*reason),
        _ => None,
    });
    let known = status.as_ref().and_then(|s| s.error.clone());
    let over = matches!(decisions.last(), Some(Entry::Done { .. }));
    let moved = matches!(decisions.last(), Some(Entry::Running));
    Some(Explanation {
        id: job.migration.clone(),
        vm: job.vm.clone(),
        role,
        peer: job.peer.clone(),
        phase: decisions.last().map_or("none", |entry| name(entry)).to_owned(),
        owner: owner.to_owned(),
        cause: known.or_else(|| reason.map(failure)),
        next: next(side, owner, over, moved, job),
        timeline: entries.iter().map(moment).collect(),
        status,
    })
}

fn job(entry: &Entry) -> Option<&Job> {
    match entry {
        Entry::Prepared(prepared) => Some(&prepared.job),
        Entry::Accepted(accepted) => Some(&accepted.job),
        _ => None,
    }
}

fn failure(reason: AbortReason) -> Failure {
    Failure::new(reason.code(), Blame::Vmm, format!("the migration was aborted: {reason}"), reason.advice())
}

/// Who owns the guest after `entry`, if it changes that.
fn owner_after(side: Side, entry: &Entry) -> Option<&'static str> {
    let (here, there) = match side {
        Side::Source => ("source", "destination"),
        Side::Destination => ("destination", "source"),
    };
    match entry {
        Entry::Prepared(_) | Entry::Accepted(_) | Entry::Aborted { .. } | Entry::NeverRan { .. } => {
            Some("source")
        }
        // The only copy is at the destination, and nobody has said so yet.
        Entry::SourceLost(_) | Entry::Receipt(_) | Entry::Commit(_) => Some("in_doubt"),
        Entry::Starting { .. } | Entry::Running => Some("destination"),
        Entry::Lost => Some("nobody"),
        Entry::Resolved(StartHere { .. }) => Some(here),
        Entry::Resolved(LeaveToPeer) => Some(there),
        Entry::Done { moved: true } => Some("destination"),
        Entry::Done { moved: false } | Entry::Note(_) => None,
    }
}

fn next(side: Side, owner: &str, over: bool, moved: bool, job: &Job) -> String {
    let Job { migration: id, peer, .. } = job;
    match (side, owner) {
        (_, "in_doubt") => format!(
            "wait until the agents of both nodes see each other; if {peer} is gone for good, end its VMM, then \
             `dwcpctl resolve {id} --start-here --peer-fenced`"
        ),
        (_, "nobody") => {
            "the guest is gone with its VMM; start it anew, from its disks or a backup".to_owned()
        }
        (Side::Source, "source") if over => {
            "the guest is here; start the migration again, with a destination VMM that waits".to_owned()
        }
        (Side::Destination, "source") if over => {
            format!("the guest is at {peer}; this VMM may be ended")
        }
        (_, "destination") if over => "nothing: the guest has moved".to_owned(),
        (Side::Destination, "destination") if moved => "nothing: the guest is here".to_owned(),
        (Side::Destination, "destination") => {
            "the guest is here; the agent sees to it that it runs".to_owned()
        }
        _ => format!("wait, or `dwcpctl cancel {id}` at the source"),
    }
}

fn name(entry: &Entry) -> &'static str {
    match entry {
        Entry::Prepared(_) => "prepared",
        Entry::SourceLost(_) => "source_lost",
        Entry::Commit(_) => "commit",
        Entry::Aborted { .. } => "aborted",
        Entry::Accepted(_) => "accepted",
        Entry::Receipt(_) => "receipt",
        Entry::Starting { .. } => "starting",
        Entry::Running => "running",
        Entry::NeverRan { .. } => "never_ran",
        Entry::Lost => "lost",
        Entry::Resolved(_) => "resolved",
        Entry::Done { .. } => "done",
        Entry::Note(_) => "note",
    }
}

fn begun(job: &Job) -> String {
    let session = job.session.to_string();
    format!("session {}… over {}; VMM at {}", &session[..8], job.path, job.qmp)
}

fn moment(stamped: &Stamped) -> Moment {
    let what = name(&stamped.entry).to_owned();
    let (what, text) = match &stamped.entry {
        Entry::Prepared(p) => (what, begun(&p.job)),
        Entry::Accepted(a) => (what, begun(&a.job)),
        Entry::SourceLost(t) | Entry::Commit(t) | Entry::Receipt(t) => {
            (what, format!("{} bytes of the VMM's stream", t.stream_len))
        }
        Entry::Aborted { reason } | Entry::NeverRan { reason } => (what, reason.to_string()),
        Entry::Starting { run } => (what, if *run { "to run" } else { "to stay paused" }.to_owned()),
        Entry::Resolved(StartHere { peer_fenced: true }) => {
            (what, "start here, the peer is fenced".to_owned())
        }
        Entry::Resolved(StartHere { peer_fenced: false }) => (what, "start here".to_owned()),
        Entry::Resolved(LeaveToPeer) => (what, "leave it to the peer".to_owned()),
        Entry::Done { moved } => (what, if *moved { "moved" } else { "not moved" }.to_owned()),
        Entry::Running | Entry::Lost => (what, String::new()),
        Entry::Note(note) => (note.what.clone(), note.text.clone()),
    };
    Moment { unix_ms: stamped.unix_ms, what, text }
}
