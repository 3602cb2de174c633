//! Whatever a source cuts comes back; and whatever arrives, the decoder and the reference agree on it.

use dwcp_proto::{Codec, Segment};
use proptest::collection::vec;
use proptest::prelude::*;

use super::round_trip::{noise, text};
use crate::testing::{SegmentBuilder, reference};
use crate::{Choice, Decoder, Encoded, Encoder};

#[derive(Debug, Clone)]
enum Part {
    Opaque(Vec<u8>),
    Pages { block: usize, gap: u64, contents: Vec<u8> },
    Zeros { block: usize, gap: u64, count: u64 },
}

const BLOCKS: [&[u8]; 4] = [b"pc.ram", b"pc.bios", b"", b"/rom@etc/acpi/tables"];

fn part() -> impl Strategy<Value = Part> {
    let block = 0..BLOCKS.len();
    let gap = prop_oneof![Just(0u64), 0u64..5, 0u64..1 << 46];
    prop_oneof![
        vec(any::<u8>(), 1..200).prop_map(Part::Opaque),
        (block.clone(), gap.clone(), vec(0u8..6, 1..6)).prop_map(|(block, gap, contents)| Part::Pages {
            block,
            gap,
            contents
        }),
        (block, gap, 1u64..40).prop_map(|(block, gap, count)| Part::Zeros { block, gap, count }),
    ]
}

fn segment(parts: Vec<Part>, continuing: bool) -> Segment {
    let mut builder = SegmentBuilder::new();
    if continuing {
        builder = builder.continuing(BLOCKS[0]);
    }
    let mut next = [0u64; BLOCKS.len()];
    for part in parts {
        match part {
            Part::Opaque(bytes) => drop(builder.opaque(&bytes)),
            Part::Pages { block, gap, contents } => {
                next[block] += gap;
                for content in contents {
                    let page = match content {
                        0 | 1 => [0; 4096],
                        2 | 3 => text(u64::from(content)),
                        _ => noise(u64::from(content)),
                    };
                    builder.page(BLOCKS[block], next[block], &page);
                    next[block] += 1;
                }
            }
            Part::Zeros { block, gap, count } => {
                next[block] += gap;
                for _ in 0..count {
                    builder.zero(BLOCKS[block], next[block]);
                    next[block] += 1;
                }
            }
        }
    }
    builder.finish(0)
}

fn any_segment() -> impl Strategy<Value = Segment> {
    (vec(part(), 0..20), any::<bool>()).prop_map(|(parts, continuing)| segment(parts, continuing))
}

fn any_choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        Just(Choice::Raw),
        Just(Choice::Lz4),
        (-3i32..4).prop_map(Choice::Zstd),
        (-3i32..4).prop_map(Choice::Sampled),
    ]
}

/// One spoiled byte: where, counted from the front or the back of some part, and what becomes of it.
fn any_change() -> impl Strategy<Value = (usize, u8, u8)> {
    // Header and table are small and come first: most changes go there.
    (prop_oneof![4 => 0usize..80, 1 => any::<usize>()], 0u8..4, any::<u8>())
}

fn spoil(payload: &mut Vec<u8>, changes: &[(usize, u8, u8)]) {
    for &(at, how, byte) in changes {
        if payload.is_empty() {
            return;
        }
        let at = at % payload.len();
        match how {
            0 => payload[at] ^= 1 << (byte % 8),
            1 => payload[at] = byte,
            2 => payload.insert(at, byte),
            _ => drop(payload.remove(at)),
        }
    }
}

/// What the records give, if they are in order and without references.
fn plain_records(payload: &[u8]) -> Option<Vec<u8>> {
    let plain = payload.first() == Some(&1);
    plain.then(|| reference::records(payload, &mut reference::Model::new(None))).flatten()
}

fn encode(segment: &Segment, choice: Choice) -> (Encoded, Vec<u8>) {
    let mut payload = Vec::new();
    let encoded = Encoder::new().encode(segment, choice, &mut payload).unwrap();
    (encoded, payload)
}

fn decode(codec: Codec, payload: &[u8], raw_len: usize, stream_len: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    Decoder::new().decode_unverified(codec, payload, raw_len, stream_len, &mut out).ok().map(|()| out)
}

fn assert_agreement(
    codec: Codec,
    payload: &[u8],
    raw_len: usize,
    stream_len: usize,
) -> Result<(), TestCaseError> {
    let expected = reference::decode(codec, payload, raw_len, stream_len);
    prop_assert!(decode(codec, payload, raw_len, stream_len) == expected);
    Ok(())
}

/// A table of operations that is mostly in order, before a content of the length it asks for.
fn any_table() -> impl Strategy<Value = Vec<u8>> {
    let small = || prop_oneof![8 => 0u8..4, 1 => any::<u8>()];
    let operation =
        (prop_oneof![8 => 1u8..5, 8 => 0x82u8..0x85, 1 => any::<u8>()], small(), small(), small());
    vec(operation, 0..12).prop_map(|operations| {
        let mut table = b"\x01a\x01b\x02bc".to_vec();
        let (mut opaque, mut pages) = (0u32, 0u32);
        for (code, block, gap, count) in operations {
            if code == 1 {
                table.extend([code, count]);
                opaque += u32::from(count);
            } else {
                table.extend([code, block, gap, count]);
                pages += if code & 0x7f == 2 { u32::from(count) } else { 0 };
            }
        }
        let mut payload = vec![1, 0, 0, 3];
        for len in [table.len() as u32, opaque, pages] {
            payload.extend(len.to_be_bytes());
        }
        payload.extend(table);
        payload.resize(payload.len() + opaque as usize + pages as usize * 4096, 0x5a);
        payload
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn what_is_encoded_decodes_to_the_same_bytes(segment in any_segment(), choice in any_choice()) {
        let (encoded, payload) = encode(&segment, choice);
        let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
        prop_assert!(payload.len() <= raw_len);
        let decoded = decode(encoded.codec, &payload, raw_len, stream_len);
        prop_assert!(decoded.as_deref() == Some(&segment.bytes[..]));
        assert_agreement(encoded.codec, &payload, raw_len, stream_len)?;
    }

    #[test]
    fn a_worker_that_saw_other_chunks_gives_the_same(segments in vec((any_segment(), any_choice()), 1..5)) {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        let (mut payload, mut out) = (Vec::new(), Vec::new());
        for (segment, choice) in segments {
            let encoded = encoder.encode(&segment, choice, &mut payload).unwrap();
            prop_assert_eq!((encoded, payload.clone()), encode(&segment, choice));
            out.clear();
            let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
            decoder.decode_unverified(encoded.codec, &payload, raw_len, stream_len, &mut out).unwrap();
            prop_assert!(out == segment.bytes);
            // A refusal in between leaves nothing behind.
            let half = &payload[..payload.len() / 2];
            prop_assert!(decoder.decode_unverified(Codec::Raw, half, half.len(), 1, &mut out).is_err());
        }
    }

    #[test]
    fn decoder_and_reference_agree_on_spoiled_payloads(
        segment in any_segment(),
        choice in any_choice(),
        changes in vec(any_change(), 1..4),
    ) {
        let (encoded, mut payload) = encode(&segment, choice);
        spoil(&mut payload, &changes);
        let raw_len = if encoded.codec == Codec::Raw { payload.len() } else { encoded.raw_len as usize };
        assert_agreement(encoded.codec, &payload, raw_len, segment.bytes.len())?;
        // The length that the spoiled records give, if they still give one: else the announced length would
        // refuse nearly everything.
        if encoded.codec == Codec::Raw
            && let Some(stream) = plain_records(&payload)
        {
            assert_agreement(Codec::Raw, &payload, raw_len, stream.len())?;
        }
    }

    #[test]
    fn decoder_and_reference_agree_on_any_table(payload in any_table()) {
        let stream_len = plain_records(&payload).map_or(0, |stream| stream.len());
        assert_agreement(Codec::Raw, &payload, payload.len(), stream_len)?;
    }

    #[test]
    fn any_bytes_are_decoded_or_refused(
        codec in prop_oneof![Just(Codec::Raw), Just(Codec::Lz4), Just(Codec::Zstd)],
        payload in vec(any::<u8>(), 0..300),
        raw_len in prop_oneof![0usize..400, any::<usize>()],
        stream_len in any::<usize>(),
    ) {
        assert_agreement(codec, &payload, raw_len, stream_len)?;
    }
}
