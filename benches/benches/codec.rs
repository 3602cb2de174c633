//! Encoding and decoding chunks, alone and through a lane, beside the plain libraries on the same pages: GB/s of
//! guest memory, one thread.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::{Page, Random, guest_pages, segments};
use dwcp_hde::{Choice, Decoder, Encoded, Encoder, LaneDecoder, LaneEncoder, LaneWindow, Written};
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Codec, Segment};
use lz4_flex::block::{self, CompressTable};
use zstd_safe::{CCtx, DCtx};

const PAGES: usize = 2048;
/// Pages of one chunk: 512 KiB.
const PER_CHUNK: usize = 128;
/// Bytes of a lane's window. A pass over all pages is longer by the chunks' tables, so that no chunk finds itself in the pass before.
const WINDOW: u64 = (PAGES * PAGE_SIZE) as u64;
/// Levels at which lanes and the plain zstd are measured.
const LEVELS: [i32; 2] = [1, 3];

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
    lane_compression(&mut group, &segments);
    plain_compression(&mut group, pages);
    group.finish();
}

/// Chunk after chunk through one lane, which goes on from pass to pass.
fn lane_compression(group: &mut BenchmarkGroup<'_, WallTime>, segments: &[Segment]) {
    for level in LEVELS {
        let (mut encoder, mut lane, mut payload) = (Encoder::new(), new_lane(), Vec::new());
        group.bench_function(format!("lane {level}"), |b| {
            b.iter(|| {
                for segment in segments {
                    black_box(encode_next(&mut encoder, &mut lane, segment, level, &mut payload));
                }
            });
        });
    }
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
    for level in LEVELS {
        group.bench_function(format!("plain zstd {level}"), |b| {
            b.iter(|| {
                for chunk in pages.chunks(PER_CHUNK) {
                    black_box(context.compress(&mut out[..], chunk.as_flattened(), level).unwrap());
                }
            });
        });
    }
}

fn decode(c: &mut Criterion) {
    let pages = guest_pages(PAGES);
    let segments = segments(&pages, PER_CHUNK);
    let mut group = group(c, "decode", &pages);
    for (name, choice) in &CHOICES[..5] {
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
    lane_decompression(&mut group, &segments);
    plain_decompression(&mut group, &pages);
    group.finish();
}

/// The chunks of one lane, from the first on in each pass.
fn lane_decompression(group: &mut BenchmarkGroup<'_, WallTime>, segments: &[Segment]) {
    for level in LEVELS {
        let (mut encoder, mut lane) = (Encoder::new(), new_lane());
        let next = |segment: &Segment| {
            let mut payload = Vec::new();
            let encoded = encode_next(&mut encoder, &mut lane, segment, level, &mut payload);
            assert_eq!(encoded.codec, Codec::Lane);
            (encoded, payload)
        };
        let encoded: Vec<_> = segments.iter().map(next).collect();
        let (mut decoder, mut out) = (LaneDecoder::new(window()), Vec::<u8>::new());
        group.bench_function(format!("lane {level}"), |b| {
            b.iter(|| {
                for (segment, (encoded, payload)) in segments.iter().zip(&encoded) {
                    out.clear();
                    let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
                    let content = decoder.open_unverified(payload, raw_len, stream_len).unwrap();
                    content.replay(black_box(&mut out)).unwrap();
                }
            });
        });
    }
}

/// As [`plain_compression`].
fn plain_decompression(group: &mut BenchmarkGroup<'_, WallTime>, pages: &[Page]) {
    let chunks = || pages.chunks(PER_CHUNK).map(|chunk| chunk.as_flattened());
    let mut raw = vec![0; PER_CHUNK * PAGE_SIZE];
    let packed: Vec<_> = chunks().map(block::compress).collect();
    group.bench_function("plain lz4_flex", |b| {
        b.iter(|| {
            for chunk in &packed {
                black_box(block::decompress_into(chunk, &mut raw).unwrap());
            }
        });
    });
    let mut context = DCtx::create();
    for level in LEVELS {
        let frames: Vec<_> = chunks().map(|chunk| plain_zstd(chunk, level)).collect();
        group.bench_function(format!("plain zstd {level}"), |b| {
            b.iter(|| {
                for frame in &frames {
                    black_box(context.decompress(&mut raw[..], frame).unwrap());
                }
            });
        });
    }
}

fn encode_one(segment: &Segment, choice: Choice) -> (Encoded, Vec<u8>) {
    let mut payload = Vec::new();
    let encoded = Encoder::new().encode(segment, choice, &mut payload).unwrap();
    (encoded, payload)
}

fn window() -> LaneWindow {
    LaneWindow::new(WINDOW).unwrap()
}

fn new_lane() -> Option<LaneEncoder> {
    Some(LaneEncoder::new(window()))
}

/// Encodes `segment` as the lane's next chunk.
fn encode_next(
    encoder: &mut Encoder,
    lane: &mut Option<LaneEncoder>,
    segment: &Segment,
    level: i32,
    payload: &mut Vec<u8>,
) -> Encoded {
    let written = encoder.read(segment, None).unwrap().write_or_gather(Choice::Zstd(level), payload);
    match written {
        Written::Done(encoded) => encoded,
        Written::Gathered(gathered) => gathered.write(encoder, lane, payload),
    }
}

fn plain_zstd(data: &[u8], level: i32) -> Vec<u8> {
    let mut frame = vec![0; zstd_safe::compress_bound(data.len())];
    let len = zstd_safe::compress(&mut frame[..], data, level).unwrap();
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
