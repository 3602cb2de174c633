//! `cargo xtask drill`: what only a fleet shows.

use std::time::Duration;

use anyhow::Result;
use dwcp_tests::target_dir;

use crate::run::{bounded, cargo, root, run};

const BUILD: Duration = Duration::from_secs(30 * 60);
const DRILL: Duration = Duration::from_secs(30 * 60);
/// The page that is written.
const PAGE: &str = "docs/drill-rollback.md";

/// Which drill.
#[derive(clap::Subcommand)]
pub(crate) enum Drill {
    /// Turn a fleet of simulated nodes to v3 and back, cut some off, restart and kill the server; writes docs/drill-rollback.md
    Rollback {
        /// Sizes of the fleet
        #[arg(long, value_delimiter = ',', default_value = "1000,10000")]
        nodes: Vec<u32>,
        /// Rollbacks of each kind
        #[arg(long, default_value_t = 3)]
        rounds: u32,
        /// Print the page and write nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Builds what it needs, and holds it.
pub(crate) fn drill(drill: &Drill) -> Result<()> {
    let Drill::Rollback { nodes, rounds, dry_run } = drill;
    run(cargo(BUILD).args(["build", "--release", "--package", "dwcp-control", "--package", "dwcp-fleet"]))?;
    let programs = target_dir()?.join("release");
    let nodes = nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = bounded(DRILL, programs.join("dwcp-fleet"));
    command.arg("--control").arg(programs.join("dwcp-control")).args(["--nodes", &nodes, "--strict"]);
    command.args(["--rounds", &rounds.to_string()]);
    if !dry_run {
        command.arg("--out").arg(root().join(PAGE));
    }
    run(&mut command)
}
