//! What the benches in `benches/` measure with: page data like a guest's, and segments made of it.
//!
//! `cargo bench` runs them all; `cargo run --release -p dwcp-benches --example codecs -- FILE...` compares
//! codecs, levels and chunk sizes on page data of one's own.

use dwcp_hde::testing::SegmentBuilder;
use dwcp_proto::Segment;
use dwcp_proto::limits::PAGE_SIZE;
use dwcp_vmm::sim::StreamWriter;

/// A page of guest memory.
pub type Page = [u8; PAGE_SIZE];

/// A small generator of pseudo-random numbers (xorshift64*), so that runs compare.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that gives the same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A page that no codec can shorten.
    pub fn page(&mut self) -> Page {
        let mut page = [0; PAGE_SIZE];
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&self.number().to_le_bytes());
        }
        page
    }
}

/// `count` pages mixed like a busy guest's memory without its zero pages: half of it heap objects, three
/// eighths program and library text (this very program's file), one eighth encrypted or compressed.
pub fn guest_pages(count: usize) -> Vec<Page> {
    let mut random = Random::new(1);
    let program = program_pages();
    (0..count)
        .map(|i| match i % 8 {
            0 | 2 | 4 | 6 => heap_page(&mut random),
            1 => random.page(),
            _ if program.is_empty() => heap_page(&mut random),
            _ => program[i % program.len()],
        })
        .collect()
}

/// Segments as a source would cut them from `pages`: full pages of one block, `per_segment` in each.
pub fn segments(pages: &[Page], per_segment: usize) -> Vec<Segment> {
    let mut index = 0;
    let mut offset = 0;
    pages
        .chunks(per_segment)
        .map(|pages| {
            let mut builder = SegmentBuilder::new();
            for page in pages {
                builder.page(b"pc.ram", index, page);
                index += 1;
            }
            let segment = builder.finish(offset);
            offset = segment.end().0;
            segment
        })
        .collect()
}

/// A stream of QEMU's with one RAM section of so many pages; every second stretch of 32 is zero.
pub fn guest_stream(pages: usize) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    writer.ram_start([(&b"pc.ram"[..], (pages * PAGE_SIZE) as u64)].into_iter());
    writer.ram_part(false);
    for (index, page) in (0..).zip(&guest_pages(pages)) {
        let zero = index / 32 % 2 == 1;
        writer.page(b"pc.ram", index, if zero { &[0; PAGE_SIZE] } else { page });
    }
    writer.section_end();
    writer.take()
}

/// Objects of a heap: pointers into a small range, lengths, small numbers, short strings, and free space.
fn heap_page(random: &mut Random) -> Page {
    const WORDS: [&[u8; 8]; 4] = [b"session:", b"timeout\0", b"/var/lib", b"2026-11-"];
    let mut page = [0; PAGE_SIZE];
    for object in page.chunks_exact_mut(64) {
        let kind = random.number();
        if kind.is_multiple_of(4) {
            continue;
        }
        for (field, place) in object.chunks_exact_mut(8).zip(0u32..) {
            let number = random.number();
            let value = match (kind >> (place * 2)) % 4 {
                0 => 0x0000_7f3a_0000_0000 | (number & 0xf_fff0),
                1 => number & 0xff,
                2 => u64::from_le_bytes(*WORDS[number as usize % 4]),
                _ => 0,
            };
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
    page
}

/// The pages of this program's file, zero pages left out.
fn program_pages() -> Vec<Page> {
    let file = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    file.as_chunks().0.iter().filter(|page| **page != [0; PAGE_SIZE]).take(2048).copied().collect()
}
