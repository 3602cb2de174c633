//! What `cargo xtask setup` unpacked, and where.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A version of QEMU that the project promises to work with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuVersion {
    /// Debian 12.
    V7_2,
    /// Debian 12 backports.
    V10_0,
}

impl QemuVersion {
    /// Both of them.
    pub const ALL: [QemuVersion; 2] = [QemuVersion::V7_2, QemuVersion::V10_0];

    /// `7.2` or `10.0`.
    pub fn name(self) -> &'static str {
        match self {
            QemuVersion::V7_2 => "7.2",
            QemuVersion::V10_0 => "10.0",
        }
    }
}

/// The folder `target/lab`: two QEMUs with their libraries and firmware, a kernel and the guest's initramfs.
#[derive(Debug, Clone)]
pub struct Kit {
    lab: PathBuf,
}

impl Kit {
    /// The kit below this target folder, whether it is there yet or not.
    pub fn below(target: &Path) -> Self {
        Kit { lab: target.join("lab") }
    }

    /// The kit of the target folder that this program was built into.
    ///
    /// # Errors
    /// It has not been set up.
    pub fn find() -> Result<Self> {
        let kit = Kit::below(&target_dir()?);
        if !kit.stamp().is_file() || !kit.initramfs().is_file() {
            bail!("no laboratory in {}: run `cargo xtask setup`", kit.lab.display());
        }
        Ok(kit)
    }

    /// The kit; or `None`, after a line `SKIPPED test: why`, on a machine that was not set up.
    ///
    /// # Panics
    /// In CI (`CI=true`), where nothing may be skipped.
    pub fn or_skip(test: &str) -> Option<Self> {
        Kit::or_skip_without(test, || Ok(()))
    }

    /// The same, with a further thing that the test needs.
    pub(crate) fn or_skip_without(test: &str, needed: impl FnOnce() -> Result<()>) -> Option<Self> {
        let why = match needed().and_then(|()| Kit::find()) {
            Ok(kit) => return Some(kit),
            Err(why) => why,
        };
        skip(test, &format!("{why:#}"));
        None
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.lab
    }

    /// Written once everything from Debian is there and runs; says what was unpacked.
    pub fn stamp(&self) -> PathBuf {
        self.lab.join("stamp")
    }

    /// Where this QEMU's packages are unpacked.
    pub fn qemu_root(&self, version: QemuVersion) -> PathBuf {
        self.lab.join(format!("qemu-{}", version.name()))
    }

    /// The library that gives a process a wall clock of its own, for `LD_PRELOAD`.
    pub fn faketime(&self) -> PathBuf {
        self.lab.join("faketime/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.lab.join("vmlinuz")
    }

    /// The guest's initramfs: the self-checking program as `/init`.
    pub fn initramfs(&self) -> PathBuf {
        self.lab.join("guest.cpio")
    }

    /// A command that runs this QEMU with the libraries, modules and firmware that were unpacked beside it. It dies
    /// with the thread that starts it.
    pub fn qemu(&self, version: QemuVersion) -> Command {
        let root = self.qemu_root(version);
        let multiarch = root.join("usr/lib/x86_64-linux-gnu");
        let libraries =
            std::env::join_paths([&multiarch, &root.join("lib/x86_64-linux-gnu")]).unwrap_or_default();
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(root.join("usr/bin/qemu-system-x86_64"))
            .arg("-L")
            .arg(root.join("usr/share/qemu"))
            .arg("-L")
            .arg(root.join("usr/share/seabios"))
            .env("LD_LIBRARY_PATH", libraries)
            .env("QEMU_MODULE_DIR", multiarch.join("qemu"));
        command
    }
}

/// The variable with the file into which skipped tests write their line a second time: `cargo xtask test` reads it
/// after the run, since cargo-nextest shows nothing of what a passing test says.
pub const SKIPPED: &str = "DWCP_SKIPPED";

/// Says that `test` is skipped, and why.
///
/// # Panics
/// In CI (`CI=true`), where nothing may be skipped.
pub fn skip(test: &str, why: &str) {
    assert!(!in_ci(), "{test}: {why}");
    let line = format!("SKIPPED {test}: {}\n", why.trim().replace('\n', " "));
    // Not `eprintln!`: the test harness swallows that of a test that passes.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(file) = std::env::var_os(SKIPPED) {
        // In one write, since tests run beside each other.
        let file = File::options().create(true).append(true).open(file);
        let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
    }
}

/// Whether this is CI (`CI=true`), where what cannot be tested is an error.
pub fn in_ci() -> bool {
    std::env::var("CI").as_deref() == Ok("true")
}

/// The target folder that this program was built into (`CARGO_TARGET_DIR` and other layouts included).
///
/// # Errors
/// The program was moved out of it.
pub fn target_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("the path of this program")?;
    let marked = exe.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    Ok(marked.with_context(|| format!("{} is not in a cargo target folder", exe.display()))?.to_owned())
}
