//! `cargo xtask check`: what can be said about the source without running it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use dwcp_tests::in_ci;

use crate::run::{bounded, cargo, output, root, run, skip};
use crate::tools::{DENY, with_tools};

/// For lints of a workspace that was never built.
const LINT: Duration = Duration::from_secs(20 * 60);
const QUICK: Duration = Duration::from_secs(120);

/// The folders at the root of a file system that any Linux may have (the file system hierarchy standard).
const STANDARD: [&str; 22] = [
    "bin",
    "boot",
    "dev",
    "etc",
    "home",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "lost+found",
    "media",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "sbin",
    "srv",
    "sys",
    "tmp",
    "usr",
    "var",
];

/// Every check; the first that fails is the error.
pub(crate) fn check() -> Result<()> {
    println!("format");
    run(cargo(QUICK).args(["fmt", "--all", "--check"]))?;
    println!("paths of this machine");
    machine_paths()?;
    println!("lints");
    run(cargo(LINT)
        .args(["clippy", "--quiet", "--release", "--locked", "--workspace", "--all-targets"])
        .args(["--", "--deny", "warnings"]))?;
    println!("documentation");
    run(cargo(LINT)
        .args(["doc", "--quiet", "--release", "--workspace", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "--deny warnings"))?;
    if in_ci() {
        // Some minutes to build: not asked of everybody.
        DENY.ensure()?;
    }
    if DENY.present()? {
        println!("licences, bans, sources");
        let mut deny = cargo(QUICK);
        deny.args([
            "deny",
            "--all-features",
            "check",
            "--hide-inclusion-graph",
            "bans",
            "licenses",
            "sources",
        ]);
        run(with_tools(&mut deny)?)?;
    } else {
        skip("licences, bans, sources", "no cargo-deny here (`cargo install --locked cargo-deny`)")?;
    }
    Ok(())
}

/// Refuses files in git that name a folder which only the machine has that they were written on.
fn machine_paths() -> Result<()> {
    let own: Vec<String> = fs::read_dir("/")?
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !STANDARD.contains(&name.as_str()))
        .map(|name| format!("/{name}/"))
        .chain([format!("{}/", root().display())])
        .collect();
    let listed = output(bounded(QUICK, "git").current_dir(root()).args(["ls-files", "-z"]))?;
    let mut found = Vec::new();
    for name in listed.split_terminator('\0') {
        let text = fs::read(Path::new(&root()).join(name)).unwrap_or_default();
        for (number, line) in String::from_utf8_lossy(&text).lines().enumerate() {
            if own.iter().any(|path| names_path(line, path)) {
                found.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    if !found.is_empty() {
        bail!("these name a path of this machine:\n{}", found.join("\n"));
    }
    Ok(())
}

/// Whether `path` begins in `line`, and not in the middle of a longer path or an address.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        before.is_none_or(|before| !before.is_alphanumeric() && !"._-~/})".contains(before))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_beginning_of_a_path_counts() {
        assert!(names_path("cd /barn/x", "/barn/"));
        assert!(names_path("\"/barn/x\"", "/barn/"));
        assert!(!names_path("/usr/barn/x", "/barn/"));
        assert!(!names_path("http://host/barn/x", "/barn/"));
        assert!(!names_path("${root}/barn/x", "/barn/"));
    }
}
