//! References that a signing but hostile source could send, by the names that the fault catalogue gives them; and
//! the decoder beside the slow one on anything.

use dwcp_proto::{Codec, PageIndex};
use proptest::collection::vec;
use proptest::prelude::*;

use super::round_trip::noise;
use crate::format::write_varint;
use crate::testing::reference::{self, Model};
use crate::{
    CacheSize, DecodeError, Decoder, Page, ReplayError, Sink, Span, StreamSink, TableError, Unpacked,
};

const UNCHANGED: u64 = 0x85;
const COPIES: u64 = 0x86;
const DELTAS: u64 = 0x87;

/// The parts of a payload of version 2 for one block, `pc.ram`.
#[derive(Default, Clone)]
struct Parts {
    operations: Vec<Vec<u64>>,
    proofs: Vec<[u8; 8]>,
    masks: Vec<u32>,
    lines: usize,
}

impl Parts {
    fn new(operations: &[&[u64]], proofs: usize) -> Self {
        let operations = operations.iter().map(|operation| operation.to_vec()).collect();
        Parts { operations, proofs: vec![[1; 8]; proofs], ..Parts::default() }
    }

    fn deltas(masks: &[u32]) -> Self {
        Parts {
            masks: masks.to_vec(),
            lines: masks.iter().map(|mask| mask.count_ones() as usize).sum(),
            ..Parts::new(&[&[DELTAS, 0, 0, masks.len() as u64]], masks.len())
        }
    }

    fn payload(&self) -> Vec<u8> {
        let mut table = b"\x06pc.ram".to_vec();
        for operation in &self.operations {
            table.push(operation[0] as u8);
            operation[1..].iter().for_each(|&number| write_varint(number, &mut table));
        }
        let mut payload = vec![2, 0, 0, 1];
        for number in [table.len(), 0, 0, self.proofs.len(), self.masks.len(), self.lines] {
            payload.extend((number as u32).to_be_bytes());
        }
        payload.extend(table);
        payload.extend(self.proofs.as_flattened());
        self.masks.iter().for_each(|mask| payload.extend(mask.to_be_bytes()));
        payload.resize(payload.len() + self.lines * 128, 0x33);
        payload
    }
}

fn unpack(payload: &[u8], stream_len: usize) -> Result<Unpacked, DecodeError> {
    Decoder::new().unpack_unverified(Codec::Raw, payload, payload.len(), stream_len)
}

fn refusal(parts: &Parts) -> TableError {
    let pages = parts.proofs.len();
    match unpack(&parts.payload(), pages * 4104 + 7) {
        Err(DecodeError::Table(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn span(first: u64) -> Span<'static> {
    Span { block: b"pc.ram", first: PageIndex(first), count: 1, named: true }
}

fn replay(parts: &Parts, sink: &mut StreamSink) -> Result<(), ReplayError> {
    unpack(&parts.payload(), parts.proofs.len() * 4104 + 7).unwrap().content().replay(sink)
}

#[test]
fn ref_unheld() {
    for parts in [
        Parts::new(&[&[UNCHANGED, 0, 9, 1]], 1),
        Parts::new(&[&[COPIES, 0, 0, 1, 0, 9]], 1),
        Parts { operations: vec![vec![DELTAS, 0, 9, 1]], ..Parts::deltas(&[1]) },
    ] {
        for cache in [None, CacheSize::new(4)] {
            let mut sink = StreamSink::new(cache);
            // Page 13 has the slot that page 9 would have.
            sink.pages(span(13), &[noise(1)]).unwrap();
            sink.out.clear();
            assert_eq!(replay(&parts, &mut sink), Err(ReplayError::Unheld { index: PageIndex(9) }));
            assert!(sink.out.is_empty());
        }
    }
}

#[test]
fn delta_base_another_version_than_the_source_thinks() {
    for parts in [
        Parts::new(&[&[UNCHANGED, 0, 3, 1]], 1),
        Parts::new(&[&[COPIES, 0, 0, 1, 0, 3]], 1),
        Parts { operations: vec![vec![DELTAS, 0, 3, 1]], ..Parts::deltas(&[1 << 31]) },
    ] {
        let mut sink = StreamSink::new(CacheSize::new(4));
        sink.pages(span(3), &[noise(1)]).unwrap();
        sink.out.clear();
        assert!(matches!(replay(&parts, &mut sink), Err(ReplayError::Proof { .. })));
        assert!(sink.out.is_empty());
        let mut kept: Page = [0; 4096];
        assert_eq!(sink.held(b"pc.ram", PageIndex(3), &mut kept), Ok(true));
        assert_eq!(kept, noise(1));
    }
}

#[test]
fn lengths_that_do_not_fit() {
    let good = Parts::deltas(&[5, 1 << 30]);
    assert!(unpack(&good.payload(), 2 * 4104 + 7).is_ok());
    let spoilers: [fn(&mut Parts); 7] = [
        |p| p.lines += 1,
        |p| p.lines -= 1,
        |p| {
            p.masks.pop();
        },
        |p| p.masks.push(1),
        |p| {
            p.proofs.pop();
        },
        |p| p.proofs.push([0; 8]),
        |p| {
            p.operations.pop();
        },
    ];
    for spoil in spoilers {
        let mut bad = good.clone();
        spoil(&mut bad);
        assert_eq!(refusal(&bad), TableError::Content);
    }
    let good = good.payload();
    for field in [16, 20, 24] {
        for lie in [u32::MAX, u32::MAX / 8 + 1, 257] {
            let mut bad = good.clone();
            bad[field..field + 4].copy_from_slice(&lie.to_be_bytes());
            assert!(matches!(unpack(&bad, 1), Err(DecodeError::Table(TableError::Lengths))));
        }
    }
    // Version 2 is for references.
    assert!(matches!(unpack(&Parts::default().payload(), 0), Err(DecodeError::Table(TableError::Lengths))));
}

#[test]
fn zip_bomb_few_bytes_that_stand_for_many_pages() {
    let most = 256;
    assert!(unpack(&Parts::new(&[&[UNCHANGED, 0, 0, most]], 256).payload(), 256 * 4104 + 7).is_ok());
    for count in [most + 1, 4096, 1 << 20, u64::from(u32::MAX)] {
        let error = refusal(&Parts::new(&[&[UNCHANGED, 0, 0, count]], 256));
        assert_eq!(error, TableError::TooMany, "{count}");
    }
    let twice = Parts::new(&[&[UNCHANGED, 0, 0, 256], &[COPIES & 0x7f, 0, 0, 1, 0, 0]], 256);
    assert_eq!(refusal(&twice), TableError::TooMany);
}

#[test]
fn masks_and_places_out_of_bounds() {
    for mask in [0, u32::MAX] {
        assert_eq!(refusal(&Parts::deltas(&[mask])), TableError::Mask);
    }
    let last = (1 << 52) - 1;
    for (operation, error) in [
        ([COPIES, 0, 0, 2, 0, last], TableError::PageIndex),
        ([COPIES, 0, 0, 1, 0, u64::MAX], TableError::PageIndex),
        ([COPIES, 0, 0, 1, 1, 0], TableError::Block(1)),
        ([COPIES, 0, 0, 1, u64::MAX, 0], TableError::Block(u64::MAX)),
        ([UNCHANGED, 0, last, 2, 0, 0], TableError::PageIndex),
    ] {
        assert_eq!(refusal(&Parts::new(&[&operation], 2)), error, "{operation:?}");
    }
}

#[test]
fn references_are_refused_where_they_were_not_agreed_on() {
    let payload = Parts::new(&[&[UNCHANGED, 0, 0, 1]], 1).payload();
    let refused =
        Decoder::new().decode_unverified(Codec::Raw, &payload, payload.len(), 4111, &mut Vec::new());
    assert_eq!(refused, Err(DecodeError::Table(TableError::Version(2))));
    let mut plain = payload.clone();
    plain[0] = 1;
    plain.drain(16..28);
    plain.truncate(plain.len() - 8);
    assert!(matches!(unpack(&plain, 4111), Err(DecodeError::Table(TableError::Operation(0x85)))));
}

/// A payload of version 2 that is mostly in order, over pages that are mostly held.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    let operation = (prop_oneof![2u64..8, 0x82u64..0x88], 0u64..3, 1u64..3, 0u64..6);
    let masks = vec(prop_oneof![8 => 1u32..16, 1 => any::<u32>()], 0..4);
    (vec(operation, 1..5), masks, 0usize..7, vec((any::<usize>(), any::<u8>()), 0..3)).prop_map(
        |(operations, masks, proofs, changes)| {
            let mut parts =
                Parts { lines: masks.iter().map(|m| m.count_ones() as usize).sum(), ..Parts::default() };
            let mut deltas = 0;
            for (code, gap, count, from) in operations {
                let mut operation = vec![code, 0, gap, count];
                if code & 0x7f == 6 {
                    operation.extend([0, from]);
                }
                deltas += if code & 0x7f == 7 { count as usize } else { 0 };
                parts.operations.push(operation);
            }
            // Held pages are all alike, so that some proofs are right.
            let hash = blake3::hash(&noise(1));
            let proof = std::array::from_fn(|n| hash.as_bytes()[n]);
            parts.proofs = vec![proof; proofs];
            parts.masks = masks;
            parts.masks.resize(deltas.max(1), 1);
            let mut payload = parts.payload();
            for (at, byte) in changes {
                let at = at % payload.len();
                payload[at] = byte;
            }
            payload
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn decoder_and_reference_agree_on_any_references(payload in any_payload(), slots in 1u32..8) {
        let mut model = Model::new(Some(slots));
        let mut sink = StreamSink::new(CacheSize::new(slots));
        for index in 0..4 {
            sink.pages(span(index), &[noise(1)]).unwrap();
            model.put(b"pc.ram", index.into(), noise(1).to_vec());
        }
        sink.out.clear();
        let slow = reference::records(&payload, &mut model);
        let stream_len = slow.as_ref().map_or(0, Vec::len);
        let fast = unpack(&payload, stream_len).ok().filter(|unpacked| unpacked.content().replay(&mut sink).is_ok());
        prop_assert_eq!(fast.is_some(), slow.is_some());
        if let Some(slow) = slow {
            prop_assert!(sink.out == slow);
        }
    }
}
