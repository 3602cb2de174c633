//! The status of one migration, as it is kept up to date by its task and watched by others.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dwcp_proto::path::{Cause, Change};
use dwcp_proto::{Leg, MigrationId, NodeName, Path, VmName};
use tokio::sync::watch;

use crate::counters::Counters;
use crate::error::{Blame, Failure};
use crate::handshake::Session;
use crate::retry;
use crate::status::{Phase, Progress, Role, Status};
use crate::transport;

/// Reasons that a status holds; a migration that changes its path more often has told enough.
const MAX_REASONS: usize = 64;

/// What a change of mode costs where pages were written into RAM.
const UNMAPPED: &str =
    "sink stream instead of mapped: only a stream from its beginning can be written into RAM";

/// What a source is called that reads the guest's RAM itself.
const DIRECT: &str = "direct";

/// See the module.
#[derive(Debug)]
pub(crate) struct Report {
    status: watch::Sender<Status>,
    pub(crate) counters: Arc<Counters>,
    started: Instant,
    retry: Mutex<Retry>,
    /// At the source: why QUIC or TCP, whether the destination can be told or not.
    found: Mutex<Option<String>>,
    /// At the source: this attempt reads the guest's RAM itself.
    direct: AtomicBool,
}

/// Whether there is another attempt after this one.
#[derive(Debug, Default)]
struct Retry {
    /// Further attempts that are allowed.
    left: u32,
    /// This one has a session.
    stands: bool,
    /// One has ended, and another is to follow.
    due: bool,
    /// Until when it may wait to begin.
    until: Option<Instant>,
    /// Why those before ended, one entry each.
    ended: Vec<String>,
}

impl Report {
    pub(crate) fn new(id: MigrationId, vm: VmName, role: Role, peer: NodeName) -> Self {
        let status = Status {
            id,
            vm,
            role,
            peer,
            phase: Phase::Preparing,
            status: "preparing".to_owned(),
            path: None,
            mode: None,
            mode_reason: None,
            mode_switches: 0,
            source: None,
            channels: None,
            sink: None,
            encryption: None,
            transport: None,
            transport_reason: None,
            path_switches: 0,
            fallback_reasons: Vec::new(),
            total_seconds: 0.0,
            downtime_ms: None,
            downtime_method: None,
            raw_bytes: 0,
            wire_bytes: 0,
            saved_ratio: 0.0,
            guest_bytes: 0,
            rounds: 0,
            chunks: 0,
            retransmitted_chunks: 0,
            reconnects: 0,
            attempt: 1,
            agent_peak_anon_bytes: 0,
            layers: Vec::new(),
            progress: Progress::default(),
            error: None,
        };
        let retry = Mutex::default();
        Report {
            status: watch::Sender::new(status),
            counters: Arc::default(),
            started: Instant::now(),
            retry,
            found: Mutex::default(),
            direct: AtomicBool::default(),
        }
    }

    /// This is the `attempt`th, and so many may follow.
    pub(crate) fn attempts(&self, attempt: u32, left: u32) {
        self.retry().left = left;
        self.set(|s| s.attempt = attempt);
    }

    /// Which attempt this is, counted from 1.
    pub(crate) fn attempt(&self) -> u32 {
        self.status.borrow().attempt
    }

    /// How many further attempts are allowed.
    pub(crate) fn attempts_left(&self) -> u32 {
        self.retry().left
    }

    /// Whether this attempt has ended and another one is to follow.
    pub(crate) fn is_due(&self) -> bool {
        self.retry().due
    }

    /// The attempt that was due begins.
    pub(crate) fn begin_again(&self) {
        self.direct.store(false, Relaxed);
        let retry = &mut *self.retry();
        (retry.due, retry.stands) = (false, false);
    }

    /// This attempt has, or had in an earlier life of the agent, a session.
    pub(crate) fn stands(&self) {
        self.retry().stands = true;
    }

    fn retry(&self) -> MutexGuard<'_, Retry> {
        self.retry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    pub(crate) fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Changes the status and brings its figures up to date.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Status)) {
        let anon = anon_bytes();
        self.status.send_modify(|status| {
            change(status);
            self.figures(status, anon);
        });
    }

    /// Brings the figures up to date.
    pub(crate) fn refresh(&self) {
        self.set(|_| {});
    }

    fn figures(&self, status: &mut Status, anon: u64) {
        let c = &self.counters;
        status.status = phase_name(status.phase).to_owned();
        status.total_seconds = self.started.elapsed().as_secs_f64();
        status.raw_bytes = c.raw.load();
        let wire = c.wire.load();
        let seconds = status.total_seconds;
        status.wire_bytes = wire;
        status.guest_bytes = c.guest.load();
        status.saved_ratio = match status.guest_bytes {
            0 => 0.0,
            guest => (1.0 - wire as f64 / guest as f64).max(0.0),
        };
        status.rounds = c.rounds.load();
        status.chunks = c.chunks.load();
        status.retransmitted_chunks = c.retransmitted.load();
        status.reconnects = c.reconnects.load();
        status.agent_peak_anon_bytes = status.agent_peak_anon_bytes.max(anon);
        status.layers = c.layers();
        status.progress.wire_rate = match c.rate.load() {
            0 if seconds > 0.0 => wire as f64 / seconds,
            rate => rate as f64,
        };
    }

    /// Why QUIC or TCP, where a leg can be either.
    pub(crate) fn found(&self, why: &str) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.to_owned());
    }

    /// The source reads the guest's RAM itself.
    pub(crate) fn reads_directly(&self) {
        self.direct.store(true, Relaxed);
        self.set(|s| s.source = Some(DIRECT.to_owned()));
    }

    pub(crate) fn is_direct(&self) -> bool {
        self.direct.load(Relaxed)
    }

    fn on_leg(&self, status: &mut Status, leg: &Leg) {
        on_leg(status, leg);
        if self.is_direct() {
            status.source = Some(DIRECT.to_owned());
        }
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = found.as_ref().map(|found| transport::reason(&leg.choice, found));
        let told = Some(leg.choice.transport_reason.clone()).filter(|reason| !reason.is_empty());
        status.transport_reason = told.or(ours);
    }

    /// The VMM gives its stream over so many channels.
    pub(crate) fn channels(&self, count: u8) {
        self.set(|s| s.channels = Some(count));
    }

    /// The session was agreed on.
    pub(crate) fn session(&self, session: &Session) {
        self.stands();
        let mut reasons = self.retry().ended.clone();
        reasons.extend_from_slice(&session.leg.choice.reasons);
        self.set(|s| {
            self.on_leg(s, &session.leg);
            s.fallback_reasons = reasons;
        });
    }

    /// The data goes on as another leg.
    pub(crate) fn turned(&self, leg: &Leg, cause: Cause, reason: &str) {
        let of_mode = Cause::OF_MODE.contains(&cause);
        self.set(|s| {
            let mapped = s.sink.as_deref() == Some("mapped");
            self.on_leg(s, leg);
            s.mode_switches += u32::from(of_mode);
            s.path_switches += u32::from(!of_mode && cause != Cause::Restarted);
            let text = match of_mode {
                false => format!("{} from byte {} on: {cause}: {reason}", leg.path.name(), leg.from),
                true if mapped && !leg.choice.mapped => format!("{UNMAPPED}, from byte {} on", leg.from),
                // A mode is not worse than the other; why it changed is in `mode_reason`.
                true => return,
            };
            if s.fallback_reasons.len() < MAX_REASONS {
                s.fallback_reasons.push(text);
            }
        });
    }

    /// Data that was to go over QUIC goes over TCP.
    pub(crate) fn over_tcp(&self, why: &str) {
        if self.status.borrow().transport.as_deref() != Some("quic") {
            return;
        }
        self.set(|s| {
            s.transport = Some("tcp".to_owned());
            s.transport_reason = Some(why.to_owned());
            if s.fallback_reasons.len() < MAX_REASONS {
                s.fallback_reasons.push(why.to_owned());
            }
        });
    }

    /// Something simpler than wished for is used from now on.
    pub(crate) fn fallback(&self, reason: String) {
        self.set(|s| s.fallback_reasons.push(reason));
    }

    /// The VMM's progress: fraction done, bytes remaining in this round, bytes dirtied a second.
    pub(crate) fn progress(&self, fraction: f64, remaining: u64, dirty_rate: Option<f64>) {
        self.set(|s| {
            let carried = self.counters.guest.load() as f64 / self.started.elapsed().as_secs_f64().max(0.001);
            s.progress.fraction = s.progress.fraction.max(fraction);
            s.progress.remaining_bytes = remaining;
            s.progress.dirty_rate = dirty_rate;
            let gain = carried - dirty_rate.unwrap_or(0.0);
            s.progress.eta_seconds = (gain > 0.0).then(|| remaining as f64 / gain);
        });
    }

    pub(crate) fn downtime(&self, downtime: Option<Duration>, method: &str) {
        self.set(|s| {
            s.downtime_ms = downtime.map(|d| d.as_secs_f64() * 1e3);
            s.downtime_method = downtime.map(|_| method.to_owned());
        });
    }

    /// The last word; or another attempt follows.
    pub(crate) fn end(&self, phase: Phase, error: Option<Failure>) {
        let (attempt, stood) = (self.attempt(), self.status.borrow().phase != Phase::Preparing);
        let follows = |failure: &&Failure| phase == Phase::Aborted && self.retry().follows(failure, attempt);
        if let Some(failure) = error.as_ref().filter(follows) {
            if stood {
                self.retry().ended.push(format!("attempt {attempt} ended: {}", failure.code));
            }
            let reasons = self.retry().ended.clone();
            return self.set(|s| {
                s.phase = Phase::Preparing;
                s.progress = Progress::default();
                s.fallback_reasons = reasons;
                s.attempt += u32::from(stood);
            });
        }
        self.retry().due = false;
        self.set(|s| {
            s.phase = phase;
            s.error = error;
            if phase == Phase::Completed {
                s.progress.fraction = 1.0;
                s.progress.remaining_bytes = 0;
                s.progress.eta_seconds = Some(0.0);
            }
        });
    }
}

/// A change of path, as the migration's task records it.
#[derive(Debug)]
pub(crate) struct Turned {
    pub(crate) leg: Leg,
    pub(crate) change: Change,
}

/// A turn as a line of the journal: its kind, and more for people.
pub(crate) fn told(leg: &Leg, change: &Change) -> (&'static str, String) {
    let (what, name) = match change.cause {
        Cause::Restarted => ("resumed", leg.path.name()),
        cause if Cause::OF_MODE.contains(&cause) => ("mode_switch", leg.mode.name()),
        _ => ("path_switch", leg.path.name()),
    };
    (what, format!("{name} from byte {} on: {}: {}", leg.from, change.cause, change.reason))
}

fn on_leg(status: &mut Status, leg: &Leg) {
    let v3 = leg.path == Path::V3;
    let through = if v3 { "stream" } else { "opaque" };
    status.path = Some(leg.path.name().to_owned());
    status.mode = v3.then(|| leg.mode.name().to_owned());
    status.mode_reason = v3.then(|| leg.choice.mode_reason.clone());
    status.source = Some(through.to_owned());
    status.sink = Some(if leg.choice.mapped { "mapped" } else { through }.to_owned());
    status.encryption = Some(leg.encryption().to_owned());
    status.transport = Some(leg.transport().to_owned());
}

impl Retry {
    /// Whether another attempt follows one that ended for this, or this one waits on until it can begin.
    fn follows(&mut self, failure: &Failure, attempt: u32) -> bool {
        self.due = match self.stands {
            true if self.left > 0 && retry::helps(failure) => {
                self.left -= 1;
                self.until = Some(Instant::now() + retry::PATIENCE);
                true
            }
            true => false,
            // A further attempt whose destination is not ready yet.
            false => {
                let final_word = matches!(failure.code.as_str(), "cancelled" | "deadline")
                    || failure.blame == Blame::PeerMisbehaving;
                attempt > 1 && !final_word && self.until.is_some_and(|until| Instant::now() < until)
            }
        };
        self.due
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Preparing => "preparing",
        Phase::Connecting => "connecting",
        Phase::Precopy => "precopy",
        Phase::Switchover => "switchover",
        Phase::Handover => "handover",
        Phase::InDoubt => "in_doubt",
        Phase::Completed => "completed",
        Phase::Aborted => "aborted",
        Phase::Failed => "failed",
    }
}

/// This process's anonymous memory (`RssAnon` of proc(5)), bytes; 0 where it cannot be read.
pub(crate) fn anon_bytes() -> u64 {
    let Ok(text) = fs::read_to_string("/proc/self/status") else { return 0 };
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_anonymous_memory() {
        assert!(anon_bytes() > 0);
    }

    #[test]
    fn the_fraction_never_falls() {
        let name = |n: &str| n.to_owned();
        let report = Report::new(
            MigrationId::new(name("m")).unwrap(),
            VmName::new(name("v")).unwrap(),
            Role::Source,
            NodeName::new(name("n")).unwrap(),
        );
        report.progress(0.5, 100, None);
        report.progress(0.2, 300, Some(1.0));
        assert_eq!(report.status().progress.fraction, 0.5);
        assert_eq!(report.status().progress.remaining_bytes, 300);
    }
}
