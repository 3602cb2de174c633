//! The JSON that scripts read: one object a line. Keys are only ever added; what is not known is `null`.

use std::collections::BTreeMap;

use dwcp_rpc::v1;
use serde::Serialize;

use crate::utc;

/// A migration's status.
#[derive(Debug, Serialize)]
pub(crate) struct Status<'a> {
    id: &'a str,
    vm: &'a str,
    role: &'static str,
    peer: &'a str,
    phase: &'static str,
    status: &'a str,
    path: Option<&'a str>,
    mode: Option<&'a str>,
    mode_reason: Option<&'a str>,
    mode_switches: u32,
    source: Option<&'a str>,
    channels: Option<u32>,
    sink: Option<&'a str>,
    encryption: Option<&'a str>,
    transport: Option<&'a str>,
    transport_reason: Option<&'a str>,
    path_switches: u32,
    fallback_reasons: &'a [String],
    total_seconds: f64,
    downtime_ms: Option<f64>,
    downtime_method: Option<&'a str>,
    raw_bytes: u64,
    wire_bytes: u64,
    saved_ratio: f64,
    guest_bytes: u64,
    rounds: u64,
    chunks: u64,
    retransmitted_chunks: u64,
    reconnects: u64,
    attempt: u32,
    agent_peak_anon_bytes: u64,
    layers: BTreeMap<&'a str, Layer>,
    progress: Progress,
    error: Option<Failure<'a>>,
}

/// What a layer of HDE made of its share.
#[derive(Debug, Serialize)]
struct Layer {
    pages: u64,
    before_bytes: u64,
    after_bytes: u64,
}

/// How far it is.
#[derive(Debug, Serialize)]
struct Progress {
    fraction: f64,
    remaining_bytes: u64,
    wire_rate: f64,
    eta_seconds: Option<f64>,
    dirty_rate: Option<f64>,
}

/// A failure.
#[derive(Debug, Serialize)]
pub(crate) struct Failure<'a> {
    code: &'a str,
    blame: &'static str,
    message: &'a str,
    hint: &'a str,
}

/// A failed command.
#[derive(Debug, Serialize)]
pub(crate) struct Refusal<'a> {
    error: Failure<'a>,
}

/// What the preflight found.
#[derive(Debug, Serialize)]
pub(crate) struct Check<'a> {
    ok: bool,
    problems: Vec<Failure<'a>>,
    notes: &'a [String],
    path: Option<&'a str>,
    mode: Option<&'a str>,
    mode_reason: Option<&'a str>,
    rtt_ms: Option<f64>,
}

/// The agent itself.
#[derive(Debug, Serialize)]
pub(crate) struct Node<'a> {
    node: &'a str,
    version: &'a str,
    fingerprint: &'a str,
    data_address: &'a str,
    metrics_address: &'a str,
    uptime_seconds: f64,
    ready: bool,
    not_ready_reason: &'a str,
    flag: Option<Gate<'a>>,
    peers: Vec<Peer<'a>>,
    migrations_inflight: u32,
}

#[derive(Debug, Serialize)]
struct Gate<'a> {
    source: bool,
    veto: bool,
    reason: &'a str,
    from: &'a str,
    epoch: [u64; 2],
}

#[derive(Debug, Serialize)]
struct Peer<'a> {
    node: &'a str,
    fingerprint: &'a str,
}

/// What is known of a migration, here and at the other node.
#[derive(Debug, Serialize)]
pub(crate) struct Story<'a> {
    id: &'a str,
    sides: Vec<Side<'a>>,
    peers: Vec<Side<'a>>,
    unheard: Vec<Failure<'a>>,
}

#[derive(Debug, Serialize)]
struct Side<'a> {
    vm: &'a str,
    role: &'static str,
    peer: &'a str,
    phase: &'a str,
    owner: &'a str,
    cause: Option<Failure<'a>>,
    next: &'a str,
    timeline: Vec<Moment<'a>>,
    moments_left_out: u32,
    status: Option<Status<'a>>,
    told_by: &'a str,
}

#[derive(Debug, Serialize)]
struct Moment<'a> {
    unix_ms: u64,
    time: String,
    what: &'a str,
    text: &'a str,
}

/// What was decided, or would have been.
#[derive(Debug, Serialize)]
pub(crate) struct Resolved<'a> {
    id: &'a str,
    decision: &'static str,
    peer_fenced: bool,
    acted: bool,
    text: &'a str,
    error: Option<Failure<'a>>,
}

/// What becomes of a wish for a path.
#[derive(Debug, Serialize)]
pub(crate) struct Switched<'a> {
    pub(crate) id: &'a str,
    pub(crate) text: &'a str,
}

/// A migration's status.
pub(crate) fn status(s: &v1::Status) -> Status<'_> {
    let p = s.progress.unwrap_or_default();
    Status {
        id: &s.id,
        vm: &s.vm,
        role: role(s.role()),
        peer: &s.peer,
        phase: phase(s.phase()),
        status: &s.status,
        path: s.path.as_deref(),
        mode: s.mode.as_deref(),
        mode_reason: s.mode_reason.as_deref(),
        mode_switches: s.mode_switches,
        source: s.source.as_deref(),
        channels: s.channels,
        sink: s.sink.as_deref(),
        encryption: s.encryption.as_deref(),
        transport: s.transport.as_deref(),
        transport_reason: s.transport_reason.as_deref(),
        path_switches: s.path_switches,
        fallback_reasons: &s.fallback_reasons,
        total_seconds: s.total_seconds,
        downtime_ms: s.downtime_ms,
        downtime_method: s.downtime_method.as_deref(),
        raw_bytes: s.raw_bytes,
        wire_bytes: s.wire_bytes,
        saved_ratio: s.saved_ratio,
        guest_bytes: s.guest_bytes,
        rounds: s.rounds,
        chunks: s.chunks,
        retransmitted_chunks: s.retransmitted_chunks,
        reconnects: s.reconnects,
        attempt: s.attempt,
        agent_peak_anon_bytes: s.agent_peak_anon_bytes,
        layers: s.layers.iter().map(layer).collect(),
        progress: Progress {
            fraction: p.fraction,
            remaining_bytes: p.remaining_bytes,
            wire_rate: p.wire_rate,
            eta_seconds: p.eta_seconds,
            dirty_rate: p.dirty_rate,
        },
        error: s.error.as_ref().map(failure),
    }
}

fn layer(l: &v1::Layer) -> (&str, Layer) {
    (&l.layer, Layer { pages: l.pages, before_bytes: l.before_bytes, after_bytes: l.after_bytes })
}

/// What is known of a migration.
pub(crate) fn story<'a>(id: &'a str, told: &'a v1::ExplainResponse) -> Story<'a> {
    let moment = |m: &'a v1::Moment| Moment {
        unix_ms: m.unix_ms,
        time: utc::rfc3339(m.unix_ms),
        what: &m.what,
        text: &m.text,
    };
    let side = |e: &'a v1::Explanation| Side {
        vm: &e.vm,
        role: role(e.role()),
        peer: &e.peer,
        phase: &e.phase,
        owner: &e.owner,
        cause: e.cause.as_ref().map(failure),
        next: &e.next,
        timeline: e.timeline.iter().map(moment).collect(),
        moments_left_out: e.moments_left_out,
        status: e.status.as_ref().map(status),
        told_by: &e.told_by,
    };
    Story {
        id,
        sides: told.sides.iter().map(side).collect(),
        peers: told.peers.iter().map(side).collect(),
        unheard: told.unheard.iter().map(failure).collect(),
    }
}

/// What was decided; with an error, what would have been.
pub(crate) fn resolved<'a>(
    request: &'a v1::ResolveRequest,
    answer: &'a v1::ResolveResponse,
    error: Option<&'a v1::Failure>,
) -> Resolved<'a> {
    let decision = match request.decision() {
        v1::Decision::Unspecified => "unknown",
        v1::Decision::StartHere => "start_here",
        v1::Decision::LeaveToPeer => "leave_to_peer",
    };
    Resolved {
        id: &request.id,
        decision,
        peer_fenced: request.peer_fenced,
        acted: answer.acted,
        text: &answer.text,
        error: error.map(failure),
    }
}

/// A failure.
pub(crate) fn failure(f: &v1::Failure) -> Failure<'_> {
    Failure { code: &f.code, blame: blame(f.blame()), message: &f.message, hint: &f.hint }
}

/// A failed command.
pub(crate) fn refusal(f: &v1::Failure) -> Refusal<'_> {
    Refusal { error: failure(f) }
}

/// What the preflight found.
pub(crate) fn check(r: &v1::CheckReport) -> Check<'_> {
    Check {
        ok: r.ok,
        problems: r.problems.iter().map(failure).collect(),
        notes: &r.notes,
        path: r.path.as_deref(),
        mode: r.mode.as_deref(),
        mode_reason: r.mode_reason.as_deref(),
        rtt_ms: r.rtt_ms,
    }
}

/// The agent itself.
pub(crate) fn node(n: &v1::NodeStatus) -> Node<'_> {
    Node {
        node: &n.node,
        version: &n.version,
        fingerprint: &n.fingerprint,
        data_address: &n.data_address,
        metrics_address: &n.metrics_address,
        uptime_seconds: n.uptime_seconds,
        ready: n.ready,
        not_ready_reason: &n.not_ready_reason,
        flag: n.gate.as_ref().map(|g| Gate {
            source: g.source,
            veto: g.veto,
            reason: &g.reason,
            from: &g.from,
            epoch: [g.epoch_incarnation, g.epoch_counter],
        }),
        peers: n.peers.iter().map(|p| Peer { node: &p.node, fingerprint: &p.fingerprint }).collect(),
        migrations_inflight: n.migrations_inflight,
    }
}

/// Prints one object as one line.
pub(crate) fn print(object: &impl Serialize) {
    // Strings, numbers and lists of them: nothing here that JSON could not hold. NaN would become null.
    if let Ok(line) = serde_json::to_string(object) {
        println!("{line}");
    }
}

/// A phase's name, as in the agent's own words.
pub(crate) fn phase(phase: v1::Phase) -> &'static str {
    match phase {
        v1::Phase::Unspecified => "unknown",
        v1::Phase::Preparing => "preparing",
        v1::Phase::Connecting => "connecting",
        v1::Phase::Precopy => "precopy",
        v1::Phase::Switchover => "switchover",
        v1::Phase::Handover => "handover",
        v1::Phase::InDoubt => "in_doubt",
        v1::Phase::Completed => "completed",
        v1::Phase::Aborted => "aborted",
        v1::Phase::Failed => "failed",
    }
}

/// A role's name.
pub(crate) fn role(role: v1::Role) -> &'static str {
    match role {
        v1::Role::Unspecified => "unknown",
        v1::Role::Source => "source",
        v1::Role::Destination => "destination",
    }
}

fn blame(blame: v1::Blame) -> &'static str {
    match blame {
        v1::Blame::Unspecified => "unknown",
        v1::Blame::Operator => "operator",
        v1::Blame::Vmm => "vmm",
        v1::Blame::PeerIncompatible => "peer_incompatible",
        v1::Blame::PeerMisbehaving => "peer_misbehaving",
        v1::Blame::Link => "link",
        v1::Blame::Local => "local",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_every_key_that_scripts_rely_on() {
        let object = serde_json::to_value(status(&v1::Status::default())).unwrap();
        for key in [
            "id",
            "status",
            "path",
            "mode",
            "mode_reason",
            "mode_switches",
            "transport",
            "transport_reason",
            "source",
            "channels",
            "sink",
            "path_switches",
            "fallback_reasons",
            "total_seconds",
            "downtime_ms",
            "raw_bytes",
            "wire_bytes",
            "saved_ratio",
            "rounds",
            "chunks",
            "retransmitted_chunks",
            "reconnects",
            "agent_peak_anon_bytes",
            "layers",
        ] {
            assert!(object.get(key).is_some(), "{key}");
        }
    }
}
