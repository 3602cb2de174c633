//! What must hold in every state, and which states are good ends.

use dwcp_proto::handover::{Outcome, Resolution};
use dwcp_proto::journal::Entry;

use crate::model::Model;
use crate::world::{Vmm, World};

impl Model {
    /// An operator's claim stands in a journal.
    fn claimed(&self, world: &World) -> bool {
        let claim = Entry::Resolved(Resolution::StartHere { peer_fenced: true });
        world.nodes.iter().flat_map(|n| &n.disk).any(|number| self.entry(*number) == claim)
    }

    /// What must hold in every state.
    pub(crate) fn check(&self, world: &World) -> Result<(), String> {
        let runs = world.source_runs() as u8 + (world.nodes[1].vmm == Vmm::Runs) as u8;
        if self.setup.guest_ran && runs > 1 && !(world.false_claim && self.claimed(world)) {
            return Err("I1: two copies run, and no operator's false claim is on record".into());
        }
        if !self.setup.guest_ran && world.nodes[1].ran {
            return Err("a paused guest was started".into());
        }
        if world.never_ran_said && world.nodes[1].ran && !world.false_claim {
            return Err("I3: never_ran was said of a guest that ran".into());
        }
        Ok(())
    }

    /// Both ended, and the guest is where they say, or its loss has a name.
    pub(crate) fn settled(&self, world: &World) -> bool {
        let (Some(source), Some(destination)) = (&world.source, &world.destination) else { return false };
        let [Some(here), Some(there)] = world.nodes.each_ref().map(|n| n.outcome) else { return false };
        if !source.phase().ended() || !destination.phase().ended() {
            return false;
        }
        let [at_source, at_destination] = world.nodes.each_ref().map(|n| n.vmm);
        let back = world.source_runs() || at_source == Vmm::Post && !self.setup.guest_ran;
        match (here, there) {
            (Outcome::Moved, Outcome::Moved) => {
                let there = if self.setup.guest_ran { Vmm::Runs } else { Vmm::Loaded };
                !world.source_runs() && (at_destination == there || at_destination == Vmm::Gone)
            }
            (Outcome::Aborted(_), Outcome::Aborted(_)) => {
                (back || at_source == Vmm::Gone) && at_destination != Vmm::Runs
            }
            // The VMM died after `cont`, or nobody knows whether before.
            (Outcome::Lost | Outcome::Moved, Outcome::Lost) => at_destination == Vmm::Gone,
            // The source's guest went on, on an earlier promise or an operator's word.
            (Outcome::Aborted(_), Outcome::Lost) => back || at_source == Vmm::Gone,
            // An operator moved it while the source's VMM was gone, or took it back when the destination's had died.
            (Outcome::Aborted(_), Outcome::Moved) => {
                at_source == Vmm::Gone || world.false_claim || world.fenced && at_destination == Vmm::Gone
            }
            (Outcome::Moved | Outcome::Lost, Outcome::Aborted(_)) => world.left_to_peer,
            (Outcome::Lost, Outcome::Moved) => false,
        }
    }

    /// The source's guest has not been given away, so the source must be able to run it without anybody's help.
    pub(crate) fn source_owns(&self, world: &World) -> bool {
        !world.commit_requested && world.nodes[0].vmm != Vmm::Gone
    }
}
