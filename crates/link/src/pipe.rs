//! A connection within this process, for tests and benches.

use std::sync::atomic::{AtomicU64, Ordering};

use dwcp_proto::PeerKey;

use crate::connection::Connection;

/// Both ends of a pipe that holds at most `capacity` bytes in each direction; nobody is authenticated.
///
/// The ends share an exporter that no other pipe of this process has. It is no secret.
pub fn pipe(capacity: usize) -> (Connection, Connection) {
    ends(None, None, capacity)
}

/// As [`pipe`], but each end names the other's key as its peer: the first end is `left`'s, the second `right`'s.
pub fn pipe_between(left: &PeerKey, right: &PeerKey, capacity: usize) -> (Connection, Connection) {
    ends(Some(right.clone()), Some(left.clone()), capacity)
}

fn ends(first: Option<PeerKey>, second: Option<PeerKey>, capacity: usize) -> (Connection, Connection) {
    static PIPES: AtomicU64 = AtomicU64::new(1);
    let mut exporter = *b"in-process pipe, number ........";
    exporter[24..].copy_from_slice(&PIPES.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    let (left, right) = tokio::io::duplex(capacity);
    (Connection::pipe(left, first, exporter), Connection::pipe(right, second, exporter))
}

#[cfg(test)]
mod tests {
    use dwcp_proto::{NodeKey, NodeName};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::Kind;

    #[tokio::test]
    async fn both_ends_share_an_exporter_and_bytes_cross_both_ways() {
        let (mut a, b) = pipe(16);
        assert_eq!((a.kind(), a.peer_addr(), a.gauge().sample()), (Kind::Pipe, None, None));
        assert!(a.exporter().is_some() && a.exporter() == b.exporter());
        assert_ne!(a.exporter(), pipe(16).0.exporter());
        let (mut reader, mut writer) = b.into_split();
        let echo = tokio::spawn(async move { tokio::io::copy(&mut reader, &mut writer).await });
        let sent: Vec<u8> = (0..=255).collect();
        let (mut read, mut write) = tokio::io::split(&mut a);
        let mut got = vec![0; sent.len()];
        let (wrote, read) = tokio::join!(write.write_all(&sent), read.read_exact(&mut got));
        wrote.unwrap();
        read.unwrap();
        assert_eq!(sent, got);
        drop(a);
        assert_eq!(echo.await.unwrap().unwrap(), 256);
    }

    #[test]
    fn each_end_names_the_other_as_its_peer() {
        let [left, right] = ["left", "right"]
            .map(|name| NodeKey::from_seed(NodeName::new(name).unwrap(), &[name.len() as u8; 32]).public());
        let (a, b) = pipe_between(&left, &right, 1);
        assert_eq!((a.peer(), b.peer()), (Some(&right), Some(&left)));
    }
}
