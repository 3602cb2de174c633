//! The Debian packages, installed into an empty file system and purged again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{skip, target_dir};
use tempfile::TempDir;

const AGENT: [&str; 7] = [
    "usr/bin/dwcpd",
    "usr/bin/dwcpctl",
    "usr/lib/systemd/system/dwcpd.service",
    "etc/systemd/system/multi-user.target.wants/dwcpd.service",
    "etc/dwcp/dwcpd.toml",
    "etc/dwcp/peers",
    "var/lib/dwcp",
];

const CONTROL: [&str; 5] = [
    "usr/bin/dwcp-control",
    "usr/lib/systemd/system/dwcp-control.service",
    "etc/systemd/system/multi-user.target.wants/dwcp-control.service",
    "etc/dwcp-control",
    "var/lib/dwcp-control",
];

#[test]
fn the_package_installs_works_and_purges() -> Result<()> {
    let Some(root) = installed("the_package_installs_works_and_purges", "dwcpd", &AGENT)? else {
        return Ok(());
    };
    // What was packed is what runs, with the configuration that comes with it.
    for program in ["dwcpd", "dwcpctl"] {
        run(Command::new(root.path().join("usr/bin").join(program)).arg("--version"))?;
    }
    let config = root.path().join("etc/dwcp/dwcpd.toml");
    run(Command::new(root.path().join("usr/bin/dwcpd")).arg("check-config").arg(&config))?;

    // A key and a journal, as a node has them after some time.
    std::fs::write(root.path().join("etc/dwcp/peers/b.pub"), "a key")?;
    std::fs::write(root.path().join("var/lib/dwcp/journal"), "an entry")?;
    dpkg(root.path(), &["--remove", "dwcpd"])?;
    ensure!(config.exists(), "removing a package keeps its configuration");
    purged(root.path(), "dwcpd", &AGENT, "etc/dwcp")
}

#[test]
fn the_control_plane_installs_works_and_purges() -> Result<()> {
    let test = "the_control_plane_installs_works_and_purges";
    let Some(root) = installed(test, "dwcp-control", &CONTROL)? else { return Ok(()) };
    let tokens = root.path().join("etc/dwcp-control/tokens");
    run(Command::new(root.path().join("usr/bin/dwcp-control"))
        .args(["token", "new", "--name", "test", "--roles", "admin", "--file"])
        .arg(&tokens))?;
    dpkg(root.path(), &["--remove", "dwcp-control"])?;
    ensure!(tokens.exists(), "removing a package keeps its tokens");
    purged(root.path(), "dwcp-control", &CONTROL, "etc/dwcp-control")
}

/// An empty file system into which a package was installed, and nothing of it is missing; `None` where that cannot be done.
fn installed(test: &str, name: &str, laid_down: &[&str]) -> Result<Option<TempDir>> {
    let Some(package) = package(name)? else {
        skip(test, "no package here: run `cargo xtask deb`");
        return Ok(None);
    };
    if std::fs::metadata("/proc/self")?.uid() != 0 {
        skip(test, "dpkg gives the files to root, so it must be root");
        return Ok(None);
    }
    let root = tempfile::tempdir()?;
    let database = root.path().join("var/lib/dpkg");
    std::fs::create_dir_all(database.join("info"))?;
    std::fs::create_dir_all(database.join("updates"))?;
    std::fs::write(database.join("status"), "")?;

    dpkg(root.path(), &["--install", &package.display().to_string()])?;
    for path in laid_down {
        ensure!(root.path().join(path).symlink_metadata().is_ok(), "{path} is missing");
    }
    Ok(Some(root))
}

fn purged(root: &Path, name: &str, laid_down: &[&str], folder: &str) -> Result<()> {
    dpkg(root, &["--purge", name])?;
    for path in laid_down.iter().copied().chain([folder]) {
        ensure!(root.join(path).symlink_metadata().is_err(), "{path} was left behind");
    }
    Ok(())
}

/// The newest package of this name in the target folder.
fn package(name: &str) -> Result<Option<PathBuf>> {
    let Ok(folder) = std::fs::read_dir(target_dir()?.join("debian")) else { return Ok(None) };
    let of_name = |path: &PathBuf| {
        let file = path.file_name().and_then(|file| file.to_str()).unwrap_or_default();
        file.starts_with(&format!("{name}_")) && file.ends_with(".deb")
    };
    let packages = folder.flatten().map(|entry| entry.path()).filter(of_name);
    Ok(packages.max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok()))
}

/// dpkg on the file system below `root`, with the package's scripts run outside of it: nothing of the machine changes.
fn dpkg(root: &Path, arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("dpkg");
    command.arg(format!("--root={}", root.display()));
    // There are no libraries in there, and no programs for the scripts.
    command.args(["--force-script-chrootless", "--force-depends"]);
    run(command.args(arguments).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {said}", output.status);
    Ok(())
}
