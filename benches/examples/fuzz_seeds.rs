//! Writes a small corpus for each fuzz target into `fuzz/corpus`, made by the product's own writers:
//! `cargo run --release -p dwcp-benches --example fuzz_seeds`. It is built here, with the workspace, because the
//! fuzz crate stands outside of it and would build everything once more.

use std::path::Path;
use std::{fs, io};

use dwcp_hde::testing::SegmentBuilder;
use dwcp_hde::{Choice, Encoder, Holding, LaneEncoder, LaneWindow, Layers, Memory, Written};
use dwcp_proto::frame::Head;
use dwcp_proto::journal::{self, Chain, Entry, Note};
use dwcp_proto::limits::MIN_LANE_WINDOW;
use dwcp_proto::message::{Ack, Body, Hello, Message, Offer, Ping};
use dwcp_proto::{EncodedChunk, Lane, NodeKey, NodeName, PageVersion, Sealer, SessionId, StreamOffset};
use dwcp_vmm::sim::{Scatter, StreamWriter, Style};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (target, seeds) in [
        ("stream_parse", streams()),
        ("multifd_merge", channels()),
        ("chunk_decode", chunks()),
        ("chunk_replay", references()),
        ("lane_decode", lanes()),
        ("frame", frames()),
    ] {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder)?;
        for (seed, n) in seeds.iter().zip(0..) {
            fs::write(folder.join(format!("seed-{n}")), seed)?;
        }
        println!("{}: {} seeds", folder.display(), seeds.len());
    }
    Ok(())
}

/// Migrations over two channels, in frames as the target takes them apart, behind the three bytes that say how they are read.
fn channels() -> Vec<Vec<u8>> {
    let mut stream = StreamWriter::new();
    stream.header();
    stream.configuration("pc-q35-10.0");
    stream.ram_start([(&b"pc.ram"[..], 1 << 16), (b"pc.bios", 1 << 13)].into_iter());
    for round in 1..3 {
        stream.ram_part(round == 2);
        (0..4).for_each(|index| stream.page(b"pc.ram", index, &[round * (index % 2) as u8; 4096]));
        stream.page(b"pc.bios", 0, &[round; 4096]);
        stream.flush_record();
        stream.section_end();
    }
    stream.device("cpu", b"state");
    stream.eof("{}");
    let stream = stream.take();
    let seed = |style| {
        let scattered = Scatter::new(2, style).feed(&stream);
        let wires = std::iter::once(&scattered.main).chain(&scattered.channels);
        let mut seed = vec![1, 255, 128];
        for (wire, n) in wires.zip(0..) {
            for bytes in wire.chunks(usize::from(u16::MAX)) {
                seed.push(n);
                seed.extend_from_slice(&(bytes.len() as u16).to_be_bytes());
                seed.extend_from_slice(bytes);
            }
        }
        seed
    };
    Style::ALL.into_iter().map(seed).collect()
}

/// Streams behind the three bytes that say how they are cut.
fn streams() -> Vec<Vec<u8>> {
    let page = [0x5a; 4096];
    let mut begin = StreamWriter::new();
    begin.header();
    begin.configuration("pc-q35-10.0");
    begin.subsection("configuration/uuid", &[7; 16]);
    begin.command(2, &1u32.to_be_bytes());
    begin.ram_start([(&b"pc.ram"[..], 1 << 16), (b"pc.bios", 1 << 13)].into_iter());
    let mut zeros = begin.clone();
    zeros.ram_part(false);
    (0..12).for_each(|index| zeros.page(b"pc.ram", index, &[0; 4096]));
    zeros.flush_record();
    zeros.section_end();
    let mut pages = begin.clone();
    pages.ram_part(false);
    pages.page(b"pc.ram", 0, &page);
    pages.page(b"pc.bios", 1, &[0; 4096]);
    pages.page(b"pc.ram", 0, &[0; 4096]);
    pages.section_end();
    pages.ram_part(true);
    pages.section_end();
    pages.raw(b"\x04\0\0\0\x09\x03fdc\0\0\0\0\0\0\0\x01");
    [begin, zeros, pages]
        .into_iter()
        .flat_map(|mut stream| {
            let stream = stream.take();
            [[16, 255, 0], [16, 1, 3]].map(|how| [&how[..], &stream].concat())
        })
        .collect()
}

/// Payloads of every codec behind the bytes that say what a header would announce.
fn chunks() -> Vec<Vec<u8>> {
    let mut small = SegmentBuilder::new();
    small.zero(b"pc.ram", 1).zero(b"pc.ram", 2).opaque(b"opaque").zero(b"pc.bios", 9);
    let mut large = SegmentBuilder::new().continuing(b"pc.ram");
    large.page(b"pc.ram", 3, &[0; 4096]).page(b"pc.ram", 4, &[1; 4096]).opaque(b"x").zero(b"/rom", 1 << 40);
    let mut seeds = Vec::new();
    for segment in [small.finish(0), large.finish(0)] {
        for (how, choice) in [(0, Choice::Raw), (1, Choice::Lz4), (2, Choice::Zstd(1))] {
            let mut payload = Vec::new();
            let Ok(encoded) = Encoder::new().encode(&segment, choice, &mut payload) else { continue };
            let raw_len = encoded.raw_len.to_le_bytes();
            let stream_len = (segment.bytes.len() as u32).to_le_bytes();
            seeds.push([&[how], &raw_len[..3], &stream_len[..3], &payload].concat());
        }
    }
    seeds
}

/// Chunks of a lane, each behind its payload's length and what a header would announce: of one frame, and of two.
fn lanes() -> Vec<Vec<u8>> {
    let lane_of = |levels: &[i32]| -> Option<Vec<u8>> {
        let mut encoder = Encoder::new();
        let mut lane = Some(LaneEncoder::new(LaneWindow::new(MIN_LANE_WINDOW)?));
        let mut seed = Vec::new();
        for (level, n) in levels.iter().zip(0..) {
            let mut pages = SegmentBuilder::new();
            pages.zero(b"pc.ram", n).page(b"pc.ram", n + 1, &[1; 4096]).opaque(b"like the one before");
            let segment = pages.finish(0);
            let mut payload = Vec::new();
            let reading = encoder.read(&segment, None).ok()?;
            let Written::Gathered(gathered) = reading.write_or_gather(Choice::Zstd(*level), &mut payload)
            else {
                return None;
            };
            let encoded = gathered.write(&mut encoder, &mut lane, &mut payload);
            seed.extend((payload.len() as u16).to_be_bytes());
            seed.extend(&encoded.raw_len.to_le_bytes()[..3]);
            seed.extend(&(segment.bytes.len() as u32).to_le_bytes()[..3]);
            seed.extend(&payload);
        }
        Some(seed)
    };
    [&[3, 3, 3][..], &[1, 1, 3]].into_iter().filter_map(lane_of).collect()
}

/// Payloads with references of every kind to pages 0 to 3, behind the size of the cache and what these hold.
fn references() -> Vec<Vec<u8>> {
    const HELD: [u8; 4096] = [0x77; 4096];
    let mut memory = Memory::new(Layers::ALL, Holding::Blocks(vec![b"pc.ram"[..].into()]), &[1; 32], 1 << 20);
    let (mut encoder, mut payload) = (Encoder::new(), Vec::new());
    let mut held = SegmentBuilder::new();
    (0..4).for_each(|index| {
        held.page(b"pc.ram", index, &HELD);
    });
    let mut again = SegmentBuilder::new();
    let mut changed = HELD;
    changed[200] = 1;
    again.page(b"pc.ram", 0, &HELD).page(b"pc.ram", 1, &changed).page(b"pc.ram", 4, &HELD).zero(b"pc.ram", 5);
    let mut write = |segment| -> Option<Vec<u8>> {
        encoder.read(&segment, Some(&mut memory)).ok()?.write(Choice::Raw, &mut payload);
        Some([&[7, HELD[0]], &payload[..]].concat())
    };
    [write(held.finish(0)), write(again.finish(0))].into_iter().flatten().collect()
}

/// Heads, messages, chunk headers and journals behind the byte that says which.
fn frames() -> Vec<Vec<u8>> {
    let mut seeds = vec![[&[0], &Head::CHUNK.to_bytes()[..]].concat()];
    let bodies = [
        Body::Hello(Hello { offer: Some(Offer::default()), ..Hello::default() }),
        Body::Ack(Ack::default()),
        Body::Ping(Ping { token: 7 }),
    ];
    seeds.extend(bodies.map(|body| [&[1], &Message::from(body).to_bytes()[..]].concat()));
    if let Ok(name) = NodeName::new("hv-01") {
        let key = NodeKey::from_seed(name, &[1; 32]);
        let payload = bytes::Bytes::from_static(b"payload");
        let chunk = EncodedChunk::new(
            dwcp_proto::Codec::Raw,
            Lane(0),
            PageVersion(0),
            StreamOffset(0),
            7,
            7,
            payload,
        );
        let mut sealer = Sealer::new(SessionId([9; 32]));
        for chunk in [sealer.seal(&key, chunk), sealer.seal_end(&key)] {
            seeds.push([&[2], &chunk.header().to_bytes()[..]].concat());
        }
    }
    let mut chain = Chain::default();
    let mut lines = Vec::new();
    for entry in [Entry::Note(Note::new("phase", "precopy")), Entry::Starting { run: true }, Entry::Running] {
        if let Ok(line) = journal::encode(&entry, 1_764_547_200_000, &chain) {
            lines.push(line.text);
            chain = line.next;
        }
    }
    seeds.push([&[3], lines.concat().as_bytes()].concat());
    // The same without the sums, which the target adds.
    let bodies: Vec<_> = lines.iter().filter_map(|line| Some(line.split_once(",\"sum\"")?.0)).collect();
    seeds.push([&[4], bodies.join("\n").as_bytes()].concat());
    seeds
}
