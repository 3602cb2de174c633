//! What happened to a migration, told from its journal: also after a restart, also long after its end.

use std::net::SocketAddr;
use std::path::Path;

use dwcp_proto::handover::Resolution::{LeaveToPeer, StartHere};
use dwcp_proto::journal::{Entry, Job, JournalError, Replay, Stamped, replay_whole_lines};
use dwcp_proto::{MigrationId, Side};

use crate::error::Failure;
use crate::journal;
use crate::recovery::undecided;
use crate::status::{Explanation, Moment, Role, Status};

/// One side's story, and who is at the other end.
pub(crate) struct Tale {
    pub(crate) explanation: Explanation,
    /// The key of the peer; `None` where the journal is damaged from its beginning.
    pub(crate) peer_key: Option<[u8; 32]>,
    /// Where its agent listens, if that was said.
    pub(crate) peer_addr: Option<SocketAddr>,
    /// The attempt that it is about, counted from 1.
    pub(crate) attempt: u32,
    /// It ended, with the guest at the source.
    pub(crate) taken_back: bool,
}

/// Tells what the journals of this node say about `id`, one story for each side that it was; `status` is what is known besides.
pub(crate) fn tales(state_dir: &Path, id: &MigrationId, status: Option<&Status>) -> Vec<Tale> {
    let sides = [Side::Source, Side::Destination].into_iter();
    sides.filter_map(|side| tale(state_dir, id, side, status)).collect()
}

/// Tells one side, all attempts together. The last one's journal says how things stand.
fn tale(state_dir: &Path, id: &MigrationId, side: Side, status: Option<&Status>) -> Option<Tale> {
    let mut timeline = Vec::new();
    let mut last = None;
    for path in journal::all(state_dir, id, side) {
        let (replay, damage) = match journal::read(&path) {
            Ok(bytes) => replay_whole_lines(&bytes),
            // Pruned meanwhile.
            Err(_) => continue,
        };
        timeline.extend(replay.entries.iter().map(moment));
        if let Some(error) = &damage {
            let unix_ms = timeline.last().map_or(0, |moment: &Moment| moment.unix_ms);
            timeline.push(Moment { unix_ms, what: "damaged".to_owned(), text: error.to_string() });
        }
        last = Some((replay, damage));
    }
    let (replay, damage) = last?;
    let role = match side {
        Side::Source => Role::Source,
        Side::Destination => Role::Destination,
    };
    let status = status.filter(|status| status.role == role);
    Some(tell(id, side, role, replay, damage, timeline, status))
}

fn tell(
    id: &MigrationId,
    side: Side,
    role: Role,
    replay: Replay,
    damage: Option<JournalError>,
    timeline: Vec<Moment>,
    status: Option<&Status>,
) -> Tale {
    let decisions = replay.decisions();
    let job = decisions.first().and_then(job);
    let owner = match &damage {
        None => decisions.iter().fold("source", |owner, entry| owner_after(side, entry).unwrap_or(owner)),
        Some(_) => "in_doubt",
    };
    let reason = decisions.iter().rev().find_map(|entry| match entry {
        Entry::Aborted { reason } | Entry::NeverRan { reason } => Some(*reason),
        _ => None,
    });
    let known = status.and_then(|status| status.error.clone());
    let (cause, next) = match (&damage, job) {
        (None, Some(job)) => (known.or(reason.map(Failure::aborted)), next(side, owner, &decisions, job)),
        (damage, _) => {
            let why = damage.as_ref().map_or_else(|| "it has no beginning".to_owned(), ToString::to_string);
            let failure = undecided(&why);
            let next = failure.hint.clone();
            (Some(failure), next)
        }
    };
    let vm = job.map(|job| job.vm.clone()).or(status.map(|s| s.vm.clone()));
    let peer = job.map(|job| job.peer.clone()).or(status.map(|s| s.peer.clone()));
    Tale {
        peer_key: job.map(|job| job.peer_key),
        peer_addr: job.and_then(|job| job.peer_addr),
        attempt: job.map_or(1, |job| job.attempt),
        taken_back: damage.is_none() && matches!(decisions.last(), Some(Entry::Done { moved: false })),
        explanation: Explanation {
            id: id.clone(),
            vm,
            role,
            peer,
            phase: decisions.last().map_or("none", name).to_owned(),
            owner: owner.to_owned(),
            cause,
            next,
            timeline,
            status: status.cloned(),
        },
    }
}

fn job(entry: &Entry) -> Option<&Job> {
    match entry {
        Entry::Prepared(prepared) => Some(&prepared.job),
        Entry::Accepted(accepted) => Some(&accepted.job),
        _ => None,
    }
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

fn next(side: Side, owner: &str, decisions: &[Entry], job: &Job) -> String {
    let Job { migration: id, peer, .. } = job;
    let over = matches!(decisions.last(), Some(Entry::Done { .. }));
    match (side, owner) {
        (Side::Source, "in_doubt") if matches!(decisions.last(), Some(Entry::SourceLost(_))) => format!(
            "this node's VMM has ended, so the only copy is at {peer}: wait until the agents see each other; if this node's \
             agent cannot come back, `dwcpctl resolve {id} --start-here --peer-fenced` at {peer}"
        ),
        (Side::Source, "in_doubt") => format!(
            "the guest is committed to {peer}: wait until the agents see each other, then it ends by itself; only if {peer} \
             is gone for good, make sure that its VMM has ended, then `dwcpctl resolve {id} --start-here --peer-fenced` here: \
             the guest goes on as it was at the handover"
        ),
        (Side::Destination, "in_doubt") => format!(
            "the whole guest is here, paused, and {peer} has not said whose it is: wait until the agents see each other; only \
             if {peer} is gone for good, make sure that its VMM has ended, then `dwcpctl resolve {id} --start-here \
             --peer-fenced` here; if the guest runs at {peer}, `dwcpctl resolve {id} --leave-to-peer`"
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
        (Side::Destination, "destination") if matches!(decisions.last(), Some(Entry::Running)) => {
            "nothing: the guest is here".to_owned()
        }
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
    let attempt = if job.attempt > 1 { format!("attempt {}, ", job.attempt) } else { String::new() };
    format!("{attempt}session {}… over {}; VMM at {}", &session[..8], job.path, job.qmp)
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
