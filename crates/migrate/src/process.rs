//! Processes of this machine, known so that a number that is used again does not come to mean another one.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use dwcp_proto::journal::Process;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// A process that was seen alive.
#[derive(Debug)]
pub(crate) struct Running {
    handle: OwnedFd,
    identity: Process,
}

impl Running {
    /// The process that has this number now.
    pub(crate) fn of(pid: Pid) -> Option<Self> {
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let running = Running { handle, identity: identity(pid)? };
        // Alive after its start was read, so it was its start.
        (!running.has_ended()).then_some(running)
    }

    /// The process that `wanted` names, if it still runs.
    pub(crate) fn find(wanted: &Process) -> Option<Self> {
        let pid = Pid::from_raw(i32::try_from(wanted.pid).ok()?)?;
        Self::of(pid).filter(|running| running.identity == *wanted)
    }

    /// What it is called for as long as this machine is up.
    pub(crate) fn identity(&self) -> &Process {
        &self.identity
    }

    /// The process, held so that its number cannot come to mean another.
    pub(crate) fn handle(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Whether it has ended, whoever has the number now.
    pub(crate) fn has_ended(&self) -> bool {
        // A pidfd is readable once its process has ended: pidfd_open(2).
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
    }
}

/// Memory that a process has in RAM, bytes; `None` where it is gone. proc_pid_status(5).
pub(crate) fn resident_bytes(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

fn identity(pid: Pid) -> Option<Process> {
    let number = pid.as_raw_nonzero().get();
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // proc_pid_stat(5): the second field is the name in parentheses, which may hold any; `starttime` is the 22nd.
    let (_, after_name) = stat.rsplit_once(')')?;
    let started = after_name.split_whitespace().nth(19)?.parse().ok()?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(Process { pid: u32::try_from(number).ok()?, started, boot: boot.trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_again_until_it_ends_and_no_other_in_its_place() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let running = Running::of(Pid::from_child(&child)).unwrap();
        let known = running.identity().clone();
        assert!(Running::find(&known).is_some() && !running.has_ended());
        for other in [
            Process { started: known.started + 1, ..known.clone() },
            Process { boot: "another".into(), ..known.clone() },
            Process { pid: u32::MAX, ..known.clone() },
        ] {
            assert!(Running::find(&other).is_none(), "{other:?}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(Running::find(&known).is_none() && running.has_ended());
    }
}
