//! Whole migrations between two engines in this process, with simulated VMMs on both sides.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dwcp_link::Peers;
use dwcp_migrate::spec::{IncomingSpec, Leave, MigrateSpec, ModeWish, PathWish, SourceWish, Vmm};
use dwcp_migrate::status::{Phase, Status};
use dwcp_migrate::{Engine, EngineConfig, Failure, FlagReason, Gate, Limits, Policy};
use dwcp_proto::{MigrationId, NodeKey, NodeName, Path, VmName};
use dwcp_vmm::sim::{GuestSpec, SimVmm};
use tempfile::TempDir;
use tokio::sync::watch;

/// No simulated migration takes longer, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(20);

struct Node {
    engine: Engine,
    gate: watch::Sender<Gate>,
    dir: TempDir,
}

fn key(name: &str, seed: u8) -> NodeKey {
    NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32])
}

fn gate(v3: bool) -> Gate {
    let reason = FlagReason { code: "test", text: format!("test says {v3}") };
    Gate::fixed(if v3 { Path::V3 } else { Path::V1 }, reason)
}

impl Node {
    async fn start(name: &str, seed: u8, v3: bool, policy: Policy) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let peers = Peers::of([key("a", 1).public(), key("b", 2).public()]);
        let (gate, gate_rx) = watch::channel(gate(v3));
        let config = EngineConfig {
            key: Arc::new(key(name, seed)),
            peers: Arc::new(peers),
            state_dir: dir.path().join("state"),
            policy,
            limits: Limits { inflight: 16 << 20, workers: 2, migrations: 8 },
            gate: gate_rx,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        Node { engine: Engine::start(config).await.unwrap(), gate, dir }
    }

    fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }
}

struct Scene {
    a: Node,
    b: Node,
    source: SimVmm,
    destination: SimVmm,
}

fn guest() -> GuestSpec {
    GuestSpec { seed: 7, pages: 4096, zero_percent: 30, hot_pages: 300, writes_per_step: 50 }
}

impl Scene {
    async fn new(a_v3: bool, b_v3: bool, policy: Policy) -> Scene {
        logged();
        let a = Node::start("a", 1, a_v3, policy).await;
        let b = Node::start("b", 2, b_v3, policy).await;
        let source = SimVmm::running(&a.qmp(), guest()).unwrap();
        let destination = SimVmm::incoming(&b.qmp(), guest()).unwrap();
        Scene { a, b, source, destination }
    }

    fn spec(&self) -> MigrateSpec {
        MigrateSpec {
            vm: VmName::new("vm1").unwrap(),
            vmm: Vmm::Qmp(self.a.qmp()),
            to: NodeName::new("b").unwrap(),
            addr: self.b.engine.data_addr(),
            path: PathWish::Auto,
            mode: ModeWish::Auto,
            downtime_limit: Duration::from_millis(500),
            bandwidth_limit: None,
            streams: None,
            source: SourceWish::Auto,
            verify_ram: false,
            shared_storage: false,
            on_success: Leave::Leave,
            on_abort: Leave::Leave,
            deadline: None,
            id: None,
        }
    }

    async fn awaited(&self) -> Status {
        let spec = IncomingSpec {
            vm: VmName::new("vm1").unwrap(),
            vmm: Vmm::Qmp(self.b.qmp()),
            from: NodeName::new("a").unwrap(),
            on_abort: Leave::Leave,
        };
        self.b.engine.prepare_incoming(spec).await.unwrap()
    }

    async fn migrate(&self, spec: MigrateSpec) -> Result<Status, Failure> {
        let id = self.a.engine.migrate(spec).await?;
        Ok(ended(&self.a.engine, &id).await)
    }

    fn assert_moved(&self) {
        assert!(!self.source.is_running() && self.destination.is_running());
        assert!(self.source.ram() == self.destination.ram(), "RAM differs");
    }

    fn assert_stayed(&self) {
        assert!(self.source.is_running() && !self.destination.is_running());
    }
}

fn logged() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

async fn ended(engine: &Engine, id: &MigrationId) -> Status {
    let mut watch = engine.watch(id).unwrap();
    let status = tokio::time::timeout(LIMIT, watch.wait_for(|s| s.phase.is_end())).await;
    status.unwrap_or_else(|_| panic!("still {:?}", engine.get(id))).unwrap().clone()
}

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
