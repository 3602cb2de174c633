//! The destination's machine.

mod recover;

use std::collections::VecDeque;

use super::{
    AbortReason, Action, Afterwards, Alarm, DestinationPhase, Handled, Ignored, Input, Message, Outcome,
    Refused, Resolution, Transfer, VmmCommand, VmmState,
};
use crate::journal::{Accepted, Entry};

/// A journal write whose outcome is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Write {
    Accepted,
    Receipt,
    Starting,
    Running,
    /// `never_ran`, or `lost` where that would be untrue.
    Promise,
    Done,
    Resolved(Resolution),
}

/// The destination's half of the handover. See the [module](super) for states and rules.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    on_abort: Afterwards,
    phase: DestinationPhase,
    writes: VecDeque<Write>,
    actions: VecDeque<Action>,
    receipt: Option<Transfer>,
    reason: AbortReason,
    gone: bool,
    /// Commit that waits until the VMM, unknown since the restart, has shown its state.
    held_commit: Option<bool>,
    /// The VMM's state is unknown since the restart.
    unknown: bool,
    /// A life before this one may have issued `cont`: a refusal proves nothing any more.
    uncertain: bool,
    /// The guest ran here, or may have: `NeverRan` would be a lie.
    may_have_run: bool,
    /// The promise is durable.
    promised: bool,
    /// The last VMM command was refused and waits for a retry.
    refused: bool,
    /// The source has our last word on record.
    settled: bool,
    finished: bool,
}

impl Destination {
    /// Starts: the first action writes `accepted`; nothing touches the VMM before it is durable.
    pub fn new(accepted: Accepted) -> Self {
        let mut destination = Self::fresh(&accepted);
        destination.write(Write::Accepted, Entry::Accepted(accepted.into()));
        destination
    }

    fn fresh(accepted: &Accepted) -> Self {
        Destination {
            on_abort: accepted.on_abort,
            phase: DestinationPhase::Preparing,
            writes: VecDeque::new(),
            actions: VecDeque::new(),
            receipt: None,
            reason: AbortReason::AgentRestarted,
            gone: false,
            held_commit: None,
            unknown: false,
            uncertain: false,
            may_have_run: false,
            promised: false,
            refused: false,
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
    pub fn phase(&self) -> DestinationPhase {
        self.phase
    }

    /// Whether it has ended and the source has its last word: the journal may go to the archive.
    pub fn settled(&self) -> bool {
        self.finished && self.settled
    }

    /// What `resolution` would do here, without doing it; an error if it would be refused.
    pub fn explain(&self, resolution: Resolution) -> Result<&'static str, Refused> {
        use DestinationPhase::{InDoubt, StartRefused};
        match (self.phase, resolution) {
            _ if !self.writes.is_empty() => Err(Refused::Busy),
            (InDoubt, Resolution::StartHere { peer_fenced: true }) => {
                Ok("runs the guest here at once, on your word that the source's VMM has ended")
            }
            (InDoubt, Resolution::StartHere { peer_fenced: false }) => Err(Refused::PeerNotFenced),
            (StartRefused, Resolution::StartHere { .. }) => {
                Ok("the guest is committed to this side: tries `cont` again")
            }
            (InDoubt, Resolution::LeaveToPeer) => Ok(
                "promises the source that the guest never runs here; with the source's VMM gone the guest is lost",
            ),
            (StartRefused, Resolution::LeaveToPeer) if self.uncertain => Ok(
                "ends the VMM here; whether the guest ran is unknown, so an operator must start it at the source",
            ),
            (StartRefused, Resolution::LeaveToPeer) => {
                Ok("gives the guest, which never ran here, back to the source")
            }
            _ => Err(Refused::NotInDoubt { phase: self.phase.name() }),
        }
    }

    fn written(&mut self, ok: bool) -> Result<Handled, Refused> {
        let Some(write) = self.writes.pop_front() else {
            return Err(Refused::Unexpected { input: "outcome of a write", phase: self.phase.name() });
        };
        match (write, self.phase) {
            (Write::Accepted, DestinationPhase::Preparing) if ok => {
                self.phase = DestinationPhase::Arming;
                self.command(VmmCommand::StopWhileIncoming);
            }
            (Write::Accepted, DestinationPhase::Preparing) => self.forget(AbortReason::JournalFailed),
            (Write::Accepted, DestinationPhase::Dropping) if ok => self.promise(),
            (Write::Accepted, DestinationPhase::Dropping) => self.forget(self.reason),
            (Write::Receipt, DestinationPhase::Signing) if ok => {
                self.phase = DestinationPhase::InDoubt;
                self.send_receipt();
            }
            (Write::Starting, DestinationPhase::Starting { run: true }) if ok => {
                self.phase = DestinationPhase::Resuming;
                self.command(VmmCommand::Cont);
            }
            (Write::Starting, DestinationPhase::Starting { run: false }) if ok => self.moved(false),
            (Write::Receipt, DestinationPhase::Signing)
            | (Write::Starting, DestinationPhase::Starting { .. }) => {
                self.drop_guest(AbortReason::JournalFailed)
            }
            (Write::Promise, DestinationPhase::Dropping) => {
                self.promised = ok;
                if !ok {
                    self.alarm(Alarm::JournalFailing);
                }
                self.dropped_if_safe();
            }
            (Write::Done, DestinationPhase::Dropped) => self.finish(self.dropped_outcome()),
            (Write::Running, DestinationPhase::Moved) => self.finish(Outcome::Moved),
            (Write::Resolved(resolution), _) => self.resolved(resolution, ok),
            // A step that was overtaken.
            _ => {}
        }
        Ok(Handled::Taken)
    }

    fn whole(&mut self, transfer: Transfer) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::Receiving => {
                self.receipt = Some(transfer);
                self.phase = DestinationPhase::Signing;
                self.write(Write::Receipt, Entry::Receipt(transfer));
                Ok(Handled::Taken)
            }
            DestinationPhase::Preparing | DestinationPhase::Arming => {
                Err(Refused::Unexpected { input: "whole", phase: self.phase.name() })
            }
            _ if self.receipt == Some(transfer) => Ok(Handled::Ignored(Ignored::Duplicate)),
            _ => Ok(Handled::Ignored(Ignored::Late)),
        }
    }

    fn message(&mut self, message: Message) -> Result<Handled, Refused> {
        match message {
            Message::Commit { receipt, run } => self.commit(&message, receipt, run),
            Message::Abort(reason) => self.peer_abort(reason),
            Message::Settled if self.phase.ended() => {
                self.settled = true;
                Ok(Handled::Taken)
            }
            // The word that it answers came from a life before this one.
            Message::Settled => Ok(Handled::Ignored(Ignored::Late)),
            _ => self.violation(&message),
        }
    }

    fn commit(&mut self, message: &Message, digest: [u8; 32], run: bool) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::InDoubt if self.receipt.is_none_or(|r| r.digest() != digest) => {
                return self.violation(message);
            }
            // `recover` has asked the VMM.
            DestinationPhase::InDoubt if self.unknown => self.held_commit = Some(run),
            DestinationPhase::InDoubt => self.start(run),
            DestinationPhase::Starting { .. }
            | DestinationPhase::Resuming
            | DestinationPhase::StartRefused => {
                return Ok(Handled::Ignored(Ignored::Duplicate));
            }
            DestinationPhase::Dropping => return Ok(Handled::Ignored(Ignored::Ending)),
            DestinationPhase::Dropped | DestinationPhase::Moved => self.send_word(),
            DestinationPhase::Preparing
            | DestinationPhase::Arming
            | DestinationPhase::Receiving
            | DestinationPhase::Signing => return self.violation(message),
        }
        Ok(Handled::Taken)
    }

    fn peer_abort(&mut self, reason: AbortReason) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::Preparing
            | DestinationPhase::Arming
            | DestinationPhase::Receiving
            | DestinationPhase::Signing
            | DestinationPhase::InDoubt => self.drop_guest(reason),
            DestinationPhase::Starting { .. }
            | DestinationPhase::Resuming
            | DestinationPhase::StartRefused => {
                return Ok(Handled::Ignored(Ignored::CommitDecided));
            }
            DestinationPhase::Dropping => return Ok(Handled::Ignored(Ignored::Ending)),
            DestinationPhase::Dropped | DestinationPhase::Moved => self.send_word(),
        }
        Ok(Handled::Taken)
    }

    fn connected(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::InDoubt => self.send_receipt(),
            DestinationPhase::Dropped | DestinationPhase::Moved if !self.settled => self.send_word(),
            _ => {}
        }
        Ok(Handled::Taken)
    }

    fn vmm(&mut self, state: VmmState) -> Result<Handled, Refused> {
        self.unknown = false;
        match (state, self.phase) {
            (VmmState::Gone, _) => return self.vmm_gone(),
            (VmmState::Incoming, DestinationPhase::Arming) => {
                self.phase = DestinationPhase::Receiving;
                self.command(VmmCommand::AcceptStream);
            }
            (VmmState::Running, DestinationPhase::Resuming | DestinationPhase::StartRefused) => {
                self.moved(true)
            }
            (VmmState::Running, DestinationPhase::InDoubt) => self.foreign_start(),
            (VmmState::Paused, DestinationPhase::Resuming) => self.command(VmmCommand::Cont),
            (_, DestinationPhase::InDoubt) => {
                if let Some(run) = self.held_commit.take() {
                    self.start(run);
                }
            }
            _ => return Ok(Handled::Ignored(Ignored::Late)),
        }
        Ok(Handled::Taken)
    }

    fn vmm_gone(&mut self) -> Result<Handled, Refused> {
        if std::mem::replace(&mut self.gone, true) {
            return Ok(Handled::Ignored(Ignored::Duplicate));
        }
        match self.phase {
            DestinationPhase::Preparing
            | DestinationPhase::Arming
            | DestinationPhase::Receiving
            | DestinationPhase::Signing
            | DestinationPhase::InDoubt
            | DestinationPhase::Starting { .. } => self.drop_guest(AbortReason::VmmGoneDestination),
            DestinationPhase::StartRefused if !self.uncertain => {
                self.drop_guest(AbortReason::VmmGoneDestination)
            }
            DestinationPhase::Resuming | DestinationPhase::StartRefused => self.lost(),
            DestinationPhase::Dropping
                if !self.writes.iter().any(|w| matches!(w, Write::Accepted | Write::Promise)) =>
            {
                self.dropped_if_safe();
            }
            DestinationPhase::Dropped => self.close(),
            DestinationPhase::Dropping => {}
            DestinationPhase::Moved => return Ok(Handled::Ignored(Ignored::Ended)),
        }
        Ok(Handled::Taken)
    }

    fn vmm_refused(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::Arming => self.drop_guest(AbortReason::VmmFailedDestination),
            DestinationPhase::Resuming => {
                self.phase = DestinationPhase::StartRefused;
                self.alarm(Alarm::StartRefused);
            }
            DestinationPhase::Dropping => {
                self.refused = true;
                self.alarm(Alarm::QuitRefused);
            }
            DestinationPhase::Dropped => {
                self.alarm(Alarm::QuitRefused);
                self.close();
            }
            _ => return Ok(Handled::Ignored(Ignored::Late)),
        }
        Ok(Handled::Taken)
    }

    fn abort(&mut self, reason: AbortReason) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::Preparing
            | DestinationPhase::Arming
            | DestinationPhase::Receiving
            | DestinationPhase::Signing => self.drop_guest(reason),
            DestinationPhase::InDoubt => return Ok(Handled::Ignored(Ignored::InDoubt)),
            DestinationPhase::StartRefused if !self.uncertain => self.drop_guest(AbortReason::StartRefused),
            DestinationPhase::Starting { .. }
            | DestinationPhase::Resuming
            | DestinationPhase::StartRefused => {
                return Ok(Handled::Ignored(Ignored::CommitDecided));
            }
            DestinationPhase::Dropping => return Ok(Handled::Ignored(Ignored::Ending)),
            DestinationPhase::Dropped | DestinationPhase::Moved => {
                return Ok(Handled::Ignored(Ignored::Ended));
            }
        }
        Ok(Handled::Taken)
    }

    fn retry(&mut self) -> Result<Handled, Refused> {
        match self.phase {
            DestinationPhase::StartRefused => {
                self.phase = DestinationPhase::Resuming;
                self.command(VmmCommand::Cont);
            }
            DestinationPhase::Dropping if std::mem::take(&mut self.refused) => self.promise(),
            _ => return Ok(Handled::Ignored(Ignored::NothingToRetry)),
        }
        Ok(Handled::Taken)
    }

    fn resolve(&mut self, resolution: Resolution) -> Result<Handled, Refused> {
        let explained = self.explain(resolution);
        if explained == Err(Refused::PeerNotFenced) {
            self.send_receipt();
        }
        explained?;
        self.write(Write::Resolved(resolution), Entry::Resolved(resolution));
        Ok(Handled::Taken)
    }

    /// The operator's decision is on record (or not). The source's word may have come meanwhile and goes first.
    fn resolved(&mut self, resolution: Resolution, ok: bool) {
        if !ok {
            return self.alarm(Alarm::ResolveNotRecorded);
        }
        match (self.phase, resolution) {
            (DestinationPhase::InDoubt, Resolution::StartHere { peer_fenced: true }) => self.start(true),
            (DestinationPhase::StartRefused, Resolution::StartHere { .. }) => {
                self.phase = DestinationPhase::Resuming;
                self.command(VmmCommand::Cont);
            }
            (DestinationPhase::InDoubt, Resolution::LeaveToPeer) => self.drop_guest(AbortReason::Operator),
            (DestinationPhase::StartRefused, Resolution::LeaveToPeer) => {
                self.may_have_run |= self.uncertain;
                self.drop_guest(AbortReason::Operator);
            }
            _ => {}
        }
    }

    fn start(&mut self, run: bool) {
        self.phase = DestinationPhase::Starting { run };
        self.write(Write::Starting, Entry::Starting { run });
    }

    /// The guest is ours. The network hears of it first, then the source; the journal can wait, as `starting` and a
    /// running VMM say the same.
    fn moved(&mut self, runs: bool) {
        self.phase = DestinationPhase::Moved;
        if runs {
            self.command(VmmCommand::AnnounceSelf);
        }
        self.send_word();
        self.write(Write::Running, Entry::Running);
    }

    /// Somebody else started the guest before it was committed to us. If the source commits, well; if it aborts,
    /// this copy is ended.
    fn foreign_start(&mut self) {
        self.may_have_run = true;
        self.alarm(Alarm::ForeignStart);
        if let Some(run) = self.held_commit.take() {
            self.start(run);
        }
    }

    fn lost(&mut self) {
        self.may_have_run = true;
        self.alarm(Alarm::GuestGone);
        self.drop_guest(AbortReason::VmmGoneDestination);
    }

    fn drop_guest(&mut self, reason: AbortReason) {
        self.phase = DestinationPhase::Dropping;
        self.reason = reason;
        // Nothing may follow `accepted` before it is known to be there.
        if !self.writes.contains(&Write::Accepted) {
            self.promise();
        }
    }

    /// Ends without a journal: its first line could not be written, so the VMM is untouched.
    fn forget(&mut self, reason: AbortReason) {
        self.phase = DestinationPhase::Dropped;
        self.reason = reason;
        self.send_word();
        self.finish(self.dropped_outcome());
    }

    fn promise(&mut self) {
        let entry = match self.may_have_run {
            true => Entry::Lost,
            false => Entry::NeverRan { reason: self.reason },
        };
        self.write(Write::Promise, entry);
    }

    /// Gives the last word, if it is sure to stay true: the promise is durable, or the VMM is gone. A copy that ran
    /// must be gone in any case.
    fn dropped_if_safe(&mut self) {
        if !self.gone && (self.may_have_run || !self.promised) {
            return self.command(VmmCommand::Quit);
        }
        self.phase = DestinationPhase::Dropped;
        self.send_word();
        if self.on_abort == Afterwards::Quit && !self.gone {
            self.command(VmmCommand::Quit);
        } else {
            self.close();
        }
    }

    fn close(&mut self) {
        if !self.finished && !self.writes.contains(&Write::Done) {
            self.write(Write::Done, Entry::Done { moved: false });
        }
    }

    fn dropped_outcome(&self) -> Outcome {
        if self.may_have_run { Outcome::Lost } else { Outcome::Aborted(self.reason) }
    }

    fn send_word(&mut self) {
        self.send(match (self.phase, self.may_have_run) {
            (DestinationPhase::Moved, _) => Message::Running,
            (_, true) => Message::Lost,
            (_, false) => Message::NeverRan(self.reason),
        });
    }

    fn send_receipt(&mut self) {
        if let Some(receipt) = self.receipt {
            self.send(Message::Receipt(receipt));
        }
    }

    fn finish(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.finished, true) {
            self.actions.push_back(Action::Finish(outcome));
        }
    }

    fn write(&mut self, write: Write, entry: Entry) {
        self.writes.push_back(write);
        self.actions.push_back(Action::Journal(entry));
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
