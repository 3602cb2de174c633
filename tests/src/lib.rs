//! The laboratory: real QEMUs with self-checking guests, real agents, and a watcher that trusts neither.
//!
//! It speaks QMP, reads guests and compares memory with code of its own, so that what the agents claim is checked by
//! something that shares no line with them. Nothing here sleeps blindly: every wait is a condition with a deadline.
//!
//! ```text
//!   Kit (what `cargo xtask setup` unpacked: QEMU 7.2 and 10.0, kernel, guest)
//!    |
//!   Qemu A ── qmp.sock ── agent A ═══ agent B ── qmp.sock ── Qemu B
//!    └─ watch.sock ──────── Watcher ──────────── watch.sock ─┘
//! ```
//!
//! Call order: [`Kit::or_skip`], [`Qemu::launch`] twice, [`Watcher::start`], [`Agent`]s and [`Agent::ctl`] or
//! [`plain_migration`], then [`Qemu::guest_ok_for`] and [`ram::compare`].

mod guest;
mod kit;
mod migrate;
mod qemu;
pub mod ram;
mod wait;
mod watch;

mod qmp;

pub use guest::{GuestLoad, Mix, Report, SerialLog};
pub use kit::{Kit, QemuVersion, target_dir};
pub use migrate::plain_migration;
pub use qemu::{Backing, Qemu, QemuSpec, Role};
pub use qmp::{Event, Qmp, QmpError};
pub use wait::until;
pub use watch::{Moment, Timeline, Watcher};
