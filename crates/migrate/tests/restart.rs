//! Agents that die, as by `kill -9`, and come back: the end is one running guest. Each node has a runtime of its own; dropping it
//! ends all of its tasks and closes all of its sockets at once. The VMMs are simulated and live on.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_link::Peers;
use dwcp_migrate::spec::{Channels, IncomingSpec, Leave, MigrateSpec, ModeWish, PathWish, SourceWish, Vmm};
use dwcp_migrate::status::{Explanation, Phase, Role, Status};
use dwcp_migrate::{Congestion, Engine, EngineConfig, FlagReason, Gate, Hde, Limits, Policy};
use dwcp_proto::handover::Resolution;
use dwcp_proto::mode::Bounds;
use dwcp_proto::{MigrationId, NodeKey, NodeName, VmName};
use dwcp_vmm::sim::{Fault, GuestSpec, SimVmm};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Nothing here takes longer, whatever else the machine does.
const LIMIT: Duration = Duration::from_secs(60);

fn key(name: &str, seed: u8) -> NodeKey {
    NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32])
}

/// An agent that can be killed.
struct Agent {
    name: &'static str,
    seed: u8,
    state: PathBuf,
    listen: SocketAddr,
    life: Option<(Runtime, Engine)>,
    gate: watch::Sender<Gate>,
}

impl Agent {
    fn start(name: &'static str, seed: u8, dir: &Path) -> Agent {
        let gate = Gate::fixed(dwcp_proto::Path::V3, FlagReason { code: "test", text: "test".into() });
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let gate = watch::Sender::new(gate);
        let mut agent = Agent { name, seed, state: dir.join(name), listen, life: None, gate };
        agent.revive();
        agent
    }

    fn revive(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.unwrap();
        let config = EngineConfig {
            key: Arc::new(key(self.name, self.seed)),
            peers: Arc::new(Peers::of([key("a", 1).public(), key("b", 2).public()])),
            state_dir: self.state.clone(),
            policy: Policy::default(),
            limits: Limits {
                inflight: 16 << 20,
                workers: 1,
                migrations: 4,
                memory: None,
                cpu_pressure: None,
                bandwidth: None,
            },
            hde: Hde::default(),
            bounds: Bounds::default(),
            congestion: Congestion::default(),
            transport: dwcp_migrate::Transport::default(),
            gate: self.gate.subscribe(),
            sockets: self.state.join("sockets"),
            attach: false,
            outlive: false,
            listen: self.listen,
        };
        let engine = runtime.block_on(Engine::start(config)).unwrap();
        // The next life listens at the same address: that is where its peer looks for it.
        self.listen = engine.data_addr();
        self.life = Some((runtime, engine));
    }

    fn kill(&mut self) {
        let (runtime, engine) = self.life.take().unwrap();
        drop(engine);
        runtime.shutdown_timeout(Duration::from_secs(10));
    }

    fn engine(&self) -> &Engine {
        &self.life.as_ref().unwrap().1
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.life.as_ref().unwrap().0.block_on(future)
    }

    /// Waits until the migration's status is as `wanted` says.
    fn reaches(&self, id: &MigrationId, wanted: impl Fn(&Status) -> bool) -> Status {
        let mut watch = self.engine().watch(id).unwrap();
        let reached =
            self.block_on(async { tokio::time::timeout(LIMIT, watch.wait_for(|s| wanted(s))).await.is_ok() });
        let status = self.engine().get(id).unwrap();
        assert!(reached, "{}: {status:?}", self.name);
        status
    }

    fn ends(&self, id: &MigrationId) -> Phase {
        self.reaches(id, |s| s.phase.is_end()).phase
    }

    fn journal(&self, id: &MigrationId, side: &str) -> String {
        std::fs::read_to_string(self.state.join(format!("journal/{id}.{side}.jsonl"))).unwrap_or_default()
    }
}

struct Scene {
    /// Where the VMMs live.
    world: Runtime,
    a: Agent,
    b: Agent,
    source: SimVmm,
    destination: SimVmm,
    id: MigrationId,
    /// Further attempts that are asked for.
    retry: u32,
    dir: TempDir,
}

impl Scene {
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let world =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let guest = GuestSpec { seed: 3, pages: 8192, zero_percent: 10, hot_pages: 100, writes_per_step: 10 };
        let (source, destination) = world.block_on(async {
            let source = SimVmm::running(&dir.path().join("a.qmp"), guest.clone()).unwrap();
            (source, SimVmm::incoming(&dir.path().join("b.qmp"), guest).unwrap())
        });
        let (a, b) = (Agent::start("a", 1, dir.path()), Agent::start("b", 2, dir.path()));
        Scene { world, a, b, source, destination, id: MigrationId::new("m1").unwrap(), retry: 0, dir }
    }

    /// Starts to move the guest, at most so many bytes a second.
    fn begin(&self, path: PathWish, bandwidth: Option<u64>) {
        let vm = VmName::new("vm1").unwrap();
        let incoming = IncomingSpec {
            vm: vm.clone(),
            vmm: Vmm::Qmp(self.dir.path().join("b.qmp")),
            from: NodeName::new("a").unwrap(),
            on_abort: Leave::Leave,
            retry: self.retry,
        };
        self.b.block_on(self.b.engine().prepare_incoming(incoming)).unwrap();
        let spec = MigrateSpec {
            vm,
            vmm: Vmm::Qmp(self.dir.path().join("a.qmp")),
            to: NodeName::new("b").unwrap(),
            addr: self.b.listen,
            path,
            mode: ModeWish::Internet,
            downtime_limit: Duration::from_millis(500),
            bandwidth_limit: bandwidth,
            streams: None,
            channels: Channels::ONE,
            source: SourceWish::Auto,
            verify_ram: false,
            shared_storage: false,
            on_success: Leave::Leave,
            on_abort: Leave::Leave,
            deadline: None,
            retry: self.retry,
            id: Some(self.id.clone()),
        };
        self.a.block_on(self.a.engine().migrate(spec)).unwrap();
    }

    /// Until data flows; slow enough that it does not end meanwhile. Whether the guest still runs then depends on the machine's load.
    fn under_way(path: PathWish) -> Scene {
        let scene = Scene::new();
        scene.begin(path, Some(200_000));
        scene.a.reaches(&scene.id, |s| s.wire_bytes > 0);
        scene
    }

    /// Until the destination is committed to run the guest, and its VMM refuses.
    fn committed() -> Scene {
        let scene = Scene::new();
        scene.destination.inject(Fault::Refuse("cont".into()));
        scene.begin(PathWish::V3, None);
        let started = Instant::now();
        while !scene.b.journal(&scene.id, "destination").contains("\"starting\"") {
            assert!(started.elapsed() < LIMIT, "{:?}", scene.b.engine().list());
            std::thread::yield_now();
        }
        assert!(!scene.destination.is_running());
        scene
    }

    /// Until it is over and both agents know that the other knows it.
    fn settled(&self) {
        let started = Instant::now();
        let live =
            |agent: &Agent, side| agent.state.join(format!("journal/{}.{side}.jsonl", self.id)).exists();
        while live(&self.a, "source") || live(&self.b, "destination") {
            assert!(started.elapsed() < LIMIT, "{:?} {:?}", self.a.engine().list(), self.b.engine().list());
            std::thread::yield_now();
        }
    }

    fn assert_stayed(&self) {
        assert!(self.source.is_running() && !self.destination.is_running());
    }

    fn assert_moved(&self) {
        assert!(!self.source.is_running() && self.destination.is_running());
        assert!(self.source.ram() == self.destination.ram(), "RAM differs");
    }
}

#[test]
fn a_source_agent_killed_under_way_takes_the_migration_back() {
    for path in [PathWish::V1, PathWish::V3] {
        let mut scene = Scene::under_way(path);
        scene.a.kill();
        scene.a.revive();
        assert_eq!(scene.a.ends(&scene.id), Phase::Aborted);
        assert_eq!(scene.b.ends(&scene.id), Phase::Aborted);
        scene.assert_stayed();
    }
}

#[test]
fn a_destination_agent_killed_under_way_leaves_the_guest_at_the_source() {
    for path in [PathWish::V1, PathWish::V3] {
        let mut scene = Scene::under_way(path);
        scene.b.kill();
        scene.b.revive();
        assert_eq!(scene.a.ends(&scene.id), Phase::Aborted);
        assert_eq!(scene.b.ends(&scene.id), Phase::Aborted);
        scene.assert_stayed();
    }
}

#[test]
fn a_source_agent_killed_after_the_commit_finishes_the_handover() {
    let mut scene = Scene::committed();
    scene.a.kill();
    scene.destination.heal();
    assert_eq!(scene.b.ends(&scene.id), Phase::Completed);
    scene.a.revive();
    assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
    scene.assert_moved();
}

#[test]
fn a_destination_agent_killed_after_the_commit_runs_the_guest_when_it_is_back() {
    let mut scene = Scene::committed();
    scene.b.kill();
    scene.destination.heal();
    scene.b.revive();
    assert_eq!(scene.b.ends(&scene.id), Phase::Completed);
    assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
    scene.assert_moved();
}

#[test]
fn both_agents_killed_after_the_commit_still_end_with_one_guest() {
    let mut scene = Scene::committed();
    scene.a.kill();
    scene.b.kill();
    scene.destination.heal();
    assert!(!scene.source.is_running() && !scene.destination.is_running());
    scene.a.revive();
    scene.b.revive();
    assert_eq!(scene.b.ends(&scene.id), Phase::Completed);
    assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
    scene.assert_moved();
    drop(scene.world);
}

#[test]
fn a_migration_that_was_taken_back_can_be_tried_again() {
    let mut scene = Scene::under_way(PathWish::V3);
    scene.a.kill();
    scene.a.revive();
    assert_eq!(scene.a.ends(&scene.id), Phase::Aborted);
    assert_eq!(scene.b.ends(&scene.id), Phase::Aborted);
    let qmp = scene.dir.path().join("b.qmp");
    scene.destination.kill();
    std::fs::remove_file(&qmp).unwrap();
    let guest = scene.source.guest().unwrap().spec().clone();
    scene.destination = scene.world.block_on(async { SimVmm::incoming(&qmp, guest).unwrap() });
    scene.id = MigrationId::new("m2").unwrap();
    scene.begin(PathWish::V3, None);
    assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
    scene.assert_moved();
}

#[test]
fn an_operator_resolves_what_the_agents_may_not() {
    let mut scene = Scene::committed();
    scene.a.kill();
    scene.b.kill();
    scene.destination.kill();
    scene.a.revive();
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap().sides;
    assert_eq!((told.len(), told[0].owner.as_str(), told[0].phase.as_str()), (1, "in_doubt", "commit"));
    assert!(told[0].next.contains("resolve m1 --start-here --peer-fenced"), "{}", told[0].next);
    assert!(told[0].timeline.iter().any(|moment| moment.what == "switchover"), "{:?}", told[0].timeline);

    let resolve = |fenced, act| {
        let decision = Resolution::StartHere { peer_fenced: fenced };
        let limited = async {
            tokio::time::timeout(LIMIT, scene.a.engine().resolve(&scene.id, decision, act)).await.unwrap()
        };
        scene.a.block_on(limited)
    };
    // With the peer unreachable nothing is started on its silence.
    resolve(false, true).unwrap();
    assert!(!scene.source.is_running());
    assert!(resolve(true, false).unwrap().contains("on your word"));
    assert!(!scene.source.is_running());
    resolve(true, true).unwrap();
    assert_eq!(scene.a.ends(&scene.id), Phase::Aborted);
    assert!(scene.source.is_running());
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap().sides;
    assert_eq!(told[0].owner, "source");
}

#[test]
fn what_is_not_in_doubt_is_not_resolved() {
    let scene = Scene::under_way(PathWish::V3);
    let decision = Resolution::StartHere { peer_fenced: true };
    for agent in [&scene.a, &scene.b] {
        let refused = agent.block_on(agent.engine().resolve(&scene.id, decision, true)).unwrap_err();
        assert_eq!(refused.code, "not_in_doubt");
    }
    let unknown = MigrationId::new("other").unwrap();
    let refused = scene.a.block_on(scene.a.engine().resolve(&unknown, decision, true)).unwrap_err();
    assert_eq!(refused.code, "unknown_migration");
    scene.assert_stayed();
}

#[test]
fn both_ends_are_told_at_either_node_after_a_restart() {
    let mut scene = Scene::new();
    scene.begin(PathWish::V3, None);
    assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
    assert_eq!(scene.b.ends(&scene.id), Phase::Completed);
    scene.settled();
    for agent in [&mut scene.a, &mut scene.b] {
        agent.kill();
        agent.revive();
    }
    let whats =
        |told: &Explanation| told.timeline.iter().map(|moment| moment.what.clone()).collect::<Vec<_>>();
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap();
    assert_eq!(told.unheard, []);
    let (here, there) = (&told.sides[0], &told.peers[0]);
    assert_eq!((here.role, here.owner.as_str(), here.status.as_ref()), (Role::Source, "destination", None));
    assert_eq!((there.role, there.owner.as_str()), (Role::Destination, "destination"));
    assert!(whats(here).contains(&"commit".to_owned()) && whats(there).contains(&"receipt".to_owned()));
    assert_eq!(whats(here).iter().filter(|what| *what == "ended").count(), 1);
    let told = scene.b.block_on(scene.b.engine().explain(&scene.id)).unwrap();
    assert_eq!((told.sides[0].role, told.peers[0].role), (Role::Destination, Role::Source));

    // What is over says so to an operator who would decide, and its id is not taken again.
    let decision = Resolution::StartHere { peer_fenced: true };
    let refused = scene.a.block_on(scene.a.engine().resolve(&scene.id, decision, true)).unwrap_err();
    assert_eq!(refused.code, "not_in_doubt");
    assert!(refused.message.contains("the guest is at its destination"), "{refused}");
    scene.b.kill();
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap();
    assert_eq!((told.sides.len(), told.peers.len(), told.unheard.len()), (1, 0, 1));
    assert!(told.unheard[0].message.starts_with("b does not tell its side"), "{}", told.unheard[0]);
}

#[test]
fn a_damaged_journal_is_told_as_such_and_decides_nothing() {
    let mut scene = Scene::under_way(PathWish::V3);
    scene.a.kill();
    let path = scene.a.state.join("journal/m1.source.jsonl");
    let mut bytes = std::fs::read(&path).unwrap();
    let second = bytes.iter().position(|byte| *byte == b'\n').unwrap() + 10;
    bytes[second] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    scene.a.revive();
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap();
    let (here, there) = (&told.sides[0], &told.peers[0]);
    assert_eq!(here.cause.as_ref().unwrap().code, "journal_undecided");
    assert_eq!((here.owner.as_str(), here.phase.as_str()), ("in_doubt", "prepared"));
    assert_eq!(here.timeline.last().unwrap().what, "damaged");
    assert_eq!(there.role, Role::Destination);
    // It is listed, so that nobody overlooks it.
    assert_eq!(scene.a.engine().get(&scene.id).unwrap().phase, Phase::Failed);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn a_destination_agent_killed_at_its_receipt_still_gets_the_guest() {
    for path in [PathWish::V1, PathWish::V3] {
        let mut scene = at_its_receipt(path);
        // Its last acknowledgements may have been sent or not: the receipt stands for them.
        scene.b.kill();
        scene.b.revive();
        assert_eq!(scene.a.ends(&scene.id), Phase::Completed);
        scene.settled();
        scene.assert_moved();
    }
}

/// A migration whose destination has just written its receipt. A busy machine may not look in time: then another one.
fn at_its_receipt(path: PathWish) -> Scene {
    let started = Instant::now();
    while started.elapsed() < LIMIT {
        let scene = Scene::new();
        scene.begin(path, None);
        while scene.b.engine().get(&scene.id).is_none_or(|status| status.phase != Phase::Completed) {
            if scene.b.journal(&scene.id, "destination").contains("\"receipt\"") {
                return scene;
            }
            assert!(started.elapsed() < LIMIT, "{:?}", scene.b.engine().list());
            std::thread::yield_now();
        }
    }
    panic!("the receipt was never seen");
}

#[test]
fn a_killed_source_agent_tries_again_where_that_is_asked_for() {
    let mut scene = Scene::new();
    scene.retry = 1;
    scene.begin(PathWish::V3, Some(8_000_000));
    scene.a.reaches(&scene.id, |s| s.wire_bytes > 0);
    scene.a.kill();
    scene.a.revive();
    // The first attempt costs the destination's VMM; somebody starts another one.
    scene.world.block_on(async { tokio::time::timeout(LIMIT, scene.destination.died()).await.unwrap() });
    let qmp = scene.dir.path().join("b.qmp");
    std::fs::remove_file(&qmp).unwrap();
    let guest = scene.source.guest().unwrap().spec().clone();
    scene.destination = scene.world.block_on(async { SimVmm::incoming(&qmp, guest).unwrap() });
    let status = scene.a.reaches(&scene.id, |s| s.phase.is_end());
    assert_eq!((status.phase, status.attempt), (Phase::Completed, 2), "{status:?}");
    assert_eq!(status.fallback_reasons[0], "attempt 1 ended: agent_restarted");
    assert_eq!(scene.b.ends(&scene.id), Phase::Completed);
    scene.settled();
    scene.assert_moved();
    let told = scene.a.block_on(scene.a.engine().explain(&scene.id)).unwrap();
    for side in [&told.sides[0], &told.peers[0]] {
        let begun: Vec<_> =
            side.timeline.iter().filter(|m| m.what == "prepared" || m.what == "accepted").collect();
        assert_eq!(begun.len(), 2, "{side:?}");
        assert!(begun[1].text.starts_with("attempt 2, "), "{}", begun[1].text);
    }
}

#[test]
fn further_attempts_are_bounded_and_end_by_a_cancel() {
    let mut scene = Scene::new();
    scene.retry = 1;
    scene.begin(PathWish::V3, Some(200_000));
    scene.a.reaches(&scene.id, |s| s.wire_bytes > 0);
    scene.a.kill();
    scene.a.revive();
    scene.a.reaches(&scene.id, |s| s.attempt == 2);
    // No fresh VMM comes at the destination.
    let status = scene.a.block_on(scene.a.engine().cancel(&scene.id)).unwrap();
    assert_eq!((status.phase, status.error.unwrap().code.as_str()), (Phase::Aborted, "cancelled"));
    // Nor does the next life of the agent try again.
    let started = Instant::now();
    while !scene.a.journal(&scene.id, "source").contains("given_up") {
        assert!(started.elapsed() < LIMIT);
        std::thread::yield_now();
    }
    scene.a.kill();
    scene.a.revive();
    assert_eq!((scene.a.ends(&scene.id), scene.source.is_running()), (Phase::Aborted, true));
    scene.settled();
}
