//! Properties of the merger over generated migrations, and what it refuses. Real ones: the laboratory's `multifd`.

use std::collections::HashMap;
use std::io::IoSliceMut;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{PageIndex, RamBlockId, Segment};
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::packet::{GREETING, HEADER};
use super::*;
use crate::sim::{Scatter, Scattered, StreamWriter, Style};
use crate::stream::{Cutter, OpaqueReason, Piece, pieces};

const BLOCKS: [(&[u8], u64); 3] = [
    (b"pc.ram", 600 * PAGE_SIZE as u64),
    (b"/rom@etc/acpi/tables", 32 * PAGE_SIZE as u64),
    (b"pc.bios", 4096),
];

/// What happens between two synchronisations: pages, each once, in one section or more.
#[derive(Debug, Clone)]
struct Epoch {
    /// By block and page: what it is filled with; 0 is a zero page.
    pages: Vec<((usize, u64), u8)>,
    /// After how many pages another section begins.
    cut: usize,
    /// A command stands before it.
    ping: bool,
}

fn epoch() -> impl Strategy<Value = Epoch> {
    let page = (0..BLOCKS.len(), any::<prop::sample::Index>()).prop_map(|(block, index)| {
        (block, index.index((BLOCKS[block].1 / PAGE_SIZE as u64) as usize) as u64)
    });
    (btree_map(page, 0..4_u8, 0..400), 1..600_usize, any::<bool>()).prop_map(|(pages, cut, ping)| Epoch {
        pages: pages.into_iter().collect(),
        cut,
        ping,
    })
}

/// The stream of a QEMU without multifd; with MULTIFD_FLUSH after each epoch, which such a QEMU would not write.
fn model(epochs: &[Epoch], footers: bool) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-i440fx-7.2");
    writer.subsection("configuration/uuid", &[7; 16]);
    writer.ram_start(BLOCKS.iter().copied());
    for (n, epoch) in epochs.iter().enumerate() {
        if epoch.ping {
            writer.command(2, &[0, 0, 0, n as u8]);
        }
        let end = n + 1 == epochs.len();
        writer.ram_part(end);
        for (i, ((block, index), fill)) in epoch.pages.iter().enumerate() {
            if i > 0 && i % epoch.cut == 0 && !end {
                finish_section(&mut writer, footers);
                writer.ram_part(false);
            }
            writer.page(BLOCKS[*block].0, *index, &[*fill; PAGE_SIZE]);
        }
        writer.flush_record();
        finish_section(&mut writer, footers);
    }
    writer.device("cpu", b"state of the devices");
    writer.eof("{}");
    writer.take()
}

fn finish_section(writer: &mut StreamWriter, footers: bool) {
    match footers {
        true => writer.section_end(),
        false => writer.raw(&0x10_u64.to_be_bytes()),
    }
}

/// Connections whose bytes are all there, so each is read as far ahead as the merger allows.
struct Wires<'a> {
    rest: Vec<&'a [u8]>,
}

impl<'a> Wires<'a> {
    fn new(scattered: &'a Scattered) -> Self {
        let all = std::iter::once(&scattered.main).chain(&scattered.channels);
        Wires { rest: all.map(Vec::as_slice).collect() }
    }

    /// Reads at most `most` bytes of a connection; `None` where it is not wanted.
    fn read(&mut self, merger: &mut Merger, n: usize, most: usize, room: &mut [u8]) -> Option<Filled> {
        let source = if n == 0 { Source::Main } else { Source::Channel(n - 1) };
        let rest = &mut self.rest[n];
        if !merger.wants(source) || rest.is_empty() {
            return None;
        }
        let filled = merger.fill(source, room, |slots: &mut [IoSliceMut<'_>]| {
            let mut read = 0;
            for slot in slots {
                let len = slot.len().min(rest.len()).min(most - read);
                slot[..len].copy_from_slice(&rest[..len]);
                *rest = &rest[len..];
                read += len;
            }
            Ok(read)
        });
        Some(filled.unwrap())
    }
}

/// What came out.
struct Out {
    segments: Vec<Segment>,
    cutter: Cutter,
    /// Of each connection: what was not read.
    left: Vec<usize>,
}

/// Merges with reads of these sizes, beginning with another connection each time.
fn merge(scattered: &Scattered, sizes: &[usize], target: usize) -> Result<Out, MergeError> {
    let mut merger = Merger::new(scattered.channels.len());
    let mut cutter = Cutter::merged(target);
    let mut wires = Wires::new(scattered);
    let mut segments = Vec::new();
    let count = wires.rest.len();
    let mut sizes = sizes.iter().copied().cycle();
    let mut first = 0;
    loop {
        if cutter.buffer().len() < MIN_ROOM {
            cutter.flush();
        }
        let merged = merger.merge(cutter.buffer())?;
        cutter.filled(merged.len);
        if merged.synchronised {
            cutter.synchronised();
        }
        segments.extend(std::iter::from_fn(|| cutter.pop()));
        if merged.len > 0 || merged.synchronised {
            continue;
        }
        first += 1;
        let wanted = match merger.current() {
            Some(Source::Channel(n)) => n + 1..n + 2,
            _ => first..first + count,
        };
        let mut some = false;
        for n in wanted {
            let most = sizes.next().unwrap_or(usize::MAX).max(1);
            if let Some(filled) = wires.read(&mut merger, n % count, most, cutter.buffer()) {
                cutter.filled(filled.len);
                some = true;
                break;
            }
        }
        if !some {
            break;
        }
    }
    assert_eq!(merger.ended(Source::Main), wires.rest.iter().all(|rest| rest.is_empty()));
    cutter.finish();
    segments.extend(std::iter::from_fn(|| cutter.pop()));
    Ok(Out { segments, cutter, left: wires.rest.iter().map(|rest| rest.len()).collect() })
}

type Ram = HashMap<(RamBlockId, PageIndex), u8>;

/// The guest's memory at the end, and all that is not RAM: what comes before and after it.
fn applied(segments: &[Segment], device_from: u64) -> (Ram, Vec<u8>) {
    let (mut ram, mut rest, mut at) = (Ram::new(), Vec::new(), 0);
    let mut sent: HashMap<(RamBlockId, PageIndex), u32> = HashMap::new();
    for segment in segments {
        assert_eq!(segment.offset.0, at);
        at = segment.end().0;
        let mut here: HashMap<RamBlockId, PageIndex> = HashMap::new();
        for piece in pieces(segment) {
            let (block, index, fill) = match piece.unwrap() {
                Piece::Opaque(_) => continue,
                Piece::Page { block, index, bytes, .. } => {
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                    (block, index, bytes[0])
                }
                Piece::Zero { block, index, .. } => (block, index, 0),
            };
            ram.insert((block, index), fill);
            assert!(here.insert(block, index).is_none_or(|last| last < index), "ascends within a segment");
            let before = sent.insert((block, index), segment.version.0);
            assert!(before.is_none_or(|before| before < segment.version.0), "sent again: version rises");
        }
        if segment.end().0 > device_from {
            let skip = device_from.saturating_sub(segment.offset.0) as usize;
            rest.extend_from_slice(&segment.bytes[skip..]);
        }
    }
    (ram, rest)
}

/// The same of a stream that was never scattered.
fn expected(stream: &[u8]) -> (Ram, Vec<u8>) {
    let mut cutter = Cutter::new(1 << 20);
    let mut segments = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        rest = &rest[cutter.feed(rest)..];
        segments.extend(std::iter::from_fn(|| cutter.pop()));
    }
    cutter.finish();
    segments.extend(std::iter::from_fn(|| cutter.pop()));
    assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState));
    let mut ram = Ram::new();
    for piece in segments.iter().flat_map(pieces) {
        match piece.unwrap() {
            Piece::Opaque(_) => {}
            Piece::Page { block, index, bytes, .. } => drop(ram.insert((block, index), bytes[0])),
            Piece::Zero { block, index, .. } => drop(ram.insert((block, index), 0)),
        }
    }
    (ram, stream[cutter.opaque_from().unwrap().0 as usize..].to_vec())
}

fn styles() -> impl Strategy<Value = Style> {
    prop::sample::select(Style::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_reading_of_any_channels_gives_the_same_guest(
        epochs in vec(epoch(), 1..6), footers: bool, style in styles(), channels in 1..=16_usize,
        sizes in vec(prop_oneof![1..200_usize, 4000..4200_usize, 1..900_000_usize], 1..8),
        target in 0..2_000_000_usize,
    ) {
        let stream = model(&epochs, footers);
        let scattered = Scatter::new(channels, style).feed(&stream);
        let out = merge(&scattered, &sizes, target).unwrap();
        prop_assert!(out.left.iter().all(|left| *left == 0), "not read: {:?}", out.left);
        prop_assert_eq!(out.cutter.opaque_reason(), Some(OpaqueReason::DeviceState));
        let (ram, devices) = expected(&stream);
        let (merged, after) = applied(&out.segments, out.cutter.opaque_from().unwrap().0);
        prop_assert!(merged == ram, "the guest's memory");
        prop_assert_eq!(after, devices);
        // Nothing of multifd is left for the destination to stumble on, and of the rest nothing is lost.
        let flat: Vec<u8> = out.segments.iter().flat_map(|s| s.bytes.iter().copied()).collect();
        let pings = epochs.iter().filter(|epoch| epoch.ping).count();
        prop_assert_eq!(other_items(&flat), (0, pings));
        prop_assert!(out.cutter.version().0 < epochs.len() as u32);
    }

    #[test]
    fn whatever_channels_hold_ends_in_a_stream_or_an_error(
        epochs in vec(epoch(), 1..3), style in styles(), channels in 1..4_usize,
        damage in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut scattered = Scatter::new(channels, style).feed(&model(&epochs, true));
        for (wire, at, byte) in damage {
            let n = wire.index(channels + 1);
            let bytes = if n == 0 { &mut scattered.main } else { &mut scattered.channels[n - 1] };
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(out) = merge(&scattered, &[usize::MAX], 1 << 19) {
            // A page's content or a device's may be what was damaged; the stream can be taken apart all the same.
            assert!(out.segments.iter().flat_map(pieces).all(|piece| piece.is_ok()));
        }
    }
}

/// FLUSH records and commands; there is one last section.
fn other_items(stream: &[u8]) -> (usize, usize) {
    use crate::stream::{Item, Parser, Step};
    let (mut parser, mut rest) = (Parser::new(), stream);
    let (mut flushes, mut commands, mut ends) = (0, 0, 0_u8);
    while let Step::Item(len, item) = parser.step(rest) {
        match item {
            Item::Flush => flushes += 1,
            Item::Framing if rest[0] == 0x08 => commands += 1,
            Item::Section { last: true } => ends += 1,
            _ => {}
        }
        rest = &rest[len..];
    }
    assert_eq!(ends, 1);
    (flushes, commands)
}

fn one_epoch(pages: &[(u64, u8)]) -> Epoch {
    Epoch { pages: pages.iter().map(|(index, fill)| ((0, *index), *fill)).collect(), cut: 1000, ping: false }
}

/// A channel that runs ahead of the others, and of the main channel, is not read past its SYNC.
#[test]
fn a_channel_waits_behind_its_sync_until_all_others_and_the_main_channel_are_there() {
    let stream = model(&[one_epoch(&[(1, 1), (2, 0)]), one_epoch(&[(1, 2)]), one_epoch(&[(1, 3)])], true);
    for style in Style::ALL {
        let scattered = Scatter::new(2, style).feed(&stream);
        let mut merger = Merger::new(2);
        let mut wires = Wires::new(&scattered);
        let mut room = vec![0; 1 << 20];
        // Channel 0 alone, as far as it goes: nothing comes out, and its first SYNC is where it stands.
        let read = |merger: &mut Merger, wires: &mut Wires<'_>, n, room: &mut [u8]| {
            while wires.read(merger, n, usize::MAX, room).is_some() {
                assert_eq!(merger.merge(room).unwrap(), Merged::default());
            }
        };
        read(&mut merger, &mut wires, 1, &mut room);
        assert_eq!(scattered.channels[0].len() - wires.rest[1].len(), GREETING + HEADER, "{style:?}");
        read(&mut merger, &mut wires, 2, &mut room);
        assert_eq!(scattered.channels[1].len() - wires.rest[2].len(), GREETING + HEADER, "{style:?}");
        // Now the main channel: both go on once it is at its sync point, and it stands at the next one.
        assert!(wires.read(&mut merger, 0, usize::MAX, &mut room).is_some());
        let (mut synchronised, mut len) = (0, 0);
        loop {
            let merged = merger.merge(&mut room[len..]).unwrap();
            len += merged.len;
            synchronised += u32::from(merged.synchronised);
            if merged == Merged::default() {
                break;
            }
        }
        assert_eq!(synchronised, 1, "{style:?}");
        assert!(merger.wants(Source::Channel(0)) && merger.wants(Source::Channel(1)));
        assert!(!merger.wants(Source::Main), "it waits at its second sync point: {style:?}");
    }
}

/// A packet that comes while the end of the main channel's section is known and its footer is not.
#[test]
fn a_page_need_not_wait_for_a_footer() {
    let stream = model(&[one_epoch(&[(1, 1)]), one_epoch(&[(1, 2)])], true);
    let scattered = Scatter::new(1, Style::Eos).feed(&stream);
    let mut merger = Merger::new(1);
    // Up to the end of the first section's EOS.
    let eos = [&0x10_u64.to_be_bytes()[..], &[0x7e]].concat();
    let end = scattered.main.windows(eos.len()).position(|window| window == eos).unwrap() + 8;
    let only = Scattered { main: scattered.main[..end].to_vec(), ..scattered };
    let mut wires = Wires::new(&only);
    let mut room = vec![0; 1 << 20];
    let (mut len, mut some) = (0, true);
    while some {
        some = (0..2).any(|n| match wires.read(&mut merger, n, usize::MAX, &mut room[len..]) {
            Some(filled) => {
                len += filled.len;
                true
            }
            None => false,
        });
        loop {
            let merged = merger.merge(&mut room[len..]).unwrap();
            len += merged.len;
            if merged == Merged::default() {
                break;
            }
        }
    }
    assert!(room[..len].windows(PAGE_SIZE).any(|window| window == [1; PAGE_SIZE]));
    assert!(!room[..len].windows(PAGE_SIZE).any(|window| window == [2; PAGE_SIZE]), "behind the next SYNC");
}

/// What a packet of one page becomes that is changed in one place.
fn refused(change: impl Fn(&mut [u8])) -> ChannelFault {
    let stream = model(&[one_epoch(&[(1, 1)]), one_epoch(&[(1, 2)])], true);
    let mut scattered = Scatter::new(1, Style::Flush).feed(&stream);
    // Behind the greeting and the first SYNC.
    change(&mut scattered.channels[0][GREETING + HEADER..]);
    match merge(&scattered, &[usize::MAX], 1 << 19).err().unwrap() {
        MergeError::Channel { channel: 0, fault } => fault,
        other => panic!("{other}"),
    }
}

#[test]
fn a_packet_that_is_not_qemus_is_refused() {
    let u32_at =
        |at: usize, value: u32| move |b: &mut [u8]| b[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let u64_at =
        |at: usize, value: u64| move |b: &mut [u8]| b[at..at + 8].copy_from_slice(&value.to_be_bytes());
    assert_eq!(refused(u32_at(0, 1)), ChannelFault::Magic(1));
    assert_eq!(refused(u32_at(4, 2)), ChannelFault::Version(2));
    assert_eq!(refused(u32_at(8, 2)), ChannelFault::Compressed);
    assert_eq!(refused(u32_at(8, 0x40)), ChannelFault::Flags(0x40));
    assert_eq!(refused(u32_at(16, 129)), ChannelFault::Pages(129, 0));
    assert_eq!(refused(u32_at(32, u32::MAX)), ChannelFault::Pages(1, u32::MAX));
    assert_eq!(refused(u32_at(20, 4095)), ChannelFault::Length { pages: 1, bytes: 4095 });
    assert_eq!(refused(|b| b[64] = b'x'), ChannelFault::UnknownBlock);
    assert_eq!(refused(|b| b[64..320].fill(b'x')), ChannelFault::UnknownBlock);
    assert_eq!(refused(u64_at(320, 1)), ChannelFault::Offset(1));
    assert_eq!(refused(u64_at(320, 600 * 4096)), ChannelFault::Offset(600 * 4096));
    assert_eq!(refused(u64_at(320, u64::MAX << 12)), ChannelFault::Offset(u64::MAX << 12));
}

#[test]
fn greetings_name_each_channel_once() {
    let stream = model(&[one_epoch(&[])], true);
    for (id, expected) in [(0, ChannelFault::Id(0)), (2, ChannelFault::Id(2)), (255, ChannelFault::Id(255))] {
        let mut scattered = Scatter::new(2, Style::Flush).feed(&stream);
        scattered.channels[1][24] = id;
        let error = merge(&scattered, &[usize::MAX], 1 << 19).err().unwrap();
        assert_eq!(error, MergeError::Channel { channel: 1, fault: expected });
        scattered.channels.swap(0, 1);
        scattered.channels[0][24] = 1;
        scattered.channels[1][24] = 0;
        assert!(merge(&scattered, &[usize::MAX], 1 << 19).is_ok(), "in any order");
    }
}

#[test]
fn a_main_channel_that_cannot_be_followed_is_refused() {
    let stream = model(&[one_epoch(&[(1, 1)])], true);
    let failed = |main: &[u8], style| {
        let mut scattered = Scatter::new(1, style).feed(&stream);
        scattered.main = main.to_vec();
        merge(&scattered, &[usize::MAX], 1 << 19).err().unwrap()
    };
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc");
    writer.device("virtio-mem", b"early");
    assert_eq!(failed(writer.bytes(), Style::Eos), MergeError::Main(OpaqueReason::DeviceState));
    let garbage = [7; 100];
    assert_eq!(failed(&garbage, Style::Eos), MergeError::Main(OpaqueReason::NotQemu));
    // The way to synchronise is what the first section showed.
    let mut writer = StreamWriter::new();
    writer.header();
    writer.ram_start(BLOCKS.iter().copied());
    writer.ram_part(true);
    writer.flush_record();
    assert_eq!(failed(writer.bytes(), Style::Eos), MergeError::Sync);
}

/// Pages behind the last synchronisation have no place in the stream.
#[test]
fn a_page_after_the_end_of_ram_is_refused() {
    let stream = model(&[one_epoch(&[(1, 1)])], true);
    let more =
        Scatter::new(1, Style::Flush).feed(&model(&[one_epoch(&[(1, 1)]), one_epoch(&[(1, 2)])], true));
    let mut scattered = Scatter::new(1, Style::Flush).feed(&stream);
    scattered.channels = more.channels;
    let error = merge(&scattered, &[usize::MAX], 1 << 19).err().unwrap();
    assert_eq!(error, MergeError::Channel { channel: 0, fault: ChannelFault::Late });
}

#[test]
fn a_connection_may_end_only_after_ram() {
    let scattered = Scatter::new(1, Style::Flush).feed(&model(&[one_epoch(&[(1, 1)])], true));
    let mut merger = Merger::new(1);
    let mut room = vec![0; 1 << 20];
    let mut wires = Wires::new(&scattered);
    assert!(wires.read(&mut merger, 1, usize::MAX, &mut room).is_some());
    let filled = merger.fill(Source::Channel(0), &mut room, |_| Ok(0));
    // The greeting is whole and not parsed: there is no place for more.
    assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(merger.merge(&mut room).unwrap(), Merged::default());
    assert_eq!(merger.fill(Source::Channel(0), &mut room, |_| Ok(0)).unwrap(), Filled { read: 0, len: 0 });
    assert!(!merger.ended(Source::Channel(0)));
    assert!(!merger.ended(Source::Main));
}
