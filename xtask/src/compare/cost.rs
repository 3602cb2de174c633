//! CPU time of processes and of the whole machine, from `/proc`: proc_pid_stat(5), proc_stat(5).

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Linux counts in hundredths of a second for user space, whatever its own clock.
const TICKS: f64 = 100.0;
/// How long the machine is looked at to see whether it is quiet.
const LOOK: Duration = Duration::from_millis(300);
/// A machine counts as quiet when so little of it is busy.
const QUIET: f64 = 0.05;

/// CPU seconds used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    /// By the processes that carry the guest's memory between the VMMs.
    pub(crate) movers: f64,
    /// By the VMMs.
    pub(crate) vmms: f64,
    /// By the machine: every process, the kernel, interrupts.
    pub(crate) machine: f64,
    /// What the host gave to others while this machine wanted it.
    pub(crate) stolen: f64,
}

impl Usage {
    /// As it stands now. A process that has ended but was not waited for still counts.
    pub(crate) fn sample(movers: &[u32], vmms: &[u32]) -> Result<Self> {
        let sum = |pids: &[u32]| pids.iter().map(|&pid| process(pid)).sum::<Result<f64>>();
        let (movers, vmms) = (sum(movers)?, sum(vmms)?);
        let (machine, stolen) = whole(&fs::read_to_string("/proc/stat")?)?;
        Ok(Usage { movers, vmms, machine, stolen })
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: Usage) -> Usage {
        Usage {
            movers: self.movers - earlier.movers,
            vmms: self.vmms - earlier.vmms,
            machine: self.machine - earlier.machine,
            stolen: self.stolen - earlier.stolen,
        }
    }
}

/// Waits until hardly anything runs on this machine, for `limit` at the most, and says whether it is so.
pub(crate) fn quiet(cores: usize, limit: Duration) -> Result<bool> {
    let start = Instant::now();
    loop {
        let before = Usage::sample(&[], &[])?;
        let looked = Instant::now();
        sleep(LOOK);
        let used = Usage::sample(&[], &[])?.since(before);
        if used.machine + used.stolen <= QUIET * cores as f64 * looked.elapsed().as_secs_f64() {
            return Ok(true);
        }
        if start.elapsed() > limit {
            return Ok(false);
        }
    }
}

/// Bytes of anonymous memory that a process has now (`RssAnon`): what it shares with a guest is not its own.
pub(crate) fn anonymous(pid: u32) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = field.and_then(|field| field.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.with_context(|| format!("no RssAnon of process {pid}"))? * 1024.0)
}

fn process(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    process_seconds(&stat).with_context(|| format!("the CPU time of process {pid} in {stat}"))
}

/// utime and stime, the 14th and 15th field; the second, a name in brackets, may hold anything.
fn process_seconds(stat: &str) -> Option<f64> {
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / TICKS)
}

/// Busy and stolen seconds: user, nice, system, (idle, iowait,) irq, softirq, steal.
fn whole(stat: &str) -> Result<(f64, f64)> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).context("no \"cpu\" in /proc/stat")?;
    let ticks: Vec<f64> =
        line.split_whitespace().take(8).map(str::parse).collect::<Result<_, _>>().context("/proc/stat")?;
    let &[user, nice, system, _, _, irq, softirq, steal] = &ticks[..] else {
        anyhow::bail!("too few fields in /proc/stat: {line}");
    };
    Ok(((user + nice + system + irq + softirq) / TICKS, steal / TICKS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_spaces_and_brackets_is_no_obstacle() {
        let stat = "17 (a b) c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0";
        assert_eq!(process_seconds(stat), Some(3.0));
        assert_eq!(process_seconds("17 (short) S 1"), None);
        assert!(process(std::process::id()).unwrap() >= 0.0);
        assert!(anonymous(std::process::id()).unwrap() > 0.0);
    }

    #[test]
    fn idling_is_not_busy() {
        let stat = "cpu  100 10 200 9999 777 20 30 40 0 0\ncpu0 1 2 3\n";
        assert_eq!(whole(stat).unwrap(), (3.6, 0.4));
        assert!(whole("cpu  1 2 3\n").is_err());
    }
}
