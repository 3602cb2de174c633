//! Unchanged, dedup and delta: what is sent is what the receiver puts together, and less than the pages.

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{Codec, Segment};
use proptest::collection::vec;
use proptest::prelude::*;

use super::round_trip::{noise, text};
use crate::testing::reference::{self, Model};
use crate::testing::{Ram, SegmentBuilder};
use crate::{
    CacheSize, Choice, Decoder, Encoded, Encoder, Holding, Layers, Memory, Page, ReplayError, Sink, Stats,
    StreamSink, Unpacked,
};

const RAM: &[u8] = b"pc.ram";
const ROOM: usize = 8 << 20;

/// Both blocks are held.
fn all() -> Holding {
    Holding::Blocks(BLOCKS.map(Box::from).to_vec())
}

/// A source and a receiver whose sink holds every page.
struct Pair {
    memory: Memory,
    ram: Ram,
}

impl Pair {
    fn new(layers: Layers) -> Self {
        Pair { memory: Memory::new(layers, all(), &[3; 32], ROOM), ram: Ram::default() }
    }

    /// Sends a segment and holds what arrives against it.
    fn send(&mut self, build: impl FnOnce(&mut SegmentBuilder)) -> Stats {
        let mut builder = SegmentBuilder::naming(&BLOCKS);
        build(&mut builder);
        let segment = builder.finish(0);
        let (encoded, payload) = encode(&segment, &mut self.memory, Choice::Zstd(1));
        self.ram.out.clear();
        unpack(&encoded, &payload, &segment).content().replay(&mut self.ram).unwrap();
        assert!(self.ram.out == segment.bytes);
        account(&encoded);
        encoded.stats
    }
}

/// The layers' bytes add up to the payload, before compression and after it.
fn account(encoded: &Encoded) {
    let layers = encoded.stats.layers();
    let (by_page, by_chunk) = layers.split_at(5);
    let left: u64 = by_page.iter().map(|layer| layer.after).sum();
    let raw_len = u64::from(encoded.raw_len);
    // The rest is the table, and what is no page.
    assert!((left..=left + encoded.stats.opaque_bytes + 4096).contains(&raw_len), "{left} of {raw_len}");
    assert_eq!(by_chunk.iter().map(|layer| layer.before).sum::<u64>(), raw_len);
    assert_eq!(by_chunk.iter().map(|layer| layer.after).sum::<u64>(), encoded.stats.payload_bytes);
}

fn encode(segment: &Segment, memory: &mut Memory, choice: Choice) -> (Encoded, Vec<u8>) {
    let mut payload = Vec::new();
    let encoded = Encoder::new().read(segment, Some(memory)).unwrap().write(choice, &mut payload);
    assert!(encoded.raw_len as usize <= dwcp_proto::limits::MAX_RAW_PAYLOAD);
    (encoded, payload)
}

fn unpack(encoded: &Encoded, payload: &[u8], segment: &Segment) -> Unpacked {
    let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
    Decoder::new().unpack_unverified(encoded.codec, payload, raw_len, stream_len).unwrap()
}

/// `page` with one byte changed in each of these lines.
fn touched(mut page: Page, lines: impl IntoIterator<Item = usize>) -> Page {
    lines.into_iter().for_each(|line| page[line * 128 + 77] ^= 0xff);
    page
}

#[test]
fn a_page_that_did_not_change_costs_its_proof() {
    let mut pair = Pair::new(Layers::ALL);
    let first = pair.send(|b| {
        (0..64).for_each(|n| {
            b.page(RAM, n, &noise(n));
        })
    });
    assert_eq!((first.pages, first.unchanged_pages), (64, 0));
    let again = pair.send(|b| {
        (0..64).for_each(|n| {
            b.page(RAM, n, &noise(n));
        })
    });
    assert_eq!((again.pages, again.unchanged_pages), (0, 64));
    assert!(again.payload_bytes < 64 * 9 + 40, "{} bytes", again.payload_bytes);
}

#[test]
fn a_page_that_changed_a_little_is_the_lines_that_changed_from_the_first_time_on() {
    let mut pair = Pair::new(Layers::ALL);
    pair.send(|b| {
        b.page(RAM, 7, &noise(1));
    });
    let page = touched(noise(1), [0, 31]);
    let stats = pair.send(|b| {
        b.page(RAM, 7, &page);
    });
    assert_eq!((stats.pages, stats.delta_pages, stats.delta_lines), (0, 1, 2));
    assert!(stats.payload_bytes < 2 * 128 + 60, "{} bytes", stats.payload_bytes);
    // Each version is the base of the next one; one with many changes goes whole, and is a base all the same.
    let page = touched(page, 0..20);
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 7, &page);
        })
        .delta_lines,
        20
    );
    let page = touched(page, 0..21);
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 7, &page);
        })
        .pages,
        1
    );
    let page = touched(page, [5]);
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 7, &page);
        })
        .delta_lines,
        1
    );
}

#[test]
fn a_copy_refers_to_what_the_other_page_is_at_that_moment() {
    let mut pair = Pair::new(Layers::ALL);
    // Within one chunk, across blocks, in runs.
    let stats = pair.send(|b| {
        (0..8).for_each(|n| {
            b.page(RAM, n, &noise(n));
        });
        (20..28).for_each(|n| {
            b.page(RAM, n, &noise(n - 20));
        });
        b.page(b"vga.vram", 3, &noise(5));
    });
    assert_eq!((stats.pages, stats.copied_pages), (8, 9));
    // The holder is overwritten earlier in the same chunk: it is the holder no more, but its copy is.
    let stats = pair.send(|b| {
        b.page(RAM, 2, &noise(100)).page(RAM, 40, &noise(2));
    });
    assert_eq!((stats.pages, stats.copied_pages), (1, 1));
    // It becomes zero, and so does the copy: nobody has the content any more.
    let stats = pair.send(|b| {
        b.zero(RAM, 22).page(RAM, 40, &[0; PAGE_SIZE]).page(RAM, 41, &noise(2));
    });
    assert_eq!((stats.pages, stats.copied_pages, stats.blank_pages), (1, 0, 1));
}

#[test]
fn a_copy_of_a_block_that_the_chunk_does_not_name_goes_whole() {
    let mut pair = Pair::new(Layers::ALL);
    pair.send(|b| {
        b.page(b"vga.vram", 0, &noise(1));
    });
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 0, &noise(1));
        })
        .pages,
        1
    );
}

#[test]
fn a_block_that_is_not_held_is_neither_referred_to_nor_remembered() {
    let mut pair = Pair::new(Layers::ALL);
    pair.memory = Memory::new(Layers::ALL, Holding::Blocks(vec![RAM.into()]), &[1; 32], ROOM);
    let mut both = || {
        pair.send(|b| {
            b.page(RAM, 0, &noise(1)).page(b"vga.vram", 0, &noise(1)).zero(b"vga.vram", 1);
        })
    };
    assert_eq!((both().pages, both().unchanged_pages), (2, 1));
}

#[test]
fn each_layer_can_be_off() {
    let run = |layers| {
        let mut pair = Pair::new(layers);
        pair.send(|b| {
            b.page(RAM, 0, &noise(0)).page(RAM, 1, &noise(1)).page(RAM, 2, &noise(2));
        });
        let one = touched(noise(2), [3]);
        let s = pair.send(|b| {
            b.page(RAM, 0, &noise(0)).page(RAM, 2, &one).page(RAM, 3, &noise(1)).page(
                RAM,
                4,
                &[0; PAGE_SIZE],
            );
        });
        [s.blank_pages, s.unchanged_pages, s.copied_pages, s.delta_pages, s.pages]
    };
    assert_eq!(run(Layers::ALL), [1, 1, 1, 1, 0]);
    assert_eq!(run(Layers { zero: false, ..Layers::ALL }), [0, 1, 1, 1, 1]);
    assert_eq!(run(Layers { unchanged: false, ..Layers::ALL }), [1, 0, 1, 1, 1]);
    assert_eq!(run(Layers { dedup: false, ..Layers::ALL }), [1, 1, 0, 1, 1]);
    assert_eq!(run(Layers { delta: false, ..Layers::ALL }), [1, 1, 1, 0, 1]);
    assert_eq!(run(Layers::ZERO), [1, 0, 0, 0, 3]);
}

#[test]
fn beyond_the_limit_pages_go_whole_and_are_counted() {
    let mut memory = Memory::new(Layers::ALL, all(), &[1; 32], 256 << 10);
    let mut ram = Ram::default();
    let mut stats = Stats::default();
    for _ in 0..2 {
        for chunk in 0..20 {
            let mut builder = SegmentBuilder::naming(&BLOCKS);
            (0..256).for_each(|n| {
                builder.page(RAM, chunk * 256 + n, &noise(chunk * 256 + n));
            });
            let segment = builder.finish(0);
            let (encoded, payload) = encode(&segment, &mut memory, Choice::Raw);
            stats += encoded.stats;
            ram.out.clear();
            unpack(&encoded, &payload, &segment).content().replay(&mut ram).unwrap();
            assert!(ram.out == segment.bytes);
            assert!(memory.bytes() <= 256 << 10);
        }
    }
    let tracked = 5120 - stats.untracked_pages / 2;
    assert_eq!(stats.unchanged_pages, tracked);
    assert!((1200..1500).contains(&tracked), "{tracked}");
}

#[test]
fn what_was_forgotten_goes_whole() {
    let mut pair = Pair::new(Layers::ALL);
    pair.send(|b| {
        b.page(RAM, 0, &noise(0));
    });
    pair.memory.forget();
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 0, &noise(0));
        })
        .pages,
        1
    );
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 0, &noise(0));
        })
        .unchanged_pages,
        1
    );
}

#[test]
fn a_page_altered_behind_the_back_is_found_out_before_it_is_delivered() {
    for (line, page) in [(3, touched(noise(0), [9])), (9, noise(0))] {
        let mut pair = Pair::new(Layers::ALL);
        pair.send(|b| {
            b.page(RAM, 0, &noise(0)).page(RAM, 1, &noise(1));
        });
        for held in pair.ram.pages.values_mut() {
            **held = touched(**held, [line]);
        }
        let mut builder = SegmentBuilder::naming(&BLOCKS);
        builder.page(RAM, 0, &page).page(RAM, 5, &noise(1));
        let segment = builder.finish(0);
        let (encoded, payload) = encode(&segment, &mut pair.memory, Choice::Raw);
        pair.ram.out.clear();
        let before = pair.ram.pages.clone();
        let error = unpack(&encoded, &payload, &segment).content().replay(&mut pair.ram).unwrap_err();
        assert_eq!(error, ReplayError::Proof { index: dwcp_proto::PageIndex(0) });
        assert!(pair.ram.out.is_empty());
        assert_eq!(pair.ram.pages, before);
    }
}

#[test]
fn a_segment_that_cannot_be_read_leaves_nothing_to_refer_to() {
    let mut pair = Pair::new(Layers::ALL);
    pair.send(|b| {
        b.page(RAM, 0, &noise(0));
    });
    let mut builder = SegmentBuilder::naming(&BLOCKS);
    builder.page(RAM, 0, &noise(9)).page(RAM, 1, &noise(1));
    let mut segment = builder.finish(0);
    segment.bytes = segment.bytes.slice(..segment.bytes.len() - 1);
    assert!(Encoder::new().read(&segment, Some(&mut pair.memory)).is_err());
    assert_eq!(
        pair.send(|b| {
            b.page(RAM, 0, &noise(0));
        })
        .pages,
        1
    );
}

/// A page of a sequence: what it holds now, from what.
#[derive(Debug, Clone, Copy)]
enum Change {
    Zero,
    Blank,
    Noise(u8),
    Text(u8),
    Touch(usize, u8),
    Same,
    LikePage(u64),
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        1 => Just(Change::Zero),
        1 => Just(Change::Blank),
        2 => (0u8..4).prop_map(Change::Noise),
        2 => (0u8..4).prop_map(Change::Text),
        4 => (0usize..32, 1u8..40).prop_map(|(line, count)| Change::Touch(line, count)),
        2 => Just(Change::Same),
        3 => (0u64..6).prop_map(Change::LikePage),
    ]
}

const BLOCKS: [&[u8]; 2] = [RAM, b"vga.vram"];
/// Pages of each block.
const PAGES: u64 = 6;

/// Segments over few pages that change and change again, in the order in which they are sent.
fn sequence() -> impl Strategy<Value = Vec<Segment>> {
    let pages = vec((0usize..2, 0u64..3, change()), 1..8);
    vec(pages, 1..12).prop_map(|segments| {
        let mut now = [[[0; PAGE_SIZE]; PAGES as usize]; 2];
        segments
            .into_iter()
            .map(|pages| {
                let mut builder = SegmentBuilder::naming(&BLOCKS);
                let mut next = [0; 2];
                for (block, gap, change) in pages {
                    let index = next[block] + gap;
                    if index >= PAGES {
                        continue;
                    }
                    next[block] = index + 1;
                    let page = &now[block][index as usize];
                    let page = match change {
                        Change::Zero | Change::Blank => [0; PAGE_SIZE],
                        Change::Noise(seed) => noise(u64::from(seed)),
                        Change::Text(seed) => text(u64::from(seed)),
                        Change::Touch(line, count) => {
                            touched(*page, line..(line + usize::from(count)).min(32))
                        }
                        Change::Same => *page,
                        Change::LikePage(other) => now[1 - block][other as usize],
                    };
                    now[block][index as usize] = page;
                    match change {
                        Change::Zero => builder.zero(BLOCKS[block], index),
                        _ => builder.page(BLOCKS[block], index, &page),
                    };
                }
                builder.opaque(b"end of section");
                builder.finish(0)
            })
            .collect()
    })
}

fn any_layers() -> impl Strategy<Value = Layers> {
    prop_oneof![
        3 => Just(Layers::ALL),
        1 => any::<[bool; 4]>()
            .prop_map(|[zero, unchanged, dedup, delta]| Layers { zero, unchanged, dedup, delta }),
    ]
}

/// Sends the segments to a sink and to the slow model.
fn check<S: Sink>(
    segments: &[Segment],
    layers: Layers,
    slots: Option<u32>,
    mut sink: S,
    taken: impl Fn(&mut S) -> Vec<u8>,
) -> Result<Stats, TestCaseError> {
    let holding = slots.and_then(CacheSize::new).map_or_else(all, Holding::Cache);
    let mut memory = Memory::new(layers, holding, &[5; 32], ROOM);
    let mut model = Model::new(slots);
    let mut sum = Stats::default();
    for (segment, n) in segments.iter().zip(0..) {
        let choice = [Choice::Raw, Choice::Zstd(1), Choice::Lz4][n % 3];
        let (encoded, payload) = encode(segment, &mut memory, choice);
        sum += encoded.stats;
        let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
        let slow = reference::replay(encoded.codec, &payload, raw_len, stream_len, &mut model);
        prop_assert!(slow.as_deref() == Some(&segment.bytes[..]));
        let replayed = unpack(&encoded, &payload, segment).content().replay(&mut sink);
        prop_assert!(replayed.is_ok());
        prop_assert!(taken(&mut sink) == segment.bytes);
    }
    Ok(sum)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_arrives_where_every_page_is_held(segments in sequence(), layers in any_layers()) {
        check(&segments, layers, None, Ram::default(), |ram| std::mem::take(&mut ram.out))?;
    }

    #[test]
    fn any_sequence_arrives_through_a_cache_of_any_size(
        segments in sequence(),
        layers in any_layers(),
        slots in 1u32..20,
    ) {
        let sink = StreamSink::new(CacheSize::new(slots));
        check(&segments, layers, Some(slots), sink, |sink| std::mem::take(&mut sink.out))?;
    }
}

#[test]
fn the_cache_serves_what_it_still_has() {
    let pages = |from: u64| {
        let mut builder = SegmentBuilder::naming(&BLOCKS);
        (from..from + 4).for_each(|n| {
            builder.page(RAM, n, &noise(n));
        });
        builder.finish(0)
    };
    // Four slots: pages 4 to 7 take the place of 0 to 3.
    let sink = || StreamSink::new(CacheSize::new(4));
    let take = |sink: &mut StreamSink| std::mem::take(&mut sink.out);
    let stats = check(&[pages(0), pages(0)], Layers::ALL, Some(4), sink(), take).unwrap();
    assert_eq!((stats.pages, stats.unchanged_pages), (4, 4));
    let stats = check(&[pages(0), pages(4), pages(0)], Layers::ALL, Some(4), sink(), take).unwrap();
    assert_eq!((stats.pages, stats.unchanged_pages), (12, 0));
    // A page that replaces another may be a copy of it.
    let mut twin = SegmentBuilder::naming(&BLOCKS);
    twin.page(RAM, 4, &noise(0));
    let stats = check(&[pages(0), twin.finish(0)], Layers::ALL, Some(4), sink(), take).unwrap();
    assert_eq!((stats.pages, stats.copied_pages), (4, 1));
}

#[test]
fn without_references_the_payload_is_that_of_version_1() {
    let mut builder = SegmentBuilder::naming(&BLOCKS);
    builder.page(RAM, 1, &text(1)).zero(RAM, 2).opaque(b"x");
    let segment = builder.finish(0);
    let mut memory = Memory::new(Layers::ALL, all(), &[5; 32], ROOM);
    let (_, with) = encode(&segment, &mut memory, Choice::Raw);
    let mut without = Vec::new();
    let encoded = Encoder::new().encode(&segment, Choice::Raw, &mut without).unwrap();
    assert_eq!((encoded.codec, with), (Codec::Raw, without));
}
