//! QEMU's multifd: pages on several channels beside the main one, put together again to the one stream that QEMU would write without it.
//! No I/O, no clock.
//!
//! ```text
//! main channel     sections, zero pages, sync points ─┐
//! channel 0        pages, SYNC, pages, SYNC ...       ├─► Merger ─► a main channel with all pages, which any destination reads
//! channel 1 ... n  pages, SYNC, pages, SYNC ...      ─┘
//! ```
//!
//! # Order
//! QEMU sends no page twice between two *synchronisations*. For the k-th one each channel carries its k-th SYNC, and the main channel its
//! k-th sync point: MULTIFD_FLUSH, once a round of RAM and more (8.1 and newer); or the end of each RAM section, EOS (older ones, and newer ones with a
//! machine type of before 8.1). Which of the two is told by the first section, where FLUSH comes before EOS, or does not.
//!
//! Invariants:
//! - What a channel sent before its k-th SYNC comes out before anything of the main channel behind its k-th sync point.
//! - What a channel sent behind its k-th SYNC comes out after everything of the main channel before its k-th sync point, and after what any
//!   channel sent before its own k-th SYNC.
//! - What comes out is whole sections of the main channel in their order, without the FLUSH records; the pages of channels stand in RAM
//!   sections, either the main channel's or in PARTs of our own. A page record that leaves out its block's name follows one of the same block.
//!
//! # States
//! ```text
//! main      reading ── sync point ──► waiting ── all channels at SYNC ──► reading ── last EOS ── device state ──► passing on
//! channel   greeting ─► header ─► pages ─► header ...   behind SYNC: waiting ── main at its sync point ──► header
//! ```
//! A channel that waits is not read, nor is the main channel while it waits.
//!
//! # Why nobody waits for ever
//! QEMU's migration thread writes the main channel and gives pages to the channels' threads; it waits for room on the main channel, for a
//! thread that is free, and, when it synchronises, until each thread has written its SYNC. Then it writes its sync point, before it gives pages away
//! again, and without holding it back. A channel's thread waits for room on its channel alone. So where the k-th synchronisation is under way:
//! - a channel that has not sent its SYNC is read, so its thread gets on to it, and then the migration thread to its sync point;
//! - the main channel is read until that point, so it gets there;
//! - then all channels and the main channel wait, which is when all of them go on.
//!
//! Within a packet its channel alone is read, and nothing else has to happen for its thread to write the rest. The end of a section may be
//! known to us while its footer, if it has one, is still in QEMU's buffer: pages that come meanwhile are put before that end,
//! which is held back for them, so that no channel waits for the footer.

mod merge;
pub(crate) mod packet;
#[cfg(test)]
mod tests;

pub use merge::{Filled, MAX_CHANNELS, MIN_ROOM, MergeError, Merged, Merger, Source};
pub use packet::ChannelFault;
