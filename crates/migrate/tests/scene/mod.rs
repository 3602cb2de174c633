//! Two engines in this process, with a simulated VMM each.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail as its assertions do")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dwcp_link::Peers;
use dwcp_migrate::spec::{Channels, IncomingSpec, Leave, MigrateSpec, ModeWish, PathWish, SourceWish, Vmm};
use dwcp_migrate::status::Status;
use dwcp_migrate::{
    Congestion, Engine, EngineConfig, Failure, FlagReason, Gate, Hde, Limits, Policy, Transport,
};
use dwcp_proto::mode::Bounds;
use dwcp_proto::{MigrationId, NodeKey, NodeName, Path, VmName};
use dwcp_vmm::sim::{GuestSpec, SimVmm};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::sync::watch;

/// No simulated migration takes longer, whatever else the machine does.
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Node {
    pub engine: Engine,
    pub gate: watch::Sender<Gate>,
    pub dir: TempDir,
}

pub fn key(name: &str, seed: u8) -> NodeKey {
    NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32])
}

pub fn gate(v3: bool) -> Gate {
    let reason = FlagReason { code: "test", text: format!("test says {v3}") };
    Gate::fixed(if v3 { Path::V3 } else { Path::V1 }, reason)
}

impl Node {
    pub async fn start(name: &str, seed: u8, v3: bool, policy: Policy) -> Node {
        Node::start_with(name, seed, v3, policy, |_| ()).await
    }

    /// One whose configuration is changed by `adapt` before it starts.
    pub async fn start_with(
        name: &str,
        seed: u8,
        v3: bool,
        policy: Policy,
        adapt: impl FnOnce(&mut EngineConfig),
    ) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let peers = Peers::of([key("a", 1).public(), key("b", 2).public()]);
        let (gate, gate_rx) = watch::channel(gate(v3));
        let mut config = EngineConfig {
            key: Arc::new(key(name, seed)),
            peers: Arc::new(peers),
            state_dir: dir.path().join("state"),
            policy,
            limits: Limits {
                inflight: 16 << 20,
                workers: 2,
                migrations: 8,
                memory: None,
                cpu_pressure: None,
                bandwidth: None,
            },
            hde: Hde::default(),
            bounds: Bounds::default(),
            congestion: Congestion::default(),
            transport: Transport::default(),
            gate: gate_rx,
            sockets: dir.path().join("sockets"),
            attach: false,
            outlive: false,
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        };
        adapt(&mut config);
        Node { engine: Engine::start(config).await.unwrap(), gate, dir }
    }

    /// What this node counts, as Prometheus reads it.
    pub fn metrics(&self) -> String {
        let mut registry = Registry::default();
        self.engine.metrics().register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        text
    }

    pub fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }
}

/// From `a` to `b`, with the defaults.
pub fn spec(a: &Node, b: &Node) -> MigrateSpec {
    MigrateSpec {
        vm: VmName::new("vm1").unwrap(),
        vmm: Vmm::Qmp(a.qmp()),
        to: NodeName::new("b").unwrap(),
        addr: b.engine.data_addr(),
        path: PathWish::Auto,
        mode: ModeWish::Auto,
        downtime_limit: Duration::from_millis(500),
        bandwidth_limit: None,
        streams: None,
        channels: Channels::ONE,
        source: SourceWish::Auto,
        verify_ram: false,
        shared_storage: false,
        on_success: Leave::Leave,
        on_abort: Leave::Leave,
        deadline: None,
        retry: 0,
        id: None,
    }
}

pub struct Scene {
    pub a: Node,
    pub b: Node,
    pub source: SimVmm,
    pub destination: SimVmm,
}

/// Of several times the bytes that the agents and the sockets between them take in before the first has left.
pub fn guest() -> GuestSpec {
    GuestSpec { seed: 7, pages: 12_288, zero_percent: 30, hot_pages: 300, writes_per_step: 50 }
}

impl Scene {
    pub async fn new(a_v3: bool, b_v3: bool, policy: Policy) -> Scene {
        Scene::with(a_v3, b_v3, policy, |_| ()).await
    }

    /// One whose source's configuration is changed by `adapt`.
    pub async fn with(
        a_v3: bool,
        b_v3: bool,
        policy: Policy,
        adapt: impl FnOnce(&mut EngineConfig),
    ) -> Scene {
        Scene::with_both(a_v3, b_v3, policy, adapt, |_| ()).await
    }

    /// One whose nodes' configurations are changed, the source's first.
    pub async fn with_both(
        a_v3: bool,
        b_v3: bool,
        policy: Policy,
        adapt_a: impl FnOnce(&mut EngineConfig),
        adapt_b: impl FnOnce(&mut EngineConfig),
    ) -> Scene {
        logged();
        let a = Node::start_with("a", 1, a_v3, policy, adapt_a).await;
        let b = Node::start_with("b", 2, b_v3, policy, adapt_b).await;
        let source = SimVmm::running(&a.qmp(), guest()).unwrap();
        let destination = SimVmm::incoming(&b.qmp(), guest()).unwrap();
        Scene { a, b, source, destination }
    }

    pub fn spec(&self) -> MigrateSpec {
        spec(&self.a, &self.b)
    }

    pub async fn awaited(&self) -> Status {
        let spec = IncomingSpec {
            vm: VmName::new("vm1").unwrap(),
            vmm: Vmm::Qmp(self.b.qmp()),
            from: NodeName::new("a").unwrap(),
            on_abort: Leave::Leave,
            retry: 0,
        };
        self.b.engine.prepare_incoming(spec).await.unwrap()
    }

    pub async fn migrate(&self, spec: MigrateSpec) -> Result<Status, Failure> {
        let id = self.a.engine.migrate(spec).await?;
        Ok(ended(&self.a.engine, &id).await)
    }

    pub fn assert_moved(&self) {
        assert!(!self.source.is_running() && self.destination.is_running());
        assert!(self.source.ram() == self.destination.ram(), "RAM differs");
    }

    pub fn assert_stayed(&self) {
        assert!(self.source.is_running() && !self.destination.is_running());
    }
}

pub fn logged() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

pub async fn ended(engine: &Engine, id: &MigrationId) -> Status {
    let mut watch = engine.watch(id).unwrap();
    let status = tokio::time::timeout(LIMIT, watch.wait_for(|s| s.phase.is_end())).await;
    status.unwrap_or_else(|_| panic!("still {:?}", engine.get(id))).unwrap().clone()
}
