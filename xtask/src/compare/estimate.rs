//! What `dwcpctl estimate` says, beside what the migration then takes: real QEMUs, a shaped line, a fresh guest for each.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use dwcp_tests::{
    AgentConfig, Backing, End, GuestLoad, Kit, LineProfile, Mix, QemuSpec, QemuVersion, Role, Scene, Wan,
};
use serde_json::Value;

use super::machine;
use super::table::Table;
use crate::run::root;
use crate::setup::setup;
use crate::test::build_programs;

/// A prediction is to be within this part of what then happens.
const GOAL: f64 = 0.25;
/// For one migration.
const LIMIT: Duration = Duration::from_secs(300);
/// RAM of the guests: what is under test, and room for their kernel.
const RAM_MIB: u32 = 512;
/// The arguments of both.
const ARGUMENTS: [&str; 4] = ["--path", "v3", "--downtime-limit", "500ms"];

/// How much to measure.
#[derive(Args)]
pub(crate) struct Settings {
    /// Runs of each guest on each line
    #[arg(long, default_value_t = 1)]
    runs: usize,
    /// Only guests whose name holds this word, and no document
    #[arg(long)]
    guest: Option<String>,
    /// Only lines whose name holds this word, and no document
    #[arg(long)]
    line: Option<String>,
}

struct Guest {
    name: &'static str,
    load: GuestLoad,
}

fn guests() -> [Guest; 3] {
    let hot = GuestLoad { mib: 256, rate: 5000, hot_mib: 64, ..GuestLoad::default() };
    [
        Guest { name: "idle, mixed pages", load: GuestLoad { rate: 0, ..hot } },
        Guest { name: "5000 pages/s over 64 MiB", load: hot },
        Guest { name: "incompressible", load: GuestLoad { rate: 0, mix: Mix::Random, ..hot } },
    ]
}

fn lines() -> [(&'static str, LineProfile); 3] {
    let ms = Duration::from_millis;
    let lossy = LineProfile { loss_ppm: 5000, ..LineProfile::new(100_000_000, ms(50)) };
    [
        ("200 Mbit/s, 20 ms", LineProfile::new(200_000_000, ms(10))),
        ("1 Gbit/s, 10 ms", LineProfile::new(1_000_000_000, ms(5))),
        ("100 Mbit/s, 100 ms, 0.5 % loss", lossy),
    ]
}

/// Runs the comparison and writes its table.
pub(crate) fn compare(settings: &Settings) -> Result<()> {
    let kit = setup()?;
    build_programs()?;
    let head = [
        "guest, line",
        "s said",
        "s taken",
        "ratio",
        "MB said",
        "MB taken",
        "ratio",
        "ms said",
        "ms taken",
        "rounds said",
        "rounds taken",
        "converges",
    ];
    let (mut table, mut within, mut all) = (Table::new(&head), 0, 0);
    let chosen =
        |name: &str, word: &Option<String>| word.as_ref().is_none_or(|word| name.contains(word.as_str()));
    for (line, profile) in lines().into_iter().filter(|(name, _)| chosen(name, &settings.line)) {
        for guest in guests().iter().filter(|guest| chosen(guest.name, &settings.guest)) {
            for _ in 0..settings.runs {
                let name = format!("{}, {line}", guest.name);
                let (said, taken) = run(guest.load, profile).with_context(|| name.clone())?;
                let (cells, ratio) = row(&name, &said, &taken)?;
                println!("{}", cells.join("  "));
                table.line(cells);
                all += 1;
                within += usize::from((ratio - 1.0).abs() <= GOAL);
            }
        }
    }
    let summary = format!("The time was within {:.0} % in {within} of {all}.", GOAL * 100.0);
    println!("\n{table}\n{summary}");
    if settings.guest.is_none() && settings.line.is_none() {
        let text = format!(
            "# What `dwcpctl estimate` says, and what it then takes\n\n\
             Made by `cargo xtask compare estimate`. A QEMU 10.0 guest of 256 MiB of pages under test, RAM in a memfd at both ends, is looked \
             at and then moved in internet mode, between two network namespaces with a shaped line between them. Ratio is said / taken. \
             {summary}\n\n{}\n\n{table}",
            machine_lines(&kit)?
        );
        fs::write(root().join("docs/compare-estimate.md"), text)?;
    }
    Ok(())
}

fn machine_lines(kit: &Kit) -> Result<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let lines = machine::describe(kit, cores)?.into_iter().map(|line| format!("- {line}\n"));
    Ok(lines
        .chain([format!("- day: {}\n", machine::today()?), format!("- load before: {:.1}", machine::load()?)])
        .collect())
}

/// What was said, and what it took.
fn run(load: GuestLoad, profile: LineProfile) -> Result<(Value, Value)> {
    let Some(kit) = Scene::kit_or_skip("compare estimate") else { bail!("the laboratory is not there") };
    let Some(wan) = Wan::start_or_skip("compare estimate", profile)? else {
        bail!("no network namespaces here")
    };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        ..AgentConfig::default()
    };
    let spec = QemuSpec {
        backing: Backing::Memfd,
        load,
        ram_mib: RAM_MIB,
        ..QemuSpec::new(QemuVersion::V10_0, Role::Source)
    };
    let scene = Scene::with(&kit, spec, at(End::A), at(End::B))?;
    scene.incoming()?.success()?;
    // Status 1 where it would not converge: that is an answer, too.
    let said = scene.estimate(&ARGUMENTS)?.json()?;
    let arguments = [&ARGUMENTS[..], &["--id", "m"]].concat();
    Ok((said, scene.finish_patiently(&arguments, LIMIT)?))
}

fn row(name: &str, said: &Value, taken: &Value) -> Result<(Vec<String>, f64)> {
    let number = |value: &Value, key: &str| value[key].as_f64().with_context(|| format!("{key} in {value}"));
    let (seconds, bytes, downtime) = ("total_seconds", "wire_bytes", "downtime_ms");
    let ratio = number(said, "seconds")? / number(taken, seconds)?;
    let cells = vec![
        name.to_owned(),
        format!("{:.1}", number(said, "seconds")?),
        format!("{:.1}", number(taken, seconds)?),
        format!("{ratio:.2}"),
        format!("{:.0}", number(said, bytes)? / 1e6),
        format!("{:.0}", number(taken, bytes)? / 1e6),
        format!("{:.2}", number(said, bytes)? / number(taken, bytes)?),
        format!("{:.0}", number(said, downtime)?),
        format!("{:.0}", number(taken, downtime)?),
        said["rounds"].to_string(),
        taken["rounds"].to_string(),
        said["converges"].to_string(),
    ];
    Ok((cells, ratio))
}
