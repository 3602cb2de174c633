//! A simulated VMM, for tests that need no hypervisor.
//!
//! ```text
//! GuestSpec -> SimGuest -SimSource-> QEMU's stream -SimDestination-> SimGuest, equal
//!                 '--------------- SimVmm ---------------'  behind a QMP socket, with Faults
//! ```
//!
//! [`SimGuest`], [`SimSource`] and [`SimDestination`] do no I/O and depend on no clock. [`SimVmm`] puts them behind
//! sockets, so that whatever drives a QEMU can drive it. [`StreamWriter`] writes any stream, sound or not, and [`Scatter`] puts its
//! pages on multifd channels.

mod guest;
mod migration;
mod scatter;
mod server;
mod stream;
mod vmm;
mod writer;

pub use guest::{GuestSpec, SimBlock, SimGuest};
pub use scatter::{Scatter, Scattered, Style};
pub use stream::{MACHINE, SimDestination, SimError, SimSource};
pub use vmm::{Fault, SimVmm};
pub use writer::StreamWriter;
