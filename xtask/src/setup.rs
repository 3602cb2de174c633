//! `cargo xtask setup`: the laboratory from nothing.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dwcp_tests::{Kit, QemuVersion, target_dir};

use crate::apt::{Apt, BACKPORTS, RELEASE};
use crate::cpio::{self, Entry};
use crate::run::{cargo, output, run, skip};

/// Raised when what is unpacked changes, so that older laboratories are made anew.
const STAMP: &str = "laboratory 2\n";
/// For the guest's program, which has no dependencies.
const BUILD: Duration = Duration::from_secs(120);
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Makes the laboratory, or finds that it is there and works.
///
/// # Errors
/// Says what is missing: apt, its mirror, the network, a linker.
pub(crate) fn setup() -> Result<Kit> {
    let kit = Kit::below(&target_dir()?);
    unpack(&kit)?;
    build_guest(&kit)?;
    Ok(kit)
}

/// The same; a machine that cannot have QEMU and kernel does without, outside CI. What is wrong with the guest's
/// program is an error everywhere.
///
/// # Errors
/// The guest's program cannot be built; in CI as [`setup`].
pub(crate) fn setup_or_skip() -> Result<()> {
    let kit = Kit::below(&target_dir()?);
    match unpack(&kit) {
        Ok(()) => build_guest(&kit),
        Err(why) => skip("the laboratory, and all tests with a real QEMU", &format!("{why:#}")),
    }
}

/// Gets QEMUs and kernel, unless they are there and run.
fn unpack(kit: &Kit) -> Result<()> {
    ensure!(cfg!(target_arch = "x86_64"), "its QEMUs run on x86-64 only");
    if fs::read_to_string(kit.stamp()).is_ok_and(|stamp| stamp == STAMP) && versions(kit).is_ok() {
        return Ok(());
    }
    let start = Instant::now();
    let _ = fs::remove_file(kit.stamp());
    fetch(kit).context(
        "the laboratory could not be set up. It needs no root and installs nothing, but it needs Debian 12's mirror \
         as named in /etc/apt",
    )?;
    for line in versions(kit)? {
        println!("  {line}");
    }
    fs::write(kit.stamp(), STAMP)?;
    println!("  unpacked in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn fetch(kit: &Kit) -> Result<()> {
    let lab = kit.folder();
    println!("setting up {} (some 100 MB from Debian's mirror, once)", lab.display());
    fs::create_dir_all(lab)?;
    let apt = Apt::open(&lab.join("apt"))?;
    for version in QemuVersion::ALL {
        println!("  QEMU {}", version.name());
        let suite = match version {
            QemuVersion::V7_2 => RELEASE,
            QemuVersion::V10_0 => BACKPORTS,
        };
        let root = kit.qemu_root(version);
        clear(&root)?;
        apt.unpack_with_dependencies(suite, "qemu-system-x86", &root)?;
    }
    println!("  libfaketime");
    let unpacked = lab.join("faketime");
    clear(&unpacked)?;
    apt.unpack_alone("libfaketime", &unpacked)?;
    println!("  Linux kernel");
    let unpacked = lab.join("kernel");
    clear(&unpacked)?;
    apt.unpack_alone(&apt.stands_for("linux-image-cloud-amd64")?, &unpacked)?;
    let mut images = fs::read_dir(unpacked.join("boot"))?.flatten().map(|entry| entry.path());
    let image = images
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .context("the kernel's package holds no vmlinuz")?;
    fs::copy(image, kit.kernel())?;
    clear(&unpacked)?;
    clear(&lab.join("apt"))
}

/// Builds the guest's program without shared libraries, and packs it as the whole of an initramfs.
fn build_guest(kit: &Kit) -> Result<()> {
    let target = target_dir()?;
    run(cargo(BUILD)
        .args(["build", "--quiet", "--release", "--package", "dwcp-guest", "--target", TRIPLE])
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols"))?;
    let program = fs::read(target.join(TRIPLE).join("release/dwcp-guest"))?;
    let archive = cpio::archive(&[
        ("dev", Entry::Folder),
        // The kernel opens it for its init, so the guest needs no /dev of its own.
        ("dev/console", Entry::Device(5, 1)),
        ("init", Entry::Program(&program)),
    ]);
    if fs::read(kit.initramfs()).ok().as_ref() != Some(&archive) {
        // Never half a file under the final name: tests may be starting machines from it.
        let half = kit.initramfs().with_extension("half");
        fs::write(&half, archive)?;
        fs::rename(half, kit.initramfs())?;
    }
    Ok(())
}

/// Asks each QEMU for its version, which proves that all of its libraries are found.
fn versions(kit: &Kit) -> Result<Vec<String>> {
    let ask = |version: QemuVersion| {
        let said = output(kit.qemu(version).arg("--version"))?;
        let first = said.lines().next().unwrap_or_default().to_owned();
        let expected = format!("version {}.", version.name());
        ensure!(first.contains(&expected), "the QEMU unpacked for {} says: {first}", version.name());
        Ok(first)
    };
    QemuVersion::ALL.into_iter().map(ask).collect()
}

fn clear(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
