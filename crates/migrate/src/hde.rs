//! What a migration may spend on referring to pages that the destination holds, and what it says of it.

use std::sync::PoisonError;

use dwcp_hde::{CacheSize, LaneWindow, LayerBytes, Layers, Stats};
use dwcp_proto::limits::{MAX_BLOCK_NAME, PAGE_SIZE};
use dwcp_proto::message::{Choice, Offer};
use dwcp_proto::negotiate::{MAX_MAPPED, REFERENCES};
use dwcp_proto::{Mode, Path, units};
use dwcp_vmm::describe::VmDescription;
use dwcp_vmm::mapped::Ram;

use crate::config::Hde;
use crate::counters::Counters;
use crate::report::anon_bytes;
use crate::status::LayerStatus;

/// Bytes that either end may take for references, beside a share of the guest's RAM: together with what the agent
/// takes anyway this stays below 64 MiB and 3 %.
const BASE: u64 = 16 << 20;
/// The share of the guest's RAM, in parts of a thousand. All pages of a guest take some 35 at the source.
const PER_MILLE: u64 = 26;
/// What a page takes in a cache.
const PAGE_BYTES: usize = PAGE_SIZE + CacheSize::OVERHEAD;
/// Characters of the words that say why no RAM is mapped.
const MAX_REASON: usize = 200;

/// Bytes that a migration of a guest with so much RAM may take for references, where the whole agent may take `limit`: half of
/// what is left of it at most.
pub(crate) fn allowance(ram: u64, limit: Option<u64>) -> usize {
    let bytes = BASE.saturating_add(ram / 1000 * PER_MILLE);
    let left = limit.map_or(u64::MAX, |limit| limit.saturating_sub(anon_bytes()) / 2);
    usize::try_from(bytes.min(left)).unwrap_or(usize::MAX)
}

/// The window that a lane is offered. (The Debian guest's RAM, 563 MB of pages after dedup, in MB and CPU seconds: each chunk alone 124.9 and
/// 1.2 at zstd 3; a window of 8 MiB 119.7 and 1.4, of 32 MiB the same; 32 MiB with long-distance matching 116.6 and 2.0, 64 MiB 109.3 and 1.9.)
const LANE_WINDOW: u64 = 8 << 20;
/// The part of what references may take that a lane's window may have at most.
const LANE_SHARE: u64 = 8;

/// Bytes of window that this node offers for the lane of a migration of a guest with so much RAM; 0 for none.
pub(crate) fn lane_window(hde: Hde, ram: u64, limit: Option<u64>) -> u64 {
    if hde.lanes { LANE_WINDOW.min(allowance(ram, limit) as u64 / LANE_SHARE) } else { 0 }
}

/// What the memory that the agents may take costs a migration of a guest with so much RAM, in words. `here` is what this node, its
/// source, has for references.
pub(crate) fn given_up(choice: &Choice, ram: u64, here: usize, hde: Hde) -> Vec<String> {
    // Nor has an older peer anything to give up.
    let refers = choice.path == Path::V3.to_wire() && choice.hde >= REFERENCES;
    if !refers || choice.mode != Mode::Internet.to_wire() {
        return Vec::new();
    }
    let all = allowance(ram, None);
    let mut words = Vec::new();
    let (size, limit) = (|bytes: usize| units::size(bytes as u64), "[limits] agent_memory");
    if here < all && layers(hde).refer() {
        let (here, all) = (size(here), size(all));
        words.push(format!("{limit} leaves {here} instead of {all} to remember what the destination holds"));
    }
    let lane = LaneWindow::new(choice.lane_window).map_or(0, LaneWindow::decoder_bytes);
    let cached = choice.cache_pages as usize * PAGE_BYTES;
    if !choice.mapped && cached + PAGE_BYTES <= all.saturating_sub(lane) {
        let (cached, all) = (size(cached), size(all - lane));
        words.push(format!("the destination's cache takes {cached} instead of {all}: its {limit}"));
    }
    let full = lane_window(hde, ram, None).checked_ilog2().map_or(0, |log| 1 << log);
    if (1..full).contains(&choice.lane_window) {
        let (window, full) = (units::size(choice.lane_window), units::size(full));
        words.push(format!("a lane's window of {window} instead of {full}: {limit}, here or there"));
    }
    words
}

/// Bytes of RAM of a VM.
pub(crate) fn ram_bytes(description: &VmDescription) -> u64 {
    description.ram.iter().fold(0, |sum, block| sum.saturating_add(block.used))
}

/// Completes a destination's offer by what it can hold.
pub(crate) fn offer(
    offer: Offer,
    ram: &Result<Ram, String>,
    description: &VmDescription,
    limit: Option<u64>,
    hde: Hde,
) -> Offer {
    let bytes = ram_bytes(description);
    let lane_window = lane_window(hde, bytes, limit);
    let lane = lane_window.checked_ilog2().and_then(|log| LaneWindow::new(1 << log));
    let left = allowance(bytes, limit).saturating_sub(lane.map_or(0, LaneWindow::decoder_bytes));
    let pages = left / PAGE_BYTES;
    let offer = Offer { lane_window, cache_pages: u32::try_from(pages).unwrap_or(u32::MAX), ..offer };
    match ram {
        Ok(ram) => {
            let named = ram.blocks().filter(|name| name.len() <= MAX_BLOCK_NAME).take(MAX_MAPPED);
            Offer { mapped: named.map(<[u8]>::to_vec).collect(), ..offer }
        }
        Err(why) => Offer { unmapped: why.clone(), ..offer },
    }
}

/// An error with its sources, as one line that an offer can carry.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect()
}

/// The layers that a source uses.
pub(crate) fn layers(Hde { unchanged, dedup, delta, .. }: Hde) -> Layers {
    Layers { zero: true, unchanged, dedup, delta }
}

impl Counters {
    /// A chunk was encoded.
    pub(crate) fn encoded(&self, stats: Stats) {
        *self.encoded.lock().unwrap_or_else(PoisonError::into_inner) += stats;
    }

    /// What the layers have done so far; none where nothing was encoded.
    pub(crate) fn layers(&self) -> Vec<LayerStatus> {
        let stats = *self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        if stats == Stats::default() {
            return Vec::new();
        }
        let status = |LayerBytes { layer, pages, before, after }| LayerStatus {
            layer: layer.to_owned(),
            pages,
            before_bytes: before,
            after_bytes: after,
        };
        stats.layers().map(status).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u64 = 2 << 30;
    const HDE: Hde = Hde { unchanged: true, dedup: true, delta: true, mapped: true, lanes: true };

    fn choice() -> Choice {
        let all = allowance(RAM, None);
        let lane = LaneWindow::new(LANE_WINDOW).map_or(0, LaneWindow::decoder_bytes);
        let cache_pages = ((all - lane) / PAGE_BYTES) as u32;
        Choice {
            path: Path::V3.to_wire(),
            mode: Mode::Internet.to_wire(),
            hde: REFERENCES,
            lane_window: LANE_WINDOW,
            cache_pages,
            ..Choice::default()
        }
    }

    #[test]
    fn an_allowance_stays_within_the_aim_and_half_of_what_the_budget_leaves() {
        for gib in [1, 4, 8] {
            let ram = gib << 30;
            assert!((allowance(ram, None) as u64) < (64 << 20) + ram * 3 / 100);
        }
        assert_eq!(allowance(RAM, Some(0)), 0);
        let budget = anon_bytes() + (8 << 20);
        assert!(allowance(RAM, Some(budget)) <= 5 << 20);
    }

    #[test]
    fn nothing_is_said_where_nothing_is_given_up() {
        let all = allowance(RAM, None);
        assert_eq!(given_up(&choice(), RAM, all, HDE), [""; 0]);
        let v1 = Choice { path: Path::V1.to_wire(), ..choice() };
        assert_eq!(given_up(&v1, RAM, 0, HDE), [""; 0]);
        let older = Choice { hde: REFERENCES - 1, cache_pages: 0, lane_window: 0, ..choice() };
        assert_eq!(given_up(&older, RAM, all, HDE), [""; 0]);
        let mapped = Choice { mapped: true, cache_pages: 0, ..choice() };
        assert_eq!(given_up(&mapped, RAM, all, HDE), [""; 0]);
    }

    #[test]
    fn each_thing_that_is_given_up_is_named() {
        let all = allowance(RAM, None);
        let less = Choice { lane_window: LANE_WINDOW / 4, cache_pages: 100, ..choice() };
        let words = given_up(&less, RAM, all / 3, HDE);
        assert_eq!(words.len(), 3, "{words:?}");
        assert!(words.iter().all(|words| words.contains("agent_memory")), "{words:?}");
    }
}
