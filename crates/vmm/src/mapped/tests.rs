//! Whatever the VMM reads and whenever, its guest's RAM is what the whole stream would have made of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use dwcp_proto::Segment;
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::sim::StreamWriter;
use crate::stream::{Cutter, OpaqueReason, Piece, pieces};

/// Two blocks in files and one that is the VMM's own.
const BLOCKS: [&[u8]; 3] = [b"pc.ram", b"dimm0", b"pc.rom"];
const PAGES: u64 = 6;

/// A VMM with a stream of its own pace.
struct Vmm {
    files: [File; 2],
    rom: BTreeMap<u64, Page>,
    cutter: Cutter,
}

/// What RAM may lie in: the kernel's memory, and another file system, which is not asked for its holes.
const FILES: [fn() -> File; 2] = [memfd, || tempfile::tempfile().unwrap()];

fn memfd() -> File {
    memfd_create("ram", MemfdFlags::CLOEXEC).unwrap().into()
}

impl Vmm {
    fn new(stale: bool) -> Self {
        Self::on(stale, memfd)
    }

    fn on(stale: bool, file: fn() -> File) -> Self {
        let files = [0; 2].map(|_| {
            let file = file();
            file.set_len(PAGES * PAGE_SIZE as u64).unwrap();
            if stale {
                file.write_all_at(&[0xee; PAGES as usize * PAGE_SIZE], 0).unwrap();
            }
            file
        });
        Vmm { files, rom: BTreeMap::new(), cutter: Cutter::new(64 << 10) }
    }

    fn ram(&self) -> Ram {
        let files = self.files.iter().map(|file| file.try_clone().unwrap());
        Ram::in_files(BLOCKS.into_iter().zip(files)).unwrap()
    }

    fn sink(&self) -> MappedSink {
        MappedSink::new(self.ram())
    }

    /// Loads what it reads, as QEMU does: into RAM.
    fn read(&mut self, mut stream: &[u8]) {
        while !stream.is_empty() {
            stream = &stream[self.cutter.feed(stream)..];
        }
        self.cutter.flush();
        while let Some(segment) = self.cutter.pop() {
            self.load(&segment);
        }
    }

    fn load(&mut self, segment: &Segment) {
        for piece in pieces(segment) {
            let (block, index, page) = match piece.unwrap() {
                Piece::Opaque(_) => continue,
                Piece::Page { block, index, bytes, .. } => (block, index, bytes.try_into().unwrap()),
                Piece::Zero { block, index, .. } => (block, index, [0; PAGE_SIZE]),
            };
            let name = segment.names.name(block).unwrap();
            match BLOCKS[..2].iter().position(|block| *block == name) {
                Some(file) => self.files[file].write_all_at(&page, index.0 * PAGE_SIZE as u64).unwrap(),
                None => drop(self.rom.insert(index.0, page)),
            }
        }
    }

    fn memory(&self) -> (Vec<Vec<u8>>, &BTreeMap<u64, Page>) {
        let whole = |file: &File| {
            let mut content = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut content, 0).unwrap();
            content
        };
        (self.files.iter().map(whole).collect(), &self.rom)
    }
}

fn deliver(sink: &mut MappedSink, segment: &Segment) {
    for piece in pieces(segment) {
        let name = |block| segment.names.name(block).unwrap();
        match piece.unwrap() {
            Piece::Opaque(bytes) => sink.opaque(bytes),
            Piece::Page { block, index, named, bytes } => {
                let at = Pages { block: name(block), first: index, count: 1, named };
                sink.pages(at, bytes.as_chunks().0).unwrap();
            }
            Piece::Zero { block, index, named } => {
                let at = Pages { block: name(block), first: index, count: 1, named };
                sink.zeros(at, false).unwrap();
            }
        }
    }
}

/// A stream of these pages (block, index, fill), and a page of the last block at its end.
fn stream(pages: &[(usize, u64, u8)]) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    writer.ram_start(BLOCKS.into_iter().map(|block| (block, PAGES * PAGE_SIZE as u64)));
    writer.ram_part(false);
    for (n, &(block, index, fill)) in pages.iter().enumerate() {
        if n % 5 == 4 {
            writer.section_end();
            writer.ram_part(false);
        }
        writer.page(BLOCKS[block], index, &[fill; PAGE_SIZE]);
    }
    writer.section_end();
    writer.raw(b"\x04device state");
    writer.take()
}

fn segments(stream: &[u8]) -> Vec<Segment> {
    let mut cutter = Cutter::new(64 << 10);
    let mut rest = stream;
    while !rest.is_empty() {
        // Small bites, so that segments end anywhere.
        let bite = rest.len().min(9000);
        rest = &rest[cutter.feed(&rest[..bite])..];
        cutter.flush();
    }
    cutter.finish();
    assert_eq!(cutter.opaque_reason(), Some(OpaqueReason::DeviceState));
    std::iter::from_fn(|| cutter.pop()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn ram_is_what_the_whole_stream_makes_of_it(
        pages in vec((0usize..3, 0..PAGES, 0u8..4), 1..60),
        eager in any::<bool>(),
        stale in any::<bool>(),
        switch in any::<prop::sample::Index>(),
        split in any::<bool>(),
    ) {
        let bytes = stream(&pages);
        let mut plain = Vmm::new(stale);
        plain.read(&bytes);
        let segments = segments(&bytes);
        let mut vmm = Vmm::new(stale);
        // Either the records of a segment, or its bytes.
        let (mut sink, mut splitter) = (vmm.sink(), Splitter::new(vmm.ram()));
        // From some segment on the original bytes follow, as when path v1 takes over.
        let switch = switch.index(segments.len() + 1);
        let mut unread = Vec::new();
        for (n, segment) in segments.iter().enumerate() {
            if n < switch && split {
                splitter.apply(&segment.bytes).unwrap();
                unread.extend(splitter.take());
            } else if n < switch {
                deliver(&mut sink, segment);
                unread.extend(sink.take());
            } else {
                unread.extend_from_slice(&segment.bytes);
            }
            if eager {
                vmm.read(&std::mem::take(&mut unread));
            }
        }
        vmm.read(&unread);
        prop_assert!(vmm.memory() == plain.memory());
    }

    #[test]
    fn what_is_held_is_what_was_delivered(pages in vec((0usize..3, 0..PAGES, 0u8..4), 1..40)) {
        let vmm = Vmm::new(true);
        let mut sink = vmm.sink();
        segments(&stream(&pages)).iter().for_each(|segment| deliver(&mut sink, segment));
        let last: BTreeMap<_, _> = pages.iter().map(|&(block, index, fill)| ((block, index), fill)).collect();
        for ((block, index), fill) in last {
            let mut page = [0xdd; PAGE_SIZE];
            prop_assert_eq!(sink.held(BLOCKS[block], PageIndex(index), &mut page).unwrap(), block != 2);
            prop_assert!(block == 2 || page == [fill; PAGE_SIZE]);
        }
    }
}

fn at(first: u64, count: u32, named: bool) -> Pages<'static> {
    Pages { block: BLOCKS[0], first: PageIndex(first), count, named }
}

#[test]
fn runs_are_written_around_the_marker() {
    let vmm = Vmm::new(true);
    let mut sink = vmm.sink();
    sink.pages(at(2, 1, true), &[[1; PAGE_SIZE]]).unwrap();
    assert_eq!(sink.take().len(), 8 + 1 + 6 + PAGE_SIZE);
    sink.pages(at(0, 5, false), &[[2; PAGE_SIZE]; 5]).unwrap();
    assert_eq!(sink.take().len(), 8 + PAGE_SIZE);
    let file = vmm.memory().0.remove(0);
    let fills: Vec<u8> = file.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    assert_eq!(fills, [2, 2, 0xee, 2, 2, 0xee]);
    sink.zeros(at(1, 5, true), false).unwrap();
    // The marker as it was, by its name; then as it is now.
    assert_eq!(sink.take().len(), 8 + 1 + 6 + PAGE_SIZE + 8 + PAGE_SIZE);
    let file = vmm.memory().0.remove(0);
    let fills: Vec<u8> = file.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    assert_eq!(fills, [2, 0, 0xee, 0, 0, 0]);
}

#[test]
fn pages_of_a_stream_that_is_split_do_not_go_by_the_vmm() {
    let bytes = stream(&[(0, 0, 4), (0, 1, 1), (0, 2, 2), (0, 3, 3)]);
    let vmm = Vmm::new(true);
    let mut splitter = Splitter::new(vmm.ram());
    splitter.apply(&bytes).unwrap();
    assert_eq!(splitter.opaque_reason(), Some(OpaqueReason::DeviceState));
    // All but the marker, which is the first page.
    assert_eq!(splitter.take().len(), bytes.len() - 3 * (8 + PAGE_SIZE));
    let file = vmm.memory().0.remove(0);
    let fills: Vec<u8> = file.chunks(PAGE_SIZE).map(|page| page[0]).collect();
    assert_eq!(fills, [0xee, 1, 2, 3, 0xee, 0xee]);
}

#[test]
fn what_is_cut_off_within_an_item_goes_to_the_vmm_with_all_that_follows() {
    let bytes = stream(&[(0, 0, 1), (0, 1, 2), (0, 2, 3)]);
    let vmm = Vmm::new(true);
    let mut splitter = Splitter::new(vmm.ram());
    let (one, other) = bytes.split_at(bytes.len() - 9000);
    splitter.apply(one).unwrap();
    splitter.apply(other).unwrap();
    assert_eq!(splitter.opaque_reason(), Some(OpaqueReason::Truncated));
    let (mut vmm, mut plain) = (vmm, Vmm::new(true));
    vmm.read(&splitter.take());
    plain.read(&bytes);
    assert!(vmm.memory() == plain.memory());
}

#[test]
fn oob_page_beyond_its_block_is_refused() {
    let vmm = Vmm::new(false);
    let mut sink = vmm.sink();
    for (first, count) in [(PAGES, 1), (PAGES - 1, 2), (u64::MAX, 1), (1 << 52, 1), (0, u32::MAX)] {
        let pages = vec![[1; PAGE_SIZE]; 2.min(count as usize)];
        for result in [sink.pages(at(first, count, true), &pages), sink.zeros(at(first, count, false), true)]
        {
            assert!(matches!(result, Err(MappedError::Beyond { .. })), "{first} {count}");
        }
    }
    let mut page = [0; PAGE_SIZE];
    assert!(sink.held(BLOCKS[0], PageIndex(PAGES), &mut page).is_err());
    assert!(sink.take().is_empty());
    // A file that shrinks is an error.
    vmm.files[0].set_len(0).unwrap();
    assert!(matches!(sink.held(BLOCKS[0], PageIndex(0), &mut page), Err(MappedError::Io { .. })));
}

#[test]
fn zeros_leave_holes_alone() {
    use std::os::unix::fs::MetadataExt;
    for file in FILES {
        let vmm = Vmm::on(false, file);
        let mut sink = vmm.sink();
        sink.zeros(at(0, PAGES as u32, false), false).unwrap();
        assert_eq!(vmm.files[0].metadata().unwrap().blocks(), 0);
    }
}

#[test]
fn zeros_find_what_lies_between_holes() {
    use std::os::unix::fs::MetadataExt;
    for kind in FILES {
        let vmm = Vmm::on(false, kind);
        let mut sink = vmm.sink();
        let file = &vmm.files[0];
        for page in [1, 2, PAGES - 1] {
            file.write_all_at(&[7; PAGE_SIZE], page * PAGE_SIZE as u64).unwrap();
        }
        let taken = file.metadata().unwrap().blocks();
        // All but the first and the last.
        sink.zeros(at(1, PAGES as u32 - 2, false), false).unwrap();
        let mut all = [1; PAGES as usize * PAGE_SIZE];
        file.read_exact_at(&mut all, 0).unwrap();
        let (zeroed, last) = all.split_at((PAGES as usize - 1) * PAGE_SIZE);
        assert!(zeroed.iter().all(|&byte| byte == 0) && last.iter().all(|&byte| byte == 7));
        assert_eq!(file.metadata().unwrap().blocks(), taken);
    }
}
