//! A guest with a Debian userland in RAM: redis under load and a compiler in a loop, beside the self-checking program.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dwcp_tests::Kit;

use crate::apt::{Apt, RELEASE};
use crate::cpio::{self, Entry};

/// Raised when what is in the archive changes, so that older ones are made anew.
const ARCHIVE: &str = "debian-2.cpio";
/// With all that they depend on.
const PACKAGES: [&str; 4] = ["redis-server", "gcc", "libc6-dev", "busybox-static"];
/// What nobody reads in such a guest, and the largest programs that nobody runs there.
const LEFT_OUT: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/info",
    "usr/share/perl",
    "usr/lib/gcc/x86_64-linux-gnu/12/lto1",
    "usr/lib/x86_64-linux-gnu/libc.a",
    "usr/lib/gcc/x86_64-linux-gnu/12/plugin",
];
/// Half of redis' memory is there from the beginning, the other half comes and goes.
const INIT: &str = "\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /tmp
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
export PATH=/usr/bin:/bin:/usr/sbin:/sbin
cd /tmp
redis-server --port 0 --unixsocket /tmp/redis --save '' --maxmemory 500mb --maxmemory-policy allkeys-random \\
  --enable-debug-command yes >/dev/null 2>&1 &
until redis-cli -s /tmp/redis debug populate 300000 key 500 >/dev/null 2>&1; do /bin/busybox sleep 1; done
redis-benchmark -s /tmp/redis -l -q -c 8 -r 500000 -d 500 -t set,get >/dev/null 2>&1 &
while :; do gcc -O2 -c /load.c -o /tmp/load.o; done >/dev/null 2>&1 &
exec /check
";

/// The initramfs, made once in the laboratory's folder.
///
/// # Errors
/// No mirror of Debian's in reach.
pub(super) fn initramfs(kit: &Kit) -> Result<PathBuf> {
    let archive = kit.folder().join(ARCHIVE);
    if archive.is_file() {
        return Ok(archive);
    }
    println!("fetching a Debian userland (some 80 MB), once");
    let (apt_folder, root) = (kit.folder().join("apt-debian"), kit.folder().join("debian"));
    let apt = Apt::open(&apt_folder)?;
    for package in PACKAGES {
        apt.unpack_with_dependencies(RELEASE, package, &root)?;
    }
    apt.unpack_alone("libc6", &root)?;
    fs::remove_dir_all(&apt_folder)?;
    let check = fs::read(root_of_the_check(kit)).context("the self-checking program")?;
    let mut files = vec![
        ("check".to_owned(), Stored::Program(check)),
        ("init".to_owned(), Stored::Program(INIT.into())),
        ("load.c".to_owned(), Stored::Program(program().into())),
        ("dev".to_owned(), Stored::Folder),
        ("dev/console".to_owned(), Stored::Console),
    ];
    collect(&root, &root, &mut files)?;
    let entries: Vec<(&str, Entry<'_>)> =
        files.iter().map(|(name, stored)| (name.as_str(), stored.entry())).collect();
    // Never half a file under the final name.
    let half = archive.with_extension("half");
    fs::write(&half, cpio::archive(&entries))?;
    fs::rename(half, &archive)?;
    fs::remove_dir_all(&root)?;
    Ok(archive)
}

/// Where the laboratory's setup has built it.
fn root_of_the_check(kit: &Kit) -> PathBuf {
    let target = kit.folder().parent().unwrap_or(Path::new("target"));
    target.join("x86_64-unknown-linux-gnu/release/dwcp-guest")
}

/// A C file that keeps a compiler busy for a while.
fn program() -> String {
    let function = |n: usize| {
        format!(
            "unsigned f{n}(unsigned *a, unsigned n) {{ unsigned s = {n}; for (unsigned i = 0; i < n; i++) \
             {{ s = s * {} + (a[i] ^ (s >> {})); if (s & {}) a[i % 7] += s; }} printf(\"%u\\n\", s); return s; }}\n",
            2 * n + 3,
            n % 31 + 1,
            1 << (n % 16)
        )
    };
    "#include <stdio.h>\n".to_owned() + &(0..400).map(function).collect::<String>()
}

/// What goes into the archive.
enum Stored {
    Folder,
    Console,
    Program(Vec<u8>),
    File(Vec<u8>),
    Link(String),
}

impl Stored {
    fn entry(&self) -> Entry<'_> {
        match self {
            Stored::Folder => Entry::Folder,
            // The kernel opens it for its init.
            Stored::Console => Entry::Device(5, 1),
            Stored::Program(data) => Entry::Program(data),
            Stored::File(data) => Entry::File(data),
            Stored::Link(to) => Entry::Link(to),
        }
    }
}

fn collect(root: &Path, folder: &Path, files: &mut Vec<(String, Stored)>) -> Result<()> {
    let mut entries: Vec<PathBuf> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    entries.sort();
    for path in entries {
        let name = path.strip_prefix(root)?.to_str().context("a file's name")?.to_owned();
        if LEFT_OUT.contains(&name.as_str()) {
            continue;
        }
        let meta = fs::symlink_metadata(&path)?;
        let stored = if meta.is_symlink() {
            Stored::Link(fs::read_link(&path)?.to_str().context("a link's end")?.to_owned())
        } else if meta.is_dir() {
            Stored::Folder
        } else if meta.permissions().mode() & 0o100 != 0 {
            Stored::Program(fs::read(&path)?)
        } else {
            Stored::File(fs::read(&path)?)
        };
        files.push((name, stored));
        if meta.is_dir() {
            collect(root, &path, files)?;
        }
    }
    Ok(())
}
