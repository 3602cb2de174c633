//! The Debian package, installed into an empty file system and purged again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{skip, target_dir};

const LAID_DOWN: [&str; 7] = [
    "usr/bin/dwcpd",
    "usr/bin/dwcpctl",
    "usr/lib/systemd/system/dwcpd.service",
    "etc/systemd/system/multi-user.target.wants/dwcpd.service",
    "etc/dwcp/dwcpd.toml",
    "etc/dwcp/peers",
    "var/lib/dwcp",
];

#[test]
fn the_package_installs_works_and_purges() -> Result<()> {
    let test = "the_package_installs_works_and_purges";
    let Some(package) = package()? else {
        skip(test, "no package here: run `cargo xtask deb`");
        return Ok(());
    };
    if std::fs::metadata("/proc/self")?.uid() != 0 {
        skip(test, "dpkg gives the files to root, so it must be root");
        return Ok(());
    }
    let root = tempfile::tempdir()?;
    let database = root.path().join("var/lib/dpkg");
    std::fs::create_dir_all(database.join("info"))?;
    std::fs::create_dir_all(database.join("updates"))?;
    std::fs::write(database.join("status"), "")?;

    dpkg(root.path(), &["--install", &package.display().to_string()])?;
    for path in LAID_DOWN {
        ensure!(root.path().join(path).symlink_metadata().is_ok(), "{path} is missing");
    }
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
    dpkg(root.path(), &["--purge", "dwcpd"])?;
    for path in LAID_DOWN.iter().copied().chain(["etc/dwcp"]) {
        ensure!(root.path().join(path).symlink_metadata().is_err(), "{path} was left behind");
    }
    Ok(())
}

/// The newest package of this target folder.
fn package() -> Result<Option<PathBuf>> {
    let Ok(folder) = std::fs::read_dir(target_dir()?.join("debian")) else { return Ok(None) };
    let packages = folder.flatten().map(|entry| entry.path());
    Ok(packages
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok()))
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
