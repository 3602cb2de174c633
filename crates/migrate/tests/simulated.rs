//! Whole migrations between two engines in this process, with simulated VMMs on both sides.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

mod scene;

use std::time::Duration;

use dwcp_migrate::Policy;
use dwcp_migrate::spec::{Channels, IncomingSpec, Leave, MigrateSpec, ModeWish, PathWish, Vmm};
use dwcp_migrate::status::Phase;
use dwcp_proto::{MigrationId, NodeName, VmName};
use dwcp_vmm::sim::Fault;

use scene::{LIMIT, Scene, ended, gate};

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_over_v3() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let status = scene.migrate(MigrateSpec { mode: ModeWish::Internet, ..scene.spec() }).await.unwrap();
    assert_eq!((status.phase, status.error), (Phase::Completed, None));
    assert_eq!((status.path.as_deref(), status.mode.as_deref()), (Some("v3"), Some("internet")));
    assert!(status.chunks > 0 && status.downtime_ms.is_some() && status.wire_bytes > 0);
    let destination = ended(&scene.b.engine, &status.id).await;
    assert_eq!(destination.phase, Phase::Completed);
    scene.assert_moved();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_over_v1_inside_tls_and_plain() {
    for (plain, encryption) in [(false, "tls"), (true, "none")] {
        let policy = Policy { v1_plain: plain, ..Policy::default() };
        let scene = Scene::new(true, true, policy).await;
        scene.awaited().await;
        let status = scene.migrate(MigrateSpec { path: PathWish::V1, ..scene.spec() }).await.unwrap();
        assert_eq!((status.phase, status.error), (Phase::Completed, None));
        assert_eq!((status.path.as_deref(), status.encryption.as_deref()), (Some("v1"), Some(encryption)));
        scene.assert_moved();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_from_several_channels() {
    for (path, count) in [(PathWish::V3, 2), (PathWish::V3, 16), (PathWish::V1, 4)] {
        let scene = Scene::new(true, true, Policy::default()).await;
        scene.awaited().await;
        let channels = Channels::try_from(count).unwrap();
        let status = scene.migrate(MigrateSpec { path, channels, ..scene.spec() }).await.unwrap();
        assert_eq!((status.phase, status.error), (Phase::Completed, None), "{count} channels");
        assert_eq!(status.channels, Some(count));
        assert!(status.rounds > 1 && status.rounds < 40, "{} rounds", status.rounds);
        scene.assert_moved();
        let left = std::fs::read_dir(scene.a.dir.path().join("sockets")).unwrap().count();
        assert_eq!(left, 0, "sockets left behind");
    }
}

/// The folder for the sockets cannot be used: the guest stays, and goes from one channel.
#[tokio::test(flavor = "multi_thread")]
async fn channels_without_a_socket_are_refused_with_what_to_do() {
    let scene = Scene::with(true, true, Policy::default(), |config| {
        config.sockets = "/dev/null/sockets".into();
    })
    .await;
    scene.awaited().await;
    let channels = Channels::try_from(2).unwrap();
    let status = scene.migrate(MigrateSpec { channels, ..scene.spec() }).await.unwrap();
    let failure = status.error.unwrap();
    assert_eq!((status.phase, failure.code.as_str()), (Phase::Aborted, "socket"), "{failure}");
    assert!(failure.hint.contains("[vmm] sockets"), "{failure}");
    scene.assert_stayed();
}

/// The last byte has been acknowledged long before the stream's end is seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_vmm_that_closes_its_stream_late_is_waited_for() {
    for path in [PathWish::V1, PathWish::V3] {
        let scene = Scene::new(true, true, Policy::default()).await;
        scene.source.inject(Fault::CloseLate(Duration::from_millis(200)));
        scene.awaited().await;
        let status = scene.migrate(MigrateSpec { path, ..scene.spec() }).await.unwrap();
        assert_eq!((status.phase, status.error), (Phase::Completed, None));
        scene.assert_moved();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_v1_only_peer_gets_v1_and_the_reason_is_told() {
    let scene = Scene::new(true, false, Policy::default()).await;
    scene.awaited().await;
    let status = scene.migrate(scene.spec()).await.unwrap();
    assert_eq!((status.phase, status.path.as_deref()), (Phase::Completed, Some("v1")));
    assert!(status.fallback_reasons[0].contains("test says false"), "{:?}", status.fallback_reasons);
    scene.assert_moved();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_that_is_off_bars_v3_even_when_it_is_asked_for() {
    let scene = Scene::new(false, true, Policy::default()).await;
    scene.awaited().await;
    let status = scene.migrate(MigrateSpec { path: PathWish::V3, ..scene.spec() }).await.unwrap();
    assert_eq!(status.phase, Phase::Aborted);
    assert_eq!(status.error.unwrap().code, "v3_barred");
    scene.assert_stayed();
    // The destination still waits: with the flag on, the next try goes through.
    scene.a.gate.send_replace(gate(true));
    let status = scene.migrate(scene.spec()).await.unwrap();
    assert_eq!((status.phase, status.path.as_deref()), (Phase::Completed, Some("v3")));
    scene.assert_moved();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_was_not_told_refuses() {
    let scene = Scene::new(true, true, Policy::default()).await;
    let status = scene.migrate(scene.spec()).await.unwrap();
    assert_eq!(status.phase, Phase::Aborted);
    assert_eq!(status.error.unwrap().code, "not_awaited");
    scene.assert_stayed();
}

#[tokio::test(flavor = "multi_thread")]
async fn check_changes_nothing_and_the_migration_after_it_works() {
    let scene = Scene::new(true, true, Policy::default()).await;
    let refused = scene.a.engine.check(scene.spec()).await;
    assert_eq!((refused.ok, refused.problems[0].code.as_str()), (false, "not_awaited"));
    scene.awaited().await;
    for _ in 0..2 {
        let report = scene.a.engine.check(scene.spec()).await;
        assert!(report.ok && report.path.as_deref() == Some("v3"), "{report:?}");
    }
    scene.assert_stayed();
    let status = scene.migrate(scene.spec()).await.unwrap();
    assert_eq!(status.phase, Phase::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_node_is_refused_on_both_sides() {
    let scene = Scene::new(true, true, Policy::default()).await;
    let spec = MigrateSpec { to: NodeName::new("stranger").unwrap(), ..scene.spec() };
    let status = scene.migrate(spec).await.unwrap();
    assert_eq!(status.phase, Phase::Aborted);
    let incoming = IncomingSpec {
        vm: VmName::new("vm1").unwrap(),
        vmm: Vmm::Qmp(scene.b.qmp()),
        from: NodeName::new("stranger").unwrap(),
        on_abort: Leave::Leave,
        retry: 0,
    };
    assert_eq!(scene.b.engine.prepare_incoming(incoming).await.unwrap_err().code, "unknown_peer");
    scene.assert_stayed();
}

#[tokio::test(flavor = "multi_thread")]
async fn cancel_leaves_the_guest_at_the_source_and_the_same_id_is_one_migration() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let id = MigrationId::new("once").unwrap();
    // Slow enough that it cannot be over before the cancel.
    let spec = MigrateSpec { id: Some(id.clone()), bandwidth_limit: Some(100_000), ..scene.spec() };
    assert_eq!(scene.a.engine.migrate(spec.clone()).await.unwrap(), id);
    assert_eq!(scene.a.engine.migrate(spec.clone()).await.unwrap(), id);
    let other = MigrateSpec { id: Some(MigrationId::new("second").unwrap()), ..spec };
    assert_eq!(scene.a.engine.migrate(other).await.unwrap_err().code, "already_migrating");
    let mut watch = scene.a.engine.watch(&id).unwrap();
    tokio::time::timeout(LIMIT, watch.wait_for(|s| s.phase == Phase::Precopy)).await.unwrap().unwrap();
    let status = scene.a.engine.cancel(&id).await.unwrap();
    assert_eq!((status.phase, status.error.unwrap().code.as_str()), (Phase::Aborted, "cancelled"));
    assert!(scene.source.is_running());
    let destination = ended(&scene.b.engine, &id).await;
    assert_eq!(destination.phase, Phase::Aborted);
    assert!(!scene.destination.is_running());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_downtime_that_cannot_be_kept_is_told_before_the_start() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let spec = MigrateSpec { downtime_limit: Duration::from_millis(1), ..scene.spec() };
    let status = scene.migrate(spec).await.unwrap();
    assert_eq!(status.error.unwrap().code, "downtime_unreachable");
    scene.assert_stayed();
}
