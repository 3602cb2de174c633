//! Which file lies behind which RAM block.
//!
//! QMP tells the memory backends, which of them are shared, and the path of those in named files. The VMM's process has
//! the file open and mapped: its map says which files it maps shared and writable, and how much of each. A file
//! is taken only if it is the one that fits. Nothing is guessed: a wrong file would be overwritten.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{fstatfs, major, minor};
use serde_json::json;

use super::ram::{Backing, FileId, Mapping};
use crate::qmp::{Qemu, QmpError};

/// Bytes of a process's map that are read: some 100 bytes a line, of which a QEMU has a few hundred.
const MAX_MAPS: u64 = 4 << 20;
/// The file system type of huge pages, which can be mapped only, not written (linux/magic.h).
const HUGETLBFS: i64 = 0x958458f6;

/// Why the guest's RAM cannot be written from outside.
#[derive(Debug, thiserror::Error)]
pub enum Unmapped {
    /// It is the VMM's private memory.
    #[error("no memory backend of the VM is shared (share=on)")]
    NotShared,
    /// The socket does not tell whose it is.
    #[error("the VMM's process is not known")]
    NoProcess,
    /// The VMM refused an answer.
    #[error("the VMM does not tell about its memory")]
    Qmp(#[from] QmpError),
    /// The process cannot be looked into.
    #[error("cannot look into the VMM's process {pid}")]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// None or several of the process's files could be the backend's.
    #[error("{found} files of the VMM fit memory backend {id}")]
    Unclear {
        /// The backend.
        id: String,
        /// How many.
        found: usize,
    },
    /// The connection to the VMM shall outlive the agent: then all must go through it, since it alone says how far it came.
    #[error(
        "the connection to the VMM is kept for the agent's next life ([vmm] outlive), and takes all pages"
    )]
    Kept,
    /// Huge pages.
    #[error("memory backend {id} is made of huge pages, which cannot be written from outside")]
    HugePages {
        /// The backend.
        id: String,
    },
}

/// The shared backends of a VM that are RAM blocks, by the block's name.
pub(super) async fn backings(qemu: &Qemu) -> Result<BTreeMap<Box<[u8]>, Backing>, Unmapped> {
    let pid = qemu.qmp().pid().filter(|&pid| pid > 0).ok_or(Unmapped::NoProcess)?;
    let blocks = qemu.ram_blocks().await?;
    let mut found = BTreeMap::new();
    for backend in qemu.memory_backends().await?.into_iter().filter(|backend| backend.share) {
        let Some(id) = backend.id else { continue };
        let canonical = format!("/objects/{id}");
        let Some(block) = blocks.iter().find(|block| block.name == id || block.name == canonical) else {
            continue;
        };
        let wanted = Wanted { path: path(qemu, &canonical).await?, len: backend.size, id };
        let failed = |source| Unmapped::Process { pid, source };
        let process = Process { root: PathBuf::from(format!("/proc/{pid}")) };
        let maps = process.maps().map_err(failed)?;
        let mut fitting = maps.into_iter().filter(|map| wanted.fits(map));
        let (Some(map), None) = (fitting.next(), fitting.next()) else {
            let maps = process.maps().map_err(failed)?;
            let found = maps.iter().filter(|map| wanted.fits(map)).count();
            return Err(Unmapped::Unclear { id: wanted.id, found });
        };
        let file = process.open(&map).map_err(failed)?;
        if fstatfs(&file).map_err(|error| failed(error.into()))?.f_type as i64 == HUGETLBFS {
            return Err(Unmapped::HugePages { id: wanted.id });
        }
        let mut backing = Backing::new(file, map.offset, block.used.min(map.len)).map_err(failed)?;
        backing.mapping =
            Some(Mapping { address: map.start, named: wanted.path.is_some(), file: map.file_id() });
        found.insert(block.name.as_bytes().into(), backing);
    }
    if found.is_empty() { Err(Unmapped::NotShared) } else { Ok(found) }
}

/// The file of a backend, if it has a named one.
async fn path(qemu: &Qemu, backend: &str) -> Result<Option<PathBuf>, QmpError> {
    let arguments = json!({ "path": backend, "property": "mem-path" });
    match qemu.qmp().execute("qom-get", arguments).await {
        Ok(path) => Ok(path.as_str().map(PathBuf::from)),
        // A memfd has no such property.
        Err(error) if error.is_refusal() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a backend's file looks like in the process's map.
struct Wanted {
    id: String,
    path: Option<PathBuf>,
    len: u64,
}

impl Wanted {
    fn fits(&self, map: &Map) -> bool {
        let named = match &self.path {
            // A folder as path means an unlinked file in it, whose name ends in the backend's id and something
            // random.
            Some(path) => {
                map.path == *path
                    || (map.path.parent() == Some(path) && map.is_deleted && self.is_named_after(map))
            }
            None => map.path.to_string_lossy().starts_with("/memfd:"),
        };
        named && map.len == self.len
    }

    fn is_named_after(&self, map: &Map) -> bool {
        let name = map.path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(&format!("qemu_back_mem.{}.", self.id)) || name.contains(&format!(".{}.", self.id))
    }
}

/// A stretch of a file that a process maps shared and writable.
#[derive(Debug, PartialEq, Eq)]
struct Map {
    start: u64,
    end: u64,
    offset: u64,
    len: u64,
    device: (u32, u32),
    inode: u64,
    path: PathBuf,
    is_deleted: bool,
}

/// Whether the process maps the file in any way; `None` where it cannot be looked into.
pub(crate) fn maps_file(pid: u32, file: FileId) -> Option<bool> {
    let process = Process { root: PathBuf::from(format!("/proc/{pid}")) };
    Some(process.text().ok()?.lines().filter_map(mapped_file).any(|mapped| mapped == file))
}

/// A process, by its folder under /proc.
struct Process {
    root: PathBuf,
}

impl Process {
    fn maps(&self) -> io::Result<Vec<Map>> {
        self.text().map(|text| parse_maps(&text))
    }

    fn text(&self) -> io::Result<String> {
        let mut text = String::new();
        let file = File::open(self.root.join("maps"))?;
        io::Read::read_to_string(&mut io::Read::take(file, MAX_MAPS), &mut text)?;
        Ok(text)
    }

    /// The file of a map, from among the process's open files or by the map itself.
    fn open(&self, map: &Map) -> io::Result<File> {
        let is_it = |path: &Path| fs::metadata(path).is_ok_and(|data| map.is(&data));
        let open: Vec<_> = fs::read_dir(self.root.join("fd"))?.flatten().map(|entry| entry.path()).collect();
        let path = open
            .into_iter()
            .find(|path| is_it(path))
            .unwrap_or_else(|| self.root.join("map_files").join(format!("{:x}-{:x}", map.start, map.end)));
        let file = File::options().read(true).write(true).open(path)?;
        // What was found by a path may be another file by now.
        if map.is(&file.metadata()?) { Ok(file) } else { Err(io::ErrorKind::NotFound.into()) }
    }
}

impl Map {
    fn file_id(&self) -> FileId {
        FileId { device: self.device, inode: self.inode }
    }

    fn is(&self, data: &fs::Metadata) -> bool {
        data.ino() == self.inode && (major(data.dev()), minor(data.dev())) == self.device && data.is_file()
    }
}

/// The shared, writable mappings of files in the text of `/proc/PID/maps` (proc_pid_maps(5)), adjacent ones joined.
fn parse_maps(text: &str) -> Vec<Map> {
    let mut maps: Vec<Map> = Vec::new();
    for map in text.lines().filter_map(parse_map) {
        match maps.last_mut() {
            Some(last)
                if last.end == map.start
                    && last.offset + last.len == map.offset
                    && (last.device, last.inode) == (map.device, map.inode) =>
            {
                last.end = map.end;
                last.len += map.len;
            }
            _ => maps.push(map),
        }
    }
    maps
}

/// The file of a line of the map, if it has one.
fn mapped_file(line: &str) -> Option<FileId> {
    let mut fields = line.splitn(6, ' ').skip(3);
    let (high, low) = fields.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let inode = fields.next()?.parse().ok().filter(|&inode| inode != 0)?;
    Some(FileId { device: (number(high)?, number(low)?), inode })
}

fn parse_map(line: &str) -> Option<Map> {
    const DELETED: &str = " (deleted)";
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = (hex(start)?, hex(end)?);
    let permissions = fields.next()?.as_bytes();
    let offset = hex(fields.next()?)?;
    let FileId { device, inode } = mapped_file(line)?;
    let mut fields = fields.skip(2);
    if permissions.get(1) != Some(&b'w') || permissions.get(3) != Some(&b's') {
        return None;
    }
    let path = fields.next()?.trim_start();
    let is_deleted = path.ends_with(DELETED);
    let path = PathBuf::from(path.strip_suffix(DELETED).unwrap_or(path));
    Some(Map { start, end, offset, len: end.checked_sub(start)?, device, inode, path, is_deleted })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
55e0a0000000-55e0a0001000 r--p 00000000 fe:00 262 /usr/bin/qemu-system-x86_64
7f0000000000-7f0000800000 rw-s 00000000 00:01 77                         /memfd:memory-backend-memfd (deleted)
7f0000800000-7f0001000000 rw-s 00800000 00:01 77                         /memfd:memory-backend-memfd (deleted)
7f0001000000-7f0001001000 rw-s 00000000 00:01 78                         /memfd:other (deleted)
7f0002000000-7f0003000000 rw-s 00001000 00:19 9                          /dev/shm/a b (deleted)
7f0004000000-7f0005000000 rw-p 00000000 00:19 10                         /dev/shm/private
7f0006000000-7f0006001000 r--s 00000000 00:19 11                         /dev/shm/read-only
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
not a line
";

    fn wanted(path: Option<&str>, len: u64) -> Wanted {
        Wanted { id: "ram".into(), path: path.map(PathBuf::from), len }
    }

    #[test]
    fn shared_and_writable_files_are_found_and_their_parts_joined() {
        let maps = parse_maps(MAPS);
        let seen: Vec<_> =
            maps.iter().map(|m| (m.inode, m.offset, m.len, m.path.to_str().unwrap(), m.is_deleted)).collect();
        assert_eq!(
            seen,
            [
                (77, 0, 16 << 20, "/memfd:memory-backend-memfd", true),
                (78, 0, 4096, "/memfd:other", true),
                (9, 4096, 16 << 20, "/dev/shm/a b", true),
            ]
        );
        assert_eq!(maps[0].device, (0, 1));
    }

    #[test]
    fn a_map_fits_by_name_and_size_or_not_at_all() {
        let maps = parse_maps(MAPS);
        let fitting = |wanted: Wanted| maps.iter().filter(|map| wanted.fits(map)).count();
        assert_eq!(fitting(wanted(None, 16 << 20)), 1);
        assert_eq!(fitting(wanted(None, 8 << 20)), 0);
        assert_eq!(fitting(wanted(Some("/dev/shm/a b"), 16 << 20)), 1);
        assert_eq!(fitting(wanted(Some("/dev/shm/other"), 16 << 20)), 0);
        assert_eq!(fitting(wanted(Some("/dev/shm"), 16 << 20)), 0, "named after no backend");
    }

    #[test]
    fn an_open_file_of_this_process_is_found_again_by_its_map() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create_new(dir.path().join("ram")).unwrap();
        let data = file.metadata().unwrap();
        let map = Map {
            start: 0,
            end: 0,
            offset: 0,
            len: 0,
            device: (major(data.dev()), minor(data.dev())),
            inode: data.ino(),
            path: PathBuf::new(),
            is_deleted: false,
        };
        let process = Process { root: PathBuf::from("/proc/self") };
        assert_eq!(process.open(&map).unwrap().metadata().unwrap().ino(), data.ino());
        assert!(process.open(&Map { inode: data.ino() + 1_000_000_007, ..map }).is_err());
    }
}
