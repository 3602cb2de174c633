//! The stream that is written from files, held against what is in them. With a real QEMU: the laboratory's `direct`.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use dwcp_proto::Segment;
use dwcp_proto::limits::PAGE_SIZE;
use proptest::collection::vec;
use proptest::prelude::*;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

use super::{Direct, DirectError, Dirty, Gone, Stretch};
use crate::direct::{Fit, Head, HeadError};
use crate::mapped::Ram;
use crate::sim::StreamWriter;
use crate::stream::{OpaqueReason, Part, Walker};

const RAM: [(&[u8], u64); 2] = [(b"ram-a", 700), (b"ram-b", 90)];
const ROM: (&[u8], u64) = (b"pc.bios", 4);
const CHUNK: usize = 128 << 10;
const DEVICES: &[u8] = b"\x04state of the devices";

type Page = [u8; PAGE_SIZE];

/// A guest's RAM in files, and what a destination makes of its stream.
struct Scene {
    files: Vec<File>,
    direct: Direct,
    segments: Vec<Segment>,
    balloon: bool,
}

impl Scene {
    fn new(balloon: bool) -> Self {
        let file = |name: &str, pages: u64| {
            let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
            file.set_len(pages * PAGE_SIZE as u64).unwrap();
            file
        };
        let files: Vec<File> = RAM.iter().map(|(_, pages)| file("ram", *pages)).collect();
        let names = RAM.map(|(name, _)| name);
        let ram = Ram::in_files(names.into_iter().zip(files.iter().map(|f| f.try_clone().unwrap()))).unwrap();
        let mut head = Head::new();
        // In bites, as a socket gives it.
        let whole = head_bytes().chunks(7).any(|bite| head.take(bite).unwrap());
        assert!(whole);
        let direct = Direct::over(Fit { ram, pid: 0, balloon }, &head, CHUNK).unwrap();
        Scene { files, direct, segments: Vec::new(), balloon }
    }

    fn write(&self, block: usize, page: u64, fill: u8) {
        self.files[block].write_all_at(&[fill; PAGE_SIZE], page * PAGE_SIZE as u64).unwrap();
    }

    fn punch(&self, block: usize, page: u64, count: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let size = PAGE_SIZE as u64;
        fallocate(&self.files[block], flags, page * size, count * size).unwrap();
    }

    fn send(&mut self, dirty: &Dirty) {
        let Scene { direct, segments, .. } = self;
        direct.written(dirty, &mut keep(segments)).unwrap();
    }

    fn finish(&mut self, rest: &[u8]) -> Result<u64, DirectError> {
        let Scene { direct, segments, .. } = self;
        direct.finish(rest, &mut keep(segments))
    }

    fn stream(&self) -> Vec<u8> {
        let mut at = 0;
        for segment in &self.segments {
            assert_eq!(segment.offset.0, at);
            at += segment.bytes.len() as u64;
        }
        self.segments.iter().flat_map(|segment| segment.bytes.to_vec()).collect()
    }
}

fn keep(segments: &mut Vec<Segment>) -> impl FnMut(Segment) -> Result<(), Gone> + '_ {
    |segment| {
        segments.push(segment);
        Ok(())
    }
}

/// Pages by block and place.
type Memory = BTreeMap<(Vec<u8>, u64), Page>;

/// What a destination holds after a stream: its pages by block and place, and what comes after RAM.
fn received(stream: &[u8]) -> (Memory, Vec<u8>) {
    let mut walker = Walker::new();
    let (mut pages, mut tail, mut rest) = (BTreeMap::new(), Vec::new(), stream);
    while let Some(part) = walker.next(&mut rest) {
        match part {
            Part::Page { block, index, content, .. } => {
                let page = content.copied().unwrap_or([0; PAGE_SIZE]);
                pages.insert((walker.name(block).to_vec(), index.0), page);
            }
            Part::Other(bytes) if walker.opaque_reason().is_some() => tail.extend_from_slice(bytes),
            Part::Other(_) => {}
        }
    }
    assert_eq!(walker.opaque_reason(), Some(OpaqueReason::DeviceState));
    (pages, tail)
}

fn blocks() -> impl Iterator<Item = (&'static [u8], u64)> + Clone {
    RAM.into_iter().chain([ROM]).map(|(name, pages)| (name, pages * PAGE_SIZE as u64))
}

/// How QEMU's own migration begins: with the first PART.
fn head_bytes() -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    writer.subsection("configuration/uuid", &[7; 16]);
    writer.ram_start(blocks());
    writer.command(2, &[0; 4]);
    writer.ram_part(false);
    writer.page(RAM[0].0, 0, &[1; PAGE_SIZE]);
    writer.take()
}

/// What QEMU writes with x-ignore-shared after the guest stopped.
fn rest() -> Vec<u8> {
    rest_of(blocks())
}

/// The same of a VM that has these blocks by then.
fn rest_of<'a>(blocks: impl Iterator<Item = (&'a [u8], u64)> + Clone) -> Vec<u8> {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    let name = b"x-ignore-shared";
    let capability = [&[0, 0, 0, 1, name.len() as u8][..], name].concat();
    writer.subsection("configuration/capabilities", &capability);
    let ram: u64 = blocks.clone().map(|(_, len)| len).sum();
    writer.raw(
        &[&[1][..], &2_u32.to_be_bytes(), &[3], b"ram", &0_u32.to_be_bytes(), &4_u32.to_be_bytes()].concat(),
    );
    writer.raw(&(ram | 4).to_be_bytes());
    for (name, len) in blocks {
        writer.raw(&[&[name.len() as u8][..], name, &len.to_be_bytes(), &0x1000_u64.to_be_bytes()].concat());
    }
    writer.section_end();
    writer.ram_part(true);
    for page in 0..ROM.1 {
        writer.page(ROM.0, page, &[page as u8; PAGE_SIZE]);
    }
    writer.section_end();
    writer.raw(DEVICES);
    writer.take()
}

fn pages_of(files: &[File]) -> Memory {
    let mut pages = BTreeMap::new();
    for ((name, count), file) in RAM.iter().zip(files) {
        for index in 0..*count {
            let mut page = [0; PAGE_SIZE];
            file.read_exact_at(&mut page, index * PAGE_SIZE as u64).unwrap();
            pages.insert((name.to_vec(), index), page);
        }
    }
    for index in 0..ROM.1 {
        pages.insert((ROM.0.to_vec(), index), [index as u8; PAGE_SIZE]);
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is written, and in whatever rounds it is sent: the destination holds what the files do.
    #[test]
    fn the_stream_brings_what_is_in_the_files(
        first in vec((0..2_usize, any::<prop::sample::Index>(), 0..4_u8), 0..600),
        later in vec((0..2_usize, any::<prop::sample::Index>(), 0..4_u8), 0..200),
    ) {
        let mut scene = Scene::new(false);
        let write = |scene: &Scene, writes: &[(usize, prop::sample::Index, u8)]| -> Vec<(usize, u64)> {
            let write = |(block, index, fill): &(usize, prop::sample::Index, u8)| {
                let page = index.index(RAM[*block].1 as usize) as u64;
                scene.write(*block, page, *fill);
                (*block, page)
            };
            writes.iter().map(write).collect()
        };
        write(&scene, &first);
        let all = scene.direct.all().unwrap();
        prop_assert_eq!(all.pages(), 790);
        scene.send(&all);
        let written = write(&scene, &later);
        let dirty = written.iter().fold(Dirty::default(), |dirty, &(block, page)| {
            dirty.and(scene.direct.place(block, page, 1))
        });
        let distinct: std::collections::BTreeSet<_> = written.iter().collect();
        prop_assert_eq!(dirty.pages(), distinct.len() as u64);
        scene.send(&dirty);
        let length = scene.finish(&rest()).unwrap();
        let stream = scene.stream();
        prop_assert_eq!(length, stream.len() as u64);
        let (pages, tail) = received(&stream);
        prop_assert_eq!(tail, DEVICES);
        prop_assert!(pages == pages_of(&scene.files));
    }
}

#[test]
fn zero_pages_and_holes_cost_a_record_each() {
    let mut scene = Scene::new(false);
    for page in 0..64 {
        scene.write(0, page, u8::from(page % 2 == 0));
    }
    let all = scene.direct.all().unwrap();
    scene.send(&all);
    let bytes: usize = scene.segments.iter().map(|segment| segment.bytes.len()).sum();
    assert!(bytes < 32 * (PAGE_SIZE + 8) + 758 * 9 + 400, "{bytes}");
}

#[test]
fn segments_hold_as_many_pages_as_was_asked_for() {
    let mut scene = Scene::new(false);
    for page in 0..RAM[0].1 {
        scene.write(0, page, 9);
    }
    let all = scene.direct.all().unwrap();
    scene.send(&all);
    let full = scene.segments.iter().filter(|segment| segment.bytes.len() >= CHUNK).count();
    assert_eq!(full as u64, RAM[0].1 / (CHUNK / PAGE_SIZE) as u64);
}

#[test]
fn pages_that_a_balloon_gave_back_are_found_once() {
    let mut scene = Scene::new(true);
    assert!(scene.balloon);
    for page in 10..20 {
        scene.write(0, page, 5);
    }
    let all = scene.direct.all().unwrap();
    scene.send(&all);
    assert_eq!(scene.direct.holes().unwrap().pages(), 0);
    scene.punch(0, 8, 5);
    let holes = scene.direct.holes().unwrap();
    assert_eq!(holes.pages(), 3, "10, 11 and 12 were something else before");
    assert_eq!(holes.stretches, [Stretch { block: 0, first: 10, count: 3 }]);
    scene.send(&holes);
    assert_eq!(scene.direct.holes().unwrap().pages(), 0);
    scene.finish(&rest()).unwrap();
    assert!(received(&scene.stream()).0 == pages_of(&scene.files));
    // Nobody asks where the VM has no balloon.
    let scene = Scene::new(false);
    assert_eq!(scene.direct.holes().unwrap().pages(), 0);
}

#[test]
fn a_file_that_was_cut_short_is_an_error() {
    let mut scene = Scene::new(false);
    for page in 0..RAM[0].1 {
        scene.write(0, page, 9);
    }
    let all = scene.direct.all().unwrap();
    scene.files[0].set_len(5000).unwrap();
    // What is beyond its end looks like a hole.
    let _ = scene.direct.written(&all, &mut |_| Ok(()));
    let refused = scene.finish(&rest());
    assert!(matches!(refused, Err(DirectError::Read { .. })), "{refused:?}");
}

#[test]
fn whoever_takes_no_more_ends_it() {
    let mut scene = Scene::new(false);
    scene.write(0, 0, 1);
    let all = scene.direct.all().unwrap();
    assert!(matches!(scene.direct.written(&all, &mut |_| Err(Gone)), Err(DirectError::Gone(Gone))));
}

#[test]
fn last_words_that_are_not_understood_are_refused() {
    let mut good = rest();
    for cut in [0, 9, 60, good.len() - DEVICES.len() - 5] {
        let mut scene = Scene::new(false);
        let refused = scene.finish(&good[..cut]);
        assert!(matches!(refused, Err(DirectError::Rest(_))), "{cut}: {refused:?}");
    }
    good[3] = 0;
    assert!(matches!(Scene::new(false).finish(&good), Err(DirectError::Rest(OpaqueReason::NotQemu))));
}

#[test]
fn holes_are_joined_with_their_neighbours_only() {
    let mut scene = Scene::new(true);
    for page in (0..8).chain(20..30) {
        scene.write(0, page, 5);
    }
    scene.write(1, 0, 5);
    let all = scene.direct.all().unwrap();
    scene.send(&all);
    // From 6 on one hole, of which 8 to 19 were sent as zeros; and another block's.
    scene.punch(0, 6, 16);
    scene.punch(1, 0, 1);
    let holes = scene.direct.holes().unwrap();
    let found =
        [(0, 6, 2), (0, 20, 2), (1, 0, 1)].map(|(block, first, count)| Stretch { block, first, count });
    assert_eq!(holes.stretches, found);
}

#[test]
fn memory_that_was_plugged_in_meanwhile_is_an_error() {
    let size = PAGE_SIZE as u64;
    let more: [(&[u8], u64); 1] = [(b"dimm", size)];
    let [first, second] = RAM.map(|(name, pages)| (name, pages * size));
    let rom = (ROM.0, ROM.1 * size);
    let others = [
        blocks().chain(more).collect::<Vec<_>>(),
        more.into_iter().chain(blocks()).collect(),
        vec![first, rom],
        vec![second, first, rom],
        vec![(first.0, first.1 - size), second, rom],
    ];
    for other in others {
        let mut scene = Scene::new(false);
        let refused = scene.finish(&rest_of(other.iter().copied()));
        assert!(matches!(refused, Err(DirectError::Changed)), "{other:?}: {refused:?}");
    }
}

#[test]
fn a_later_look_at_the_vm_finds_what_has_changed() {
    let fit = |scene: &Scene, blocks: usize, balloon: bool| {
        let files =
            RAM.into_iter().zip(&scene.files).map(|((name, _), file)| (name, file.try_clone().unwrap()));
        Fit { ram: Ram::in_files(files.take(blocks)).unwrap(), pid: 0, balloon }
    };
    let scene = Scene::new(false);
    assert!(scene.direct.fits(&fit(&scene, 2, false)).is_ok());
    let changed = |result: Result<(), DirectError>| matches!(result, Err(DirectError::Changed));
    assert!(changed(scene.direct.fits(&fit(&scene, 1, false))));
    assert!(changed(scene.direct.fits(&fit(&scene, 2, true))), "a balloon came");
    scene.files[1].set_len(PAGE_SIZE as u64).unwrap();
    assert!(changed(scene.direct.fits(&fit(&scene, 2, false))));
    // One that went does no harm.
    let scene = Scene::new(true);
    assert!(scene.direct.fits(&fit(&scene, 2, false)).is_ok());
}

#[test]
fn a_head_of_more_than_ram_is_refused() {
    let mut writer = StreamWriter::new();
    writer.header();
    writer.configuration("pc-q35-10.0");
    writer.raw(&[&[1][..], &9_u32.to_be_bytes(), &[12], b"dirty-bitmap", &[0; 8]].concat());
    let refused = Head::new().take(&writer.take());
    assert_eq!(refused, Err(HeadError::Opaque(OpaqueReason::ForeignSection)));
}

#[test]
fn a_head_that_lists_other_blocks_is_refused() {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(PAGE_SIZE as u64).unwrap();
    let other: &[u8] = b"elsewhere";
    let mut head = Head::new();
    head.take(&head_bytes()).unwrap();
    for name in [other, RAM[0].0] {
        let ram = Ram::in_files([(name, file.try_clone().unwrap())]).unwrap();
        let refused = Direct::over(Fit { ram, pid: 0, balloon: false }, &head, CHUNK);
        assert!(matches!(refused, Err(DirectError::Layout { .. })), "{refused:?}");
    }
}
