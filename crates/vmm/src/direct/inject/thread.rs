//! How a thread is led through the trampoline.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use super::InjectError;
use super::ptrace::{Stop, Traced};
use super::room::{Rooms, Slot};
use super::trampoline;

/// How long all threads together are waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long one thread is waited for to stand still: one that waits for a disk may not for long, and there are others.
const PATIENCE_PER_THREAD: Duration = Duration::from_millis(200);
/// How long a process that is ending may take to have ended. Its memory is gone before that, and reads and writes as nothing.
const DYING: Duration = Duration::from_millis(200);
/// The code segment of 64-bit code.
const CODE_64: u64 = 0x33;
/// Where in `struct rseq` (linux/rseq.h) the sequence that a thread is in is named.
const RSEQ_CS: u64 = 8;

/// By the thread `only`, or by whichever can be had first.
pub(in crate::direct) fn userfaultfd_in(
    pid: i32,
    pidfd: BorrowedFd<'_>,
    only: Option<i32>,
) -> Result<OwnedFd, InjectError> {
    // A tracer is a thread. When this one ends the kernel lets go of whatever it still holds.
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("inject".into())
            .spawn_scoped(scope, || {
                let injector = Injector { pid, pidfd, only, until: Instant::now() + PATIENCE };
                match injector.run() {
                    Err(InjectError::Process { .. }) if injector.ends_within(DYING) => {
                        Err(InjectError::Gone { pid })
                    }
                    outcome => outcome,
                }
            })
            .map_err(|source| InjectError::Process { pid, source })?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

struct Injector<'a> {
    pid: i32,
    pidfd: BorrowedFd<'a>,
    only: Option<i32>,
    until: Instant,
}

/// What became of one thread.
enum Outcome {
    Made(OwnedFd),
    /// It was met where it cannot be led away, or has ended: another one, or it later.
    Unsuitable,
    /// It does not stop. It is held until this thread ends.
    Stuck,
}

impl Injector<'_> {
    fn run(&self) -> Result<OwnedFd, InjectError> {
        let memory = File::open(format!("/proc/{}/mem", self.pid)).map_err(|error| self.failed(error))?;
        let rooms = Rooms::find(self.pid, &memory).map_err(|error| self.failed(error))?;
        drop(memory);
        let mut stuck = Vec::new();
        loop {
            for tid in self.threads()? {
                if stuck.contains(&tid) {
                    continue;
                }
                match self.through(tid, &rooms)? {
                    Outcome::Made(fd) => return Ok(fd),
                    Outcome::Unsuitable => {}
                    Outcome::Stuck => stuck.push(tid),
                }
                if Instant::now() >= self.until {
                    break;
                }
            }
            if self.has_ended() {
                return Err(InjectError::Gone { pid: self.pid });
            }
            if Instant::now() >= self.until {
                return Err(InjectError::Busy { pid: self.pid, within: PATIENCE });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Leads one thread through the trampoline.
    fn through(&self, tid: i32, rooms: &Rooms) -> Result<Outcome, InjectError> {
        if !self.is_fit(tid)? {
            return Ok(Outcome::Unsuitable);
        }
        let traced = match Traced::seize(tid, tid == self.pid) {
            Ok(traced) => traced,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(Outcome::Unsuitable),
            Err(error) => {
                // Somebody else may have come first.
                self.is_fit(tid)?;
                return Err(self.failed(error));
            }
        };
        reached("seized");
        // While it lives nobody else can have its number.
        if self.has_ended() {
            return Err(InjectError::Gone { pid: self.pid });
        }
        traced.interrupt().map_err(|error| self.failed(error))?;
        reached("interrupted");
        let until = self.until.min(Instant::now() + PATIENCE_PER_THREAD);
        loop {
            match traced.wait(until).map_err(|error| self.failed(error))? {
                Some(Stop::Interrupted) => break,
                Some(Stop::Group) => return Err(InjectError::Stopped { pid: self.pid }),
                Some(Stop::Gone) => return Ok(Outcome::Unsuitable),
                Some(Stop::Signal(signal)) => traced.go(signal).map_err(|error| self.failed(error))?,
                Some(Stop::Syscall | Stop::Other) => traced.go(0).map_err(|error| self.failed(error))?,
                None => return Ok(Outcome::Stuck),
            }
        }
        reached("stopped");
        match self.lead(tid, &traced, rooms) {
            // Whatever failed, failed because it is dead.
            Err(InjectError::Process { .. }) if self.has_ended() => Err(InjectError::Gone { pid: self.pid }),
            outcome => outcome,
        }
    }

    fn lead(&self, tid: i32, traced: &Traced, rooms: &Rooms) -> Result<Outcome, InjectError> {
        let failed = |error| self.failed(error);
        let registers = traced.registers().map_err(failed)?;
        if registers.cs != CODE_64 {
            return Err(InjectError::Unsupported);
        }
        // By the thread that we trace: the kernel may allow only a tracer to write to code (proc_mem.force_override=).
        let memory = format!("/proc/{}/task/{tid}/mem", self.pid);
        let memory = File::options().read(true).write(true).open(memory).map_err(failed)?;
        if is_in_sequence(traced, &memory).map_err(failed)? {
            return Ok(Outcome::Unsuitable);
        }
        let image = trampoline::image(registers.rip);
        let base = match rooms.slot(&memory, &image).map_err(failed)? {
            None => return Err(InjectError::NoRoom { pid: self.pid }),
            Some(Slot::Written(base)) => base,
            Some(Slot::Free(base)) => {
                memory.write_all_at(&image, base).map_err(failed)?;
                let mut written = [0; trampoline::LEN];
                memory.read_exact_at(&mut written, base).map_err(failed)?;
                if written != image {
                    return Err(failed(io::Error::other("its code is not what was written to it")));
                }
                base
            }
        };
        reached("written");
        traced.set_instruction_pointer(trampoline::entry(base)).map_err(failed)?;
        // From here on nobody is needed any more.
        reached("sent");
        traced.go_to_syscall(0).map_err(failed)?;
        reached("let go");
        loop {
            let signal = match traced.wait(self.until).map_err(failed)? {
                Some(Stop::Syscall) => match traced.returned().map_err(failed)? {
                    Some(returned) if trampoline::has_made(base, returned.at) => {
                        return self.take(returned.value);
                    }
                    // The beginning of that call; or one of a signal's handler, which ran before.
                    _ => {
                        reached("calling");
                        0
                    }
                },
                Some(Stop::Signal(signal)) => signal,
                Some(Stop::Interrupted | Stop::Other) => 0,
                // It does the call, in vain, when its process is continued.
                Some(Stop::Group) => return Err(InjectError::Stopped { pid: self.pid }),
                Some(Stop::Gone) => return Err(InjectError::Gone { pid: self.pid }),
                None => return Err(InjectError::Busy { pid: self.pid, within: PATIENCE }),
            };
            traced.go_to_syscall(signal).map_err(failed)?;
        }
    }

    /// Takes a copy of what the call returned, before the thread closes it.
    fn take(&self, value: i64) -> Result<Outcome, InjectError> {
        reached("made");
        let Ok(number) = u32::try_from(value) else {
            let error =
                i32::try_from(-value).map_or(io::ErrorKind::Other.into(), io::Error::from_raw_os_error);
            return Err(InjectError::Refused { pid: self.pid, source: error });
        };
        let number = i32::try_from(number).map_err(|_| self.failed(io::ErrorKind::InvalidData.into()))?;
        let fd = pidfd_getfd(self.pidfd, number, PidfdGetfdFlags::empty())
            .map_err(|error| self.failed(error.into()))?;
        reached("taken");
        Ok(Outcome::Made(fd))
    }

    /// The process's threads, the main one first: in a QEMU it waits for events, and no vCPU stands still with it.
    fn threads(&self) -> Result<Vec<i32>, InjectError> {
        if let Some(only) = self.only {
            return Ok(vec![only]);
        }
        let folder =
            std::fs::read_dir(format!("/proc/{}/task", self.pid)).map_err(|error| self.failed(error))?;
        let mut threads: Vec<i32> =
            folder.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        threads.sort_unstable_by_key(|&tid| (tid != self.pid, tid));
        Ok(threads)
    }

    /// Whether the thread can be led at all, by what the kernel says of it (proc_pid_status(5)). `false` if it has ended.
    fn is_fit(&self, tid: i32) -> Result<bool, InjectError> {
        let status = match std::fs::read_to_string(format!("/proc/{}/task/{tid}/status", self.pid)) {
            Ok(status) => status,
            Err(_) if self.has_ended() => return Err(InjectError::Gone { pid: self.pid }),
            Err(_) => return Ok(false),
        };
        let field = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.unwrap_or_default().trim()
        };
        match field("State").chars().next() {
            Some('Z' | 'X') => return Ok(false),
            Some('T') => return Err(InjectError::Stopped { pid: self.pid }),
            _ => {}
        }
        // A kernel without seccomp says nothing.
        if !matches!(field("Seccomp"), "" | "0") {
            return Err(InjectError::Filtered { pid: self.pid });
        }
        match field("TracerPid").parse().unwrap_or(0) {
            0 => Ok(true),
            tracer => Err(InjectError::Traced { pid: self.pid, tracer }),
        }
    }

    fn has_ended(&self) -> bool {
        self.ends_within(Duration::ZERO)
    }

    fn ends_within(&self, wait: Duration) -> bool {
        // A pidfd is readable once its process has ended (pidfd_open(2)).
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let wait = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        poll(&mut fds, Some(&wait)).is_ok_and(|ready| ready > 0)
    }

    fn failed(&self, source: io::Error) -> InjectError {
        let pid = self.pid;
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::PERM | Errno::ACCESS) => InjectError::NotPermitted { pid },
            _ if self.has_ended() => InjectError::Gone { pid },
            Some(Errno::NOENT | Errno::SRCH) => InjectError::Gone { pid },
            _ => InjectError::Process { pid, source },
        }
    }
}

/// Whether the thread may be inside a restartable sequence (rseq(2)), which has to begin anew after an interruption: led away, the
/// kernel would no longer see that it was in one.
fn is_in_sequence(traced: &Traced, memory: &File) -> io::Result<bool> {
    let Some(rseq) = traced.rseq() else { return Ok(false) };
    let mut sequence = [0; 8];
    memory.read_exact_at(&mut sequence, rseq.saturating_add(RSEQ_CS))?;
    Ok(sequence != [0; 8])
}

/// Tests let this process die at a step.
#[cfg(test)]
fn reached(step: &str) {
    if std::env::var(super::super::tests::DIE_AT).is_ok_and(|at| at == step) {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

#[cfg(not(test))]
fn reached(_: &str) {}
