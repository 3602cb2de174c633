//! Before anything is touched: may this VM be moved there, on which path, and can the downtime be kept?

use std::time::Duration;

use dwcp_proto::message::{Choice, Hello, Offer};
use dwcp_proto::mode::ModeChoice;
use dwcp_proto::negotiate::{Impossible, Wish, choose};
use dwcp_proto::{MigrationId, Mode, Path, units};
use dwcp_vmm::describe::VmDescription;
use dwcp_vmm::direct::Fit;
use dwcp_vmm::preflight::{self, Finding, compare};
use dwcp_vmm::qmp::RunState;
use tracing::warn;

use crate::config::CheckReport;
use crate::error::{Blame, Failure};
use crate::guest::{Guest, qmp_failure};
use crate::handshake::{Dialler, Met, nonce};
use crate::probe::{Burst, probe};
use crate::shared::Shared;
use crate::spec::{Leave, MigrateSpec, ModeWish, PathWish, SourceWish, Vmm};
use crate::transport;

/// What loading the devices' state takes at the destination, about: 5 to 15 ms were seen with the devices of a cloud guest.
const DEVICE_LOAD: Duration = Duration::from_millis(20);
/// Journal writes between STOP and RESUME: receipt, commit, starting.
const WRITES: u32 = 3;
/// Bytes of the VM's description: a hello has room for it and for the rest.
const MAX_DESCRIPTION: usize = 12 << 10;
/// The least of the downtime that must be left for memory.
const MIN_LEFT: Duration = Duration::from_millis(10);

/// Why RAM is not read directly where nothing may attach to the VMM.
const NOT_ATTACHED: &str = "this agent may not attach to the VMM ([vmm] attach)";

/// How the downtime is spent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Downtime {
    /// QEMU's limit: what it may leave to send when it stops the guest.
    pub(crate) vmm: Duration,
    /// What may be on its way already.
    pub(crate) in_flight: Duration,
}

impl Downtime {
    /// Divides what `asked` leaves after 1.5 round trips, the journal's writes and loading the devices.
    pub(crate) fn divide(asked: Duration, rtt: Duration, write: Duration) -> Result<Self, Failure> {
        let overhead = Self::overhead(rtt, write);
        let least = overhead + MIN_LEFT;
        if asked < least {
            let text = format!(
                "a downtime of {} ms cannot be kept on this link: round trips, the journal and loading the devices take {} ms",
                asked.as_millis(),
                overhead.as_millis()
            );
            let hint = format!("ask for --downtime-limit {}ms or more", least.as_millis() + 1);
            return Err(Failure::new("downtime_unreachable", Blame::Operator, text, hint));
        }
        let left = asked - overhead;
        // The last quarter is for what lies in the pipeline in front of the sender.
        Ok(Downtime { vmm: left / 2, in_flight: left / 4 })
    }

    /// What goes by beside memory between STOP and RESUME.
    pub(crate) fn overhead(rtt: Duration, write: Duration) -> Duration {
        rtt * 3 / 2 + write * WRITES + DEVICE_LOAD
    }
}

/// All that is known before the session.
pub(crate) struct Plan {
    pub(crate) guest: Guest,
    pub(crate) met: Met,
    pub(crate) choice: Choice,
    pub(crate) dialler: Dialler,
    pub(crate) guest_ran: bool,
    pub(crate) downtime: Downtime,
    pub(crate) wish: Wish,
    /// Why QUIC or TCP, where it could be either.
    pub(crate) transport_reason: String,
    /// The link loses packets, as far as was looked.
    pub(crate) lossy: bool,
    /// What the link counts as for policy.
    pub(crate) link: Mode,
    pub(crate) mode: ModeChoice,
    pub(crate) offer: Offer,
    /// Bytes of guest RAM.
    pub(crate) ram: u64,
    /// Where the guest's RAM is to be read directly: that it can be, or why not.
    pub(crate) direct: Option<Result<Fit, String>>,
    problems: Vec<Failure>,
    notes: Vec<String>,
}

impl Plan {
    /// What speaks against it, and what the operator should know.
    pub(crate) fn found(&self) -> (Vec<Failure>, Vec<String>) {
        (self.problems.clone(), self.notes.clone())
    }

    /// The first problem, if any, as the migration's failure; all of them in its text.
    pub(crate) fn refuse_problems(&mut self) -> Result<(), Failure> {
        match self.problems.pop() {
            Some(last) => Err(together(std::mem::take(&mut self.problems), last)),
            None => Ok(()),
        }
    }
}

/// All problems as one failure: the first one's code, everybody's words.
fn together(mut problems: Vec<Failure>, last: Failure) -> Failure {
    problems.push(last);
    let first = problems[0].clone();
    let words: Vec<&str> = problems.iter().map(|p| p.message.as_str()).collect();
    Failure::new(&first.code, first.blame, words.join("; "), first.hint)
}

/// Looks at the VM, meets the destination, and chooses. Nothing is changed at either end.
pub(crate) async fn plan(
    shared: &Shared,
    id: &MigrationId,
    spec: &MigrateSpec,
    attempt: u32,
    check: bool,
) -> Result<Plan, Failure> {
    let qmp = match &spec.vmm {
        Vmm::Qmp(path) => path,
        Vmm::Relay(_) => return Err(unsupported("--relay", "drive QEMU through --qmp")),
    };
    if spec.source == SourceWish::Direct && spec.channels.is_multifd() {
        return Err(unsupported("--source direct with --channels", "leave one of them out"));
    }
    if spec.on_abort == Leave::Quit {
        return Err(unsupported("--on-abort quit at the source", "an abort leaves the guest running there"));
    }
    if spec.verify_ram {
        return Err(unsupported("--verify-ram", "leave it out"));
    }
    let guest = Guest::connect(qmp).await?;
    let qemu = guest.reach().await.map_err(qmp_failure)?;
    let found = preflight::source(&qemu, spec.shared_storage).await.map_err(qmp_failure)?;
    let description = qemu.describe().await.map_err(qmp_failure)?;
    let guest_ran = description.run_state == RunState::Running;

    let dialler = shared.dialler(spec.addr, spec.to.clone());
    let ram = crate::hde::ram_bytes(&description);
    let lane_window = crate::hde::lane_window(shared.config.hde, ram, shared.config.limits.memory);
    let offer = Offer { lane_window, ..shared.offer_as_source() };
    let hello = Hello {
        source: shared.config.key.node().to_string(),
        destination: spec.to.to_string(),
        vm: spec.vm.to_string(),
        migration: id.to_string(),
        nonce: nonce()?.to_vec(),
        offer: Some(offer.clone()),
        description: description.to_json().map_err(|error| {
            Failure::new("description", Blame::Local, error.to_string(), "please report this")
        })?,
        check,
        listens: shared.data_addr.port().into(),
        attempt,
    };
    let local = failures(found);
    if hello.description.len() > MAX_DESCRIPTION {
        let text = format!(
            "the VM's description has {} bytes, more than {MAX_DESCRIPTION}",
            hello.description.len()
        );
        return Err(Failure::new(
            "description_too_long",
            Blame::Vmm,
            text,
            "a VM of so many RAM blocks cannot be moved yet",
        ));
    }
    let met = match dialler.meet(hello).await {
        Ok(met) => met,
        // What speaks against the migration here is more use than that the peer refuses it too.
        Err(failure) => return Err(together(local, failure)),
    };
    let theirs = VmDescription::from_json(&met.welcome.description).map_err(|error| {
        Failure::new(
            "description",
            Blame::PeerMisbehaving,
            error.to_string(),
            "compare both agents' versions",
        )
    })?;
    let (mut problems, mut notes) = (local, Vec::new());
    for difference in compare(&description, &theirs) {
        let finding = Finding::Differs(difference);
        match finding.is_fatal() {
            true => problems.extend(failures(vec![finding])),
            false => notes.push(finding.to_string()),
        }
    }
    // Where the rate decides nothing, nothing is sent to find it; and a limit on what may be taken holds for a probe, too.
    let decides = spec.mode == ModeWish::Auto && spec.path != PathWish::V1 && little(shared, spec).is_none();
    let (link, why) = judge(shared, &dialler, met.rtt, decides.then(|| limit(shared, spec))).await;
    let (mode, mode_reason) = self::mode(shared, spec, link, why);
    let mut wish = wish(spec, mode);
    let theirs = met.welcome.offer.clone().unwrap_or_default();
    let chosen = |wish| choose(&offer, &theirs, wish, link);
    let mut choice = match chosen(wish) {
        Ok(choice) => choice,
        Err(error) => return Err(together(problems, impossible(error))),
    };
    let found = transport::find(shared, &dialler, &theirs, &choice, met.rtt, limit(shared, spec)).await;
    if found.quic {
        wish.quic = true;
        choice = chosen(wish).unwrap_or(choice);
    }
    transport::tell(&mut choice, &theirs, &found.reason);
    if transport::possible(&choice) {
        let transport = if choice.quic { "QUIC" } else { "TCP" };
        notes.push(format!("the data goes over {transport}: {}", found.reason));
        choice.reasons.extend(found.fallback);
    }
    let (transport_reason, lossy) = (found.reason, found.lossy);
    choice.guest_runs = guest_ran;
    choice.mode_reason = mode_reason;
    choice.reasons.extend(without_congestion(shared, &choice));
    let here = crate::hde::allowance(ram, shared.config.limits.memory);
    choice.reasons.extend(crate::hde::given_up(&choice, ram, here, shared.config.hde));
    let mode = ModeChoice::new(mode, spec.mode != ModeWish::Auto, shared.config.bounds);
    let downtime = match Downtime::divide(spec.downtime_limit, met.rtt, shared.write_time) {
        Ok(downtime) => downtime,
        Err(failure) => return Err(together(problems, failure)),
    };
    let direct = match spec.source {
        SourceWish::Direct if !shared.config.attach => Some(Err(NOT_ATTACHED.to_owned())),
        SourceWish::Direct => Some(Fit::find(&qemu).await.map_err(|why| crate::hde::words(&why))),
        SourceWish::Auto | SourceWish::Stream => None,
    };
    if let Some(Err(why)) = &direct {
        notes.push(not_direct(why));
    }
    Ok(Plan {
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
        problems,
        notes,
    })
}

/// Why RAM is taken from the VMM's stream though it was to be read directly.
pub(crate) fn not_direct(why: &str) -> String {
    format!("the VMM's stream instead of its RAM itself: {why}")
}

/// Why the congestion control that is wished for is not used, where it would be.
fn without_congestion(shared: &Shared, choice: &Choice) -> Option<String> {
    let applies = choice.mode == Mode::Internet.to_wire() && !choice.quic;
    let name = shared.config.congestion.name().filter(|_| applies)?;
    let error = dwcp_link::can_use(name).err()?;
    Some(format!("the system's congestion control instead of {name}: {error}"))
}

/// The mode on a link of this kind, and why.
pub(crate) fn mode(shared: &Shared, spec: &MigrateSpec, link: Mode, why: String) -> (Mode, String) {
    let mode = match spec.mode {
        ModeWish::Internet => Mode::Internet,
        ModeWish::Datacenter => Mode::Datacenter,
        ModeWish::Auto => {
            // A link of which no more may be taken is as slow.
            return match little(shared, spec).filter(|_| link == Mode::Datacenter) {
                Some(limit) => {
                    let limit = units::rate(limit);
                    (Mode::Internet, format!("no more than {limit} may be taken of the link"))
                }
                None => (link, why),
            };
        }
    };
    (mode, format!("{} mode was asked for", mode.name()))
}

/// Bytes a second that may be taken of the link: by this migration, or by all that leave this node.
pub(crate) fn limit(shared: &Shared, spec: &MigrateSpec) -> Option<u64> {
    spec.bandwidth_limit.into_iter().chain(shared.config.limits.bandwidth).min()
}

/// The same, where that is less than a datacenter's link carries.
fn little(shared: &Shared, spec: &MigrateSpec) -> Option<f64> {
    limit(shared, spec).map(|limit| limit as f64).filter(|limit| *limit < shared.config.bounds.enough())
}

/// What the caller wishes for, with the mode that comes of it.
pub(crate) fn wish(spec: &MigrateSpec, mode: Mode) -> Wish {
    Wish {
        path: match spec.path {
            PathWish::Auto => None,
            PathWish::V1 => Some(Path::V1),
            PathWish::V3 => Some(Path::V3),
        },
        mode: Some(mode),
        streams: spec.streams.map(u32::from),
        quic: false,
    }
}

/// What kind of link it is, and why. Its rate decides where there is a `limit`, perhaps of none, within which it may be looked for;
/// elsewhere the round trip does: it is only policy that asks then.
async fn judge(
    shared: &Shared,
    dialler: &Dialler,
    rtt: Duration,
    limit: Option<Option<u64>>,
) -> (Mode, String) {
    let bounds = shared.config.bounds;
    let Some(limit) = limit.filter(|_| rtt < bounds.rtt) else { return bounds.judge(rtt, None) };
    match probe(dialler, Burst { limit, ..Burst::QUICK }).await {
        Ok(carried) => bounds.judge(rtt, Some(carried.best)),
        Err(failure) => {
            warn!(%failure, "the link was not probed");
            bounds.judge(rtt, None)
        }
    }
}

/// `migrate --check`.
pub(crate) async fn check(shared: &Shared, id: &MigrationId, spec: &MigrateSpec) -> CheckReport {
    match plan(shared, id, spec, 1, true).await {
        Ok(plan) => CheckReport {
            ok: plan.problems.is_empty(),
            path: Path::from_wire(plan.choice.path).map(|p| p.name().to_owned()),
            mode: Mode::from_wire(plan.choice.mode).map(|m| m.name().to_owned()),
            mode_reason: Some(plan.choice.mode_reason),
            rtt_ms: Some(plan.met.rtt.as_secs_f64() * 1e3),
            notes: plan.notes.into_iter().chain(plan.choice.reasons).collect(),
            problems: plan.problems,
        },
        Err(failure) => CheckReport {
            ok: false,
            problems: vec![failure],
            notes: Vec::new(),
            path: None,
            mode: None,
            mode_reason: None,
            rtt_ms: None,
        },
    }
}

fn unsupported(what: &str, hint: &str) -> Failure {
    Failure::new("unsupported", Blame::Operator, format!("{what} is not supported by this version"), hint)
}

/// Why no path is possible.
pub(crate) fn impossible(error: Impossible) -> Failure {
    let (code, blame) = match &error {
        Impossible::V3Barred(_) => ("v3_barred", Blame::Operator),
        Impossible::Nothing { .. } => ("no_path", Blame::Operator),
        Impossible::V1Barred(_) => ("v1_barred", Blame::Operator),
        Impossible::BadOffer(_) => ("bad_offer", Blame::PeerMisbehaving),
    };
    let hint = match code {
        "v3_barred" => "use --path auto, or change the flag",
        "bad_offer" => "compare both agents' versions",
        _ => "change [policy] v1 or the flag",
    };
    Failure::new(code, blame, error.to_string(), hint)
}

/// Findings of the preflight as failures with stable codes.
pub(crate) fn failures(findings: Vec<Finding>) -> Vec<Failure> {
    let code = |finding: &Finding| match finding {
        Finding::Blocked { .. } => ("vmm_blocked", Blame::Vmm),
        Finding::LocalDisk { .. } => ("local_disk", Blame::Operator),
        Finding::SourceState { .. } => ("source_state", Blame::Operator),
        Finding::SourceBusy { .. } => ("source_busy", Blame::Operator),
        Finding::DestinationState { .. } | Finding::DestinationListens => ("not_incoming", Blame::Operator),
        Finding::Differs(_) => ("layout_differs", Blame::Operator),
        _ => ("preflight", Blame::Operator),
    };
    let failure = |finding: &Finding| {
        let (code, blame) = code(finding);
        Failure::new(code, blame, finding.to_string(), "")
    };
    findings.iter().filter(|f| f.is_fatal()).map(failure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downtime_that_the_link_cannot_keep_is_refused_with_what_it_can() {
        let ms = Duration::from_millis;
        let failure = Downtime::divide(ms(150), ms(100), ms(5)).unwrap_err();
        assert_eq!(failure.code, "downtime_unreachable");
        assert!(failure.hint.contains("196ms"), "{failure}");
        let downtime = Downtime::divide(ms(300), ms(20), ms(5)).unwrap();
        assert_eq!(
            downtime.vmm + downtime.in_flight * 2,
            ms(300 - 30 - 15 - 20 - 1) + Duration::from_micros(1000)
        );
    }
}
