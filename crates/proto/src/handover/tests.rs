//! The rules one by one. `tests/handover_model` holds all interleavings against the invariants.

use super::*;
use crate::ids::{MigrationId, NodeName, SessionId, VmName};
use crate::journal::{Accepted, Job, Prepared};

const WHOLE: Transfer = Transfer { stream_len: 7, root: [3; 32] };
const OTHER: Transfer = Transfer { stream_len: 7, root: [4; 32] };

fn job() -> Job {
    Job {
        migration: MigrationId::new("m").unwrap(),
        vm: VmName::new("web").unwrap(),
        peer: NodeName::new("hv-2").unwrap(),
        peer_key: [5; 32],
        peer_addr: None,
        qmp: "/run/web.qmp".into(),
        session: SessionId([1; 32]),
        path: "v3".into(),
        started_unix_ms: 0,
        vmm: None,
        attempt: 1,
        again: None,
        halts: false,
    }
}

fn prepared(guest_ran: bool) -> Prepared {
    Prepared { job: job(), guest_ran, on_success: Afterwards::Quit }
}

fn accepted() -> Accepted {
    Accepted { job: job(), on_abort: Afterwards::Quit }
}

fn commit(run: bool) -> Message {
    Message::Commit { receipt: WHOLE.digest(), run }
}

/// Both machines look the same to a test.
trait Machine {
    fn handle(&mut self, input: Input) -> Result<Handled, Refused>;
    fn poll_action(&mut self) -> Option<Action>;

    fn drain(&mut self) -> Vec<Action> {
        std::iter::from_fn(|| self.poll_action()).collect()
    }

    /// Gives inputs that must be taken; returns all actions.
    fn take(&mut self, inputs: &[Input]) -> Vec<Action> {
        for input in inputs {
            assert_eq!(self.handle(*input), Ok(Handled::Taken), "{input:?}");
        }
        self.drain()
    }

    fn ignores(&mut self, input: Input, why: Ignored) {
        assert_eq!(self.handle(input), Ok(Handled::Ignored(why)));
        assert_eq!(self.drain(), []);
    }
}

impl Machine for Source {
    fn handle(&mut self, input: Input) -> Result<Handled, Refused> {
        self.handle(input)
    }
    fn poll_action(&mut self) -> Option<Action> {
        self.poll_action()
    }
}

impl Machine for Destination {
    fn handle(&mut self, input: Input) -> Result<Handled, Refused> {
        self.handle(input)
    }
    fn poll_action(&mut self) -> Option<Action> {
        self.poll_action()
    }
}

use Action::{Alarm as Warn, Finish, Journal, Send, Vmm};
use Input::{JournalFailed, Journaled};

/// A source that stands at `phase` on the straight way.
fn source_at(phase: SourcePhase) -> Source {
    let mut source = Source::new(prepared(true));
    let way = [
        Journaled,
        Input::Whole(WHOLE),
        Input::Message(Message::Receipt(WHOLE)),
        Journaled,
        Input::Message(Message::Running),
        Journaled,
    ];
    for input in way {
        if source.phase() == phase {
            break;
        }
        source.take(&[input]);
    }
    source.drain();
    assert_eq!(source.phase(), phase);
    source
}

fn destination_at(phase: DestinationPhase) -> Destination {
    let mut destination = Destination::new(accepted());
    let way = [
        Journaled,
        Input::Vmm(VmmState::Incoming),
        Input::Whole(WHOLE),
        Journaled,
        Input::Message(commit(true)),
        Journaled,
        Input::Vmm(VmmState::Running),
        Journaled,
    ];
    for input in way {
        if destination.phase() == phase {
            break;
        }
        destination.take(&[input]);
    }
    destination.drain();
    assert_eq!(destination.phase(), phase);
    destination
}

#[test]
fn the_straight_way_step_by_step() {
    let mut source = Source::new(prepared(true));
    let mut destination = Destination::new(accepted());
    assert_eq!(source.drain(), [Journal(Entry::Prepared(prepared(true).into()))]);
    assert_eq!(source.take(&[Journaled]), [Vmm(VmmCommand::StartMigration)]);
    assert_eq!(destination.drain(), [Journal(Entry::Accepted(accepted().into()))]);
    assert_eq!(destination.take(&[Journaled]), [Vmm(VmmCommand::StopWhileIncoming)]);
    assert_eq!(destination.take(&[Input::Vmm(VmmState::Incoming)]), [Vmm(VmmCommand::AcceptStream)]);

    assert_eq!(source.take(&[Input::Whole(WHOLE)]), []);
    assert_eq!(destination.take(&[Input::Whole(WHOLE)]), [Journal(Entry::Receipt(WHOLE))]);
    let receipt = Message::Receipt(WHOLE);
    assert_eq!(destination.take(&[Journaled]), [Send(receipt)]);
    assert_eq!(source.take(&[Input::Message(receipt)]), [Journal(Entry::Commit(WHOLE))]);
    assert_eq!(source.take(&[Journaled]), [Send(commit(true))]);
    assert_eq!(destination.take(&[Input::Message(commit(true))]), [Journal(Entry::Starting { run: true })]);
    assert_eq!(destination.take(&[Journaled]), [Vmm(VmmCommand::Cont)]);
    assert_eq!(
        destination.take(&[Input::Vmm(VmmState::Running)]),
        [Vmm(VmmCommand::AnnounceSelf), Send(Message::Running), Journal(Entry::Running)]
    );
    assert_eq!(destination.take(&[Journaled]), [Finish(Outcome::Moved)]);
    let done = [Vmm(VmmCommand::Quit), Journal(Entry::Done { moved: true })];
    assert_eq!(source.take(&[Input::Message(Message::Running)]), done);
    assert_eq!(source.take(&[Journaled]), [Finish(Outcome::Moved), Send(Message::Settled)]);
    assert!(!destination.settled());
    assert_eq!(destination.take(&[Input::Message(Message::Settled)]), []);
    assert!(source.settled() && destination.settled());
}

#[test]
fn a_paused_guest_stays_paused_on_both_sides() {
    let mut source = Source::new(prepared(false));
    let receipt = Input::Message(Message::Receipt(WHOLE));
    let actions = source.take(&[Journaled, Input::Whole(WHOLE), receipt, Journaled]);
    assert_eq!(actions.last(), Some(&Send(commit(false))));
    let mut destination = destination_at(DestinationPhase::InDoubt);
    let actions = destination.take(&[Input::Message(commit(false)), Journaled]);
    assert!(
        !actions.contains(&Vmm(VmmCommand::Cont)) && actions.contains(&Send(Message::Running)),
        "{actions:?}"
    );

    let mut source = Source::new(prepared(false));
    source.take(&[Journaled, Input::Abort(AbortReason::Cancelled), Journaled]);
    assert_eq!(source.take(&[Input::Vmm(VmmState::Stopped)]), [Journal(Entry::Done { moved: false })]);
}

#[test]
fn before_commit_a_failure_resumes_without_waiting_for_the_disk() {
    for phase in [SourcePhase::Migrating, SourcePhase::Delivered] {
        let mut source = source_at(phase);
        let reason = AbortReason::Deadline;
        assert_eq!(
            source.take(&[Input::Abort(reason)]),
            [
                Send(Message::Abort(reason)),
                Vmm(VmmCommand::CancelMigration),
                Journal(Entry::Aborted { reason })
            ]
        );
        assert_eq!(source.take(&[Input::Vmm(VmmState::Stopped)]), [Vmm(VmmCommand::Cont)]);
        assert_eq!(source.take(&[Input::Vmm(VmmState::Running)]), []);
        assert_eq!(source.take(&[JournalFailed]), [Journal(Entry::Done { moved: false })]);
        assert_eq!(source.take(&[JournalFailed]), [Finish(Outcome::Aborted(reason))]);
        // The abort may have been lost: the question brings it again.
        assert_eq!(source.take(&[Input::Message(Message::Receipt(WHOLE))]), [Send(Message::Abort(reason))]);
    }
}

#[test]
fn a_guest_that_somebody_paused_meanwhile_stays_paused() {
    let mut source = source_at(SourcePhase::Migrating);
    source.take(&[Input::Abort(AbortReason::Cancelled), Journaled]);
    let actions = source.take(&[Input::Vmm(VmmState::Paused)]);
    assert_eq!(actions, [Journal(Entry::Done { moved: false })]);
}

#[test]
fn an_untouched_vmm_is_not_commanded() {
    let mut source = Source::new(prepared(true));
    source.drain();
    let actions = source.take(&[JournalFailed]);
    assert!(!actions.iter().any(|a| matches!(a, Vmm(_))), "{actions:?}");
    assert_eq!(actions.last(), Some(&Finish(Outcome::Aborted(AbortReason::JournalFailed))));
}

#[test]
fn a_receipt_for_something_else_never_commits() {
    let mut source = source_at(SourcePhase::Delivered);
    let actions = source.take(&[Input::Message(Message::Receipt(OTHER))]);
    assert_eq!(actions[0], Send(Message::Abort(AbortReason::Integrity)));
    assert_eq!(source.phase(), SourcePhase::Restoring);

    let mut source = source_at(SourcePhase::Migrating);
    source.take(&[Input::Message(Message::Receipt(OTHER))]);
    let refused = source.handle(Input::Message(Message::Receipt(WHOLE)));
    assert!(matches!(refused, Err(Refused::Violation { .. })), "two receipts that differ");
    source.take(&[Input::Whole(WHOLE)]);
    assert_eq!(source.phase(), SourcePhase::Restoring);

    let mut destination = destination_at(DestinationPhase::InDoubt);
    let forged = Message::Commit { receipt: OTHER.digest(), run: true };
    assert!(matches!(destination.handle(Input::Message(forged)), Err(Refused::Violation { .. })));
    assert_eq!(destination.phase(), DestinationPhase::InDoubt);
}

#[test]
fn nothing_but_the_peers_word_ends_a_commit() {
    let mut source = source_at(SourcePhase::Committed);
    source.ignores(Input::Abort(AbortReason::Deadline), Ignored::CommitDecided);
    source.ignores(Input::Retry, Ignored::NothingToRetry);
    assert_eq!(source.take(&[Input::Connected]), [Send(commit(true))]);
    let reason = AbortReason::VmmGoneDestination;
    assert_eq!(
        source.take(&[Input::Message(Message::NeverRan(reason))]),
        [Journal(Entry::Aborted { reason }), Vmm(VmmCommand::CancelMigration)]
    );
    source.take(&[Input::Vmm(VmmState::Stopped), Input::Vmm(VmmState::Running)]);
    let actions = source.take(&[Journaled, Journaled]);
    assert_eq!(actions[1..], [Finish(Outcome::Aborted(reason)), Send(Message::Settled)]);
}

#[test]
fn a_failed_commit_write_waits_for_a_durable_abort_or_the_peers_promise() {
    let failed = || {
        let mut source = source_at(SourcePhase::Committing);
        let reason = AbortReason::JournalFailed;
        assert_eq!(
            source.take(&[JournalFailed]),
            [Send(Message::Abort(reason)), Journal(Entry::Aborted { reason })]
        );
        source
    };
    let resumed = [Vmm(VmmCommand::CancelMigration)];
    assert_eq!(failed().take(&[Journaled]), resumed);

    let mut source = failed();
    assert_eq!(source.take(&[JournalFailed]), [Warn(Alarm::JournalFailing)]);
    assert_eq!(source.phase(), SourcePhase::Withdrawing);
    assert_eq!(source.take(&[Input::Retry, Journaled])[1..], resumed);

    let mut source = failed();
    source.take(&[JournalFailed]);
    let actions = source.take(&[Input::Message(Message::NeverRan(AbortReason::JournalFailed))]);
    assert_eq!(actions[1..], resumed);
}

#[test]
fn cancel_during_a_hanging_commit_write_takes_it_back() {
    let mut source = source_at(SourcePhase::Committing);
    let reason = AbortReason::Cancelled;
    assert_eq!(source.take(&[Input::Abort(reason)]), [Send(Message::Abort(reason))]);
    assert_eq!(source.take(&[Journaled]), [Journal(Entry::Aborted { reason })]);
    assert_eq!(source.take(&[Journaled]), [Vmm(VmmCommand::CancelMigration)]);
}

#[test]
fn a_source_vmm_that_dies_after_delivery_still_commits() {
    let mut source = source_at(SourcePhase::Delivered);
    assert_eq!(source.take(&[Input::Vmm(VmmState::Gone)]), [Journal(Entry::SourceLost(WHOLE))]);
    source.ignores(Input::Abort(AbortReason::Deadline), Ignored::OnlyCopyAtPeer);
    source.take(&[Journaled]);
    let entries = [Entry::Prepared(prepared(true).into()), Entry::SourceLost(WHOLE)];
    let mut source = Source::recover(&entries, Some(VmmState::Gone)).unwrap();
    assert_eq!(source.take(&[Input::Message(Message::Receipt(WHOLE))]), [Journal(Entry::Commit(WHOLE))]);
    // What is gone cannot run twice: the guest must not die for a full disk.
    assert_eq!(source.take(&[JournalFailed]), [Send(commit(true))]);
}

#[test]
fn in_doubt_no_deadline_counts() {
    let mut destination = destination_at(DestinationPhase::InDoubt);
    destination.ignores(Input::Abort(AbortReason::Deadline), Ignored::InDoubt);
    destination.ignores(Input::Abort(AbortReason::Cancelled), Ignored::InDoubt);
    assert_eq!(destination.take(&[Input::Connected]), [Send(Message::Receipt(WHOLE))]);
    let reason = AbortReason::Cancelled;
    assert_eq!(
        destination.take(&[Input::Message(Message::Abort(reason))]),
        [Journal(Entry::NeverRan { reason })]
    );
    assert_eq!(destination.take(&[Journaled]), [Send(Message::NeverRan(reason)), Vmm(VmmCommand::Quit)]);
    assert_eq!(
        destination.take(&[Input::Vmm(VmmState::Gone), Journaled]),
        [Journal(Entry::Done { moved: false }), Finish(Outcome::Aborted(reason))]
    );
    // A late commit finds the promise.
    assert_eq!(destination.take(&[Input::Message(commit(true))]), [Send(Message::NeverRan(reason))]);
}

#[test]
fn a_promise_that_cannot_be_written_is_made_good_by_ending_the_vmm() {
    let mut destination = destination_at(DestinationPhase::InDoubt);
    destination.take(&[Input::Message(Message::Abort(AbortReason::Cancelled))]);
    assert_eq!(destination.take(&[JournalFailed]), [Warn(Alarm::JournalFailing), Vmm(VmmCommand::Quit)]);
    let actions = destination.take(&[Input::Vmm(VmmState::Gone)]);
    assert_eq!(actions[0], Send(Message::NeverRan(AbortReason::Cancelled)));
}

#[test]
fn a_starting_entry_that_fails_gives_the_guest_back() {
    let mut destination = destination_at(DestinationPhase::Starting { run: true });
    let reason = AbortReason::JournalFailed;
    assert_eq!(destination.take(&[JournalFailed]), [Journal(Entry::NeverRan { reason })]);
    assert_eq!(destination.take(&[Journaled])[0], Send(Message::NeverRan(reason)));
}

#[test]
fn a_vmm_that_dies_never_ran_before_cont_and_may_have_run_after() {
    let word = |phase| {
        let mut destination = destination_at(phase);
        let mut actions = destination.take(&[Input::Vmm(VmmState::Gone)]);
        while destination.handle(Journaled).is_ok() {
            actions.extend(destination.drain());
        }
        actions.into_iter().find_map(|a| match a {
            Send(message) => Some(message),
            _ => None,
        })
    };
    let never_ran = Some(Message::NeverRan(AbortReason::VmmGoneDestination));
    assert_eq!(word(DestinationPhase::InDoubt), never_ran);
    assert_eq!(word(DestinationPhase::Starting { run: true }), never_ran);
    assert_eq!(word(DestinationPhase::Resuming), Some(Message::Lost));
}

#[test]
fn a_refused_cont_is_retried_or_given_back_but_not_after_a_restart() {
    let mut destination = destination_at(DestinationPhase::Resuming);
    assert_eq!(destination.take(&[Input::VmmRefused]), [Warn(Alarm::StartRefused)]);
    assert_eq!(destination.take(&[Input::Retry]), [Vmm(VmmCommand::Cont)]);
    destination.take(&[Input::VmmRefused]);
    let reason = AbortReason::StartRefused;
    assert_eq!(
        destination.take(&[Input::Abort(AbortReason::Deadline)]),
        [Journal(Entry::NeverRan { reason })]
    );

    let entries = [Entry::Accepted(accepted().into()), Entry::Receipt(WHOLE), Entry::Starting { run: true }];
    let mut destination = Destination::recover(&entries, Some(VmmState::Paused)).unwrap();
    assert_eq!(destination.drain(), [Vmm(VmmCommand::Cont)]);
    destination.take(&[Input::VmmRefused]);
    destination.ignores(Input::Abort(AbortReason::Deadline), Ignored::CommitDecided);
    assert_eq!(destination.phase(), DestinationPhase::StartRefused);
}

#[test]
fn a_restarted_source_takes_back_or_commits_again() {
    let prepared = Entry::Prepared(prepared(true).into());
    let mut source = Source::recover(std::slice::from_ref(&prepared), Some(VmmState::Stopped)).unwrap();
    let reason = AbortReason::AgentRestarted;
    assert_eq!(
        source.drain(),
        [Send(Message::Abort(reason)), Vmm(VmmCommand::CancelMigration), Journal(Entry::Aborted { reason })]
    );

    let committed = [prepared.clone(), Entry::Commit(WHOLE)];
    let mut source = Source::recover(&committed, Some(VmmState::Stopped)).unwrap();
    assert_eq!(source.drain(), []);
    assert_eq!(source.take(&[Input::Connected]), [Send(commit(true))]);

    // Resumed on the peer's promise, and the disk refused to write it down: ask, do not commit again.
    let mut source = Source::recover(&committed, Some(VmmState::Running)).unwrap();
    assert_eq!(source.drain(), [Warn(Alarm::ForeignStart)]);
    assert_eq!(source.take(&[Input::Connected]), [Send(Message::Abort(reason))]);

    let ended = [prepared, Entry::Aborted { reason }, Entry::Done { moved: false }];
    let mut source = Source::recover(&ended, Some(VmmState::Stopped)).unwrap();
    assert_eq!(source.drain(), [Finish(Outcome::Aborted(reason))], "its VMM may be in the next migration");
}

#[test]
fn a_restarted_destination_drops_asks_or_starts() {
    let accepted = Entry::Accepted(accepted().into());
    let receipt = Entry::Receipt(WHOLE);
    let starting = Entry::Starting { run: true };
    let recover = |entries: &[&Entry], vmm| {
        let entries: Vec<_> = entries.iter().map(|e| (*e).clone()).collect();
        let mut destination = Destination::recover(&entries, vmm).unwrap();
        let actions = destination.drain();
        (destination.phase().name(), actions)
    };
    let paused = Some(VmmState::Paused);
    let drop = |reason| ("dropping", vec![Journal(Entry::NeverRan { reason })]);
    assert_eq!(recover(&[&accepted], Some(VmmState::Incoming)), drop(AbortReason::AgentRestarted));
    assert_eq!(recover(&[&accepted, &receipt], paused), ("in_doubt", vec![]));
    assert_eq!(recover(&[&accepted, &receipt], Some(VmmState::Gone)), drop(AbortReason::VmmGoneDestination));
    assert_eq!(recover(&[&accepted, &receipt, &starting], paused), ("resuming", vec![Vmm(VmmCommand::Cont)]));
    assert_eq!(recover(&[&accepted, &receipt, &starting], None), ("resuming", vec![Vmm(VmmCommand::Query)]));
    let moved = vec![Vmm(VmmCommand::AnnounceSelf), Send(Message::Running), Journal(Entry::Running)];
    assert_eq!(recover(&[&accepted, &receipt, &starting], Some(VmmState::Running)), ("moved", moved));
    assert_eq!(
        recover(&[&accepted, &receipt, &starting], Some(VmmState::Gone)),
        ("dropping", vec![Warn(Alarm::GuestGone), Journal(Entry::Lost)])
    );
}

#[test]
fn a_commit_waits_until_an_unknown_vmm_has_shown_its_state() {
    let entries = [Entry::Accepted(accepted().into()), Entry::Receipt(WHOLE)];
    let mut destination = Destination::recover(&entries, None).unwrap();
    assert_eq!(destination.drain(), [Vmm(VmmCommand::Query)]);
    assert_eq!(destination.take(&[Input::Message(commit(true))]), []);
    assert_eq!(destination.take(&[Input::Vmm(VmmState::Paused)]), [Journal(Entry::Starting { run: true })]);
}

#[test]
fn an_operator_is_told_first_and_starts_nothing_unfenced() {
    let fenced = Resolution::StartHere { peer_fenced: true };
    let unfenced = Resolution::StartHere { peer_fenced: false };
    let mut destination = destination_at(DestinationPhase::InDoubt);
    assert_eq!(destination.handle(Input::Resolve(unfenced)), Err(Refused::PeerNotFenced));
    assert_eq!(destination.drain(), [Send(Message::Receipt(WHOLE))], "it asks the source instead");
    assert!(destination.explain(fenced).is_ok());
    assert_eq!(destination.take(&[Input::Resolve(fenced)]), [Journal(Entry::Resolved(fenced))]);
    assert_eq!(destination.take(&[Journaled]), [Journal(Entry::Starting { run: true })]);
    assert_eq!(destination.take(&[Journaled]), [Vmm(VmmCommand::Cont)]);
    destination.take(&[Input::Vmm(VmmState::Running)]);
    // The source, back from the dead, is told what became of the guest.
    let abort = Input::Message(Message::Abort(AbortReason::AgentRestarted));
    assert_eq!(destination.take(&[abort]), [Send(Message::Running)]);

    let mut source = source_at(SourcePhase::Committed);
    assert_eq!(
        source.take(&[Input::Resolve(unfenced), Journaled]),
        [Journal(Entry::Resolved(unfenced)), Send(Message::Abort(AbortReason::Operator))]
    );
    assert_eq!(source.phase(), SourcePhase::Withdrawing, "it asks; only the peer's promise resumes");
    source.take(&[Input::Message(Message::Running)]);
    assert_eq!(source.phase(), SourcePhase::Moved);

    let mut source = source_at(SourcePhase::Committed);
    assert_eq!(
        source.take(&[Input::Resolve(fenced), JournalFailed]).last(),
        Some(&Warn(Alarm::ResolveNotRecorded))
    );
    assert_eq!(source.phase(), SourcePhase::Committed);
    let actions = source.take(&[Input::Resolve(fenced), Journaled]);
    assert_eq!(actions.last(), Some(&Vmm(VmmCommand::CancelMigration)));
    source.take(&[Input::Vmm(VmmState::Running), Journaled, Journaled]);
    // The claim was false: said aloud, and answered with this side's state.
    assert_eq!(
        source.take(&[Input::Message(Message::Running)]),
        [Warn(Alarm::Conflict), Send(Message::Abort(AbortReason::Operator))]
    );

    let mut source = source_at(SourcePhase::Migrating);
    assert!(matches!(source.handle(Input::Resolve(fenced)), Err(Refused::NotInDoubt { .. })));
}

#[test]
fn messages_of_the_own_role_are_violations() {
    for phase in [SourcePhase::Migrating, SourcePhase::Committed, SourcePhase::Moved] {
        for message in [commit(true), Message::Abort(AbortReason::Policy), Message::Settled] {
            let refused = source_at(phase).handle(Input::Message(message));
            assert!(matches!(refused, Err(Refused::Violation { .. })), "{message:?}");
        }
    }
    for phase in [DestinationPhase::Receiving, DestinationPhase::InDoubt, DestinationPhase::Moved] {
        let never_ran = Message::NeverRan(AbortReason::Policy);
        for message in [Message::Receipt(WHOLE), never_ran, Message::Running, Message::Lost] {
            let refused = destination_at(phase).handle(Input::Message(message));
            assert!(matches!(refused, Err(Refused::Violation { .. })), "{message:?}");
        }
    }
    let early = destination_at(DestinationPhase::Receiving).handle(Input::Message(commit(true)));
    assert!(matches!(early, Err(Refused::Violation { .. })));
}

#[test]
fn a_journal_of_the_other_role_decides_nothing() {
    let prepared = Entry::Prepared(prepared(true).into());
    let accepted = Entry::Accepted(accepted().into());
    for entries in [vec![], vec![accepted.clone()], vec![prepared.clone(), Entry::Running]] {
        assert!(Source::recover(&entries, None).is_err());
    }
    for entries in [vec![], vec![prepared], vec![accepted, Entry::Commit(WHOLE)]] {
        assert!(Destination::recover(&entries, None).is_err());
    }
}
