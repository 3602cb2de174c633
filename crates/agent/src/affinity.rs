//! Keeps the agent off the CPUs that are not its own, such as those of guests.

use dwcp_migrate::Failure;
use rustix::io::Errno;
use rustix::thread::{sched_getaffinity, sched_setaffinity};
use tracing::{info, warn};

use crate::config::{Cpus, listed};
use crate::local;

/// Confines this thread to the CPUs that are listed, and so every thread that it starts from then on. Without a list nothing changes: what
/// systemd's CPUAffinity= or AllowedCPUs= says holds.
pub(crate) fn confine(cpus: Option<Cpus>) -> Result<(), Failure> {
    let Some(Cpus::List(wanted)) = cpus else { return Ok(()) };
    let list = listed(&wanted);
    sched_setaffinity(None, &wanted).map_err(|error| {
        let (what, hint) = match error {
            Errno::INVAL => (
                format!("none of the CPUs {list} is there and allowed to the agent"),
                "/sys/devices/system/cpu/online says which ones this machine has",
            ),
            error => (format!("cannot run on the CPUs {list} alone: {error}"), ""),
        };
        local("cpus", format!("[limits] cpus: {what}"), hint)
    })?;
    // The kernel takes a list of which only some are there.
    let held = sched_getaffinity(None).unwrap_or(wanted);
    info!(cpus = %listed(&held), "confined to these CPUs");
    if held != wanted {
        warn!(cpus = %list, "[limits] cpus: not all of them are there and allowed");
    }
    Ok(())
}
