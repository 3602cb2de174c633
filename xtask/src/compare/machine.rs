//! The machine that was measured on, in the words of a report.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use dwcp_tests::{Kit, QemuVersion};

use crate::run::output;

/// Lines `name: value` about this machine and its QEMU.
pub(crate) fn describe(kit: &Kit, cores: usize) -> Result<Vec<String>> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let model = field(&cpuinfo, "model name").unwrap_or("unknown");
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let total = field(&meminfo, "MemTotal").and_then(|text| text.trim_end_matches(" kB").parse::<f64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let qemu = output(kit.qemu(QemuVersion::V10_0).arg("--version"))?;
    Ok(vec![
        format!("cores: {cores} ({model})"),
        format!("memory: {:.0} GiB", total.context("no MemTotal in /proc/meminfo")? / f64::from(1 << 20)),
        format!("kernel: Linux {}", kernel.trim()),
        format!("VMM: {}", qemu.lines().next().unwrap_or_default()),
    ])
}

/// Today, as `2024-01-31`, in UTC.
pub(crate) fn today() -> Result<String> {
    Ok(output(Command::new("date").args(["-u", "+%F"]))?.trim().to_owned())
}

/// How many processes ran or wanted to in the last minute, on average.
pub(crate) fn load() -> Result<f64> {
    let text = fs::read_to_string("/proc/loadavg")?;
    let first = text.split_whitespace().next().and_then(|word| word.parse().ok());
    first.with_context(|| format!("no load in {text}"))
}

/// MiB of memory that are free, or can be made so.
pub(crate) fn available_mib() -> Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let kib =
        field(&meminfo, "MemAvailable").and_then(|text| text.trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kib.context("no MemAvailable in /proc/meminfo")? >> 10)
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}
