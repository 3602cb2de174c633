//! The command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use dwcp_proto::{MigrationId, NodeName, VmName, units};
use dwcp_rpc::{endpoint, v1};

/// Operate the DWCP node agent: move running VMs between hypervisors.
#[derive(Debug, Parser)]
#[command(name = "dwcpctl", version, after_help = EXIT_STATUS, max_term_width = 110)]
pub(crate) struct Args {
    /// Where the agent listens, as unix:PATH.
    #[arg(long, global = true, env = "DWCP_AGENT", default_value = endpoint::DEFAULT, value_parser = endpoint::parse)]
    pub(crate) agent: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_STATUS: &str = "\
Exit status:
  0  done; for `migrate`: the guest runs at the destination (or stays paused there, as it was); for `resolve`: your
     decision was taken
  1  it failed or was aborted; the message says where the guest is
  2  the command line or the request is wrong
  3  the agent cannot be reached
  4  in doubt: who owns the guest is not known here yet; do not start the guest by hand";

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make the key pair of a node: NAME.key (keep it there) and NAME.pub (give it to its peers).
    Keygen(KeygenArgs),
    /// At the destination: have the agent receive a VM whose VMM waits for a migration.
    Incoming(IncomingArgs),
    /// At the source: move a VM to another node, and wait for the end.
    Migrate(Box<MigrateArgs>),
    /// At the source: predict time, downtime and bytes of a migration, and whether it converges; moves nothing.
    Estimate(EstimateArgs),
    /// Show one migration, or the agent itself.
    Status(StatusArgs),
    /// List the migrations that the agent knows.
    List(ListArgs),
    /// Abort a migration; the guest goes on at the source.
    Cancel(CancelArgs),
    /// Change the path of a running migration; ask at its source.
    Switch(SwitchArgs),
    /// Tell what happened in a migration, who owns the guest, and what to do next; after a restart of the agent too.
    Explain(ExplainArgs),
    /// Decide where the guest runs when the agents cannot: the link is gone for good, or a VMM refuses.
    Resolve(ResolveArgs),
    /// Show the flag as this node sees it: path, reason, bucket, epoch, age, lease, endpoint, last error.
    Flags(FlagsArgs),
    /// Keep the inventory of the control plane.
    Nodes(crate::nodes::NodesArgs),
}

impl Command {
    /// Whether the caller wants JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Command::Keygen(_) => false,
            Command::Incoming(args) => args.json,
            Command::Migrate(args) => args.json,
            Command::Estimate(args) => args.json,
            Command::Status(args) => args.json,
            Command::List(args) => args.json,
            Command::Cancel(args) => args.json,
            Command::Switch(args) => args.json,
            Command::Explain(args) => args.json,
            Command::Resolve(args) => args.json,
            Command::Flags(args) => args.json,
            Command::Nodes(args) => args.json,
        }
    }
}

/// Arguments of `keygen`.
#[derive(Debug, clap::Args)]
pub(crate) struct KeygenArgs {
    /// The node's name.
    #[arg(long)]
    pub(crate) node: NodeName,
    /// The folder for both files; existing files are never replaced.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
}

/// Which VMM, and how to reach it.
#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("vmm").required(true).args(["qmp", "relay"]))]
pub(crate) struct VmmArgs {
    /// A QMP unix socket of QEMU that nobody else uses; the agent drives QEMU through it.
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    pub(crate) qmp: Option<PathBuf>,
    /// In place of --qmp: the migration socket of a VMM that someone else drives (libvirt, KubeVirt, Cloud Hypervisor).
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    pub(crate) relay: Option<PathBuf>,
    /// The file behind the guest's RAM, where it is plain and file-backed.
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    pub(crate) memory_file: Option<PathBuf>,
}

impl VmmArgs {
    /// The VMM as the request has it.
    pub(crate) fn request(&self) -> Option<v1::Vmm> {
        use v1::vmm::Kind;
        let qmp = self.qmp.as_deref().map(|path| Kind::QmpPath(text(path)));
        let relay = self.relay.as_deref().map(|path| Kind::RelayPath(text(path)));
        Some(v1::Vmm { kind: qmp.or(relay) })
    }

    /// The memory file as the request has it: empty for none.
    pub(crate) fn memory_file(&self) -> String {
        self.memory_file.as_deref().map(text).unwrap_or_default()
    }
}

/// Arguments of `incoming`.
#[derive(Debug, clap::Args)]
pub(crate) struct IncomingArgs {
    /// The VM's name, the same at both nodes.
    pub(crate) vm: VmName,
    #[command(flatten)]
    pub(crate) vmm: VmmArgs,
    /// The only node that it may come from; its NODE.pub must be in the peers folder.
    #[arg(long, value_name = "NODE")]
    pub(crate) from: NodeName,
    /// What becomes of the waiting VMM if the migration is aborted.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) on_abort: Leave,
    /// Wait for the VM again after an abort, up to N times, with the fresh VMM that is then behind the same socket.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=15))]
    pub(crate) retry: u32,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// From where to where, and how: what `migrate` and `estimate` share.
#[derive(Debug, clap::Args)]
pub(crate) struct JourneyArgs {
    /// The VM's name, the same at both nodes.
    pub(crate) vm: VmName,
    #[command(flatten)]
    pub(crate) vmm: VmmArgs,
    /// The destination node and the data address of its agent.
    #[arg(long, value_name = "NODE=IP:PORT")]
    pub(crate) to: Target,
    /// The path; auto takes v3 where flag, policy and peer allow it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) path: PathChoice,
    /// The mode of v3; auto measures the link.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) mode: Mode,
    /// The longest pause of the guest that is accepted.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = downtime)]
    pub(crate) downtime_limit: u32,
    /// Upper bound on the wire, such as 200Mbit or 25MB (a second).
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    pub(crate) bandwidth_limit: Option<u64>,
    /// Number of data connections; the agent chooses where absent.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) streams: Option<u16>,
    /// The guest's writable disks are reachable from both nodes.
    #[arg(long)]
    pub(crate) shared_storage: bool,
}

impl JourneyArgs {
    /// The request, as far as these say it.
    pub(crate) fn spec(&self) -> v1::MigrateSpec {
        v1::MigrateSpec {
            vm: self.vm.to_string(),
            vmm: self.vmm.request(),
            to: self.to.node.to_string(),
            to_address: self.to.address.to_string(),
            path: v1::PathWish::from(self.path).into(),
            mode: v1::ModeWish::from(self.mode).into(),
            downtime_limit_ms: self.downtime_limit,
            bandwidth_limit_bytes: self.bandwidth_limit.unwrap_or(0),
            streams: self.streams.map_or(0, u32::from),
            shared_storage: self.shared_storage,
            memory_file: self.vmm.memory_file(),
            ..v1::MigrateSpec::default()
        }
    }
}

/// Arguments of `migrate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Ctrl-C asks the agent to abort the migration and waits for that; a second Ctrl-C leaves at once. Neither harms the
guest. Once the handover has begun the migration cannot be aborted any more: it ends by itself within moments.")]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) journey: JourneyArgs,
    /// Where the guest's pages are read: in QEMU's stream (auto, too), or direct by the agent, from RAM in a named shared file.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) source: Source,
    /// Over how many connections QEMU gives its memory to the agent: 1, or 2 to 16 for its multifd.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) channels: u32,
    /// Compare all RAM at both ends while both guests are paused (adds to the downtime).
    #[arg(long)]
    pub(crate) verify_ram: bool,
    /// What becomes of the source's VMM after success.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) on_success: Leave,
    /// What becomes of the source's VMM after an abort; leave resumes the guest.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) on_abort: Leave,
    /// Abort when the migration has not ended after this long.
    #[arg(long, value_name = "TIME", value_parser = units::parse_duration)]
    pub(crate) deadline: Option<Duration>,
    /// Further attempts after one that ended before the commit because of an agent's death, the link or the destination's
    /// VMM. Each needs a fresh VMM at the destination, which waits again if it was told so: incoming --retry.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=15))]
    pub(crate) retry: u32,
    /// The migration's id; a second call with the same id joins the first, it starts nothing.
    #[arg(long)]
    pub(crate) id: Option<MigrationId>,
    /// Only say what would be done and what speaks against it.
    #[arg(long, conflicts_with = "detach")]
    pub(crate) check: bool,
    /// Print the id and leave once the migration is registered.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Print one JSON object a line; the last one is the result.
    #[arg(long)]
    pub(crate) json: bool,
}

impl MigrateArgs {
    /// The request.
    pub(crate) fn spec(&self) -> v1::MigrateSpec {
        v1::MigrateSpec {
            source: v1::SourceWish::from(self.source).into(),
            channels: self.channels,
            verify_ram: self.verify_ram,
            on_success: v1::Leave::from(self.on_success).into(),
            on_abort: v1::Leave::from(self.on_abort).into(),
            deadline_ms: self.deadline.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX).max(1)),
            id: self.id.as_ref().map(ToString::to_string).unwrap_or_default(),
            retry: self.retry,
            ..self.journey.spec()
        }
    }
}

/// Arguments of `estimate`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The VM need not be awaited at the destination yet. Takes some ten seconds: it looks at a sample of the guest's memory three times, and probes the link for three seconds, as the
migration would use it. Exit status 1 where the migration would not converge, or would not be started.")]
pub(crate) struct EstimateArgs {
    #[command(flatten)]
    pub(crate) journey: JourneyArgs,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
pub(crate) struct StatusArgs {
    /// The migration; the agent itself where absent.
    pub(crate) id: Option<MigrationId>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `list`.
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Print one JSON object a line.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `cancel`.
#[derive(Debug, clap::Args)]
pub(crate) struct CancelArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `flags`.
#[derive(Debug, clap::Args)]
pub(crate) struct FlagsArgs {
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `switch`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Nothing is lost: the data goes on from the exact byte that the destination has applied. On v1 the migration then stays; on v3 for as
long as the flag, the peer and this node allow it. Watch it with `status`.")]
pub(crate) struct SwitchArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// The path to take.
    #[arg(long, value_enum)]
    pub(crate) path: PathName,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A path by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PathName {
    /// One connection, the VMM's bytes as they are.
    V1,
    /// Chunks: hashed, signed, verified.
    V3,
}

impl SwitchArgs {
    /// The request.
    pub(crate) fn request(&self) -> v1::SwitchRequest {
        let path = match self.path {
            PathName::V1 => v1::PathWish::V1,
            PathName::V3 => v1::PathWish::V3,
        };
        v1::SwitchRequest { id: self.id.to_string(), path: path.into() }
    }
}

/// Arguments of `explain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each node tells its own side, from its journal, and asks the other node for its side. Times are in UTC, by the clock of the
node that tells.")]
pub(crate) struct ExplainArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Arguments of `resolve`.
#[derive(Debug, clap::Args)]
#[command(
    group = ArgGroup::new("decision").required(true).args(["start_here", "leave_to_peer"]),
    after_help = "\
Says first what the decision would do here. On a terminal it then asks for the word yes; elsewhere, and with --json,
nothing is done without --yes, and the exit status is 2. Where the link to the peer can be restored, do that instead: the
agents then end the doubt by themselves, and without risk."
)]
pub(crate) struct ResolveArgs {
    /// The migration.
    pub(crate) id: MigrationId,
    /// The guest runs on this node.
    #[arg(long)]
    pub(crate) start_here: bool,
    /// Your word that the peer's VMM has ended and stays so. If it has not, two copies of the guest run and its disks
    /// are lost.
    #[arg(long, requires = "start_here", conflicts_with = "leave_to_peer")]
    pub(crate) peer_fenced: bool,
    /// This node never runs the guest, whatever the peer does.
    #[arg(long)]
    pub(crate) leave_to_peer: bool,
    /// Do it without asking.
    #[arg(long)]
    pub(crate) yes: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

impl ResolveArgs {
    /// The request: to do it, or to say what it would do.
    pub(crate) fn request(&self, act: bool) -> v1::ResolveRequest {
        let decision = match self.start_here {
            true => v1::Decision::StartHere,
            false => v1::Decision::LeaveToPeer,
        };
        v1::ResolveRequest {
            id: self.id.to_string(),
            decision: decision.into(),
            peer_fenced: self.peer_fenced,
            act,
        }
    }
}

/// A node and where its agent listens: `NODE=IP:PORT`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Target {
    pub(crate) node: NodeName,
    pub(crate) address: SocketAddr,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (node, address) =
            text.split_once('=').ok_or("expected NODE=IP:PORT, such as hv-02=192.0.2.2:7400")?;
        let node = node.parse().map_err(|e: dwcp_proto::BadName| e.to_string())?;
        let address = address.parse().map_err(|_| {
            format!("expected IP:PORT after {node}=, such as 192.0.2.2:7400 or [2001:db8::2]:7400; found {address:?}")
        })?;
        Ok(Target { node, address })
    }
}

/// Defines a choice of the command line and the value that it has in a request.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident => $wire:ident { $($(#[$vdoc:meta])* $variant:ident => $to:ident,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Default, ValueEnum)]
        pub(crate) enum $name { $($(#[$vdoc])* $variant,)+ }

        impl From<$name> for v1::$wire {
            fn from(choice: $name) -> Self {
                match choice { $($name::$variant => v1::$wire::$to,)+ }
            }
        }
    };
}

choice!(
    /// What becomes of a VMM that is no longer needed.
    Leave => Leave {
        /// It stays as it is.
        #[default]
        Leave => AsIs,
        /// It is told to quit.
        Quit => Quit,
    }
);
choice!(
    /// Which path.
    PathChoice => PathWish {
        /// v3 where it is allowed, else v1 with the reason.
        #[default]
        Auto => Auto,
        /// v1.
        V1 => V1,
        /// v3 or an error.
        V3 => V3,
    }
);
choice!(
    /// Which mode.
    Mode => ModeWish {
        /// From the measured link.
        #[default]
        Auto => Auto,
        /// Fewest bytes.
        Internet => Internet,
        /// Most bytes a second.
        Datacenter => Datacenter,
    }
);
choice!(
    /// Where pages are read.
    Source => SourceWish {
        /// The best that this VM allows.
        #[default]
        Auto => Auto,
        /// From RAM in a shared file.
        Direct => Direct,
        /// From QEMU's migration stream.
        Stream => Stream,
    }
);

/// The agent has a folder of its own: a relative path would mean another file there.
fn absolute(text: &str) -> Result<PathBuf, String> {
    std::path::absolute(text).map_err(|e| e.to_string())
}

fn downtime(text: &str) -> Result<u32, String> {
    let limit = units::parse_duration(text).map_err(|e| e.to_string())?;
    u32::try_from(limit.as_millis())
        .ok()
        .filter(|ms| *ms > 0)
        .ok_or_else(|| "expected at least 1ms and less than a month".to_owned())
}

/// A path in a request; the gRPC contract has text only.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    fn spec(line: &str) -> v1::MigrateSpec {
        match parse(line).unwrap().command {
            Command::Migrate(args) => args.spec(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_short_command_asks_for_the_defaults() {
        let spec = spec("dwcpctl migrate web-1 --qmp /run/web-1.qmp --to hv-02=192.0.2.2:7400");
        assert_eq!(
            (spec.vm.as_str(), spec.to.as_str(), spec.to_address.as_str()),
            ("web-1", "hv-02", "192.0.2.2:7400")
        );
        assert_eq!(spec.vmm.unwrap().kind, Some(v1::vmm::Kind::QmpPath("/run/web-1.qmp".to_owned())));
        assert_eq!(
            (spec.downtime_limit_ms, spec.bandwidth_limit_bytes, spec.streams, spec.deadline_ms),
            (300, 0, 0, 0)
        );
        assert_eq!((spec.path, spec.mode, spec.source, spec.on_success, spec.on_abort), (0, 0, 0, 0, 0));
        assert_eq!(spec.channels, 1);
        assert!(
            spec.id.is_empty() && spec.memory_file.is_empty() && !spec.verify_ram && !spec.shared_storage
        );
    }

    #[test]
    fn every_flag_reaches_the_request() {
        let spec = spec(
            "dwcpctl --agent unix:/tmp/a.sock migrate web-1 --relay /run/m.sock --to hv-02=[::1]:7400 --path v3 \
             --mode datacenter --downtime-limit 1.5s --bandwidth-limit 200Mbit --streams 4 --channels 2 --source direct --verify-ram \
             --shared-storage --on-success quit --on-abort quit --deadline 5min --id m-1 --memory-file /dev/shm/ram --json",
        );
        assert_eq!(spec.vmm.clone().unwrap().kind, Some(v1::vmm::Kind::RelayPath("/run/m.sock".to_owned())));
        assert_eq!(
            (spec.path(), spec.mode(), spec.source()),
            (v1::PathWish::V3, v1::ModeWish::Datacenter, v1::SourceWish::Direct)
        );
        assert_eq!(
            (spec.downtime_limit_ms, spec.bandwidth_limit_bytes, spec.streams, spec.deadline_ms),
            (1500, 25_000_000, 4, 300_000)
        );
        assert_eq!(spec.channels, 2);
        assert_eq!((spec.on_success(), spec.on_abort()), (v1::Leave::Quit, v1::Leave::Quit));
        assert!(spec.verify_ram && spec.shared_storage);
        assert_eq!((spec.id.as_str(), spec.memory_file.as_str()), ("m-1", "/dev/shm/ram"));
    }

    #[test]
    fn a_decision_reaches_the_request_as_it_was_said() {
        use v1::Decision::{LeaveToPeer, StartHere};
        for (line, decision, peer_fenced, yes) in [
            ("dwcpctl resolve m-1 --start-here", StartHere, false, false),
            ("dwcpctl resolve m-1 --start-here --peer-fenced --yes", StartHere, true, true),
            ("dwcpctl resolve m-1 --leave-to-peer --json", LeaveToPeer, false, false),
        ] {
            let Command::Resolve(args) = parse(line).unwrap().command else { panic!("{line}") };
            let request = args.request(true);
            assert_eq!((request.id.as_str(), request.act), ("m-1", true), "{line}");
            assert_eq!((request.decision(), request.peer_fenced), (decision, peer_fenced), "{line}");
            assert_eq!((args.yes, args.json), (yes, line.ends_with("--json")), "{line}");
            assert!(!args.request(false).act);
        }
    }

    #[test]
    fn a_wrong_command_line_is_refused_with_what_was_expected() {
        const GOOD: &str = "dwcpctl migrate web-1 --qmp /q --to hv-02=192.0.2.2:7400";
        for (line, expected) in [
            ("dwcpctl migrate web-1 --to hv-02=192.0.2.2:7400".to_owned(), "--qmp"),
            (format!("{GOOD} --relay /r"), "cannot be used with"),
            ("dwcpctl migrate a/b --qmp /q --to hv-02=192.0.2.2:7400".to_owned(), "1 to 64 characters"),
            ("dwcpctl migrate web-1 --qmp /q --to 192.0.2.2:7400".to_owned(), "NODE=IP:PORT"),
            ("dwcpctl migrate web-1 --qmp /q --to hv-02=hv-02:7400".to_owned(), "IP:PORT after hv-02="),
            (format!("{GOOD} --downtime-limit 300"), "such as 300ms"),
            (format!("{GOOD} --downtime-limit 0ms"), "at least 1ms"),
            (format!("{GOOD} --bandwidth-limit 200"), "such as 200Mbit"),
            (format!("{GOOD} --streams 0"), "0 is not in 1.."),
            (format!("{GOOD} --channels 17"), "17 is not in 1..=16"),
            (format!("{GOOD} --path v2"), "possible values: auto, v1, v3"),
            ("dwcpctl --agent /run/x.sock list".to_owned(), "expected unix:"),
            ("dwcpctl incoming web-1 --qmp /q".to_owned(), "--from"),
            ("dwcpctl explain".to_owned(), "<ID>"),
            ("dwcpctl resolve m-1".to_owned(), "--start-here|--leave-to-peer"),
            ("dwcpctl resolve m-1 --start-here --leave-to-peer".to_owned(), "cannot be used with"),
            ("dwcpctl resolve m-1 --leave-to-peer --peer-fenced".to_owned(), "cannot be used with"),
            ("dwcpctl resolve m-1 --peer-fenced".to_owned(), "--start-here"),
        ] {
            let error = parse(&line).expect_err(&line);
            assert!(error.to_string().contains(expected), "{line}: {error}");
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
