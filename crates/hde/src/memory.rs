//! The source's side of *unchanged*, *dedup* and *delta*: what the receiver holds, as fingerprints.
//!
//! A reference names content *as of the stream before its own record*. The receiver applies records in the
//! stream's order, and so has to be asked in that order: [`Memory`] passes from segment to segment in the order
//! in which they are sent, whatever is in flight.

mod store;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{BlockNames, PageIndex, RamBlockId};

use crate::fingerprint::{Key, LINES, changed};
use crate::held::{CacheSize, home};
use store::{Owner, Store};

/// A page with more changed lines than this goes whole: it compresses better in one piece, and its lines would save
/// little.
pub(crate) const MAX_CHANGED: u32 = LINES as u32 * 5 / 8;

/// Which layers beside compression are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    /// Full-page records of pages that are all zero lose their content.
    pub zero: bool,
    /// A page that is sent again but did not change is named only.
    pub unchanged: bool,
    /// A page with the content of another page is a reference to it.
    pub dedup: bool,
    /// A page that is sent again is the lines that changed.
    pub delta: bool,
}

impl Layers {
    /// All of them.
    pub const ALL: Layers = Layers { zero: true, unchanged: true, dedup: true, delta: true };
    /// What needs no knowledge of the receiver.
    pub const ZERO: Layers = Layers { zero: true, unchanged: false, dedup: false, delta: false };

    /// Whether any of them refers to what the receiver holds.
    pub fn refer(self) -> bool {
        self.unchanged || self.dedup || self.delta
    }
}

/// What the receiver holds and serves as reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holding {
    /// Every page of these blocks that was sent: its sink writes to the guest's RAM, and reads it.
    Blocks(Vec<Box<[u8]>>),
    /// A [`Cache`](crate::Cache) of this size.
    Cache(CacheSize),
}

/// How a page is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Whole,
    Unchanged,
    /// Its content is that of this page.
    Copy(RamBlockId, PageIndex),
    /// Only these lines changed; neither none nor many.
    Delta(u32),
}

/// What the receiver holds, as the source knows it. One per stretch of stream that a receiver applies in order;
/// when it starts anew, so does this.
///
/// It takes 3.3 % of the memory that it remembers, in steps as pages are sent; zero pages cost nothing. Pages
/// beyond the limit are sent whole and counted.
pub struct Memory {
    layers: Layers,
    holding: Holding,
    key: Key,
    store: Store,
    /// By block: where the cache's place for its first page is; none if nothing of it is held.
    homes: Vec<Option<u64>>,
    untracked: u64,
}

impl Memory {
    /// A memory of nothing. `seed` is random and used once; `limit` bounds the memory taken, in bytes.
    pub fn new(layers: Layers, holding: Holding, seed: &[u8; 32], limit: usize) -> Self {
        let store = Store::new(limit);
        Memory { layers, holding, key: Key::new(seed), store, homes: Vec::new(), untracked: 0 }
    }

    /// Which layers are on.
    pub fn layers(&self) -> Layers {
        self.layers
    }

    /// Bytes taken.
    pub fn bytes(&self) -> usize {
        self.store.bytes()
    }

    /// Pages that were sent whole because the limit left no room to remember them, each time one was.
    pub fn untracked(&self) -> u64 {
        self.untracked
    }

    /// Forgets everything: the next version of each page goes whole.
    pub fn forget(&mut self) {
        self.store.clear();
    }

    /// Makes the names of a segment known. Ids keep their names for the whole stream.
    pub(crate) fn learn(&mut self, names: &BlockNames) {
        for id in self.homes.len()..names.len() {
            let name = names.name(RamBlockId(id as u16)).unwrap_or_default();
            let held = match &self.holding {
                Holding::Blocks(blocks) => blocks.iter().any(|block| **block == *name),
                Holding::Cache(_) => true,
            };
            self.homes.push(held.then(|| home(name)));
        }
    }

    /// Notes that a page is sent, and says how.
    pub(crate) fn page(&mut self, block: RamBlockId, index: PageIndex, page: &[u8; PAGE_SIZE]) -> Verdict {
        let owner = Owner::new(block, index);
        let place = self.place(block, index).filter(|_| self.layers.refer());
        let Some((area, place)) = place else { return Verdict::Whole };
        let prints = self.key.prints(page);
        let hash = if self.layers.dedup { self.key.page(&prints) } else { 0 };
        let verdict = self.judge(area, place, owner, &prints, hash);
        let remembered = match verdict {
            Verdict::Unchanged => true,
            _ => self.store.put(area, place, owner, &prints, |prints| self.key.page(prints)),
        };
        match remembered.then(|| self.store.find(area, place)).flatten() {
            Some(entry) if self.layers.dedup && verdict != Verdict::Unchanged => self.store.list(hash, entry),
            Some(_) => {}
            None => self.untracked += 1,
        }
        verdict
    }

    /// Notes that a page is zero.
    pub(crate) fn zero(&mut self, block: RamBlockId, index: PageIndex) {
        if let Some((area, place)) = self.place(block, index) {
            self.store.remove(area, place, Owner::new(block, index));
        }
    }

    fn judge(&self, area: usize, place: u64, owner: Owner, prints: &[u32; LINES], hash: u64) -> Verdict {
        let before = self.store.find(area, place).filter(|&entry| self.store.owner(entry) == owner);
        let mask = before.map(|entry| changed(self.store.prints(entry), prints));
        if mask == Some(0) && self.layers.unchanged {
            return Verdict::Unchanged;
        }
        if self.layers.dedup
            && let Some(twin) = self.store.like(hash, prints)
            && twin != owner
        {
            let (block, index) = twin.parts();
            return Verdict::Copy(block, index);
        }
        match mask {
            Some(mask) if self.layers.delta && (1..=MAX_CHANGED).contains(&mask.count_ones()) => {
                Verdict::Delta(mask)
            }
            _ => Verdict::Whole,
        }
    }

    /// Where a page's fingerprints are kept, if it is held: each block has an area of its own, a cache has one.
    fn place(&self, block: RamBlockId, index: PageIndex) -> Option<(usize, u64)> {
        let home = self.homes.get(usize::from(block.0)).copied().flatten()?;
        Some(match self.holding {
            Holding::Blocks(_) => (usize::from(block.0), index.0),
            Holding::Cache(size) => (0, size.slot(home, index) as u64),
        })
    }
}
