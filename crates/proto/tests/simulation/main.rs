//! Sender, receiver, handover and negotiation in simulated worlds, each drawn from a seed.
//!
//! `SEED=n cargo test --release -p dwcp-proto --test simulation one_seed -- --nocapture` runs one world again;
//! `cargo run --release -p dwcp-proto --example simulate -- --events 1000000000` runs many.

mod sim;

use sim::{Mutant, Real, Scenario, StandIn, Tally};

/// Seeds that once broke a rule.
const REGRESSIONS: &[u64] = &[];

#[test]
fn seeds_that_once_failed() {
    let mut tally = Tally::default();
    for seed in REGRESSIONS {
        sim::run::<StandIn>(*seed, |_| {}, &mut tally).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

#[test]
fn one_seed() {
    let Some(seed) = std::env::var("SEED").ok().and_then(|s| s.parse().ok()) else { return };
    let mut tally = Tally::default();
    sim::run::<StandIn>(seed, |_| {}, &mut tally).unwrap_or_else(|broken| panic!("{broken}"));
    println!("{tally:#?}");
}

#[test]
fn many_worlds() {
    let mut tally = Tally::default();
    for seed in 0..2000 {
        sim::run::<StandIn>(seed, |_| {}, &mut tally).unwrap_or_else(|broken| panic!("{broken}"));
    }
    println!("{tally:#?}");
}
