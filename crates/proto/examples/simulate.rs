//! Long runs of the simulation in `tests/simulation`: world after world, each from its own seed.
//!
//! ```text
//! cargo run --release -p dwcp-proto --example simulate -- [--events N] [--seed FIRST] [--real] [--keep-going]
//! ```
//! Prints the seeds, what happened in the worlds and the events a second. A broken rule is printed with its seed and ends
//! the run with status 1; with `--keep-going` it goes on and counts.

#[path = "../tests/simulation/sim/mod.rs"]
mod sim;

use std::process::ExitCode;

use sim::{Broken, Real, StandIn, Tally};

/// What the command line asks for.
struct Run {
    events: u64,
    first: u64,
    real: bool,
    keep_going: bool,
}

fn main() -> ExitCode {
    let run = match parse(std::env::args().skip(1)) {
        Ok(run) => run,
        Err(why) => {
            eprintln!("{why}; simulate [--events N] [--seed FIRST] [--real] [--keep-going]");
            return ExitCode::from(2);
        }
    };
    #[expect(clippy::disallowed_methods, reason = "the speed of the simulation itself is measured")]
    let started = std::time::Instant::now();
    let mut tally = Tally::default();
    let mut broken = 0u64;
    let mut seed = run.first;
    while tally.events < run.events {
        if let Err(flaw) = world(&run, seed, &mut tally) {
            broken += 1;
            if !run.keep_going {
                println!("{flaw}");
                return ExitCode::FAILURE;
            }
            println!("seed {seed}: {}", flaw.rule);
        }
        seed += 1;
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{tally}");
    println!(
        "seeds {} to {}, {} events in {seconds:.1} s: {:.2} million events a second, {broken} broken",
        run.first,
        seed - 1,
        tally.events,
        tally.events as f64 / seconds / 1e6,
    );
    if broken > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn world(run: &Run, seed: u64, tally: &mut Tally) -> Result<(), Broken> {
    let end = match run.real {
        true => sim::run::<Real>(seed, |_| {}, tally),
        false => sim::run::<StandIn>(seed, |_| {}, tally),
    };
    end.map(drop)
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Run, String> {
    let mut run = Run { events: 10_000_000, first: 0, real: false, keep_going: false };
    while let Some(arg) = args.next() {
        let mut number = || {
            let text = args.next().ok_or_else(|| format!("{arg} needs a number"))?;
            text.replace('_', "").parse().map_err(|_| format!("{text} is not a number"))
        };
        match arg.as_str() {
            "--events" => run.events = number()?,
            "--seed" => run.first = number()?,
            "--real" => run.real = true,
            "--keep-going" => run.keep_going = true,
            other => return Err(format!("{other}: unknown")),
        }
    }
    Ok(run)
}
