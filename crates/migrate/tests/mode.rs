//! Which mode a migration between two engines begins in, and why, with simulated VMMs.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

mod scene;

use std::time::Duration;

use dwcp_migrate::Policy;
use dwcp_migrate::spec::{MigrateSpec, ModeWish};
use dwcp_migrate::status::{Phase, Status};
use dwcp_proto::mode::Bounds;

use scene::Scene;

/// Any machine's loopback is as fast, whatever else it does.
const MODEST: Bounds = Bounds { rtt: Duration::from_secs(1), rate: 1_000_000 };

async fn moved(bounds: Bounds, change: impl FnOnce(&mut MigrateSpec)) -> Status {
    let scene = Scene::with(true, true, Policy::default(), |config| config.bounds = bounds).await;
    scene.awaited().await;
    let mut spec = scene.spec();
    change(&mut spec);
    let checked = scene.a.engine.check(spec.clone()).await;
    let status = scene.migrate(spec).await.unwrap();
    assert_eq!((status.phase, &status.error), (Phase::Completed, &None));
    assert_eq!(status.mode_switches, 0);
    assert_eq!(checked.mode, status.mode);
    scene.assert_moved();
    status
}

fn mode(status: &Status) -> (&str, &str) {
    (status.mode.as_deref().unwrap(), status.mode_reason.as_deref().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_near_and_fast_link_is_a_datacenter() {
    let status = moved(MODEST, |_| ()).await;
    let (mode, why) = mode(&status);
    assert_eq!(mode, "datacenter", "{why}");
    assert!(why.contains("round trip") && why.contains("the link carries"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_near_and_slow_link_is_none() {
    let status = moved(Bounds { rate: 1 << 50, ..MODEST }, |_| ()).await;
    let (mode, why) = mode(&status);
    assert_eq!(mode, "internet", "{why}");
    assert!(why.contains("less than"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_far_link_is_none() {
    let status = moved(Bounds { rtt: Duration::from_nanos(1), ..MODEST }, |_| ()).await;
    let (mode, why) = mode(&status);
    assert_eq!(mode, "internet", "{why}");
    assert!(why.contains("not below"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_of_which_little_may_be_taken_is_none() {
    let bounds = Bounds { rate: 100 << 20, ..MODEST };
    let status = moved(bounds, |spec| spec.bandwidth_limit = Some(50 << 20)).await;
    let (mode, why) = mode(&status);
    assert_eq!(mode, "internet", "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mode_by_name_is_obeyed() {
    for (wish, name) in [(ModeWish::Internet, "internet"), (ModeWish::Datacenter, "datacenter")] {
        let status = moved(Bounds { rate: 1 << 50, ..MODEST }, |spec| spec.mode = wish).await;
        let (mode, why) = mode(&status);
        assert_eq!(mode, name);
        assert!(why.contains("asked for"), "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_estimate_moves_nothing_whether_the_destination_waits_or_not() {
    let scene = Scene::with(true, true, Policy::default(), |config| config.bounds = MODEST).await;
    for waits in [false, true] {
        if waits {
            scene.awaited().await;
        }
        let estimate = scene.a.engine.estimate(scene.spec()).await.unwrap();
        assert_eq!((estimate.path.as_str(), estimate.mode.as_deref()), ("v3", Some("datacenter")));
        assert!(estimate.problems.is_empty() && estimate.seconds > 0.0, "{estimate:?}");
        let notes = estimate.notes.join("; ");
        assert_eq!(notes.contains("does not wait"), !waits, "{notes}");
        // The simulated VMM knows no dirty rate, and its RAM is its own.
        assert!(notes.contains("dirty rate is not known") && estimate.dirty_rate.is_none(), "{notes}");
        assert!(notes.contains("cannot be read") && estimate.zero_share.is_none(), "{notes}");
        scene.assert_stayed();
    }
    // Nothing is left in the way of the migration itself.
    assert!(scene.a.engine.list().is_empty());
    let status = scene.migrate(scene.spec()).await.unwrap();
    assert_eq!((status.phase, status.error), (Phase::Completed, None));
    scene.assert_moved();
}
