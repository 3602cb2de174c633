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
//! Call order: [`Scene::kit_or_skip`], [`Scene::new`], [`Watcher::start`], [`Scene::move_guest`], then
//! [`Qemu::guest_ok_for`] or [`ram::compare`], and [`Watcher::finish`]. A scene is made of [`Qemu::launch`] and
//! [`Agent::start`], which tests of other shapes use by themselves. A [`SimScene`] has simulated VMMs in the place of
//! QEMUs, for what is to be done hundreds of times.

mod agent;
mod cgroup;
mod faults;
mod guest;
mod kit;
mod migrate;
mod netns;
mod qemu;
mod qmp;
pub mod ram;
mod relay;
mod report;
mod scene;
mod sim;
mod sim_scene;
mod turns;
mod wait;
mod wan;
mod watch;

pub use agent::{ATTACHES, Agent, AgentConfig, CtlOutput, Listen};
pub use cgroup::MemoryGroup;
pub use faults::{FAULTS, FaultRow, OFF, Shown, WITHOUT, Without};
pub use guest::{GuestLoad, Mix, Report, SerialLog};
pub use kit::{Kit, QemuVersion, SKIPPED, in_ci, skip, target_dir};
pub use migrate::{begin_plain_migration, end_of_plain_migration, plain_migration};
pub use netns::{Cable, End};
pub use qemu::{Backing, Qemu, QemuSpec, Role};
pub use qmp::{Event, Qmp, QmpError};
pub use relay::Relay;
pub use report::{REPORT, Seen, detected, fault_report, soak_count, soak_report, unix_ms};
pub use scene::{Scene, VM};
pub use sim::{Sim, SimGuest, SimState, never_both};
pub use sim_scene::{Ending, SimScene, Victim, attempts};
pub use turns::{Outcome as Turned, Plan as TurnPlan, turn_in_flight};
pub use wait::until;
pub use wan::{Count, Direction, LineProfile, Wan};
pub use watch::{Moment, Timeline, Watcher};
