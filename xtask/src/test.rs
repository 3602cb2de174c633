//! `cargo xtask test`: everything, from nothing.

use std::time::Duration;

use anyhow::Result;

use crate::deb::deb;
use crate::run::{cargo, installed, run};
use crate::setup::setup;

/// For a build from nothing on two cores.
const BUILD: Duration = Duration::from_secs(30 * 60);
/// For all tests, the end-to-end tests one after the other.
const TEST: Duration = Duration::from_secs(30 * 60);

/// Sets up the laboratory, builds the programs and the package, and runs every test.
pub(crate) fn test() -> Result<()> {
    setup()?;
    build_programs()?;
    // A test installs and purges it.
    deb()?;
    if installed("cargo-nextest") {
        run(cargo(TEST).args(["nextest", "run", "--release", "--workspace"]))?;
    } else {
        // The end-to-end tests must not share the cores, and the others are quick enough.
        run(cargo(TEST)
            .args(["test", "--release", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"])
            .args(["--", "--test-threads=1"]))?;
    }
    run(cargo(TEST).args(["test", "--release", "--workspace", "--doc"]))
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
        "dwcp-wan",
    ]))
}
