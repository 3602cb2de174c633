//! A guest's RAM read by the agent itself, and put into the stream that QEMU would write: the direct source.
//!
//! ```text
//! QEMU ─ migrate, cancelled at once ─► head: header, list of RAM blocks ─┐
//! the file behind RAM ─ pread, round by round ─► pages ──────────────────┼─► Weaver ─► the stream of any QEMU migration
//!     ▲ which ones: Tracker (userfaultfd, PAGEMAP_SCAN)                  │
//! QEMU ─ stop, migrate with x-ignore-shared ─► small blocks, devices ────┘
//! ```
//!
//! QEMU copies no page, and takes no part until the guest stops. What comes out is a main channel as QEMU's own would be, so all that
//! follows knows one stream: either path carries it, the path changes at any byte, and any destination reads it.
//!
//! # Order
//! 1. [`Fit::find`]: may this VM's RAM be read so? Nothing is changed.
//! 2. [`Head`]: QEMU begins to migrate, which is cancelled once its list of RAM blocks was read.
//! 3. [`Direct::begin`]: from here on every page that is written to is known.
//! 4. [`Direct::all`], then [`Direct::written`] again and again, each time what [`Direct::look`] found.
//! 5. [`Fit::find`] again, and [`Direct::fits`]: is it still so? Then the guest stops; the last [`Direct::look`] and [`Direct::written`].
//! 6. QEMU migrates with `x-ignore-shared`; [`Direct::finish`] takes all that it writes.
//!
//! # Invariants
//! - A page is read after it was protected, so a write that the read did not see is reported later.
//! - The guest stands still from the last look on, and QEMU has drained what it had under way before it says so.
//!
//! # What is not seen, and therefore refused
//! Memory that is written past the process's page tables: by devices (VFIO, vhost-vdpa), by other processes that map the file
//! (vhost-user), by reads that bypass the page cache (O_DIRECT, SCSI passed through: their pages are pinned, and may be written after they
//! were protected). Such a device may come while the rounds run, as may memory: so it is asked again before the guest stops.
//! Pages that a balloon gives back are holes in the file, which no write reports: where the VM has a balloon, holes are looked for after the
//! last look.
//!
//! # Tracking
//! The kernel tells which pages the VMM's process has written.
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

mod fit;
mod head;
mod inject;
mod ioctl;
mod maps;
mod pages;
mod track;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

pub use fit::{Fit, Unfit};
pub use head::{Head, HeadError};
pub use inject::InjectError;
pub use pages::{BeginError, Direct, DirectError, Dirty, Gone, MAX_REST};
pub use track::{TrackError, Tracker};
