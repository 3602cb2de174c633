//! Datacenter mode beside path v1, and beside QEMU alone, over a cable between two network namespaces.
//!
//! The guest is carried by one contender after the other: see [`Stage`]. Once it stands paused, once it runs idle.

mod growth;
mod latency;
mod report;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use dwcp_tests::{
    ATTACHES, Agent, AgentConfig, Backing, Cable, End, GuestLoad, Kit, Mix, Qemu, QemuSpec, QemuVersion, Role,
};
use serde_json::{Value, json};

use self::latency::Latency;
use self::report::{Report, Section};
use super::machine;
use super::stage::{PATIENCE, Run, Runs, Stage};
use crate::setup::setup;
use crate::test::build_programs;

/// RAM beside the random data: the guest's kernel and what it keeps of its own. It travels as well, most of it as zero pages.
const BESIDE_MIB: u32 = 256;
/// Pages that an idle guest looks at in a second: enough to tell that it lives.
const IDLE_CHECKS: u32 = 500;
/// Channels of QEMU's own multifd.
const CHANNELS: u32 = 2;

/// RAM of a guest with so much data, both in MiB. Beyond 2 GiB its kernel takes more: with 320 MiB beside 4 GiB it ends.
fn ram_mib(mib: u32) -> u32 {
    mib + BESIDE_MIB + mib.saturating_sub(2048) / 8
}

/// How much to measure.
#[derive(Args)]
pub(crate) struct Settings {
    /// MiB of random data in the guest
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(64..=16_384))]
    ram: u32,
    /// Runs of each contender that count. One more warms up and compares the memory byte for byte
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only contenders whose name holds one of these words, and no document; may be given several times
    #[arg(long)]
    only: Vec<String>,
    /// The guest's state; all of them if not given
    #[arg(long)]
    guest: Option<GuestState>,
    /// Seconds that a run waits for a machine without other work; with 0, disturbed runs are not made again
    #[arg(long, default_value_t = PATIENCE.as_secs())]
    patience: u64,
    /// Measure how time and memory grow with streams and with the guest instead, memory in internet mode, too; writes
    /// docs/compare-dc-growth.md
    #[arg(long)]
    growth: bool,
}

/// What the guest does while it moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum GuestState {
    /// Nothing at all.
    Paused,
    /// Next to nothing.
    Idle,
}

impl GuestState {
    fn name(self) -> &'static str {
        match self {
            GuestState::Paused => "paused",
            GuestState::Idle => "idle",
        }
    }
}

/// Who carries the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    /// Nobody: QEMU connects to QEMU, over one connection or several.
    Qemu { multifd: bool },
    /// The agents, by path v1.
    V1 { tls: bool },
    /// The agents, by path v3 in datacenter mode.
    V3 { tls: bool, mapped: bool, streams: u32 },
    /// The agents, by path v3 in internet mode: for what memory it takes.
    Internet { mapped: bool },
    /// The agents, by path v3 in datacenter mode without TLS, into mapped RAM over one stream, from QEMU's multifd.
    Channels { channels: u8 },
    /// The agents, by path v3 in datacenter mode, into mapped RAM, which the source's agent reads itself.
    Direct { tls: bool, streams: u32 },
}

impl Contender {
    fn all() -> Vec<Contender> {
        let mut all = vec![QEMU, Contender::Qemu { multifd: true }, V1, Contender::V1 { tls: true }];
        for tls in [false, true] {
            for mapped in [true, false] {
                all.extend([1, 2, 4].map(|streams| Contender::V3 { tls, mapped, streams }));
            }
        }
        all.extend([2, 4].map(|channels| Contender::Channels { channels }));
        for tls in [false, true] {
            all.extend([1, 2, 4].map(|streams| Contender::Direct { tls, streams }));
        }
        all
    }

    fn name(self) -> String {
        let over = |tls| if tls { "TLS" } else { "plain" };
        let some = |streams| format!("{streams} stream{}", if streams == 1 { "" } else { "s" });
        match self {
            Contender::Qemu { multifd: false } => "QEMU to QEMU".into(),
            Contender::Qemu { multifd: true } => format!("QEMU to QEMU, multifd {CHANNELS}"),
            Contender::V1 { tls } => format!("v1, {}", over(tls)),
            Contender::V3 { tls, mapped, streams } => {
                let sink = if mapped { "mapped" } else { "stream" };
                format!("v3, {}, {sink} sink, {}", over(tls), some(streams))
            }
            Contender::Internet { mapped } => {
                format!("v3, internet mode, {}", if mapped { "mapped sink" } else { "cache" })
            }
            Contender::Channels { channels } => {
                format!("v3, plain, mapped sink, 1 stream, {channels} channels")
            }
            Contender::Direct { tls, streams } => {
                format!("v3, {}, direct source, mapped sink, {}", over(tls), some(streams))
            }
        }
    }
}

const QEMU: Contender = Contender::Qemu { multifd: false };
const V1: Contender = Contender::V1 { tls: false };

/// Measures, prints the tables and writes the document.
pub(crate) fn compare(settings: &Settings) -> Result<()> {
    println!("building dwcpd and dwcpctl");
    build_programs()?;
    let kit = setup()?;
    if settings.growth {
        return growth::measure(&kit, settings);
    }
    let wanted = |contender: &Contender| {
        settings.only.is_empty() || settings.only.iter().any(|word| contender.name().contains(word.as_str()))
    };
    let contenders: Vec<Contender> = Contender::all().into_iter().filter(wanted).collect();
    ensure!(!contenders.is_empty(), "--only: no contender has such a word in its name");
    println!("starting a guest with {} MiB of random data, and the agents", settings.ram);
    let mut bench = Bench::start(&kit, settings.ram, settings.patience)?;
    let before = machine::load()?;
    let mut sections = Vec::new();
    for state in [GuestState::Paused, GuestState::Idle] {
        if settings.guest.is_none_or(|guest| guest == state) {
            println!("the guest is {}", state.name());
            let runs = bench.measure(contenders.clone(), settings.runs, state)?;
            sections.push(Section { state, runs, latencies: std::mem::take(&mut bench.latencies) });
        }
    }
    let report = Report { sections, load: (before, machine::load()?) };
    report.print()?;
    if settings.only.is_empty() && settings.guest.is_none() {
        report.write(&bench.stage, settings.ram)?;
    }
    Ok(())
}

/// The guest, and all that may carry it.
struct Bench {
    agents: Vec<Pair>,
    /// Of all chunks of each contender, in the guest's present state.
    latencies: Vec<(Contender, Latency)>,
    stage: Stage,
    // Last: what is in the namespaces goes first.
    _cable: Cable,
}

/// Two agents of the same settings.
struct Pair {
    tls: bool,
    mapped: bool,
    a: Agent,
    b: Agent,
}

impl Bench {
    fn start(kit: &Kit, mib: u32, patience: u64) -> Result<Self> {
        let cable = Cable::start()?;
        let load = GuestLoad { mib, mix: Mix::Random, check: IDLE_CHECKS, ..GuestLoad::default() }.idle();
        let spec = QemuSpec {
            ram_mib: ram_mib(mib),
            backing: Backing::shared_file(),
            prealloc: true,
            load,
            namespace: Some(cable.namespace(End::A)),
            ..QemuSpec::new(QemuVersion::V10_0, Role::Source)
        };
        let mut stage = Stage::start(kit.clone(), spec, Some(cable.namespace(End::B)))?;
        stage.patience = Duration::from_secs(patience);
        let mut agents = Vec::new();
        for (tls, mapped) in [(false, false), (false, true), (true, false), (true, true)] {
            let folder = stage.dir().join(format!("agents-{}", agents.len()));
            std::fs::create_dir(&folder)?;
            let config = |end: End| AgentConfig {
                data: (end.address(), 0).into(),
                v1_plain: !tls,
                datacenter_encryption: if tls { "tls" } else { "none" },
                namespace: Some(cable.namespace(end)),
                extra: format!("[hde]\nmapped = {mapped}\n{ATTACHES}"),
                ..AgentConfig::default()
            };
            let (a, b) = Agent::pair(&folder, config(End::A), config(End::B))?;
            agents.push(Pair { tls, mapped, a, b });
        }
        Ok(Bench { agents, latencies: Vec::new(), stage, _cable: cable })
    }

    fn measure(
        &mut self,
        contenders: Vec<Contender>,
        runs: usize,
        state: GuestState,
    ) -> Result<Runs<Contender>> {
        Runs::measure(contenders, runs, |c| c.name(), |&c, warm_up| self.run(c, state, warm_up))
    }

    /// One move to a fresh destination. With `compare` both memories are compared afterwards.
    fn run(&mut self, contender: Contender, state: GuestState, compare: bool) -> Result<Run> {
        let Bench { agents, latencies, stage, .. } = self;
        let mut note = |latency: Latency| match latencies.iter_mut().find(|(of, _)| *of == contender) {
            Some((_, all)) => all.add(&latency),
            None => latencies.push((contender, latency)),
        };
        let pair = |tls: bool, mapped: bool| {
            let pair = agents.iter().find(|pair| (pair.tls, pair.mapped) == (tls, mapped));
            pair.map(|pair| (&pair.a, &pair.b)).context("no such agents")
        };
        let carry = |stage: &Stage, destination: &Qemu| match contender {
            Contender::Qemu { multifd } => by_qemu(stage, destination, multifd),
            Contender::V1 { tls } => {
                let arguments = ["--path", "v1", "--mode", "datacenter"];
                let expected = json!({ "path": "v1", "encryption": encryption(tls) });
                stage.by_agents(pair(tls, false)?, destination, &arguments, |result| is(result, &expected))
            }
            Contender::V3 { tls, mapped, streams } => {
                let streams = streams.to_string();
                let arguments = ["--path", "v3", "--mode", "datacenter", "--streams", streams.as_str()];
                let sink = if mapped { "mapped" } else { "stream" };
                let expected = json!({ "path": "v3", "encryption": encryption(tls), "sink": sink });
                let (a, b) = pair(tls, mapped)?;
                let before = Latency::of(a)?;
                let run = stage.by_agents((a, b), destination, &arguments, |result| is(result, &expected))?;
                note(Latency::of(a)?.since(&before));
                Ok(run)
            }
            Contender::Direct { tls, streams } => {
                let streams = streams.to_string();
                let mut arguments = vec!["--path", "v3", "--mode", "datacenter", "--source", "direct"];
                arguments.extend(["--streams", streams.as_str()]);
                let expected = json!({
                    "path": "v3", "encryption": encryption(tls), "sink": "mapped", "source": "direct"
                });
                let (a, b) = pair(tls, true)?;
                let before = Latency::of(a)?;
                let mut bytes = 0.0;
                let run = stage.by_agents((a, b), destination, &arguments, |result| {
                    // Of which QEMU has sent next to nothing.
                    bytes = result["raw_bytes"].as_f64().context("raw_bytes")?;
                    is(result, &expected)
                })?;
                note(Latency::of(a)?.since(&before));
                Ok(Run { bytes, ..run })
            }
            Contender::Internet { mapped } => {
                let arguments = ["--path", "v3", "--mode", "internet"];
                let sink = if mapped { "mapped" } else { "stream" };
                let expected = json!({ "path": "v3", "mode": "internet", "sink": sink });
                stage.by_agents(pair(true, mapped)?, destination, &arguments, |result| is(result, &expected))
            }
            Contender::Channels { channels } => {
                let count = channels.to_string();
                let arguments =
                    ["--path", "v3", "--mode", "datacenter", "--streams", "1", "--channels", count.as_str()];
                let expected =
                    json!({ "path": "v3", "encryption": "none", "sink": "mapped", "channels": channels });
                stage.by_agents(pair(false, true)?, destination, &arguments, |result| is(result, &expected))
            }
        };
        let running = state == GuestState::Idle;
        stage.move_guest(running, compare, carry).with_context(|| contender.name())
    }
}

fn encryption(tls: bool) -> &'static str {
    if tls { "tls" } else { "none" }
}

/// Whether a result is what was asked for.
fn is(result: &Value, expected: &Value) -> Result<()> {
    let fields = expected.as_object().context("an object")?;
    let other = fields.iter().find(|(name, value)| result[name.as_str()] != **value);
    ensure!(other.is_none(), "{other:?} was asked for: {result}");
    Ok(())
}

/// QEMU's own migration over the cable.
fn by_qemu(stage: &Stage, destination: &Qemu, multifd: bool) -> Result<Run> {
    if multifd {
        for vm in [&stage.source, destination] {
            let on = json!([{ "capability": "multifd", "state": true }]);
            vm.watch().run("migrate-set-capabilities", json!({ "capabilities": on }))?;
            vm.watch().run("migrate-set-parameters", json!({ "multifd-channels": CHANNELS }))?;
        }
    }
    let address = End::B.address();
    destination.watch().run("migrate-incoming", json!({ "uri": format!("tcp:{address}:0") }))?;
    let state = destination.watch().run("query-migrate", json!({}))?;
    let port = state["socket-address"][0]["port"].as_str().context("QEMU names no port")?;
    stage.measured(destination, &[], || stage.migrate(&format!("tcp:{address}:{port}")))
}

/// A document of the repository.
fn document(name: &str) -> PathBuf {
    crate::run::root().join("docs").join(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_contenders_apart() {
        let all = Contender::all();
        let names: std::collections::HashSet<_> = all.iter().map(|contender| contender.name()).collect();
        assert_eq!(names.len(), all.len());
    }
}
