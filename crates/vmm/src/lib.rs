//! The hypervisor's side of a migration: the VMM's migration stream, and a simulated guest.

pub mod sim;
pub mod stream;
