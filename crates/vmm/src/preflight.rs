//! What stands in the way of a migration, found before the source is touched.

use std::fmt;

use crate::describe::VmDescription;
use crate::qmp::{Disk, MigrationInfo, MigrationStatus, Qemu, QmpError, RunState};

/// One reason against a migration, or a remark on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finding {
    /// QEMU itself says that this VM cannot be migrated.
    Blocked {
        /// QEMU's words.
        reason: String,
    },
    /// A disk that the guest writes to, and that the destination may not see.
    LocalDisk {
        /// The device.
        device: String,
        /// The image.
        file: String,
    },
    /// The guest at the source is in no state to be moved.
    SourceState {
        /// Its state.
        state: RunState,
    },
    /// The source migrates already.
    SourceBusy {
        /// How far it is.
        status: MigrationStatus,
    },
    /// The destination does not wait for a migration at all.
    DestinationState {
        /// Its state.
        state: RunState,
    },
    /// The destination waits for a migration, but not for ours: it listens on an address of its own.
    DestinationListens,
    /// The two VMs differ.
    Differs(Difference),
}

impl Finding {
    /// Whether the migration must not begin.
    pub fn is_fatal(&self) -> bool {
        match self {
            Finding::Differs(difference) => difference.fatal,
            _ => true,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Finding::Blocked { reason } => write!(f, "QEMU cannot migrate this VM: {reason}"),
            Finding::LocalDisk { device, file } => write!(
                f,
                "disk {device} is writable and local ({file}); only memory is moved: put it on storage that both nodes \
                 share and say --shared-storage, or remove it"
            ),
            Finding::SourceState { state: RunState::PostMigrate } => f.write_str(
                "the source guest was migrated away already (postmigrate); if it runs nowhere else, `cont` brings it back",
            ),
            Finding::SourceState { state } => {
                write!(f, "the source guest is {state}; it can be moved while running or paused")
            }
            Finding::SourceBusy { status } => {
                write!(f, "the source has a migration under way ({status}); wait for it or cancel it")
            }
            Finding::DestinationState { state } => write!(
                f,
                "the destination VMM is {state} and does not wait for a migration; start it with -incoming defer"
            ),
            Finding::DestinationListens => f.write_str(
                "the destination VMM has an incoming migration already; start it anew with -incoming defer",
            ),
            Finding::Differs(difference) => difference.fmt(f),
        }
    }
}

/// What the source alone tells. `shared_storage`: the operator vouches for the disks.
pub async fn source(qemu: &Qemu, shared_storage: bool) -> Result<Vec<Finding>, QmpError> {
    let (state, migration, disks) = (qemu.run_state().await?, qemu.migration().await?, qemu.disks().await?);
    Ok(source_findings(state, &migration, &disks, shared_storage))
}

/// What the destination alone tells. `-incoming defer` shows as run state `inmigrate` while `query-migrate` knows
/// neither a status nor a listening socket (7.2 and 10.0).
pub async fn destination(qemu: &Qemu) -> Result<Vec<Finding>, QmpError> {
    Ok(destination_findings(qemu.run_state().await?, &qemu.migration().await?))
}

fn source_findings(
    state: RunState,
    migration: &MigrationInfo,
    disks: &[Disk],
    shared_storage: bool,
) -> Vec<Finding> {
    let mut findings: Vec<_> =
        migration.blocked_reasons.iter().map(|reason| Finding::Blocked { reason: reason.clone() }).collect();
    let status = migration.status.clone().unwrap_or(MigrationStatus::None);
    if !status.is_final() && status != MigrationStatus::None {
        findings.push(Finding::SourceBusy { status });
    } else if !matches!(state, RunState::Running | RunState::Paused | RunState::Prelaunch) {
        findings.push(Finding::SourceState { state });
    }
    if !shared_storage {
        let local = disks.iter().filter(|disk| !disk.read_only && disk.is_local());
        findings.extend(local.map(|d| Finding::LocalDisk { device: d.device.clone(), file: d.file.clone() }));
    }
    findings
}

fn destination_findings(state: RunState, migration: &MigrationInfo) -> Vec<Finding> {
    if state != RunState::InMigrate {
        return vec![Finding::DestinationState { state }];
    }
    let untouched = matches!(migration.status, None | Some(MigrationStatus::None)) && !migration.listening;
    if untouched { Vec::new() } else { vec![Finding::DestinationListens] }
}

/// A way in which the two VMs differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What differs, in the operator's words.
    pub what: String,
    /// How it is at the source.
    pub source: String,
    /// How it is at the destination.
    pub destination: String,
    /// What to do about it.
    pub advice: &'static str,
    /// Whether the destination would refuse the guest, or the guest would break.
    pub fatal: bool,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { what, source, destination, advice, .. } = self;
        write!(f, "{what}: {source} at the source, {destination} at the destination; {advice}")
    }
}

/// How the destination differs from the source, as far as a migration cares.
pub fn compare(source: &VmDescription, destination: &VmDescription) -> Vec<Difference> {
    let mut differences = Vec::new();
    let mut differ = |what: &str, a: String, b: String, advice, fatal| {
        if a != b {
            differences.push(Difference { what: what.to_owned(), source: a, destination: b, advice, fatal });
        }
    };
    differ(
        "machine type",
        source.machine.clone(),
        destination.machine.clone(),
        "start the destination with the source's versioned -machine",
        true,
    );
    differ(
        "CPU model",
        source.cpu.clone(),
        destination.cpu.clone(),
        "start the destination with the source's -cpu",
        true,
    );
    differ(
        "number of CPUs",
        source.cpus.to_string(),
        destination.cpus.to_string(),
        "start the destination with the source's -smp",
        true,
    );
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
    differ(
        "UUID",
        text(&source.uuid),
        text(&destination.uuid),
        "the guest keeps the source's until it reboots",
        false,
    );
    if (source.qemu.major, source.qemu.minor) > (destination.qemu.major, destination.qemu.minor) {
        differ(
            "QEMU version",
            source.qemu.to_string(),
            destination.qemu.to_string(),
            "moving to an older QEMU works only where both support the machine type",
            false,
        );
    }
    if source.cpu.starts_with("host-") && source.cpu == destination.cpu {
        differ(
            "CPU features",
            "-cpu host".into(),
            "-cpu host, of another node".into(),
            "make sure that both nodes have the same CPU, or use a named model",
            false,
        );
    }
    compare_ram(source, destination, &mut differences);
    differences
}

fn compare_ram(source: &VmDescription, destination: &VmDescription, differences: &mut Vec<Difference>) {
    let mut differ = |name: &str, a: String, b: String, advice| {
        let what = format!("RAM block {name}");
        differences.push(Difference { what, source: a, destination: b, advice, fatal: true });
    };
    let bytes = |n: u64| format!("{n} bytes");
    for block in &source.ram {
        let Some(peer) = destination.ram.iter().find(|peer| peer.name == block.name) else {
            differ(
                &block.name,
                bytes(block.used),
                "none".into(),
                "give both VMs the same -m and the same devices",
            );
            continue;
        };
        // A resizable block takes the source's length when the stream names it.
        let resizable = peer.total > peer.used || block.total > block.used;
        if block.used != peer.used && !(resizable && block.used <= peer.total) {
            differ(
                &block.name,
                bytes(block.used),
                bytes(peer.used),
                "give both VMs the same -m and firmware",
            );
        }
    }
    // Blocks that only the destination has stay as they are, but tell of a device that the stream does not know.
    for peer in &destination.ram {
        if !source.ram.iter().any(|block| block.name == peer.name) {
            differ(
                &peer.name,
                "none".into(),
                bytes(peer.used),
                "give both VMs the same -m and the same devices",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::describe::tests::sample;

    #[test]
    fn equal_vms_do_not_differ() {
        let mut destination = sample();
        destination.run_state = RunState::InMigrate;
        destination.qemu.minor = 3;
        destination.ram[1].used = 1 << 16; // resizable
        assert_eq!(compare(&sample(), &destination), []);
    }

    #[test]
    fn each_difference_is_found_and_says_what_to_do() {
        let found = |change: &dyn Fn(&mut VmDescription)| {
            let mut destination = sample();
            change(&mut destination);
            let differences = compare(&sample(), &destination);
            assert_eq!(differences.len(), 1, "{differences:?}");
            (differences[0].to_string(), differences[0].fatal)
        };
        let (text, fatal) = found(&|vm| vm.machine = "q35".into());
        assert_eq!(
            text,
            "machine type: pc-i440fx-7.2 at the source, q35 at the destination; start the destination with the \
             source's versioned -machine"
        );
        assert!(fatal);
        assert!(found(&|vm| vm.cpu = "max-x86_64-cpu".into()).1);
        assert!(found(&|vm| vm.cpus = 1).1);
        assert!(found(&|vm| vm.ram.truncate(1)).1);
        assert!(found(&|vm| (vm.ram[0].used, vm.ram[0].total) = (4096, 4096)).0.contains("-m"));

        assert!(!found(&|vm| vm.uuid = Some("1-2".into())).1);
        assert!(!found(&|vm| vm.qemu.major = 6).1);
    }

    #[test]
    fn the_source_must_be_movable() {
        let idle = MigrationInfo::default();
        let disk = Disk { device: "vda".into(), file: "/x.img".into(), read_only: false };
        let of = |state, migration: &MigrationInfo, shared| {
            source_findings(state, migration, std::slice::from_ref(&disk), shared)
        };
        assert_eq!(of(RunState::Running, &idle, true), []);
        assert!(of(RunState::Running, &idle, false)[0].to_string().contains("--shared-storage"));
        for state in [RunState::PostMigrate, RunState::InMigrate, RunState::Other("colo".into())] {
            assert_eq!(of(state.clone(), &idle, true), [Finding::SourceState { state }]);
        }
        let busy = MigrationInfo { status: Some(MigrationStatus::Active), ..idle.clone() };
        assert!(matches!(of(RunState::Running, &busy, true)[..], [Finding::SourceBusy { .. }]));
        let blocked = MigrationInfo { blocked_reasons: vec!["no".into()], ..idle };
        assert_eq!(of(RunState::Paused, &blocked, true), [Finding::Blocked { reason: "no".into() }]);
    }

    #[test]
    fn the_destination_must_wait_in_defer() {
        let idle = MigrationInfo::default();
        assert_eq!(destination_findings(RunState::InMigrate, &idle), []);
        assert!(destination_findings(RunState::Running, &idle)[0].to_string().contains("-incoming defer"));
        let listening = MigrationInfo { listening: true, ..idle.clone() };
        assert_eq!(destination_findings(RunState::InMigrate, &listening), [Finding::DestinationListens]);
        let setup = MigrationInfo { status: Some(MigrationStatus::Setup), ..idle };
        assert_eq!(destination_findings(RunState::InMigrate, &setup), [Finding::DestinationListens]);
    }
}
