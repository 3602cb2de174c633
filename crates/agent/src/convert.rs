//! Between the RPC's messages and the engine's types. What comes in is parsed once, here; an error names the field.

use std::fmt::Display;
use std::num::NonZeroU64;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use dwcp_migrate::spec::{
    BadChannels, Channels, DEFAULT_DOWNTIME, IncomingSpec, Leave, MAX_RETRIES, MigrateSpec, ModeWish,
    PathWish, SourceWish, Vmm,
};
use dwcp_migrate::status::{Explanation, LayerStatus, Moment, Phase, Role, Status, Story};
use dwcp_migrate::{Blame, CheckReport, Estimate, Failure, Gate};
use dwcp_proto::handover::Resolution;
use dwcp_rpc::{MAX_MESSAGE, failure, v1};

use crate::allowed::Allowed;

/// Bytes of one side's timeline in an answer: a journal may hold several MiB of notes, and both sides of a migration
/// within one node share a message with their statuses.
const MAX_TIMELINE: usize = MAX_MESSAGE / 4;
/// Bytes that a moment takes on the wire besides its texts, at most.
const MOMENT_FRAME: usize = 32;

/// What may be asked for is bounded by these.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    /// Sockets that may be named.
    pub(crate) paths: Allowed,
    /// Bytes a second that one migration may take at most.
    pub(crate) bandwidth: Option<NonZeroU64>,
}

/// A request to receive a VM.
pub(crate) fn incoming(
    request: &v1::PrepareIncomingRequest,
    bounds: &Bounds,
) -> Result<IncomingSpec, Failure> {
    memory_file(&request.memory_file)?;
    Ok(IncomingSpec {
        vm: parse("vm", &request.vm)?,
        vmm: vmm(request.vmm.as_ref(), &bounds.paths)?,
        from: parse("from", &request.from)?,
        on_abort: leave("on_abort", request.on_abort)?,
        retry: retry(request.retry)?,
    })
}

/// A request to move a VM.
pub(crate) fn migrate(spec: Option<&v1::MigrateSpec>, bounds: &Bounds) -> Result<MigrateSpec, Failure> {
    let spec = spec.ok_or_else(|| bad("spec", "missing"))?;
    memory_file(&spec.memory_file)?;
    let asked = NonZeroU64::new(spec.bandwidth_limit_bytes);
    Ok(MigrateSpec {
        vm: parse("vm", &spec.vm)?,
        vmm: vmm(spec.vmm.as_ref(), &bounds.paths)?,
        to: parse("to", &spec.to)?,
        addr: parse("to_address", &spec.to_address)?,
        path: match known::<v1::PathWish>("path", spec.path)? {
            v1::PathWish::Auto => PathWish::Auto,
            v1::PathWish::V1 => PathWish::V1,
            v1::PathWish::V3 => PathWish::V3,
        },
        mode: match known::<v1::ModeWish>("mode", spec.mode)? {
            v1::ModeWish::Auto => ModeWish::Auto,
            v1::ModeWish::Internet => ModeWish::Internet,
            v1::ModeWish::Datacenter => ModeWish::Datacenter,
        },
        downtime_limit: match spec.downtime_limit_ms {
            0 => DEFAULT_DOWNTIME,
            ms => Duration::from_millis(ms.into()),
        },
        bandwidth_limit: asked.into_iter().chain(bounds.bandwidth).min().map(NonZeroU64::get),
        streams: match spec.streams {
            0 => None,
            n => Some(u16::try_from(n).map_err(|_| bad("streams", "more than 65535"))?),
        },
        channels: channels(spec.channels)?,
        source: match known::<v1::SourceWish>("source", spec.source)? {
            v1::SourceWish::Auto => SourceWish::Auto,
            v1::SourceWish::Direct => SourceWish::Direct,
            v1::SourceWish::Stream => SourceWish::Stream,
        },
        verify_ram: spec.verify_ram,
        shared_storage: spec.shared_storage,
        on_success: leave("on_success", spec.on_success)?,
        on_abort: leave("on_abort", spec.on_abort)?,
        deadline: (spec.deadline_ms > 0).then(|| Duration::from_millis(spec.deadline_ms)),
        retry: retry(spec.retry)?,
        id: match spec.id.as_str() {
            "" => None,
            id => Some(parse("id", id)?),
        },
    })
}

/// One field's text.
pub(crate) fn parse<T: FromStr<Err: Display>>(field: &str, text: &str) -> Result<T, Failure> {
    text.parse().map_err(|error: T::Err| bad(field, error))
}

fn vmm(vmm: Option<&v1::Vmm>, paths: &Allowed) -> Result<Vmm, Failure> {
    match vmm.and_then(|vmm| vmm.kind.as_ref()) {
        Some(v1::vmm::Kind::QmpPath(path)) => Ok(Vmm::Qmp(paths.resolve(Path::new(path))?)),
        Some(v1::vmm::Kind::RelayPath(path)) => Ok(Vmm::Relay(paths.resolve(Path::new(path))?)),
        None => Err(bad("vmm", "neither qmp_path nor relay_path is set")),
    }
}

fn memory_file(path: &str) -> Result<(), Failure> {
    match path {
        "" => Ok(()),
        _ => Err(unsupported(
            "this version does not read file-backed RAM (memory_file)",
            "leave --memory-file out: the pages then come from the VMM's migration stream",
        )),
    }
}

fn leave(field: &str, number: i32) -> Result<Leave, Failure> {
    Ok(match known::<v1::Leave>(field, number)? {
        v1::Leave::AsIs => Leave::Leave,
        v1::Leave::Quit => Leave::Quit,
    })
}

/// The path that an operator wants a running migration on.
pub(crate) fn path(number: i32) -> Result<dwcp_proto::Path, Failure> {
    match known::<v1::PathWish>("path", number)? {
        v1::PathWish::V1 => Ok(dwcp_proto::Path::V1),
        v1::PathWish::V3 => Ok(dwcp_proto::Path::V3),
        v1::PathWish::Auto => Err(bad("path", "missing: v1 or v3")),
    }
}

fn retry(attempts: u32) -> Result<u32, Failure> {
    match attempts {
        0..=MAX_RETRIES => Ok(attempts),
        _ => Err(bad("retry", format!("more than {MAX_RETRIES}"))),
    }
}

fn channels(count: u32) -> Result<Channels, Failure> {
    match count {
        0 => Ok(Channels::ONE),
        n => {
            let channels = u8::try_from(n).ok().and_then(|n| Channels::try_from(n).ok());
            channels.ok_or_else(|| bad("channels", format!("{n} is not {BadChannels}")))
        }
    }
}

/// An operator's decision. What is at stake is a guest: there is no default, and no word too many.
pub(crate) fn resolution(request: &v1::ResolveRequest) -> Result<Resolution, Failure> {
    let peer_fenced = request.peer_fenced;
    match known::<v1::Decision>("decision", request.decision)? {
        v1::Decision::StartHere => Ok(Resolution::StartHere { peer_fenced }),
        v1::Decision::LeaveToPeer if peer_fenced => {
            Err(bad("peer_fenced", "goes with DECISION_START_HERE only"))
        }
        v1::Decision::LeaveToPeer => Ok(Resolution::LeaveToPeer),
        v1::Decision::Unspecified => Err(bad("decision", "missing")),
    }
}

/// A choice that a newer client knows and this agent does not is refused, never taken for the default.
fn known<E: TryFrom<i32>>(field: &str, number: i32) -> Result<E, Failure> {
    E::try_from(number).map_err(|_| {
        unsupported(
            &format!("{field} has the value {number}, which this version does not know"),
            "update the agent",
        )
    })
}

/// A failure: this version cannot do that.
pub(crate) fn unsupported(message: &str, hint: &str) -> Failure {
    Failure::new(failure::UNSUPPORTED, Blame::Operator, message, hint)
}

fn bad(field: &str, what: impl Display) -> Failure {
    Failure::new(failure::BAD_REQUEST, Blame::Operator, format!("{field}: {what}"), "")
}

/// A failure, in the status of a failed call.
pub(crate) fn refusal(failure: Failure) -> tonic::Status {
    failure::to_status(&failure_message(failure))
}

/// A failure.
pub(crate) fn failure_message(failure: Failure) -> v1::Failure {
    let blame = match failure.blame {
        Blame::Operator => v1::Blame::Operator,
        Blame::Vmm => v1::Blame::Vmm,
        Blame::PeerIncompatible => v1::Blame::PeerIncompatible,
        Blame::PeerMisbehaving => v1::Blame::PeerMisbehaving,
        Blame::Link => v1::Blame::Link,
        Blame::Local => v1::Blame::Local,
    };
    v1::Failure { code: failure.code, blame: blame.into(), message: failure.message, hint: failure.hint }
}

/// What the preflight found.
pub(crate) fn check_report(report: CheckReport) -> v1::CheckReport {
    v1::CheckReport {
        ok: report.ok,
        problems: report.problems.into_iter().map(failure_message).collect(),
        notes: report.notes,
        path: report.path,
        mode: report.mode,
        mode_reason: report.mode_reason,
        rtt_ms: report.rtt_ms,
    }
}

/// What a migration would take.
pub(crate) fn estimate(e: Estimate) -> v1::EstimateResponse {
    v1::EstimateResponse {
        path: e.path,
        mode: e.mode,
        mode_reason: e.mode_reason,
        streams: e.streams,
        rtt_ms: e.rtt_ms,
        link_rate: e.link_rate,
        ram_bytes: e.ram_bytes,
        zero_share: e.zero_share,
        first_ratio: e.first_ratio,
        again_ratio: e.again_ratio,
        dirty_rate: e.dirty_rate,
        hot_bytes: e.hot_bytes,
        converges: e.converges,
        seconds: e.seconds,
        downtime_ms: e.downtime_ms,
        wire_bytes: e.wire_bytes,
        rounds: e.rounds,
        problems: e.problems.into_iter().map(failure_message).collect(),
        notes: e.notes,
    }
}

fn role(role: Role) -> v1::Role {
    match role {
        Role::Source => v1::Role::Source,
        Role::Destination => v1::Role::Destination,
    }
}

/// What is known of a migration, each side by itself.
pub(crate) fn story(story: Story) -> v1::ExplainResponse {
    let teller = |role: Role| {
        let of_peer = |side: &&Explanation| side.role != role;
        story.sides.iter().find(of_peer).and_then(|side| side.peer.clone()).map(String::from)
    };
    let told = |peer: Explanation| v1::Explanation {
        told_by: teller(peer.role).unwrap_or_default(),
        ..explanation(peer)
    };
    let peers = story.peers.iter().cloned().map(told).collect();
    v1::ExplainResponse {
        peers,
        sides: story.sides.into_iter().map(explanation).collect(),
        unheard: story.unheard.into_iter().map(failure_message).collect(),
    }
}

fn explanation(e: Explanation) -> v1::Explanation {
    let (timeline, moments_left_out) = newest(e.timeline);
    v1::Explanation {
        id: e.id.into(),
        vm: e.vm.map(String::from).unwrap_or_default(),
        role: role(e.role).into(),
        peer: e.peer.map(String::from).unwrap_or_default(),
        phase: e.phase,
        owner: e.owner,
        cause: e.cause.map(failure_message),
        next: e.next,
        timeline,
        moments_left_out,
        status: e.status.map(status),
        told_by: String::new(),
    }
}

/// A migration of which nothing is written down: neither VMM was touched, so the guest is where it was; unless it has moved, and
/// its journal was taken away.
pub(crate) fn unwritten(s: Status) -> v1::Explanation {
    let moved = s.phase == Phase::Completed;
    let next = match (s.role, s.phase.is_end()) {
        // Its journal is gone since.
        _ if moved => "the guest is at the destination",
        (Role::Source, true) => {
            "the guest is here, untouched; put the cause right and start the migration again"
        }
        (Role::Destination, true) => "nothing came here; prepare again once the cause is put right",
        (_, false) => "wait; it has only begun",
    };
    let s = status(s);
    v1::Explanation {
        id: s.id.clone(),
        vm: s.vm.clone(),
        role: s.role,
        peer: s.peer.clone(),
        phase: s.status.clone(),
        owner: if moved { "destination" } else { "source" }.to_owned(),
        cause: s.error.clone(),
        next: next.to_owned(),
        timeline: Vec::new(),
        moments_left_out: 0,
        status: Some(s),
        told_by: String::new(),
    }
}

/// As many of the newest moments as fit into [`MAX_TIMELINE`], and how many older ones do not.
fn newest(mut moments: Vec<Moment>) -> (Vec<v1::Moment>, u32) {
    let sizes = moments.iter().rev().map(|m| m.what.len() + m.text.len() + MOMENT_FRAME);
    let fitting = sizes.scan(0, |sum, size| {
        *sum += size;
        (*sum <= MAX_TIMELINE).then_some(())
    });
    let older = moments.len() - fitting.count();
    let kept = moments.split_off(older).into_iter();
    let timeline = kept.map(|m| v1::Moment { unix_ms: m.unix_ms, what: m.what, text: m.text }).collect();
    (timeline, u32::try_from(older).unwrap_or(u32::MAX))
}

/// A migration's status.
pub(crate) fn status(s: Status) -> v1::Status {
    let phase = match s.phase {
        Phase::Preparing => v1::Phase::Preparing,
        Phase::Connecting => v1::Phase::Connecting,
        Phase::Precopy => v1::Phase::Precopy,
        Phase::Switchover => v1::Phase::Switchover,
        Phase::Handover => v1::Phase::Handover,
        Phase::InDoubt => v1::Phase::InDoubt,
        Phase::Completed => v1::Phase::Completed,
        Phase::Aborted => v1::Phase::Aborted,
        Phase::Failed => v1::Phase::Failed,
    };
    v1::Status {
        id: s.id.into(),
        vm: s.vm.into(),
        role: role(s.role).into(),
        peer: s.peer.into(),
        phase: phase.into(),
        status: s.status,
        path: s.path,
        mode: s.mode,
        mode_reason: s.mode_reason,
        mode_switches: s.mode_switches,
        source: s.source,
        channels: s.channels.map(u32::from),
        sink: s.sink,
        encryption: s.encryption,
        transport: s.transport,
        transport_reason: s.transport_reason,
        path_switches: s.path_switches,
        fallback_reasons: s.fallback_reasons,
        total_seconds: s.total_seconds,
        downtime_ms: s.downtime_ms,
        downtime_method: s.downtime_method,
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
        layers: s.layers.into_iter().map(layer).collect(),
        progress: Some(v1::Progress {
            fraction: s.progress.fraction,
            remaining_bytes: s.progress.remaining_bytes,
            wire_rate: s.progress.wire_rate,
            eta_seconds: s.progress.eta_seconds,
            dirty_rate: s.progress.dirty_rate,
        }),
        error: s.error.map(failure_message),
    }
}

/// The flag's verdict, and where it comes from.
pub(crate) fn gate(gate: &Gate, from: String) -> v1::Gate {
    v1::Gate {
        source: gate.source.new == dwcp_proto::Path::V3,
        veto: gate.veto.is_some(),
        reason: gate.veto.as_ref().unwrap_or(&gate.source.reason).text.clone(),
        from,
        epoch_incarnation: gate.epoch.0,
        epoch_counter: gate.epoch.1,
    }
}

fn layer(l: LayerStatus) -> v1::Layer {
    let LayerStatus { layer, pages, before_bytes, after_bytes } = l;
    v1::Layer { layer, pages, before_bytes, after_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(bandwidth: Option<u64>) -> Bounds {
        Bounds { paths: Allowed::new(Vec::new()), bandwidth: bandwidth.and_then(NonZeroU64::new) }
    }

    fn spec() -> v1::MigrateSpec {
        v1::MigrateSpec {
            vm: "web-1".to_owned(),
            vmm: Some(v1::Vmm { kind: Some(v1::vmm::Kind::QmpPath("/run/q".to_owned())) }),
            to: "hv-02".to_owned(),
            to_address: "192.0.2.2:7400".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_absent_takes_its_default() {
        let spec = migrate(Some(&spec()), &bounds(None)).unwrap();
        assert_eq!(spec.downtime_limit, DEFAULT_DOWNTIME);
        assert_eq!((spec.bandwidth_limit, spec.streams, spec.deadline, spec.id), (None, None, None, None));
        assert_eq!(spec.channels, Channels::ONE);
    }

    #[test]
    fn the_nodes_bandwidth_can_be_lowered_and_not_raised() {
        for (asked, node, allowed) in [
            (0, None, None),
            (5, None, Some(5)),
            (0, Some(7), Some(7)),
            (5, Some(7), Some(5)),
            (9, Some(7), Some(7)),
        ] {
            let request = v1::MigrateSpec { bandwidth_limit_bytes: asked, ..spec() };
            assert_eq!(migrate(Some(&request), &bounds(node)).unwrap().bandwidth_limit, allowed);
        }
    }

    #[test]
    fn a_bad_field_is_named() {
        let refused = |spec: v1::MigrateSpec| migrate(Some(&spec), &bounds(None)).unwrap_err();
        for (spec, code, expected) in [
            (v1::MigrateSpec { vm: "a/b".to_owned(), ..spec() }, "bad_request", "vm: "),
            (v1::MigrateSpec { vmm: None, ..spec() }, "bad_request", "vmm: "),
            (v1::MigrateSpec { to_address: "hv-02:1".to_owned(), ..spec() }, "bad_request", "to_address: "),
            (v1::MigrateSpec { streams: 65_536, ..spec() }, "bad_request", "streams: "),
            (v1::MigrateSpec { channels: 17, ..spec() }, "bad_request", "channels: 17 is not 1, or 2 to 16"),
            (v1::MigrateSpec { channels: 258, ..spec() }, "bad_request", "channels: 258"),
            (v1::MigrateSpec { id: "-".to_owned(), ..spec() }, "bad_request", "id: "),
            (v1::MigrateSpec { path: 9, ..spec() }, "unsupported", "path has the value 9"),
            (v1::MigrateSpec { memory_file: "/ram".to_owned(), ..spec() }, "unsupported", "memory_file"),
        ] {
            let failure = refused(spec);
            assert_eq!(failure.code, code, "{failure}");
            assert!(failure.message.contains(expected), "{failure}");
        }
        assert!(migrate(None, &bounds(None)).is_err());
    }

    #[test]
    fn a_decision_is_taken_as_it_was_said_or_not_at_all() {
        use v1::Decision::{LeaveToPeer, StartHere, Unspecified};
        let decide = |decision: i32, peer_fenced| {
            resolution(&v1::ResolveRequest { decision, peer_fenced, ..Default::default() })
                .map_err(|e| e.code)
        };
        assert_eq!(decide(StartHere.into(), false), Ok(Resolution::StartHere { peer_fenced: false }));
        assert_eq!(decide(StartHere.into(), true), Ok(Resolution::StartHere { peer_fenced: true }));
        assert_eq!(decide(LeaveToPeer.into(), false), Ok(Resolution::LeaveToPeer));
        assert_eq!(decide(LeaveToPeer.into(), true), Err("bad_request".to_owned()));
        assert_eq!(decide(Unspecified.into(), false), Err("bad_request".to_owned()));
        assert_eq!(decide(9, false), Err("unsupported".to_owned()));
    }

    #[test]
    fn an_explanation_arrives_whole() {
        let explained = explanation(Explanation {
            status: None,
            id: "m-1".parse().unwrap(),
            vm: "web-1".parse().ok(),
            role: Role::Destination,
            peer: "hv-02".parse().ok(),
            phase: "in_doubt".to_owned(),
            owner: "in_doubt".to_owned(),
            cause: Some(Failure::new("in_doubt", Blame::Link, "no word", "wait")),
            next: "wait for hv-02".to_owned(),
            timeline: vec![moment(7, "receipt", "holds the whole guest")],
        });
        assert_eq!((explained.role(), explained.peer.as_str()), (v1::Role::Destination, "hv-02"));
        assert_eq!((explained.phase.as_str(), explained.owner.as_str()), ("in_doubt", "in_doubt"));
        assert_eq!(explained.cause.unwrap().blame(), v1::Blame::Link);
        assert_eq!((explained.next.as_str(), explained.moments_left_out), ("wait for hv-02", 0));
        let only =
            v1::Moment { unix_ms: 7, what: "receipt".to_owned(), text: "holds the whole guest".to_owned() };
        assert_eq!((explained.timeline, explained.status), (vec![only], None));
    }

    #[test]
    fn a_long_timeline_leaves_out_the_oldest_and_fits_a_message() {
        use dwcp_proto::journal::{MAX_LINES, MAX_NOTE};
        use prost::Message;
        let text = "x".repeat(MAX_NOTE);
        let (timeline, older) = newest((0..MAX_LINES).map(|n| moment(n, "note", &text)).collect());
        assert_eq!(timeline.len() as u64 + u64::from(older), MAX_LINES);
        assert_eq!(timeline.last().unwrap().unix_ms, MAX_LINES - 1);
        assert!(timeline.len() > 200 && older > 0);
        let side = v1::Explanation { timeline, ..Default::default() };
        assert!(side.encoded_len() <= MAX_TIMELINE + 64);
        assert_eq!(newest(Vec::new()), (Vec::new(), 0));
    }

    fn moment(unix_ms: u64, what: &str, text: &str) -> Moment {
        Moment { unix_ms, what: what.to_owned(), text: text.to_owned() }
    }
}
