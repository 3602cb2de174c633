//! The destination after a restart.

use super::Destination;
use crate::handover::{AbortReason, BadJournal, DestinationPhase, Outcome, VmmCommand, VmmState};
use crate::journal::Entry;

impl Destination {
    /// Goes on after a restart from what is durable. `vmm` is what this side's VMM does now; `None` if it cannot be
    /// asked. Before `receipt` the migration is dropped; after it the source is asked; after `starting` the guest is
    /// started, unless it runs already.
    pub fn recover(entries: &[Entry], vmm: Option<VmmState>) -> Result<Self, BadJournal> {
        let Some(Entry::Accepted(accepted)) = entries.first() else {
            return Err(BadJournal("a destination's journal begins with `accepted`"));
        };
        let mut destination = Self::fresh(accepted);
        destination.gone = vmm == Some(VmmState::Gone);
        destination.unknown = vmm.is_none();
        let mut done = false;
        for entry in &entries[1..] {
            destination.phase = match entry {
                Entry::Receipt(receipt) => {
                    destination.receipt = Some(*receipt);
                    DestinationPhase::InDoubt
                }
                Entry::Starting { run } => DestinationPhase::Starting { run: *run },
                Entry::Running => DestinationPhase::Moved,
                Entry::NeverRan { reason } => {
                    destination.reason = *reason;
                    destination.promised = true;
                    DestinationPhase::Dropping
                }
                Entry::Lost => {
                    destination.reason = AbortReason::VmmGoneDestination;
                    destination.promised = true;
                    destination.may_have_run = true;
                    DestinationPhase::Dropping
                }
                Entry::Done { .. } => {
                    done = true;
                    destination.phase
                }
                Entry::Resolved(_) | Entry::Note(_) => destination.phase,
                _ => return Err(BadJournal("an entry of the other role, or `accepted` twice")),
            };
        }
        destination.resume_life(vmm, done);
        Ok(destination)
    }

    /// Goes on with receiving after a restart, where the connection to the VMM has outlived this agent and the VMM still waits: as after
    /// `accepted`, `stop` first. `None` where more was decided, or less: then [`Destination::recover`].
    ///
    /// Nothing was signed yet, so the source cannot tell this life from the one before but by what it asks for.
    pub fn go_on(entries: &[Entry]) -> Option<Self> {
        let [Entry::Accepted(accepted)] = entries else { return None };
        let mut destination = Self::fresh(accepted);
        destination.phase = DestinationPhase::Arming;
        destination.command(VmmCommand::StopWhileIncoming);
        Some(destination)
    }

    fn resume_life(&mut self, vmm: Option<VmmState>, done: bool) {
        match self.phase {
            DestinationPhase::InDoubt => match vmm {
                Some(VmmState::Gone) => self.drop_guest(AbortReason::VmmGoneDestination),
                Some(VmmState::Running) => self.foreign_start(),
                None => self.command(VmmCommand::Query),
                Some(_) => {}
            },
            DestinationPhase::Starting { run: false } => self.moved(false),
            DestinationPhase::Starting { run: true } => {
                self.uncertain = true;
                self.phase = DestinationPhase::Resuming;
                match vmm {
                    Some(VmmState::Running) => self.moved(true),
                    Some(VmmState::Gone) => self.lost(),
                    Some(_) => self.command(VmmCommand::Cont),
                    None => self.command(VmmCommand::Query),
                }
            }
            DestinationPhase::Moved => self.finish(Outcome::Moved),
            DestinationPhase::Dropping if done => {
                self.phase = DestinationPhase::Dropped;
                self.finish(self.dropped_outcome());
            }
            DestinationPhase::Dropping => self.dropped_if_safe(),
            // Nothing was promised yet, so nothing was signed: take it back.
            _ if self.gone => self.drop_guest(AbortReason::VmmGoneDestination),
            _ => self.drop_guest(AbortReason::AgentRestarted),
        }
    }
}
