//! Any bytes from a VMM, in any chunking, come out as segments that hold exactly these bytes, whose index
//! serialises back to them, and which encode and decode to them.
#![no_main]

use dwcp_hde::{Choice, Decoder, Encoder};
use dwcp_vmm::stream::{Cutter, content, serialise};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [target, step, flush, stream @ ..] = input else { return };
    let mut cutter = Cutter::new(usize::from(*target) << 12);
    let mut check = Check { encoder: Encoder::new(), decoder: Decoder::new(), rest: stream };
    for (piece, count) in stream.chunks(usize::from(*step) * 16 + 1).zip(1u32..) {
        let mut piece = piece;
        while !piece.is_empty() {
            piece = &piece[cutter.feed(piece)..];
            check.segments(&mut cutter);
        }
        if *flush > 0 && count.is_multiple_of(u32::from(*flush)) {
            cutter.flush();
            check.segments(&mut cutter);
        }
    }
    cutter.finish();
    check.segments(&mut cutter);
    assert!(check.rest.is_empty(), "{} bytes never came out", check.rest.len());
});

struct Check<'a> {
    encoder: Encoder,
    decoder: Decoder,
    /// What has to come out yet.
    rest: &'a [u8],
}

impl Check<'_> {
    fn segments(&mut self, cutter: &mut Cutter) {
        while let Some(segment) = cutter.pop() {
            self.rest =
                self.rest.strip_prefix(&segment.bytes[..]).expect("the stream's bytes in their order");
            let content = content(&segment).expect("an index that fits its bytes");
            let again =
                serialise(&segment.records, &segment.names, &content).expect("records within the limits");
            assert!(again == segment.bytes);
            let mut payload = Vec::new();
            let encoded = self
                .encoder
                .encode(&segment, Choice::Raw, &mut payload)
                .expect("a segment within the limits");
            let mut out = Vec::new();
            let (raw_len, stream_len) = (encoded.raw_len as usize, segment.bytes.len());
            self.decoder
                .decode_unverified(encoded.codec, &payload, raw_len, stream_len, &mut out)
                .expect("our own payload");
            assert!(out == segment.bytes);
        }
    }
}
