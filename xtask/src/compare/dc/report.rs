//! What the comparison came to, as a document.

use std::fs;

use anyhow::{Context, Result};

use super::latency::Latency;
use super::{BESIDE_MIB, Contender, GuestState, QEMU, V1, document};
use crate::compare::machine;
use crate::compare::stage::{Run, Runs, Stage};
use crate::compare::table::{ConcatLines, Table, median};

/// What is made by hand begins here, and is kept: what was tried, what it brought, what it did not.
const NOTES: &str = "\n## Notes\n";
/// v3, signed and not encrypted, into mapped RAM is to reach these parts of the throughput of others.
const OF_V1: f64 = 1.0;
const OF_QEMU: f64 = 0.8;
/// Encrypted, it is to reach this part of itself in the clear.
const OF_PLAIN: f64 = 0.7;

/// All that was measured.
pub(super) struct Report {
    pub(super) sections: Vec<Section>,
    /// Before and after.
    pub(super) load: (f64, f64),
}

/// What was measured in one state of the guest.
pub(super) struct Section {
    pub(super) state: GuestState,
    pub(super) runs: Runs<Contender>,
    /// Of all chunks, those of the warming up included.
    pub(super) latencies: Vec<(Contender, Latency)>,
}

impl Report {
    pub(super) fn print(&self) -> Result<()> {
        for section in &self.sections {
            let Section { state, runs, .. } = section;
            println!("\nguest {}:\n{}", state.name(), table(section)?);
            verdict(runs).iter().for_each(|line| println!("{line}"));
        }
        Ok(())
    }

    pub(super) fn write(&self, stage: &Stage, mib: u32) -> Result<()> {
        let path = document("compare-dc.md");
        let before = fs::read_to_string(&path).unwrap_or_default();
        let notes = before.split_once(NOTES).map(|(_, notes)| format!("{NOTES}{notes}")).unwrap_or_default();
        let facts = machine::describe(&stage.kit, stage.cores)?.concat_lines("- ");
        let mut text = format!(
            "# Datacenter mode beside path v1 and QEMU\n\n\
             Made by `cargo xtask compare dc`; make it anew with that (the notes at the end are kept).\n\n\
             The same guest goes from the same QEMU to a fresh QEMU, between two network namespaces joined by a veth pair, carried \
             by one contender after the other. The guest has {mib} MiB of random data and {BESIDE_MIB} MiB beside it, its RAM is a \
             shared file in memory, and the destination's is preallocated and touched, so that first touches are not measured. Bandwidth is \
             not limited. *Plain* v3 is signed, and not encrypted.\n\n\
             ## The machine\n\n- day: {}\n{facts}",
            machine::today()?,
        );
        for section in &self.sections {
            let Section { state, runs, .. } = section;
            let count = runs.of.iter().map(|(_, runs)| runs.len()).min().unwrap_or(0);
            let circumstances = runs.circumstances(self.load).concat_lines("- ");
            text += &format!(
                "\n## The guest is {}\n\n{count} runs of each, in one go, the order turned round every time, after one run of each \
                 to warm up{}.\n\n{}\n{circumstances}\n{}",
                state.name(),
                match state {
                    GuestState::Paused => ", in which both memories were compared byte for byte",
                    GuestState::Idle => "",
                },
                table(section)?,
                verdict(runs).concat_lines("- "),
            );
        }
        text += "\n## The columns\n\n\
                 - *seconds*: from the source's `setup` to its `completed`, by its own time stamps; *arrived*: to the destination's.\n\
                 - *GB/s*: 10^9 bytes of memory that the source sent, over *seconds*.\n\
                 - *CPU s/GB*: *processes* are both agents and both QEMUs; *machine* is all that was busy, the kernel and `dwcpctl` \
                 included, from before the first command to after the last.\n\
                 - *agents, MiB*: the most anonymous memory of the source's and of the destination's agent, over all the runs that \
                 the process has seen so far.\n\
                 - *chunks*: from a chunk's encoding to its acknowledgement, which follows its application; by the source agent's \
                 histogram, interpolated within its buckets.\n";
        fs::write(&path, text + &notes).context("write docs/compare-dc.md")?;
        println!("written to docs/compare-dc.md");
        Ok(())
    }
}

fn table(Section { runs, latencies, .. }: &Section) -> Result<Table> {
    let head = [
        "median of the runs",
        "seconds",
        "least to most",
        "arrived",
        "GB/s",
        "CPU s/GB, processes",
        "CPU s/GB, machine",
        "agents, MiB",
        "chunks p50 / p95 / p99, ms",
    ];
    let mut table = Table::new(&head);
    for (contender, runs) in &runs.of {
        let latency = latencies.iter().find(|(of, _)| of == contender);
        let of = |figure: fn(&Run) -> f64| median(runs.iter().map(figure)).context("no runs");
        let least = runs.iter().map(|run| run.sent).fold(f64::INFINITY, f64::min);
        let most = runs.iter().map(|run| run.sent).fold(0.0, f64::max);
        table.line(vec![
            contender.name(),
            format!("{:.3}", of(|run| run.sent)?),
            format!("{least:.3} - {most:.3}"),
            format!("{:.3}", of(|run| run.arrived)?),
            format!("{:.2}", of(Run::rate)?),
            format!("{:.2}", of(|run| (run.used.movers + run.used.vmms) / run.bytes * 1e9)?),
            format!("{:.2}", of(|run| run.used.machine / run.bytes * 1e9)?),
            mebibytes(runs),
            latency.map(|(_, latency)| latency.words()).unwrap_or_default(),
        ]);
    }
    Ok(table)
}

/// The most memory of each agent over these runs.
pub(super) fn mebibytes(runs: &[Run]) -> String {
    let agents = runs.iter().map(|run| run.memory.len()).min().unwrap_or(0);
    let most = |agent: usize| runs.iter().map(|run| run.memory[agent]).fold(0.0, f64::max);
    let words: Vec<String> = (0..agents).map(|agent| format!("{:.0}", most(agent) / 1048576.0)).collect();
    words.join(" + ")
}

/// How far the aims are reached, at each number of streams that was measured.
fn verdict(runs: &Runs<Contender>) -> Vec<String> {
    let beside = |ours: Contender, theirs: Contender, aim: f64| {
        let rate = |contender| median(runs.by(|&c| c == contender)?.iter().map(Run::rate));
        let part = rate(ours)? / rate(theirs)?;
        let verdict = if part >= aim { "met" } else { "missed" };
        let (ours, theirs) = (ours.name(), theirs.name());
        Some(format!("{ours}: {part:.2} x the throughput of {theirs}; the aim of {aim} x is {verdict}"))
    };
    let stream = |tls, streams| Contender::V3 { tls, mapped: true, streams };
    let direct = |tls, streams| Contender::Direct { tls, streams };
    let pairs = [1, 2, 4].map(|streams| (stream(false, streams), stream(true, streams)));
    let direct = [1, 2, 4].map(|streams| (direct(false, streams), direct(true, streams)));
    let aims = pairs.into_iter().chain(direct).map(|(plain, tls)| {
        [beside(plain, V1, OF_V1), beside(plain, QEMU, OF_QEMU), beside(tls, plain, OF_PLAIN)]
    });
    aims.flatten().flatten().collect()
}
