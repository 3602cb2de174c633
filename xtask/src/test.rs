//! `cargo xtask test`: everything, from nothing.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use dwcp_tests::{SKIPPED, target_dir};

use crate::deb::{TOOLS_OF_DEB, deb};
use crate::run::{cargo, installed, run, skip};
use crate::setup::setup_or_skip;

/// For a build from nothing on two cores.
const BUILD: Duration = Duration::from_secs(30 * 60);
/// For all tests once they are built, the end-to-end tests one after the other.
const TEST: Duration = Duration::from_secs(30 * 60);

/// Sets up the laboratory, builds the programs and the packages, and runs every test.
pub(crate) fn test() -> Result<()> {
    setup_or_skip()?;
    build_programs()?;
    build_faulty()?;
    match TOOLS_OF_DEB.iter().find(|program| !installed(program)) {
        // A test installs and purges them.
        None => drop(deb()?),
        Some(missing) => skip("the Debian packages", &format!("no {missing} here"))?,
    }
    let skipped = target_dir()?.join("skipped.txt");
    let _ = fs::remove_file(&skipped);
    let ran = run_tests(&skipped);
    // Last, whatever else was said.
    print!("{}", fs::read_to_string(&skipped).unwrap_or_default());
    ran
}

/// Builds and runs all tests, of which those that are skipped say so in this file.
fn run_tests(skipped: &Path) -> Result<()> {
    if installed("cargo-nextest") {
        let nextest = ["nextest", "run", "--release", "--workspace"];
        run(cargo(BUILD).args(nextest).arg("--no-run"))?;
        run(cargo(TEST).args(nextest).env(SKIPPED, skipped))?;
    } else {
        let tests = ["test", "--release", "--workspace", "--lib", "--bins", "--tests"];
        run(cargo(BUILD).args(tests).arg("--no-run"))?;
        // The end-to-end tests must not share the cores, and the others are quick enough.
        run(cargo(TEST)
            .args(tests)
            .args(["--no-fail-fast", "--", "--test-threads=1"])
            .env(SKIPPED, skipped))?;
    }
    run(cargo(TEST).args(["test", "--release", "--workspace", "--doc"]))
}

/// Builds the agent with fault points, for the tests that have it die at each of them.
pub(crate) fn build_faulty() -> Result<()> {
    let features = ["--features", "fault-points", "--bin", "dwcpd-faulty"];
    run(cargo(BUILD).args(["build", "--release", "--package", "dwcpd"]).args(features))
}

/// Builds `dwcpd` and `dwcpctl`, and what the laboratory runs beside them.
pub(crate) fn build_programs() -> Result<()> {
    run(cargo(BUILD).args([
        "build",
        "--release",
        "--package",
        "dwcpd",
        "--package",
        "dwcpctl",
        "--package",
        "dwcp-control",
        "--package",
        "dwcp-sim",
        "--package",
        "dwcp-wan",
    ]))
}
