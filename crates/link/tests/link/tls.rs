//! Who is let in over TLS, and what both ends learn of it.

use std::sync::Arc;

use crate::common::*;
use dwcp_link::{
    Blame, Connection, DialOptions, Identity, Kind, LinkError, ListenOptions, Peers, Stranger, can_use, dial,
    dial_plain,
};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[tokio::test]
async fn both_ends_know_each_other_and_share_a_secret() {
    let (here, there, _listener) = connected().await;
    assert_eq!(here.peer(), Some(&key("dst", 0).public()));
    assert_eq!(there.peer(), Some(&key("src", 0).public()));
    assert_eq!(here.kind(), Kind::Tls { suite: "TLS13_AES_128_GCM_SHA256" });
    assert_eq!(here.kind(), there.kind());
    assert!(here.exporter().is_some());
    assert_eq!(here.exporter(), there.exporter());
    let (other, ..) = connected().await;
    assert_ne!(here.exporter(), other.exporter());
}

#[tokio::test]
async fn bytes_cross_both_ways_at_once_and_the_end_is_seen() {
    const BYTES: usize = 8 << 20;
    async fn send_and_receive(connection: Connection, fill: u8) -> Vec<u8> {
        let (mut reader, mut writer) = connection.into_split();
        let send = tokio::spawn(async move {
            writer.write_all(&vec![fill; BYTES]).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        reader.read_to_end(&mut got).await.unwrap();
        send.await.unwrap();
        got
    }
    let (here, there, _listener) = connected().await;
    let (at_here, at_there) =
        within(async { tokio::join!(send_and_receive(here, 1), send_and_receive(there, 2)) }).await;
    assert!(at_here == vec![2; BYTES] && at_there == vec![1; BYTES]);
}

#[tokio::test]
async fn a_key_that_the_listener_does_not_know_is_refused_and_told_so() {
    let src = identity("src", [key("dst", 0).public()]);
    let dst = identity("dst", [key("other", 0).public()]);
    let listener = listen(&dst, ListenOptions::default()).await;
    let mut connection =
        dial_dst(&listener, &src).await.expect("a TLS 1.3 client is done before it is judged");
    // As a real dialler does: speak first. The alert must not get lost behind it.
    let _ = connection.write_all(&[0; 4096]).await;
    let error = LinkError::from(within(connection.read_u8()).await.unwrap_err());
    assert!(
        matches!(&error, LinkError::KeyRefused { peer, us } if *peer == name("dst") && *us == name("src")),
        "{error}"
    );
    assert_eq!((error.code(), error.blame()), ("key_refused", Blame::Peer));
    drop(connection);
    refused(&listener, "unknown_peer", 1).await;
}

#[tokio::test]
async fn a_listener_with_another_key_is_not_spoken_to() {
    // dst's operator made it a new key; src still has the old one.
    let src = identity("src", [key("dst", 7).public()]);
    let dst = identity("dst", [key("src", 0).public()]);
    let listener = listen(&dst, ListenOptions::default()).await;
    let error = dial_dst(&listener, &src).await.unwrap_err();
    let presented = Stranger::Key(*key("dst", 0).public().as_bytes());
    assert!(
        matches!(&error, LinkError::WrongPeer { expected, actual, .. }
        if *expected == name("dst") && *actual == presented),
        "{error}"
    );
}

#[tokio::test]
async fn another_trusted_node_is_not_the_expected_one() {
    let src = identity("src", [key("dst", 0).public(), key("third", 0).public()]);
    let third = identity("third", [key("src", 0).public()]);
    let listener = listen(&third, ListenOptions::default()).await;
    let error = dial_dst(&listener, &src).await.unwrap_err();
    assert!(
        matches!(&error, LinkError::WrongPeer { actual: Stranger::Node(node), .. } if *node == name("third")),
        "{error}"
    );
}

#[tokio::test]
async fn a_node_without_a_key_is_not_dialled() {
    let error = dial(ANY, &identity("src", []), &name("dst"), &DialOptions::default()).await.unwrap_err();
    assert_eq!((error.code(), error.blame()), ("unknown_node", Blame::Us));
}

#[tokio::test]
async fn a_reload_lets_a_new_key_in_and_an_old_one_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let put = |file: &str, generation| {
        std::fs::write(dir.path().join(file), key("src", generation).public().to_text())
    };
    put("src.pub", 1).unwrap();
    let peers = Arc::new(Peers::load(dir.path()).unwrap());
    let dst = Identity::new(key("dst", 0), peers.clone()).unwrap();
    let mut listener = listen(&dst, ListenOptions::default()).await;
    let src = |generation| {
        Identity::new(key("src", generation), Arc::new(Peers::of([key("dst", 0).public()]))).unwrap()
    };
    let (old, new) = (src(1), src(2));

    let _standing = dial_dst(&listener, &old).await.unwrap();
    assert!(within(listener.accept()).await.is_some());
    put("src.next.pub", 2).unwrap();
    assert_eq!(peers.reload().unwrap().added.len(), 1);
    for identity in [&old, &new] {
        let _connection = dial_dst(&listener, identity).await.unwrap();
        let there = within(listener.accept()).await.unwrap();
        assert_eq!(there.peer().unwrap().node(), &name("src"));
    }
    std::fs::rename(dir.path().join("src.next.pub"), dir.path().join("src.pub")).unwrap();
    assert_eq!(peers.reload().unwrap().removed.len(), 1);
    let mut refused = dial_dst(&listener, &old).await.unwrap();
    let error = LinkError::from(within(refused.read_u8()).await.unwrap_err());
    assert_eq!(error.code(), "key_refused");
    let _connection = dial_dst(&listener, &new).await.unwrap();
    assert!(within(listener.accept()).await.is_some());
}

#[tokio::test]
async fn tls_1_2_is_refused_and_told_so() {
    let (_, dst) = both();
    let listener = listen(&dst, ListenOptions::default()).await;
    let mut client = TcpStream::connect(listener.local_addr()).await.unwrap();
    let mut hello = client_hello_of_tls_1_2();
    // Further bytes stay unread when the listener has seen enough: closing must not reset the alert away.
    hello.resize(32 << 10, 0);
    client.write_all(&hello).await.unwrap();
    let mut answer = Vec::new();
    within(client.read_to_end(&mut answer)).await.unwrap();
    // A fatal alert: record type, version, length, level 2, protocol_version.
    assert_eq!(answer, [0x15, 3, 3, 0, 2, 2, 70]);
    drop(client);
    refused(&listener, "tls_version", 1).await;
}

/// One suite, one curve, Ed25519: all that a TLS 1.2 server would need, and no `supported_versions`.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 0x1d, // supported_groups: x25519
        0, 11, 0, 2, 1, 0, // ec_point_formats: uncompressed
        0, 13, 0, 4, 0, 2, 8, 7, // signature_algorithms: ed25519
        0, 23, 0, 0, // extended_master_secret
    ];
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut message = vec![1, 0];
    message.extend((body.len() as u16).to_be_bytes());
    message.extend(body);
    let mut record = vec![0x16, 3, 1];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);
    record
}

#[tokio::test]
async fn who_answers_without_tls_is_no_dwcp() {
    let (src, _) = both();
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n").await.unwrap();
        // Held open until the dialler has seen it.
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let error = within(dial(addr, &src, &name("dst"), &DialOptions::default())).await.unwrap_err();
    assert_eq!(error.code(), "not_dwcp", "{error}");
}

#[tokio::test]
async fn who_does_not_answer_is_given_up_in_time() {
    let (src, _) = both();
    // Accepts into its backlog and says nothing.
    let listener = TcpListener::bind(ANY).await.unwrap();
    let options = DialOptions { handshake_timeout: SHORT, ..DialOptions::default() };
    let error = within(dial(listener.local_addr().unwrap(), &src, &name("dst"), &options)).await.unwrap_err();
    assert_eq!((error.code(), error.blame()), ("handshake_timeout", Blame::Link));
    assert!(error.is_transient());
}

#[tokio::test]
async fn nobody_there_is_said_so() {
    let (src, _) = both();
    let addr = TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    for error in [
        dial(addr, &src, &name("dst"), &DialOptions::default()).await.unwrap_err(),
        dial_plain(addr, &DialOptions::default()).await.unwrap_err(),
    ] {
        assert_eq!(error.code(), "connection_refused");
        assert!(error.to_string().starts_with(&addr.to_string()), "{error}");
    }
}

#[tokio::test]
async fn an_end_without_goodbye_is_an_error() {
    let (here, mut there, _listener) = connected().await;
    here.gauge().cut();
    let error = LinkError::from(within(there.read_u8()).await.unwrap_err());
    assert_eq!(error.code(), "cut_off", "{error}");
}

#[tokio::test]
async fn a_reset_in_midstream_is_an_error_on_both_halves() {
    let (src, dst) = both();
    let mut listener = listen(&dst, ListenOptions::default()).await;
    let proxy = TcpListener::bind(ANY).await.unwrap();
    let addr = proxy.local_addr().unwrap();
    let to = listener.local_addr();
    // Passes 1 MiB of the dialler's bytes on, then resets both its connections.
    let proxy = tokio::spawn(async move {
        let (mut near, _) = proxy.accept().await.unwrap();
        let mut far = TcpStream::connect(to).await.unwrap();
        for stream in [&near, &far] {
            SockRef::from(stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        }
        let (near_read, mut near_write) = near.split();
        let (mut far_read, mut far_write) = far.split();
        let mut first_mib = near_read.take(1 << 20);
        tokio::select! {
            _ = tokio::io::copy(&mut first_mib, &mut far_write) => {}
            _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
        }
    });
    let here = within(dial(addr, &src, &name("dst"), &DialOptions::default())).await.unwrap();
    let there = within(listener.accept()).await.unwrap();
    let (mut reader, mut writer) = here.into_split();
    let sending = tokio::spawn(async move {
        loop {
            if let Err(error) = writer.write_all(&[7; 64 << 10]).await {
                return LinkError::from(error);
            }
        }
    });
    let (mut far_reader, _far_writer) = there.into_split();
    let read_error = LinkError::from(within(reader.read_u8()).await.unwrap_err());
    let far_error = within(tokio::io::copy(&mut far_reader, &mut tokio::io::sink())).await.unwrap_err();
    // The kernel tells a reset once: the half that comes second meets a mere end.
    assert!(matches!(read_error.code(), "connection_lost" | "cut_off"), "{read_error:?}");
    assert_eq!(LinkError::from(far_error).code(), "connection_lost");
    assert_eq!(within(sending).await.unwrap().code(), "connection_lost");
    proxy.await.unwrap();
}

#[tokio::test]
async fn a_gauge_measures_while_the_connection_is_in_use_and_not_after() {
    let (here, there, _listener) = connected().await;
    let gauge = here.gauge();
    gauge.set_notsent_lowat(Some(32 << 10)).unwrap();
    let (reader, mut writer) = here.into_split();
    // Nobody reads: the kernel's buffers fill until a write has to wait.
    let stuck = tokio::time::timeout(SHORT, async {
        loop {
            writer.write_all(&[1; 64 << 10]).await.unwrap();
        }
    });
    assert!(stuck.await.is_err());
    let sample = gauge.sample().unwrap();
    let (queued, unsent) = (sample.queued.unwrap(), sample.unsent.unwrap());
    assert!(queued > 0 && unsent <= queued, "{sample:?}");
    assert!(unsent < 512 << 10, "the low-water mark holds: {sample:?}");
    assert!(!sample.rtt.is_zero() && sample.bytes_acked > 0 && sample.congestion_window > 0, "{sample:?}");
    drop((reader, writer, there));
    assert_eq!(gauge.sample(), None);
}

#[tokio::test]
async fn a_connection_has_the_congestion_control_that_was_asked_for_or_the_systems() {
    let (src, dst) = both();
    let mut listener = listen(&dst, ListenOptions::default()).await;
    let system = dial_dst(&listener, &src).await.unwrap().gauge().congestion();
    // Every kernel has reno and allows it; none has the other.
    for (asked, expected) in [("reno", Some("reno")), ("none such", None)] {
        let mut options = DialOptions::default();
        options.tuning.congestion = Some(asked);
        let here = within(dial(listener.local_addr(), &src, &name("dst"), &options)).await.unwrap();
        drop(within(listener.accept()).await.unwrap());
        assert_eq!(here.gauge().congestion().as_deref(), expected.or(system.as_deref()));
        assert_eq!(can_use(asked).is_ok(), expected.is_some());
    }
}
