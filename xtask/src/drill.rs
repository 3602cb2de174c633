//! `cargo xtask drill`: what only a fleet, or many turns of a flag, show.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use dwcp_tests::{QemuVersion, TurnPlan, Turned, target_dir, turn_in_flight};

use crate::run::{bounded, cargo, root, run};
use crate::setup::setup;
use crate::test::build_programs;

const BUILD: Duration = Duration::from_secs(30 * 60);
const DRILL: Duration = Duration::from_secs(30 * 60);
/// The page that is written.
const PAGE: &str = "docs/drill-rollback.md";
/// The same for the turns.
const SWITCH_PAGE: &str = "docs/drill-switch.md";
/// The promise: from the flag to v1.
const PROMISE: f64 = 5.0;

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
    /// Turn the flag off and on at random moments of migrations of real guests, some with a cut link; writes docs/drill-switch.md
    Switch {
        /// Migrations
        #[arg(long, default_value_t = 20)]
        runs: u32,
        /// Of the moments
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
}

/// Builds what it needs, and holds it.
pub(crate) fn drill(drill: &Drill) -> Result<()> {
    match drill {
        Drill::Rollback { nodes, rounds, dry_run } => rollback(nodes, *rounds, *dry_run),
        Drill::Switch { runs, seed } => switch(*runs, *seed),
    }
}

fn rollback(nodes: &[u32], rounds: u32, dry_run: bool) -> Result<()> {
    run(cargo(BUILD).args(["build", "--release", "--package", "dwcp-control", "--package", "dwcp-fleet"]))?;
    let programs = target_dir()?.join("release");
    let nodes = nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = bounded(DRILL, programs.join("dwcp-fleet"));
    command.arg("--control").arg(programs.join("dwcp-control")).args(["--nodes", &nodes, "--strict"]);
    command.args(["--rounds", &rounds.to_string()]);
    // A poll that fails is nothing that a backtrace would explain, and in a flood they would cost more than the polls.
    command.env("RUST_LIB_BACKTRACE", "0");
    if !dry_run {
        command.arg("--out").arg(root().join(PAGE));
    }
    run(&mut command)
}

/// Migrates `runs` guests and turns their flag; every failure is in the page, and in the end an error.
fn switch(runs: u32, seed: u64) -> Result<()> {
    build_programs()?;
    let kit = setup()?;
    let mut rows = String::new();
    let (mut failed, mut slowest, mut late) = (0, 0.0f64, 0);
    // splitmix64: any stream of numbers will do that a seed brings back.
    let mut state = seed;
    let mut random = |least: u64, most: u64| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        least + (mixed ^ (mixed >> 31)) % (most - least + 1)
    };
    for n in 1..=runs {
        let first = random(2 << 20, 9 << 20);
        let second = first + random(6 << 20, 12 << 20);
        let third = second + random(1 << 20, 4 << 20);
        let plan = TurnPlan {
            version: [QemuVersion::V10_0, QemuVersion::V7_2][n as usize % 2],
            live: !n.is_multiple_of(3),
            at: vec![first, second, third][..[1, 3][random(0, 1) as usize]].to_vec(),
            cut: n % 4 == 1,
            bandwidth: "60Mbit".into(),
            channels: 1,
            direct: false,
        };
        let outcome = turn_in_flight(&kit, &plan);
        let (words, good) = row(n, &plan, outcome.as_ref());
        print!("{words}");
        rows.push_str(&words);
        failed += u32::from(!good);
        if let Ok(outcome) = outcome {
            slowest = outcome.seconds_to_v1.iter().fold(slowest, |slowest, s| slowest.max(*s));
            late += outcome.late_v3_bytes;
        }
    }
    let page = format!(
        "# The flag, turned under running migrations\n\n\
         Made by `cargo xtask drill switch --runs {runs} --seed {seed}`; make it anew with that. Real QEMUs under TCG, internet mode at 60 Mbit/s. \
         A live guest checks its own memory for five seconds afterwards; a paused one's RAM is compared byte for byte. With a cut, \
         all connections are reset before the first turn and come back once v3 is silent.\n\n\
         {failed} of {runs} failed. Slowest from the flag's file to the agent's word that it is on v1: {slowest:.2} s (promised: {PROMISE} s; the \
         agent looks at the file by itself). v3 bytes later than a second after that word: {late}.\n\n\
         | run | QEMU | guest | cut | turns at MiB on the wire | to v1, s | late v3 bytes | seconds | downtime ms | result |\n\
         |--:|---|---|---|---|---|--:|--:|--:|---|\n{rows}"
    );
    fs::write(root().join(SWITCH_PAGE), page)?;
    println!("written to {SWITCH_PAGE}");
    ensure!(failed == 0 && late == 0 && slowest < PROMISE, "{failed} of {runs} failed");
    Ok(())
}

/// One line of the table, and whether all of it held.
fn row(n: u32, plan: &TurnPlan, outcome: Result<&Turned, &anyhow::Error>) -> (String, bool) {
    let guest = if plan.live { "live" } else { "paused" };
    let cut = if plan.cut { "yes" } else { "" };
    let at: Vec<String> =
        plan.at.iter().map(|at| format!("{:.1}", *at as f64 / f64::from(1 << 20))).collect();
    let mut line = format!("| {n} | {:?} | {guest} | {cut} | {} ", plan.version, at.join(", "));
    let good = match outcome {
        Ok(Turned { result, seconds_to_v1, late_v3_bytes }) => {
            let to_v1: Vec<String> = seconds_to_v1.iter().map(|s| format!("{s:.2}")).collect();
            let seconds = result["total_seconds"].as_f64().unwrap_or_default();
            let downtime = result["downtime_ms"].as_f64().unwrap_or_default();
            let _ = writeln!(
                line,
                "| {} | {late_v3_bytes} | {seconds:.1} | {downtime:.0} | moved |",
                to_v1.join(", ")
            );
            true
        }
        Err(error) => {
            // All of it, with the agents' logs; the table has the cause.
            eprintln!("{error:#}");
            let words = error.root_cause().to_string();
            let first: String = words.lines().next().unwrap_or_default().chars().take(120).collect();
            let _ = writeln!(line, "| | | | | FAILED: {} |", first.replace('|', "/"));
            false
        }
    };
    (line, good)
}
