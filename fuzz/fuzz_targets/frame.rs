//! What a peer or a disk may hold outside of payloads: frame heads, messages, chunk headers, journals.
//! Parsing never panics, and what was understood is written again as it was meant.
#![no_main]

use dwcp_proto::ChunkHeader;
use dwcp_proto::frame::{HEAD_LEN, Head};
use dwcp_proto::journal;
use dwcp_proto::limits::MAX_HANDSHAKE;
use dwcp_proto::message::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let [which, bytes @ ..] = input else { return };
    match which % 5 {
        0 => head(bytes),
        1 => message(bytes),
        2 => chunk_header(bytes),
        3 => replay(bytes),
        _ => replay(&sealed(bytes)),
    }
});

fn head(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk::<HEAD_LEN>() else { return };
    if let Ok(head) = Head::parse(*bytes, MAX_HANDSHAKE) {
        assert_eq!(head.to_bytes(), *bytes);
        assert!(head.len as usize <= MAX_HANDSHAKE);
    }
}

fn message(bytes: &[u8]) {
    if let Ok(message) = Message::parse(bytes) {
        assert_eq!(Message::parse(&message.to_bytes()).as_ref(), Ok(&message));
    }
}

fn chunk_header(bytes: &[u8]) {
    let Some(bytes) = bytes.first_chunk() else { return };
    if let Ok(header) = ChunkHeader::parse(bytes) {
        assert_eq!(header.to_bytes(), *bytes);
    }
}

fn replay(bytes: &[u8]) {
    if let Ok(replay) = journal::replay(bytes) {
        assert!(replay.len as usize <= bytes.len());
        let again =
            journal::replay(&bytes[..replay.len as usize]).expect("the durable part of a good journal");
        assert_eq!(again.decisions(), replay.decisions());
    }
}

/// `bytes` as the bodies of a journal's lines, with the sums that make them whole.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut journal = Vec::new();
    let mut sum = [0; 32];
    for body in bytes.split(|byte| *byte == b'\n') {
        let hash = blake3::keyed_hash(&sum, body);
        sum = *hash.as_bytes();
        journal.extend_from_slice(body);
        journal.extend_from_slice(format!(",\"sum\":\"{}\"}}\n", hash.to_hex()).as_bytes());
    }
    journal
}
