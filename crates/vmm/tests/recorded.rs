//! Streams recorded from both versions of QEMU by `tests/real.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_vmm::stream::{Cutter, OpaqueReason, Piece, content, pieces, serialise};

const RECORDED: [(&str, &[u8]); 2] = [
    ("pc-i440fx-7.2", include_bytes!("recorded/qemu-7.2.stream.zst")),
    ("pc-i440fx-10.0", include_bytes!("recorded/qemu-10.0.stream.zst")),
];

fn unpack(packed: &[u8]) -> Vec<u8> {
    let mut stream = vec![0; 32 << 20];
    let len = zstd_safe::decompress(&mut stream[..], packed).unwrap();
    stream.truncate(len);
    stream
}

#[test]
fn recorded_streams_are_understood_through_all_of_ram_and_serialise_back() {
    for (machine, packed) in RECORDED {
        let stream = unpack(packed);
        for (size, target) in [(stream.len(), 1 << 20), (32 << 10, 256 << 10), (4097, 64 << 10), (1, 1 << 20)]
        {
            let mut cutter = Cutter::new(target);
            let mut rebuilt = Vec::new();
            let mut pages = 0;
            for chunk in stream.chunks(size).chain([&[][..]]) {
                let mut rest = chunk;
                while !rest.is_empty() {
                    rest = &rest[cutter.feed(rest)..];
                }
                if chunk.is_empty() {
                    cutter.finish();
                }
                while let Some(segment) = cutter.pop() {
                    let content = content(&segment).unwrap();
                    rebuilt.extend(serialise(&segment.records, &segment.names, &content).unwrap());
                    pages += pieces(&segment).filter(|p| !matches!(p, Ok(Piece::Opaque(_)))).count();
                }
            }
            assert!(rebuilt == stream, "{machine}");
            assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState), "{machine}");
            assert_eq!(cutter.machine(), Some(machine.as_bytes()));
            let tail = stream.len() as u64 - cutter.opaque_from().unwrap().0;
            assert!(tail < 128 << 10, "{machine}: {tail} bytes after RAM");
            assert!(
                pages > cutter.layout().ram_bytes() as usize / PAGE_SIZE,
                "{machine}: more than one round"
            );
            assert!(cutter.version().0 >= 2, "{machine}");
        }
    }
}
