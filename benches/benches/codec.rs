//! Encoding and decoding chunks, beside the plain libraries on the same pages: GB/s of guest memory, one
//! thread.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::{Page, Random, guest_pages, segments};
use dwcp_hde::{Choice, Decoder, Encoded, Encoder};
use dwcp_proto::Segment;
use dwcp_proto::limits::PAGE_SIZE;
use lz4_flex::block::{self, CompressTable};
use zstd_safe::{CCtx, DCtx};

const PAGES: usize = 2048;
/// Pages of one chunk: 512 KiB.
const PER_CHUNK: usize = 128;

const CHOICES: [(&str, Choice); 6] = [
    ("raw", Choice::Raw),
    ("lz4", Choice::Lz4),
    ("zstd -1", Choice::Zstd(-1)),
    ("zstd 1", Choice::Zstd(1)),
    ("zstd 3", Choice::Zstd(3)),
    ("sampled 1", Choice::Sampled(1)),
];

fn encode(c: &mut Criterion) {
    let pages = guest_pages(PAGES);
    encode_pages(group(c, "encode", &pages), &pages, &CHOICES);
    let mut random = Random::new(2);
    let noise: Vec<_> = (0..PAGES).map(|_| random.page()).collect();
    encode_pages(group(c, "encode incompressible", &noise), &noise, &CHOICES[1..]);
}

fn encode_pages(mut group: BenchmarkGroup<'_, WallTime>, pages: &[Page], choices: &[(&str, Choice)]) {
    let segments = segments(pages, PER_CHUNK);
    let (mut encoder, mut payload) = (Encoder::new(), Vec::new());
    for &(name, choice) in choices {
        group.bench_function(name, |b| {
            b.iter(|| {
                for segment in &segments {
                    black_box(encoder.encode(segment, choice, &mut payload).unwrap());
                }
            });
        });
    }
    plain_compression(&mut group, pages);
    group.finish();
}

/// The same pages through the libraries alone, without a table or a check of the stream.
fn plain_compression(group: &mut BenchmarkGroup<'_, WallTime>, pages: &[Page]) {
    let chunk_len = PER_CHUNK * PAGE_SIZE;
    let bound = zstd_safe::compress_bound(chunk_len).max(block::get_maximum_output_size(chunk_len));
    let mut out = vec![0; bound];
    let mut table = CompressTable::large();
    group.bench_function("plain lz4_flex", |b| {
        b.iter(|| {
            for chunk in pages.chunks(PER_CHUNK) {
                black_box(
                    block::compress_into_with_table(chunk.as_flattened(), &mut out, &mut table).unwrap(),
                );
            }
        });
    });
    let mut context = CCtx::create();
    group.bench_function("plain zstd 1", |b| {
        b.iter(|| {
            for chunk in pages.chunks(PER_CHUNK) {
                black_box(context.compress(&mut out[..], chunk.as_flattened(), 1).unwrap());
            }
        });
    });
}

fn decode(c: &mut Criterion) {
    let pages = guest_pages(PAGES);
    let segments = segments(&pages, PER_CHUNK);
    let mut group = group(c, "decode", &pages);
    for (name, choice) in &CHOICES[..4] {
        let encoded: Vec<_> = segments.iter().map(|segment| encode_one(segment, *choice)).collect();
        let (mut decoder, mut out) = (Decoder::new(), Vec::new());
        group.bench_function(*name, |b| {
            b.iter(|| {
                for (segment, (encoded, payload)) in segments.iter().zip(&encoded) {
                    out.clear();
                    let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
                    decoder
                        .decode_unverified(encoded.codec, payload, raw_len, stream_len, black_box(&mut out))
                        .unwrap();
                }
            });
        });
    }
    let frames: Vec<_> = pages.chunks(PER_CHUNK).map(|chunk| plain_zstd(chunk.as_flattened())).collect();
    let mut raw = vec![0; PER_CHUNK * PAGE_SIZE];
    let mut context = DCtx::create();
    group.bench_function("plain zstd 1", |b| {
        b.iter(|| {
            for frame in &frames {
                black_box(context.decompress(&mut raw[..], frame).unwrap());
            }
        });
    });
    group.finish();
}

fn encode_one(segment: &Segment, choice: Choice) -> (Encoded, Vec<u8>) {
    let mut payload = Vec::new();
    let encoded = Encoder::new().encode(segment, choice, &mut payload).unwrap();
    (encoded, payload)
}

fn plain_zstd(data: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; zstd_safe::compress_bound(data.len())];
    let len = zstd_safe::compress(&mut frame[..], data, 1).unwrap();
    frame.truncate(len);
    frame
}

fn group<'a>(c: &'a mut Criterion, name: &str, pages: &[Page]) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Bytes((pages.len() * PAGE_SIZE) as u64));
    group
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = encode, decode
}
criterion_main!(benches);
