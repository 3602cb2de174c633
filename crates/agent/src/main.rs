//! (being laid)
mod config;
fn main() {}
