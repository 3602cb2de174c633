//! `cargo xtask deb`: the Debian packages, laid out by hand and packed by dpkg-deb.

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
/// What building a package needs beyond cargo.
pub(crate) const TOOLS_OF_DEB: [&str; 3] = ["dpkg", "dpkg-deb", "strip"];
/// In systemd/debian, where `@UNIT@` stands for a package's service and `@FOLDER@` for its folder's name.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// What a package holds.
struct Package {
    /// Also that of its service.
    name: &'static str,
    programs: &'static [&'static str],
    /// The name of its folders below /etc and /var/lib.
    folder: &'static str,
    /// A file in systemd/ that becomes its configuration.
    config: Option<&'static str>,
    /// Further empty folders, and who may read them.
    empty: &'static [(&'static str, u32)],
    /// As the field of that name, from its first line on.
    description: &'static str,
}

const PACKAGES: [Package; 2] = [
    Package {
        name: "dwcpd",
        programs: &["dwcpd", "dwcpctl"],
        folder: "dwcp",
        config: Some("dwcpd.toml"),
        empty: &[("etc/dwcp/peers", 0o755), ("var/lib/dwcp", 0o700)],
        description: "node agent for the live migration of virtual machines\n \
            dwcpd stands between the migration sockets of two hypervisors and moves\n \
            a running guest's memory from one node to another, as it is or compressed,\n \
            encrypted and signed. dwcpctl is its command line.\n",
    },
    Package {
        name: "dwcp-control",
        programs: &["dwcp-control"],
        folder: "dwcp-control",
        config: None,
        empty: &[("etc/dwcp-control", 0o700), ("var/lib/dwcp-control", 0o700)],
        description: "feature flags for the nodes of a DWCP fleet\n \
            dwcp-control tells each dwcpd whether it may use path v3, keeps the\n \
            inventory of nodes and an audit of every change, and shows which nodes\n \
            have applied it.\n",
    },
];

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

/// Builds the programs and `target/debian/PACKAGE_VERSION_ARCH.deb` of each package, and gives their paths.
pub(crate) fn deb() -> Result<Vec<PathBuf>> {
    build_programs()?;
    PACKAGES.iter().map(pack).collect()
}

fn pack(package: &Package) -> Result<PathBuf> {
    let Package { name, folder, .. } = *package;
    let target = target_dir()?;
    let tree = target.join("debian").join(name);
    let _ = fs::remove_dir_all(&tree);
    for program in package.programs {
        let to = place(&tree, &format!("usr/bin/{program}"))?;
        // Without the line tables, which are most of it; names stay, for backtraces.
        let from = target.join("release").join(program);
        output(bounded(QUICK, "strip").args(["--strip-debug", "-o"]).arg(&to).arg(from))?;
    }
    let service = format!("{name}.service");
    copy(&tree, &format!("systemd/{service}"), &format!("usr/lib/systemd/system/{service}"), 0o644)?;
    copy(&tree, "LICENSE-MIT", &format!("usr/share/doc/{name}/LICENSE-MIT"), 0o644)?;
    write(&tree, &format!("usr/share/doc/{name}/copyright"), COPYRIGHT, 0o644)?;
    for (empty, mode) in package.empty {
        fs::create_dir_all(tree.join(empty))?;
        fs::set_permissions(tree.join(empty), fs::Permissions::from_mode(*mode))?;
    }
    if let Some(config) = package.config {
        let to = format!("etc/{folder}/{config}");
        copy(&tree, &format!("systemd/{config}"), &to, 0o644)?;
        write(&tree, "DEBIAN/conffiles", &format!("/{to}\n"), 0o644)?;
    }
    let architecture = output(bounded(QUICK, "dpkg").arg("--print-architecture"))?.trim().to_owned();
    let control = control(package, &architecture, &glibc(&tree, package.programs)?, installed_kib(&tree)?);
    write(&tree, "DEBIAN/control", &control, 0o644)?;
    for script in SCRIPTS {
        let text = fs::read_to_string(root().join("systemd/debian").join(script))?;
        let text = text.replace("@UNIT@", &service).replace("@FOLDER@", folder);
        write(&tree, &format!("DEBIAN/{script}"), &text, 0o755)?;
    }
    let made = target.join("debian").join(format!("{name}_{VERSION}_{architecture}.deb"));
    output(bounded(QUICK, "dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&made))?;
    Ok(made)
}

fn control(package: &Package, architecture: &str, glibc: &str, kib: u64) -> String {
    let Package { name, description, .. } = package;
    format!(
        "Package: {name}\n\
         Version: {VERSION}\n\
         Architecture: {architecture}\n\
         Maintainer: The DWCP developers\n\
         Homepage: https://novacron.io\n\
         Section: admin\n\
         Priority: optional\n\
         Installed-Size: {kib}\n\
         Depends: libc6 (>= {glibc}), libgcc-s1\n\
         Description: {description}"
    )
}

/// The newest C library that a program asks for: the highest `GLIBC_x.y` among its symbols' versions.
fn glibc(tree: &Path, programs: &[&str]) -> Result<String> {
    let mut newest = (0, 0);
    for program in programs {
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
