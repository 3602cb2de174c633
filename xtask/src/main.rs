//! The chores of this repository. `cargo xtask demo` shows the product, `cargo xtask test` tests it, from nothing.

mod apt;
mod check;
mod compare;
mod coverage;
mod cpio;
mod deb;
mod demo;
mod drill;
mod faults;
mod fuzz;
mod run;
mod setup;
mod soak;
mod test;
mod tools;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, long_about = None)]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Move a live guest from one agent to another and back, and show what it took
    Demo,
    /// Run all tests, from nothing: laboratory, build, unit, documentation and end-to-end tests
    Test,
    /// Check format, lints, documentation, licences, and that no file names a path of this machine
    Check,
    /// Fuzz every target
    Fuzz {
        /// Seconds for each of them
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Let go wrong what can go wrong, and print the table: fault, expected, result, time to detect and recover
    Faults(faults::Arguments),
    /// Migrate and kill many times, and say what bound on the failure rate that shows; writes docs/soak.md
    Soak(soak::Arguments),
    /// Count the lines that the tests run; builds everything anew, with counters, and takes half an hour
    Coverage(coverage::Arguments),
    /// Hold a drill with a fleet of simulated nodes; takes minutes
    #[command(subcommand)]
    Drill(drill::Drill),
    /// Measure this product beside what else there is; takes minutes
    Compare(compare::Arguments),
    /// Build the Debian packages into target/debian: dwcpd, dwcp-control
    Deb,
    /// Get QEMU 7.2 and 10.0 and a kernel from Debian's packages into target/lab, and build the test guest
    Setup,
}

fn main() -> ExitCode {
    let done = match Arguments::parse().chore {
        Chore::Demo => demo::demo(),
        Chore::Test => test::test(),
        Chore::Check => check::check(),
        Chore::Fuzz { seconds } => fuzz::fuzz(seconds),
        Chore::Faults(arguments) => faults::faults(&arguments),
        Chore::Soak(arguments) => soak::soak(&arguments),
        Chore::Coverage(arguments) => coverage::coverage(&arguments),
        Chore::Drill(drill) => drill::drill(&drill),
        Chore::Compare(arguments) => compare::compare(&arguments),
        Chore::Deb => {
            deb::deb().map(|packages| packages.iter().for_each(|package| println!("{}", package.display())))
        }
        Chore::Setup => setup::setup().map(drop),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
