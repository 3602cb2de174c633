//! Cutting QEMU's stream into segments: GB/s of stream, the copy into the cutter's buffer included.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::guest_pages;
use dwcp_vmm::sim::StreamWriter;
use dwcp_vmm::stream::Cutter;

const PAGES: usize = 8192;

/// A stream of one RAM section; every second stretch of 32 pages is zero.
fn stream() -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    writer.ram_start([(&b"pc.ram"[..], (PAGES * 4096) as u64)].into_iter());
    writer.ram_part(false);
    for (index, page) in (0..).zip(&guest_pages(PAGES)) {
        if index / 32 % 2 == 0 {
            writer.page(b"pc.ram", index, page)
        } else {
            writer.page(b"pc.ram", index, &[0; 4096])
        }
    }
    writer.section_end();
    writer.take()
}

fn parse(c: &mut Criterion) {
    let stream = stream();
    let mut group = c.benchmark_group("parse");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    for target in [256 << 10, 1 << 20] {
        group.bench_function(format!("cutter, segments of {} KiB", target >> 10), |b| {
            b.iter_batched_ref(
                || Cutter::new(target),
                |cutter| {
                    let mut rest = &stream[..];
                    while !rest.is_empty() {
                        let taken = cutter.feed(rest);
                        rest = &rest[taken..];
                        while let Some(segment) = cutter.pop() {
                            black_box(segment);
                        }
                    }
                    cutter.finish();
                    while let Some(segment) = cutter.pop() {
                        black_box(segment);
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = parse
}
criterion_main!(benches);
