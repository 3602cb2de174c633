//! What the engine is built from: plain data, already validated.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use dwcp_proto::NodeKey;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::error::Failure;

/// Whether v3 may be used now, and why; the flag source keeps it up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// The flag and its lease allow v3 for this node as a source.
    pub source: bool,
    /// This node vetoes v3 as a destination: excluded, or it sees the flag off.
    pub veto: bool,
    /// The reason, as `dwcp-flags` words it.
    pub reason: String,
    /// The flag document's epoch: incarnation and counter.
    pub epoch: (u64, u64),
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
    /// The flag's verdict, kept up to date.
    pub gate: watch::Receiver<Gate>,
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
    /// Round trip to the peer, milliseconds.
    pub rtt_ms: Option<f64>,
}
