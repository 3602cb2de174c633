//! What the engine is built from: plain data, already validated.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use dwcp_proto::mode::Bounds;
use dwcp_proto::{NodeKey, Path};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::error::Failure;

/// Whether v3 may be used now, and why. The flag's source keeps it up to date; the engine reads it when a migration is
/// planned, and watches it while one runs.
///
/// | the flag says           | `source.new` | `source.running` | `veto` |
/// |-------------------------|--------------|------------------|--------|
/// | this node is in         | v3           | keep; after a while return | none |
/// | it is not in            | v1           | leave            | none   |
/// | off, or it is excluded  | v1           | leave            | some   |
/// | nothing: lease expired  | v1 (`hold`: v3) | keep (`v1-all`: leave) | none |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// What holds for migrations that leave this node.
    pub source: Verdict,
    /// Why this node refuses v3 for migrations that come to it, if it does: excluded, or it sees the flag off. It holds
    /// for new and for running ones.
    pub veto: Option<FlagReason>,
    /// The flag document's epoch: incarnation and counter.
    pub epoch: (u64, u64),
}

impl Gate {
    /// The gate of a node that no flag governs: always this path, in both roles.
    pub fn fixed(path: Path, reason: FlagReason) -> Self {
        let (running, veto) = match path {
            Path::V1 => (Running::Leave, Some(reason.clone())),
            Path::V3 => (Running::Return, None),
        };
        Gate { source: Verdict { new: path, running, reason }, veto, epoch: (0, 0) }
    }
}

/// What the flag says to the source of migrations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The path of new migrations: v3 where flag and lease allow it.
    pub new: Path,
    /// What becomes of running ones.
    pub running: Running,
    /// Why `new` is what it is. Where running ones must leave v3, it is for the same reason.
    pub reason: FlagReason,
}

/// What the flag says to migrations that run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Running {
    /// Those on v3 must change to v1, now. [`Return`](Self::Return) follows a second later at the earliest.
    Leave,
    /// Each stays on its path: nobody has said that v3 is off, and nobody has said for long enough that it is on.
    Keep,
    /// Those on v1 may change to v3: it has been allowed without a break for a time that differs from node to node, so
    /// that a fleet does not turn as one.
    Return,
}

/// Why the flag says what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlagReason {
    /// Stable, snake_case, one of a fixed set: for metrics, JSON and the wire.
    pub code: &'static str,
    /// The same for people.
    pub text: String,
}

/// Where v1 may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum V1Policy {
    /// Anywhere.
    #[default]
    Any,
    /// Only on links that count as datacenter.
    Datacenter,
    /// Nowhere.
    Never,
}

/// Local policy; flags choose inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// v1's data connection may be plain TCP, where the link counts as datacenter and the peer agrees.
    pub v1_plain: bool,
    /// Where v1 may be used.
    pub v1: V1Policy,
    /// v3's data connections may be plain TCP in datacenter mode (chunks stay signed).
    pub datacenter_plain: bool,
}

/// Bounds on what this agent takes of its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in flight of one migration: read from the VMM and not yet acknowledged.
    pub inflight: u64,
    /// Codec threads, shared by all migrations.
    pub workers: usize,
    /// Migrations at once, both directions together.
    pub migrations: usize,
    /// Anonymous memory that this agent may take, bytes: above it running migrations change to v1. `None` is no limit.
    pub memory: Option<u64>,
    /// Percent of ten seconds in which some task of this node waited for a processor: from there on running migrations change to v1. `None`
    /// is no limit.
    pub cpu_pressure: Option<u8>,
    /// Bytes a second that all migrations from this node may write to the network together; they share it fairly. `None` is no limit.
    pub bandwidth: Option<u64>,
}

/// How internet mode saves bytes beside compression: which layers this node uses as a source, and what it offers as a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hde {
    /// A page that is sent again and did not change is only named.
    pub unchanged: bool,
    /// A page with another page's content is a reference to it.
    pub dedup: bool,
    /// A page that is sent again is the lines that changed.
    pub delta: bool,
    /// As a destination: pages are written straight into the guest's RAM where that is shared.
    pub mapped: bool,
    /// Compressed chunks continue one another, where the peer has that too.
    pub lanes: bool,
}

impl Default for Hde {
    /// All of it.
    fn default() -> Self {
        Hde { unchanged: true, dedup: true, delta: true, mapped: true, lanes: true }
    }
}

/// The congestion control of data connections over links that are no datacenter's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Congestion {
    /// BBR where the kernel has it: a lost packet is no sign of a full link, and over long ones it is not.
    #[default]
    Bbr,
    /// What the system has for all connections.
    System,
}

impl Congestion {
    /// Its name for the kernel; `None` for the system's own.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Congestion::Bbr => Some("bbr"),
            Congestion::System => None,
        }
    }
}

/// What data connections of internet mode are made over. Everything else goes over TCP: the control connection, v1, and datacenter mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// QUIC where it was measured to carry clearly more.
    #[default]
    Auto,
    /// TCP; no UDP port is opened.
    Tcp,
    /// QUIC where the peer can have it and UDP gets through.
    Quic,
}

/// What the engine is built from.
#[derive(Debug)]
pub struct EngineConfig {
    /// This node's identity.
    pub key: Arc<NodeKey>,
    /// Whom it trusts.
    pub peers: Arc<dwcp_link::Peers>,
    /// Where journals and sockets live; mode 0700.
    pub state_dir: PathBuf,
    /// Local policy.
    pub policy: Policy,
    /// Local bounds.
    pub limits: Limits,
    /// What internet mode does.
    pub hde: Hde,
    /// Which links count as a datacenter's.
    pub bounds: Bounds,
    /// How data connections over other links find out what these carry.
    pub congestion: Congestion,
    /// What they are made over.
    pub transport: Transport,
    /// The flag's verdict, kept up to date.
    pub gate: watch::Receiver<Gate>,
    /// Where the sockets lie to which VMMs with multifd connect; made when it is needed. A VMM of another user has to be able to enter it.
    pub sockets: PathBuf,
    /// Whether this agent may attach to the VMMs' processes, which reading a guest's RAM directly takes.
    pub attach: bool,
    /// Whether precopy is to outlive this agent at the destination, which takes that, too.
    pub outlive: bool,
    /// Where the data listener binds; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// What `migrate --check` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Whether a migration would be started.
    pub ok: bool,
    /// What speaks against it.
    pub problems: Vec<Failure>,
    /// What the operator should know.
    pub notes: Vec<String>,
    /// The path and mode that would be used.
    pub path: Option<String>,
    /// The mode that would be used.
    pub mode: Option<String>,
    /// Why this mode.
    pub mode_reason: Option<String>,
    /// Round trip to the peer, milliseconds.
    pub rtt_ms: Option<f64>,
}
