//! QUIC connections over the loopback interface: the same promises as TLS over TCP makes.

use std::net::UdpSocket;
use std::sync::Arc;

use crate::common::*;
use dwcp_link::{
    Blame, Connection, Controller, DialOptions, Identity, Kind, LinkError, ListenOptions, Listener, Peers,
    Stranger, dial_quic,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn quic() -> ListenOptions {
    ListenOptions { quic: true, ..ListenOptions::default() }
}

async fn dial(listener: &Listener, identity: &Identity) -> Result<Connection, LinkError> {
    within(dial_quic(listener.local_addr(), identity, &name("dst"), &DialOptions::default())).await
}

/// Both ends of one connection, after one byte from `src`: until then the listener has nothing to hand over.
async fn both_ends() -> (Connection, Connection, Listener) {
    let (src, dst) = both();
    let mut listener = listen(&dst, quic()).await;
    assert!(listener.without_quic().is_none());
    let mut here = dial(&listener, &src).await.unwrap();
    here.write_u8(7).await.unwrap();
    let mut there = within(listener.accept()).await.unwrap();
    assert_eq!(within(there.read_u8()).await.unwrap(), 7);
    (here, there, listener)
}

#[tokio::test]
async fn both_ends_know_each_other_and_share_a_secret() {
    let (here, there, _listener) = both_ends().await;
    assert_eq!(here.peer(), Some(&key("dst", 0).public()));
    assert_eq!(there.peer(), Some(&key("src", 0).public()));
    assert_eq!((here.kind(), there.kind()), (Kind::Quic, Kind::Quic));
    assert!(here.exporter().is_some());
    assert_eq!(here.exporter(), there.exporter());
    let (other, ..) = both_ends().await;
    assert_ne!(here.exporter(), other.exporter());
    assert_eq!(here.gauge().congestion().as_deref(), Some(Controller::default().name()));
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_at_once_and_the_end_is_seen() {
    const BYTES: usize = 8 << 20;
    async fn send_and_receive(connection: Connection, fill: u8) -> Vec<u8> {
        let (mut reader, mut writer) = connection.into_split();
        reader.widen();
        let gauge = reader.gauge();
        let send = tokio::spawn(async move {
            writer.write_all(&vec![fill; BYTES]).await.unwrap();
            writer.shutdown().await.unwrap();
            writer
        });
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        let writer = send.await.unwrap();
        let sample = gauge.sample().unwrap();
        assert!(
            !sample.rtt.is_zero() && sample.bytes_acked > 0 && sample.congestion_window > 0,
            "{sample:?}"
        );
        assert_eq!((sample.queued, sample.unsent, sample.rtt_var), (None, None, None));
        drop((reader, writer));
        assert_eq!(gauge.sample(), None);
        got
    }
    let (here, there, _listener) = both_ends().await;
    let (at_here, at_there) =
        within(async { tokio::join!(send_and_receive(here, 1), send_and_receive(there, 2)) }).await;
    assert!(at_here == vec![2; BYTES] && at_there == vec![1; BYTES]);
}

#[tokio::test]
async fn what_was_written_before_the_end_arrives_and_the_end_without_goodbye_is_an_error() {
    let (here, there, _listener) = both_ends().await;
    let (mut reader, mut writer) = here.into_split();
    // As a refusal is said: written, and everything dropped.
    let (peer_reader, mut peer_writer) = there.into_split();
    drop(peer_reader);
    peer_writer.write_all(b"no").await.unwrap();
    drop(peer_writer);
    let mut said = [0; 2];
    within(reader.read_exact(&mut said)).await.unwrap();
    assert_eq!(&said, b"no");
    let error = LinkError::from(within(reader.read_u8()).await.unwrap_err());
    assert_eq!(error.code(), "cut_off", "{error}");
    assert_eq!(
        LinkError::from(within(writer.write_all(b"late")).await.unwrap_err()).code(),
        "connection_lost"
    );
}

#[tokio::test]
async fn a_cut_is_met_at_once_on_both_sides() {
    let (mut here, mut there, _listener) = both_ends().await;
    here.gauge().cut();
    for end in [&mut here, &mut there] {
        let error = LinkError::from(within(end.read_u8()).await.unwrap_err());
        assert_eq!(error.code(), "cut_off", "{error}");
    }
    assert!(!there.gauge().backs_off());
}

#[tokio::test]
async fn a_key_that_the_listener_does_not_know_is_refused_and_told_so() {
    let src = identity("src", [key("dst", 0).public()]);
    let dst = identity("dst", [key("other", 0).public()]);
    let listener = listen(&dst, quic()).await;
    let mut connection = dial(&listener, &src).await.expect("a TLS 1.3 client is done before it is judged");
    let _ = connection.write_all(&[0; 4096]).await;
    let error = LinkError::from(within(connection.read_u8()).await.unwrap_err());
    assert!(
        matches!(&error, LinkError::KeyRefused { peer, us } if *peer == name("dst") && *us == name("src")),
        "{error}"
    );
    assert_eq!((error.code(), error.blame()), ("key_refused", Blame::Peer));
    refused(&listener, "unknown_peer", 1).await;
}

#[tokio::test]
async fn a_listener_with_another_key_is_not_spoken_to() {
    let src = identity("src", [key("dst", 7).public(), key("third", 0).public()]);
    for (node, presented) in
        [("dst", Stranger::Key(*key("dst", 0).public().as_bytes())), ("third", Stranger::Node(name("third")))]
    {
        let listener = listen(&identity(node, [key("src", 0).public()]), quic()).await;
        let error = dial(&listener, &src).await.unwrap_err();
        assert!(
            matches!(&error, LinkError::WrongPeer { expected, actual, .. }
            if *expected == name("dst") && *actual == presented),
            "{error}"
        );
        refused(&listener, "tls_failed", 1).await;
    }
}

#[tokio::test]
async fn a_reload_lets_an_old_key_in_no_more() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("src.pub"), key("src", 0).public().to_text()).unwrap();
    let peers = Arc::new(Peers::load(dir.path()).unwrap());
    let dst = Identity::new(key("dst", 0), peers.clone()).unwrap();
    let (src, _) = both();
    let mut listener = listen(&dst, quic()).await;
    dial(&listener, &src).await.unwrap().write_u8(1).await.unwrap();
    assert!(within(listener.accept()).await.is_some());
    std::fs::remove_file(dir.path().join("src.pub")).unwrap();
    peers.reload().unwrap();
    let mut late = dial(&listener, &src).await.unwrap();
    let error = LinkError::from(within(late.read_u8()).await.unwrap_err());
    assert_eq!(error.code(), "key_refused");
}

#[tokio::test]
async fn nobody_there_is_given_up_in_time() {
    let (src, dst) = both();
    // One without QUIC, and one where something else holds the UDP port.
    let without = listen(&dst, ListenOptions::default()).await;
    let options = DialOptions { connect_timeout: SHORT, ..DialOptions::default() };
    let error = within(dial_quic(without.local_addr(), &src, &name("dst"), &options)).await.unwrap_err();
    assert_eq!((error.code(), error.blame()), ("connect_timeout", Blame::Link));
    assert!(error.is_transient() && without.without_quic().is_none());

    let taken = UdpSocket::bind(ANY).unwrap();
    match Listener::bind(taken.local_addr().unwrap(), &dst, quic()).await {
        Ok(beside) => {
            let why = beside.without_quic().expect("UDP is taken");
            assert_eq!(why.code(), "address_in_use");
            assert_eq!(dial_dst(&beside, &src).await.unwrap().kind().name(), "tls", "TCP goes on");
        }
        // Another test has TCP's port of that number.
        Err(error) => assert_eq!(error.code(), "address_in_use"),
    }
}

#[tokio::test]
async fn a_flood_of_handshakes_meets_the_caps_and_tcp_does_not_notice() {
    let (src, dst) = both();
    let options = ListenOptions { max_pending: 2, max_pending_per_source: 2, ..quic() };
    let mut listener = listen(&dst, options).await;
    // They do not speak: their handshakes are done, and their streams never come. From the third on the
    // address has to be proved first, and then there is no room.
    let mut silent = Vec::new();
    for _ in 0..2 {
        silent.push(dial(&listener, &src).await.unwrap());
    }
    let error = dial(&listener, &src).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    refused(&listener, "flooded", 1).await;
    let _here = dial_dst(&listener, &src).await.unwrap();
    assert_eq!(within(listener.accept()).await.unwrap().kind().name(), "tls");
    // Whoever speaks makes room.
    silent[0].write_u8(1).await.unwrap();
    assert_eq!(within(listener.accept()).await.unwrap().kind(), Kind::Quic);
    assert!(dial(&listener, &src).await.is_ok());
}

#[tokio::test]
async fn who_says_nothing_is_dropped_at_the_deadline() {
    let (src, dst) = both();
    let listener = listen(&dst, ListenOptions { handshake_timeout: SHORT, ..quic() }).await;
    let mut silent = dial(&listener, &src).await.unwrap();
    refused(&listener, "handshake_timeout", 1).await;
    assert!(within(silent.read_u8()).await.is_err());
}
