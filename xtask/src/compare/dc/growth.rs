//! How time and memory grow with the number of streams, and with the guest; the agents' memory in internet mode, too.

use std::fs;

use anyhow::{Context, Result};
use dwcp_tests::Kit;

use super::report::mebibytes;
use super::{Bench, Contender, GuestState, Settings, document, ram_mib};
use crate::compare::machine;
use crate::compare::stage::{Run, Runs};
use crate::compare::table::{ConcatLines, Table, median};

const STREAMS: [u32; 4] = [1, 2, 4, 8];
/// Streams while the guest grows.
const SOME: u32 = 2;
const GIBS: [u32; 4] = [1, 2, 4, 8];
/// What an agent may take: so much, and so many percent of the guest's RAM.
const MAY_MIB: f64 = 64.0;
const MAY_PERCENT: f64 = 3.0;
/// Memory of this machine that the guest's two copies must leave to others.
const SPARE_MIB: u32 = 2048;

/// Measures both, prints the tables and writes the document.
pub(super) fn measure(kit: &Kit, settings: &Settings) -> Result<()> {
    let before = machine::load()?;
    let mut tables = Vec::new();
    let mut bench = Bench::start(kit, settings.ram, settings.patience)?;
    let facts = machine::describe(kit, bench.stage.cores)?;
    let streams = [false, true].iter().flat_map(|&tls| STREAMS.map(|streams| v3(tls, streams))).collect();
    let runs = bench.measure(streams, settings.runs, GuestState::Paused)?;
    let rows = runs.of.iter().map(|(contender, runs)| (contender.name(), runs.as_slice()));
    tables.push((format!("Streams, with a guest of {} MiB", settings.ram), table(rows)?));
    drop(bench);

    let mut sizes: Vec<(String, Vec<Run>)> = Vec::new();
    let mut internet =
        Table::new(&["guest", "RAM, MiB", "sink", "seconds", "agents, MiB", "may be, MiB", ""]);
    for gib in GIBS {
        let mib = gib << 10;
        let needed = 2 * ram_mib(mib) + SPARE_MIB;
        if machine::available_mib()? < u64::from(needed) {
            println!("a guest of {gib} GiB is left out: it takes {needed} MiB that are not free");
            continue;
        }
        // Agents of their own, so that each shows the memory that this guest took.
        let mut bench = Bench::start(kit, mib, settings.patience)?;
        let Runs { of, .. } = bench.measure(vec![v3(false, SOME)], settings.runs, GuestState::Paused)?;
        sizes.extend(of.into_iter().map(|(_, runs)| (format!("{gib} GiB"), runs)));
        for mapped in [true, false] {
            let run = bench.run(Contender::Internet { mapped }, GuestState::Paused, false)?;
            internet.line(in_internet_mode(gib, ram_mib(mib), mapped, &run));
        }
    }
    let rows = sizes.iter().map(|(name, runs)| (name.clone(), runs.as_slice()));
    tables.push((format!("The guest, with {}", v3(false, SOME).name()), table(rows)?));

    println!("\nInternet mode:\n{internet}");

    let mut text = format!(
        "# Datacenter mode: how it grows\n\nMade by `cargo xtask compare dc --growth`; make it anew with that. Setting and columns \
         are those of [compare-dc.md](compare-dc.md); the guest is paused.\n\n## The machine\n\n- day: {}\n{}- load average over one minute: \
         {:.2} before, {:.2} after (the comparison's own work included)\n",
        machine::today()?,
        facts.concat_lines("- "),
        before,
        machine::load()?,
    );
    for (title, table) in tables {
        println!("\n{title}:\n{table}");
        text += &format!("\n## {title}\n\n{} runs of each; medians.\n\n{table}", settings.runs);
    }
    text += &format!(
        "\n## The agents' memory in internet mode\n\nOne run each over the same cable. The most of RssAnon, source + destination; an agent may \
         take {MAY_MIB} MiB and {MAY_PERCENT} % of the guest's RAM.\n\n{internet}"
    );
    fs::write(document("compare-dc-growth.md"), text).context("write docs/compare-dc-growth.md")?;
    println!("written to docs/compare-dc-growth.md");
    Ok(())
}

fn in_internet_mode(gib: u32, ram: u32, mapped: bool, run: &Run) -> Vec<String> {
    let may = MAY_MIB + f64::from(ram) * MAY_PERCENT / 100.0;
    let most = run.memory.iter().fold(0.0, |most: f64, bytes| most.max(*bytes)) / 1048576.0;
    vec![
        format!("{gib} GiB"),
        ram.to_string(),
        if mapped { "mapped" } else { "cache" }.into(),
        format!("{:.1}", run.sent),
        mebibytes(std::slice::from_ref(run)),
        format!("{may:.0}"),
        if most <= may { "kept" } else { "missed" }.into(),
    ]
}

fn v3(tls: bool, streams: u32) -> Contender {
    Contender::V3 { tls, mapped: true, streams }
}

fn table<'a>(rows: impl Iterator<Item = (String, &'a [Run])>) -> Result<Table> {
    let head = ["median of the runs", "seconds", "GB sent", "seconds/GB", "GB/s", "agents, MiB"];
    let mut table = Table::new(&head);
    for (name, runs) in rows {
        let of = |figure: fn(&Run) -> f64| median(runs.iter().map(figure)).context("no runs");
        table.line(vec![
            name,
            format!("{:.3}", of(|run| run.sent)?),
            format!("{:.2}", of(|run| run.bytes / 1e9)?),
            format!("{:.3}", of(|run| run.sent / run.bytes * 1e9)?),
            format!("{:.2}", of(Run::rate)?),
            mebibytes(runs),
        ]);
    }
    Ok(table)
}
