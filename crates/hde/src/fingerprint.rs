//! What the source remembers of a page: a keyed fingerprint of each of its lines, instead of its bytes.
//!
//! A line's fingerprint is the strongly universal hash "multilinear-HM" (D. Lemire, O. Kaser, *Strongly universal
//! string hashing is fast*, 2012): over the choice of the key, two given lines share it with probability 2⁻³².
//! The key is random and of one migration only, and a guest never sees a fingerprint, so it cannot prepare
//! lines that collide. A collision all the same would be caught by the page's [proof].

use std::array;

use dwcp_proto::limits::PAGE_SIZE;

/// Bytes of a line: what a delta counts in.
pub(crate) const LINE: usize = 128;

/// Lines of a page: one bit of a delta's mask each.
pub(crate) const LINES: usize = PAGE_SIZE / LINE;

/// Bytes of a page's proof.
pub(crate) const PROOF: usize = 8;

/// The fingerprints of a page's lines.
pub(crate) type Prints = [u32; LINES];

/// Words of the key for one line of 32-bit words, one more than there are words.
const KEY_WORDS: usize = LINE / 4 + 1;

/// The key of one migration.
#[derive(Clone)]
pub(crate) struct Key {
    line: [u64; KEY_WORDS],
    /// For the hash over a page's fingerprints.
    page: [u64; KEY_WORDS],
}

impl Key {
    /// The key that grows out of `seed`.
    pub(crate) fn new(seed: &[u8; 32]) -> Self {
        let mut stream =
            blake3::Hasher::new_derive_key("dwcp 2026-11 line fingerprints").update(seed).finalize_xof();
        let mut words = || {
            array::from_fn(|_| {
                let mut word = [0; 8];
                stream.fill(&mut word);
                u64::from_le_bytes(word)
            })
        };
        Key { line: words(), page: words() }
    }

    /// The fingerprints of a page.
    pub(crate) fn prints(&self, page: &[u8; PAGE_SIZE]) -> Prints {
        let (lines, _) = page.as_chunks::<LINE>();
        array::from_fn(|n| (multilinear(&self.line, pairs(&lines[n])) >> 32) as u32)
    }

    /// A hash over a page's fingerprints, by which its likes are found.
    pub(crate) fn page(&self, prints: &Prints) -> u64 {
        let (pairs, _) = prints.as_chunks::<2>();
        multilinear(&self.page, pairs.iter().map(|&[a, b]| (u64::from(a), u64::from(b))))
    }
}

/// The 32-bit words of a line, two by two.
fn pairs(line: &[u8; LINE]) -> impl Iterator<Item = (u64, u64)> {
    let (words, _) = line.as_chunks::<8>();
    words.iter().map(|&word| {
        let word = u64::from_le_bytes(word);
        (word & 0xffff_ffff, word >> 32)
    })
}

/// The sum whose high half is the hash.
fn multilinear(key: &[u64; KEY_WORDS], pairs: impl Iterator<Item = (u64, u64)>) -> u64 {
    let (first, rest) = (key[0], key[1..].as_chunks::<2>().0);
    rest.iter().zip(pairs).fold(first, |sum, (&[k, l], (a, b))| {
        sum.wrapping_add(k.wrapping_add(a).wrapping_mul(l.wrapping_add(b)))
    })
}

/// The lines in which two versions of a page differ, lowest bit first.
pub(crate) fn changed(old: &Prints, new: &Prints) -> u32 {
    old.iter().zip(new).zip(0..).fold(0, |mask, ((old, new), line)| mask | u32::from(old != new) << line)
}

/// The first bytes of a page's BLAKE3 hash: they travel with each page that is sent as a reference, and the
/// receiver holds what it puts together against them. The chunk's signature covers them.
pub(crate) fn proof(page: &[u8; PAGE_SIZE]) -> [u8; PROOF] {
    let hash = blake3::hash(page);
    array::from_fn(|n| hash.as_bytes()[n])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_changed_byte_shows_in_its_line_and_nowhere_else() {
        let key = Key::new(&[7; 32]);
        let page: [u8; PAGE_SIZE] = array::from_fn(|n| (n * 31 % 251) as u8);
        let prints = key.prints(&page);
        for at in 0..PAGE_SIZE {
            let mut other = page;
            other[at] ^= 1 << (at % 8);
            assert_eq!(changed(&prints, &key.prints(&other)), 1 << (at / LINE), "byte {at}");
            assert_ne!(key.page(&prints), key.page(&key.prints(&other)));
        }
    }

    #[test]
    fn another_seed_is_another_key() {
        let page = [0x55; PAGE_SIZE];
        assert_ne!(Key::new(&[1; 32]).prints(&page), Key::new(&[2; 32]).prints(&page));
    }

    #[test]
    fn the_sum_is_that_of_the_paper() {
        let key = Key::new(&[9; 32]);
        let line: [u8; LINE] = array::from_fn(|n| n as u8 ^ 0xa5);
        let words: Vec<u128> =
            line.chunks(4).map(|w| u128::from(u32::from_le_bytes(w.try_into().unwrap()))).collect();
        let k = |n: usize| u128::from(key.line[n]);
        let wide = (0..words.len() / 2).fold(k(0), |sum, i| {
            let product =
                ((k(2 * i + 1) + words[2 * i]) % (1 << 64)) * ((k(2 * i + 2) + words[2 * i + 1]) % (1 << 64));
            (sum + product % (1 << 64)) % (1 << 64)
        });
        assert_eq!(u128::from(multilinear(&key.line, pairs(&line))), wide);
    }
}
