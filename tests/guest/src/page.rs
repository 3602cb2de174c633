//! A page that knows what it must contain.
//!
//! The first four words are address tag, version, checksum of all the others, and kind; the rest looks like what real
//! guests keep in memory. Pages of the kind "zero" change between all zeros and almost all zeros.

/// Bytes of a page.
pub(crate) const SIZE: usize = 4096;
const WORDS: usize = SIZE / 8;
const HEADER: usize = 4;
const TAG: u64 = 0x6477_6370_0000_0000;

/// A small generator (SplitMix64): quality does not matter, speed under emulation does.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Which kinds of pages the memory is made of.
#[derive(Clone, Copy)]
pub(crate) enum Mix {
    /// A quarter of each kind.
    Mixed,
    /// One kind only.
    Only(Kind),
}

impl Mix {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "mixed" => Mix::Mixed,
            "random" => Mix::Only(Kind::Random),
            "text" => Mix::Only(Kind::Text),
            "pointers" => Mix::Only(Kind::Pointers),
            "zero" => Mix::Only(Kind::Zero),
            _ => return None,
        })
    }

    pub(crate) fn kind(self, index: u64) -> Kind {
        match self {
            Mix::Only(kind) => kind,
            Mix::Mixed => Kind::ALL[(mix(index) % 4) as usize],
        }
    }
}

/// What a page's content looks like.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Random,
    Text,
    Pointers,
    Zero,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Random, Kind::Text, Kind::Pointers, Kind::Zero];

    fn word(self, rng: &mut Rng) -> u64 {
        const TEXT: [&[u8; 8]; 8] = [
            b"memory, ",
            b"of the g",
            b"uest whi",
            b"ch runs ",
            b"on and o",
            b"n, page ",
            b"by page\n",
            b"and then",
        ];
        let random = rng.next();
        match self {
            Kind::Random => random,
            Kind::Text => u64::from_le_bytes(*TEXT[(random % 8) as usize]),
            Kind::Pointers if random.is_multiple_of(3) => 0,
            Kind::Pointers => 0x0000_7f3a_5c00_0000 + (random >> 48) * 16,
            Kind::Zero if random.is_multiple_of(64) => random >> 56,
            Kind::Zero => 0,
        }
    }
}

/// What a page must be, kept outside of it.
#[derive(Clone, Copy)]
pub(crate) struct Expected {
    version: u32,
    kind: Kind,
}

impl Expected {
    pub(crate) fn version(self) -> u64 {
        u64::from(self.version)
    }

    /// Whether this version of the page is all zeros.
    fn blank(self) -> bool {
        self.kind == Kind::Zero && self.version.is_multiple_of(2)
    }
}

/// One page of memory under test.
#[derive(Clone)]
#[repr(align(4096))]
pub(crate) struct Page([u64; WORDS]);

impl Page {
    pub(crate) const ZERO: Page = Page([0; WORDS]);

    pub(crate) fn fill(&mut self, index: u64, kind: Kind, rng: &mut Rng) -> Expected {
        let expected = Expected { version: 0, kind };
        if !expected.blank() {
            self.0[HEADER..].fill_with(|| kind.word(rng));
            self.seal(index, expected);
        }
        expected
    }

    /// Changes `bytes` bytes somewhere in the page, or turns a "zero" page over.
    pub(crate) fn rewrite(&mut self, index: u64, bytes: usize, expected: &mut Expected, rng: &mut Rng) {
        expected.version = expected.version.wrapping_add(1);
        if expected.blank() {
            self.0.fill(0);
            return;
        }
        let words = bytes.div_ceil(8).clamp(1, WORDS - HEADER);
        let start = HEADER + rng.below(WORDS - HEADER - words + 1);
        let kind = expected.kind;
        self.0[start..start + words].fill_with(|| kind.word(rng));
        self.seal(index, *expected);
    }

    /// Whether the page is whole, in its place, and of the version that it must have; says what is not so.
    pub(crate) fn check(&self, index: u64, expected: Expected) -> Result<(), &'static str> {
        if expected.blank() {
            return if self.0.iter().all(|&word| word == 0) { Ok(()) } else { Err("not-zero") };
        }
        if self.0[0] != TAG ^ index {
            Err("address")
        } else if self.0[1] != expected.version() {
            Err("version")
        } else if self.0[2] != self.checksum() {
            Err("checksum")
        } else {
            Ok(())
        }
    }

    /// The version that the page itself claims.
    pub(crate) fn version(&self) -> u64 {
        self.0[1]
    }

    fn seal(&mut self, index: u64, expected: Expected) {
        self.0[0] = TAG ^ index;
        self.0[1] = expected.version();
        self.0[3] = expected.kind as u64;
        self.0[2] = self.checksum();
    }

    fn checksum(&self) -> u64 {
        let fold = |sum: u64, &word: &u64| (sum.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
        self.0[3..].iter().fold(fold(fold(0, &self.0[0]), &self.0[1]), fold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of every kind after some rewrites, with what they must be.
    fn pages() -> Vec<(u64, Page, Expected)> {
        let mut rng = Rng::new(7);
        (0..64)
            .map(|index| {
                let mut page = Page::ZERO;
                let mut expected = page.fill(index, Mix::Mixed.kind(index), &mut rng);
                for _ in 0..index % 5 {
                    page.rewrite(index, 64, &mut expected, &mut rng);
                }
                (index, page, expected)
            })
            .collect()
    }

    #[test]
    fn an_untouched_page_is_right_and_any_flipped_bit_is_wrong() {
        for (index, page, expected) in pages() {
            assert_eq!(page.check(index, expected), Ok(()));
            for word in 0..WORDS {
                let mut torn = page.clone();
                torn.0[word] ^= 1 << (word % 64);
                assert!(torn.check(index, expected).is_err(), "page {index} word {word}");
            }
        }
    }

    #[test]
    fn an_older_version_or_another_page_is_wrong() {
        let mut rng = Rng::new(9);
        for (index, page, mut expected) in pages() {
            let blank = expected.blank();
            assert!(blank || page.check(index + 1, expected).is_err());
            page.clone().rewrite(index, 4096, &mut expected, &mut rng);
            assert!(page.check(index, expected).is_err());
        }
    }
}
