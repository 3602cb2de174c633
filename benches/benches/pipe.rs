//! A stream end to end over an in-process pipe, GB/s of stream: cut, encode, hash, seal, send; receive, verify, decode,
//! write. One task on each side, so one codec worker each; the same pipe with the bytes as they are beside it.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::guest_stream;
use dwcp_hde::{Choice, Decoder, Encoder};
use dwcp_link::{Connection, pipe};
use dwcp_proto::chunk::{Kind, SIGNED_HEADER_LEN};
use dwcp_proto::frame::{HEAD_LEN, Head, Tag};
use dwcp_proto::limits::MAX_CONTROL;
use dwcp_proto::{EncodedChunk, Lane, NodeKey, NodeName, SealedChunk, Sealer, SessionId, Verifier};
use dwcp_vmm::stream::Cutter;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SESSION: SessionId = SessionId([7; 32]);
/// Bytes that the pipe holds: as a link of 1 Gbit/s and 30 ms.
const PIPE: usize = 4 << 20;
const PAGES: usize = 8192;

fn end_to_end(c: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let stream = Bytes::from(guest_stream(PAGES));
    let mut group = c.benchmark_group("end to end");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("bytes as they are", |b| {
        b.iter(|| runtime.block_on(transfer(stream.clone(), send_bytes, receive_bytes)));
    });
    for (name, target, choice) in [
        ("datacenter, 1 MiB", 1 << 20, Choice::DATACENTER),
        ("internet, 512 KiB", 512 << 10, Choice::INTERNET),
        ("lz4, 512 KiB", 512 << 10, Choice::Lz4),
    ] {
        group.bench_function(name, |b| {
            let send = move |stream, link| send_chunks(stream, link, target, choice);
            b.iter(|| runtime.block_on(transfer(stream.clone(), send, receive_chunks)));
        });
    }
    group.finish();
}

/// Runs both sides; what arrives has the length of what was sent.
async fn transfer<S, R>(
    stream: Bytes,
    send: impl FnOnce(Bytes, Connection) -> S,
    receive: impl FnOnce(Connection) -> R,
) where
    S: Future<Output = ()> + Send + 'static,
    R: Future<Output = usize> + Send + 'static,
{
    let (near, far) = pipe(PIPE);
    let len = stream.len();
    let sender = tokio::spawn(send(stream, near));
    let receiver = tokio::spawn(receive(far));
    sender.await.unwrap();
    assert_eq!(receiver.await.unwrap(), len);
}

async fn send_bytes(stream: Bytes, mut link: Connection) {
    link.write_all(&stream).await.unwrap();
    link.shutdown().await.unwrap();
}

async fn receive_bytes(mut link: Connection) -> usize {
    let mut buffer = vec![0; 1 << 20];
    let mut len = 0;
    loop {
        match link.read(&mut buffer).await.unwrap() {
            0 => return len,
            read => len += read,
        }
    }
}

async fn send_chunks(stream: Bytes, link: Connection, target: usize, choice: Choice) {
    let (key, sealer, encoder) = (key(), Sealer::new(SESSION), Encoder::new());
    let mut sender = ChunkSender { link, key, sealer, encoder, choice };
    let mut cutter = Cutter::new(target);
    let mut rest = &stream[..];
    while !rest.is_empty() {
        rest = &rest[cutter.feed(rest)..];
        sender.segments(&mut cutter).await;
    }
    cutter.finish();
    sender.segments(&mut cutter).await;
    let end = sender.sealer.seal_end(&sender.key);
    sender.send(end).await;
}

struct ChunkSender {
    link: Connection,
    key: NodeKey,
    sealer: Sealer,
    encoder: Encoder,
    choice: Choice,
}

impl ChunkSender {
    async fn segments(&mut self, cutter: &mut Cutter) {
        while let Some(segment) = cutter.pop() {
            let mut payload = Vec::new();
            let encoded = self.encoder.encode(&segment, self.choice, &mut payload).unwrap();
            let chunk = EncodedChunk::new(
                encoded.codec,
                Lane(0),
                segment.version,
                segment.offset,
                segment.bytes.len() as u32,
                encoded.raw_len,
                payload,
            );
            let sealed = self.sealer.seal(&self.key, chunk);
            self.send(sealed).await;
        }
    }

    async fn send(&mut self, chunk: SealedChunk) {
        self.link.write_all(&Head::CHUNK.to_bytes()).await.unwrap();
        self.link.write_all(chunk.signed_header()).await.unwrap();
        self.link.write_all(&chunk.payload()).await.unwrap();
    }
}

async fn receive_chunks(mut link: Connection) -> usize {
    let verifier = Verifier::new(SESSION, key().public());
    let (mut decoder, mut out) = (Decoder::new(), Vec::new());
    let mut len = 0;
    loop {
        let mut head = [0; HEAD_LEN];
        link.read_exact(&mut head).await.unwrap();
        assert_eq!(Head::parse(head, MAX_CONTROL).unwrap().tag, Tag::Chunk);
        let mut signed = [0; SIGNED_HEADER_LEN];
        link.read_exact(&mut signed).await.unwrap();
        let header = verifier.header(&signed).unwrap();
        if header.header().kind == Kind::End {
            return len;
        }
        let mut payload = vec![0; header.header().wire_len as usize];
        link.read_exact(&mut payload).await.unwrap();
        let chunk = header.payload(payload.into()).unwrap();
        out.clear();
        decoder.decode(&chunk, &mut out).unwrap();
        len += out.len();
    }
}

fn key() -> NodeKey {
    NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[1; 32])
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2));
    targets = end_to_end
}
criterion_main!(benches);
