//! Fingerprints by place, in extents that are taken as they are needed, and an index from content to place.

use dwcp_proto::{PageIndex, RamBlockId};

use crate::fingerprint::{LINES, Prints};

/// Entries of an extent.
const EXTENT: usize = 64;
/// No extent, or no entry.
const NONE: u32 = u32::MAX;
/// Entries in one bucket of the index.
const WAYS: usize = 2;
/// Buckets of the first index: 64 KiB of it, for 64 MiB of pages.
const FIRST_BUCKETS: usize = 8192;

/// A page, in eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner(u64);

impl Owner {
    const INDEX_BITS: u32 = 52;

    pub(super) fn new(block: RamBlockId, index: PageIndex) -> Self {
        // Page indexes end below 2^52, and blocks at MAX_BLOCKS, which is below 2^12.
        Owner(u64::from(block.0) << Self::INDEX_BITS | index.0)
    }

    pub(super) fn parts(self) -> (RamBlockId, PageIndex) {
        let index = self.0 & ((1 << Self::INDEX_BITS) - 1);
        (RamBlockId((self.0 >> Self::INDEX_BITS) as u16), PageIndex(index))
    }
}

struct Extent {
    present: u64,
    owners: [Owner; EXTENT],
    prints: [Prints; EXTENT],
}

/// See the module.
pub(super) struct Store {
    limit: usize,
    bytes: usize,
    /// By area and place / EXTENT: which extent.
    areas: Vec<Vec<u32>>,
    extents: Vec<Box<Extent>>,
    /// Entries by content. Those that have changed since are found out when they are looked at.
    index: Vec<[u32; WAYS]>,
}

impl Store {
    pub(super) fn new(limit: usize) -> Self {
        Store { limit, bytes: 0, areas: Vec::new(), extents: Vec::new(), index: Vec::new() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn clear(&mut self) {
        *self = Store::new(self.limit);
    }

    /// The entry at a place, if there is one.
    pub(super) fn find(&self, area: usize, place: u64) -> Option<u32> {
        let extents = self.areas.get(area)?;
        let extent = *extents.get(usize::try_from(place / EXTENT as u64).ok()?)?;
        let within = (place % EXTENT as u64) as u32;
        let present = self.extents.get(extent as usize)?.present >> within & 1 == 1;
        present.then_some(extent * EXTENT as u32 + within)
    }

    pub(super) fn owner(&self, entry: u32) -> Owner {
        self.extents[entry as usize / EXTENT].owners[entry as usize % EXTENT]
    }

    pub(super) fn prints(&self, entry: u32) -> &Prints {
        &self.extents[entry as usize / EXTENT].prints[entry as usize % EXTENT]
    }

    /// Sets the entry at a place, whatever was there; whether there was room. `hash` is needed where the index
    /// grows.
    pub(super) fn put(
        &mut self,
        area: usize,
        place: u64,
        owner: Owner,
        prints: &Prints,
        hash: impl Fn(&Prints) -> u64,
    ) -> bool {
        let Some(extent) = self.extent(area, place, hash) else { return false };
        let within = (place % EXTENT as u64) as usize;
        let extent = &mut self.extents[extent as usize];
        extent.present |= 1 << within;
        extent.owners[within] = owner;
        extent.prints[within] = *prints;
        true
    }

    /// Removes the entry at a place if it is this page's.
    pub(super) fn remove(&mut self, area: usize, place: u64, owner: Owner) {
        if let Some(entry) = self.find(area, place)
            && self.owner(entry) == owner
        {
            self.extents[entry as usize / EXTENT].present &= !(1 << (entry as usize % EXTENT));
        }
    }

    /// A page whose fingerprints are these.
    pub(super) fn like(&self, hash: u64, prints: &Prints) -> Option<Owner> {
        let bucket = self.index.get(self.bucket(hash))?;
        let like =
            |entry: &&u32| **entry != NONE && self.is_present(**entry) && self.prints(**entry) == prints;
        bucket.iter().find(like).map(|&entry| self.owner(entry))
    }

    /// Lets an entry be found by its content.
    pub(super) fn list(&mut self, hash: u64, entry: u32) {
        let bucket = self.bucket(hash);
        if let Some(ways) = self.index.get_mut(bucket)
            && !ways.contains(&entry)
        {
            ways.rotate_right(1);
            ways[0] = entry;
        }
    }

    fn is_present(&self, entry: u32) -> bool {
        self.extents[entry as usize / EXTENT].present >> (entry as usize % EXTENT) & 1 == 1
    }

    fn bucket(&self, hash: u64) -> usize {
        // The high bits are the good ones; the number of buckets is a power of two.
        (hash >> 20) as usize & self.index.len().saturating_sub(1)
    }

    /// The extent of a place, taken if the limit allows it.
    fn extent(&mut self, area: usize, place: u64, hash: impl Fn(&Prints) -> u64) -> Option<u32> {
        let at = usize::try_from(place / EXTENT as u64).ok()?;
        let known = self.areas.get(area).and_then(|extents| extents.get(at)).copied();
        if let Some(extent) = known.filter(|&extent| extent != NONE) {
            return Some(extent);
        }
        let slots = self.areas.get(area).map_or(0, Vec::len);
        let new_slots = (at + 1).saturating_sub(slots);
        let grown = self.extents.len() * EXTENT >= self.index.len() * WAYS;
        let index = if grown { (self.index.len() * 2).max(FIRST_BUCKETS) } else { self.index.len() };
        let more = size_of::<Extent>()
            + new_slots.checked_mul(size_of::<u32>())?
            + (index - self.index.len()) * size_of::<[u32; WAYS]>();
        let bytes = self.bytes.checked_add(more)?;
        let id = u32::try_from(self.extents.len()).ok().filter(|&id| id < NONE / EXTENT as u32)?;
        if bytes > self.limit {
            return None;
        }
        self.bytes = bytes;
        if self.areas.len() <= area {
            self.areas.resize(area + 1, Vec::new());
        }
        let extents = &mut self.areas[area];
        if new_slots > 0 {
            extents.resize(at + 1, NONE);
        }
        extents[at] = id;
        self.extents.push(Box::new(Extent {
            present: 0,
            owners: [Owner(0); EXTENT],
            prints: [[0; LINES]; EXTENT],
        }));
        if grown {
            self.rebuild(index, hash);
        }
        Some(id)
    }

    fn rebuild(&mut self, buckets: usize, hash: impl Fn(&Prints) -> u64) {
        self.index = vec![[NONE; WAYS]; buckets];
        for entry in 0..(self.extents.len() * EXTENT) as u32 {
            if self.is_present(entry) {
                self.list(hash(self.prints(entry)), entry);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prints(seed: u32) -> Prints {
        std::array::from_fn(|n| seed.wrapping_mul(0x9e37_79b9).rotate_left(n as u32))
    }

    fn hash(prints: &Prints) -> u64 {
        prints.iter().fold(1, |hash: u64, &p| (hash ^ u64::from(p)).wrapping_mul(0x517c_c1b7_2722_0a95))
    }

    #[test]
    fn what_was_put_is_found_by_place_and_by_content_through_growth() {
        let mut store = Store::new(64 << 20);
        let count = FIRST_BUCKETS as u32 * 8;
        for n in 0..count {
            let (owner, prints) = (Owner::new(RamBlockId(3), PageIndex(n.into())), prints(n));
            assert!(store.put(3, n.into(), owner, &prints, hash));
            let entry = store.find(3, n.into()).unwrap();
            store.list(hash(&prints), entry);
        }
        let mut found = 0;
        for n in 0..count {
            let entry = store.find(3, n.into()).unwrap();
            assert_eq!(store.owner(entry).parts(), (RamBlockId(3), PageIndex(n.into())));
            assert_eq!(store.prints(entry), &prints(n));
            found += u32::from(store.like(hash(&prints(n)), &prints(n)) == Some(store.owner(entry)));
        }
        // A bucket that is full lets go of its oldest.
        assert!(found > count * 3 / 5, "{found} of {count}");
        assert!(store.bytes() <= count as usize * 150, "{} bytes", store.bytes());
    }

    #[test]
    fn the_limit_holds_however_far_apart_the_places_are() {
        let mut store = Store::new(1 << 20);
        let owner = Owner::new(RamBlockId(0), PageIndex(1 << 51));
        assert!(!store.put(0, 1 << 51, owner, &prints(1), hash));
        assert!(!store.put(0, u64::MAX, owner, &prints(1), hash));
        let taken = (0..1000).filter(|&n| store.put(0, n * 64, owner, &prints(1), hash)).count();
        assert!((90..130).contains(&taken), "{taken}");
        assert!(store.bytes() <= 1 << 20);
        assert_eq!(store.find(0, 999 * 64), None);
    }

    #[test]
    fn only_its_owner_removes_an_entry_and_what_is_gone_is_no_reference() {
        let mut store = Store::new(1 << 20);
        let (owner, other) =
            (Owner::new(RamBlockId(0), PageIndex(5)), Owner::new(RamBlockId(0), PageIndex(69)));
        assert!(store.put(0, 5, owner, &prints(1), hash));
        store.list(hash(&prints(1)), store.find(0, 5).unwrap());
        store.remove(0, 5, other);
        assert_eq!(store.like(hash(&prints(1)), &prints(1)), Some(owner));
        store.remove(0, 5, owner);
        assert_eq!(store.like(hash(&prints(1)), &prints(1)), None);
        assert_eq!(store.find(0, 5), None);
    }
}
