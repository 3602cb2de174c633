//! A deterministic simulation of a migration: sender, receiver, both handover machines, negotiation, and the drivers' part around
//! them, in a world that a seed draws.
//!
//! ```text
//! seed ─► Scenario ─► World: agents, VMMs, journals, connections, clocks ─► event by event, checked ─► End
//! ```
//! No threads, no sleeping: the clock jumps from one event to the next. A world has faults up to some moment; from there on it is
//! fair, and must end within a bound.
//!
//! Rules, held at every step: chunks are applied once, in order, without a gap, as they were made; nothing acknowledged is
//! sent again; the window holds on both sides; honest ends never accuse each other; one running copy of the guest; a migration
//! fails only for a cause; after it failed a second one succeeds; v3 is left within a second of a word against it.

mod agent;
mod data;
mod faults;
mod flow;
mod hand;
mod links;
mod net;
pub(crate) mod queue;
mod rng;
pub(crate) mod scenario;
mod seal;
mod turn;
mod world;

use agent::Vmm;
use rng::Rng;
use scenario::Scenario;
use seal::Seal;
pub(crate) use seal::{Real, StandIn};
use world::World;
pub(crate) use world::{Broken, End, Tally};

/// Runs the world of `seed`, changed by `adapt`, to its end; the end of its first migration.
pub(crate) fn run<X: Seal>(
    seed: u64,
    adapt: impl Fn(&mut Scenario),
    tally: &mut Tally,
) -> Result<End, Broken> {
    let broken = |rule| Broken::early(seed, rule);
    let mut rng = Rng::new(seed);
    let mut scenario = Scenario::draw(&mut rng).map_err(broken)?;
    adapt(&mut scenario);
    let end = World::<X>::new(scenario.clone(), rng.clone(), tally).map_err(broken)?.run(seed)?;
    if end.moved || end.source != Vmm::Idle {
        return Ok(end);
    }
    // A second migration succeeds.
    let again = World::<X>::new(scenario.fair(), rng, tally).map_err(broken)?.run(seed)?;
    if !again.moved {
        return Err(broken("I5: the second migration did not succeed".into()));
    }
    tally.second += 1;
    Ok(end)
}
