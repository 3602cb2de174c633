//! Whether a chunk is worth compressing, from a small sample of all of it.
//!
//! Encrypted and compressed memory is the case worth finding: no codec gains anything there, and its bytes
//! are as good as uniform. Uniform bytes have the least possible sum of squared counts; the sum found is held
//! against it. It is an integer test that sees a few per cent of anything else in the chunk, and takes some 3
//! % of the time of zstd's fastest levels on ordinary pages.

use std::array;

use dwcp_proto::limits::PAGE_SIZE;

/// Bytes looked at in each page.
const SNIPPET: usize = 256;

/// Tables that are counted in.
const TURNS: usize = 4;

/// Samples below this say too little.
const MIN_SAMPLE: u64 = 4096;

/// Whether the content looks as if no codec could gain from it.
pub(crate) fn incompressible<'a>(content: impl Iterator<Item = &'a [u8]>) -> bool {
    // Taken in turns: where bytes are alike each count would wait for the one before it.
    let mut counts = [[0u32; 256]; TURNS];
    // The place within the page wanders, so that structures with a fixed place in each page are met.
    for (page, index) in content.flat_map(|slice| slice.chunks(PAGE_SIZE)).zip(0usize..) {
        let snippets = page.len() / SNIPPET;
        let start = if snippets == 0 { 0 } else { index * 7 % snippets * SNIPPET };
        let (groups, rest) = page[start..page.len().min(start + SNIPPET)].as_chunks::<TURNS>();
        for group in groups {
            for (counts, &byte) in counts.iter_mut().zip(group) {
                counts[usize::from(byte)] += 1;
            }
        }
        for &byte in rest {
            counts[0][usize::from(byte)] += 1;
        }
    }
    let counts: [u32; 256] = array::from_fn(|byte| counts.iter().map(|counts| counts[byte]).sum());
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    let squares: u64 = counts.iter().map(|&count| u64::from(count).pow(2)).sum();
    // Uniform bytes are expected to give total²/256 + total. A sixteenth more than that is an entropy
    // of at least 7.9 bits a byte: an order-0 coder could save 1 %.
    let uniform = total * total / 256 + total;
    total >= MIN_SAMPLE && squares <= uniform + uniform / 16
}
