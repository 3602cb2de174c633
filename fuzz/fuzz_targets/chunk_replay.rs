//! Any payload with references against any cache: the decoder and the slow reference deliver the same bytes or both
//! refuse.
#![no_main]

use dwcp_hde::testing::reference::{self, Model};
use dwcp_hde::{CacheSize, Decoder, Sink, Span, StreamSink};
use dwcp_proto::{Codec, PageIndex};
use libfuzzer_sys::fuzz_target;

/// Pages that are held at the start.
const HELD: u64 = 4;

fuzz_target!(|input: &[u8]| {
    let [slots, fill, payload @ ..] = input else { return };
    let slots = u32::from(*slots % 8) + 1;
    let page = [*fill; 4096];
    let mut model = Model::new(Some(slots));
    let mut sink = StreamSink::new(CacheSize::new(slots));
    for index in 0..HELD {
        let span = Span { block: b"pc.ram", first: PageIndex(index), count: 1, named: false };
        let Ok(()) = sink.pages(span, &[page]);
        model.put(b"pc.ram", index.into(), page.to_vec());
    }
    sink.out.clear();
    let expected = reference::records(payload, &mut model);
    let stream_len = expected.as_ref().map_or(0, Vec::len);
    let unpacked = Decoder::new().unpack_unverified(Codec::Raw, payload, payload.len(), stream_len);
    let delivered = unpacked.is_ok_and(|unpacked| unpacked.content().replay(&mut sink).is_ok());
    match expected {
        Some(stream) if payload.len() <= dwcp_proto::limits::MAX_WIRE_PAYLOAD => {
            assert!(delivered && sink.out == stream, "the reference gives other bytes");
        }
        _ => assert!(!delivered, "the reference refuses this"),
    }
});
