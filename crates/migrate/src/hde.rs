//! What a migration may spend on referring to pages that the destination holds, and what it says of it.

use std::sync::PoisonError;

use dwcp_hde::{CacheSize, LaneWindow, LayerBytes, Layers, Stats};
use dwcp_proto::limits::{MAX_BLOCK_NAME, PAGE_SIZE};
use dwcp_proto::message::Offer;
use dwcp_proto::negotiate::MAX_MAPPED;
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
const PER_MILLE: u64 = 27;
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
    let pages = left / (PAGE_SIZE + CacheSize::OVERHEAD);
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
