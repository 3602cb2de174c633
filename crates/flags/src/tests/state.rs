//! What a node decides.

use std::time::Duration;

use proptest::prelude::*;

use super::document::document;
use crate::*;

/// Its bucket is 51.
const NODE: &str = "node-123";

fn at(seconds: f64) -> Moment {
    Moment(Duration::from_secs(1000) + Duration::from_secs_f64(seconds))
}

fn flag(percentage: u8) -> FlagDocument {
    FlagDocument {
        feature: FEATURE.into(),
        enabled: true,
        percentage: Percentage::new(percentage).unwrap(),
        excluded: Default::default(),
        canaries: Default::default(),
        on_stale: OnStale::V1New,
        epoch: None,
    }
}

fn epoch(incarnation: u64, counter: u64, document: FlagDocument) -> FlagDocument {
    FlagDocument { epoch: Some(Epoch { incarnation, counter }), ..document }
}

fn from_file(document: FlagDocument) -> FlagState {
    let mut state = FlagState::new(NODE, Source::File);
    state.apply(document, at(0.0)).unwrap();
    state
}

fn served() -> FlagState {
    FlagState::new(NODE, Source::Server(Lease::default()))
}

fn new(state: &FlagState) -> Reason {
    state.decide(at(0.0), Scope::New, Conditions::default())
}

#[test]
fn the_percentage_reaches_a_node_at_its_bucket() {
    let percentage = |p| Percentage::new(p).unwrap();
    assert_eq!(new(&from_file(flag(50))), Reason::NotInCohort { bucket: 51, percentage: percentage(50) });
    assert_eq!(new(&from_file(flag(51))), Reason::InCohort { bucket: 51, percentage: percentage(51) });
    assert_eq!((new(&from_file(flag(50))).path(), new(&from_file(flag(51))).path()), (Path::V1, Path::V3));
    assert_eq!(new(&from_file(flag(51))).to_string(), "bucket 51 is within 51 %");
}

#[test]
fn off_comes_before_excluded_before_canary_before_percentage() {
    let me = || [NODE.to_owned()].into();
    let canary = FlagDocument { canaries: me(), ..flag(1) };
    assert_eq!(new(&from_file(canary.clone())), Reason::Canary);
    let excluded = FlagDocument { excluded: me(), ..canary.clone() };
    assert_eq!(new(&from_file(excluded.clone())), Reason::Excluded);
    assert_eq!(new(&from_file(FlagDocument { enabled: false, ..excluded })), Reason::Disabled);
    // The plans roll back with `"percentage": 0, "enabled": true`: that must reach canaries too.
    let zero = FlagDocument { percentage: Percentage::default(), ..canary };
    assert_eq!(new(&from_file(zero)), Reason::Disabled);
}

#[test]
fn breaker_and_peer_can_only_take_away() {
    let v3 = from_file(flag(100));
    let decide = |state: &FlagState, breaker_open, peer_veto| {
        state.decide(at(0.0), Scope::New, Conditions { breaker_open, peer_veto })
    };
    assert_eq!(decide(&v3, true, true), Reason::BreakerOpen);
    assert_eq!(decide(&v3, false, true), Reason::PeerVeto);
    // What is v1 anyway keeps its own reason.
    assert_eq!(
        decide(&from_file(FlagDocument { enabled: false, ..flag(100) }), true, true),
        Reason::Disabled
    );
    let configured = FlagState::new(NODE, Source::None(Path::V3));
    assert_eq!(decide(&configured, false, false), Reason::NoSource(Path::V3));
    assert_eq!(decide(&configured, true, false).path(), Path::V1);
    assert_eq!(new(&FlagState::new(NODE, Source::None(Path::V1))).path(), Path::V1);
}

#[test]
fn a_node_starts_in_v1_and_goes_back_when_the_document_is_gone() {
    let mut state = served();
    assert_eq!(new(&state), Reason::NoAnswer);
    // A 304 confirms what we do not have.
    state.confirm(at(0.0));
    assert_eq!(new(&state), Reason::NoAnswer);
    state.apply(epoch(1, 1, flag(100)), at(0.0)).unwrap();
    assert_eq!(new(&state).path(), Path::V3);
    for (absence, reason) in
        [(Absence::Malformed, Reason::Malformed), (Absence::UnknownFlag, Reason::UnknownFlag)]
    {
        state.withdraw(absence);
        assert_eq!(new(&state), reason);
        state.apply(epoch(1, 1, flag(100)), at(0.0)).unwrap();
        assert_eq!(new(&state).path(), Path::V3);
    }
}

#[test]
fn what_was_remembered_restricts_and_never_enables() {
    let mut state = served();
    state.remember(epoch(2, 7, flag(100)));
    assert_eq!((new(&state), state.veto()), (Reason::NoAnswer, None));
    let lower = state.apply(epoch(2, 6, flag(100)), at(0.0)).unwrap_err();
    assert_eq!(lower.to_string(), "flag epoch 2.6 is lower than 2.7, which is applied already");
    assert_eq!(new(&state), Reason::NoAnswer);

    let mut off = served();
    off.remember(epoch(1, 1, FlagDocument { enabled: false, ..flag(100) }));
    assert_eq!(off.veto(), Some(Reason::Disabled));
    off.apply(epoch(1, 2, flag(100)), at(0.0)).unwrap();
    assert_eq!((off.veto(), new(&off).path()), (None, Path::V3));
    off.apply(epoch(1, 3, FlagDocument { excluded: [NODE.into()].into(), ..flag(100) }), at(0.0)).unwrap();
    off.withdraw(Absence::Malformed);
    assert_eq!(off.veto(), Some(Reason::Excluded));
}

#[test]
fn the_lease_counts_from_when_the_confirmed_request_was_sent() {
    let mut state = served();
    let decide = |state: &FlagState, now| state.decide(at(now), Scope::New, Conditions::default()).path();
    state.apply(epoch(1, 1, flag(100)), at(0.0)).unwrap();
    assert_eq!((decide(&state, 2.999), decide(&state, 3.0)), (Path::V3, Path::V1));
    state.confirm(at(2.0));
    assert_eq!((decide(&state, 4.999), decide(&state, 5.0)), (Path::V3, Path::V1));
    // An answer overtaken by a later one takes nothing away, and gives nothing.
    state.confirm(at(1.0));
    assert_eq!((decide(&state, 4.999), decide(&state, 5.0)), (Path::V3, Path::V1));
    // A refused document confirms nothing.
    assert!(state.apply(epoch(1, 0, flag(100)), at(4.0)).is_err());
    assert_eq!(decide(&state, 5.0), Path::V1);
}

#[test]
fn what_an_expired_lease_does_is_in_the_document() {
    for (on_stale, new, running) in [
        (OnStale::V1New, Path::V1, Path::V3),
        (OnStale::V1All, Path::V1, Path::V1),
        (OnStale::Hold, Path::V3, Path::V3),
    ] {
        let mut state = served();
        state.apply(epoch(1, 1, FlagDocument { on_stale, ..flag(100) }), at(0.0)).unwrap();
        let decide = |scope| state.decide(at(60.0), scope, Conditions::default()).path();
        assert_eq!((decide(Scope::New), decide(Scope::Running)), (new, running), "{on_stale:?}");
        // At the destination it is no veto.
        assert_eq!(state.veto(), None);
    }
    let mut file = from_file(FlagDocument { on_stale: OnStale::V1All, ..flag(100) });
    assert_eq!(file.decide(at(1e6), Scope::New, Conditions::default()).path(), Path::V3);
    // Off reaches running migrations whatever on_stale says.
    file.apply(FlagDocument { enabled: false, on_stale: OnStale::Hold, ..flag(100) }, at(0.0)).unwrap();
    assert_eq!(file.decide(at(0.0), Scope::Running, Conditions::default()), Reason::Disabled);
}

#[test]
fn new_and_running_ones_take_v1_for_the_same_reason() {
    let mut state = served();
    state.apply(epoch(1, 1, flag(50)), at(0.0)).unwrap();
    for scope in [Scope::New, Scope::Running] {
        let reason = state.decide(at(60.0), scope, Conditions::default());
        assert!(matches!(reason, Reason::NotInCohort { .. }), "{reason:?}");
    }
}

#[test]
fn a_server_may_evaluate_the_flag_itself() {
    let mut state = served();
    let decide = |state: &FlagState, scope, now| state.decide(at(now), scope, Conditions::default());
    assert_eq!(state.evaluated(Evaluation::On, at(0.0)), Applied::Changed);
    assert_eq!(state.evaluated(Evaluation::On, at(1.0)), Applied::Unchanged);
    assert_eq!(decide(&state, Scope::New, 3.9), Reason::Evaluated(Path::V3));
    assert_eq!(decide(&state, Scope::New, 4.0), Reason::LeaseExpired);
    assert_eq!(decide(&state, Scope::Running, 4.0).path(), Path::V3);
    assert_eq!(state.next_change(at(1.0)), Some(at(4.0)));
    assert_eq!(state.next_change(at(4.0)), None);

    state.evaluated(Evaluation::Off, at(5.0));
    assert_eq!((decide(&state, Scope::Running, 5.0), state.veto()), (Reason::Evaluated(Path::V1), None));
    state.evaluated(Evaluation::Disabled, at(6.0));
    assert_eq!(
        (decide(&state, Scope::Running, 6.0), state.veto()),
        (Reason::Disabled, Some(Reason::Disabled))
    );
    state.withdraw(Absence::UnknownFlag);
    assert_eq!((decide(&state, Scope::Running, 6.0), state.veto()), (Reason::UnknownFlag, None));
}

#[test]
fn a_server_must_not_contradict_itself_and_a_file_may_be_edited() {
    let mut state = served();
    assert_eq!(state.apply(flag(1), at(0.0)), Err(Refusal::NoEpoch));
    assert_eq!(state.apply(epoch(1, 5, flag(1)), at(0.0)), Ok(Applied::Changed));
    assert_eq!(state.apply(epoch(1, 5, flag(1)), at(0.0)), Ok(Applied::Unchanged));
    let five = Epoch { incarnation: 1, counter: 5 };
    assert_eq!(state.apply(epoch(1, 5, flag(100)), at(0.0)), Err(Refusal::Equivocal(five)));
    assert_eq!(state.apply(epoch(2, 0, flag(2)), at(0.0)), Ok(Applied::Changed));

    let mut file = from_file(epoch(1, 5, flag(1)));
    assert_eq!(file.apply(epoch(1, 5, flag(100)), at(0.0)), Ok(Applied::Changed));
    assert_eq!(file.apply(flag(2), at(0.0)), Ok(Applied::Changed));
    assert!(matches!(file.apply(epoch(1, 4, flag(100)), at(0.0)), Err(Refusal::Lower { .. })));
}

#[test]
fn a_destination_outside_of_the_cohort_goes_along() {
    assert_eq!(from_file(flag(1)).veto(), None);
    assert_eq!(from_file(flag(0)).veto(), Some(Reason::Disabled));
    assert_eq!(FlagState::new(NODE, Source::None(Path::V1)).veto(), None);
}

proptest! {
    #[test]
    fn raising_the_percentage_only_ever_adds_nodes(document in document(), node in "[a-c]|node-[0-9]{3}", more in 0u8..=100) {
        let path = |document: &FlagDocument| {
            let mut state = FlagState::new(node.clone(), Source::File);
            state.apply(document.clone(), at(0.0)).unwrap();
            new(&state).path()
        };
        let higher = Percentage::new(document.percentage.value().max(more)).unwrap();
        if path(&document) == Path::V3 {
            prop_assert_eq!(path(&FlagDocument { percentage: higher, ..document }), Path::V3);
        }
    }

    /// Against a plain model: v3 only by the highest epoch of all, confirmed within the lease.
    #[test]
    fn whatever_a_server_says_in_whatever_order_the_highest_epoch_rules(
        said in proptest::collection::vec((document(), 0u8..10), 1..20),
        restart in proptest::option::of(0usize..20),
    ) {
        let mut state = served();
        let mut highest: Option<FlagDocument> = None;
        for (step, (document, second)) in said.into_iter().enumerate() {
            if restart == Some(step) {
                let mut again = served();
                highest.iter().for_each(|document| again.remember(document.clone()));
                state = again;
                prop_assert_eq!(new(&state), Reason::NoAnswer);
            }
            let before = state.document().cloned();
            let obeyed = state.apply(document.clone(), at(second.into())).is_ok();
            let known = highest.as_ref().and_then(|document| document.epoch);
            prop_assert_eq!(obeyed, document.epoch.is_some() && (document.epoch > known || highest.as_ref() == Some(&document)));
            if obeyed {
                highest = Some(document);
                prop_assert_eq!(state.document(), highest.as_ref());
            } else {
                prop_assert_eq!(state.document(), before.as_ref());
            }
        }
    }
}
