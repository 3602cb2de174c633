//! What content would take on the wire, without a stream around it: for predictions.

use dwcp_proto::limits::PAGE_SIZE;

use crate::codec::Compressor;
use crate::encode::Choice;
use crate::fingerprint::{Key, LINE, Prints, changed};
use crate::memory::MAX_CHANGED;
use crate::sample;

/// Bytes that a delta takes beside its lines: what names the page, its proof and the mask.
const DELTA_HEAD: usize = 16;

/// Weighs content, as the encoder of a chunk would meet it.
pub struct Scales {
    compressor: Compressor,
}

impl Scales {
    /// Scales without memory yet.
    pub fn new() -> Self {
        Scales { compressor: Compressor::new() }
    }

    /// Bytes that pages take as one chunk, without what names them.
    pub fn weigh(&mut self, pages: &[u8], choice: Choice) -> usize {
        let compressed = match choice {
            Choice::Raw => None,
            Choice::Sampled(_) if sample::incompressible(std::iter::once(pages)) => None,
            Choice::Sampled(level) | Choice::Zstd(level) => self.compressor.zstd(pages, level),
            Choice::Lz4 => self.compressor.lz4(pages),
        };
        compressed.map_or(pages.len(), |bytes| bytes.len().min(pages.len()))
    }
}

impl Default for Scales {
    fn default() -> Self {
        Self::new()
    }
}

/// A page as a delta would see it: what fits into little memory and tells its lines from those of a later version.
#[derive(Clone)]
pub struct Glance(Prints);

/// Makes glances; those of one are comparable.
pub struct Glances(Key);

impl Glances {
    /// `seed` is random and used once.
    pub fn new(seed: &[u8; 32]) -> Self {
        Glances(Key::new(seed))
    }

    /// Takes a page in.
    pub fn of(&self, page: &[u8; PAGE_SIZE]) -> Glance {
        Glance(self.0.prints(page))
    }
}

impl Glance {
    /// Whether the page that `later` was made of is another one than ours.
    pub fn differs(&self, later: &Glance) -> bool {
        changed(&self.0, &later.0) != 0
    }

    /// Puts into `out` what a delta from our page to `page`, of which `later` was made, holds: the lines that differ, or all of it where
    /// these are many. Returns the bytes that the delta takes beside.
    pub fn delta(&self, later: &Glance, page: &[u8; PAGE_SIZE], out: &mut Vec<u8>) -> usize {
        let mask = changed(&self.0, &later.0);
        if mask.count_ones() > MAX_CHANGED {
            out.extend_from_slice(page);
            return DELTA_HEAD;
        }
        for (n, line) in page.chunks(LINE).enumerate() {
            if mask & (1 << n) != 0 {
                out.extend_from_slice(line);
            }
        }
        DELTA_HEAD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn like_content_is_light_and_noise_is_not() {
        let mut scales = Scales::new();
        let text = b"the same words again ".repeat(4000);
        assert!(scales.weigh(&text, Choice::INTERNET) < text.len() / 20);
        assert_eq!(scales.weigh(&text, Choice::Raw), text.len());
        let mut state = 1u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
        .take(64 << 10)
        .collect();
        assert_eq!(scales.weigh(&noise, Choice::INTERNET), noise.len());
    }

    #[test]
    fn a_glance_sees_the_lines_that_changed() {
        let glances = Glances::new(&[7; 32]);
        let mut page = [3; PAGE_SIZE];
        let before = glances.of(&page);
        assert!(!before.differs(&glances.of(&page)));
        (page[5], page[LINE * 9]) = (0, 0);
        let later = glances.of(&page);
        assert!(before.differs(&later));
        let mut lines = Vec::new();
        before.delta(&later, &page, &mut lines);
        assert_eq!(lines.len(), 2 * LINE);
        lines.clear();
        before.delta(&glances.of(&[0; PAGE_SIZE]), &[0; PAGE_SIZE], &mut lines);
        assert_eq!(lines.len(), PAGE_SIZE);
    }
}
