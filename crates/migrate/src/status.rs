//! What a migration says of itself: one serialisable snapshot, for RPC, `--json` and the journal alike.

use dwcp_proto::{MigrationId, NodeName, VmName};
use serde::{Deserialize, Serialize};

use crate::error::Failure;

/// Which end of a migration this agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The guest leaves this node.
    Source,
    /// The guest comes to this node.
    Destination,
}

/// Where a migration stands. The order is the order of time; the last three are ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checks, and at the destination the wait for the source.
    Preparing,
    /// Connecting and negotiating.
    Connecting,
    /// Memory moves while the guest runs.
    Precopy,
    /// The guest is stopped at the source; the rest moves.
    Switchover,
    /// All is delivered; the two agents agree on who owns the guest.
    Handover,
    /// Nobody but the peer or an operator can say who owns the guest: see `dwcpctl explain`.
    InDoubt,
    /// The guest runs (or stays paused, as it was) at the destination.
    Completed,
    /// The guest is at the source, as it was.
    Aborted,
    /// The migration ended badly; `error` says what became of the guest.
    Failed,
}

impl Phase {
    /// Whether nothing further will happen by itself.
    pub fn is_end(self) -> bool {
        matches!(self, Phase::Completed | Phase::Aborted | Phase::Failed)
    }
}

/// How far precopy is. All figures are of the running migration.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// 0 to 1, never falling.
    pub fraction: f64,
    /// Guest memory still to send in this round, bytes, as the VMM reports it.
    pub remaining_bytes: u64,
    /// Bytes a second on the wire over the last second.
    pub wire_rate: f64,
    /// Seconds to the switchover as it looks now; absent while it does not converge.
    pub eta_seconds: Option<f64>,
    /// Memory that the guest dirties, bytes a second, as the VMM reports it.
    pub dirty_rate: Option<f64>,
}

/// What a layer of HDE made of its share, at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// `zero`, `unchanged`, `dedup`, `delta`, `whole`; then what becomes of these chunk by chunk: `compressed`, `raw`.
    pub layer: String,
    /// Pages; 0 for the last two.
    pub pages: u64,
    /// Bytes before it.
    pub before_bytes: u64,
    /// Bytes that it leaves.
    pub after_bytes: u64,
}

/// A snapshot of one migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its id.
    pub id: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// Which end this is.
    pub role: Role,
    /// The other node.
    pub peer: NodeName,
    /// Where it stands.
    pub phase: Phase,
    /// `completed`, `aborted`, `failed`, or the phase while it runs.
    pub status: String,
    /// `v1` or `v3`; absent before it is negotiated.
    pub path: Option<String>,
    /// `internet` or `datacenter`; absent on v1.
    pub mode: Option<String>,
    /// Why this mode; absent on v1.
    #[serde(default)]
    pub mode_reason: Option<String>,
    /// Times that the mode of v3 changed in mid-migration.
    #[serde(default)]
    pub mode_switches: u32,
    /// Where pages are read: `stream`, `opaque`.
    pub source: Option<String>,
    /// Connections over which the VMM gives its stream: 1, or with multifd so many beside its main channel. Absent at the destination.
    #[serde(default)]
    pub channels: Option<u8>,
    /// Where pages are written: `stream`, `opaque`.
    pub sink: Option<String>,
    /// `tls` or `none`: how the data connections are protected.
    pub encryption: Option<String>,
    /// `quic` or `tcp`: what the data connections are made over; absent before it is negotiated.
    #[serde(default)]
    pub transport: Option<String>,
    /// Why; absent where the source is older.
    #[serde(default)]
    pub transport_reason: Option<String>,
    /// Times that the path changed in mid-migration.
    pub path_switches: u32,
    /// Why something simpler than wished for is used, one entry each.
    pub fallback_reasons: Vec<String>,
    /// Seconds from the start to now or the end.
    pub total_seconds: f64,
    /// Milliseconds that the guest stood still, as this agent can bound it.
    pub downtime_ms: Option<f64>,
    /// How `downtime_ms` was measured.
    pub downtime_method: Option<String>,
    /// Bytes of the VMM's stream carried so far.
    pub raw_bytes: u64,
    /// Bytes given to the network so far, retransmissions included.
    pub wire_bytes: u64,
    /// `1 - wire_bytes / guest memory carried`, where a zero page counts as its full size; 0 to 1.
    pub saved_ratio: f64,
    /// Guest memory carried so far, bytes, zero pages at their full size.
    pub guest_bytes: u64,
    /// Rounds over RAM begun so far.
    pub rounds: u64,
    /// Chunks sent (source) or applied (destination), once each.
    pub chunks: u64,
    /// Chunks sent again.
    pub retransmitted_chunks: u64,
    /// Connections made again after a loss.
    pub reconnects: u64,
    /// Which attempt at this migration, counted from 1.
    pub attempt: u32,
    /// Highest sampled anonymous memory (RssAnon) of this agent during the migration, bytes.
    pub agent_peak_anon_bytes: u64,
    /// What the layers of HDE did; empty at the destination, and without v3.
    #[serde(default)]
    pub layers: Vec<LayerStatus>,
    /// How far it is.
    pub progress: Progress,
    /// Why it ended badly, if it did.
    pub error: Option<Failure>,
}

/// One line of a migration's story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// When, by this node's clock, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What: a decision's or phase's stable name.
    pub what: String,
    /// More, for people; may be empty.
    pub text: String,
}

/// What is known of a migration's course, here and at its other end.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    /// One for each side that this node was; at least one.
    pub sides: Vec<Explanation>,
    /// The other sides, as their agents tell them.
    pub peers: Vec<Explanation>,
    /// Why another side is missing.
    pub unheard: Vec<Failure>,
}

/// A migration's story, as one side's journal tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The migration.
    pub id: MigrationId,
    /// The VM; `None` where the journal is damaged from its beginning.
    pub vm: Option<VmName>,
    /// Which side this node was.
    pub role: Role,
    /// The other node, likewise.
    pub peer: Option<NodeName>,
    /// The last decision's stable name.
    pub phase: String,
    /// Who owns the guest: `source`, `destination`, `in_doubt` or `nobody`.
    pub owner: String,
    /// Why it ended without moving the guest, if it did.
    pub cause: Option<Failure>,
    /// The next command, or what to wait for.
    pub next: String,
    /// What happened, in order.
    pub timeline: Vec<Moment>,
    /// The status, if this agent's life has one.
    pub status: Option<Status>,
}
