//! ptrace(2) of one thread: the one place that calls it.
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, offset_of, size_of};
use std::ptr;
use std::time::{Duration, Instant};

use libc::{c_int, c_long, c_void};

/// `PTRACE_EVENT_STOP` of linux/ptrace.h.
const EVENT_STOP: c_int = 128;
/// What marks a stop at a system call, with `PTRACE_O_TRACESYSGOOD`.
const SYSCALL_STOP: c_int = libc::SIGTRAP | 0x80;
/// `PTRACE_SYSCALL_INFO_EXIT` of linux/ptrace.h.
const SYSCALL_EXIT: u8 = 2;
/// How long to look without a pause: a thread that can stop does so within microseconds, and stands still meanwhile.
const EAGER: Duration = Duration::from_micros(200);
/// How long to pause between two looks after that.
const PAUSE: Duration = Duration::from_micros(200);

/// A thread of another process that this thread traces. It is let go with this value; if it does not stand still then, when
/// this thread ends.
#[derive(Debug)]
pub(super) struct Traced {
    tid: i32,
    is_main: bool,
}

/// Why a thread stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// It was interrupted by us.
    Interrupted,
    /// Its whole process is stopped by a signal.
    Group,
    /// A signal is about to be delivered; it has to be handed on with [`Traced::go`] or [`Traced::go_to_syscall`].
    Signal(i32),
    /// A system call begins or ends.
    Syscall,
    /// Something that was not asked for.
    Other,
    /// It has ended.
    Gone,
}

/// The end of a system call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Returned {
    /// The instruction behind it.
    pub(super) at: u64,
    /// What it returned: an error's number is negative.
    pub(super) value: i64,
}

impl Traced {
    /// Begins to trace a thread, which goes on running. It is not killed if we end, and a stop at a system call cannot be
    /// taken for a SIGTRAP then.
    pub(super) fn seize(tid: i32, is_main: bool) -> io::Result<Self> {
        call(libc::PTRACE_SEIZE, tid, ptr::null_mut(), libc::PTRACE_O_TRACESYSGOOD as usize as *mut c_void)?;
        Ok(Traced { tid, is_main })
    }

    /// Makes it stop soon.
    pub(super) fn interrupt(&self) -> io::Result<()> {
        call(libc::PTRACE_INTERRUPT, self.tid, ptr::null_mut(), ptr::null_mut()).map(|_| ())
    }

    /// Lets it go on with a signal, or with 0.
    pub(super) fn go(&self, signal: i32) -> io::Result<()> {
        self.resume(libc::PTRACE_CONT, signal)
    }

    /// The same up to the next beginning or end of a system call.
    pub(super) fn go_to_syscall(&self, signal: i32) -> io::Result<()> {
        self.resume(libc::PTRACE_SYSCALL, signal)
    }

    /// Waits until it stands still; `None` if it does not by then.
    pub(super) fn wait(&self, until: Instant) -> io::Result<Option<Stop>> {
        let begun = Instant::now();
        loop {
            if let Some(stop) = self.look()? {
                return Ok(Some(stop));
            }
            let now = Instant::now();
            if now >= until {
                return Ok(None);
            }
            if now - begun < EAGER {
                std::thread::yield_now();
            } else {
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// Its registers, while it stands still.
    pub(super) fn registers(&self) -> io::Result<libc::user_regs_struct> {
        let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
        call(libc::PTRACE_GETREGS, self.tid, ptr::null_mut(), registers.as_mut_ptr().cast())?;
        // SAFETY: all fields are integers, for which zeroes and whatever the kernel wrote are valid.
        Ok(unsafe { registers.assume_init() })
    }

    /// Sets the instruction pointer, and nothing else, in one step.
    pub(super) fn set_instruction_pointer(&self, at: u64) -> io::Result<()> {
        // The registers are the first thing in the `struct user` of sys/user.h that the offset refers to.
        let place = offset_of!(libc::user_regs_struct, rip);
        call(libc::PTRACE_POKEUSER, self.tid, place as *mut c_void, at as *mut c_void).map(|_| ())
    }

    /// Where the kernel looks for the thread's restartable sequences (rseq(2)); `None` without.
    pub(super) fn rseq(&self) -> Option<u64> {
        let mut rseq = MaybeUninit::<libc::ptrace_rseq_configuration>::zeroed();
        let len = size_of::<libc::ptrace_rseq_configuration>();
        // A kernel that does not know the request has no such sequences that it would tell of.
        call(libc::PTRACE_GET_RSEQ_CONFIGURATION, self.tid, len as *mut c_void, rseq.as_mut_ptr().cast())
            .ok()?;
        // SAFETY: all fields are integers, for which zeroes and whatever the kernel wrote are valid.
        let address = unsafe { rseq.assume_init() }.rseq_abi_pointer;
        (address != 0).then_some(address)
    }

    /// The system call that has just ended, if the stop is the end of one.
    pub(super) fn returned(&self) -> io::Result<Option<Returned>> {
        let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
        let len = size_of::<libc::ptrace_syscall_info>();
        call(libc::PTRACE_GET_SYSCALL_INFO, self.tid, len as *mut c_void, info.as_mut_ptr().cast())?;
        // SAFETY: all fields, those of the union's members too, are integers, for which zeroes and whatever the kernel
        // wrote are valid.
        let info = unsafe { info.assume_init() };
        if info.op != SYSCALL_EXIT {
            return Ok(None);
        }
        // SAFETY: `op` says that this is the member which the kernel wrote, and it was all zeroes before.
        let exit = unsafe { info.u.exit };
        Ok(Some(Returned { at: info.instruction_pointer, value: exit.sval }))
    }

    fn resume(&self, how: Request, signal: i32) -> io::Result<()> {
        call(how, self.tid, ptr::null_mut(), signal as usize as *mut c_void).map(|_| ())
    }

    /// Why it stands still; `None` if it does not. The event is left where it is: the kernel hands a signal on if we die
    /// before we do, but not if we have consumed it.
    fn look(&self) -> io::Result<Option<Stop>> {
        match self.event(libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT)? {
            // A dead thread that is traced keeps its process from ending until its tracer has seen it. The main one is for the
            // process's parent to see.
            Some(Stop::Gone) if !self.is_main => self.event(libc::WEXITED),
            event => Ok(event),
        }
    }

    fn event(&self, which: c_int) -> io::Result<Option<Stop>> {
        let flags = which | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
        let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
        // SAFETY: the kernel writes one `siginfo_t`, to `info`.
        let status = unsafe { libc::waitid(libc::P_PID, self.tid as libc::id_t, info.as_mut_ptr(), flags) };
        if status != 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                // Another thread of the process has called execve(2), or somebody has reaped it.
                Some(libc::ECHILD) => Ok(Some(Stop::Gone)),
                Some(libc::EINTR) => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: zeroes and whatever the kernel wrote are valid, and these are the fields that it writes for a wait.
        let (pid, code, status) = unsafe {
            let info = info.assume_init();
            (info.si_pid(), info.si_code, info.si_status())
        };
        if pid == 0 {
            return Ok(None);
        }
        Ok(Some(match (code, status) {
            (libc::CLD_TRAPPED | libc::CLD_STOPPED, SYSCALL_STOP) => Stop::Syscall,
            (libc::CLD_TRAPPED | libc::CLD_STOPPED, status) => match (status >> 8, status & 0xff) {
                (EVENT_STOP, libc::SIGTRAP) => Stop::Interrupted,
                (EVENT_STOP, _) => Stop::Group,
                (0, signal) => Stop::Signal(signal),
                _ => Stop::Other,
            },
            _ => Stop::Gone,
        }))
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // If it does not stand still it is let go when this thread ends. To try now would lose a signal at which it stops just then.
        let signal = match self.look() {
            Ok(Some(Stop::Signal(signal))) => signal,
            Ok(Some(_)) => 0,
            Ok(None) | Err(_) => return,
        };
        let _ = self.resume(libc::PTRACE_DETACH, signal);
    }
}

#[cfg(target_env = "musl")]
type Request = c_int;
#[cfg(not(target_env = "musl"))]
type Request = libc::c_uint;

/// None of the requests that are made here returns anything but 0 or a length when it succeeds.
fn call(request: Request, tid: i32, address: *mut c_void, data: *mut c_void) -> io::Result<c_long> {
    // SAFETY: what `data` points to, where the request takes a pointer to our memory, is as large as the kernel writes:
    // the callers pass the struct that the request is for, and its size where the request takes one. Everything else
    // happens in the other process.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
