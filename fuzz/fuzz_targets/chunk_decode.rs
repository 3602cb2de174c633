//! Any payload under any announced lengths: the decoder and the slow reference give the same bytes or both
//! refuse.
#![no_main]

use dwcp_hde::Decoder;
use dwcp_hde::testing::reference::{self, Model};
use dwcp_proto::Codec;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [how, r0, r1, r2, s0, s1, s2, payload @ ..] = input else { return };
    let codec = match how % 4 {
        1 => Codec::Lz4,
        2 => Codec::Zstd,
        // Most of what can go wrong lies in the table: half of the inputs go there without a codec in
        // between.
        _ => Codec::Raw,
    };
    let raw_len = match codec {
        Codec::Raw => payload.len(),
        Codec::Lz4 | Codec::Zstd | Codec::Lane => u32::from_le_bytes([*r0, *r1, *r2, 0]) as usize,
    };
    let announced = u32::from_le_bytes([*s0, *s1, *s2, 0]) as usize;
    check(codec, payload, raw_len, announced);
    // The length that the records give: with any other nearly everything would be refused in the end.
    if codec == Codec::Raw
        && payload.first() == Some(&1)
        && let Some(stream) = reference::records(payload, &mut Model::new(None))
    {
        check(codec, payload, raw_len, stream.len());
    }
});

fn check(codec: Codec, payload: &[u8], raw_len: usize, stream_len: usize) {
    let expected = reference::decode(codec, payload, raw_len, stream_len);
    let mut out = Vec::new();
    match Decoder::new().decode_unverified(codec, payload, raw_len, stream_len, &mut out) {
        Ok(()) => assert!(expected.as_ref() == Some(&out), "the reference gives other bytes"),
        Err(error) => {
            assert!(expected.is_none(), "the reference accepts this: {error}");
            assert!(out.is_empty());
        }
    }
}
