//! Many migrations at once between the same two engines, which share what the node may take of the network.

#![allow(clippy::unwrap_used, reason = "a test's helpers may fail as its assertions do")]

mod scene;

use dwcp_migrate::spec::{IncomingSpec, Leave, MigrateSpec, ModeWish, Vmm};
use dwcp_migrate::status::Phase;
use dwcp_migrate::{EngineConfig, Policy};
use dwcp_proto::{NodeName, VmName};
use dwcp_vmm::sim::{GuestSpec, SimVmm};

use scene::{Node, ended, logged};

const GUESTS: usize = 8;
/// Bytes a second for all of them: little, so that this and nothing else is what they compete for.
const BANDWIDTH: u64 = 128 << 20;
/// Much more than the agents hold of a guest at a time: what is left once it stands still goes before the others.
const PAGES: u64 = 24_576;

#[tokio::test(flavor = "multi_thread")]
async fn eight_guests_at_once_all_arrive_and_none_is_favoured() {
    logged();
    let limited = |config: &mut EngineConfig| config.limits.bandwidth = Some(BANDWIDTH);
    let a = Node::start_with("a", 1, true, Policy::default(), limited).await;
    let b = Node::start("b", 2, true, Policy::default()).await;
    let guest = |seed| GuestSpec { seed, pages: PAGES, zero_percent: 0, hot_pages: 1, writes_per_step: 1 };
    let mut vmms = Vec::new();
    let mut ids = Vec::new();
    for n in 0..GUESTS {
        let (name, seed) = (VmName::new(format!("vm{n}")).unwrap(), n as u64 + 1);
        let (from, to) = (a.dir.path().join(format!("qmp{n}")), b.dir.path().join(format!("qmp{n}")));
        vmms.push((
            SimVmm::running(&from, guest(seed)).unwrap(),
            SimVmm::incoming(&to, guest(seed)).unwrap(),
        ));
        let incoming = IncomingSpec {
            vm: name.clone(),
            vmm: Vmm::Qmp(to),
            from: NodeName::new("a").unwrap(),
            on_abort: Leave::Leave,
            retry: 0,
        };
        b.engine.prepare_incoming(incoming).await.unwrap();
        let spec = scene::spec(&a, &b);
        let spec = MigrateSpec { vm: name, vmm: Vmm::Qmp(from), mode: ModeWish::Datacenter, ..spec };
        ids.push(spec);
    }
    let mut started = Vec::new();
    for spec in ids {
        started.push(a.engine.migrate(spec).await.unwrap());
    }
    let mut seconds = Vec::new();
    for id in &started {
        let status = ended(&a.engine, id).await;
        assert_eq!((status.phase, status.error), (Phase::Completed, None));
        seconds.push(status.total_seconds);
    }
    for (source, destination) in &vmms {
        assert!(!source.is_running() && destination.is_running());
        assert!(source.ram() == destination.ram(), "RAM differs");
    }
    let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
    let most = seconds.iter().copied().fold(0.0, f64::max);
    println!("{seconds:?}");
    assert!(least >= 0.8 * most, "not fair within 20 %: {seconds:?}");
    let together = (GUESTS as u64 * PAGES * 4096) as f64 / BANDWIDTH as f64;
    assert!(most >= 0.9 * together, "{most} s where the limit asks for {together} s: {seconds:?}");
}
