//! `cargo xtask fuzz`: the targets in fuzz/, with libFuzzer and a nightly compiler.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use dwcp_tests::target_dir;

use crate::run::{bounded, installed, output, root, run};

/// For cargo-fuzz itself, or for building the targets.
const BUILD: Duration = Duration::from_secs(15 * 60);

/// Runs every target for so many seconds; a crash is an error, and its input is kept in fuzz/artifacts.
pub(crate) fn fuzz(seconds: u64) -> Result<()> {
    let toolchains = if installed("rustup") {
        output(bounded(Duration::from_secs(30), "rustup").args(["toolchain", "list"]))?
    } else {
        String::new()
    };
    if !toolchains.lines().any(|line| line.starts_with("nightly")) {
        println!("SKIPPED fuzz: no nightly toolchain here (`rustup toolchain install nightly`)");
        return Ok(());
    }
    let tools = tools()?;
    for target in output(nightly(BUILD, &tools).args(["fuzz", "list"]))?.lines() {
        println!("fuzz {target}: {seconds} s");
        let time = Duration::from_secs(seconds) + BUILD;
        run(nightly(time, &tools)
            .args(["fuzz", "run", target, "--", "-print_final_stats=1"])
            .arg(format!("-max_total_time={seconds}")))?;
    }
    Ok(())
}

/// The folder with `cargo-fuzz`, which is built into it where the machine has none.
fn tools() -> Result<PathBuf> {
    let root = target_dir()?.join("tools");
    if !installed("cargo-fuzz") && !root.join("bin/cargo-fuzz").is_file() {
        println!("building cargo-fuzz, once");
        run(bounded(BUILD, "cargo").args(["install", "--quiet", "--locked", "--root"]).arg(&root).args([
            "cargo-fuzz",
            "--version",
            "^0.13",
        ]))?;
    }
    Ok(root.join("bin"))
}

fn nightly(limit: Duration, tools: &Path) -> Command {
    let mut paths = vec![tools.to_owned()];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = bounded(limit, "rustup");
    command
        .args(["run", "nightly", "cargo"])
        .current_dir(root())
        .env("PATH", std::env::join_paths(paths).unwrap_or_default())
        // The cargo that runs us told its children to be of its own version.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    command
}
