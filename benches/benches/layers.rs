//! The layers above compression: what looking for references costs the source, which has to do it in the stream's
//! order, and what resolving them costs the destination. GB/s of guest memory, one thread.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::{Page, guest_pages, segments};
use dwcp_hde::{CacheSize, Choice, Decoder, Encoder, Holding, Layers, Memory, StreamSink, Unpacked};
use dwcp_proto::Segment;
use dwcp_proto::limits::PAGE_SIZE;

const PAGES: usize = 8192;
/// Pages of one chunk: 512 KiB.
const PER_CHUNK: usize = 128;
const ROOM: usize = 64 << 20;

fn memory() -> Memory {
    Memory::new(Layers::ALL, Holding::Blocks(vec![b"pc.ram"[..].into()]), &[1; 32], ROOM)
}

/// The pages with `lines` lines changed in each, differently for each `round`.
fn rewritten(pages: &[Page], lines: usize, round: u8) -> Vec<Page> {
    let rewrite = |(page, n): (&Page, usize)| {
        let mut page = *page;
        (0..lines).for_each(|line| page[(n + line * 5) % 32 * 128 + 60] = round);
        page
    };
    pages.iter().zip(0..).map(rewrite).collect()
}

/// The sequential half of encoding.
fn read(c: &mut Criterion) {
    let pages = guest_pages(PAGES);
    let first = segments(&pages, PER_CHUNK);
    let mut group = group(c, "read", &pages);
    let mut encoder = Encoder::new();
    let mut run = |segments: &[Segment], mut memory: Option<&mut Memory>| {
        for segment in segments {
            black_box(encoder.read(segment, memory.as_deref_mut()).unwrap());
        }
    };
    group.bench_function("no memory", |b| b.iter(|| run(&first, None)));
    group.bench_function("sent first", |b| {
        b.iter_batched(memory, |mut memory| run(&first, Some(&mut memory)), BatchSize::PerIteration);
    });
    let mut known = memory();
    run(&first, Some(&mut known));
    group.bench_function("sent again unchanged", |b| b.iter(|| run(&first, Some(&mut known))));
    for lines in [2, 16] {
        let versions = [1, 2].map(|round| segments(&rewritten(&pages, lines, round), PER_CHUNK));
        let mut turn = 0;
        group.bench_function(format!("sent again, {lines} of 32 lines changed"), |b| {
            b.iter(|| {
                turn += 1;
                run(&versions[turn % 2], Some(&mut known));
            });
        });
    }
    group.finish();
}

/// Both halves and back, for pages with two changed lines.
fn deltas(c: &mut Criterion) {
    let pages = guest_pages(PAGES);
    let versions = [1, 2].map(|round| segments(&rewritten(&pages, 2, round), PER_CHUNK));
    let mut encoder = Encoder::new();
    let mut encode = |segments: &[Segment], memory: &mut Memory| -> Vec<Unpacked> {
        let one = |segment: &Segment| {
            let mut payload = Vec::new();
            let encoded = encoder.read(segment, Some(memory)).unwrap().write(Choice::Zstd(1), &mut payload);
            let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
            Decoder::new().unpack_unverified(encoded.codec, &payload, raw_len, stream_len).unwrap()
        };
        segments.iter().map(one).collect()
    };
    let mut known = memory();
    let mut sink = StreamSink::new(CacheSize::new(PAGES as u32));
    let mut replay = |unpacked: &[Unpacked]| {
        for chunk in unpacked {
            sink.out.clear();
            chunk.content().replay(black_box(&mut sink)).unwrap();
        }
    };
    let mut group = group(c, "delta", &pages);
    replay(&encode(&versions[0], &mut known));
    let there = encode(&versions[1], &mut known);
    let back = encode(&versions[0], &mut known);
    group.bench_function("replay, two rounds", |b| {
        b.iter(|| {
            replay(&there);
            replay(&back);
        });
    });
    let mut turn = 0;
    group.bench_function("encode with zstd 1 and unpack", |b| {
        b.iter(|| {
            turn += 1;
            black_box(encode(&versions[turn % 2], &mut known));
        });
    });
    group.finish();
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
    targets = read, deltas
}
criterion_main!(benches);
