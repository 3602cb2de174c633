//! One QEMU process with a self-checking guest, or one that waits for it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::guest::{GuestLoad, Report, SerialLog};
use crate::kit::{Kit, QemuVersion};
use crate::netns::entering;
use crate::qmp::Qmp;
use crate::wait::until;

/// From the start of the process to an answer on its QMP sockets.
const LAUNCH: Duration = Duration::from_secs(20);
/// From the start of the guest to its first line: some 3 s alone, much more where emulated machines share a core.
const BOOT: Duration = Duration::from_secs(90);

/// KiB of RAM beyond whole MiB, so that the size is no multiple of 64 pages.
///
/// QEMU 7.2 under TCG loses writes of a running guest: its fast way to collect dirty pages, taken for whole multiples of
/// 64 pages, clears dirty bits without telling the emulated CPU whenever all of them stood in the migration's bitmap
/// already. A plain QEMU-to-QEMU migration of several rounds at 60 MB/s then crashed this guest 12 times of 12; with the
/// slow way, 0 of 12. QEMU 10.0 does not have the mistake.
const ODD_KIB: u64 = 8;

/// Whether this QEMU boots the guest or receives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Boots the guest.
    Source,
    /// Waits with `-incoming defer`.
    Destination,
}

/// What the guest's RAM is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// QEMU's own anonymous memory.
    Anonymous,
    /// A shared memfd.
    Memfd,
    /// A shared file, made by QEMU; with a folder an unlinked one in it.
    File(PathBuf),
}

impl Backing {
    /// A shared file of this machine's memory, which is gone with its QEMU: each makes its own in the folder.
    pub fn shared_file() -> Self {
        Backing::File("/dev/shm".into())
    }
}

/// How to start a QEMU; [`QemuSpec::new`] and change what matters.
#[derive(Debug, Clone)]
pub struct QemuSpec {
    /// Which one.
    pub version: QemuVersion,
    /// Source or destination.
    pub role: Role,
    /// The guest's RAM in MiB, to which a few KiB are added: see [`QemuSpec::ram_bytes`].
    pub ram_mib: u32,
    /// What it is made of.
    pub backing: Backing,
    /// Touch all of it before the start, so that first touches are not timed.
    pub prealloc: bool,
    /// What the guest does. Source and destination need the same, since it is part of the firmware's tables.
    pub load: GuestLoad,
    /// The network namespace that it runs in: [`crate::Wan::namespace`].
    pub namespace: Option<PathBuf>,
    /// Another initramfs than the kit's; it has to end in the same program.
    pub initramfs: Option<PathBuf>,
    /// Further arguments.
    pub extra: Vec<String>,
}

impl QemuSpec {
    /// 256 MiB of anonymous RAM and the default load.
    pub fn new(version: QemuVersion, role: Role) -> Self {
        QemuSpec {
            version,
            role,
            ram_mib: 256,
            backing: Backing::Anonymous,
            prealloc: false,
            load: GuestLoad::default(),
            namespace: None,
            initramfs: None,
            extra: Vec::new(),
        }
    }

    /// The same machine, waiting for the guest.
    pub fn destination(&self) -> Self {
        QemuSpec { role: Role::Destination, ..self.clone() }
    }

    /// The guest's RAM in bytes: a little more than [`QemuSpec::ram_mib`].
    pub fn ram_bytes(&self) -> u64 {
        (u64::from(self.ram_mib) << 20) + (ODD_KIB << 10)
    }

    fn arguments(&self, kit: &Kit, dir: &Path) -> Vec<String> {
        let ram = self.ram_bytes() >> 10;
        let socket = |name: &str| format!("unix:{},server=on,wait=off", dir.join(name).display());
        let mut arguments = vec![
            // The machine type that both versions have, so that guests can go either way between them.
            "-machine".into(),
            "pc-i440fx-7.2,memory-backend=ram".into(),
            "-object".into(),
            match &self.backing {
                Backing::Anonymous => format!("memory-backend-ram,id=ram,size={ram}K"),
                Backing::Memfd => format!("memory-backend-memfd,id=ram,size={ram}K,share=on"),
                Backing::File(path) => {
                    format!("memory-backend-file,id=ram,size={ram}K,share=on,mem-path={}", path.display())
                }
            } + if self.prealloc { ",prealloc=on" } else { "" },
            "-m".into(),
            format!("{ram}K"),
            "-accel".into(),
            "tcg".into(),
            "-nodefaults".into(),
            "-no-user-config".into(),
            "-display".into(),
            "none".into(),
            "-serial".into(),
            format!("file:{}", dir.join("serial.log").display()),
            "-qmp".into(),
            socket("qmp.sock"),
            "-qmp".into(),
            socket("watch.sock"),
            "-kernel".into(),
            kit.kernel().display().to_string(),
            "-initrd".into(),
            self.initramfs.clone().unwrap_or_else(|| kit.initramfs()).display().to_string(),
            "-append".into(),
            // On a busy host the emulated timer may be late for the kernel's check of it, which panics.
            format!("console=ttyS0 quiet no_timer_check {}", self.load),
        ];
        if self.role == Role::Destination {
            arguments.extend(["-incoming".into(), "defer".into()]);
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub struct Qemu {
    dir: PathBuf,
    child: Child,
    watch: Arc<Mutex<Qmp>>,
    serial: SerialLog,
}

impl Qemu {
    /// Starts it with its sockets and logs in `dir/name`, and waits until it answers.
    ///
    /// # Errors
    /// It does not start; its own words are in the error.
    pub fn launch(kit: &Kit, dir: &Path, name: &str, spec: &QemuSpec) -> Result<Self> {
        let dir = dir.join(name);
        std::fs::create_dir(&dir).with_context(|| format!("make {}", dir.display()))?;
        let log = dir.join("stderr.log");
        let mut child = within(spec.namespace.as_deref(), kit.qemu(spec.version))
            .args(spec.arguments(kit, &dir))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("start QEMU")?;
        let socket = dir.join("watch.sock");
        let connected = until("QEMU's QMP sockets", LAUNCH, || {
            if let Some(status) = child.try_wait()? {
                bail!("QEMU ended at once ({status})");
            }
            Ok(dir.join("qmp.sock").exists().then(|| Qmp::connect(&socket).ok()).flatten())
        });
        match connected {
            Ok(watch) => {
                let serial = SerialLog::new(&dir.join("serial.log"));
                Ok(Qemu { dir, child, watch: Arc::new(Mutex::new(watch)), serial })
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                Err(error.context(format!("QEMU {} \"{name}\": {}", spec.version.name(), said.trim())))
            }
        }
    }

    /// Waits for the first line of the guest.
    ///
    /// # Errors
    /// It does not boot, or finds a wrong page.
    pub fn booted(self) -> Result<Self> {
        self.serial.next(None, BOOT)?;
        Ok(self)
    }

    /// The folder with its sockets and logs.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The QMP socket that is the agent's.
    pub fn qmp_path(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The watcher's own QMP connection.
    pub fn watch(&self) -> MutexGuard<'_, Qmp> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn shared_watch(&self) -> Arc<Mutex<Qmp>> {
        Arc::clone(&self.watch)
    }

    /// The guest's console.
    pub fn serial(&self) -> &SerialLog {
        &self.serial
    }

    /// The run state, asked over the watcher's socket.
    ///
    /// # Errors
    /// QEMU is gone.
    pub fn status(&self) -> Result<String> {
        self.watch().status()
    }

    /// Follows the guest for `duration` and at least one whole check of its memory: see [`SerialLog::ok_for`].
    ///
    /// # Errors
    /// A wrong page, silence, or QEMU's death.
    pub fn guest_ok_for(&self, duration: Duration) -> Result<Report> {
        let report = self.serial.ok_for(duration).with_context(|| self.state_of_the_machine())?;
        let status = self.status()?;
        if status != "running" {
            bail!("the guest was well, but QEMU is \"{status}\" now");
        }
        Ok(report)
    }

    /// Run state and registers, for whoever reads a failed test.
    fn state_of_the_machine(&self) -> String {
        let registers =
            self.watch().run("human-monitor-command", json!({ "command-line": "info registers" }));
        let registers = registers.map(|text| text.as_str().unwrap_or_default().replace("\r\n", "\n"));
        format!("QEMU is {:?}\n{}", self.status(), registers.unwrap_or_default())
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process is still there.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the process at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The same command in a network namespace.
fn within(namespace: Option<&Path>, command: Command) -> Command {
    let Some(namespace) = namespace else { return command };
    let mut there = entering(namespace);
    there.arg(command.get_program()).args(command.get_args());
    there.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    there
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}
