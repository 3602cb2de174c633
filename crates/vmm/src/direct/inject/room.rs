//! Room for the trampoline: the zeroes behind an ELF file's code, up to the end of the page.
//!
//! A mapping has whole pages, an ELF segment has not. What follows it in its last page is the linker's padding, or a part of the file
//! that is used at another address. Here it is executable, and nobody's. Where the segment ends is what the
//! program header says (elf(5)); that there are only zeroes is checked all the same.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::super::maps::{Mapping, mappings};
use super::trampoline::LEN;

/// Bytes of a page, on x86-64.
const PAGE: u64 = 4096;
/// Bytes between the beginnings of two trampolines.
const STRIDE: u64 = (LEN as u64).next_multiple_of(16);
/// Bytes of an ELF file's header.
const HEADER: usize = 64;
/// Bytes of a program header.
const PROGRAM_HEADER: usize = 56;
/// Program headers that are looked at: linkers write some 10.
const MAX_PROGRAM_HEADERS: usize = 64;

/// Where in a process trampolines can lie.
#[derive(Debug)]
pub(super) struct Rooms {
    rooms: Vec<Range<u64>>,
}

/// A place for a trampoline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// It lies there already.
    Written(u64),
    /// There are zeroes.
    Free(u64),
}

impl Rooms {
    /// `memory` is the process's `/proc/PID/mem`.
    pub(super) fn find(pid: i32, memory: &File) -> io::Result<Self> {
        let mappings = mappings(pid)?;
        let code = mappings.iter().filter(|map| map.permissions == *b"r-xp" && map.inode != 0);
        let rooms = code.filter_map(|code| {
            let is_head = |map: &&Mapping| {
                (map.device, map.inode, map.offset) == (code.device, code.inode, 0) && map.start <= code.start
            };
            // The nearest: a file can be mapped more than once.
            let head = mappings.iter().rfind(is_head)?;
            room(&program_headers(memory, head.start)?, code)
        });
        Ok(Rooms { rooms: rooms.collect() })
    }

    /// Where this trampoline lies, or can lie. They fill the rooms in order, so one that is there precedes the first zeroes.
    pub(super) fn slot(&self, memory: &File, image: &[u8; LEN]) -> io::Result<Option<Slot>> {
        for base in self.slots() {
            let mut there = [0; LEN];
            memory.read_exact_at(&mut there, base)?;
            if there == *image {
                return Ok(Some(Slot::Written(base)));
            }
            if there == [0; LEN] {
                return Ok(Some(Slot::Free(base)));
            }
        }
        Ok(None)
    }

    fn slots(&self) -> impl Iterator<Item = u64> {
        self.rooms.iter().flat_map(|room| {
            let first = room.start.next_multiple_of(16);
            (first..room.end).step_by(STRIDE as usize).take_while(|base| base + STRIDE <= room.end)
        })
    }
}

/// The program headers of the ELF file that is mapped at `head`.
fn program_headers(memory: &File, head: u64) -> Option<Vec<[u8; PROGRAM_HEADER]>> {
    const CLASS_64: u8 = 2;
    let mut header = [0; HEADER];
    memory.read_exact_at(&mut header, head).ok()?;
    let count = usize::from(u16::from_le_bytes([header[56], header[57]]));
    let len = usize::from(u16::from_le_bytes([header[54], header[55]]));
    let known = header.starts_with(b"\x7fELF") && header[4] == CLASS_64 && len == PROGRAM_HEADER;
    if !known || count > MAX_PROGRAM_HEADERS {
        return None;
    }
    let place = head.checked_add(word(&header, 32))?;
    let mut headers = vec![[0; PROGRAM_HEADER]; count];
    memory.read_exact_at(headers.as_flattened_mut(), place).ok()?;
    Some(headers)
}

/// What of a mapping of code lies behind the segment that it maps.
fn room(headers: &[[u8; PROGRAM_HEADER]], code: &Mapping) -> Option<Range<u64>> {
    const LOAD: u32 = 1;
    const EXECUTABLE: u32 = 1;
    let flags = |at: usize, header: &[u8]| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
    headers.iter().find_map(|header| {
        let (offset, in_file, in_memory) = (word(header, 8), word(header, 32), word(header, 40));
        let end = offset.checked_add(in_file)?;
        let is_code = flags(0, header) == LOAD && flags(4, header) & EXECUTABLE != 0 && in_file == in_memory;
        let is_mapped = offset / PAGE * PAGE <= code.offset
            && code.offset.checked_add(code.end - code.start)? == end.checked_next_multiple_of(PAGE)?;
        // Then the end lies in the mapping's last page.
        (is_code && is_mapped && end > code.offset).then(|| code.start + (end - code.offset)..code.end)
    })
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| bytes[at + byte]))
}
