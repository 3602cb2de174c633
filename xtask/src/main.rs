//! The chores of this repository. `cargo xtask demo` shows the product, `cargo xtask test` tests it, from nothing.

mod apt;
mod cpio;
mod run;
mod setup;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, long_about = None)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Get QEMU 7.2 and 10.0 and a kernel from Debian's packages into target/lab, and build the test guest
    Setup,
}

fn main() -> Result<()> {
    match Arguments::parse().chore {
        Chore::Setup => setup::setup().map(drop),
    }
}
