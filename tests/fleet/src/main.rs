//! `dwcp-fleet`: a fleet of simulated nodes in one process, against one real `dwcp-control` on the same machine, over TLS.
//!
//! The nodes decide by `dwcp-flags`, as an agent does: its document, lease, schedule and reports, signed. Only what hangs on
//! a node is left out: no guests, no disk. Each node stands for one with a migration running on v3.
//!
//! ```text
//! main ─► drill (the steps, in order) ─► fleet of nodes ─TLS─► dwcp-control
//!               └─► table (Markdown)
//! ```

mod drill;
mod fleet;
mod http;
mod node;
mod server;
mod table;
mod tls;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files of this process, and of the server, that are no node's connection. Some of theirs are there twice for a moment.
const OTHER_FILES: u64 = 1000;

/// Turn a fleet to v3 and back, and measure how long the last node takes.
#[derive(Debug, Parser)]
#[command(name = "dwcp-fleet", version)]
struct Arguments {
    /// Nodes of the fleet; several sizes are measured one after the other.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000")]
    nodes: Vec<usize>,
    /// The server's program.
    #[arg(long, value_name = "FILE")]
    control: PathBuf,
    /// Rollbacks of each kind.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Where the table goes; to standard output in any case.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Fail if a bound is missed: 3 s for reachable nodes, 4 s for partitioned ones, no lease lost by a planned restart.
    #[arg(long)]
    strict: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).context("open many files")?;
    let most = arguments.nodes.iter().max().copied().unwrap_or_default() as u64;
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= most + OTHER_FILES),
        "{most} nodes need a limit of open files (ulimit -Hn) of {}, not {}",
        most + OTHER_FILES,
        limit.maximum.unwrap_or_default()
    );
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut results = Vec::new();
    for &nodes in &arguments.nodes {
        let result = runtime.block_on(drill::drill(&arguments.control, nodes, arguments.rounds));
        results.push(result.with_context(|| format!("{nodes} nodes"))?);
    }
    let table = table::table(&results);
    println!("{table}");
    if let Some(out) = &arguments.out {
        std::fs::write(out, &table).with_context(|| format!("write {}", out.display()))?;
    }
    match results.iter().find_map(drill::Result::missed).filter(|_| arguments.strict) {
        Some(missed) => anyhow::bail!("{missed}"),
        None => Ok(()),
    }
}
