//! What travels on a multifd channel: one greeting, then packets of pages, each with a header of a fixed length.
//!
//! Source of the format: QEMU's `migration/multifd.c` and `multifd-nocomp.c`, releases 7.2 to 11.1. All integers are big-endian.
//!
//! ```text
//! greeting  0 u32 magic    4 u32 version (1)   8 uuid[16]   24 u8 channel id   25 zeros to 64
//! header    0 u32 magic    4 u32 version (1)   8 u32 flags (1: SYNC)   12 u32 pages allocated   16 u32 pages
//!          20 u32 bytes that follow           24 u64 number of the packet   32 u32 zero pages (9.0 and newer)
//!          64 RAM block's name, to the first zero    320 u64 offset[128]: of the pages, then of the zero pages
//! packet    header, then the pages
//! ```
//! A header without pages repeats what the one before it said of the block and of the bytes that follow (7.2): neither counts.

use std::ops::Range;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{PageIndex, RamBlockId};

use crate::stream::Layout;

/// Bytes of a channel's first message.
pub(crate) const GREETING: usize = 64;
/// Pages of one packet: QEMU makes packets of 512 KiB.
pub(crate) const PAGES: usize = (512 << 10) / PAGE_SIZE;
/// Where a header's offsets begin.
pub(crate) const OFFSETS: usize = 320;
/// Bytes of a packet's header.
pub(crate) const HEADER: usize = OFFSETS + 8 * PAGES;

pub(crate) const MAGIC: u32 = 0x1122_3344;
pub(crate) const VERSION: u32 = 1;
pub(crate) const FLAG_SYNC: u32 = 1;
/// Which compression the pages have; none is 0.
const FLAGS_COMPRESSION: u32 = 0x1e;
const NAME: Range<usize> = 64..OFFSETS;

/// What is wrong with the bytes of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelFault {
    /// Neither a greeting nor a packet.
    #[error("magic {0:#010x} is not multifd's")]
    Magic(u32),
    /// Of a version that is not known.
    #[error("version {0} is unknown")]
    Version(u32),
    /// A channel that there should not be, or one that came twice.
    #[error("channel id {0} is taken or out of range")]
    Id(u8),
    /// QEMU compresses the pages.
    #[error("QEMU compresses the pages itself; set multifd-compression to none")]
    Compressed,
    /// Flags that are not known: device state on a multifd channel is one of them.
    #[error("flags {0:#x} are unknown")]
    Flags(u32),
    /// More pages than a packet holds.
    #[error("a packet of {0} pages and {1} zero pages is too large")]
    Pages(u32, u32),
    /// The pages take another number of bytes.
    #[error("{bytes} bytes for {pages} pages")]
    Length {
        /// Pages of the packet.
        pages: u32,
        /// Bytes that follow, by its header.
        bytes: u32,
    },
    /// Pages of a RAM block that the main channel did not list.
    #[error("a page of an unknown RAM block")]
    UnknownBlock,
    /// A page that does not lie whole in its block, at a page's boundary.
    #[error("offset {0:#x} is not a page of its RAM block")]
    Offset(u64),
    /// A page after the end of RAM.
    #[error("a page after the end of RAM")]
    Late,
}

/// A header whose every field was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) block: RamBlockId,
    pub(super) pages: usize,
    pub(super) zeros: usize,
    pub(super) number: u64,
    pub(super) sync: bool,
}

/// The channel's id.
pub(super) fn greeting(bytes: &[u8; HEADER]) -> Result<u8, ChannelFault> {
    magic(bytes)?;
    Ok(bytes[24])
}

/// Whether a header has pages of either kind.
pub(super) fn has_pages(bytes: &[u8; HEADER]) -> bool {
    u32_at(bytes, 16) != 0 || u32_at(bytes, 32) != 0
}

/// The `n`th page of a header, which was parsed.
pub(super) fn page(bytes: &[u8; HEADER], n: usize) -> PageIndex {
    PageIndex(offset(bytes, n) / PAGE_SIZE as u64)
}

impl Packet {
    /// Checks a header; the blocks are those that the main channel listed.
    pub(super) fn parse(bytes: &[u8; HEADER], layout: &Layout) -> Result<Packet, ChannelFault> {
        magic(bytes)?;
        let flags = u32_at(bytes, 8);
        if flags & FLAGS_COMPRESSION != 0 {
            return Err(ChannelFault::Compressed);
        }
        if flags & !FLAG_SYNC != 0 {
            return Err(ChannelFault::Flags(flags));
        }
        let (pages, follow, zeros) = (u32_at(bytes, 16), u32_at(bytes, 20), u32_at(bytes, 32));
        let too_many = pages as usize > PAGES || zeros as usize > PAGES - pages as usize;
        if too_many {
            return Err(ChannelFault::Pages(pages, zeros));
        }
        if pages != 0 && follow as usize != pages as usize * PAGE_SIZE {
            return Err(ChannelFault::Length { pages, bytes: follow });
        }
        let (pages, zeros) = (pages as usize, zeros as usize);
        let mut packet = Packet {
            block: RamBlockId(0),
            pages,
            zeros,
            number: u64::from_be_bytes(std::array::from_fn(|i| bytes[24 + i])),
            sync: flags & FLAG_SYNC != 0,
        };
        if pages + zeros == 0 {
            return Ok(packet);
        }
        let name = bytes[NAME].split(|byte| *byte == 0).next().unwrap_or_default();
        packet.block = layout.id(name).ok_or(ChannelFault::UnknownBlock)?;
        for n in 0..pages + zeros {
            let offset = offset(bytes, n);
            let aligned = offset.is_multiple_of(PAGE_SIZE as u64);
            if !aligned || !layout.holds(packet.block, PageIndex(offset / PAGE_SIZE as u64)) {
                return Err(ChannelFault::Offset(offset));
            }
        }
        Ok(packet)
    }
}

fn magic(bytes: &[u8; HEADER]) -> Result<(), ChannelFault> {
    match (u32_at(bytes, 0), u32_at(bytes, 4)) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, version) => Err(ChannelFault::Version(version)),
        (magic, _) => Err(ChannelFault::Magic(magic)),
    }
}

fn u32_at(bytes: &[u8; HEADER], at: usize) -> u32 {
    u32::from_be_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn offset(bytes: &[u8; HEADER], n: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| bytes[OFFSETS + 8 * n + i]))
}
