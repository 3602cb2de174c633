//! `cargo xtask soak`: migrations and kills as often as asked, and what bound on the failure rate they show.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use dwcp_tests::target_dir;
use serde_json::Value;

use crate::faults::{read_report, run_tests};
use crate::run::root;
use crate::setup::setup_or_skip;
use crate::test::{build_faulty, build_programs};

/// For all of it.
const LIMIT: Duration = Duration::from_secs(6 * 3600);
/// How sure the bound is.
const CONFIDENCE: f64 = 0.95;

/// How often.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Random kills of any of the four processes, with the simulated guest
    #[arg(long, default_value_t = 500)]
    kills: u64,
    /// The same with QEMU and the self-checking guest
    #[arg(long, default_value_t = 50)]
    qemu_kills: u64,
    /// Migrations in a row between the same two agents, with the simulated guest
    #[arg(long, default_value_t = 3000)]
    migrations: u64,
    /// The same with QEMU and the self-checking guest, there and back
    #[arg(long, default_value_t = 100)]
    qemu_migrations: u64,
    /// Run nothing, and make the table of what earlier runs wrote down (DWCP_REPORT)
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
}

/// Runs them, prints the table and writes it to `docs/soak.md`.
pub(crate) fn soak(arguments: &Arguments) -> Result<()> {
    if let Some(report) = &arguments.from {
        return publish(report);
    }
    setup_or_skip()?;
    build_programs()?;
    build_faulty()?;
    let report = target_dir()?.join("soak.jsonl");
    let _ = fs::remove_file(&report);
    let counts = [
        ("KILLS", arguments.kills, "any_process_killed_at_random"),
        ("QEMU_KILLS", arguments.qemu_kills, "any_process_killed_at_random_with_qemu"),
        ("MIGRATIONS", arguments.migrations, "migrations_in_a_row"),
        ("QEMU_MIGRATIONS", arguments.qemu_migrations, "migrations_in_a_row_with_qemu"),
    ];
    let names: Vec<&str> = counts.iter().filter(|(_, n, _)| *n > 0).map(|(.., test)| *test).collect();
    let variables: Vec<(String, String)> =
        counts.iter().map(|(name, n, _)| (format!("DWCP_SOAK_{name}"), n.to_string())).collect();
    // Exactly: the name of one is the beginning of another's.
    let paths = names.iter().map(|name| match name.ends_with("random") {
        true => format!("kills::{name}"),
        false => format!("repeat::{name}"),
    });
    let how: Vec<String> =
        ["--include-ignored".to_owned(), "--exact".to_owned()].into_iter().chain(paths).collect();
    let how: Vec<&str> = how.iter().map(String::as_str).collect();
    let results = run_tests(&names, &how, &variables, LIMIT, &report)?;
    publish(&report)?;
    match results.values().filter(|ok| !**ok).count() {
        0 => Ok(()),
        failed => bail!("{failed} of {} failed", results.len()),
    }
}

/// Prints the table of a report and writes it down.
fn publish(report: &Path) -> Result<()> {
    let text = table(&read_report(report));
    print!("{text}");
    fs::create_dir_all(root().join("docs"))?;
    Ok(fs::write(root().join("docs/soak.md"), text)?)
}

fn table(report: &[Value]) -> String {
    let mut text = format!(
        "# Soak\n\nMade by `cargo xtask soak`. The bound is the failure rate that so few failures in so many \
         tries rule out with {:.0} % confidence (exact binomial, one-sided; without a failure about 3/n). Each try has \
         real agents as processes; a failure is any end other than one whole running guest, where the guest's own VMM \
         was not what was killed.\n\n| what | n | failures | rate below |\n|---|---|---|---|\n",
        CONFIDENCE * 100.0
    );
    for line in report {
        let (Some(what), Some(n), Some(failures)) =
            (line["soak"].as_str(), line["n"].as_u64(), line["failures"].as_u64())
        else {
            continue;
        };
        text += &format!("| {what} | {n} | {failures} | {:.2} % |\n", upper_bound(n, failures) * 100.0);
    }
    text
}

/// The greatest rate at which `failures` or fewer of `n` would still come about with a chance of 5 %: Clopper and
/// Pearson's upper limit.
fn upper_bound(n: u64, failures: u64) -> f64 {
    if failures >= n {
        return 1.0;
    }
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if at_most(n, failures, middle) > 1.0 - CONFIDENCE { low = middle } else { high = middle }
    }
    high
}

/// The chance of at most `k` failures in `n` tries at this rate, term by term in logarithms.
fn at_most(n: u64, k: u64, rate: f64) -> f64 {
    let mut term = n as f64 * (-rate).ln_1p();
    let mut sum = term.exp();
    for i in 1..=k {
        term += ((n - i + 1) as f64 / i as f64).ln() + (rate / (1.0 - rate)).ln();
        sum += term.exp();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_the_rule_of_three_and_more_with_failures() {
        assert!((upper_bound(1000, 0) - 0.002_991).abs() < 1e-5);
        assert!((upper_bound(3000, 0) - 0.001).abs() < 1e-4);
        // From tables of the Poisson limit: 4.74 / n for one failure.
        assert!((upper_bound(500, 1) - 0.00945).abs() < 1e-4);
        assert_eq!(upper_bound(3, 3), 1.0);
    }
}
