//! A source that reads the guest's memory itself: the kernel tells which pages the VMM's process has written.
//!
//! ```text
//!  agent                                      VMM's process
//!  Tracker::begin ── ptrace, once ──────────► one thread makes a userfaultfd, and closes it again
//!        │        ◄─ pidfd_getfd ──────────── (the copy is the only one that stays)
//!        ├── UFFDIO_REGISTER on the copy ───► the RAM's range, for asynchronous write protection
//!        v
//!  Tracker::written ── PAGEMAP_SCAN on /proc/PID/pagemap: what was written, protected anew in the same step
//! ```
//!
//! A userfaultfd belongs to the memory of the process that made it, whoever holds it. So the process makes one system
//! call, and everything else is done from outside. When the agent's copy is closed, by whatever end of the agent, the
//! kernel takes all tracking away.

mod inject;
mod ioctl;
mod maps;
mod track;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

pub use inject::InjectError;
pub use track::{TrackError, Tracker};
