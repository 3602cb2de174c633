//! Hashing, signing and verifying chunks: GB/s of payload, one thread.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::Random;
use dwcp_proto::{
    Codec, EncodedChunk, Lane, NodeKey, NodeName, PageVersion, SealedChunk, Sealer, SessionId, StreamOffset,
    Verifier,
};

const SESSION: SessionId = SessionId([7; 32]);
/// Payloads of this many bytes: a chunk that compressed well, and a raw one of each usual size.
const SIZES: [usize; 3] = [64 << 10, 256 << 10, 1 << 20];

fn payload(size: usize) -> Vec<u8> {
    let mut random = Random::new(3);
    (0..size / 4096).flat_map(|_| random.page()).collect()
}

fn chunk(payload: &bytes::Bytes) -> EncodedChunk {
    let len = payload.len() as u32;
    EncodedChunk::new(Codec::Raw, Lane(0), PageVersion(0), StreamOffset(0), len, len, payload.clone())
}

fn key() -> NodeKey {
    NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[1; 32])
}

fn seal(c: &mut Criterion) {
    let mut group = c.benchmark_group("hash and seal");
    for size in SIZES {
        let payload = payload(size).into();
        let (key, mut sealer) = (key(), Sealer::new(SESSION));
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{} KiB", size >> 10)), |b| {
            b.iter(|| black_box(sealer.seal(&key, chunk(&payload))));
        });
    }
    group.finish();
}

fn verify(c: &mut Criterion) {
    let mut group = c.benchmark_group("verify");
    for size in SIZES {
        let payload = payload(size).into();
        let sealed: SealedChunk = Sealer::new(SESSION).seal(&key(), chunk(&payload));
        let verifier = Verifier::new(SESSION, key().public());
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{} KiB", size >> 10)), |b| {
            b.iter_batched(
                || sealed.payload(),
                |payload| {
                    let header = verifier.header(sealed.signed_header()).unwrap();
                    black_box(header.payload(payload).unwrap())
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = seal, verify
}
criterion_main!(benches);
