//! The simulated guest: memory, and a program that writes to it.

use dwcp_proto::limits::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// What a simulated guest is made of. The same spec always gives the same guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Where the contents and the writes come from.
    pub seed: u64,
    /// Pages of its main block.
    pub pages: u64,
    /// Share of pages that are zero at the start, in percent.
    pub zero_percent: u8,
    /// Pages that it writes to, from the first one on.
    pub hot_pages: u64,
    /// Writes in one step.
    pub writes_per_step: u32,
}

impl Default for GuestSpec {
    /// 16 MiB, half of it zero, with a light load on 1 MiB of it.
    fn default() -> Self {
        GuestSpec { seed: 1, pages: 4096, zero_percent: 50, hot_pages: 256, writes_per_step: 16 }
    }
}

/// Most pages that a simulated guest may have: 4 GiB.
const MAX_PAGES: u64 = 1 << 20;
/// Pages of the second, small block.
const TABLE_PAGES: u64 = 16;

/// One RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimBlock {
    /// Its name in the stream.
    pub name: String,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// A guest in memory, whose next step depends on nothing but its own state.
#[derive(Debug, Clone)]
pub struct SimGuest {
    spec: GuestSpec,
    blocks: Vec<SimBlock>,
    random: Random,
    steps: u64,
    /// By block and page: written since the last look; `None` while nobody looks.
    dirty: Option<Vec<Vec<bool>>>,
}

/// Everything of a guest except its RAM: what the device state of the stream carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CpuState {
    spec: GuestSpec,
    random: u64,
    steps: u64,
    checksum: u64,
}

impl SimGuest {
    /// A guest as it has just booted.
    pub fn new(spec: GuestSpec) -> Self {
        let spec = GuestSpec { pages: spec.pages.clamp(1, MAX_PAGES), ..spec };
        let mut random = Random(spec.seed);
        let mut block = |name: &str, pages: u64| {
            let mut bytes = vec![0; pages as usize * PAGE_SIZE];
            for page in bytes.chunks_exact_mut(PAGE_SIZE) {
                if random.below(100) >= u64::from(spec.zero_percent) {
                    fill(page, &mut random);
                }
            }
            SimBlock { name: name.into(), bytes }
        };
        let blocks = vec![block("pc.ram", spec.pages), block("/rom@etc/acpi/tables", TABLE_PAGES)];
        SimGuest { spec, blocks, random, steps: 0, dirty: None }
    }

    /// Runs the guest's program for one step.
    pub fn step(&mut self) {
        self.steps += 1;
        let hot = self.spec.hot_pages.min(self.spec.pages);
        for _ in 0..if hot == 0 { 0 } else { self.spec.writes_per_step } {
            let index = self.random.below(hot) as usize;
            let page = &mut self.blocks[0].bytes[index * PAGE_SIZE..][..PAGE_SIZE];
            match self.random.below(16) {
                0 => page.fill(0),
                1 => fill(page, &mut self.random),
                _ => {
                    let at = self.random.below(PAGE_SIZE as u64 / 8) as usize * 8;
                    page[at..at + 8].copy_from_slice(&self.random.next().to_le_bytes());
                }
            }
            if let Some(dirty) = &mut self.dirty {
                dirty[0][index] = true;
            }
        }
    }

    /// What it is made of.
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    /// How many steps it has run since it booted, wherever.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Its RAM.
    pub fn ram(&self) -> &[SimBlock] {
        &self.blocks
    }

    /// A number over all of its RAM, to tell by whether two guests are equal.
    pub fn checksum(&self) -> u64 {
        let mut sum: u64 = 0xcbf2_9ce4_8422_2325;
        for block in &self.blocks {
            for word in block.bytes.chunks_exact(8) {
                let word = word.try_into().map_or(0, u64::from_le_bytes);
                sum = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            }
        }
        sum
    }

    /// Begins to note which pages are written.
    pub(super) fn track(&mut self) {
        self.dirty = Some(self.blocks.iter().map(|b| vec![false; b.bytes.len() / PAGE_SIZE]).collect());
    }

    /// Stops noting.
    pub(super) fn untrack(&mut self) {
        self.dirty = None;
    }

    /// Adds the pages written since the last call to `pending`; returns how many are pending then.
    pub(super) fn collect(&mut self, pending: &mut [Vec<bool>]) -> u64 {
        for (pending, dirty) in pending.iter_mut().zip(self.dirty.iter_mut().flatten()) {
            for (pending, dirty) in pending.iter_mut().zip(dirty) {
                *pending |= std::mem::take(dirty);
            }
        }
        pending.iter().flatten().filter(|&&page| page).count() as u64
    }

    pub(super) fn cpu(&self) -> CpuState {
        CpuState {
            spec: self.spec.clone(),
            random: self.random.0,
            steps: self.steps,
            checksum: self.checksum(),
        }
    }

    /// A guest from what a stream brought; `None` if its RAM is not the one that was sent.
    pub(super) fn restore(blocks: Vec<SimBlock>, cpu: CpuState) -> Option<Self> {
        let CpuState { spec, random, steps, checksum } = cpu;
        let main = blocks.first().map_or(0, |block| block.bytes.len() as u64);
        let guest = SimGuest { spec, blocks, random: Random(random), steps, dirty: None };
        (main == guest.spec.pages * PAGE_SIZE as u64 && guest.checksum() == checksum).then_some(guest)
    }
}

/// Half of the pages compress well, half not at all.
fn fill(page: &mut [u8], random: &mut Random) {
    let mask = if random.below(2) == 0 { 0x0000_00ff_0000_000f } else { u64::MAX };
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&(random.next() & mask).to_le_bytes());
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}
