//! Path v1 beside socat, and beside QEMU alone, between the same two QEMUs.
//!
//! One guest, booted once and paused, goes to a fresh destination again and again: a contender takes its memory there, the
//! destination is thrown away, and the source's copy is woken for a moment so that it may leave once more. Every
//! contender is timed by the same clock: the stamps that the VMMs themselves put on their migration events.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use dwcp_tests::{
    Agent, AgentConfig, Event, GuestLoad, Kit, Mix, Qemu, QemuSpec, QemuVersion, Role, VM, ram,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cost::{Usage, quiet};
use super::machine;
use super::relay::{Relay, Socat};
use super::table::{Table, median};
use crate::run::root;
use crate::setup::setup;
use crate::test::build_programs;

/// Least runs that count: what is less tells nothing on a shared machine.
const MIN_RUNS: usize = 5;
/// RAM beside the random data: the guest's kernel and what it keeps of its own. It travels as well, most of it as zero pages.
const BESIDE_MIB: u32 = 256;
/// socat's buffer where it is told one.
const LARGE_BUFFER: u32 = 256 << 10;
/// No limit of bandwidth: far above what memory itself carries, and the same as the agents tell QEMU.
const UNLIMITED: u64 = 1 << 40;
/// For one move of the guest.
const MOVE: Duration = Duration::from_secs(120);
/// Between two looks at a migration's state: rare, so that looking costs none of the time that is measured.
const LOOK: Duration = Duration::from_millis(50);
/// How long a run waits for a machine without other work.
const PATIENCE: Duration = Duration::from_secs(60);
/// A run counts as disturbed when others took so large a part of the machine during it. The kernel's own work, which no process
/// is charged for, and the two QMP clients are below that.
const DISTURBED: f64 = 0.15;
/// How often a disturbed run is made again, in a row.
const AGAIN: usize = 5;
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

/// What one move took. Times are in seconds from the source's `setup`.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// To the source's `completed`.
    sent: f64,
    /// To the destination's `completed`.
    arrived: f64,
    /// `total-time` of the source's `query-migrate`.
    total_time: f64,
    /// Bytes of memory that the source sent.
    bytes: f64,
    /// CPU seconds, from before the first command to after the last.
    used: Usage,
    /// CPU seconds of others: what is neither the contender's nor the VMMs', and what the host took.
    others: f64,
    /// Whether those were more than [`DISTURBED`].
    disturbed: bool,
}

impl Run {
    fn rate(&self) -> f64 {
        self.bytes / self.sent / 1e9
    }
}

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
    let mut results: Vec<(Contender, Vec<Run>)> = contenders.iter().map(|&c| (c, Vec::new())).collect();
    let mut repeated = 0;
    for round in 0..=settings.runs {
        for index in order(results.len(), round) {
            let (contender, runs) = &mut results[index];
            let warm_up = round == 0;
            let mut run = bench.run(*contender, warm_up)?;
            for _ in 0..AGAIN {
                if warm_up || !run.disturbed {
                    break;
                }
                repeated += 1;
                println!("  others used {:.2} CPU s of the last run: once more", run.others);
                run = bench.run(*contender, false)?;
            }
            let (name, of) = (contender.name(), settings.runs);
            println!(
                "  {round}/{of} {name:<28} {:.3} s, arrived {:.3} s, {:.2} GB/s, CPU {:.2} + {:.2} of {:.2} s",
                run.sent,
                run.arrived,
                run.rate(),
                run.used.movers,
                run.used.vmms,
                run.used.machine
            );
            if !warm_up {
                runs.push(run);
            }
        }
    }
    let report = Report { results, repeated, load: (load_before, machine::load()?) };
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

/// Every other round goes backwards, and each pair of rounds begins with another contender, so that nobody always comes after the
/// same one.
fn order(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).map(|index| (index + round / 2) % count.max(1)).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// The guest, and all that may carry it.
struct Bench {
    kit: Kit,
    socat: Socat,
    cores: usize,
    spec: QemuSpec,
    source: Qemu,
    in_the_clear: (Agent, Agent),
    encrypted: (Agent, Agent),
    moves: u32,
    // Last, so that the processes are gone before their folder is.
    dir: TempDir,
}

impl Bench {
    fn start(kit: Kit, socat: Socat, mib: u32) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let spec = QemuSpec {
            ram_mib: mib + BESIDE_MIB,
            prealloc: true,
            load: GuestLoad { mib, mix: Mix::Random, ..GuestLoad::default() }.idle(),
            ..QemuSpec::new(QemuVersion::V10_0, Role::Source)
        };
        let source = Qemu::launch(&kit, dir.path(), "source", &spec)?;
        let pair = |name: &str, config: &AgentConfig| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder)?;
            Agent::pair(&folder, config.clone(), config.clone())
        };
        let in_the_clear =
            AgentConfig { v1_plain: true, datacenter_encryption: "none", ..AgentConfig::default() };
        let (in_the_clear, encrypted) =
            (pair("clear", &in_the_clear)?, pair("tls", &AgentConfig::default())?);
        let source = source.booted()?;
        source.watch().run("stop", json!({}))?;
        let cores = std::thread::available_parallelism()?.get();
        Ok(Bench { kit, socat, cores, spec, source, in_the_clear, encrypted, moves: 0, dir })
    }

    /// One move to a fresh destination. With `compare` both memories are compared afterwards.
    fn run(&mut self, contender: Contender, compare: bool) -> Result<Run> {
        self.moves += 1;
        let name = format!("destination-{}", self.moves);
        let mut destination = Qemu::launch(&self.kit, self.dir.path(), &name, &self.spec.destination())?;
        for vm in [&self.source, &destination] {
            let events = json!([{ "capability": "events", "state": true }]);
            vm.watch().run("migrate-set-capabilities", json!({ "capabilities": events }))?;
        }
        // What the agents told QEMU in an earlier run must not help or hinder anyone.
        let parameters =
            json!({ "max-bandwidth": UNLIMITED, "avail-switchover-bandwidth": 0, "downtime-limit": 300 });
        self.source.watch().run("migrate-set-parameters", parameters)?;
        self.source.watch().events().for_each(drop);

        let run = self.timed(contender, &destination).with_context(|| contender.name())?;
        if compare {
            let difference = ram::compare(&self.source, &destination, self.spec.ram_bytes())?;
            ensure!(difference.is_none(), "{}: the memories differ: {difference:?}", contender.name());
        }
        // Never two that run: the other one first.
        destination.kill();
        fs::remove_dir_all(destination.dir())?;
        for command in ["cont", "stop"] {
            self.source.watch().run(command, json!({}))?;
        }
        Ok(run)
    }

    fn timed(&self, contender: Contender, destination: &Qemu) -> Result<Run> {
        match contender {
            Contender::Direct => {
                destination.watch().run("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
                let state = destination.watch().run("query-migrate", json!({}))?;
                let port = state["socket-address"][0]["port"].as_str().context("QEMU names no port")?;
                self.measured(destination, &[], || self.migrate(&format!("tcp:127.0.0.1:{port}")))
            }
            Contender::Socat(buffer) => {
                let (from, to) = (destination.dir().join("from.sock"), destination.dir().join("to.sock"));
                let uri = |path: &PathBuf| format!("unix:{}", path.display());
                destination.watch().run("migrate-incoming", json!({ "uri": uri(&to) }))?;
                let relay = Relay::start(&self.socat, buffer, &from, &to)?;
                self.measured(destination, &relay.pids(), || self.migrate(&uri(&from)))
            }
            Contender::Agents { path, tls } => {
                let (a, b) = if tls { &self.encrypted } else { &self.in_the_clear };
                let qmp = destination.qmp_path();
                b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &a.node()])?.success()?;
                let pids: Vec<u32> = [a, b].into_iter().filter_map(Agent::pid).collect();
                let moved = || {
                    let (qmp, to) = (self.source.qmp_path(), b.target()?);
                    let qmp = qmp.display();
                    a.ctl(&[
                        &"migrate",
                        &VM,
                        &"--qmp",
                        &qmp,
                        &"--to",
                        &to,
                        &"--path",
                        &path,
                        &"--mode",
                        &"datacenter",
                        &"--json",
                    ])
                };
                let check = || {
                    let result = moved()?.success()?.json()?;
                    let encryption = if tls { "tls" } else { "none" };
                    let as_asked = result["path"] == path && result["encryption"] == encryption;
                    ensure!(as_asked, "not over {path} with encryption {encryption}: {result}");
                    Ok(())
                };
                let logs = || format!("agent a:\n{}\nagent b:\n{}", a.log(), b.log());
                self.measured(destination, &pids, check).with_context(logs)
            }
        }
    }

    /// QEMU's own migration to `uri`.
    fn migrate(&self, uri: &str) -> Result<()> {
        self.source.watch().run("migrate", json!({ "uri": uri }))?;
        Ok(())
    }

    /// Waits for quiet, lets `action` begin or do the whole, waits for both ends and reads what it took.
    fn measured(
        &self,
        destination: &Qemu,
        movers: &[u32],
        action: impl FnOnce() -> Result<()>,
    ) -> Result<Run> {
        let vmms = [self.source.pid(), destination.pid()];
        if !quiet(self.cores, PATIENCE)? {
            println!("  the machine has other work, and it does not end");
        }
        let (start, before) = (Instant::now(), Usage::sample(movers, &vmms)?);
        action()?;
        let state = completed(&self.source).context("source")?;
        completed(destination).context("destination")?;
        let used = Usage::sample(movers, &vmms)?.since(before);
        let capacity = start.elapsed().as_secs_f64() * self.cores as f64;

        let sent: Vec<Event> = self.source.watch().events().collect();
        let received: Vec<Event> = destination.watch().events().collect();
        let began = stamp(&sent, "setup")?;
        let since = |micros: u64| micros.saturating_sub(began) as f64 / 1e6;
        let number = |value: &Value| value.as_f64().with_context(|| format!("no figures in {state}"));
        let others = (used.machine - used.movers - used.vmms).max(0.0) + used.stolen;
        Ok(Run {
            sent: since(stamp(&sent, "completed")?),
            arrived: since(stamp(&received, "completed")?),
            total_time: number(&state["total-time"])? / 1e3,
            bytes: number(&state["ram"]["transferred"])?,
            used,
            others,
            disturbed: others > DISTURBED * capacity,
        })
    }
}

/// Waits until a VMM's migration is done, and gives what it says of it.
fn completed(vm: &Qemu) -> Result<Value> {
    let start = Instant::now();
    loop {
        let state = vm.watch().run("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(state),
            Some("failed" | "cancelled") => bail!("QEMU says {state}"),
            _ if start.elapsed() > MOVE => bail!("not done after {} s: {state}", MOVE.as_secs()),
            _ => sleep(LOOK),
        }
    }
}

/// QEMU's own stamp on the migration's change to `status`, microseconds since the epoch.
fn stamp(events: &[Event], status: &str) -> Result<u64> {
    let found = events.iter().find(|event| event.name == "MIGRATION" && event.data["status"] == status);
    Ok(found.with_context(|| format!("QEMU announced no \"{status}\": {events:?}"))?.micros)
}

/// All that was measured.
struct Report {
    results: Vec<(Contender, Vec<Run>)>,
    repeated: usize,
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
        for (contender, runs) in &self.results {
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
        let runs = |contender| {
            self.results.iter().find(|(found, _)| *found == contender).map(|(_, runs)| runs.as_slice())
        };
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
        facts.extend(machine::describe(&bench.kit, bench.cores)?);
        facts.push(format!("relay: socat {}", bench.socat.version()?));
        let runs = self.results.iter().map(|(_, runs)| runs.len()).min().unwrap_or(0);
        let all = || self.results.iter().flat_map(|(_, runs)| runs);
        let others = median(all().map(|run| run.others)).unwrap_or_default();
        let disturbed = all().filter(|run| run.disturbed).count();
        let stolen = all().map(|run| run.used.stolen).fold(0.0, f64::max);
        facts.push(format!(
            "load average over one minute: {:.2} before, {:.2} after (the comparison's own work included)",
            self.load.0, self.load.1
        ));
        facts.push(format!(
            "noise: beside the contender and the QEMUs {others:.2} CPU s were used in the median run, mostly by the kernel; the \
             host took {stolen:.2} s at the most; {} disturbed runs were made again, {disturbed} disturbed ones are in the table",
            self.repeated
        ));
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

/// Lines of text out of their words.
trait ConcatLines {
    fn concat_lines(&self, mark: &str) -> String;
}

impl ConcatLines for Vec<String> {
    fn concat_lines(&self, mark: &str) -> String {
        self.iter().map(|line| format!("{mark}{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_turns_round_and_leaves_nobody_out() {
        assert_eq!(order(3, 0), [0, 1, 2]);
        assert_eq!(order(3, 1), [2, 1, 0]);
        assert_eq!(order(3, 2), [1, 2, 0]);
        for round in 0..8 {
            let mut sorted = order(7, round);
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
    }

    #[test]
    fn names_tell_the_contenders_apart() {
        let names: std::collections::HashSet<_> = Contender::ALL.map(Contender::name).into();
        assert_eq!(names.len(), Contender::ALL.len());
    }
}
