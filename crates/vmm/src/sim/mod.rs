//! A simulated VMM, for tests that need no hypervisor.
mod guest;
mod stream;
mod writer;

pub use guest::{GuestSpec, SimBlock, SimGuest};
pub use stream::{MACHINE, SimDestination, SimError, SimSource};
pub use writer::StreamWriter;
