//! Migrations between two engines in this process whose data goes over QUIC, with simulated VMMs.

// A test's helpers may fail as its assertions do.
#![allow(clippy::unwrap_used)]

mod scene;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dwcp_migrate::spec::{MigrateSpec, ModeWish};
use dwcp_migrate::status::{Phase, Status};
use dwcp_migrate::{Policy, Transport};
use dwcp_proto::{MigrationId, Path};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::JoinSet;

use scene::{Scene, ended};

async fn scene(a: Transport, b: Transport) -> Scene {
    Scene::with_both(
        true,
        true,
        Policy::default(),
        |config| config.transport = a,
        |config| {
            config.transport = b;
        },
    )
    .await
}

fn internet(scene: &Scene) -> MigrateSpec {
    MigrateSpec { mode: ModeWish::Internet, ..scene.spec() }
}

/// Slow enough that there is a middle: the guest has 34 MiB that are not zero.
fn slow(scene: &Scene) -> MigrateSpec {
    MigrateSpec { bandwidth_limit: Some(6 << 20), ..internet(scene) }
}

async fn until(scene: &Scene, id: &MigrationId, there: impl Fn(&Status) -> bool) -> Status {
    let mut watch = scene.a.engine.watch(id).unwrap();
    let waited = watch.wait_for(|status| {
        assert!(!status.phase.is_end(), "too late: {status:?}");
        there(status)
    });
    tokio::time::timeout(scene::LIMIT, waited).await.expect("in time").unwrap().clone()
}

/// The connections stand: what was only read from the VMM does not count, and the status lags.
fn under_way(status: &Status) -> bool {
    status.wire_bytes >= 1 << 20
}

/// It arrived whole. What it went over in the end at the source, and why; the destination agrees.
async fn arrived(scene: &Scene, id: &MigrationId) -> (Status, String) {
    let status = ended(&scene.a.engine, id).await;
    assert_eq!((status.phase, &status.error), (Phase::Completed, &None));
    let there = ended(&scene.b.engine, id).await;
    assert_eq!((there.phase, &there.transport), (Phase::Completed, &status.transport));
    scene.assert_moved();
    let why = status.transport_reason.clone().unwrap();
    (status, why)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_moves_over_quic() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let checked = scene.a.engine.check(internet(&scene)).await;
    assert!(checked.notes.iter().any(|note| note.contains("over QUIC")), "{checked:?}");
    let id = scene.a.engine.migrate(internet(&scene)).await.unwrap();
    let (status, why) = arrived(&scene, &id).await;
    assert_eq!((status.transport.as_deref(), status.encryption.as_deref()), (Some("quic"), Some("tls")));
    assert!(why.contains("[link] transport"), "{why}");
    assert!(
        status.chunks > 0 && !status.fallback_reasons.iter().any(|why| why.contains("QUIC")),
        "{status:?}"
    );
    let metrics = scene.a.metrics();
    let leg = r#"dwcp_legs_total{path="v3",encryption="tls",transport="quic"} 1"#;
    assert!(metrics.contains(leg), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_tcp_where_quic_cannot_pay() {
    for (a, mode, expected) in [
        (Transport::Auto, ModeWish::Internet, "the round trip of"),
        (Transport::Tcp, ModeWish::Internet, "asks for TCP"),
        (Transport::Quic, ModeWish::Datacenter, "datacenter mode"),
    ] {
        let scene = scene(a, Transport::Auto).await;
        scene.awaited().await;
        let id = scene.a.engine.migrate(MigrateSpec { mode, ..scene.spec() }).await.unwrap();
        let (status, why) = arrived(&scene, &id).await;
        assert_eq!(status.transport.as_deref(), Some("tcp"));
        assert!(why.contains(expected), "{why}");
        assert!(!status.fallback_reasons.iter().any(|why| why.contains("QUIC")), "{status:?}");
    }
}

/// As an older agent, too, does.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_offers_no_quic_gets_tcp_and_the_reason_is_told() {
    let scene = scene(Transport::Quic, Transport::Tcp).await;
    scene.awaited().await;
    let id = scene.a.engine.migrate(internet(&scene)).await.unwrap();
    let (status, _) = arrived(&scene, &id).await;
    assert_eq!(status.transport.as_deref(), Some("tcp"));
    let told =
        status.fallback_reasons.iter().any(|why| why.contains("TCP instead of QUIC: the destination offers"));
    assert!(told, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_path_changes_to_v1_and_back_to_v3_over_quic() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let id = scene.a.engine.migrate(slow(&scene)).await.unwrap();
    until(&scene, &id, under_way).await;
    for (n, (path, transport)) in [(Path::V1, "tcp"), (Path::V3, "quic")].into_iter().enumerate() {
        scene.a.engine.switch(&id, path).await.unwrap();
        let status = until(&scene, &id, |s| s.path_switches == n as u32 + 1).await;
        assert_eq!(status.transport.as_deref(), Some(transport), "{status:?}");
    }
    let (status, why) = arrived(&scene, &id).await;
    assert_eq!((status.transport.as_deref(), status.path_switches), (Some("quic"), 2));
    assert!(why.contains("[link] transport"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_udp_is_blocked_it_goes_over_tcp_from_the_beginning() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let relay = Relay::start(scene.b.engine.data_addr()).await;
    relay.block();
    let id = scene.a.engine.migrate(MigrateSpec { addr: relay.addr, ..internet(&scene) }).await.unwrap();
    let (status, _) = arrived(&scene, &id).await;
    assert_eq!(status.transport.as_deref(), Some("tcp"));
    let told = status.fallback_reasons.iter().any(|why| why.contains("TCP instead of QUIC: no answer from"));
    assert!(told, "{status:?}");
}

/// The connections look alive and nothing comes through: the destination names them as silent, and what is made again cannot
/// be QUIC's.
#[tokio::test(flavor = "multi_thread")]
async fn where_udp_is_blocked_later_it_goes_on_over_tcp() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let relay = Relay::start(scene.b.engine.data_addr()).await;
    let id = scene.a.engine.migrate(MigrateSpec { addr: relay.addr, ..slow(&scene) }).await.unwrap();
    until(&scene, &id, |s| under_way(s) && s.transport.as_deref() == Some("quic")).await;
    relay.block();
    let (status, why) = arrived(&scene, &id).await;
    assert_eq!((status.transport.as_deref(), status.path_switches), (Some("tcp"), 0));
    assert!(why.contains("UDP does not get through"), "{why}");
    assert!(status.fallback_reasons.contains(&why) && status.reconnects > 0, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_connection_that_is_lost_is_made_again() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let relay = Relay::start(scene.b.engine.data_addr()).await;
    let id = scene.a.engine.migrate(MigrateSpec { addr: relay.addr, ..slow(&scene) }).await.unwrap();
    until(&scene, &id, under_way).await;
    relay.lose();
    let (status, _) = arrived(&scene, &id).await;
    assert_eq!((status.transport.as_deref(), status.path_switches), (Some("quic"), 0));
    assert!(status.reconnects > 0, "{status:?}");
}

/// As behind a translator of addresses that has forgotten its table: QUIC connections go on where TCP's would be lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_quic_connection_outlives_a_change_of_its_address() {
    let scene = scene(Transport::Quic, Transport::Auto).await;
    scene.awaited().await;
    let relay = Relay::start(scene.b.engine.data_addr()).await;
    let id = scene.a.engine.migrate(MigrateSpec { addr: relay.addr, ..slow(&scene) }).await.unwrap();
    until(&scene, &id, under_way).await;
    relay.forget();
    let (status, _) = arrived(&scene, &id).await;
    assert_eq!((status.transport.as_deref(), status.reconnects), (Some("quic"), 0), "{status:?}");
}

/// Stands between the nodes: TCP passes; UDP passes while it may.
struct Relay {
    addr: SocketAddr,
    state: Arc<State>,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct State {
    blocked: AtomicBool,
    lose: AtomicBool,
    forget: AtomicBool,
}

impl Relay {
    async fn start(to: SocketAddr) -> Relay {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (listener, front) = loop {
            let listener = TcpListener::bind(any).await.unwrap();
            // Somebody else may have the UDP port of that number.
            if let Ok(front) = UdpSocket::bind(listener.local_addr().unwrap()).await {
                break (listener, Arc::new(front));
            }
        };
        let addr = listener.local_addr().unwrap();
        let state = Arc::<State>::default();
        let mut task = JoinSet::new();
        task.spawn(streams(listener, to));
        task.spawn(datagrams(front, to, state.clone()));
        Relay { addr, state, _task: task }
    }

    /// UDP passes no more.
    fn block(&self) {
        self.state.blocked.store(true, Ordering::Relaxed);
    }

    /// What comes from the present sockets passes no more.
    fn lose(&self) {
        self.state.lose.store(true, Ordering::Relaxed);
    }

    /// What comes from the present sockets passes from other addresses.
    fn forget(&self) {
        self.state.forget.store(true, Ordering::Relaxed);
    }
}

async fn streams(listener: TcpListener, to: SocketAddr) {
    let mut open = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        open.spawn(async move {
            let mut far = TcpStream::connect(to).await.unwrap();
            let _ = copy_bidirectional(&mut near, &mut far).await;
        });
    }
}

async fn datagrams(front: Arc<UdpSocket>, to: SocketAddr, state: Arc<State>) {
    let mut backs: HashMap<SocketAddr, Option<Arc<UdpSocket>>> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut datagram = vec![0; 64 << 10];
    loop {
        let Ok((length, from)) = front.recv_from(&mut datagram).await else { continue };
        if state.forget.swap(false, Ordering::Relaxed) {
            answers.abort_all();
            backs.clear();
        }
        if state.lose.swap(false, Ordering::Relaxed) {
            answers.abort_all();
            backs.values_mut().for_each(|back| *back = None);
        }
        if state.blocked.load(Ordering::Relaxed) {
            answers.abort_all();
            continue;
        }
        if let std::collections::hash_map::Entry::Vacant(entry) = backs.entry(from) {
            let back = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
            back.connect(to).await.unwrap();
            entry.insert(Some(back.clone()));
            let front = front.clone();
            answers.spawn(async move {
                let mut datagram = vec![0; 64 << 10];
                loop {
                    if let Ok(length) = back.recv(&mut datagram).await {
                        let _ = front.send_to(&datagram[..length], from).await;
                    }
                }
            });
        }
        if let Some(Some(back)) = backs.get(&from) {
            let _ = back.send(&datagram[..length]).await;
        }
    }
}
