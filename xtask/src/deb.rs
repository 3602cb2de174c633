//! `cargo xtask deb`: the Debian package, laid out by hand and packed by dpkg-deb.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use dwcp_tests::target_dir;

use crate::run::{bounded, output, root};
use crate::test::build_programs;

const QUICK: Duration = Duration::from_secs(60);
const VERSION: &str = env!("CARGO_PKG_VERSION");
const PROGRAMS: [&str; 2] = ["dwcpd", "dwcpctl"];
/// What building the package needs beyond cargo.
pub(crate) const TOOLS_OF_DEB: [&str; 3] = ["dpkg", "dpkg-deb", "strip"];
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: dwcp
Source: https://novacron.io

Files: *
Copyright: The DWCP developers
License: Apache-2.0 or MIT
 Either license, at your choice. The Apache License 2.0 is in
 /usr/share/common-licenses/Apache-2.0, the MIT license beside this file.
";

/// Builds the programs and `target/debian/dwcpd_VERSION_ARCH.deb`, and gives its path.
pub(crate) fn deb() -> Result<PathBuf> {
    build_programs()?;
    let target = target_dir()?;
    let folder = target.join("debian");
    let tree = folder.join("tree");
    let _ = fs::remove_dir_all(&tree);
    for program in PROGRAMS {
        let to = place(&tree, &format!("usr/bin/{program}"))?;
        // Without the line tables, which are most of it; names stay, for backtraces.
        let from = target.join("release").join(program);
        output(bounded(QUICK, "strip").args(["--strip-debug", "-o"]).arg(&to).arg(from))?;
    }
    copy(&tree, "systemd/dwcpd.service", "usr/lib/systemd/system/dwcpd.service", 0o644)?;
    copy(&tree, "systemd/dwcpd.toml", "etc/dwcp/dwcpd.toml", 0o644)?;
    copy(&tree, "LICENSE-MIT", "usr/share/doc/dwcpd/LICENSE-MIT", 0o644)?;
    write(&tree, "usr/share/doc/dwcpd/copyright", COPYRIGHT, 0o644)?;
    for (empty, mode) in [("etc/dwcp/peers", 0o755), ("var/lib/dwcp", 0o700)] {
        fs::create_dir_all(tree.join(empty))?;
        fs::set_permissions(tree.join(empty), fs::Permissions::from_mode(mode))?;
    }
    let architecture = output(bounded(QUICK, "dpkg").arg("--print-architecture"))?.trim().to_owned();
    let control = control(&architecture, &glibc(&tree)?, installed_kib(&tree)?);
    write(&tree, "DEBIAN/control", &control, 0o644)?;
    write(&tree, "DEBIAN/conffiles", "/etc/dwcp/dwcpd.toml\n", 0o644)?;
    for script in SCRIPTS {
        copy(&tree, &format!("systemd/debian/{script}"), &format!("DEBIAN/{script}"), 0o755)?;
    }
    let package = folder.join(format!("dwcpd_{VERSION}_{architecture}.deb"));
    output(bounded(QUICK, "dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&package))?;
    Ok(package)
}

fn control(architecture: &str, glibc: &str, kib: u64) -> String {
    format!(
        "Package: dwcpd\n\
         Version: {VERSION}\n\
         Architecture: {architecture}\n\
         Maintainer: The DWCP developers\n\
         Homepage: https://novacron.io\n\
         Section: admin\n\
         Priority: optional\n\
         Installed-Size: {kib}\n\
         Depends: libc6 (>= {glibc}), libgcc-s1\n\
         Description: node agent for the live migration of virtual machines\n \
         dwcpd stands between the migration sockets of two hypervisors and moves\n \
         a running guest's memory from one node to another, as it is or compressed,\n \
         encrypted and signed. dwcpctl is its command line.\n"
    )
}

/// The newest C library that a program asks for: the highest `GLIBC_x.y` among its symbols' versions.
fn glibc(tree: &Path) -> Result<String> {
    let mut newest = (0, 0);
    for program in PROGRAMS {
        let bytes = fs::read(tree.join("usr/bin").join(program))?;
        for at in bytes.windows(6).enumerate().filter(|(_, window)| window == b"GLIBC_").map(|(at, _)| at) {
            let rest: String = bytes[at + 6..].iter().take(8).map(|&byte| char::from(byte)).collect();
            let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
            let version = rest[..end].split_once('.');
            if let Some((Ok(major), Ok(minor))) = version.map(|(major, minor)| (major.parse(), minor.parse()))
            {
                newest = newest.max((major, minor));
            }
        }
    }
    let (major, minor): (u32, u32) = newest;
    Ok(format!("{major}.{minor}"))
}

fn installed_kib(folder: &Path) -> Result<u64> {
    let mut kib = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let data = entry.metadata()?;
        kib += if data.is_dir() { installed_kib(&entry.path())? } else { data.len().div_ceil(1024) };
    }
    Ok(kib)
}

/// The path of a file in the tree, its folder made.
fn place(tree: &Path, to: &str) -> Result<PathBuf> {
    let to = tree.join(to);
    let folder = to.parent().context("a file at the root of a package")?;
    fs::create_dir_all(folder)?;
    Ok(to)
}

fn copy(tree: &Path, from: &str, to: &str, mode: u32) -> Result<()> {
    let text = fs::read_to_string(root().join(from)).with_context(|| format!("read {from}"))?;
    write(tree, to, &text, mode)
}

fn write(tree: &Path, to: &str, text: &str, mode: u32) -> Result<()> {
    let to = place(tree, to)?;
    fs::write(&to, text)?;
    fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
    Ok(())
}
