//! The source's machine.

mod recover;

use std::collections::VecDeque;

use super::{
    AbortReason, Action, Afterwards, Alarm, Handled, Ignored, Input, Message, Outcome, Refused, Resolution,
    SourcePhase, Transfer, VmmCommand, VmmState,
};
use crate::fault::Mechanism;
use crate::journal::{Entry, Prepared};

/// A journal write whose outcome is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Write {
    Prepared,
    SourceLost,
    Commit,
    Aborted,
    Done,
    Lost,
    Resolved(Resolution),
}

/// The source's half of the handover. See the [module](super) for states and rules.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// Whether the guest ran before the migration, and so shall run after it.
    run: bool,
    on_success: Afterwards,
    phase: SourcePhase,
    writes: VecDeque<Write>,
    actions: VecDeque<Action>,
    delivery: Option<Transfer>,
    receipt: Option<Transfer>,
    reason: AbortReason,
    /// The VMM was told to migrate, perhaps by a life before this one.
    touched: bool,
    gone: bool,
    /// The guest was found running although the journal says `commit`.
    runs_here: bool,
    /// `Commit` may be on the wire.
    commit_sent: bool,
    /// The last VMM command was refused and waits for a retry.
    refused: bool,
    /// Ended by an operator's `LeaveToPeer`, without the destination's word.
    left: bool,
    /// The destination's last word is known.
    settled: bool,
    finished: bool,
}

impl Source {
    /// Starts: the first action writes `prepared`; nothing touches the VMM before it is durable.
    pub fn new(prepared: Prepared) -> Self {
        let mut source = Self::fresh(&prepared);
        source.write(Write::Prepared, Entry::Prepared(prepared.into()));
        source
    }

    fn fresh(prepared: &Prepared) -> Self {
        Source {
            run: prepared.guest_ran,
            on_success: prepared.on_success,
            phase: SourcePhase::Preparing,
            writes: VecDeque::new(),
            actions: VecDeque::new(),
            delivery: None,
            receipt: None,
            reason: AbortReason::AgentRestarted,
            touched: false,
            gone: false,
            runs_here: false,
            commit_sent: false,
            refused: false,
            left: false,
            settled: false,
            finished: false,
        }
    }

    /// Takes one input. An error leaves the machine as it was.
    pub fn handle(&mut self, input: Input) -> Result<Handled, Refused> {
        match input {
            Input::Journaled => self.written(true),
            Input::JournalFailed => self.written(false),
            Input::Whole(transfer) => self.whole(transfer),
            Input::Message(message) => self.message(message),
            Input::Connected => self.connected(),
            Input::Vmm(state) => self.vmm(state),
            Input::VmmRefused => self.vmm_refused(),
            Input::Abort(reason) => self.abort(reason),
            Input::Retry => self.retry(),
            Input::Resolve(resolution) => self.resolve(resolution),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Where it stands.
    pub fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// Whether it has ended and knows the destination's last word: the journal may go to the archive.
    pub fn settled(&self) -> bool {
        self.finished && self.settled
    }

    /// What `resolution` would do here, without doing it; an error if it would be refused.
    pub fn explain(&self, resolution: Resolution) -> Result<&'static str, Refused> {
        use SourcePhase::{Committed, Lost, SourceLost, Withdrawing};
        let fenced = matches!(resolution, Resolution::StartHere { peer_fenced: true });
        match (self.phase, resolution) {
            _ if !self.writes.is_empty() => Err(Refused::Busy),
            (Committed | Withdrawing, Resolution::StartHere { .. }) if fenced => {
                Ok("resumes the guest here at once, on your word that the destination's VMM has ended")
            }
            (Lost, Resolution::StartHere { .. }) if !self.gone => Ok(
                "resumes the guest here as it was at the handover; what it did at the destination since is lost, \
                    and its disks may have moved on",
            ),
            (Committed, Resolution::StartHere { .. }) => Ok(
                "asks the destination to drop the guest, and resumes it here only if it answers that it never ran",
            ),
            (Withdrawing, Resolution::StartHere { .. }) => Err(Refused::PeerNotFenced),
            (SourceLost | Committed | Withdrawing, Resolution::LeaveToPeer) => {
                Ok("never resumes the guest here; the destination may start it")
            }
            _ => Err(Refused::NotInDoubt { phase: self.phase.name() }),
        }
    }

    fn written(&mut self, ok: bool) -> Result<Handled, Refused> {
        let Some(write) = self.writes.pop_front() else {
            return Err(Refused::Unexpected { input: "outcome of a write", phase: self.phase.name() });
        };
        match (write, self.phase) {
            (Write::Prepared, SourcePhase::Preparing) if ok => {
                self.touched = true;
                self.phase = SourcePhase::Migrating;
                self.command(VmmCommand::StartMigration);
            }
            (Write::Prepared, SourcePhase::Preparing) => {
                self.reason = AbortReason::JournalFailed;
                self.send(Message::Abort(self.reason));
                self.forget();
            }
            (Write::Prepared, SourcePhase::Aborted) if ok => self.write_aborted(self.reason),
            (Write::Prepared, SourcePhase::Aborted) => self.forget(),
            (Write::Commit, SourcePhase::Committing) if ok || self.gone => {
                self.phase = SourcePhase::Committed;
                self.send_commit();
            }
            (Write::Commit, SourcePhase::Committing) => self.withdraw(AbortReason::JournalFailed),
            (Write::Commit, SourcePhase::Withdrawing) => self.write_aborted(self.reason),
            (Write::Aborted, SourcePhase::Withdrawing) if ok && !self.commit_sent => self.restore(),
            (Write::Aborted, SourcePhase::Withdrawing) => self.alarm(Alarm::JournalFailing),
            (Write::Aborted, SourcePhase::Aborted) => self.close(),
            (Write::Done, SourcePhase::Moved) => self.finish(Outcome::Moved),
            (Write::Done, SourcePhase::Aborted) => self.finish(Outcome::Aborted(self.reason)),
            (Write::Lost, SourcePhase::Lost) => self.finish(Outcome::Lost),
            (Write::Resolved(resolution), _) => self.resolved(resolution, ok),
            // A step that was overtaken.
            _ => {}
        }
        Ok(Handled::Taken)
    }

    fn whole(&mut self, transfer: Transfer) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Migrating => {
                self.delivery = Some(transfer);
                self.phase = SourcePhase::Delivered;
                self.commit_if_receipted();
                Ok(Handled::Taken)
            }
            SourcePhase::Preparing => Err(Refused::Unexpected { input: "whole", phase: self.phase.name() }),
            _ if self.delivery == Some(transfer) => Ok(Handled::Ignored(Ignored::Duplicate)),
            _ => Ok(Handled::Ignored(Ignored::Late)),
        }
    }

    fn message(&mut self, message: Message) -> Result<Handled, Refused> {
        match message {
            Message::Receipt(transfer) => self.receipt(transfer),
            Message::NeverRan(reason) => self.never_ran(reason),
            Message::Running => self.running(),
            Message::Lost => self.lost(),
            Message::Commit { .. } | Message::Abort(_) | Message::Settled => self.violation(&message),
        }
    }

    fn receipt(&mut self, transfer: Transfer) -> Result<Handled, Refused> {
        let message = Message::Receipt(transfer);
        if self.phase == SourcePhase::Preparing || self.receipt.is_some_and(|known| known != transfer) {
            return self.violation(&message);
        }
        let known = self.receipt.replace(transfer).is_some();
        match self.phase {
            SourcePhase::Delivered | SourcePhase::SourceLost if !known => self.commit_if_receipted(),
            SourcePhase::Committed => self.send_commit(),
            SourcePhase::Moved if !self.settled => match self.delivery {
                Some(delivery) if delivery != transfer => return self.violation(&message),
                _ => self.send_commit(),
            },
            SourcePhase::Withdrawing | SourcePhase::Restoring | SourcePhase::Aborted => {
                self.send(Message::Abort(self.reason))
            }
            SourcePhase::Migrating if !known => {}
            _ => return Ok(Handled::Ignored(Ignored::Duplicate)),
        }
        Ok(Handled::Taken)
    }

    /// The destination promises never to run the guest: from here on it is safe to resume, journal or not.
    fn never_ran(&mut self, reason: AbortReason) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Moved if !self.left => return self.violation(&Message::NeverRan(reason)),
            SourcePhase::Moved => {
                self.settled = true;
                self.phase = SourcePhase::Lost;
                self.alarm(Alarm::NobodyRuns);
                self.write(Write::Lost, Entry::Lost);
            }
            SourcePhase::Restoring => self.settled = true,
            SourcePhase::Aborted => self.settle(),
            SourcePhase::Preparing
            | SourcePhase::Migrating
            | SourcePhase::Delivered
            | SourcePhase::SourceLost => {
                self.settled = true;
                self.abort_now(reason);
            }
            SourcePhase::Committing
            | SourcePhase::Committed
            | SourcePhase::Withdrawing
            | SourcePhase::Lost => {
                self.settled = true;
                self.finished = false;
                self.reason = reason;
                self.write_aborted(reason);
                self.restore();
            }
        }
        Ok(Handled::Taken)
    }

    fn running(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Committed | SourcePhase::Withdrawing if self.runs_here => {
                self.alarm(Alarm::Conflict);
            }
            SourcePhase::Committed => self.moved(),
            SourcePhase::Withdrawing if self.commit_sent => self.moved(),
            SourcePhase::Moved => self.settle(),
            SourcePhase::Lost => return Ok(Handled::Ignored(Ignored::Ended)),
            // An operator started it there. With this side's VMM gone that was right; else the claim was false.
            SourcePhase::Restoring | SourcePhase::Aborted if self.gone => self.settle(),
            _ if self.gone => self.moved(),
            _ => {
                self.alarm(Alarm::Conflict);
                if matches!(self.phase, SourcePhase::Restoring | SourcePhase::Aborted) {
                    self.send(Message::Abort(self.reason));
                }
            }
        }
        Ok(Handled::Taken)
    }

    fn lost(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Withdrawing if self.runs_here => {
                return self.never_ran(AbortReason::VmmGoneDestination);
            }
            SourcePhase::Committed | SourcePhase::Committing | SourcePhase::Withdrawing => {
                self.settled = true;
                self.phase = SourcePhase::Lost;
                self.write(Write::Lost, Entry::Lost);
            }
            SourcePhase::Preparing
            | SourcePhase::Migrating
            | SourcePhase::Delivered
            | SourcePhase::SourceLost => {
                self.settled = true;
                self.abort_now(AbortReason::VmmGoneDestination);
            }
            SourcePhase::Restoring => self.settled = true,
            SourcePhase::Aborted | SourcePhase::Moved | SourcePhase::Lost => self.settle(),
        }
        Ok(Handled::Taken)
    }

    fn connected(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Committed => self.send_commit(),
            SourcePhase::Moved if !self.settled => self.send_commit(),
            SourcePhase::Withdrawing => self.send(Message::Abort(self.reason)),
            SourcePhase::Restoring | SourcePhase::Aborted if !self.settled => {
                self.send(Message::Abort(self.reason));
            }
            _ => {}
        }
        Ok(Handled::Taken)
    }

    fn vmm(&mut self, state: VmmState) -> Result<Handled, Refused> {
        if state == VmmState::Gone {
            return self.vmm_gone();
        }
        if self.phase != SourcePhase::Restoring {
            return Ok(Handled::Ignored(Ignored::Late));
        }
        match state {
            VmmState::Stopped if self.run => self.command(VmmCommand::Cont),
            VmmState::Stopped | VmmState::Paused | VmmState::Running => self.aborted(),
            VmmState::Incoming | VmmState::Gone => {
                return Err(Refused::Unexpected { input: "an incoming VMM", phase: self.phase.name() });
            }
        }
        Ok(Handled::Taken)
    }

    fn vmm_gone(&mut self) -> Result<Handled, Refused> {
        if std::mem::replace(&mut self.gone, true) {
            return Ok(Handled::Ignored(Ignored::Duplicate));
        }
        match self.phase {
            SourcePhase::Preparing | SourcePhase::Migrating => self.abort_now(AbortReason::VmmGoneSource),
            SourcePhase::Delivered => {
                self.phase = SourcePhase::SourceLost;
                if let Some(delivery) = self.delivery {
                    self.write(Write::SourceLost, Entry::SourceLost(delivery));
                }
            }
            SourcePhase::Restoring => self.aborted(),
            _ => {}
        }
        Ok(Handled::Taken)
    }

    fn vmm_refused(&mut self) -> Result<Handled, Refused> {
        if self.phase != SourcePhase::Restoring {
            return Ok(Handled::Ignored(Ignored::Late));
        }
        self.refused = true;
        self.alarm(Alarm::RestoreRefused);
        Ok(Handled::Taken)
    }

    fn abort(&mut self, reason: AbortReason) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Preparing | SourcePhase::Migrating | SourcePhase::Delivered => {
                self.abort_now(reason)
            }
            SourcePhase::SourceLost => return Ok(Handled::Ignored(Ignored::OnlyCopyAtPeer)),
            SourcePhase::Committing if !self.gone => self.withdraw(reason),
            SourcePhase::Committing | SourcePhase::Committed => {
                return Ok(Handled::Ignored(Ignored::CommitDecided));
            }
            SourcePhase::Withdrawing | SourcePhase::Restoring => {
                return Ok(Handled::Ignored(Ignored::Ending));
            }
            SourcePhase::Aborted | SourcePhase::Moved | SourcePhase::Lost => {
                return Ok(Handled::Ignored(Ignored::Ended));
            }
        }
        Ok(Handled::Taken)
    }

    fn retry(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            SourcePhase::Withdrawing if self.writes.is_empty() && !self.commit_sent => {
                self.write_aborted(self.reason);
            }
            SourcePhase::Restoring if std::mem::take(&mut self.refused) => {
                self.command(VmmCommand::CancelMigration);
            }
            _ => return Ok(Handled::Ignored(Ignored::NothingToRetry)),
        }
        Ok(Handled::Taken)
    }

    fn resolve(&mut self, resolution: Resolution) -> Result<Handled, Refused> {
        self.explain(resolution)?;
        self.write(Write::Resolved(resolution), Entry::Resolved(resolution));
        Ok(Handled::Taken)
    }

    /// The operator's decision is on record (or not). The peer's word may have come meanwhile and goes first.
    fn resolved(&mut self, resolution: Resolution, ok: bool) {
        use SourcePhase::{Committed, Lost, SourceLost, Withdrawing};
        if !ok {
            return self.alarm(Alarm::ResolveNotRecorded);
        }
        match (self.phase, resolution) {
            (Committed, Resolution::StartHere { peer_fenced: false }) => self.withdraw(AbortReason::Operator),
            (Committed | Withdrawing | Lost, Resolution::StartHere { .. }) => {
                self.reason = AbortReason::Operator;
                self.finished = false;
                self.write_aborted(self.reason);
                self.restore();
            }
            (SourceLost | Committed | Withdrawing, Resolution::LeaveToPeer) => {
                self.left = true;
                self.phase = SourcePhase::Moved;
                self.write_done(true);
                self.send_commit();
            }
            _ => {}
        }
    }

    /// Commits if the receipt is there and says what was delivered.
    fn commit_if_receipted(&mut self) {
        match (self.delivery, self.receipt) {
            (Some(delivery), Some(receipt)) if delivery == receipt || Mechanism::Receipt.is_off() => {
                self.phase = SourcePhase::Committing;
                self.write(Write::Commit, Entry::Commit(receipt));
            }
            (Some(_), Some(_)) => self.abort_now(AbortReason::Integrity),
            _ => {}
        }
    }

    /// Decides against, before any commit was requested: the journal says so already, so nothing waits for it.
    fn abort_now(&mut self, reason: AbortReason) {
        self.reason = reason;
        if !self.settled {
            self.send(Message::Abort(reason));
        }
        if self.phase == SourcePhase::Preparing && !self.writes.is_empty() {
            // Nothing may follow `prepared` before it is known to be there; the VMM is untouched.
            self.phase = SourcePhase::Aborted;
            return;
        }
        // The VMM's command goes first: it must not wait behind a slow disk.
        self.writes.push_back(Write::Aborted);
        self.restore();
        self.actions.push_back(Action::Journal(Entry::Aborted { reason }));
    }

    /// Ends without a journal: its first line could not be written, so the VMM is untouched.
    fn forget(&mut self) {
        self.phase = SourcePhase::Aborted;
        self.finish(Outcome::Aborted(self.reason));
    }

    /// Takes back a commit that may be on disk, or even on the wire.
    fn withdraw(&mut self, reason: AbortReason) {
        self.phase = SourcePhase::Withdrawing;
        self.reason = reason;
        self.send(Message::Abort(reason));
        if self.writes.is_empty() && !self.commit_sent {
            self.write_aborted(reason);
        }
    }

    fn restore(&mut self) {
        if self.touched && !self.gone {
            self.phase = SourcePhase::Restoring;
            self.command(VmmCommand::CancelMigration);
        } else {
            self.aborted();
        }
    }

    fn aborted(&mut self) {
        self.phase = SourcePhase::Aborted;
        if self.gone {
            self.alarm(Alarm::GuestGone);
        }
        if !self.writes.contains(&Write::Aborted) {
            self.close();
        }
    }

    /// The decision is written (or could not be), the VMM needs nothing more.
    fn close(&mut self) {
        if !self.writes.contains(&Write::Done) {
            self.write_done(false);
        }
    }

    fn moved(&mut self) {
        self.phase = SourcePhase::Moved;
        self.settled = true;
        // Before `done`: a restart in between must not leave the VMM behind.
        if self.on_success == Afterwards::Quit && !self.gone {
            self.command(VmmCommand::Quit);
        }
        self.write_done(true);
    }

    /// The destination's last word came (again); it is told once this side's end is on record.
    fn settle(&mut self) {
        self.settled = true;
        if self.finished {
            self.send(Message::Settled);
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.finished, true) {
            self.actions.push_back(Action::Finish(outcome));
            if self.settled {
                self.send(Message::Settled);
            }
        }
    }

    fn write_aborted(&mut self, reason: AbortReason) {
        self.write(Write::Aborted, Entry::Aborted { reason });
    }

    fn write_done(&mut self, moved: bool) {
        self.write(Write::Done, Entry::Done { moved });
    }

    fn write(&mut self, write: Write, entry: Entry) {
        self.writes.push_back(write);
        self.actions.push_back(Action::Journal(entry));
    }

    fn send_commit(&mut self) {
        if let Some(receipt) = self.receipt {
            self.commit_sent = true;
            self.send(Message::Commit { receipt: receipt.digest(), run: self.run });
        }
    }

    fn send(&mut self, message: Message) {
        self.actions.push_back(Action::Send(message));
    }

    fn command(&mut self, command: VmmCommand) {
        self.actions.push_back(Action::Vmm(command));
    }

    fn alarm(&mut self, alarm: Alarm) {
        self.actions.push_back(Action::Alarm(alarm));
    }

    fn violation(&self, message: &Message) -> Result<Handled, Refused> {
        Err(Refused::Violation { message: message.name(), phase: self.phase.name() })
    }
}
