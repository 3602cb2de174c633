//! Cutting QEMU's stream into segments: GB/s of stream, the copy into the cutter's buffer included.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::guest_stream;
use dwcp_vmm::stream::Cutter;

const PAGES: usize = 8192;

fn parse(c: &mut Criterion) {
    let stream = guest_stream(PAGES);
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
