//! One system call in another process: a userfaultfd, of which we take a copy.
//!
//! A userfaultfd tells of the memory of the process that makes it, so the VMM has to make it itself. One of its threads
//! is interrupted by ptrace(2), its instruction pointer set to a few instructions of ours, the trampoline, and let go.
//!
//! # Why the guest survives any end of ours
//!
//! - Nothing of the thread is changed but the instruction pointer, in one step. The trampoline saves and restores what it uses and
//!   jumps back; it waits for nobody. If we die before that step the thread goes on as if nothing had been, and if
//!   we die after it, the thread goes through the trampoline by itself: the kernel lets go of what a dead tracer held.
//! - A system call that was interrupted is restarted by the kernel, not by us: it sets the instruction pointer back
//!   by two, or does not (a signal with a handler came first, or the call is not restarted). The trampoline has an entry for either
//!   case, two bytes apart, each of which knows its way back. So no rule of restarting is repeated here.
//! - The trampoline closes the descriptor again. We take our copy while the thread stands between the two calls. So nothing
//!   is left open in the VMM, whoever dies when.
//! - The tracer reads its events without consuming them, so that a signal that it was about to hand on is not lost with it.
//! - It lies in the zeroes behind the end of an ELF file's code, in a page that becomes the process's own by being
//!   written. Its some 130 bytes stay there, and are used again if the thread is met at the same place.
//!
//! # What the process notices
//!
//! What it would notice of SIGSTOP and SIGCONT: one call that the kernel never restarts (epoll_wait(2), KVM_RUN; see signal(7)) may
//! return EINTR. QEMU expects that anywhere.

#[cfg(target_arch = "x86_64")]
mod ptrace;
#[cfg(target_arch = "x86_64")]
mod room;
#[cfg(target_arch = "x86_64")]
mod thread;
#[cfg(target_arch = "x86_64")]
mod trampoline;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

/// Why no userfaultfd could be made in a process. It goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// Only the trampoline for x86-64 has been written.
    #[error("tracking from outside works with 64-bit x86 processes only")]
    Unsupported,
    /// It has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// The process.
        pid: i32,
    },
    /// The kernel, or a security module, does not let us.
    #[error(
        "attaching to process {pid} is not permitted: it takes the same user and CAP_SYS_PTRACE, or root"
    )]
    NotPermitted {
        /// The process.
        pid: i32,
    },
    /// A debugger has it.
    #[error("process {pid} is being traced by process {tracer}")]
    Traced {
        /// The process.
        pid: i32,
        /// Its tracer.
        tracer: i32,
    },
    /// A filter may kill the process for a call that it does not know.
    #[error("process {pid} filters its system calls (seccomp): start QEMU with -sandbox off to track it")]
    Filtered {
        /// The process.
        pid: i32,
    },
    /// It would have to be continued, which is for whoever stopped it.
    #[error("process {pid} is stopped by a signal")]
    Stopped {
        /// The process.
        pid: i32,
    },
    /// No zeroes are left behind any code.
    #[error("process {pid} has no room for the trampoline behind its code")]
    NoRoom {
        /// The process.
        pid: i32,
    },
    /// No thread came by in time.
    #[error("no thread of process {pid} could be made to do the call within {within:?}")]
    Busy {
        /// The process.
        pid: i32,
        /// How long we waited.
        within: Duration,
    },
    /// The process did the call, and the kernel refused.
    #[error("the kernel refuses process {pid} a userfaultfd")]
    Refused {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else failed.
    #[error("cannot look into process {pid}")]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Lets the process `pid`, which `pidfd` refers to, make a userfaultfd, and takes it. Faults of the kernel's own are not
/// told by it (`UFFD_USER_MODE_ONLY`), or an unprivileged process could not make one; asynchronous write protection tells of
/// all writes nevertheless.
///
/// One thread stands still for some 0.1 ms of it, and it takes at most some seconds if no thread can be had. No other thread of
/// ours may wait for that process meanwhile (waitpid(2)), if it is our child: it would see the tracer's events.
pub(crate) fn userfaultfd_in(pid: i32, pidfd: BorrowedFd<'_>) -> Result<OwnedFd, InjectError> {
    #[cfg(target_arch = "x86_64")]
    return thread::userfaultfd_in(pid, pidfd, None);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (pid, pidfd);
        Err(InjectError::Unsupported)
    }
}

/// The same by one thread only.
#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use thread::userfaultfd_in as by_thread;
