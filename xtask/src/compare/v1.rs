//! Path v1 beside socat, and beside QEMU alone, between the same two QEMUs.
//!
//! One guest, booted once and paused, is carried by one contender after the other: see [`Stage`].

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use dwcp_tests::{Agent, AgentConfig, GuestLoad, Kit, Mix, Qemu, QemuSpec, QemuVersion, Role};
use serde_json::json;

use super::machine;
use super::relay::{Relay, Socat};
use super::stage::{Run, Runs, Stage};
use super::table::{ConcatLines, Table, median};
use crate::run::root;
use crate::setup::setup;
use crate::test::build_programs;

/// Least runs that count: what is less tells nothing on a shared machine.
const MIN_RUNS: usize = 5;
/// RAM beside the random data: the guest's kernel and what it keeps of its own. It travels as well, most of it as zero pages.
const BESIDE_MIB: u32 = 256;
/// socat's buffer where it is told one.
const LARGE_BUFFER: u32 = 256 << 10;
/// v1 in the clear is to reach this part of socat's throughput.
const TARGET: f64 = 0.95;

/// How much to measure.
#[derive(Args)]
pub(crate) struct Settings {
    /// MiB of random data in the guest
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(64..=16_384))]
    mib: u32,
    /// Runs of each contender that count; at least 5. One more warms up and compares the memory byte for byte
    #[arg(long, default_value_t = 7)]
    runs: usize,
    /// Only contenders whose name holds this word, and no document: for a look at one of them
    #[arg(long)]
    only: Option<String>,
}

/// Who carries the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    /// Two socats with this buffer; `None` is its own default.
    Socat(Option<u32>),
    /// The agents, over this path, encrypted or not.
    Agents { path: &'static str, tls: bool },
    /// Nobody: QEMU connects to QEMU.
    Direct,
}

impl Contender {
    const ALL: [Contender; 7] = [
        Contender::Socat(None),
        Contender::Socat(Some(LARGE_BUFFER)),
        V1_PLAIN,
        Contender::Agents { path: "v1", tls: true },
        Contender::Agents { path: "v3", tls: false },
        Contender::Agents { path: "v3", tls: true },
        Contender::Direct,
    ];

    fn name(self) -> String {
        match self {
            Contender::Socat(None) => "socat (8 KiB buffer)".into(),
            Contender::Socat(Some(bytes)) => format!("socat -b {bytes}"),
            Contender::Agents { path: "v1", tls: false } => "v1, v1_plain".into(),
            Contender::Agents { path: "v1", .. } => "v1, TLS".into(),
            Contender::Agents { tls: false, .. } => "v3 datacenter, signed only".into(),
            Contender::Agents { .. } => "v3 datacenter, TLS".into(),
            Contender::Direct => "QEMU to QEMU, TCP".into(),
        }
    }
}

/// The one that is held to [`TARGET`].
const V1_PLAIN: Contender = Contender::Agents { path: "v1", tls: false };

/// Measures, prints the table and writes the document.
pub(crate) fn compare(settings: &Settings) -> Result<()> {
    ensure!(settings.runs >= MIN_RUNS || settings.only.is_some(), "--runs: at least {MIN_RUNS}");
    let wanted = |contender: &Contender| {
        settings.only.as_ref().is_none_or(|only| contender.name().contains(only.as_str()))
    };
    let contenders: Vec<Contender> = Contender::ALL.into_iter().filter(wanted).collect();
    ensure!(!contenders.is_empty(), "--only: no contender has that word in its name");
    println!("building dwcpd and dwcpctl");
    build_programs()?;
    let kit = setup()?;
    let socat = Socat::ensure(&kit)?;
    println!("starting a guest with {} MiB of random data, and the agents", settings.mib);
    let mut bench = Bench::start(kit, socat, settings.mib)?;

    let load_before = machine::load()?;
    let runs = Runs::measure(
        contenders,
        settings.runs,
        |contender| contender.name(),
        |&contender, warm_up| bench.run(contender, warm_up),
    )?;
    let report = Report { runs, load: (load_before, machine::load()?) };
    let table = report.table()?.to_string();
    println!("\n{table}");
    for line in report.verdict() {
        println!("{line}");
    }
    if settings.only.is_none() {
        let document = report.document(&bench, settings, &table)?;
        fs::write(root().join("docs/compare-v1.md"), document).context("write docs/compare-v1.md")?;
        println!("written to docs/compare-v1.md");
    }
    Ok(())
}

/// The guest, and all that may carry it.
struct Bench {
    socat: Socat,
    in_the_clear: (Agent, Agent),
    encrypted: (Agent, Agent),
    // Last, since the agents' folders are in its own.
    stage: Stage,
}

impl Bench {
    fn start(kit: Kit, socat: Socat, mib: u32) -> Result<Self> {
        let spec = QemuSpec {
            ram_mib: mib + BESIDE_MIB,
            prealloc: true,
            load: GuestLoad { mib, mix: Mix::Random, ..GuestLoad::default() }.idle(),
            ..QemuSpec::new(QemuVersion::V10_0, Role::Source)
        };
        let stage = Stage::start(kit, spec, None)?;
        let pair = |name: &str, config: &AgentConfig| {
            let folder = stage.dir().join(name);
            fs::create_dir(&folder)?;
            Agent::pair(&folder, config.clone(), config.clone())
        };
        let in_the_clear =
            AgentConfig { v1_plain: true, datacenter_encryption: "none", ..AgentConfig::default() };
        let (in_the_clear, encrypted) =
            (pair("clear", &in_the_clear)?, pair("tls", &AgentConfig::default())?);
        Ok(Bench { socat, in_the_clear, encrypted, stage })
    }

    /// One move to a fresh destination. With `compare` both memories are compared afterwards.
    fn run(&mut self, contender: Contender, compare: bool) -> Result<Run> {
        let Bench { socat, in_the_clear, encrypted, stage } = self;
        let carry = |stage: &Stage, destination: &Qemu| match contender {
            Contender::Direct => {
                destination.watch().run("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
                let state = destination.watch().run("query-migrate", json!({}))?;
                let port = state["socket-address"][0]["port"].as_str().context("QEMU names no port")?;
                stage.measured(destination, &[], || stage.migrate(&format!("tcp:127.0.0.1:{port}")))
            }
            Contender::Socat(buffer) => {
                let (from, to) = (destination.dir().join("from.sock"), destination.dir().join("to.sock"));
                let uri = |path: &PathBuf| format!("unix:{}", path.display());
                destination.watch().run("migrate-incoming", json!({ "uri": uri(&to) }))?;
                let relay = Relay::start(socat, buffer, &from, &to)?;
                stage.measured(destination, &relay.pids(), || stage.migrate(&uri(&from)))
            }
            Contender::Agents { path, tls } => {
                let (a, b) = if tls { encrypted } else { in_the_clear };
                stage.by_agents((a, b), destination, &["--path", path, "--mode", "datacenter"], |result| {
                    let encryption = if tls { "tls" } else { "none" };
                    let as_asked = result["path"] == path && result["encryption"] == encryption;
                    ensure!(as_asked, "not over {path} with encryption {encryption}: {result}");
                    Ok(())
                })
            }
        };
        stage.move_guest(false, compare, carry).with_context(|| contender.name())
    }
}

/// All that was measured.
struct Report {
    runs: Runs<Contender>,
    /// Before and after.
    load: (f64, f64),
}

impl Report {
    fn table(&self) -> Result<Table> {
        let head = [
            "median of the runs",
            "seconds",
            "least to most",
            "total-time",
            "arrived",
            "GB/s",
            "CPU s, movers",
            "CPU s, QEMUs",
            "CPU s, machine",
            "CPU s/GB, machine",
        ];
        let mut table = Table::new(&head);
        for (contender, runs) in &self.runs.of {
            let of = |figure: fn(&Run) -> f64| median(runs.iter().map(figure)).context("no runs");
            let least = runs.iter().map(|run| run.sent).fold(f64::INFINITY, f64::min);
            let most = runs.iter().map(|run| run.sent).fold(0.0, f64::max);
            table.line(vec![
                contender.name(),
                format!("{:.3}", of(|run| run.sent)?),
                format!("{least:.3} - {most:.3}"),
                format!("{:.3}", of(|run| run.total_time)?),
                format!("{:.3}", of(|run| run.arrived)?),
                format!("{:.2}", of(Run::rate)?),
                format!("{:.2}", of(|run| run.used.movers)?),
                format!("{:.2}", of(|run| run.used.vmms)?),
                format!("{:.2}", of(|run| run.used.machine)?),
                format!("{:.2}", of(|run| run.used.machine / run.bytes * 1e9)?),
            ]);
        }
        Ok(table)
    }

    /// v1 in the clear beside each socat, by the medians, and by the pairs of each round.
    fn verdict(&self) -> Vec<String> {
        let runs = |wanted| self.runs.by(|&contender| contender == wanted);
        let Some(ours) = runs(V1_PLAIN) else { return Vec::new() };
        let beside = |contender: Contender| {
            let theirs = runs(contender)?;
            let rates = |runs: &[Run]| median(runs.iter().map(Run::rate));
            let medians = rates(ours)? / rates(theirs)?;
            let paired = median(ours.iter().zip(theirs).map(|(our, their)| our.rate() / their.rate()))?;
            let arrived =
                median(theirs.iter().map(|run| run.arrived))? / median(ours.iter().map(|run| run.arrived))?;
            let verdict = if medians >= TARGET { "met" } else { "missed" };
            Some(format!(
                "{} carries {medians:.2} x the throughput of {} (pair by pair {paired:.2} x; by arrival {arrived:.2} x): \
                 the aim of {TARGET} x is {verdict}",
                V1_PLAIN.name(),
                contender.name(),
            ))
        };
        Contender::ALL.into_iter().filter(|c| matches!(c, Contender::Socat(_))).filter_map(beside).collect()
    }

    fn document(&self, bench: &Bench, settings: &Settings, table: &str) -> Result<String> {
        let mut facts = vec![format!("day: {}", machine::today()?)];
        facts.extend(machine::describe(&bench.stage.kit, bench.stage.cores)?);
        facts.push(format!("relay: socat {}", bench.socat.version()?));
        facts.extend(self.runs.circumstances(self.load));
        let runs = self.runs.of.iter().map(|(_, runs)| runs.len()).min().unwrap_or(0);
        let facts = facts.concat_lines("- ");
        let verdict = self.verdict().concat_lines("- ");
        Ok(format!(
            "# Path v1 beside socat\n\n\
             Made by `cargo xtask compare v1`; make it anew with that.\n\n\
             The same guest goes from the same QEMU to a fresh QEMU on the same machine, carried by one contender after the other: \
             two socats (unix socket, TCP over the loopback, unix socket), two agents in their place, or nobody. The guest \
             has {mib} MiB of random data and {BESIDE_MIB} MiB beside it, is paused, and the destination's memory is \
             preallocated and touched, so that neither the guest nor first touches are measured. Bandwidth is not limited.\n\n\
             ## The machine\n\n{facts}\n\
             ## What was measured\n\n\
             {runs} runs of each, in one go, the order turned round every time, after one run of each to warm up, in which both \
             memories were compared byte for byte.\n\n\
             {table}\n\
             - *seconds*: from the source's `setup` to its `completed`, by its own time stamps; *least to most* of the same; \
             *total-time* as its `query-migrate` says; *arrived*: to the destination's `completed`.\n\
             - *GB/s*: 10^9 bytes of memory that the source sent, over *seconds*.\n\
             - *CPU s*: *movers* are both agents or both socats, *QEMUs* are both; *machine* is all from before the first \
             command to after the last, so for the agents it holds `dwcpctl`, the checks before and the handover after.\n\
             - The v3 lines are for information: they are what the chunks, their hashes and signatures cost here.\n\n\
             ## Result\n\n{verdict}",
            mib = settings.mib,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_contenders_apart() {
        let names: std::collections::HashSet<_> = Contender::ALL.map(Contender::name).into();
        assert_eq!(names.len(), Contender::ALL.len());
    }
}
