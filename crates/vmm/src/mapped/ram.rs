//! The files behind a guest's RAM, block by block.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;

use dwcp_proto::PageIndex;
use dwcp_proto::limits::PAGE_SIZE;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::find::{self, Unmapped};
use super::{MappedError, Page};
use crate::qmp::Qemu;

/// Pages that are looked at together for whether they are zero already.
const STRIDE: usize = 16;
/// `TMPFS_MAGIC` of statfs(2): memfds and /dev/shm.
const TMPFS: i64 = 0x0102_1994;
/// Parts of one vectored write: the kernel's IOV_MAX.
const MAX_PARTS: usize = 1024;

/// The RAM blocks that lie in shared files, by name.
#[derive(Debug)]
pub struct Ram {
    blocks: BTreeMap<Box<[u8]>, Backing>,
}

/// Where a block lies.
#[derive(Debug)]
pub(crate) struct Backing {
    pub(crate) file: File,
    /// Where in the file the block begins.
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Where the VMM's process has it mapped, if there is a VMM.
    pub(crate) mapping: Option<Mapping>,
    /// The file system is known to tell what is in no hole: see [`next_data`].
    pub(crate) tells_holes: bool,
}

/// A block in the VMM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// The address of its first byte.
    pub(crate) address: u64,
    /// The file was named to the VMM: a memfd was not.
    pub(crate) named: bool,
    /// The file.
    pub(crate) file: FileId,
}

/// A file of this machine, whatever it is called: major and minor number of its device, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
}

impl Ram {
    /// Finds the files behind a VM's RAM, through QMP and the VMM's process. At least one block is found, or
    /// there is a reason why not.
    ///
    /// It needs to be allowed to look into the process: the same user, or root.
    pub async fn open(qemu: &Qemu) -> Result<Self, Unmapped> {
        Ok(Ram { blocks: find::backings(qemu).await? })
    }

    /// RAM that lies in these files from their beginning, all of each file: for benches and tests, which have no VMM.
    ///
    /// # Errors
    /// A file does not tell its length.
    pub fn in_files(files: impl IntoIterator<Item = (&'static [u8], File)>) -> io::Result<Self> {
        let backing = |(name, file): (&'static [u8], File)| {
            let len = file.metadata()?.len();
            Ok((name.into(), Backing::new(file, 0, len)?))
        };
        Ok(Ram { blocks: files.into_iter().map(backing).collect::<io::Result<_>>()? })
    }

    /// The blocks' names.
    pub fn blocks(&self) -> impl Iterator<Item = &[u8]> {
        self.blocks.keys().map(|name| &**name)
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        self.blocks.values().map(|backing| backing.len).sum()
    }

    /// The blocks and where they lie.
    pub(crate) fn backings(&self) -> impl Iterator<Item = (&[u8], &Backing)> {
        self.blocks.iter().map(|(name, backing)| (&**name, backing))
    }

    /// The same, for whoever reads them alone.
    pub(crate) fn into_backings(self) -> impl Iterator<Item = (Box<[u8]>, Backing)> {
        self.blocks.into_iter()
    }

    pub(super) fn has(&self, block: &[u8]) -> bool {
        self.blocks.contains_key(block)
    }

    /// Whether so many pages lie within the block.
    pub(super) fn check(&self, block: &[u8], first: PageIndex, count: u32) -> Result<(), MappedError> {
        let place = self.blocks.get(block).and_then(|backing| backing.place(first, u64::from(count)));
        place.map(|_| ()).ok_or_else(|| beyond(block, first))
    }

    pub(super) fn write(&self, block: &[u8], first: PageIndex, pages: &[Page]) -> Result<(), MappedError> {
        self.at(block, first, pages.len(), |file, at| file.write_all_at(pages.as_flattened(), at))
    }

    /// The same for pages that do not lie beside each other, in as few calls as the kernel allows.
    pub(super) fn write_scattered(
        &self,
        block: &[u8],
        first: PageIndex,
        pages: &[&Page],
    ) -> Result<(), MappedError> {
        self.at(block, first, pages.len(), |file, mut at| {
            for pages in pages.chunks(MAX_PARTS) {
                let mut parts: Vec<IoSlice<'_>> = pages.iter().map(|page| IoSlice::new(*page)).collect();
                let mut rest = &mut parts[..];
                while !rest.is_empty() {
                    match rustix::io::pwritev(file, rest, at) {
                        Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                        Ok(written) => {
                            at += written as u64;
                            IoSlice::advance_slices(&mut rest, written);
                        }
                        Err(Errno::INTR) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            Ok(())
        })
    }

    /// Bytes of each block, by name.
    pub fn sizes(&self) -> impl Iterator<Item = (&[u8], u64)> {
        self.blocks.iter().map(|(name, backing)| (&**name, backing.len))
    }

    /// Reads a page. A hole is read as zero and takes no memory.
    ///
    /// # Errors
    /// It lies beyond its block, or the file cannot be read.
    pub fn read(&self, block: &[u8], index: PageIndex, into: &mut Page) -> Result<(), MappedError> {
        self.at(block, index, 1, |file, at| file.read_exact_at(into, at))
    }

    /// Reads the bytes of a page from `offset` on, as many as there is room for.
    ///
    /// # Errors
    /// They lie beyond the page or its block, or the file cannot be read.
    pub fn read_part(
        &self,
        block: &[u8],
        index: PageIndex,
        offset: usize,
        into: &mut [u8],
    ) -> Result<(), MappedError> {
        if offset.checked_add(into.len()).is_none_or(|end| end > PAGE_SIZE) {
            return Err(beyond(block, index));
        }
        self.at(block, index, 1, |file, at| file.read_exact_at(into, at + offset as u64))
    }

    /// Makes pages zero. Pages that are zero already are not touched: a hole stays a hole, and reading one takes no
    /// memory; what was allocated beforehand stays allocated.
    pub(super) fn zero(&self, block: &[u8], first: PageIndex, count: u32) -> Result<(), MappedError> {
        const ZERO: Page = [0; PAGE_SIZE];
        let tells_holes = self.blocks.get(block).is_some_and(|backing| backing.tells_holes);
        self.at(block, first, count as usize, |file, at| {
            let mut pages = [ZERO; STRIDE];
            let mut at = at;
            let end = at + u64::from(count) * PAGE_SIZE as u64;
            while at < end {
                if tells_holes {
                    match next_data(file, at)?.filter(|data| *data < end) {
                        Some(data) => at += (data - at) / PAGE_SIZE as u64 * PAGE_SIZE as u64,
                        None => break,
                    }
                }
                let some = ((end - at) / PAGE_SIZE as u64).min(STRIDE as u64) as usize;
                file.read_exact_at(pages[..some].as_flattened_mut(), at)?;
                for (page, place) in pages[..some].iter().zip((at..).step_by(PAGE_SIZE)) {
                    if *page != ZERO {
                        file.write_all_at(&ZERO, place)?;
                    }
                }
                at += (some * PAGE_SIZE) as u64;
            }
            Ok(())
        })
    }

    fn at(
        &self,
        block: &[u8],
        first: PageIndex,
        count: usize,
        work: impl FnOnce(&File, u64) -> io::Result<()>,
    ) -> Result<(), MappedError> {
        let backing = self.blocks.get(block).ok_or_else(|| beyond(block, first))?;
        let place = backing.place(first, count as u64).ok_or_else(|| beyond(block, first))?;
        work(&backing.file, place).map_err(|source| MappedError::Io { block: shown(block), source })
    }
}

/// Where the next byte that is in no hole lies, from `at` on; `None` if there is none.
pub(crate) fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data.max(at))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Backing {
    pub(super) fn new(file: File, offset: u64, len: u64) -> io::Result<Self> {
        // The kernel's own memory knows at once what a VMM writes through its map. Of any other file system that would have to be shown: a
        // page that it took for a hole would stay as it was in the guest.
        let tells_holes = rustix::fs::fstatfs(&file)?.f_type as i64 == TMPFS;
        Ok(Backing { file, offset, len, mapping: None, tells_holes })
    }

    /// Where in the file so many pages lie; `None` if not all of them are in the block.
    fn place(&self, first: PageIndex, count: u64) -> Option<u64> {
        let start = first.0.checked_mul(PAGE_SIZE as u64)?;
        let end = start.checked_add(count.checked_mul(PAGE_SIZE as u64)?)?;
        if end <= self.len { self.offset.checked_add(start) } else { None }
    }
}

fn beyond(block: &[u8], index: PageIndex) -> MappedError {
    MappedError::Beyond { block: shown(block), index }
}

fn shown(block: &[u8]) -> String {
    String::from_utf8_lossy(block).into_owned()
}
