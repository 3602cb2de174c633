//! The hypervisor's side of a migration: the VMM's migration stream, and a simulated guest.

pub mod describe;
pub mod preflight;
pub mod qmp;
pub mod sim;
pub mod socket;
pub mod stream;
