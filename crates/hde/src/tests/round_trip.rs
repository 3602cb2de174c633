//! What goes in comes out, and is counted.

use bytes::Bytes;
use dwcp_proto::limits::{MAX_CHUNK_PAGES_BYTES, MAX_RAW_PAYLOAD, MAX_SEGMENT_RECORDS, PAGE_SIZE};
use dwcp_proto::{
    Codec, EncodedChunk, Lane, NodeKey, NodeName, PageIndex, PageVersion, Payload, RamBlockId, Record,
    SealedChunk, Sealer, Segment, SessionId, StreamOffset, Verifier,
};

use crate::testing::SegmentBuilder;
use crate::{Choice, Decoder, EncodeError, Encoded, Encoder, Fallback, Item, verbatim};

const CHOICES: [Choice; 5] =
    [Choice::Raw, Choice::Lz4, Choice::Zstd(-1), Choice::Zstd(3), Choice::Sampled(1)];

pub(super) fn noise(seed: u64) -> [u8; PAGE_SIZE] {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
}

pub(super) fn text(seed: u64) -> [u8; PAGE_SIZE] {
    let words = [b"precopy ", b"dirty   ", b"round 7 ", b"downtime"];
    let noise = noise(seed);
    std::array::from_fn(|i| words[usize::from(noise[i / 8]) % 4][i % 8])
}

fn mixed() -> SegmentBuilder {
    let mut builder = SegmentBuilder::new().continuing(b"pc.ram");
    builder.page(b"pc.ram", 3, &text(1)).page(b"pc.ram", 4, &[0; PAGE_SIZE]).page(b"pc.ram", 5, &noise(2));
    builder.zero(b"pc.ram", 6).zero(b"pc.ram", 7).zero(b"pc.ram", 1 << 40);
    builder.opaque(b"end of section, start of section");
    builder.page(b"/rom@etc/acpi/tables", 0, &text(3)).zero(b"pc.bios", 0).page(b"", 9, &text(4));
    builder.opaque(&[7]).opaque(&[8, 9]);
    builder
}

fn encode(segment: &Segment, choice: Choice) -> (Encoded, Vec<u8>) {
    let mut payload = vec![0xee; 99];
    let encoded = Encoder::new().encode(segment, choice, &mut payload).unwrap();
    (encoded, payload)
}

fn assert_round_trip(segment: &Segment, choice: Choice) -> (Encoded, Vec<u8>) {
    let (encoded, payload) = encode(segment, choice);
    let mut out = b"before".to_vec();
    let raw_len = encoded.raw_len as usize;
    Decoder::new()
        .decode_unverified(encoded.codec, &payload, raw_len, segment.bytes.len(), &mut out)
        .unwrap();
    assert_eq!(&out[..6], b"before");
    assert_eq!(out[6..], segment.bytes);
    assert!(payload.len() <= raw_len);
    (encoded, payload)
}

#[test]
fn every_kind_of_record_comes_back() {
    let segment = mixed().finish(77);
    for choice in CHOICES {
        let (encoded, payload) = assert_round_trip(&segment, choice);
        let stats = encoded.stats;
        assert_eq!((stats.pages, stats.blank_pages, stats.zero_pages, stats.opaque_bytes), (4, 1, 4, 35));
        assert_eq!(stats.stream_bytes, segment.bytes.len() as u64);
        assert_eq!(stats.payload_bytes, payload.len() as u64);
    }
}

#[test]
fn a_chunk_goes_from_sealing_to_decoding() {
    let segment = mixed().finish(77);
    let (encoded, payload) = encode(&segment, Choice::Zstd(1));
    let key = NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[1; 32]);
    let session = SessionId([9; 32]);
    let mut sealer = Sealer::new(session);
    let stream_len = segment.bytes.len() as u32;
    let sealed = sealer.seal(
        &key,
        EncodedChunk::new(
            encoded.codec,
            Lane(0),
            segment.version,
            segment.offset,
            stream_len,
            encoded.raw_len,
            payload,
        ),
    );
    let end = sealer.seal_end(&key);
    let verifier = Verifier::new(session, key.public());
    let verified = |chunk: SealedChunk| {
        verifier.header(chunk.signed_header()).unwrap().payload(chunk.payload()).unwrap()
    };
    let mut out = Vec::new();
    Decoder::new().decode(&verified(sealed), &mut out).unwrap();
    assert_eq!(out, segment.bytes);
    assert!(Decoder::new().decode(&verified(end), &mut out).is_err());
}

#[test]
fn verbatim_the_stream_is_a_part_of_the_chunk() {
    let segment = mixed().finish(77);
    let (head, stats) = verbatim(&segment);
    assert_eq!((stats.pages, stats.zero_pages, stats.opaque_bytes), (5, 4, 35));
    let payload = Payload::new(head.into(), segment.bytes.clone());
    assert_eq!(stats.payload_bytes, payload.len() as u64);
    let key = NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[1; 32]);
    let (raw, stream) = (payload.len() as u32, segment.bytes.len() as u32);
    let chunk = EncodedChunk::new(Codec::Raw, Lane(0), segment.version, segment.offset, stream, raw, payload);
    let sealed = Sealer::new(SessionId([9; 32])).seal(&key, chunk);
    let signed = Verifier::new(SessionId([9; 32]), key.public()).header(sealed.signed_header()).unwrap();
    let verified = signed.payload(sealed.payload()).unwrap();
    let out = Decoder::new().stream(&verified).unwrap();
    assert_eq!(out, segment.bytes);
    assert_eq!(out.as_ptr_range().end, verified.payload().as_ptr_range().end);

    // A chunk with pages comes back as well, in a buffer of its own.
    let (encoded, payload) = encode(&segment, Choice::Raw);
    let chunk = EncodedChunk::new(
        encoded.codec,
        Lane(0),
        segment.version,
        segment.offset,
        stream,
        encoded.raw_len,
        payload,
    );
    let sealed = Sealer::new(SessionId([9; 32])).seal(&key, chunk);
    let signed = Verifier::new(SessionId([9; 32]), key.public()).header(sealed.signed_header()).unwrap();
    let verified = signed.payload(sealed.payload()).unwrap();
    assert_eq!(Decoder::new().stream(&verified).unwrap(), segment.bytes);
}

#[test]
fn the_items_are_what_was_put_in() {
    let segment = mixed().finish(0);
    let (encoded, payload) = encode(&segment, Choice::Zstd(1));
    let mut decoder = Decoder::new();
    let unpacked = decoder
        .unpack_unverified(encoded.codec, &payload, encoded.raw_len as usize, segment.bytes.len())
        .unwrap();
    let content = unpacked.content();
    assert_eq!(
        content.names().collect::<Vec<_>>(),
        [&b""[..], b"/rom@etc/acpi/tables", b"pc.bios", b"pc.ram"]
    );
    let mut seen = Vec::new();
    for item in content.items() {
        match item {
            Item::Opaque(bytes) => seen.push(format!("opaque {}", bytes.len())),
            Item::Pages(run, pages) => {
                assert_eq!(run.count as usize, pages.len());
                let name = String::from_utf8_lossy(content.name(run.block).unwrap()).into_owned();
                for (page, index) in pages.iter().zip(run.first.0..) {
                    let known = [text(1), noise(2), text(3), text(4)].iter().position(|p| p == page).unwrap();
                    seen.push(format!("page {name} {index} = {known}"));
                }
            }
            Item::Zeros(run) => seen.push(format!("zeros {} {}+{}", run.block, run.first, run.count)),
            Item::Blanks(run) => seen.push(format!("blanks {} {}+{}", run.block, run.first, run.count)),
            other => panic!("{other:?} without a memory"),
        }
    }
    assert_eq!(
        seen,
        [
            "page pc.ram 3 = 0",
            "blanks 3 4+1",
            "page pc.ram 5 = 1",
            "zeros 3 6+2",
            "zeros 3 1099511627776+1",
            "opaque 32",
            "page /rom@etc/acpi/tables 0 = 2",
            "zeros 2 0+1",
            "page  9 = 3",
            "opaque 1",
            "opaque 2",
        ]
    );
}

#[test]
fn the_greatest_segments_fit() {
    let mut pages = SegmentBuilder::new();
    for index in 0..(MAX_CHUNK_PAGES_BYTES / PAGE_SIZE) as u64 {
        pages.page(b"pc.ram", index * 2, &noise(index));
    }
    let mut zeros = SegmentBuilder::new();
    for index in 0..MAX_SEGMENT_RECORDS as u64 {
        zeros.zero(b"pc.ram", index * (1 << 40));
    }
    let opaque =
        Segment::opaque(StreamOffset(0), Bytes::from(vec![5; MAX_CHUNK_PAGES_BYTES]), PageVersion(0));
    for segment in [pages.finish(0), zeros.finish(0), opaque] {
        for choice in CHOICES {
            let (encoded, _) = assert_round_trip(&segment, choice);
            assert!(encoded.raw_len as usize <= MAX_RAW_PAYLOAD);
        }
    }
}

#[test]
fn a_run_of_zero_pages_costs_next_to_nothing() {
    let mut builder = SegmentBuilder::new();
    for index in 0..MAX_SEGMENT_RECORDS as u64 {
        builder.zero(b"pc.ram", index);
    }
    let (encoded, _) = assert_round_trip(&builder.finish(0), Choice::Raw);
    assert!(encoded.raw_len < 32, "{} bytes", encoded.raw_len);
}

#[test]
fn an_empty_segment_is_a_header() {
    let segment = Segment::opaque(StreamOffset(0), Bytes::new(), PageVersion(0));
    assert_eq!(assert_round_trip(&segment, Choice::Raw).0.raw_len, 16);
}

#[test]
fn what_does_not_compress_goes_raw_and_says_why() {
    let mut builder = SegmentBuilder::new();
    for index in 0..64 {
        builder.page(b"pc.ram", index, &noise(index));
    }
    let segment = builder.finish(0);
    let outcome = |choice| {
        let (encoded, _) = assert_round_trip(&segment, choice);
        (encoded.codec, encoded.fallback)
    };
    assert_eq!(outcome(Choice::Raw), (Codec::Raw, None));
    assert_eq!(outcome(Choice::Lz4), (Codec::Raw, Some(Fallback::NoGain)));
    assert_eq!(outcome(Choice::Zstd(3)), (Codec::Raw, Some(Fallback::NoGain)));
    assert_eq!(outcome(Choice::Sampled(1)), (Codec::Raw, Some(Fallback::Incompressible)));
}

#[test]
fn the_sample_sees_a_few_pages_of_text_among_noise() {
    let mut builder = SegmentBuilder::new();
    for index in 0..256 {
        builder.page(b"pc.ram", index, &if index % 8 == 3 { text(index) } else { noise(index) });
    }
    assert_eq!(assert_round_trip(&builder.finish(0), Choice::Sampled(1)).0.codec, Codec::Zstd);
}

#[test]
fn a_chunk_of_hardly_any_content_is_compressed_for_its_table() {
    let mut builder = SegmentBuilder::new();
    for index in 0..1000 {
        builder.zero(b"pc.ram", index * 2);
    }
    let (encoded, payload) = assert_round_trip(&builder.finish(0), Choice::Sampled(1));
    assert_eq!((encoded.codec, encoded.fallback), (Codec::Zstd, None));
    assert!(payload.len() < 100, "{} bytes", payload.len());
}

#[test]
fn an_index_that_does_not_give_the_bytes_is_refused() {
    let good = mixed().finish(5);
    let refusal = |spoil: &dyn Fn(&mut Segment)| {
        let mut bad = good.clone();
        spoil(&mut bad);
        Encoder::new().encode(&bad, Choice::Raw, &mut Vec::new()).unwrap_err()
    };
    let mismatch = |record| EncodeError::Mismatch { offset: StreamOffset(5), record };
    let run = |segment: &mut Segment, at: usize, spoil: &dyn Fn(&mut dwcp_proto::Run)| {
        if let Record::Pages(run) | Record::Zeros(run) = &mut segment.records[at] {
            spoil(run);
        }
    };
    assert_eq!(refusal(&|s| s.bytes = s.bytes.slice(1..)), mismatch(0));
    assert_eq!(refusal(&|s| s.bytes = s.bytes.slice(..s.bytes.len() - 1)), mismatch(8));
    assert_eq!(refusal(&|s| s.records.truncate(8)), mismatch(8));
    assert_eq!(refusal(&|s| run(s, 0, &|r| r.first = PageIndex(2))), mismatch(0));
    assert_eq!(refusal(&|s| run(s, 0, &|r| r.first = PageIndex(u64::MAX))), mismatch(0));
    assert_eq!(refusal(&|s| run(s, 0, &|r| r.count = 0)), mismatch(0));
    assert_eq!(refusal(&|s| run(s, 0, &|r| r.continued = false)), mismatch(0));
    assert_eq!(refusal(&|s| run(s, 4, &|r| r.block = RamBlockId(0))), mismatch(4));
    assert_eq!(refusal(&|s| run(s, 4, &|r| r.block = RamBlockId(99))), mismatch(4));
    // A zero record whose fill byte is none, as QEMU could write: the source has to pass it on as opaque
    // bytes.
    let mut bytes = good.bytes.to_vec();
    let first_zero = 3 * (8 + PAGE_SIZE) + 8;
    bytes[first_zero] = 1;
    assert_eq!(refusal(&|s| s.bytes = Bytes::from(bytes.clone())), mismatch(1));
}

#[test]
fn overlap_a_page_that_comes_back_is_refused() {
    for second in [4, 3] {
        let mut builder = SegmentBuilder::new();
        builder.page(b"pc.ram", 4, &text(1)).page(b"pc.bios", 4, &text(1)).zero(b"pc.ram", second);
        assert_eq!(
            Encoder::new().encode(&builder.finish(0), Choice::Raw, &mut Vec::new()),
            Err(EncodeError::Order { offset: StreamOffset(0), record: 2 })
        );
    }
}

#[test]
fn more_than_a_chunk_holds_is_refused() {
    let segment = |records, bytes: usize| Segment {
        records,
        ..Segment::opaque(StreamOffset(0), Bytes::from(vec![0; bytes]), PageVersion(0))
    };
    let run = |count| dwcp_proto::Run { block: RamBlockId(0), first: PageIndex(0), count, continued: true };
    let refusal = |segment: Segment| match Encoder::new().encode(&segment, Choice::Raw, &mut Vec::new()) {
        Err(EncodeError::TooLarge { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal(segment(vec![], 2 << 20)), "bytes");
    assert_eq!(refusal(segment(vec![Record::Zeros(run(u32::MAX)); 3], 9)), "records");
    assert_eq!(refusal(segment(vec![Record::Pages(run(257))], 9)), "pages");
}

#[test]
fn a_worker_takes_no_memory_once_it_is_warm() {
    let segment = mixed().finish(0);
    let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
    let (mut payload, mut out) = (Vec::new(), Vec::new());
    let mut places = Vec::new();
    for _ in 0..3 {
        for choice in [Choice::Zstd(1), Choice::Raw] {
            let encoded = encoder.encode(&segment, choice, &mut payload).unwrap();
            out.clear();
            let raw_len = encoded.raw_len as usize;
            decoder
                .decode_unverified(encoded.codec, &payload, raw_len, segment.bytes.len(), &mut out)
                .unwrap();
        }
        places.push((payload.as_ptr(), payload.capacity(), out.as_ptr(), out.capacity()));
    }
    assert_eq!(places[0], places[1]);
    assert_eq!(places[1], places[2]);
}
