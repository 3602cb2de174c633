//! Payloads that a signing but hostile source could send, by the names that the fault catalogue gives them.
//! Each is refused before the decoder takes memory for what it promises.

use dwcp_proto::Codec;
use dwcp_proto::limits::{MAX_RAW_PAYLOAD, MAX_SEGMENT_BYTES, MAX_SEGMENT_RECORDS, MAX_WIRE_PAYLOAD};

use crate::format::write_varint;
use crate::zstd_frame::tests::compress;
use crate::{DecodeError, Decoder, FrameError, TableError};

/// A raw payload from its parts.
fn payload(names: &[&[u8]], operations: &[&[u64]], opaque: &[u8], pages: usize) -> Vec<u8> {
    let mut table = Vec::new();
    for name in names {
        table.push(name.len() as u8);
        table.extend_from_slice(name);
    }
    for operation in operations {
        table.push(operation[0] as u8);
        operation[1..].iter().for_each(|&number| write_varint(number, &mut table));
    }
    let mut payload = vec![1, 0];
    payload.extend_from_slice(&(names.len() as u16).to_be_bytes());
    for len in [table.len(), opaque.len(), pages] {
        payload.extend_from_slice(&(len as u32).to_be_bytes());
    }
    payload.extend_from_slice(&table);
    payload.extend_from_slice(opaque);
    payload.resize(payload.len() + pages * 4096, 0x77);
    payload
}

/// The refusal of a payload; nothing was written and no memory taken for it.
fn refusal(codec: Codec, payload: &[u8], raw_len: usize, stream_len: usize) -> DecodeError {
    let mut decoder = Decoder::new();
    let mut out = Vec::new();
    let refusal = decoder.decode_unverified(codec, payload, raw_len, stream_len, &mut out).unwrap_err();
    assert_eq!(out.capacity(), 0);
    assert_eq!(decoder.memory(), 0);
    refusal
}

fn table_refusal(payload: &[u8], stream_len: usize) -> TableError {
    let mut out = Vec::new();
    match Decoder::new().decode_unverified(Codec::Raw, payload, payload.len(), stream_len, &mut out) {
        Err(DecodeError::Table(error)) => {
            assert_eq!(out.capacity(), 0);
            error
        }
        other => panic!("{other:?}"),
    }
}

const RAM: &[&[u8]] = &[b"pc.ram"];
const PAGES: u64 = 0x02;
const ZEROS: u64 = 0x03;
const BLANKS: u64 = 0x04;

#[test]
fn zip_bomb() {
    // Promises over the limit, whatever the codec.
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        for (raw_len, stream_len) in [(MAX_RAW_PAYLOAD + 1, 1), (1, MAX_SEGMENT_BYTES + 1), (usize::MAX, 1)] {
            assert!(matches!(refusal(codec, &[0; 64], raw_len, stream_len), DecodeError::Length { .. }));
        }
    }
    let wire = vec![0; MAX_WIRE_PAYLOAD + 1];
    assert!(matches!(refusal(Codec::Raw, &wire, 1, 1), DecodeError::Length { what: "wire length", .. }));
    // A frame that holds more than was announced; a block that could never give that much.
    let bomb = compress(&vec![0; 1 << 30], 1);
    assert!(bomb.len() < 128 << 10);
    assert_eq!(
        refusal(Codec::Zstd, &bomb, 1 << 20, 1 << 20),
        DecodeError::Frame(FrameError::ContentSize(1 << 30))
    );
    assert!(matches!(refusal(Codec::Lz4, &[0; 64], 1 << 20, 1), DecodeError::Length { .. }));
    // A frame that announces little and holds much.
    let mut liar = compress(&vec![0; 1 << 20], 1);
    assert_eq!(liar[4] >> 6, 2, "content size of four bytes");
    let content_size = if liar[4] & 0x20 == 0 { 6 } else { 5 };
    liar[content_size..content_size + 4].copy_from_slice(&1000u32.to_le_bytes());
    let mut decoder = Decoder::new();
    let mut out = Vec::new();
    let refused = decoder.decode_unverified(Codec::Zstd, &liar, 1000, 1000, &mut out);
    assert_eq!(refused, Err(DecodeError::Corrupt { codec: Codec::Zstd, raw_len: 1000 }));
    assert!(decoder.memory() <= 1000);
    let block = lz4_flex::block::compress(&[0; 100_000]);
    let refused = decoder.decode_unverified(Codec::Lz4, &block, 1000, 1000, &mut out);
    assert_eq!(refused, Err(DecodeError::Corrupt { codec: Codec::Lz4, raw_len: 1000 }));
    // Few bytes of table that stand for much stream.
    let most = MAX_SEGMENT_RECORDS as u64;
    for operation in [[ZEROS, 0, 0, most + 1], [ZEROS, 0, 0, u64::from(u32::MAX)], [BLANKS, 0, 0, 257]] {
        let bomb = payload(RAM, &[&operation], b"", 0);
        assert_eq!(table_refusal(&bomb, MAX_SEGMENT_BYTES), TableError::TooMany);
    }
    let zeros = &[ZEROS, 0, 0, most / 2 + 1][..];
    assert_eq!(table_refusal(&payload(RAM, &[zeros, zeros], b"", 0), 18 * 2049), TableError::TooMany);
    let repeated = [&[BLANKS, 0, 0, 200][..]; 100];
    assert_eq!(table_refusal(&payload(RAM, &repeated, b"", 0), MAX_SEGMENT_BYTES), TableError::TooMany);
}

#[test]
fn len_overflow() {
    // Each length of the header, as great as it goes.
    let good = payload(RAM, &[&[PAGES | 0x80, 0, 5, 1]], b"", 1);
    for field in [4, 8, 12] {
        for lie in [u32::MAX, u32::MAX / 4096 + 1, good.len() as u32, 0] {
            let mut bad = good.clone();
            if bad[field..field + 4] == lie.to_be_bytes() {
                continue;
            }
            bad[field..field + 4].copy_from_slice(&lie.to_be_bytes());
            assert_eq!(table_refusal(&bad, 4111), TableError::Lengths);
        }
    }
    let mut bad = good.clone();
    bad[2..4].copy_from_slice(&u16::MAX.to_be_bytes());
    assert_eq!(table_refusal(&bad, 4111), TableError::Lengths);
    // Numbers in the table.
    for (operation, error) in [
        (&[1, u64::MAX][..], TableError::TooMany),
        (&[1, MAX_SEGMENT_BYTES as u64 + 1], TableError::TooMany),
        (&[ZEROS, 0, u64::MAX, 1], TableError::PageIndex),
        (&[ZEROS, 0, 1, u64::MAX], TableError::PageIndex),
        (&[ZEROS, 0, 0, 1 << 33], TableError::TooMany),
        (&[ZEROS, u64::MAX, 0, 1], TableError::Block(u64::MAX)),
        (&[ZEROS, 65_536, 0, 1], TableError::Block(65_536)),
        (&[ZEROS, 1, 0, 1], TableError::Block(1)),
    ] {
        assert_eq!(table_refusal(&payload(RAM, &[operation], b"", 0), 100), error, "{operation:?}");
    }
}

#[test]
fn dict_id() {
    let frame = compress(&[5; 100], 1);
    for (flag, len) in [(1, 1), (2, 2), (3, 4)] {
        let mut named = frame.clone();
        named[4] |= flag;
        named.splice(5..5, vec![7; len]);
        assert_eq!(refusal(Codec::Zstd, &named, 100, 100), DecodeError::Frame(FrameError::Dictionary));
    }
}

#[test]
fn zstd_window() {
    // The same frame with a window descriptor in place of the single-segment flag: 2 MiB is the most.
    let frame = compress(&vec![5; 1 << 20], 1);
    assert_eq!(frame[4], 0x80, "window descriptor, content size of four bytes");
    let with_window = |descriptor: u8| {
        let mut frame = frame.clone();
        frame[5] = descriptor;
        frame
    };
    let mut out = Vec::new();
    let legal = Decoder::new().decode_unverified(Codec::Zstd, &with_window(11 << 3), 1 << 20, 1, &mut out);
    assert!(matches!(legal, Err(DecodeError::Table(_))), "{legal:?}");
    for descriptor in [11 << 3 | 1, 12 << 3, 31 << 3 | 7] {
        assert!(matches!(
            refusal(Codec::Zstd, &with_window(descriptor), 1 << 20, 1),
            DecodeError::Frame(FrameError::Window(_))
        ));
    }
}

#[test]
fn more_or_less_than_one_frame() {
    let frame = compress(&[5; 100], 1);
    let refused = |frame: &[u8]| refusal(Codec::Zstd, frame, 100, 100);
    assert_eq!(refused(&[&frame[..], &frame[..]].concat()), DecodeError::Frame(FrameError::NotOneFrame));
    assert_eq!(refused(&frame[..frame.len() - 1]), DecodeError::Frame(FrameError::NotOneFrame));
    // A skippable frame in front.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0][..], &frame[..]].concat();
    assert_eq!(refused(&skippable), DecodeError::Frame(FrameError::NotAFrame));
    let mut no_size = compress(&vec![5; 1 << 20], 1);
    no_size[4] &= 0x3f;
    assert_eq!(refusal(Codec::Zstd, &no_size, 1 << 20, 1), DecodeError::Frame(FrameError::NoContentSize));
}

#[test]
fn unknown_codec() {
    for number in 4..=255 {
        assert_eq!(Codec::from_wire(number), None);
    }
}

#[test]
fn unknown_version_and_operation() {
    let mut bad = payload(&[], &[], b"", 0);
    bad[0] = 3;
    assert_eq!(table_refusal(&bad, 0), TableError::Version(3));
    (bad[0], bad[1]) = (1, 1);
    assert_eq!(table_refusal(&bad, 0), TableError::Version(1));
    let known = [0x01, 0x02, 0x03, 0x04, 0x82, 0x83, 0x84];
    for code in (0..=255).filter(|code| !known.contains(code)) {
        let bad = payload(RAM, &[&[u64::from(code), 0, 0, 1]], b"", 0);
        assert_eq!(table_refusal(&bad, 17), TableError::Operation(code));
    }
}

#[test]
fn overlap() {
    // The gaps of one block only ever add up, so a page can come twice only under two entries of one name.
    let operations: [&[u64]; 2] = [&[ZEROS | 0x80, 0, 3, 1], &[ZEROS | 0x80, 1, 3, 1]];
    let stream_len = 2 * (8 + 1 + 6 + 1);
    assert_eq!(
        table_refusal(&payload(&[b"pc.ram", b"pc.ram"], &operations, b"", 0), stream_len),
        TableError::Names
    );
    assert_eq!(
        table_refusal(&payload(&[b"pc.ram", b"pc.abc"], &operations, b"", 0), stream_len),
        TableError::Names
    );
}

#[test]
fn oob_page() {
    // The last page that a record word can hold, and the one after it.
    let last = (1 << 52) - 1;
    let good = payload(RAM, &[&[ZEROS | 0x80, 0, last, 1]], b"", 0);
    let mut out = Vec::new();
    Decoder::new().decode_unverified(Codec::Raw, &good, good.len(), 16, &mut out).unwrap();
    assert_eq!(out[..8], (u64::MAX << 12 | 0x02).to_be_bytes());
    for operations in [&[&[ZEROS | 0x80, 0, last, 2][..]][..], &[&[ZEROS, 0, last, 1], &[ZEROS, 0, 0, 1]]] {
        assert_eq!(table_refusal(&payload(RAM, operations, b"", 0), 25), TableError::PageIndex);
    }
}

#[test]
fn a_table_that_does_not_fit_its_content() {
    let page: &[u64] = &[PAGES, 0, 0, 1];
    let opaque: &[u64] = &[0x01, 3];
    for (operations, content, pages) in [
        (&[page][..], &b""[..], 0),
        (&[page], b"", 2),
        (&[page], b"x", 1),
        (&[opaque], b"ab", 0),
        (&[opaque], b"abcd", 0),
        (&[], b"", 1),
    ] {
        assert_eq!(table_refusal(&payload(RAM, operations, content, pages), 4104), TableError::Content);
    }
    let good = payload(RAM, &[page, opaque], b"abc", 1);
    for stream_len in [4104 + 2, 4104 + 4, 0] {
        let error = TableError::StreamLength { actual: 4107, announced: stream_len };
        assert_eq!(table_refusal(&good, stream_len), error);
    }
    assert_eq!(table_refusal(&[&good[..], &[0]].concat(), 4107), TableError::Lengths);
    assert_eq!(table_refusal(&good[..good.len() - 1], 4107), TableError::Lengths);
    assert_eq!(table_refusal(&[], 0), TableError::Lengths);
}

#[test]
fn a_malformed_table() {
    assert_eq!(table_refusal(&payload(RAM, &[&[ZEROS, 0, 0, 0]], b"", 0), 0), TableError::Empty);
    assert_eq!(table_refusal(&payload(RAM, &[&[0x01, 0]], b"", 0), 0), TableError::Empty);
    assert_eq!(table_refusal(&payload(RAM, &[&[ZEROS, 0, 0]], b"", 0), 9), TableError::Number);
    // A continued record belongs to the block before it: anything else would be read otherwise from the
    // stream.
    let two: &[&[u8]] = &[b"a", b"b"];
    let swap = payload(two, &[&[ZEROS | 0x80, 0, 0, 1], &[ZEROS, 1, 0, 1]], b"", 0);
    assert_eq!(table_refusal(&swap, 20), TableError::Continues);
    // A name that reaches past the table.
    let mut cut = payload(RAM, &[], b"", 0);
    cut[16] = 7;
    assert_eq!(table_refusal(&cut, 0), TableError::Names);
    cut[16] = 6;
    cut[3] = 2;
    assert_eq!(table_refusal(&cut, 0), TableError::Names);
}
