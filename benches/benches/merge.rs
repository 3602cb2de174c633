//! Putting QEMU's multifd channels together: GB/s of the stream that comes out, the copy from memory that stands for reading included. The
//! same stream without channels: `parse`.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::guest_stream;
use dwcp_vmm::multifd::{MIN_ROOM, Merged, Merger, Source};
use dwcp_vmm::sim::{Scatter, Style};
use dwcp_vmm::stream::Cutter;

const PAGES: usize = 8192;
/// Bytes that a read finds in a unix socket, about.
const READ: usize = 64 << 10;

fn merge(c: &mut Criterion) {
    let stream = guest_stream(PAGES);
    let mut group = c.benchmark_group("merge");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    for channels in [2, 4, 16] {
        let scattered = Scatter::new(channels, Style::Eos).feed(&stream);
        group.bench_function(format!("{channels} channels"), |b| {
            b.iter_batched_ref(
                || (Merger::new(channels), Cutter::merged(512 << 10)),
                |(merger, cutter)| {
                    let mut wires: Vec<&[u8]> = std::iter::once(&scattered.main)
                        .chain(&scattered.channels)
                        .map(Vec::as_slice)
                        .collect();
                    while step(merger, cutter, &mut wires) {}
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

/// One look at all channels; false where nothing is left to read.
fn step(merger: &mut Merger, cutter: &mut Cutter, wires: &mut [&[u8]]) -> bool {
    loop {
        if cutter.buffer().len() < MIN_ROOM {
            cutter.flush();
        }
        let merged = merger.merge(cutter.buffer()).expect("channels of our own");
        cutter.filled(merged.len);
        if merged.synchronised {
            cutter.synchronised();
        }
        while let Some(segment) = cutter.pop() {
            black_box(segment);
        }
        if merged == Merged::default() {
            break;
        }
    }
    let mut some = false;
    for (n, wire) in wires.iter_mut().enumerate().filter(|(_, wire)| !wire.is_empty()) {
        let source = if n == 0 { Source::Main } else { Source::Channel(n - 1) };
        if !merger.wants(source) {
            continue;
        }
        let filled = merger.fill(source, cutter.buffer(), |places| {
            let mut read = 0;
            for place in places {
                let len = place.len().min(wire.len()).min(READ - read);
                place[..len].copy_from_slice(&wire[..len]);
                *wire = &wire[len..];
                read += len;
            }
            Ok(read)
        });
        cutter.filled(filled.expect("memory does not fail").len);
        some = true;
    }
    some
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = merge
}
criterion_main!(benches);
