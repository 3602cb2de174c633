//! The path changes in the middle of migrations between two engines, with simulated VMMs.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

mod scene;

use std::time::Duration;

use dwcp_migrate::spec::{MigrateSpec, ModeWish, PathWish};
use dwcp_migrate::status::{Phase, Status};
use dwcp_migrate::{EngineConfig, Policy, V1Policy};
use dwcp_proto::{MigrationId, Path};

use scene::{Scene, ended, gate};

/// Slow enough that there is a middle: the guest has 34 MiB that are not zero.
const RATE: u64 = 18 << 20;

fn slow(scene: &Scene) -> MigrateSpec {
    MigrateSpec { bandwidth_limit: Some(RATE), ..scene.spec() }
}

/// Waits until so much of the VMM's stream was carried.
async fn carried(scene: &Scene, id: &MigrationId, bytes: u64) {
    // The status is brought up to date with the clock, not with each byte.
    until(scene, id, |status| status.raw_bytes >= bytes).await;
}

async fn on(scene: &Scene, id: &MigrationId, path: &str) {
    until(scene, id, |status| status.path.as_deref() == Some(path)).await;
}

async fn until(scene: &Scene, id: &MigrationId, there: impl Fn(&Status) -> bool) {
    let mut watch = scene.a.engine.watch(id).unwrap();
    let waited = watch.wait_for(|status| {
        assert!(!status.phase.is_end(), "too late: {status:?}");
        there(status)
    });
    tokio::time::timeout(scene::LIMIT, waited).await.expect("in time").unwrap();
}

/// It arrived on `path`, whole, and both ends tell the changes.
async fn arrived(scene: &Scene, id: &MigrationId, path: &str, switches: u32) -> Status {
    let status = ended(&scene.a.engine, id).await;
    assert_eq!((status.phase, &status.error), (Phase::Completed, &None));
    assert_eq!((status.path.as_deref(), status.path_switches), (Some(path), switches), "{status:?}");
    let there = ended(&scene.b.engine, id).await;
    assert_eq!((there.phase, there.path.as_deref()), (Phase::Completed, Some(path)));
    assert_eq!(there.path_switches, switches);
    scene.assert_moved();
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_that_goes_off_turns_a_running_migration_to_v1() {
    for mode in [ModeWish::Internet, ModeWish::Datacenter] {
        let scene = Scene::new(true, true, Policy::default()).await;
        scene.awaited().await;
        let id = scene.a.engine.migrate(MigrateSpec { mode, ..slow(&scene) }).await.unwrap();
        on(&scene, &id, "v3").await;
        carried(&scene, &id, 2 << 20).await;
        scene.a.gate.send_replace(gate(false));
        let status = arrived(&scene, &id, "v1", 1).await;
        let reasons = status.fallback_reasons.join("; ");
        assert!(reasons.contains("flag: test says false"), "{reasons}");
        let metrics = scene.a.metrics();
        assert!(metrics.contains(r#"dwcp_path_switches_total{to="v1",cause="flag"} 1"#), "{metrics}");
        assert!(metrics.contains("dwcp_v3_migrations_inflight 0"), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flag_that_comes_on_turns_a_running_migration_to_v3() {
    let scene = Scene::new(false, true, Policy::default()).await;
    scene.awaited().await;
    let id =
        scene.a.engine.migrate(MigrateSpec { bandwidth_limit: Some(9 << 20), ..scene.spec() }).await.unwrap();
    on(&scene, &id, "v1").await;
    carried(&scene, &id, 1 << 20).await;
    scene.a.gate.send_replace(gate(true));
    let status = arrived(&scene, &id, "v3", 1).await;
    assert!(status.chunks > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_destinations_veto_turns_a_running_migration_to_v1() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let id = scene.a.engine.migrate(slow(&scene)).await.unwrap();
    carried(&scene, &id, 2 << 20).await;
    scene.b.gate.send_replace(gate(false));
    let status = arrived(&scene, &id, "v1", 1).await;
    assert!(status.fallback_reasons.iter().any(|r| r.contains("peer_veto")), "{:?}", status.fallback_reasons);
}

/// Limits that every node is beyond.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_in_trouble_turns_its_running_migrations_to_v1() {
    let memory: fn(&mut EngineConfig) = |config| config.limits.memory = Some(1);
    let cpu: fn(&mut EngineConfig) = |config| config.limits.cpu_pressure = Some(0);
    for (adapt, cause) in [(memory, "breaker_memory"), (cpu, "breaker_cpu")] {
        if cause == "breaker_cpu" && !std::path::Path::new("/proc/pressure/cpu").exists() {
            eprintln!("SKIPPED the breaker for processors: this kernel keeps no pressure stall information");
            continue;
        }
        let scene = Scene::with(true, true, Policy::default(), adapt).await;
        scene.awaited().await;
        let id = scene.a.engine.migrate(slow(&scene)).await.unwrap();
        let status = arrived(&scene, &id, "v1", 1).await;
        let reasons = status.fallback_reasons.join("; ");
        assert!(reasons.contains("[limits]"), "{reasons}");
        let switched = format!(r#"dwcp_path_switches_total{{to="v1",cause="{cause}"}} 1"#);
        assert!(scene.a.metrics().contains(&switched), "{}", scene.a.metrics());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_turns_a_migration_back_and_forth() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let spec = MigrateSpec { bandwidth_limit: Some(6 << 20), mode: ModeWish::Internet, ..scene.spec() };
    let id = scene.a.engine.migrate(spec).await.unwrap();
    carried(&scene, &id, 1 << 20).await;
    let source = &scene.a.engine;
    for (n, path) in [Path::V1, Path::V3, Path::V1].into_iter().enumerate() {
        let text = source.switch(&id, path).await.unwrap();
        assert!(text.contains(path.name()), "{text}");
        until(&scene, &id, |status| status.path_switches == n as u32 + 1).await;
    }
    let text = source.switch(&id, Path::V1).await.unwrap();
    assert!(text.contains("already"), "{text}");
    arrived(&scene, &id, "v1", 3).await;
    // It is over; and the destination has no data path to turn.
    assert_eq!(source.switch(&id, Path::V3).await.unwrap_err().code, "no_data_path");
    assert_eq!(scene.b.engine.switch(&id, Path::V3).await.unwrap_err().code, "no_data_path");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_cannot_pass_the_flag() {
    let scene = Scene::new(false, true, Policy::default()).await;
    scene.awaited().await;
    let id = scene.a.engine.migrate(slow(&scene)).await.unwrap();
    carried(&scene, &id, 1 << 20).await;
    let failure = scene.a.engine.switch(&id, Path::V3).await.unwrap_err();
    assert_eq!(failure.code, "v3_barred");
    arrived(&scene, &id, "v1", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn v1_by_name_stays_v1_when_the_flag_comes_on() {
    let scene = Scene::new(false, true, Policy::default()).await;
    scene.awaited().await;
    let spec = MigrateSpec { path: PathWish::V1, bandwidth_limit: Some(9 << 20), ..scene.spec() };
    let id = scene.a.engine.migrate(spec).await.unwrap();
    carried(&scene, &id, 1 << 20).await;
    scene.a.gate.send_replace(gate(true));
    arrived(&scene, &id, "v1", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_policy_bars_v1_a_flag_that_goes_off_aborts_with_the_guest_at_the_source() {
    let policy = Policy { v1: V1Policy::Never, ..Policy::default() };
    let scene = Scene::new(true, true, policy).await;
    scene.awaited().await;
    let id = scene.a.engine.migrate(slow(&scene)).await.unwrap();
    carried(&scene, &id, 2 << 20).await;
    scene.a.gate.send_replace(gate(false));
    let status = ended(&scene.a.engine, &id).await;
    assert_eq!(status.phase, Phase::Aborted);
    let failure = status.error.unwrap();
    assert_eq!(failure.code, "v1_barred");
    assert!(failure.message.contains("test says false"), "{failure}");
    scene.assert_stayed();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_that_v1_cannot_keep_ends_it_at_the_source_and_says_so() {
    let scene = Scene::new(true, true, Policy::default()).await;
    scene.awaited().await;
    let spec = MigrateSpec {
        mode: ModeWish::Internet,
        bandwidth_limit: Some(1 << 20),
        deadline: Some(Duration::from_secs(3)),
        ..scene.spec()
    };
    let id = scene.a.engine.migrate(spec).await.unwrap();
    carried(&scene, &id, 256 << 10).await;
    scene.a.gate.send_replace(gate(false));
    let status = ended(&scene.a.engine, &id).await;
    let failure = status.error.unwrap();
    assert_eq!((status.phase, failure.code.as_str()), (Phase::Aborted, "deadline"));
    assert!(failure.message.contains("v1"), "{failure}");
    scene.assert_stayed();
}
