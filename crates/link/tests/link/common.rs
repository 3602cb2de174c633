//! Nodes with keys, and a listener and a dialler that know each other.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dwcp_link::{Connection, DialOptions, Identity, LinkError, ListenOptions, Listener, Peers, dial};
use dwcp_proto::{NodeKey, NodeName, PeerKey};

/// Where port 0 is asked for.
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

/// More than any step takes; a test that waits so long has failed.
pub(crate) const LONG: Duration = Duration::from_secs(10);

/// Long enough for a loopback round trip, short enough to wait for.
pub(crate) const SHORT: Duration = Duration::from_millis(200);

pub(crate) fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

/// A key that follows from its name and generation.
pub(crate) fn key(node: &str, generation: u8) -> Arc<NodeKey> {
    let mut seed = [generation; 32];
    seed[..node.len()].copy_from_slice(node.as_bytes());
    Arc::new(NodeKey::from_seed(name(node), &seed))
}

pub(crate) fn identity(node: &str, peers: impl IntoIterator<Item = PeerKey>) -> Identity {
    Identity::new(key(node, 0), Arc::new(Peers::of(peers))).unwrap()
}

/// Nodes `src` and `dst`, which trust each other.
pub(crate) fn both() -> (Identity, Identity) {
    (identity("src", [key("dst", 0).public()]), identity("dst", [key("src", 0).public()]))
}

pub(crate) async fn listen(identity: &Identity, options: ListenOptions) -> Listener {
    Listener::bind(ANY, identity, options).await.unwrap()
}

pub(crate) async fn dial_dst(listener: &Listener, identity: &Identity) -> Result<Connection, LinkError> {
    within(dial(listener.local_addr(), identity, &name("dst"), &DialOptions::default())).await
}

/// Both ends of one TLS connection between `src` and `dst`.
pub(crate) async fn connected() -> (Connection, Connection, Listener) {
    let (src, dst) = both();
    let mut listener = listen(&dst, ListenOptions::default()).await;
    let here = dial_dst(&listener, &src).await.unwrap();
    let there = within(listener.accept()).await.unwrap();
    (here, there, listener)
}

/// Fails instead of hanging.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("must not hang")
}

/// Waits until the listener has refused `count` connections with `code`.
pub(crate) async fn refused(listener: &Listener, code: &str, count: u64) {
    let refusals = listener.refusals();
    within(async {
        while refusals.counts()[code] < count {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(refusals.counts()[code], count, "{code}: {:?}", refusals.counts());
}
