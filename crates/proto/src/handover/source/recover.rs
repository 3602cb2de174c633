//! The source after a restart.

use super::Source;
use crate::handover::{AbortReason, Alarm, BadJournal, Outcome, Resolution, SourcePhase, VmmState};
use crate::journal::Entry;

impl Source {
    /// Goes on after a restart from what is durable. `vmm` is what this side's VMM does now; `None` if it cannot be
    /// asked. Before `commit` the migration is taken back, after it the commit is sent again.
    pub fn recover(entries: &[Entry], vmm: Option<VmmState>) -> Result<Self, BadJournal> {
        let Some(Entry::Prepared(prepared)) = entries.first() else {
            return Err(BadJournal("a source's journal begins with `prepared`"));
        };
        let mut source = Self::fresh(prepared);
        source.touched = true;
        source.gone = vmm == Some(VmmState::Gone);
        let mut done = false;
        for entry in &entries[1..] {
            source.phase = match entry {
                Entry::SourceLost(delivery) => {
                    source.delivery = Some(*delivery);
                    source.gone = true;
                    SourcePhase::SourceLost
                }
                Entry::Commit(receipt) => {
                    source.receipt = Some(*receipt);
                    SourcePhase::Committed
                }
                Entry::Aborted { reason } => {
                    source.reason = *reason;
                    SourcePhase::Restoring
                }
                Entry::Lost => SourcePhase::Lost,
                Entry::Resolved(Resolution::StartHere { peer_fenced }) => {
                    source.reason = AbortReason::Operator;
                    if *peer_fenced || source.phase == SourcePhase::Lost {
                        SourcePhase::Restoring
                    } else {
                        SourcePhase::Withdrawing
                    }
                }
                Entry::Resolved(Resolution::LeaveToPeer) => {
                    source.left = true;
                    SourcePhase::Moved
                }
                Entry::Done { moved } => {
                    done = true;
                    if *moved { SourcePhase::Moved } else { SourcePhase::Aborted }
                }
                Entry::Note(_) => source.phase,
                _ => return Err(BadJournal("an entry of the other role, or `prepared` twice")),
            };
        }
        source.resume_life(vmm, done);
        Ok(source)
    }

    fn resume_life(&mut self, vmm: Option<VmmState>, done: bool) {
        match self.phase {
            SourcePhase::Preparing if self.gone => self.abort_now(AbortReason::VmmGoneSource),
            SourcePhase::Preparing => self.abort_now(AbortReason::AgentRestarted),
            SourcePhase::Committed | SourcePhase::Withdrawing => {
                self.commit_sent = true;
                // Only the destination's `NeverRan` (or a stranger) can have resumed it: ask before anything else.
                if vmm == Some(VmmState::Running) {
                    self.runs_here = true;
                    self.phase = SourcePhase::Withdrawing;
                    self.alarm(Alarm::ForeignStart);
                }
            }
            SourcePhase::Restoring => self.restore(),
            SourcePhase::Moved if done => {
                self.settled = !self.left;
                self.finish(Outcome::Moved);
            }
            SourcePhase::Moved => self.write_done(true),
            SourcePhase::Aborted => self.finish(Outcome::Aborted(self.reason)),
            SourcePhase::Lost => {
                self.settled = true;
                self.finish(Outcome::Lost);
            }
            _ => {}
        }
    }
}
