//! What a stream said about the guest's RAM blocks, and about itself.

use std::collections::HashMap;

use dwcp_proto::limits::PAGE_SIZE;
use dwcp_proto::{BlockNames, PageIndex, RamBlockId};

/// One RAM block of the list at the start of the RAM section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamBlock {
    /// Its name, as in the stream.
    pub name: Box<[u8]>,
    /// Bytes in use; pages beyond are refused.
    pub used: u64,
    /// Bytes of a page of the memory behind it, where the stream tells (postcopy with huge pages).
    pub page_size: Option<u64>,
}

/// The RAM blocks of a stream, in the order of its list: the position is the [`RamBlockId`].
#[derive(Debug, Clone, Default)]
pub struct Layout {
    blocks: Vec<StreamBlock>,
    ids: HashMap<Box<[u8]>, RamBlockId>,
    names: BlockNames,
}

impl Layout {
    /// The blocks, by [`RamBlockId`].
    pub fn blocks(&self) -> &[StreamBlock] {
        &self.blocks
    }

    /// Their names, as segments carry them.
    pub fn names(&self) -> &BlockNames {
        &self.names
    }

    /// Bytes of guest RAM in all blocks.
    pub fn ram_bytes(&self) -> u64 {
        self.blocks.iter().fold(0, |sum, b| sum.saturating_add(b.used))
    }

    /// The id of a block of this name.
    pub(crate) fn id(&self, name: &[u8]) -> Option<RamBlockId> {
        self.ids.get(name).copied()
    }

    /// Whether the page lies whole within its block.
    pub(crate) fn holds(&self, block: RamBlockId, page: PageIndex) -> bool {
        let pages = self.blocks.get(usize::from(block.0)).map_or(0, |b| b.used / PAGE_SIZE as u64);
        page.0 < pages
    }

    /// Adds a block; `None` when its name is there already or the table is full.
    pub(super) fn add(&mut self, name: &[u8], used: u64) -> Option<()> {
        if self.ids.contains_key(name) {
            return None;
        }
        let id = self.names.intern(name)?;
        self.ids.insert(name.into(), id);
        self.blocks.push(StreamBlock { name: name.into(), used, page_size: None });
        Some(())
    }

    /// Notes the page size of the block added last.
    pub(super) fn set_page_size(&mut self, page_size: u64) {
        if let Some(block) = self.blocks.last_mut() {
            block.page_size = Some(page_size);
        }
    }
}
