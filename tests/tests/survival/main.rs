//! What must not hurt: attacks, kills and faults, on real agents with simulated VMMs, real QEMUs and a real line.
//!
//! `cargo xtask faults` runs all of it and prints the table; `cargo xtask soak` repeats the kills as often as asked.

mod around;
mod attacks;
mod faults;
mod kills;
mod lines;
mod middle;
mod repeat;
mod together;
