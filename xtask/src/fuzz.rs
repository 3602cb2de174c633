//! `cargo xtask fuzz`: the targets in fuzz/, with libFuzzer and a nightly compiler.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::run::{bounded, cargo, installed, output, root, run, skip};
use crate::tools::{FUZZ, with_tools};

/// For building the targets.
const BUILD: Duration = Duration::from_secs(15 * 60);

/// Runs every target for so many seconds; a crash is an error, and its input is kept in fuzz/artifacts.
pub(crate) fn fuzz(seconds: u64) -> Result<()> {
    let toolchains = if installed("rustup") {
        output(bounded(Duration::from_secs(30), "rustup").args(["toolchain", "list"]))?
    } else {
        String::new()
    };
    if !toolchains.lines().any(|line| line.starts_with("nightly")) {
        return skip("fuzz", "no nightly toolchain here (`rustup toolchain install nightly`)");
    }
    FUZZ.ensure()?;
    // So that a short run begins with real streams, chunks and frames.
    let mut seeds = cargo(BUILD);
    seeds.args(["run", "--quiet", "--release", "--package", "dwcp-benches", "--example", "fuzz_seeds"]);
    run(&mut seeds)?;
    for target in output(with_tools(nightly(BUILD).args(["fuzz", "list"]))?)?.lines() {
        println!("fuzz {target}: {seconds} s");
        let mut command = nightly(BUILD + Duration::from_secs(seconds));
        command.args(["fuzz", "run", target, "--", "-print_final_stats=1", "-verbosity=0"]);
        command.arg(format!("-max_total_time={seconds}"));
        run(with_tools(&mut command)?)?;
    }
    Ok(())
}

fn nightly(limit: Duration) -> Command {
    let mut command = bounded(limit, "rustup");
    command
        .args(["run", "nightly", "cargo"])
        .current_dir(root())
        // The cargo that runs us told its children to be of its own version.
        .env_remove("RUSTUP_TOOLCHAIN")
        .env_remove("CARGO");
    command
}
