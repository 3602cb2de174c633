//! Metrics of the process itself, by the names that Prometheus's clients agree on, read from /proc at each scrape.

use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

/// Reads /proc when it is asked.
#[derive(Debug)]
pub(crate) struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name: &str, help: &str, value: u64| {
            let value = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            value.encode(encoder.encode_descriptor(name, help, None, value.metric_type())?)
        };
        if let Ok(status) = fs::read_to_string("/proc/self/status") {
            let kib = |key: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
                line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).map_or(0, |n| n * 1024)
            };
            gauge(
                "process_resident_memory_bytes",
                "Resident memory, mapped guest RAM included",
                kib("VmRSS"),
            )?;
            gauge("dwcp_agent_anon_bytes", "Anonymous resident memory: the agent's own", kib("RssAnon"))?;
        }
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            gauge("process_open_fds", "Open file descriptors", open.count() as u64)?;
        }
        let seconds = ConstCounter::new(cpu_seconds());
        seconds.encode(encoder.encode_descriptor(
            "process_cpu_seconds",
            "CPU time of the agent, user and system",
            None,
            seconds.metric_type(),
        )?)
    }
}

fn cpu_seconds() -> f64 {
    let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    usage.tv_sec as f64 + usage.tv_nsec as f64 / 1e9
}
