//! What tests measure, for `cargo xtask faults` and `cargo xtask soak`: lines of JSON in the file that a variable names.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use serde_json::{Value, json};

use crate::agent::Agent;

/// The variable with the file into which tests write what they measured.
pub const REPORT: &str = "DWCP_REPORT";

/// How often a test of repetition shall repeat: `DWCP_SOAK_NAME`, or `usual`.
pub fn soak_count(name: &str, usual: u64) -> u64 {
    std::env::var(format!("DWCP_SOAK_{name}")).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// Reports repetitions: what was repeated, how often, and how many of them failed.
///
/// # Errors
/// The report cannot be written.
pub fn soak_report(what: &str, n: u64, failures: u64) -> Result<()> {
    write(&json!({ "soak": what, "n": n, "failures": failures }))
}

/// What was seen of a fault: how long it took to be noticed, and from its end until data flowed again or the state
/// was final.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    /// From the fault to the first sign that the agents know.
    pub detected: Option<Duration>,
    /// From the fault's end (or, where it does not end, its beginning) to the recovery.
    pub recovered: Option<Duration>,
}

/// From `began`, in Unix milliseconds, until the agent wrote down that the migration's link is down, if it did.
///
/// # Errors
/// The agent does not tell.
pub fn detected(agent: &Agent, migration: &str, began: u64) -> Result<Option<Duration>> {
    let story = agent.ctl(&[&"explain", &migration, &"--json"])?.success()?.json()?;
    let moments = story["sides"][0]["timeline"].as_array().cloned().unwrap_or_default();
    let downs = moments.iter().filter(|moment| moment["what"] == "link_down");
    let after = downs.filter_map(|moment| moment["unix_ms"].as_u64()?.checked_sub(began)).min();
    Ok(after.map(Duration::from_millis))
}

/// The wall clock, as journals have it.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Reports how a fault was met, by the row of [`crate::FAULTS`] that it belongs to. `who` is `dwcp v1`, `dwcp v3` or
/// `plain QEMU`; `result` is in a few words.
///
/// # Errors
/// The report cannot be written.
pub fn fault_report(row: &str, who: &str, result: &str, seen: Seen) -> Result<()> {
    let seconds = |time: Option<Duration>| time.map_or(Value::Null, |time| json!(time.as_secs_f64()));
    write(&json!({
        "fault": row, "who": who, "result": result,
        "detected": seconds(seen.detected), "recovered": seconds(seen.recovered),
    }))
}

fn write(line: &Value) -> Result<()> {
    if let Some(file) = std::env::var_os(REPORT) {
        // In one write, since tests run beside each other.
        File::options().create(true).append(true).open(file)?.write_all(format!("{line}\n").as_bytes())?;
    }
    Ok(())
}
