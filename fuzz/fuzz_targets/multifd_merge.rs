//! Any bytes on a VMM's main channel and its multifd channels, in any order of reading, become an error or a stream whose segments hold it
//! byte for byte; and the merger never asks for what it has no place for.
#![no_main]

use dwcp_vmm::multifd::{MIN_ROOM, Merged, Merger, Source};
use dwcp_vmm::stream::{Cutter, content, serialise};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [count, step, target, frames @ ..] = input else { return };
    let mut wires = vec![Vec::new(); usize::from(*count % 16) + 2];
    // Each frame: which wire, how many bytes, the bytes.
    let mut rest = frames;
    while let [wire, high, low, after @ ..] = rest {
        let len = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (bytes, after) = after.split_at(len);
        let n = usize::from(*wire) % wires.len();
        wires[n].extend_from_slice(bytes);
        rest = after;
    }
    let mut wires: Vec<&[u8]> = wires.iter().map(Vec::as_slice).collect();
    let most = usize::from(*step) * 64 + 1;
    let mut merger = Merger::new(wires.len() - 1);
    let mut cutter = Cutter::merged(usize::from(*target) << 12);
    loop {
        if cutter.buffer().len() < MIN_ROOM {
            cutter.flush();
        }
        let Ok(merged) = merger.merge(cutter.buffer()) else { return };
        cutter.filled(merged.len);
        if merged.synchronised {
            cutter.synchronised();
        }
        check(&mut cutter);
        if merged != Merged::default() {
            continue;
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
                    let len = place.len().min(wire.len()).min(most - read);
                    place[..len].copy_from_slice(&wire[..len]);
                    *wire = &wire[len..];
                    read += len;
                }
                assert!(read > 0, "a place for what is wanted");
                Ok(read)
            });
            cutter.filled(filled.expect("no error of its own").len);
            some = true;
        }
        if !some {
            cutter.finish();
            return check(&mut cutter);
        }
    }
});

fn check(cutter: &mut Cutter) {
    while let Some(segment) = cutter.pop() {
        let content = content(&segment).expect("an index that fits its bytes");
        let again = serialise(&segment.records, &segment.names, &content).expect("records within the limits");
        assert!(again == segment.bytes);
    }
}
