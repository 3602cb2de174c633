//! What a listener does with those who mean no good, and that the others do not notice.

use crate::common::*;
use dwcp_link::{Blame, DialOptions, Kind, ListenOptions, Listener, dial_plain};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn a_port_in_use_is_named() {
    let (_, dst) = both();
    let first = listen(&dst, ListenOptions::default()).await;
    let error = Listener::bind(first.local_addr(), &dst, ListenOptions::default()).await.unwrap_err();
    assert_eq!((error.code(), error.blame()), ("address_in_use", Blame::Us));
    assert!(error.to_string().starts_with(&first.local_addr().to_string()), "{error}");
    let foreign =
        Listener::bind("192.0.2.1:0".parse().unwrap(), &dst, ListenOptions::default()).await.unwrap_err();
    assert_eq!(foreign.code(), "bind_failed");
}

#[tokio::test]
async fn a_dropped_listener_frees_its_address() {
    let (_, dst) = both();
    let first = listen(&dst, ListenOptions::default()).await;
    let addr = first.local_addr();
    drop(first);
    within(async {
        while Listener::bind(addr, &dst, ListenOptions::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn garbage_is_refused_at_once() {
    let (_, dst) = both();
    let listener = listen(&dst, ListenOptions { plain: true, ..ListenOptions::default() }).await;
    for (count, garbage) in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"DWCq", b"\x00"].into_iter().enumerate() {
        let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        // Closed with or without a reset; never answered.
        let mut answer = Vec::new();
        let _ = within(stream.read_to_end(&mut answer)).await;
        assert!(answer.is_empty());
        refused(&listener, "not_dwcp", count as u64 + 1).await;
    }
    let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
    stream.write_all(b"\x16\x03\x01\x00\x05hello").await.unwrap();
    let _ = within(stream.read_to_end(&mut Vec::new())).await;
    drop(stream);
    refused(&listener, "tls_failed", 1).await;
}

#[tokio::test]
async fn plain_is_let_in_only_where_allowed_and_keeps_its_first_bytes() {
    let (_, dst) = both();
    let mut open = listen(&dst, ListenOptions { plain: true, ..ListenOptions::default() }).await;
    let mut here = within(dial_plain(open.local_addr(), &DialOptions::default())).await.unwrap();
    here.write_all(b"DWCP and more").await.unwrap();
    let mut there = within(open.accept()).await.unwrap();
    assert_eq!((there.kind(), there.peer(), there.exporter()), (Kind::Plain, None, None));
    assert!(here.gauge().sample().is_some() && there.peer_addr().is_some());
    here.shutdown().await.unwrap();
    let mut got = String::new();
    within(there.read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "DWCP and more");
    there.write_all(b"answer").await.unwrap();
    drop(there);
    got.clear();
    within(here.read_to_string(&mut got)).await.unwrap();
    assert_eq!(got, "answer");

    let closed = listen(&dst, ListenOptions::default()).await;
    let mut here = within(dial_plain(closed.local_addr(), &DialOptions::default())).await.unwrap();
    here.write_all(b"DWCP").await.unwrap();
    assert!(matches!(within(here.read(&mut [0])).await, Ok(0) | Err(_)));
    refused(&closed, "plain_refused", 1).await;
}

#[tokio::test]
async fn the_silent_and_the_slow_are_dropped_at_the_deadline() {
    let (_, dst) = both();
    let listener = listen(&dst, ListenOptions { handshake_timeout: SHORT, ..ListenOptions::default() }).await;
    // Nothing at all; half a preamble; half a TLS record header.
    for (count, start) in [&b""[..], b"DW", b"\x16\x03"].into_iter().enumerate() {
        let mut stream = TcpStream::connect(listener.local_addr()).await.unwrap();
        stream.write_all(start).await.unwrap();
        assert!(matches!(within(stream.read(&mut [0])).await, Ok(0) | Err(_)));
        refused(&listener, "handshake_timeout", count as u64 + 1).await;
    }
}

#[tokio::test]
async fn a_flood_meets_the_cap_and_running_connections_go_on() {
    let (src, dst) = both();
    let options = ListenOptions { max_pending_per_source: 4, ..ListenOptions::default() };
    let mut listener = listen(&dst, options).await;
    let mut here = dial_dst(&listener, &src).await.unwrap();
    let mut there = within(listener.accept()).await.unwrap();

    let mut flood = Vec::new();
    for _ in 0..20 {
        flood.push(TcpStream::connect(listener.local_addr()).await.unwrap());
    }
    refused(&listener, "flooded", 16).await;
    here.write_all(b"still here").await.unwrap();
    here.flush().await.unwrap();
    let mut got = [0; 10];
    within(there.read_exact(&mut got)).await.unwrap();
    assert_eq!(&got, b"still here");
    let shed = dial_dst(&listener, &src).await.unwrap_err();
    assert!(shed.is_transient(), "{shed}");
    // Once the flood is gone, there is room again.
    drop(flood);
    refused(&listener, "handshake_closed", 4).await;
    dial_dst(&listener, &src).await.unwrap();
    assert!(within(listener.accept()).await.is_some());
}

#[tokio::test]
async fn the_cap_over_all_sources_holds() {
    let (_, dst) = both();
    let listener = listen(&dst, ListenOptions { max_pending: 2, ..ListenOptions::default() }).await;
    let mut flood = Vec::new();
    for _ in 0..5 {
        flood.push(TcpStream::connect(listener.local_addr()).await.unwrap());
    }
    refused(&listener, "flooded", 3).await;
}

#[tokio::test]
async fn what_nobody_takes_up_is_dropped_at_the_deadline() {
    let (src, dst) = both();
    let options = ListenOptions { max_ready: 1, handshake_timeout: SHORT * 2, ..ListenOptions::default() };
    let listener = listen(&dst, options).await;
    let _first = dial_dst(&listener, &src).await.unwrap();
    let mut second = dial_dst(&listener, &src).await.unwrap();
    refused(&listener, "busy", 1).await;
    assert!(within(second.read_u8()).await.is_err());
}
