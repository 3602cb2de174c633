//! Any chunks of a lane, one after the other: the decoder and the slow reference give the same bytes or both refuse, and then no
//! chunk but one that begins a frame goes on.
#![no_main]

use dwcp_hde::testing::reference::{self, Model};
use dwcp_hde::{CacheSize, LaneDecoder, LaneWindow, StreamSink};
use dwcp_proto::limits::MIN_LANE_WINDOW;
use libfuzzer_sys::fuzz_target;

/// The reference decompresses the whole frame anew for each.
const MAX_CHUNKS: usize = 6;
/// Pages that the receiver holds of what came.
const SLOTS: u32 = 8;

fuzz_target!(|input: &[u8]| {
    let Some(window) = LaneWindow::new(MIN_LANE_WINDOW) else { return };
    let (mut lane, mut reference) = (LaneDecoder::new(window), reference::Lane::default());
    let (mut sink, mut model) = (StreamSink::new(CacheSize::new(SLOTS)), Model::new(Some(SLOTS)));
    let mut rest = input;
    for _ in 0..MAX_CHUNKS {
        let [l0, l1, r0, r1, r2, s0, s1, s2, after @ ..] = rest else { return };
        let len = usize::from(u16::from_be_bytes([*l0, *l1])).min(after.len());
        let (payload, others) = after.split_at(len);
        rest = others;
        let raw_len = u32::from_le_bytes([*r0, *r1, *r2, 0]) as usize;
        let stream_len = u32::from_le_bytes([*s0, *s1, *s2, 0]) as usize;
        let log = MIN_LANE_WINDOW.trailing_zeros();
        let expected = reference.replay(payload, raw_len, stream_len, log, &mut model);
        sink.out.clear();
        let opened = lane.open_unverified(payload, raw_len, stream_len);
        let delivered = opened.is_ok_and(|content| content.replay(&mut sink).is_ok());
        match expected {
            Some(stream) => assert!(delivered && sink.out == stream, "the reference gives other bytes"),
            None => {
                assert!(!delivered, "the reference refuses this");
                // The session ends here.
                return;
            }
        }
    }
});
