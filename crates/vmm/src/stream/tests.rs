//! Properties of the cutter and the serialiser over generated streams. Recorded ones: `tests/recorded.rs`.

use dwcp_proto::limits::{MAX_CHUNK_PAGES_BYTES, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, PAGE_SIZE};
use dwcp_proto::{PageIndex, RamBlockId, Record, Segment};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::sim::StreamWriter;

const BLOCKS: [(&[u8], u64); 3] = [
    (b"pc.ram", 64 * PAGE_SIZE as u64),
    (b"/rom@etc/acpi/tables", 32 * PAGE_SIZE as u64),
    (b"pc.bios", 4096),
];

/// One item of a generated RAM section.
#[derive(Debug, Clone)]
enum Op {
    Page { block: usize, index: u64, fill: u8, named: bool },
    Split { end: bool, footer: bool },
    Flush,
    Ping,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        30 => (0..3usize, any::<prop::sample::Index>(), 0..3u8, prop::bool::weighted(0.1)).prop_map(
            |(block, index, fill, named)| {
                let pages = BLOCKS[block].1 / PAGE_SIZE as u64;
                Op::Page { block, index: index.index(pages as usize) as u64, fill, named }
            }
        ),
        3 => (any::<bool>(), any::<bool>()).prop_map(|(end, footer)| Op::Split { end, footer }),
        1 => Just(Op::Flush),
        1 => Just(Op::Ping),
    ]
}

/// A whole stream; `sorted` makes long runs of ascending pages, as QEMU does.
fn model(ops: &[Op], sorted: bool, tail: &[u8]) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-i440fx-7.2");
    writer.subsection("configuration/uuid", &[7; 16]);
    writer.command(1, &[]);
    writer.command(2, &1u32.to_be_bytes());
    writer.ram_start(BLOCKS.iter().copied());
    writer.ram_part(false);
    let sweep = |writer: &mut StreamWriter| {
        for (name, used) in BLOCKS {
            for index in 0..used / PAGE_SIZE as u64 {
                writer.page(name, index, &[(index % 5) as u8; PAGE_SIZE]);
            }
        }
    };
    if sorted {
        sweep(&mut writer);
    }
    for op in ops {
        match *op {
            Op::Page { block, index, fill, named } => {
                if named {
                    writer.forget_block();
                }
                writer.page(BLOCKS[block].0, index, &[fill; PAGE_SIZE]);
            }
            Op::Split { end, footer: true } => {
                writer.section_end();
                writer.ram_part(end);
            }
            Op::Split { end, footer: false } => {
                writer.raw(&0x10u64.to_be_bytes());
                writer.ram_part(end);
            }
            Op::Flush => writer.flush_record(),
            Op::Ping => {
                writer.section_end();
                writer.command(2, &9u32.to_be_bytes());
                writer.ram_part(false);
            }
        }
    }
    if sorted {
        sweep(&mut writer);
    }
    writer.section_end();
    writer.device("cpu", tail);
    writer.eof("{}");
    writer.take()
}

/// Cuts `stream` as it arrives in pieces of the given sizes (repeated), flushing where told.
fn cut(stream: &[u8], sizes: &[(usize, bool)], target: usize) -> (Vec<Segment>, Cutter) {
    let mut cutter = Cutter::new(target);
    let mut segments = Vec::new();
    let mut rest = stream;
    for &(size, flush) in sizes.iter().cycle() {
        let mut piece = &rest[..size.min(rest.len())];
        rest = &rest[piece.len()..];
        while !piece.is_empty() {
            piece = &piece[cutter.feed(piece)..];
        }
        if flush {
            cutter.flush();
        }
        if rest.is_empty() {
            cutter.finish();
        }
        segments.extend(std::iter::from_fn(|| cutter.pop()));
        if rest.is_empty() {
            return (segments, cutter);
        }
    }
    (segments, cutter)
}

/// The invariants of [`Segment`], and that each serialises back; returns the stream.
fn check(segments: &[Segment]) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut sent = std::collections::HashMap::new();
    for segment in segments {
        assert_eq!(segment.offset.0, stream.len() as u64);
        assert!(!segment.bytes.is_empty() && segment.bytes.len() <= MAX_SEGMENT_BYTES);
        let lens = segment.records.iter().map(|r| r.stream_len(&segment.names));
        assert_eq!(lens.sum::<usize>(), segment.bytes.len());
        let (mut count, mut full) = (0, 0);
        let mut last: [Option<PageIndex>; 3] = [None; 3];
        for piece in pieces(segment) {
            count += 1;
            if let Piece::Page { block, index, .. } | Piece::Zero { block, index, .. } = piece.unwrap() {
                full += usize::from(matches!(piece, Ok(Piece::Page { .. })));
                let last = &mut last[usize::from(block.0)];
                assert!(last.is_none_or(|last| last < index), "pages ascend within a segment");
                *last = Some(index);
                let before = sent.insert((block, index), segment.version);
                assert!(before.is_none_or(|before| before < segment.version), "sent again: version rises");
            }
        }
        assert!(count <= MAX_SEGMENT_RECORDS && full * PAGE_SIZE <= MAX_CHUNK_PAGES_BYTES);
        let rebuilt = serialise(&segment.records, &segment.names, &content(segment).unwrap()).unwrap();
        assert!(rebuilt == segment.bytes, "serialise gives the bytes back");
        stream.extend_from_slice(&segment.bytes);
    }
    stream
}

/// A page (block, index, version, a byte of it), or opaque bytes.
type Flat = Result<(RamBlockId, PageIndex, u32, u8), Vec<u8>>;

/// The records without segment edges and runs: each page, and each opaque stretch merged.
fn flatten(segments: &[Segment]) -> Vec<Flat> {
    let mut flat = Vec::new();
    for segment in segments {
        for piece in pieces(segment) {
            match piece.unwrap() {
                Piece::Opaque(bytes) => match flat.last_mut() {
                    Some(Err(merged)) => Vec::extend_from_slice(merged, bytes),
                    _ => flat.push(Err(bytes.to_vec())),
                },
                Piece::Page { block, index, bytes, .. } => {
                    flat.push(Ok((block, index, segment.version.0, bytes[9])))
                }
                Piece::Zero { block, index, .. } => flat.push(Ok((block, index, segment.version.0, 0))),
            }
        }
    }
    flat
}

fn sizes() -> impl Strategy<Value = Vec<(usize, bool)>> {
    let size = prop_oneof![1..40usize, 4000..4200usize, 1..300_000usize];
    vec((size, prop::bool::weighted(0.2)), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_chunking_gives_the_same_records(
        ops in vec(op(), 0..200), sorted: bool, sizes in sizes(), target in 0..2_000_000usize,
        tail in vec(any::<u8>(), 0..50),
    ) {
        let stream = model(&ops, sorted, &tail);
        let (whole, _) = cut(&stream, &[(stream.len(), false)], 1 << 20);
        let (cut, cutter) = cut(&stream, &sizes, target);
        prop_assert!(check(&whole) == stream);
        prop_assert!(check(&cut) == stream);
        prop_assert!(flatten(&whole) == flatten(&cut));
        prop_assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState));
        prop_assert_eq!(cutter.machine(), Some(&b"pc-i440fx-7.2"[..]));
        prop_assert_eq!(cutter.layout().blocks().len(), BLOCKS.len());
        prop_assert_eq!(cutter.offset().0, stream.len() as u64);
        let pages = ops.iter().filter(|op| matches!(op, Op::Page { .. })).count() + if sorted { 194 } else { 0 };
        prop_assert_eq!(flatten(&cut).iter().filter(|r| r.is_ok()).count(), pages);
    }

    #[test]
    fn a_damaged_stream_stays_byte_exact(
        ops in vec(op(), 0..60), sizes in sizes(), cut_at: prop::sample::Index,
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        let mut stream = model(&ops, false, b"state");
        for (at, byte) in damage {
            let at = at.index(stream.len());
            stream[at] = byte;
        }
        stream.truncate(cut_at.index(stream.len()) + 1);
        prop_assert!(check(&cut(&stream, &sizes, 1 << 16).0) == stream);
    }

    #[test]
    fn garbage_stays_byte_exact(start in 0..3usize, garbage in vec(any::<u8>(), 1..5000), sizes in sizes()) {
        let mut stream = StreamWriter::new();
        if start > 0 {
            stream.header();
        }
        if start > 1 {
            stream.ram_start(BLOCKS.iter().copied());
            stream.ram_part(false);
        }
        stream.raw(&garbage);
        let stream = stream.take();
        prop_assert!(check(&cut(&stream, &sizes, 1 << 16).0) == stream);
    }
}

/// What a stream that is right up to a point becomes: pages before it, then opaque, for this reason.
fn reason(write: impl FnOnce(&mut StreamWriter)) -> OpaqueReason {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc");
    writer.ram_start(BLOCKS.iter().copied());
    writer.ram_part(false);
    writer.page(b"pc.ram", 3, &[1; PAGE_SIZE]);
    let understood = writer.bytes().len();
    write(&mut writer);
    writer.raw(&[0; 100]);
    let stream = writer.take();
    let (segments, cutter) = cut(&stream, &[(stream.len(), false)], 1 << 20);
    assert_eq!(check(&segments), stream);
    let records = &segments[0].records;
    assert!(matches!(records[1], Record::Pages(run) if run.count == 1), "{records:?}");
    assert_eq!(records[2], Record::Opaque { len: (stream.len() - understood) as u32 });
    cutter.opaque_reason().unwrap()
}

#[test]
fn what_is_not_understood_is_opaque_to_the_end() {
    let word = |offset: u64, flags: u64| (offset | flags).to_be_bytes();
    assert_eq!(reason(|w| w.raw(&[&word(0, 0x22)[..], &[7]].concat())), OpaqueReason::Fill(7));
    assert_eq!(reason(|w| w.raw(&word(0, 0x60))), OpaqueReason::Xbzrle);
    assert_eq!(reason(|w| w.raw(&word(0, 0x120))), OpaqueReason::Compressed);
    assert_eq!(reason(|w| w.raw(&word(0, 0x80))), OpaqueReason::Hook);
    assert_eq!(reason(|w| w.raw(&word(0, 0x400))), OpaqueReason::UnknownFlags(0x400));
    assert_eq!(reason(|w| w.raw(&word(0, 0x0a))), OpaqueReason::UnknownFlags(0x0a));
    assert_eq!(reason(|w| w.raw(&word(64 * 4096, 0x28))), OpaqueReason::BeyondBlock);
    assert_eq!(reason(|w| w.page(b"pc.rom", 0, &[1; PAGE_SIZE])), OpaqueReason::UnknownBlock);
    assert_eq!(reason(|w| w.raw(&word(4096, 0x04))), OpaqueReason::BlockList);
}

#[test]
fn a_foreign_beginning_is_opaque_with_its_reason() {
    let reason = |write: &dyn Fn(&mut StreamWriter)| {
        let mut writer = StreamWriter::new();
        write(&mut writer);
        let stream = writer.take();
        let (segments, cutter) = cut(&stream, &[(3, false)], 1 << 20);
        assert_eq!(check(&segments), stream);
        cutter.opaque_reason()
    };
    assert_eq!(reason(&|w| w.raw(b"\x11\x22\x33\x44\0\0\0\x01")), Some(OpaqueReason::Multifd));
    assert_eq!(reason(&|w| w.raw(b"cloud-hypervisor")), Some(OpaqueReason::NotQemu));
    assert_eq!(reason(&|w| w.raw(b"QEVM")), Some(OpaqueReason::Truncated));
    let after_header = |write: &dyn Fn(&mut StreamWriter)| {
        reason(&|w| {
            w.header();
            w.configuration("pc");
            write(w);
        })
    };
    let capability = |name: &str| {
        let mut body = 1u32.to_be_bytes().to_vec();
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body
    };
    assert_eq!(
        after_header(&|w| w.subsection("configuration/capabilities", &capability("mapped-ram"))),
        Some(OpaqueReason::Capability)
    );
    assert_eq!(
        after_header(&|w| w.subsection("configuration/target-page-bits", &16u32.to_be_bytes())),
        Some(OpaqueReason::PageSize)
    );
    assert_eq!(after_header(&|w| w.command(4, &[])), Some(OpaqueReason::UnknownCommand(4)));
    assert_eq!(after_header(&|w| w.device("cpu", b"x")), Some(OpaqueReason::DeviceState));
    assert_eq!(after_header(&|w| w.command(11, &[])), None);
}

#[test]
fn a_block_list_with_addresses_and_page_sizes_is_understood() {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc");
    let mut body = 1u32.to_be_bytes().to_vec();
    body.extend_from_slice(b"\x0fx-ignore-shared");
    writer.subsection("configuration/capabilities", &body);
    writer.command(3, &[0; 16]);
    writer.raw(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    writer.raw(&(0x40_3000u64 | 0x04).to_be_bytes());
    for (name, used, address, page_size) in [
        (&b"\x01a"[..], 0x20_0000u64, 0u64, Some(0x20_0000u64)),
        (b"\x01b", 0x3000, 5, None),
        (b"\x01c", 0x20_0000, 9, Some(0x20_0000)),
    ] {
        writer.raw(name);
        writer.raw(&used.to_be_bytes());
        writer.raw(&address.to_be_bytes());
        if let Some(page_size) = page_size {
            writer.raw(&page_size.to_be_bytes());
        }
    }
    writer.section_end();
    writer.ram_part(false);
    writer.page(b"b", 2, &[1; PAGE_SIZE]);
    writer.section_end();
    let stream = writer.take();
    for size in [1, 7, stream.len()] {
        let (segments, cutter) = cut(&stream, &[(size, false)], 1 << 20);
        assert_eq!(check(&segments), stream);
        assert_eq!(cutter.opaque_reason(), None);
        let sizes: Vec<_> = cutter.layout().blocks().iter().map(|b| b.page_size).collect();
        assert_eq!(sizes, [Some(0x20_0000), None, Some(0x20_0000)]);
        assert_eq!(cutter.layout().ram_bytes(), 0x40_3000);
        assert_eq!(flatten(&segments).iter().filter(|r| r.is_ok()).count(), 1);
    }
}

#[test]
fn segments_are_full_and_their_bytes_are_the_buffer_that_was_read_into() {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.ram_start([(&b"ram"[..], 4096 * PAGE_SIZE as u64)].into_iter());
    writer.ram_part(false);
    for index in 0..1024 {
        writer.page(b"ram", index, &[1; PAGE_SIZE]);
    }
    let stream = writer.take();
    let mut cutter = Cutter::new(1 << 20);
    let first = cutter.buffer().as_ptr();
    let mut rest = &stream[..];
    while !rest.is_empty() {
        rest = &rest[cutter.feed(rest)..];
    }
    cutter.finish();
    let segments: Vec<_> = std::iter::from_fn(|| cutter.pop()).collect();
    assert_eq!(check(&segments), stream);
    assert_eq!(segments[0].bytes.as_ptr(), first);
    assert_eq!(segments.len(), 4, "{:?}", segments.iter().map(|s| s.bytes.len()).collect::<Vec<_>>());
}

#[test]
fn serialise_refuses_what_does_not_fit_together() {
    let stream = model(&[], true, b"");
    let (segments, _) = cut(&stream, &[(stream.len(), false)], 1 << 20);
    let segment = &segments[0];
    let content = content(segment).unwrap();
    let names = &segment.names;
    assert_eq!(serialise(&segment.records, names, &content[1..]), Err(SerialiseError::Content));
    assert_eq!(serialise(&segment.records[1..], names, &content), Err(SerialiseError::Content));
    assert_eq!(
        serialise(&segment.records, &Default::default(), &content),
        Err(SerialiseError::UnknownBlock(RamBlockId(0)))
    );
    let run = dwcp_proto::Run { block: RamBlockId(0), first: PageIndex(u64::MAX), count: 2, continued: true };
    let far = [Record::Zeros(run)];
    assert_eq!(serialise(&far, names, &[]), Err(SerialiseError::PageRange(PageIndex(u64::MAX))));
    let huge = [Record::Zeros(dwcp_proto::Run { count: u32::MAX, ..run })];
    assert_eq!(serialise(&huge, names, &[]), Err(SerialiseError::TooLong));
    let lying = Segment { bytes: segment.bytes.slice(..100), ..segment.clone() };
    assert!(pieces(&lying).any(|piece| piece.is_err()));
}
