//! QMP, the protocol by which QEMU is driven.
//!
//! [`Qmp`] carries commands and events; [`Qemu`] on top of it knows the commands that a migration needs.

mod client;
mod error;
mod event;
mod qemu;
#[cfg(test)]
mod tests;
mod types;

pub use client::{Events, MAX_LINE, Qmp, QmpConfig};
pub use error::{Ended, EventsError, QmpError};
pub use event::{Event, EventKind};
pub use qemu::{Parameters, Qemu};
pub use types::{Disk, MemoryBackend, MigrationInfo, MigrationStatus, RamProgress, RunState, Version};
