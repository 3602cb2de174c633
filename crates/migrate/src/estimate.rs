//! What a migration would take, without moving anything: the guest's memory is sampled, its writes are watched for a moment, the link is
//! probed as the data would use it, and `dwcp_proto::forecast` plays it through.
//!
//! | the guest's RAM | content | writes |
//! |---|---|---|
//! | a shared file or memfd | pages read there, compressed as chunks would be | the same pages read again: also what their deltas take |
//! | private memory | unknown: what the VMM's process holds bounds it | QEMU's `calc-dirty-rate` |

mod content;

use std::time::Duration;

use dwcp_hde::Choice as Compression;
use dwcp_proto::forecast::{Forecast, Memory, Way, forecast, hot_set};
use dwcp_proto::message::{Choice, Offer};
use dwcp_proto::negotiate::choose;
use dwcp_proto::{MigrationId, Mode, Path};
use dwcp_vmm::mapped::Ram;
use dwcp_vmm::qmp::{Qemu, RunState};
use serde::{Deserialize, Serialize};

use crate::error::{Blame, Failure};
use crate::guest::{Guest, qmp_failure};
use crate::handshake::Dialler;
use crate::probe::{Burst, Carried, probe};
use crate::shared::Shared;
use crate::source::{self, Downtime, Plan};
use crate::spec::{MigrateSpec, Vmm};
use crate::transport;
use content::{LATER, SOON, Seen};

/// A burst as long as TCP needs to find a far link's rate; less than the destination takes of one connection.
const BURST: Burst =
    Burst { bytes: 192 << 20, time: Duration::from_secs(3), link: Mode::Internet, ..Burst::QUICK };
/// Bytes a second that the agents get through where nothing is compressed, about, on two cores.
const PLAIN: f64 = 500e6;
/// Bytes a second of zero pages.
const ZEROS: f64 = 1.5e9;
/// What else the agents' cores have to do beside compression: verify, decode, and feed the VMM.
const SHARE: f64 = 0.8;
/// From the request to the first byte, beside round trips: checks, journal, the VMM's answers.
const SETUP: Duration = Duration::from_millis(250);
/// Round trips of the same.
const SETUP_TRIPS: u32 = 6;
/// Round trips of looking at a link that loses packets: three bursts, with the handshakes before each.
const LOOK_TRIPS: u32 = 33;
/// Bytes of the VMM's stream for each page beside its content, as part of it.
const FRAMING: f64 = 8.0 / 4096.0;
/// What names the page that another one is a copy of, for each of its bytes.
const COPY: f64 = 16.0 / 4096.0;

/// What a migration would take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The path that would be used.
    pub path: String,
    /// The mode that would be used; absent on v1.
    pub mode: Option<String>,
    /// Why this mode.
    pub mode_reason: Option<String>,
    /// Data connections.
    pub streams: u32,
    /// Round trip to the peer, milliseconds.
    pub rtt_ms: f64,
    /// What the link carried when it was probed, bytes a second, or less where less may be taken.
    pub link_rate: f64,
    /// Guest RAM, bytes.
    pub ram_bytes: u64,
    /// The share of it that is zero; absent where it could not be read.
    pub zero_share: Option<f64>,
    /// Bytes on the wire for each byte of a page that is sent for the first time; absent likewise.
    pub first_ratio: Option<f64>,
    /// The same for a page that is sent again.
    pub again_ratio: Option<f64>,
    /// Memory that the guest dirties in a second, bytes; absent where it could not be measured.
    pub dirty_rate: Option<f64>,
    /// Memory that it writes to again and again, bytes.
    pub hot_bytes: Option<f64>,
    /// Whether precopy would come to an end by itself.
    pub converges: bool,
    /// Seconds to the guest's running at the destination.
    pub seconds: f64,
    /// Milliseconds that it would stand still.
    pub downtime_ms: f64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Rounds over RAM.
    pub rounds: u32,
    /// What speaks against the migration.
    pub problems: Vec<Failure>,
    /// What is assumed or unknown.
    pub notes: Vec<String>,
}

/// What is known before anything was measured.
struct Known {
    guest: Guest,
    dialler: Dialler,
    choice: Choice,
    downtime: Downtime,
    rtt: Duration,
    ram: u64,
    runs: bool,
    /// The link loses packets: it is looked at for longer before the start.
    lossy: bool,
    problems: Vec<Failure>,
    notes: Vec<String>,
}

/// Estimates what `spec` would take.
pub(crate) async fn estimate(
    shared: &Shared,
    id: &MigrationId,
    spec: &MigrateSpec,
) -> Result<Estimate, Failure> {
    let mut known = match source::plan(shared, id, spec, 1, true).await {
        Ok(plan) => known(plan),
        // The link and the guest are as they will be; only the destination's VMM is not there yet.
        Err(failure) if failure.code == "not_awaited" => alone(shared, spec).await?,
        Err(failure) => return Err(failure),
    };
    let qemu = known.guest.reach().await.map_err(qmp_failure)?;
    let mode = Mode::from_wire(known.choice.mode).unwrap_or(Mode::Internet);
    let path = Path::from_wire(known.choice.path).unwrap_or(Path::V1);
    let compression = match (path, mode) {
        (Path::V3, Mode::Internet) => Compression::INTERNET,
        _ => Compression::Raw,
    };
    // One after the other: the burst would slow the guest's writes down, and these the burst.
    let seen = look(&qemu, &mut known, compression).await?;
    let limit = source::limit(shared, spec);
    let burst = Burst { streams: known.choice.streams, link: mode, quic: known.choice.quic, limit, ..BURST };
    let carried = probe(&known.dialler, burst).await?;
    known.guest.release();
    let rate = limit.map_or(carried.steady, |limit| carried.steady.min(limit as f64));
    let memory = memory(&seen, &mut known, compression, shared.config.hde.dedup);
    let way = way(&seen, &known, rate, shared, compression);
    Ok(told(known, seen, carried, rate, (path, mode), &memory, &forecast(&memory, &way)))
}

fn known(plan: Plan) -> Known {
    let rtt = plan.met.rtt;
    let (problems, notes) = plan.found();
    let Plan { guest, choice, dialler, guest_ran: runs, downtime, ram, lossy, .. } = plan;
    Known { guest, dialler, choice, downtime, rtt, ram, runs, lossy, problems, notes }
}

/// The same where the destination does not wait for the VM: it counts as one that offers what this node does.
async fn alone(shared: &Shared, spec: &MigrateSpec) -> Result<Known, Failure> {
    let Vmm::Qmp(path) = &spec.vmm else {
        return Err(Failure::new("unsupported", Blame::Operator, "--relay cannot be estimated", ""));
    };
    let guest = Guest::connect(path).await?;
    let qemu = guest.reach().await.map_err(qmp_failure)?;
    let description = qemu.describe().await.map_err(qmp_failure)?;
    let dialler = shared.dialler(spec.addr, spec.to.clone());
    let limit = source::limit(shared, spec);
    let quick = probe(&dialler, Burst { limit, ..Burst::QUICK }).await?;
    let rtt = quick.rtt.unwrap_or_default();
    let (link, why) = shared.config.bounds.judge(rtt, Some(quick.best));
    let judged = source::mode(shared, spec, link, why);
    let offer = shared.offer_as_source();
    let unmapped = Err("the destination does not wait yet".to_owned());
    let theirs = Offer { v3: true, ..shared.offer_as_destination() };
    let theirs =
        crate::hde::offer(theirs, &unmapped, &description, shared.config.limits.memory, shared.config.hde);
    let mut choice =
        choose(&offer, &theirs, source::wish(spec, judged.0), link).map_err(source::impossible)?;
    choice.mode_reason = judged.1;
    let found = transport::find(shared, &dialler, &theirs, &choice, rtt, limit).await;
    choice.quic = found.quic && transport::possible(&choice);
    choice.reasons.extend(found.fallback);
    Ok(Known {
        downtime: Downtime::divide(spec.downtime_limit, rtt, shared.write_time)?,
        ram: crate::hde::ram_bytes(&description),
        runs: description.run_state == RunState::Running,
        notes: vec![
            "the destination does not wait for the VM yet: it is assumed to offer what this node does".into(),
        ],
        problems: Vec::new(),
        lossy: found.lossy,
        guest,
        dialler,
        choice,
        rtt,
    })
}

/// Looks at the guest's memory for some seconds.
async fn look(qemu: &Qemu, known: &mut Known, compression: Compression) -> Result<Seen, Failure> {
    match Ram::open(qemu).await {
        Ok(ram) => content::watch(ram, compression, known.runs).await,
        Err(why) => {
            let why = crate::hde::words(&why);
            known.notes.push(format!("the guest's memory cannot be read ({why}): what the VMM holds counts as not zero and not compressible"));
            let touched = qemu.qmp().pid().and_then(crate::process::resident_bytes);
            let zero = touched.map(|touched| 1.0 - (touched as f64 / known.ram.max(1) as f64).min(1.0));
            let mut seen = Seen { zero: zero.unwrap_or(0.0), ..Seen::unknown() };
            if known.runs {
                match written(qemu).await {
                    Ok(dirty) => seen.dirty = Some(dirty),
                    Err(failure) => {
                        known.notes.push(format!("the dirty rate is not known: {}", failure.message))
                    }
                }
            } else {
                seen.dirty = Some((0.0, 0.0));
            }
            Ok(seen)
        }
    }
}

/// Memory dirtied within the shorter and the longer time, as QEMU says.
async fn written(qemu: &Qemu) -> Result<(f64, f64), Failure> {
    let soon = qemu.dirtied_within(SOON).await.map_err(qmp_failure)?;
    let later = qemu.dirtied_within(LATER).await.map_err(qmp_failure)?;
    Ok((soon as f64, later as f64))
}

fn memory(seen: &Seen, known: &mut Known, compression: Compression, dedup: bool) -> Memory {
    let bytes = known.ram as f64;
    let (soon, later) = seen.dirty.unwrap_or((0.0, 0.0));
    let times = f64::from(LATER) / f64::from(SOON);
    let (hot, churn) = hot_set(soon, later, f64::from(SOON), times, bytes);
    let refers = known.choice.mapped || known.choice.cache_pages > 0;
    let copies = if refers && dedup { seen.copies } else { 0.0 };
    if copies > 0.01 {
        let copies = copies * 100.0;
        known.notes.push(format!("{copies:.0} % of the pages that are not zero are copies of others"));
    }
    let first = seen.first.unwrap_or(1.0) * (1.0 - copies) + COPY * copies + FRAMING;
    let again = match (compression, seen.again) {
        (Compression::Raw, _) => 1.0 + FRAMING,
        (_, Some(again)) if refers && cached(known, hot) => again,
        _ => first,
    };
    Memory { bytes, zero: seen.zero, first, again, hot, churn }
}

/// Whether what is sent again finds its reference: a cache must hold the hot set.
fn cached(known: &Known, hot: f64) -> bool {
    known.choice.mapped || f64::from(known.choice.cache_pages) * 4096.0 >= hot
}

fn way(seen: &Seen, known: &Known, link: f64, shared: &Shared, compression: Compression) -> Way {
    let workers = shared.config.limits.workers as f64;
    let agents = match (compression, seen.encode_rate) {
        (Compression::Raw, _) | (_, None) => PLAIN,
        (_, Some(rate)) => (rate * workers * SHARE).min(PLAIN),
    };
    Way {
        link,
        agents,
        zeros: ZEROS,
        setup: SETUP + known.rtt * if known.lossy { SETUP_TRIPS + LOOK_TRIPS } else { SETUP_TRIPS },
        left: known.downtime.vmm,
        overhead: Downtime::overhead(known.rtt, shared.write_time),
    }
}

fn told(
    known: Known,
    seen: Seen,
    carried: Carried,
    rate: f64,
    (path, mode): (Path, Mode),
    memory: &Memory,
    forecast: &Forecast,
) -> Estimate {
    let mut notes = known.notes;
    notes.extend(known.choice.reasons);
    if carried.resent > 0.001 {
        notes.push(format!("{:.1} % of the probe's packets had to be sent again", carried.resent * 100.0));
    }
    if !forecast.converges {
        notes.push("it would not converge: the guest writes faster than the rounds get shorter".to_owned());
    }
    let v3 = path == Path::V3;
    Estimate {
        path: path.name().to_owned(),
        mode: v3.then(|| mode.name().to_owned()),
        mode_reason: v3.then_some(known.choice.mode_reason),
        streams: known.choice.streams,
        rtt_ms: known.rtt.as_secs_f64() * 1e3,
        link_rate: rate,
        ram_bytes: known.ram,
        zero_share: seen.first.map(|_| seen.zero),
        first_ratio: seen.first.map(|_| memory.first),
        again_ratio: seen.again.map(|_| memory.again),
        dirty_rate: seen.dirty.map(|(soon, _)| soon / f64::from(SOON)),
        hot_bytes: seen.dirty.map(|_| memory.hot),
        converges: forecast.converges,
        seconds: forecast.seconds,
        downtime_ms: forecast.downtime * 1e3,
        wire_bytes: forecast.wire as u64,
        rounds: forecast.rounds,
        problems: known.problems,
        notes,
    }
}
