//! Lanes: what goes in comes out, in one order only; and whatever arrives, the decoder and the slow one agree.

use dwcp_proto::limits::{MAX_LANE_WINDOW, MAX_RAW_PAYLOAD, MIN_LANE_WINDOW};
use dwcp_proto::{
    Codec, EncodedChunk, Lane, NodeKey, NodeName, PageVersion, Sealer, Segment, SessionId, StreamOffset,
    Verifier,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::round_trip::{noise, text};
use crate::testing::SegmentBuilder;
use crate::testing::reference::{self, Model};
use crate::{
    Choice, DecodeError, Encoder, FrameError, LaneDecoder, LaneEncoder, LaneError, LaneWindow, TableError,
    Written,
};

fn window() -> LaneWindow {
    LaneWindow::new(MIN_LANE_WINDOW).unwrap()
}

/// A chunk of a lane, and what has to come out of it.
#[derive(Debug, Clone)]
struct Sent {
    payload: Vec<u8>,
    raw_len: usize,
    stream: Vec<u8>,
}

/// A source with a lane.
struct Source {
    encoder: Encoder,
    lane: Option<LaneEncoder>,
}

impl Source {
    fn new() -> Self {
        Source { encoder: Encoder::new(), lane: Some(LaneEncoder::new(window())) }
    }

    fn send(&mut self, segment: &Segment, level: i32) -> Sent {
        let mut payload = Vec::new();
        let reading = self.encoder.read(segment, None).unwrap();
        let Written::Gathered(gathered) = reading.write_or_gather(Choice::Zstd(level), &mut payload) else {
            panic!("it goes into the lane");
        };
        let encoded = gathered.write(&mut self.encoder, &mut self.lane, &mut payload);
        assert_eq!(encoded.codec, Codec::Lane);
        Sent { payload, raw_len: encoded.raw_len as usize, stream: segment.bytes.to_vec() }
    }
}

/// Pages, of which those with the same number are alike.
fn pages(contents: &[u64]) -> Segment {
    let mut builder = SegmentBuilder::new();
    for (&content, index) in contents.iter().zip(0..) {
        builder.page(b"pc.ram", index, &if content < 100 { noise(content) } else { text(content) });
    }
    builder.finish(0)
}

fn open(lane: &mut LaneDecoder, sent: &Sent) -> Result<Vec<u8>, DecodeError> {
    let content = lane.open_unverified(&sent.payload, sent.raw_len, sent.stream.len())?;
    let mut out = Vec::new();
    content.replay(&mut out).unwrap();
    Ok(out)
}

#[test]
fn a_chunk_finds_its_like_in_the_chunks_before() {
    let mut source = Source::new();
    let first = source.send(&pages(&[1, 2, 3]), 3);
    let second = source.send(&pages(&[3, 2, 1]), 3);
    assert!(first.payload.len() > 3 * 4000, "noise");
    assert!(second.payload.len() < 500, "{}", second.payload.len());
    let mut lane = LaneDecoder::new(window());
    assert_eq!(open(&mut lane, &first).unwrap(), first.stream);
    assert_eq!(open(&mut lane, &second).unwrap(), second.stream);
}

#[test]
fn only_what_comes_next_is_decoded() {
    let mut source = Source::new();
    let sent: Vec<Sent> = (0..4).map(|n| source.send(&pages(&[n, n + 1]), 3)).collect();
    let position = |lane: &mut LaneDecoder, n: usize| match open(lane, &sent[n]) {
        Err(DecodeError::Lane(LaneError::Position { position, expected })) => (position, expected),
        other => panic!("{other:?}"),
    };
    // Missing from the start; missing in between; twice; late.
    assert_eq!(position(&mut LaneDecoder::new(window()), 1), (1, 0));
    for (wrong, expected) in [(3, 2), (1, 2)] {
        let mut lane = LaneDecoder::new(window());
        open(&mut lane, &sent[0]).unwrap();
        open(&mut lane, &sent[1]).unwrap();
        assert_eq!(position(&mut lane, wrong), (wrong as u32, expected));
        // A refusal is the end of a frame: nothing is decoded against a window that may be wrong.
        assert_eq!(position(&mut lane, 2), (2, 0));
    }
}

#[test]
fn another_level_begins_a_frame_and_so_does_a_new_lane() {
    let mut source = Source::new();
    let mut lane = LaneDecoder::new(window());
    for level in [3, 3, 1, 1, 5, 3] {
        let sent = source.send(&pages(&[7, 8, 100]), level);
        assert_eq!(open(&mut lane, &sent).unwrap(), sent.stream);
    }
    let sent = Source::new().send(&pages(&[7]), 3);
    assert_eq!(open(&mut lane, &sent).unwrap(), sent.stream);
}

#[test]
fn a_lane_that_is_gone_leaves_chunks_that_stand_alone() {
    let mut encoder = Encoder::new();
    let segment = pages(&[100, 101]);
    let mut payload = Vec::new();
    let Written::Gathered(gathered) =
        encoder.read(&segment, None).unwrap().write_or_gather(Choice::Sampled(3), &mut payload)
    else {
        panic!("it goes into the lane");
    };
    let encoded = gathered.write(&mut encoder, &mut None, &mut payload);
    let mut alone = Vec::new();
    let expected = Encoder::new().encode(&segment, Choice::Sampled(3), &mut alone).unwrap();
    assert_eq!((encoded, payload), (expected, alone));
}

#[test]
fn noise_and_cheap_levels_stay_out_of_the_lane() {
    for (segment, choice) in [
        (pages(&(0..64).collect::<Vec<_>>()), Choice::Sampled(3)),
        (pages(&[100]), Choice::Sampled(-1)),
        (pages(&[100]), Choice::Lz4),
        (pages(&[100]), Choice::Raw),
    ] {
        let (mut encoder, mut payload) = (Encoder::new(), Vec::new());
        let written = encoder.read(&segment, None).unwrap().write_or_gather(choice, &mut payload);
        assert!(matches!(written, Written::Done(encoded) if encoded.codec != Codec::Lane));
    }
}

#[test]
fn lane_window_too_large() {
    let mut source =
        Source { lane: LaneWindow::new(2 * MIN_LANE_WINDOW).map(LaneEncoder::new), ..Source::new() };
    let sent = source.send(&pages(&[1]), 3);
    let mut lane = LaneDecoder::new(window());
    assert_eq!(
        open(&mut lane, &sent).unwrap_err(),
        DecodeError::Frame(FrameError::Window(2 * MIN_LANE_WINDOW))
    );
    for bytes in [0, 1, MIN_LANE_WINDOW / 2, MIN_LANE_WINDOW + 1, MAX_LANE_WINDOW * 2, u64::MAX] {
        assert_eq!(LaneWindow::new(bytes), None);
    }
}

#[test]
fn lane_header_with_a_dictionary_a_content_size_or_a_checksum() {
    let sent = Source::new().send(&pages(&[1]), 3);
    assert_eq!(sent.payload[8], 0, "the frame's descriptor");
    for (descriptor, error) in [
        (0x01, FrameError::Dictionary),
        (0x03, FrameError::Dictionary),
        (0x04, FrameError::NotAFrame),
        (0x08, FrameError::NotAFrame),
        (0x20, FrameError::NotAFrame),
        (0x40, FrameError::NotAFrame),
    ] {
        let mut spoiled = sent.clone();
        spoiled.payload[8] = descriptor;
        let refusal = open(&mut LaneDecoder::new(window()), &spoiled).unwrap_err();
        assert_eq!(refusal, DecodeError::Frame(error), "{descriptor:#x}");
    }
}

#[test]
fn lane_cut_off_or_too_long() {
    let mut source = Source::new();
    let first = source.send(&pages(&[1, 100]), 3);
    let second = source.send(&pages(&[2, 100]), 3);
    for sent in [&first, &second] {
        for len in [0, 3, 4, 5, 9, 10, sent.payload.len() / 2, sent.payload.len() - 1] {
            let mut lane = LaneDecoder::new(window());
            if sent.payload[3] == 1 {
                open(&mut lane, &first).unwrap();
            }
            let cut = Sent { payload: sent.payload[..len].to_vec(), ..sent.clone() };
            assert!(open(&mut lane, &cut).is_err(), "{len}");
        }
        for raw_len in [0, 1, sent.raw_len - 1, sent.raw_len + 1, MAX_RAW_PAYLOAD] {
            let mut lane = LaneDecoder::new(window());
            if sent.payload[3] == 1 {
                open(&mut lane, &first).unwrap();
            }
            let lying = Sent { raw_len, ..sent.clone() };
            let refusal = open(&mut lane, &lying).unwrap_err();
            assert_eq!(refusal, DecodeError::Corrupt { codec: Codec::Lane, raw_len });
        }
    }
    let mut lane = LaneDecoder::new(window());
    let lying = Sent { raw_len: MAX_RAW_PAYLOAD + 1, ..first };
    assert!(matches!(open(&mut lane, &lying), Err(DecodeError::Length { what: "raw length", .. })));
}

#[test]
fn lane_whose_frame_ends() {
    // An empty last block behind the chunk's.
    let mut sent = Source::new().send(&pages(&[1]), 3);
    sent.payload.extend([1, 0, 0]);
    let refusal = open(&mut LaneDecoder::new(window()), &sent).unwrap_err();
    assert_eq!(refusal, DecodeError::Corrupt { codec: Codec::Lane, raw_len: sent.raw_len });
}

#[test]
fn lane_of_another_number_or_where_there_is_none() {
    let sent = Source::new().send(&pages(&[1]), 3);
    let key = NodeKey::from_seed(NodeName::new("a").unwrap(), &[1; 32]);
    let chunk = |lane| {
        let id = SessionId([7; 32]);
        let chunk = EncodedChunk::new(
            Codec::Lane,
            Lane(lane),
            PageVersion(0),
            StreamOffset(0),
            sent.stream.len() as u32,
            sent.raw_len as u32,
            sent.payload.clone(),
        );
        let sealed = Sealer::new(id).seal(&key, chunk);
        let header = Verifier::new(id, key.public()).header(sealed.signed_header()).unwrap();
        header.payload(sealed.payload()).unwrap()
    };
    let mut lane = LaneDecoder::new(window());
    assert_eq!(lane.open(&chunk(1)).unwrap_err(), DecodeError::Lane(LaneError::Lane(1)));
    assert!(lane.open(&chunk(0)).is_ok());
    let refusal = crate::Decoder::new().unpack(&chunk(0)).unwrap_err();
    assert_eq!(refusal, DecodeError::Lane(LaneError::None));
}

#[test]
fn a_table_is_checked_in_a_lane_as_everywhere() {
    let sent = Source::new().send(&pages(&[1]), 3);
    let refusal =
        LaneDecoder::new(window()).open_unverified(&sent.payload, sent.raw_len, 5).map(drop).unwrap_err();
    assert!(matches!(refusal, DecodeError::Table(TableError::StreamLength { announced: 5, .. })));
}

fn any_pages() -> impl Strategy<Value = Segment> {
    vec(prop_oneof![0u64..6, 100u64..104], 1..4).prop_map(|contents| pages(&contents))
}

/// What becomes of a lane on the way: which chunk is altered, where, and how.
fn any_change() -> impl Strategy<Value = (usize, usize, u8)> {
    (0usize..6, prop_oneof![4 => 0usize..24, 1 => any::<usize>()], any::<u8>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn what_goes_into_a_lane_comes_out(segments in vec((any_pages(), prop_oneof![4 => Just(3), 1 => Just(1)]), 1..6)) {
        let (mut source, mut lane) = (Source::new(), LaneDecoder::new(window()));
        for (segment, level) in segments {
            let sent = source.send(&segment, level);
            prop_assert!(open(&mut lane, &sent).unwrap() == sent.stream);
        }
    }

    /// Chunks altered, left out, sent twice, and in another order.
    #[test]
    fn decoder_and_reference_agree_on_any_lane(
        segments in vec((any_pages(), prop_oneof![4 => Just(3), 1 => Just(1)]), 1..4),
        changes in vec(any_change(), 0..2),
        order in vec(0usize..4, 1..5),
        in_order in any::<bool>(),
    ) {
        let mut source = Source::new();
        let mut sent: Vec<Sent> = segments.iter().map(|(segment, level)| source.send(segment, *level)).collect();
        for (which, at, byte) in changes {
            if let Some(sent) = sent.get_mut(which) {
                let at = at % sent.payload.len();
                sent.payload[at] = byte;
            }
        }
        let order = if in_order { (0..sent.len()).collect() } else { order };
        let (mut lane, mut slow) = (LaneDecoder::new(window()), reference::Lane::default());
        let log = MIN_LANE_WINDOW.trailing_zeros();
        for sent in order.into_iter().filter_map(|which| sent.get(which)) {
            let expected = slow.replay(&sent.payload, sent.raw_len, sent.stream.len(), log, &mut Model::new(None));
            let opened = lane.open_unverified(&sent.payload, sent.raw_len, sent.stream.len());
            let opened = opened.ok().and_then(|content| {
                let mut out = Vec::new();
                content.replay(&mut out).ok().map(|()| out)
            });
            prop_assert!(opened == expected);
            // After a refusal the session is over.
            if expected.is_none() {
                break;
            }
        }
    }
}
