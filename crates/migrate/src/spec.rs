//! What an orchestrator asks for: plain data, already validated.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use dwcp_proto::{MigrationId, NodeName, VmName};
use serde::{Deserialize, Serialize};

/// How the agent reaches the VM's hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Vmm {
    /// QEMU, driven by the agent through this QMP socket.
    Qmp(PathBuf),
    /// A VMM that someone else drives; its migration socket only. The agent relays opaque bytes and
    /// does not own the handover.
    Relay(PathBuf),
}

/// What becomes of a VMM process that is no longer needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Leave {
    /// It stays as it is.
    #[default]
    Leave,
    /// The agent tells it to quit.
    Quit,
}

/// Which path the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathWish {
    /// v3 where flag, policy and peer allow it, else v1 with the reason.
    #[default]
    Auto,
    /// v1; always obeyed unless `[policy] v1` bars it.
    V1,
    /// v3 or an error.
    V3,
}

/// Which mode of v3 the caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeWish {
    /// From the measured link.
    #[default]
    Auto,
    /// Fewest bytes.
    Internet,
    /// Most bytes a second.
    Datacenter,
}

/// Where the guest's pages are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceWish {
    /// The best that this VM allows.
    #[default]
    Auto,
    /// From RAM in a shared file.
    Direct,
    /// From QEMU's migration stream.
    Stream,
}

/// Over how many connections QEMU gives its stream to the agent at the source: 1, or 2 to 16 with multifd, beside its main channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Channels(u8);

impl Channels {
    /// The main channel alone.
    pub const ONE: Channels = Channels(1);

    /// The number.
    pub fn count(self) -> u8 {
        self.0
    }

    /// Whether multifd is used.
    pub fn is_multifd(self) -> bool {
        self.0 > 1
    }
}

impl Default for Channels {
    fn default() -> Self {
        Channels::ONE
    }
}

impl TryFrom<u8> for Channels {
    type Error = BadChannels;

    fn try_from(count: u8) -> Result<Self, BadChannels> {
        match count {
            1..=MAX_CHANNELS => Ok(Channels(count)),
            _ => Err(BadChannels),
        }
    }
}

impl From<Channels> for u8 {
    fn from(channels: Channels) -> u8 {
        channels.0
    }
}

const MAX_CHANNELS: u8 = dwcp_vmm::multifd::MAX_CHANNELS as u8;

/// A number of channels that is not possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("1, or 2 to {MAX_CHANNELS} for QEMU's multifd")]
pub struct BadChannels;

/// Prepares this node to receive a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IncomingSpec {
    /// The VM, by the same name as at the source.
    pub vm: VmName,
    /// Its waiting VMM.
    pub vmm: Vmm,
    /// The only node it may come from.
    pub from: NodeName,
    /// What becomes of the waiting VMM if the migration is aborted.
    pub on_abort: Leave,
    /// How often the VM is waited for again after an abort, each time with a fresh VMM at the same QMP socket.
    pub retry: u32,
}

/// Further attempts that may be asked for.
pub const MAX_RETRIES: u32 = crate::journal::MAX_ATTEMPTS - 1;

/// Moves a VM to another node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrateSpec {
    /// The VM.
    pub vm: VmName,
    /// Its running VMM.
    pub vmm: Vmm,
    /// The destination node, whose key must be in the peers folder.
    pub to: NodeName,
    /// The data address of the destination's agent.
    pub addr: SocketAddr,
    /// The path wished for.
    pub path: PathWish,
    /// The mode wished for.
    pub mode: ModeWish,
    /// The longest pause of the guest that the caller accepts, as a user would measure it.
    pub downtime_limit: Duration,
    /// Upper bound on bytes a second on the wire, if any.
    pub bandwidth_limit: Option<u64>,
    /// Number of data connections; `None` lets the agent choose.
    pub streams: Option<u16>,
    /// How QEMU gives its stream to the agent.
    #[serde(default)]
    pub channels: Channels,
    /// Where pages are read.
    pub source: SourceWish,
    /// Compare all RAM at both ends while both guests are paused; adds to the downtime.
    pub verify_ram: bool,
    /// The guest's writable disks are reachable from both nodes.
    pub shared_storage: bool,
    /// What becomes of the source's VMM after success.
    pub on_success: Leave,
    /// What becomes of the source's VMM after an abort: `Leave` resumes the guest and leaves it running.
    pub on_abort: Leave,
    /// Give up, with the guest at the source, when the migration has not committed after this long.
    pub deadline: Option<Duration>,
    /// Further attempts after one that ended before the commit because of an agent's death, the link, or the
    /// destination's VMM; at most [`MAX_RETRIES`].
    pub retry: u32,
    /// The migration's id; made by the agent when absent.
    pub id: Option<MigrationId>,
}

/// The downtime limit where the caller names none: QEMU's own default.
pub const DEFAULT_DOWNTIME: Duration = Duration::from_millis(300);
