//! Writing a stream's pages into the RAM behind the guest: GB/s of stream, of which every second stretch of pages is zero. The memory is a
//! memfd that was touched before, as with `prealloc=on`; a plain copy of the same pages stands beside it.

// A bench whose subject fails has to stop.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dwcp_benches::guest_stream;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_vmm::mapped::{Ram, Splitter};
use dwcp_vmm::stream::Cutter;
use rustix::fs::{MemfdFlags, memfd_create};

/// Of the stream's one block.
const BLOCK: &[u8] = b"pc.ram";
const PAGES: usize = 8192;
/// Bytes that are applied at a time, as in a chunk of datacenter mode.
const CHUNK: usize = 512 << 10;

fn sink(c: &mut Criterion) {
    let stream = guest_stream(PAGES);
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    for page in 0..PAGES as u64 {
        file.write_all_at(&[1; PAGE_SIZE], page * PAGE_SIZE as u64).unwrap();
    }
    // As chunks hold it: never cut within a page.
    let mut cutter = Cutter::new(CHUNK);
    let (mut rest, mut chunks) = (&stream[..], Vec::new());
    while !rest.is_empty() {
        let taken = cutter.feed(rest);
        rest = &rest[taken..];
        chunks.extend(std::iter::from_fn(|| cutter.pop()));
    }
    cutter.finish();
    chunks.extend(std::iter::from_fn(|| cutter.pop()));
    let mut group = c.benchmark_group("sink");
    group.throughput(Throughput::Bytes(stream.len() as u64));
    group.bench_function("mapped RAM", |b| {
        b.iter(|| {
            let mut splitter = Splitter::new(Ram::in_files([(BLOCK, file.try_clone().unwrap())]).unwrap());
            for chunk in &chunks {
                splitter.apply(&chunk.bytes).unwrap();
                black_box(splitter.take());
            }
            // Otherwise it was not taken apart, and nothing was measured.
            assert!(splitter.opaque_reason().is_none(), "{:?}", splitter.opaque_reason());
        });
    });
    let mut memory = vec![1; stream.len()];
    group.bench_function("plain copy", |b| {
        b.iter(|| black_box(&mut memory).copy_from_slice(black_box(&stream)))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = sink
}
criterion_main!(benches);
