//! Internet mode beside QEMU's own settings, over a long line between two network namespaces.
//!
//! A guest that runs, writes and checks its own memory goes over the line again and again: whoever is compared takes it
//! there, the destination is thrown away, and the guest goes on at the source. All are timed by the same clock and their
//! bytes are counted at the same place: QEMU's stamps on `STOP` and `RESUME`, and the line.

mod bench;
mod cases;
mod chart;
mod debian;
mod report;
mod run;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use self::bench::Bench;
use self::cases::{Guest, Link, Setting};
use self::report::{Case, Report};
use self::run::{End, Run, Runs};
use super::machine;
use super::stage::order;
use crate::run::root;
use crate::setup::setup;
use crate::test::build_programs;

/// How much to measure.
#[derive(Args)]
pub(crate) struct Settings {
    /// Runs of each setting
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only these guests, separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    guest: Vec<Guest>,
    /// Only these links
    #[arg(long, value_enum, value_delimiter = ',')]
    link: Vec<Link>,
    /// Only these settings; the document then has only these of the guests and links that are measured
    #[arg(long, value_enum, value_delimiter = ',')]
    setting: Vec<Setting>,
    /// Seconds until a run counts as not done
    #[arg(long, default_value_t = 120)]
    limit: u64,
    /// Run nothing, and make the document of what earlier runs wrote down
    #[arg(long)]
    render: bool,
}

/// Measures, prints the tables and writes the document. What was measured before of other guests and links stays in it.
pub(crate) fn compare(settings: &Settings) -> Result<()> {
    let file = root().join("docs/compare-wan.json");
    let mut report = match fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("read {}", file.display()))?,
        Err(_) => Report::default(),
    };
    match settings.render {
        true => publish(&report),
        false => measure(settings, &mut report),
    }
}

fn publish(report: &Report) -> Result<()> {
    fs::write(root().join("docs/compare-wan.json"), serde_json::to_string_pretty(report)? + "\n")?;
    fs::write(root().join("docs/compare-wan.md"), report.document())?;
    fs::write(root().join("docs/compare-wan.svg"), chart::svg(&report.cases))?;
    println!("written to docs/compare-wan.md, .svg and .json");
    Ok(())
}

fn measure(settings: &Settings, report: &mut Report) -> Result<()> {
    println!("building dwcpd and dwcpctl");
    build_programs()?;
    let kit = setup()?;
    let cores = std::thread::available_parallelism()?.get();
    for guest in wanted(&settings.guest, &Guest::ALL) {
        println!("starting the guest: {}", guest.title());
        let mut bench = Bench::start(&kit, guest)?;
        // Whoever moves a guest that has just booted waits for a second or two before QEMU says anything.
        bench
            .run(Setting::Zstd1, Link::G1, Duration::from_secs(settings.limit), false)
            .context("warming up")?;
        for link in wanted(&settings.link, &Link::ALL) {
            let case = one_case(&mut bench, link, settings)?;
            println!("\n{}", case.table());
            let facts = machine::describe(&kit, cores)?;
            report.put(Case { machine: facts, ..case });
            // At once: the next case may fail, after many minutes.
            publish(report)?;
        }
    }
    for line in report.verdicts() {
        println!("{line}");
    }
    Ok(())
}

/// All settings with one guest over one link, the order turned round every time.
fn one_case(bench: &mut Bench, link: Link, settings: &Settings) -> Result<Case> {
    let load = machine::load()?;
    let limit = Duration::from_secs(settings.limit);
    let mut results: Vec<(Setting, Runs)> =
        wanted(&settings.setting, &Setting::ALL).into_iter().map(|s| (s, Runs(Vec::new()))).collect();
    println!("{}", link.title());
    for round in 0..settings.runs as usize {
        for index in order(results.len(), round) {
            let (setting, runs) = &mut results[index];
            let run = bench.run(*setting, link, limit, round == 0).with_context(|| setting.title())?;
            println!("  {}/{} {:<24} {}", round + 1, settings.runs, setting.title(), shown(&run));
            runs.0.push(run);
        }
    }
    Ok(Case {
        guest: bench.guest(),
        link,
        day: machine::today()?,
        load: [load, machine::load()?],
        limit: settings.limit,
        machine: Vec::new(),
        results,
    })
}

fn shown(run: &Run) -> String {
    let end = match &run.end {
        End::Done => String::new(),
        End::Late => ", not done".into(),
        End::Failed(why) => format!(", failed: {why}"),
    };
    format!(
        "{:6.2} s, down {:4.0} ms, {:6.1} MB, {:5.0} rewrites/s, CPU {:.1} s (agents {:.1}, others {:.1}), anon {:?} MiB{}{end}",
        run.seconds,
        run.downtime_ms.unwrap_or_default(),
        run.wire_bytes as f64 / 1e6,
        run.rewrites,
        run.machine,
        run.agents,
        run.others,
        run.anon_bytes.unwrap_or_default().map(|bytes| bytes >> 20),
        if run.said.is_null() { String::new() } else { format!(", chunks {}", run.said["codecs"]) },
    )
}

fn wanted<T: Copy + PartialEq>(asked: &[T], all: &[T]) -> Vec<T> {
    all.iter().copied().filter(|one| asked.is_empty() || asked.contains(one)).collect()
}
