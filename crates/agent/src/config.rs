//! The configuration file: plain data, wholly checked before anything is built from it.
//!
//! Every value is parsed into the type that the rest of the agent uses, so an error knows the line that it stands on
//! (see [`ConfigError`]), and nothing later has to doubt a value.

mod cpus;
mod error;
#[cfg(test)]
mod tests;
mod url;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dwcp_flags::Comeback;
use dwcp_flags::poll::MAX_LABELS;
use dwcp_migrate::{Congestion, Transport, V1Policy};
use dwcp_proto::mode::Bounds;
use dwcp_proto::{NodeName, units};
use dwcp_rpc::endpoint;
use serde::Deserialize;
use tracing_subscriber::EnvFilter;

pub(crate) use cpus::{Cpus, listed};
pub(crate) use error::ConfigError;
pub(crate) use url::Url;

/// Bytes of a configuration file: some hundred times what all keys take.
const MAX_FILE: u64 = 256 << 10;

/// Endpoints of one flag server.
const MAX_ENDPOINTS: usize = 8;

/// What stands before the URL of a server that speaks OFREP.
const OFREP: &str = "ofrep+";

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// This node's name; must be the one in its key file.
    pub(crate) node: NodeName,
    /// Journals and what else must outlive the agent.
    #[serde(default = "state_dir")]
    pub(crate) state_dir: Absolute,
    #[serde(default)]
    pub(crate) listen: Listen,
    #[serde(default)]
    pub(crate) identity: Identity,
    #[serde(default)]
    pub(crate) flags: Flags,
    #[serde(default)]
    pub(crate) policy: Policy,
    #[serde(default)]
    pub(crate) limits: Limits,
    #[serde(default)]
    pub(crate) hde: Hde,
    #[serde(default)]
    pub(crate) link: Link,
    #[serde(default)]
    pub(crate) vmm: Vmm,
    #[serde(default)]
    pub(crate) labels: Labels,
    #[serde(default)]
    pub(crate) log: Log,
}

impl Config {
    /// Reads and checks the file.
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(unreadable)?.len();
        if size > MAX_FILE {
            return Err(ConfigError::TooLong { path: path.to_owned(), size });
        }
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        Self::parse(path, &text)
    }

    /// Checks the text of a file; `path` is for error messages only.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::syntax(path, text, &error))
    }

    /// What is accepted but has no effect in this version: said at every start, never passed over.
    pub(crate) fn without_effect(&self) -> Vec<&'static str> {
        Vec::new()
    }
}

/// Where the agent listens. Port 0 takes a free port; `listen.json` in the state folder says which.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Listen {
    /// Other agents, over TCP and, at the UDP port of the same number, QUIC.
    pub(crate) data: SocketAddr,
    /// Orchestrator and dwcpctl.
    pub(crate) rpc: Socket,
    /// /metrics, /healthz, /readyz.
    pub(crate) metrics: SocketAddr,
}

impl Default for Listen {
    fn default() -> Self {
        Listen {
            data: SocketAddr::from(([0, 0, 0, 0], 7400)),
            rpc: Socket(PathBuf::from("/run/dwcp/agent.sock")),
            metrics: SocketAddr::from(([127, 0, 0, 1], 7401)),
        }
    }
}

/// Who the node is and whom it trusts.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Identity {
    /// `NODE.key` of `dwcpctl keygen`.
    pub(crate) key: Absolute,
    /// Folder of `NODE.pub`.
    pub(crate) peers: Absolute,
}

impl Default for Identity {
    fn default() -> Self {
        Identity { key: Absolute("/etc/dwcp/node.key".into()), peers: Absolute("/etc/dwcp/peers".into()) }
    }
}

/// Whether v3 may be used.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Flags {
    /// Where the flag comes from.
    pub(crate) source: FlagSource,
    /// The path where `source` is `none`.
    pub(crate) without: Without,
    /// The certificates that an `https` server's must come from (PEM).
    pub(crate) ca: Absolute,
    /// The flag server's own key, as `NAME.pub`; only what it signed is then obeyed.
    pub(crate) server_key: Option<Absolute>,
    /// A file with the bearer token for requests to the flag server.
    pub(crate) token_file: Option<Absolute>,
    /// For how long at least v3 must have been allowed without a break before running migrations return to it.
    pub(crate) return_after: Wait,
}

impl Default for Flags {
    fn default() -> Self {
        Flags {
            source: FlagSource::default(),
            without: Without::default(),
            ca: Absolute("/etc/ssl/certs/ca-certificates.crt".into()),
            server_key: None,
            token_file: None,
            return_after: Wait(Comeback::LEAST),
        }
    }
}

/// Where the flag comes from.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum FlagSource {
    /// Nowhere: `without` decides.
    #[default]
    None,
    /// A file that holds the flag document.
    File(PathBuf),
    /// Endpoints of one flag server.
    Server(Vec<Url>),
    /// Endpoints of one server that speaks OFREP and evaluates the flag itself.
    Ofrep(Vec<Url>),
}

impl TryFrom<String> for FlagSource {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.strip_prefix("file:") {
            _ if text == "none" => return Ok(FlagSource::None),
            Some(path) if Path::new(path).is_absolute() => return Ok(FlagSource::File(path.into())),
            None if text.contains("://") => {}
            _ => {
                return Err(format!(
                    "expected \"none\", \"file:/PATH\", \"http://...\" or \"ofrep+http://...\", found {text:?}"
                ));
            }
        }
        let endpoints: Vec<&str> = text.split(',').map(str::trim).collect();
        if endpoints.len() > MAX_ENDPOINTS {
            return Err(format!("expected at most {MAX_ENDPOINTS} endpoints, found {}", endpoints.len()));
        }
        let urls = |prefix: &str| -> Result<Vec<Url>, String> {
            endpoints.iter().map(|text| Url::try_from(text.strip_prefix(prefix).unwrap_or(text))).collect()
        };
        match endpoints.iter().filter(|text| text.starts_with(OFREP)).count() {
            0 => urls("").map(FlagSource::Server),
            all if all == endpoints.len() => urls(OFREP).map(FlagSource::Ofrep),
            _ => Err(format!("either all endpoints speak OFREP or none does, found {text:?}")),
        }
    }
}

impl std::fmt::Display for FlagSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |prefix: &str, urls: &[Url]| {
            urls.iter().map(|url| format!("{prefix}{url}")).collect::<Vec<_>>().join(", ")
        };
        match self {
            FlagSource::None => f.write_str("none"),
            FlagSource::File(path) => write!(f, "file:{}", path.display()),
            FlagSource::Server(urls) => f.write_str(&list("", urls)),
            FlagSource::Ofrep(urls) => f.write_str(&list(OFREP, urls)),
        }
    }
}

/// What the node says of itself to the flag server, such as its datacenter; both halves are names.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(try_from = "BTreeMap<String, String>")]
pub(crate) struct Labels(pub(crate) BTreeMap<String, String>);

impl TryFrom<BTreeMap<String, String>> for Labels {
    type Error = String;

    fn try_from(labels: BTreeMap<String, String>) -> Result<Self, String> {
        if labels.len() > MAX_LABELS {
            return Err(format!("expected at most {MAX_LABELS} labels, found {}", labels.len()));
        }
        let is_bad = |name: &&String| NodeName::new(name.as_str()).is_err();
        if let Some(name) = labels.keys().chain(labels.values()).find(is_bad) {
            return Err(format!("expected 1 to 64 characters of A-Z a-z 0-9 . _ -, found {name:?}"));
        }
        Ok(Labels(labels))
    }
}

/// The path of a node without a flag.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Without {
    /// v1 only, in both roles.
    #[default]
    V1,
    /// v3 wherever the peer agrees.
    V3,
}

/// What flags cannot change.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Policy {
    /// v1 may be plain TCP in a datacenter.
    pub(crate) v1_plain: bool,
    /// Where v1 may be used.
    pub(crate) v1: V1Policy,
    /// Whether v3's data connections are encrypted in datacenter mode.
    pub(crate) datacenter_encryption: Encryption,
}

/// How data connections are protected.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Encryption {
    /// TLS 1.3.
    #[default]
    Tls,
    /// Not at all; chunks stay signed.
    None,
}

/// What the agent may take of its machine.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Migrations at once, both directions together.
    pub(crate) migrations: Count<64>,
    /// CPUs that the agent spreads over, or is confined to; all that it is allowed where absent.
    pub(crate) cpus: Option<Cpus>,
    /// Codec threads, shared by all migrations; as many as `cpus` where absent.
    pub(crate) workers: Option<Count<256>>,
    /// Bytes of one migration that were read from the VMM and are not yet acknowledged.
    pub(crate) memory: Memory,
    /// Anonymous memory of the whole agent above which running migrations change to v1, which needs less.
    pub(crate) agent_memory: Option<Memory>,
    /// Percent of the last ten seconds in which some task of this node waited for a processor; from there on running migrations change to
    /// v1, which needs less.
    pub(crate) cpu_pressure: Option<Count<100>>,
    /// Bytes a second on the wire that one migration may take; a request can lower it, not raise it.
    pub(crate) bandwidth: Option<Rate>,
    /// Bytes a second on the wire that all migrations from this node may take together, in fair shares.
    pub(crate) node_bandwidth: Option<Rate>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            migrations: Count(4),
            cpus: None,
            workers: None,
            memory: Memory(64 << 20),
            agent_memory: None,
            cpu_pressure: None,
            bandwidth: None,
            node_bandwidth: None,
        }
    }
}

impl Limits {
    /// CPUs that the agent spreads over.
    pub(crate) fn cpus(&self) -> usize {
        let allowed = || std::thread::available_parallelism().map_or(1, usize::from);
        self.cpus.map_or_else(allowed, |cpus| cpus.count())
    }

    /// Codec threads.
    pub(crate) fn workers(&self) -> usize {
        self.workers.map_or_else(|| self.cpus(), |n| n.0)
    }
}

/// How internet mode saves bytes beside compression.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Hde {
    /// A page that is sent again and did not change is only named.
    pub(crate) unchanged: bool,
    /// A page with another page's content is a reference to it.
    pub(crate) dedup: bool,
    /// A page that is sent again is the lines that changed.
    pub(crate) delta: bool,
    /// As a destination: pages are written straight into the guest's RAM where that is shared.
    pub(crate) mapped: bool,
    /// Compressed chunks continue one another, where the peer has that too.
    pub(crate) lanes: bool,
}

impl Default for Hde {
    fn default() -> Self {
        Hde { unchanged: true, dedup: true, delta: true, mapped: true, lanes: true }
    }
}

/// What is made of links between nodes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Link {
    /// A link of a shorter round trip may be a datacenter's.
    pub(crate) datacenter_rtt: Trip,
    /// One that carries as much may be one: its nominal rate.
    pub(crate) datacenter_rate: Rate,
    /// The congestion control of data connections over other links.
    pub(crate) congestion: Congestion,
    /// What those are made over.
    pub(crate) transport: Transport,
}

impl Default for Link {
    fn default() -> Self {
        let Bounds { rtt, rate } = Bounds::default();
        Link {
            datacenter_rtt: Trip(rtt),
            datacenter_rate: Rate(NonZeroU64::new(rate).unwrap_or(NonZeroU64::MIN)),
            congestion: Congestion::default(),
            transport: Transport::default(),
        }
    }
}

/// What the agent may touch of the VMMs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Vmm {
    /// Whether the agent may attach to QEMU's process.
    pub(crate) attach: Attach,
    /// Whether it does so that precopy outlives this agent at the destination. Then all pages go through the VMM's socket.
    pub(crate) outlive: bool,
    /// Folders in which QMP and relay sockets must lie; any absolute path where empty.
    pub(crate) paths: Vec<Absolute>,
    /// Where the sockets lie to which QEMU connects for multifd; `sockets` in the state folder where absent.
    pub(crate) sockets: Option<Absolute>,
}

impl Default for Vmm {
    fn default() -> Self {
        Vmm { attach: Attach::None, outlive: true, paths: Vec::new(), sockets: None }
    }
}

/// Whether the agent may attach to QEMU's process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Attach {
    /// Never.
    #[default]
    None,
    /// With ptrace.
    Ptrace,
}

/// What is logged, to standard error.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Log {
    /// How a line looks.
    pub(crate) format: LogFormat,
    /// From which level on.
    pub(crate) level: Level,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// A level (`info`), or several by module (`info,dwcp_link=debug`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Level(pub(crate) String);

impl Default for Level {
    fn default() -> Self {
        Level("info".to_owned())
    }
}

impl TryFrom<String> for Level {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // A bare word that is no level would be taken for a module, and silence everything else.
        let bare = !text.contains(['=', ',']);
        if (bare && text.parse::<tracing::level_filters::LevelFilter>().is_err())
            || EnvFilter::try_new(&text).is_err()
        {
            return Err(format!(
                "expected error, warn, info, debug or trace, or a list such as info,dwcp_link=debug; found {text:?}"
            ));
        }
        Ok(Level(text))
    }
}

/// An absolute path: a service has no folder of its own to start from.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "PathBuf")]
pub(crate) struct Absolute(pub(crate) PathBuf);

impl TryFrom<PathBuf> for Absolute {
    type Error = String;

    fn try_from(path: PathBuf) -> Result<Self, String> {
        match path.is_absolute() {
            true => Ok(Absolute(path)),
            false => Err(format!("expected an absolute path, found {path:?}")),
        }
    }
}

/// The path of a unix socket, written `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Socket(pub(crate) PathBuf);

impl TryFrom<String> for Socket {
    type Error = endpoint::BadEndpoint;

    fn try_from(text: String) -> Result<Self, endpoint::BadEndpoint> {
        endpoint::parse(&text).map(Socket)
    }
}

/// A number from 1 to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "u64")]
pub(crate) struct Count<const MAX: usize>(pub(crate) usize);

impl<const MAX: usize> TryFrom<u64> for Count<MAX> {
    type Error = String;

    fn try_from(number: u64) -> Result<Self, String> {
        match usize::try_from(number) {
            Ok(n) if (1..=MAX).contains(&n) => Ok(Count(n)),
            _ => Err(format!("expected a number from 1 to {MAX}, found {number}")),
        }
    }
}

/// Bytes of memory.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Memory(pub(crate) u64);

impl TryFrom<String> for Memory {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // Below, a few chunks of 1 MiB would fill it; above, it no longer bounds anything.
        match units::parse_size(&text).map_err(|e| e.to_string())? {
            bytes if (8 << 20..=4 << 30).contains(&bytes) => Ok(Memory(bytes)),
            _ => Err(format!("expected a size from 8MiB to 4GiB, found {text:?}")),
        }
    }
}

/// A time from a second to a day.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Wait(pub(crate) Duration);

impl TryFrom<String> for Wait {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match units::parse_duration(&text).map_err(|e| e.to_string())? {
            time if (Duration::from_secs(1)..=Duration::from_secs(86_400)).contains(&time) => Ok(Wait(time)),
            _ => Err(format!("expected a time from 1s to 86400s, found {text:?}")),
        }
    }
}

/// A round trip, up to a second.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Trip(pub(crate) Duration);

impl TryFrom<String> for Trip {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match units::parse_duration(&text).map_err(|e| e.to_string())? {
            time if time <= Duration::from_secs(1) && !time.is_zero() => Ok(Trip(time)),
            _ => Err(format!("expected a time above 0 and up to 1s, found {text:?}")),
        }
    }
}

/// Bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Rate(pub(crate) NonZeroU64);

impl TryFrom<String> for Rate {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let rate = units::parse_rate(&text).map_err(|e| e.to_string())?;
        NonZeroU64::new(rate).map(Rate).ok_or_else(|| "expected a rate above zero".to_owned())
    }
}

fn state_dir() -> Absolute {
    Absolute("/var/lib/dwcp".into())
}
