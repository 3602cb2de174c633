//! What this node counts, for Prometheus. Every series exists, at 0, from the start: a missing series would read as
//! "no data" where "nothing happened" is meant. Labels are enums only, so no peer can grow or forge a series.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use dwcp_hde::{Choice, Fallback, LayerBytes, Stats};
use dwcp_link::Refusals;
use dwcp_proto::path::Cause;
use dwcp_proto::{Leg, Mode, Path};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::error::Blame;
use crate::status::{Phase, Role, Status};

/// Upper edges of the chunk latency's buckets, seconds. Alerts and rollout gates read 0.05, 0.1, 0.12, 0.15 and 0.2.
const LATENCY_EDGES: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.12, 0.15, 0.2, 0.5, 1.0, 2.5, 10.0];
/// Upper edges of the downtime's buckets, seconds.
const DOWNTIME_EDGES: [f64; 12] = [0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0];

/// Kinds of Byzantine attempts: what a peer, or somebody between, did that no honest one does. Whatever is not in this
/// list counts as `protocol`.
pub const ATTACKS: [&str; 37] = [
    "conn_flood",
    "delta_base",
    "dict_id",
    "double_resume",
    "downgrade_suite",
    "downgrade_v1",
    "equivocation",
    "extend",
    "forged_ack",
    "forged_receipt",
    "half_open",
    "header_flip",
    "len_overflow",
    "lying_destination",
    "old_round",
    "omit",
    "oob_page",
    "overlap",
    "payload_flip",
    "protocol",
    "ref_unheld",
    "reflect",
    "reorder",
    "replay_chunk",
    "replay_session",
    "sig_forge",
    "slowloris",
    "splice_stream",
    "splice_vm",
    "ticket_replay",
    "truncate",
    "unknown_codec",
    "unknown_peer",
    "v1_hijack",
    "weak_key",
    "wrong_signer",
    "zip_bomb",
];

const MODES: [Mode; 2] = [Mode::Internet, Mode::Datacenter];
/// What may protect data on the wire, as in the status.
const ENCRYPTIONS: [&str; 2] = ["tls", "none"];
/// What data connections are made over, likewise.
const TRANSPORTS: [&str; 2] = ["tcp", "quic"];
const ENDS: [Phase; 3] = [Phase::Completed, Phase::Aborted, Phase::Failed];
const BLAMES: [Blame; 6] =
    [Blame::Operator, Blame::Vmm, Blame::PeerIncompatible, Blame::PeerMisbehaving, Blame::Link, Blame::Local];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByMode {
    mode: &'static str,
}

impl From<Mode> for ByMode {
    fn from(mode: Mode) -> Self {
        ByMode { mode: mode.name() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByError {
    mode: &'static str,
    blame: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByKind {
    kind: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByLayer {
    layer: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCodec {
    codec: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPath {
    path: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySwitch {
    to: &'static str,
    cause: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByEnd {
    role: &'static str,
    path: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByProtection {
    path: &'static str,
    encryption: &'static str,
    transport: &'static str,
}

type Seconds = Counter<f64, AtomicU64>;

/// Every counter of this node. Cheap to clone; all clones count together.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Series>);

#[derive(Debug, Default)]
struct Series {
    refusals: OnceLock<Refusals>,
    v3_raw: Family<ByMode, Counter>,
    v3_wire: Family<ByMode, Counter>,
    v3_processed: Family<ByMode, Counter>,
    v3_operations: Family<ByMode, Counter>,
    v3_errors: Family<ByError, Counter>,
    v3_latency: LatencyHistograms,
    v3_busy: Family<ByMode, Seconds>,
    v3_inflight: Gauge,
    v3_pages: Family<ByLayer, Counter>,
    v3_layer_before: Family<ByLayer, Counter>,
    v3_layer_after: Family<ByLayer, Counter>,
    v3_codecs: Family<ByCodec, Counter>,
    v1_processed: Counter,
    v1_busy: Seconds,
    attempts: Family<ByKind, Counter>,
    successes: Counter,
    data_loss: Counter,
    migrations: Family<ByEnd, Counter>,
    inflight: Gauge,
    reconnects: Counter,
    retransmitted: Counter,
    downtime: DowntimeHistogram,
    unresolved: Gauge,
    node_path: Family<ByPath, Gauge>,
    switches: Family<BySwitch, Counter>,
    mode_switches: Family<BySwitch, Counter>,
    legs: Family<ByProtection, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All series at 0; the node's path is v1.
    pub fn new() -> Self {
        let s = Series::default();
        for mode in MODES {
            let by = ByMode::from(mode);
            touch(&s.v3_raw, by);
            touch(&s.v3_wire, by);
            touch(&s.v3_processed, by);
            touch(&s.v3_operations, by);
            touch(&s.v3_latency.0, by);
            touch(&s.v3_busy, by);
            BLAMES.iter().for_each(|&blame| touch(&s.v3_errors, by_error(mode, blame)));
        }
        layers(&Stats::default()).iter().for_each(|&(layer, _)| touch(&s.v3_pages, ByLayer { layer }));
        for LayerBytes { layer, .. } in Stats::default().layers() {
            touch(&s.v3_layer_before, ByLayer { layer });
            touch(&s.v3_layer_after, ByLayer { layer });
        }
        let fallbacks = Fallback::ALL.map(Fallback::name);
        Choice::NAMES
            .iter()
            .chain(&Choice::LANE_NAMES)
            .chain(&fallbacks)
            .for_each(|&codec| touch(&s.v3_codecs, ByCodec { codec }));
        ATTACKS.iter().for_each(|kind| touch(&s.attempts, ByKind { kind }));
        for role in [Role::Source, Role::Destination].map(role_label) {
            for path in ["v1", "v3", "none"] {
                for outcome in ENDS.map(outcome_label) {
                    touch(&s.migrations, ByEnd { role, path, outcome });
                }
            }
        }
        let of_path = Cause::ALL.into_iter().filter(|cause| !Cause::OF_MODE.contains(cause));
        for (to, cause) in of_path.flat_map(|cause| [(Path::V1, cause), (Path::V3, cause)]) {
            touch(&s.switches, BySwitch { to: to.name(), cause: cause.code() });
        }
        for (to, cause) in MODES.into_iter().flat_map(|to| Cause::OF_MODE.map(|cause| (to, cause))) {
            touch(&s.mode_switches, BySwitch { to: to.name(), cause: cause.code() });
        }
        for (path, encryption) in [Path::V1, Path::V3].into_iter().flat_map(|p| ENCRYPTIONS.map(|e| (p, e))) {
            for transport in TRANSPORTS {
                touch(&s.legs, ByProtection { path: path.name(), encryption, transport });
            }
        }
        let metrics = Metrics(Arc::new(s));
        metrics.node_path(Path::V1);
        metrics
    }

    /// The listener's refusals are this node's from now on.
    pub(crate) fn listens(&self, refusals: Refusals) {
        // One listener a node; a second one's would be a mistake of ours.
        let _ = self.0.refusals.set(refusals);
    }

    /// Puts every series into `registry`, under the names that the dashboards and alert rules use. A counter's name
    /// gets its `_total` from the registry.
    pub fn register(&self, registry: &mut Registry) {
        let s = &*self.0;
        macro_rules! add {
            ($name:literal, $help:literal, $metric:expr) => {
                registry.register($name, $help, $metric.clone())
            };
        }
        add!(
            "dwcp_v3_bytes_raw",
            "Guest memory carried over v3, zero pages at their full size, bytes",
            s.v3_raw
        );
        add!("dwcp_v3_bytes_wire", "Bytes given to the network on v3, retransmissions included", s.v3_wire);
        add!("dwcp_v3_bytes_processed", "Bytes of the VMMs' streams carried over v3", s.v3_processed);
        add!("dwcp_v3_operations", "Chunks that v3 carried or failed to carry", s.v3_operations);
        add!("dwcp_v3_errors", "Chunks and sessions that failed on v3, by who erred", s.v3_errors);
        add!("dwcp_v3_latency_seconds", "From a chunk's encoding to its acknowledgement", s.v3_latency.0);
        add!("dwcp_v3_busy_seconds", "Seconds in which a migration carried memory over v3", s.v3_busy);
        add!("dwcp_v3_migrations_inflight", "Migrations on v3 now", s.v3_inflight);
        add!("dwcp_v3_pages", "Pages encoded for v3, by the layer that sent them", s.v3_pages);
        add!("dwcp_v3_layer_before_bytes", "Bytes that a layer of HDE was given", s.v3_layer_before);
        add!("dwcp_v3_layer_after_bytes", "Bytes that it made of them", s.v3_layer_after);
        add!("dwcp_v3_chunks_encoded", "Chunks by codec, or by why they were left raw", s.v3_codecs);
        add!("dwcp_v1_bytes_processed", "Bytes of the VMMs' streams carried over v1", s.v1_processed);
        add!("dwcp_v1_busy_seconds", "Seconds in which a migration carried memory over v1", s.v1_busy);
        add!("dwcp_v3_byzantine_attempts", "Protocol violations refused, by kind", s.attempts);
        add!("dwcp_v3_byzantine_successful", "Violations found only by the independent check", s.successes);
        add!(
            "dwcp_v3_data_loss_detected",
            "Migrations whose RAM differed at the independent check",
            s.data_loss
        );
        add!("dwcp_migrations", "Migrations that ended; path none: before it was negotiated", s.migrations);
        add!("dwcp_migrations_inflight", "Migrations now", s.inflight);
        add!("dwcp_reconnects", "Data connections made again after a loss", s.reconnects);
        add!("dwcp_retransmitted_chunks", "Chunks sent again", s.retransmitted);
        add!("dwcp_downtime_seconds", "How long guests that left this node stood still", s.downtime.0);
        add!(
            "dwcp_handover_unresolved",
            "Migrations in doubt: only the peer or an operator ends them",
            s.unresolved
        );
        registry.register_collector(Box::new(Door(self.clone())));
        add!("dwcp_node_path", "1 for the path that new migrations of this node take", s.node_path);
        add!("dwcp_path_switches", "Changes of path in running migrations, at their source", s.switches);
        add!(
            "dwcp_mode_switches",
            "Changes of v3's mode in running migrations, at their source",
            s.mode_switches
        );
        add!(
            "dwcp_legs",
            "Stretches of migrations' data, at their source, by path, encryption and transport",
            s.legs
        );
        let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("dwcp_build", "The agent's build", build);
    }

    /// What a flag server hears of this node.
    pub fn tally(&self) -> Tally {
        let s = &*self.0;
        let failed = |role| {
            let by = ByEnd { role, path: "v3", outcome: outcome_label(Phase::Failed) };
            s.migrations.get_or_create(&by).get()
        };
        Tally {
            v3_inflight: u32::try_from(s.v3_inflight.get()).unwrap_or(0),
            data_loss: s.data_loss.get(),
            byzantine_successes: s.successes.get(),
            critical_errors: [Role::Source, Role::Destination].map(role_label).map(failed).iter().sum(),
        }
    }

    /// Memory was carried over v1: bytes of the VMM's stream.
    pub fn v1_carried(&self, stream_bytes: u64) {
        self.0.v1_processed.inc_by(stream_bytes);
    }

    /// Memory was carried over v3: bytes of the VMM's stream, and the guest memory in them with zero pages at their
    /// full size.
    pub fn v3_carried(&self, mode: Mode, stream_bytes: u64, guest_bytes: u64) {
        self.0.v3_processed.get_or_create(&mode.into()).inc_by(stream_bytes);
        self.0.v3_raw.get_or_create(&mode.into()).inc_by(guest_bytes);
    }

    /// A migration's data begins to flow on this leg.
    pub fn begins(&self, leg: &Leg) {
        let (path, encryption, transport) = (leg.path.name(), leg.encryption(), leg.transport());
        let by = ByProtection { path, encryption, transport };
        self.0.legs.get_or_create(&by).inc();
    }

    /// A chunk was encoded.
    pub fn encoded(&self, stats: &Stats, codec: &'static str) {
        for (layer, pages) in layers(stats) {
            self.0.v3_pages.get_or_create(&ByLayer { layer }).inc_by(pages);
        }
        for LayerBytes { layer, before, after, .. } in stats.layers() {
            self.0.v3_layer_before.get_or_create(&ByLayer { layer }).inc_by(before);
            self.0.v3_layer_after.get_or_create(&ByLayer { layer }).inc_by(after);
        }
        self.0.v3_codecs.get_or_create(&ByCodec { codec }).inc();
    }

    /// Bytes were given to the network on v3.
    pub fn v3_wire(&self, mode: Mode, bytes: u64) {
        self.0.v3_wire.get_or_create(&mode.into()).inc_by(bytes);
    }

    /// A chunk was acknowledged, so long after it was encoded.
    pub fn v3_acknowledged(&self, mode: Mode, latency: Duration) {
        self.0.v3_operations.get_or_create(&mode.into()).inc();
        self.0.v3_latency.0.get_or_create(&mode.into()).observe(latency.as_secs_f64());
    }

    /// A chunk or session failed. Counts as an operation too, so that errors / operations is a ratio.
    pub fn v3_error(&self, mode: Mode, blame: Blame) {
        self.0.v3_operations.get_or_create(&mode.into()).inc();
        self.0.v3_errors.get_or_create(&by_error(mode, blame)).inc();
    }

    /// A migration carried memory for so long: over v3 in this mode, or over v1.
    pub fn busy(&self, mode: Option<Mode>, time: Duration) {
        match mode {
            Some(mode) => self.0.v3_busy.get_or_create(&mode.into()).inc_by(time.as_secs_f64()),
            None => self.0.v1_busy.inc_by(time.as_secs_f64()),
        };
    }

    /// A violation of this kind (one of [`ATTACKS`]) was refused.
    pub fn byzantine_attempt(&self, kind: &str) {
        let kind = ATTACKS.iter().find(|known| **known == kind).unwrap_or(&"protocol");
        self.0.attempts.get_or_create(&ByKind { kind }).inc();
    }

    /// The independent check found a violation that nothing before it had refused.
    pub fn byzantine_success(&self) {
        self.0.successes.inc();
    }

    /// The independent check found RAM that differs.
    pub fn data_loss(&self) {
        self.0.data_loss.inc();
    }

    /// A data connection was made again after a loss.
    pub fn reconnected(&self) {
        self.0.reconnects.inc();
    }

    /// Chunks were sent again.
    pub fn retransmitted(&self, chunks: u64) {
        self.0.retransmitted.inc_by(chunks);
    }

    /// How many migrations are in doubt now.
    pub fn unresolved(&self, migrations: usize) {
        self.0.unresolved.set(migrations as i64);
    }

    /// The path that new migrations of this node take, as the flag has it.
    pub fn node_path(&self, path: Path) {
        for each in [Path::V1, Path::V3] {
            self.0.node_path.get_or_create(&ByPath { path: each.name() }).set(i64::from(each == path));
        }
    }

    /// A running migration has changed its path.
    pub fn switched(&self, to: Path, cause: Cause) {
        self.0.switches.get_or_create(&BySwitch { to: to.name(), cause: cause.code() }).inc();
    }

    /// A running migration has changed its mode.
    pub fn mode_switched(&self, to: Mode, cause: Cause) {
        self.0.mode_switches.get_or_create(&BySwitch { to: to.name(), cause: cause.code() }).inc();
    }

    /// A migration runs until the guard is dropped.
    pub fn in_flight(&self) -> InFlight {
        self.0.inflight.inc();
        InFlight { metrics: self.clone(), v3: false }
    }

    /// A migration ended with this status. The downtime counts at the source only: once for each migration.
    pub fn ended(&self, status: &Status) {
        if !status.phase.is_end() {
            // Another attempt follows.
            return;
        }
        let path = match status.path.as_deref() {
            Some("v1") => "v1",
            Some("v3") => "v3",
            _ => "none",
        };
        let by = ByEnd { role: role_label(status.role), path, outcome: outcome_label(status.phase) };
        self.0.migrations.get_or_create(&by).inc();
        if let (Role::Source, Phase::Completed, Some(ms)) = (status.role, status.phase, status.downtime_ms) {
            self.0.downtime.0.observe(ms / 1000.0);
        }
    }
}

/// What has to stop a rollout, counted since the start of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Migrations on v3 at the moment, at either end.
    pub v3_inflight: u32,
    /// Migrations whose RAM differed at the independent check.
    pub data_loss: u64,
    /// Violations found only by the independent check.
    pub byzantine_successes: u64,
    /// Migrations over v3 that failed: neither did the guest arrive, nor could they be aborted.
    pub critical_errors: u64,
}

/// Connections refused at the data listener, as it has counted them.
#[derive(Debug)]
struct Door(Metrics);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCode {
    code: &'static str,
}

impl Collector for Door {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let Some(refusals) = self.0.0.refusals.get() else { return Ok(()) };
        let help = "Connections refused at the data address, by cause.";
        let metric = ConstCounter::new(0u64).metric_type();
        let mut family = encoder.encode_descriptor("dwcp_refused_connections", help, None, metric)?;
        for (code, count) in refusals.counts() {
            let by = ByCode { code };
            ConstCounter::new(count).encode(family.encode_family(&by)?)?;
        }
        Ok(())
    }
}

/// Counts a running migration for as long as it lives.
#[derive(Debug)]
pub struct InFlight {
    metrics: Metrics,
    v3: bool,
}

impl InFlight {
    /// The migration takes this path from now on.
    pub fn path(&mut self, path: Path) {
        let v3 = path == Path::V3;
        match (self.v3, v3) {
            (false, true) => self.metrics.0.v3_inflight.inc(),
            (true, false) => self.metrics.0.v3_inflight.dec(),
            _ => return,
        };
        self.v3 = v3;
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.path(Path::V1);
        self.metrics.0.inflight.dec();
    }
}

#[derive(Debug)]
struct LatencyHistograms(Family<ByMode, Histogram, fn() -> Histogram>);

impl Default for LatencyHistograms {
    fn default() -> Self {
        LatencyHistograms(Family::new_with_constructor(|| Histogram::new(LATENCY_EDGES)))
    }
}

#[derive(Debug)]
struct DowntimeHistogram(Histogram);

impl Default for DowntimeHistogram {
    fn default() -> Self {
        DowntimeHistogram(Histogram::new(DOWNTIME_EDGES))
    }
}

/// Makes the series of `labels` exist.
fn touch<S, M, C>(family: &Family<S, M, C>, labels: S)
where
    S: Clone + std::hash::Hash + Eq,
    C: MetricConstructor<M>,
{
    drop(family.get_or_create(&labels));
}

fn role_label(role: Role) -> &'static str {
    match role {
        Role::Source => "source",
        Role::Destination => "destination",
    }
}

fn outcome_label(phase: Phase) -> &'static str {
    match phase {
        Phase::Completed => "completed",
        Phase::Aborted => "aborted",
        _ => "failed",
    }
}

/// The layers of HDE, and how many pages each of them has sent. Untracked ones are among the others.
fn layers(stats: &Stats) -> [(&'static str, u64); 6] {
    [
        ("zero", stats.zero_pages + stats.blank_pages),
        ("unchanged", stats.unchanged_pages),
        ("dedup", stats.copied_pages),
        ("delta", stats.delta_pages),
        ("whole", stats.pages),
        ("untracked", stats.untracked_pages),
    ]
}

fn by_error(mode: Mode, blame: Blame) -> ByError {
    ByError { mode: mode.name(), blame: blame_label(blame) }
}

fn blame_label(blame: Blame) -> &'static str {
    match blame {
        Blame::Operator => "operator",
        Blame::Vmm => "vmm",
        Blame::PeerIncompatible => "peer_incompatible",
        Blame::PeerMisbehaving => "peer_misbehaving",
        Blame::Link => "link",
        Blame::Local => "local",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &registry).unwrap();
        out
    }

    fn value(text: &str, series: &str) -> f64 {
        let line = text.lines().find_map(|l| l.strip_prefix(series)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
    }

    #[test]
    fn every_series_starts_at_zero() {
        let text = text(&Metrics::new());
        let mut series = 0;
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let one = ["dwcp_build_info", "dwcp_node_path{path=\"v1\"}"].iter().any(|n| name.starts_with(n));
            assert_eq!(value.parse::<f64>().unwrap(), f64::from(u8::from(one)), "{line}");
            series += 1;
        }
        // Two modes, 6 blames, 37 attacks, 18 ends: a family that was not touched would be missing whole.
        assert!(series > 100, "{series}");
        for name in [
            "dwcp_v3_bytes_raw_total{mode=\"internet\"}",
            "dwcp_v3_errors_total{mode=\"datacenter\",blame=\"link\"}",
            "dwcp_v3_latency_seconds_bucket{le=\"0.05\",mode=\"internet\"}",
            "dwcp_v3_latency_seconds_bucket{le=\"0.1\",mode=\"internet\"}",
            "dwcp_v3_byzantine_attempts_total{kind=\"replay_chunk\"}",
            "dwcp_v3_byzantine_successful_total",
            "dwcp_v3_data_loss_detected_total",
            "dwcp_v1_bytes_processed_total",
            "dwcp_v1_busy_seconds_total",
            "dwcp_migrations_total{role=\"source\",path=\"none\",outcome=\"failed\"}",
            "dwcp_downtime_seconds_count",
            "dwcp_handover_unresolved",
        ] {
            value(&text, name);
        }
    }

    #[test]
    fn an_error_is_an_operation_too() {
        let metrics = Metrics::new();
        metrics.v3_acknowledged(Mode::Internet, Duration::from_millis(60));
        metrics.v3_error(Mode::Internet, Blame::Link);
        let text = text(&metrics);
        assert_eq!(value(&text, "dwcp_v3_operations_total{mode=\"internet\"}"), 2.0);
        assert_eq!(value(&text, "dwcp_v3_errors_total{mode=\"internet\",blame=\"link\"}"), 1.0);
        assert_eq!(value(&text, "dwcp_v3_latency_seconds_bucket{le=\"0.05\",mode=\"internet\"}"), 0.0);
        assert_eq!(value(&text, "dwcp_v3_latency_seconds_bucket{le=\"0.1\",mode=\"internet\"}"), 1.0);
    }

    #[test]
    fn an_unknown_kind_makes_no_new_series() {
        let metrics = Metrics::new();
        let before = text(&metrics).lines().count();
        metrics.byzantine_attempt("omit");
        metrics.byzantine_attempt("x\"} 1\nforged");
        let text = text(&metrics);
        assert_eq!(text.lines().count(), before);
        assert_eq!(value(&text, "dwcp_v3_byzantine_attempts_total{kind=\"omit\"}"), 1.0);
        assert_eq!(value(&text, "dwcp_v3_byzantine_attempts_total{kind=\"protocol\"}"), 1.0);
    }

    #[test]
    fn the_guard_counts_for_as_long_as_it_lives() {
        let metrics = Metrics::new();
        let mut flight = metrics.in_flight();
        flight.path(Path::V3);
        flight.path(Path::V3);
        assert_eq!(value(&text(&metrics), "dwcp_migrations_inflight"), 1.0);
        assert_eq!(value(&text(&metrics), "dwcp_v3_migrations_inflight"), 1.0);
        drop(flight);
        assert_eq!(value(&text(&metrics), "dwcp_migrations_inflight"), 0.0);
        assert_eq!(value(&text(&metrics), "dwcp_v3_migrations_inflight"), 0.0);
    }
}
