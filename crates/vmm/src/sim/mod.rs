//! A simulated VMM, for tests that need no hypervisor.
mod writer;
pub use writer::StreamWriter;
