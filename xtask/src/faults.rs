//! `cargo xtask faults`: the table of faults, with what each came to.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use dwcp_tests::{FAULTS, FaultRow, OFF, REPORT, Shown, WITHOUT, Without, target_dir};
use serde_json::Value;

use crate::run::cargo;
use crate::setup::setup_or_skip;
use crate::test::{build_faulty, build_programs};

/// For the build, and all tests one after the other.
const USUAL: Duration = Duration::from_secs(40 * 60);
/// With those that take minutes, the 20 min of a dark line among them.
const LONG: Duration = Duration::from_secs(4 * 3600);
/// The row that takes longer than all others together.
const TWENTY_MINUTES: &str = "dark_20min";

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Also those that take minutes each: real guests on a long line, beside plain QEMU
    #[arg(long)]
    long: bool,
    /// Also the line that is dark for 20 minutes, three times
    #[arg(long, requires = "long")]
    twenty_minutes: bool,
    /// Only these rows, by their names; with --without only these mechanisms
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Instead: switch each mechanism off in turn and run its tests, which have to fail
    #[arg(long, conflicts_with = "long")]
    without: bool,
}

/// Runs the tests of the table's rows and prints it.
pub(crate) fn faults(arguments: &Arguments) -> Result<()> {
    setup_or_skip()?;
    build_programs()?;
    build_faulty()?;
    let asked = |name: &str| arguments.only.is_empty() || arguments.only.iter().any(|only| only == name);
    if arguments.without {
        let without: Vec<&Without> = WITHOUT.iter().filter(|without| asked(without.mechanism)).collect();
        return without_each(&without);
    }
    let rows: Vec<&FaultRow> = FAULTS.iter().filter(|row| asked(row.name)).collect();
    let wanted = |row: &FaultRow| row.name != TWENTY_MINUTES || arguments.twenty_minutes;
    let names = |long: bool| -> Vec<&str> {
        let tests = rows.iter().filter(|row| wanted(row)).flat_map(|row| match row.shown {
            Shown::By(tests) if !long => tests,
            Shown::Long(tests) if long => tests,
            _ => &[],
        });
        tests.copied().collect()
    };
    let report = target_dir()?.join("faults.jsonl");
    let _ = fs::remove_file(&report);
    let run = |long: bool, limit| {
        let names = names(long);
        let how: Vec<&str> = long.then_some("--ignored").into_iter().chain(names.iter().copied()).collect();
        run_tests(&names, &how, &[], limit, &report)
    };
    let mut results = run(false, USUAL)?;
    if arguments.long {
        results.extend(run(true, LONG)?);
    }
    let measured = read_report(&report);
    print!("{}", table(&rows, &results, &measured));
    match results.values().filter(|ok| !**ok).count() {
        0 => Ok(()),
        failed => bail!("{failed} tests failed"),
    }
}

/// Runs the tests of each mechanism with agents that go without it, and prints which failed, as they all have to.
fn without_each(all: &[&Without]) -> Result<()> {
    println!("| without | test | |\n|---|---|---|");
    let nowhere = target_dir()?.join("without.jsonl");
    let mut missed = 0;
    for Without { mechanism, tests } in all {
        let off = [(OFF.to_owned(), (*mechanism).to_owned())];
        let (results, _) = outcomes(tests, tests, &off, LONG, &nowhere)?;
        for test in *tests {
            let word = match results.get(*test) {
                Some(false) => "fails",
                Some(true) => "PASSES: shows nothing",
                None => "not run",
            };
            missed += usize::from(word != "fails");
            println!("| {} | {test} | {word} |", mechanism.replace('_', " "));
        }
    }
    match missed {
        0 => Ok(()),
        missed => bail!("{missed} tests do not miss what they are there for"),
    }
}

/// Runs tests, chosen by the harness's arguments `how`, and gives which of these names passed. Prints what was said where one did not.
pub(crate) fn run_tests(
    names: &[&str],
    how: &[&str],
    variables: &[(String, String)],
    limit: Duration,
    report: &Path,
) -> Result<BTreeMap<String, bool>> {
    let (results, said) = outcomes(names, how, variables, limit, report)?;
    if results.values().any(|ok| !ok) {
        print!("{said}");
    }
    Ok(results)
}

/// As [`run_tests`], with what the tests said.
fn outcomes(
    names: &[&str],
    how: &[&str],
    variables: &[(String, String)],
    limit: Duration,
    report: &Path,
) -> Result<(BTreeMap<String, bool>, String)> {
    let mut results = BTreeMap::new();
    if names.is_empty() {
        return Ok((results, String::new()));
    }
    // The end-to-end tests must not share the cores.
    let output = cargo(limit)
        .args(["test", "--release", "--package", "dwcp-tests", "--tests", "--no-fail-fast", "--"])
        .args(["--test-threads=1"])
        .args(how)
        .env(REPORT, report)
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stderr(std::process::Stdio::inherit())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in said.lines() {
        let Some((path, outcome)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... "))
        else {
            continue;
        };
        let name = path.rsplit("::").next().unwrap_or(path);
        if names.contains(&name) && !outcome.starts_with("ignored") {
            results.insert(name.to_owned(), outcome.ends_with("ok"));
        }
    }
    Ok((results, said))
}

/// The lines of a report.
pub(crate) fn read_report(report: &Path) -> Vec<Value> {
    let text = fs::read_to_string(report).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn table(rows: &[&FaultRow], results: &BTreeMap<String, bool>, measured: &[Value]) -> String {
    let mut text = String::from(
        "| fault | expected | who | result | s to detect | s to recover |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        let own: Vec<&Value> = measured.iter().filter(|line| line["fault"] == row.name).collect();
        let passed = |tests: &[&str]| -> Option<bool> {
            let outcomes: Vec<bool> = tests.iter().filter_map(|test| results.get(*test).copied()).collect();
            (!outcomes.is_empty()).then(|| outcomes.len() == tests.len() && outcomes.iter().all(|ok| *ok))
        };
        let result = match row.shown {
            Shown::By(tests) | Shown::Long(tests) => match passed(tests) {
                Some(true) => "ok".to_owned(),
                Some(false) => "FAILED".to_owned(),
                None => "not run".to_owned(),
            },
            Shown::Elsewhere(place) => format!("not run here: tests of {place}"),
            Shown::Not(why) => format!("not covered: {why}"),
        };
        text += &format!("| {} | {} | dwcp | {result} | | |\n", row.fault, row.expected);
        for line in own {
            let seconds = |key: &str| line[key].as_f64().map_or_else(String::new, |s| format!("{s:.2}"));
            let word = |key: &str| line[key].as_str().unwrap_or_default();
            let (detected, recovered) = (seconds("detected"), seconds("recovered"));
            text += &format!("| | | {} | {} | {detected} | {recovered} |\n", word("who"), word("result"));
        }
    }
    text
}
