//! Whether a VM's RAM may be read and tracked from outside. Nothing is changed by asking.

use std::fs;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use crate::describe::RamBlock;
use crate::mapped::{FileId, Ram, Unmapped, maps_file};
use crate::qmp::{Qemu, QmpError};

/// Open files of a process that are looked at.
const MAX_FILES: usize = 65_536;
/// What an open file's flags have in them where its reads go past the page cache.
const O_DIRECT: u32 = rustix::fs::OFlags::DIRECT.bits();
/// What QEMU opens for devices that write guest memory by themselves: what its files' names begin with. /dev/sg is SCSI passed through, and
/// SGX, whose memory nobody reads from outside.
const DEVICES: [&str; 6] =
    ["/dev/vfio/", "/dev/vhost-vdpa", "/dev/vhost-scsi", "/dev/iommu", "/dev/sg", "anon_inode:[kvm-gmem]"];

/// Why a VM's RAM cannot be read directly.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// There is no file that holds it.
    #[error(transparent)]
    Unmapped(#[from] Unmapped),
    /// QEMU (8.1+) leaves out only named files with x-ignore-shared, and would send this RAM while the guest stands still.
    #[error("RAM block {block} lies in no named file (use memory-backend-file with mem-path and share=on)")]
    Unnamed {
        /// The block.
        block: String,
    },
    /// All RAM would be sent while the guest stands still.
    #[error("this QEMU has no x-ignore-shared (it takes 4.0)")]
    TooOld,
    /// Large blocks outside of the files would be sent while the guest stands still.
    #[error("{bytes} bytes of RAM are in no shared file, most of them in RAM block {block}")]
    Outside {
        /// The largest block.
        block: String,
        /// The length of all.
        bytes: u64,
    },
    /// The VMM refused an answer.
    #[error("the VMM does not tell about its memory")]
    Qmp(#[from] QmpError),
    /// A device writes past the process's page tables.
    #[error("the VMM has {file} open: such a device writes guest memory unseen")]
    Device {
        /// What it has open.
        file: String,
    },
    /// Reads that bypass the page cache write into pinned pages.
    #[error(
        "the VMM has {file} open for direct I/O, whose reads write guest memory unseen (cache.direct=off)"
    )]
    DirectIo {
        /// The file.
        file: String,
    },
    /// A disk's commands go to the device as the guest gives them, and it writes into pinned pages.
    #[error("disk {device} is passed through ({kind}), whose reads write guest memory unseen (use scsi-hd)")]
    PassedThrough {
        /// The disk.
        device: String,
        /// QEMU's type of it.
        kind: String,
    },
    /// Somebody else can write the guest's memory.
    #[error("process {pid} maps the guest's memory, too")]
    Shared {
        /// That process.
        pid: u32,
    },
    /// The processes cannot be looked into.
    #[error("cannot look into the processes of this machine")]
    Proc(#[source] io::Error),
}

/// Bytes of all blocks outside of shared files: what a display adapter and firmware have. They go while the guest stands still.
const MAX_OUTSIDE: u64 = 64 << 20;

/// The RAM of a VM that may be read directly.
#[derive(Debug)]
pub struct Fit {
    pub(super) ram: Ram,
    /// The VMM's process.
    pub(super) pid: i32,
    /// The VM has a balloon, which gives pages back without writing to them.
    pub(super) balloon: bool,
}

impl Fit {
    /// Looks at the VM, through QMP and its process.
    ///
    /// # Errors
    /// Why its RAM has to be taken from its migration stream instead.
    pub async fn find(qemu: &Qemu) -> Result<Self, Unfit> {
        let pid = qemu.qmp().pid().filter(|&pid| pid > 0).ok_or(Unmapped::NoProcess)?;
        let ram = Ram::open(qemu).await?;
        for (name, backing) in ram.backings() {
            if !backing.mapping.is_some_and(|mapping| mapping.named) {
                return Err(Unfit::Unnamed { block: String::from_utf8_lossy(name).into_owned() });
            }
        }
        let mut blocks = qemu.ram_blocks().await?;
        blocks.retain(|block| !ram.backings().any(|(name, _)| name == block.name.as_bytes()));
        outside(&blocks)?;
        let known = qemu.qmp().execute("query-migrate-capabilities", Value::Null).await?;
        let mut names = known.as_array().into_iter().flatten().map(|known| &known["capability"]);
        if !names.any(|name| name == "x-ignore-shared") {
            return Err(Unfit::TooOld);
        }
        let balloon = match qemu.qmp().execute("query-balloon", Value::Null).await {
            Ok(_) => true,
            Err(error) if error.is_refusal() => false,
            Err(error) => return Err(error.into()),
        };
        passed_through(qemu).await?;
        devices(Path::new(&format!("/proc/{pid}")))?;
        let files: Vec<FileId> =
            ram.backings().filter_map(|(_, b)| b.mapping).map(|mapping| mapping.file).collect();
        sharers(pid.unsigned_abs(), &files)?;
        Ok(Fit { ram, pid, balloon })
    }

    /// Bytes of RAM that are read directly.
    pub fn bytes(&self) -> u64 {
        self.ram.bytes()
    }
}

/// Whether the blocks outside of shared files are few enough.
fn outside(blocks: &[RamBlock]) -> Result<(), Unfit> {
    let bytes = blocks.iter().fold(0_u64, |sum, block| sum.saturating_add(block.used));
    match blocks.iter().max_by_key(|block| block.used) {
        Some(largest) if bytes > MAX_OUTSIDE => Err(Unfit::Outside { block: largest.name.clone(), bytes }),
        _ => Ok(()),
    }
}

/// Looks for disks whose commands go through SG_IO: it pins the guest's pages as O_DIRECT does, without that flag.
async fn passed_through(qemu: &Qemu) -> Result<(), Unfit> {
    let disks = qemu.qmp().execute("query-block", Value::Null).await?;
    for disk in disks.as_array().into_iter().flatten() {
        let Some(device) = disk["qdev"].as_str().filter(|device| !device.is_empty()) else { continue };
        // Its id, or its path where it has none.
        let path = match device.starts_with('/') {
            true => device.to_owned(),
            false => format!("/machine/peripheral/{device}"),
        };
        let kind = match qemu.qmp().execute("qom-get", json!({ "path": path, "property": "type" })).await {
            Ok(kind) => kind,
            // One that was unplugged meanwhile.
            Err(error) if error.is_refusal() => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(kind @ ("scsi-block" | "scsi-generic")) = kind.as_str() {
            return Err(Unfit::PassedThrough { device: device.to_owned(), kind: kind.to_owned() });
        }
    }
    Ok(())
}

/// Looks at what a process has open, by its folder under /proc.
fn devices(process: &Path) -> Result<(), Unfit> {
    for entry in fs::read_dir(process.join("fd")).map_err(Unfit::Proc)?.take(MAX_FILES) {
        let entry = entry.map_err(Unfit::Proc)?;
        // One that was closed meanwhile.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let file = target.to_string_lossy().into_owned();
        if DEVICES.iter().any(|device| file.starts_with(device)) {
            return Err(Unfit::Device { file });
        }
        let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).unwrap_or_default();
        if flags(&info).is_some_and(|flags| flags & O_DIRECT != 0) && target.is_absolute() {
            return Err(Unfit::DirectIo { file });
        }
    }
    Ok(())
}

/// The flags in a file's `fdinfo` (proc_pid_fdinfo(5)).
fn flags(info: &str) -> Option<u32> {
    let line = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(line.trim(), 8).ok()
}

/// Looks for processes beside `vmm` and this one that map one of the files. One that cannot be looked into counts as one that does not: it may
/// have ended, and whether it holds the other end of a vhost-user socket cannot be told either. So an agent that is not root does not see
/// another user's vhost-user backend.
fn sharers(vmm: u32, files: &[FileId]) -> Result<(), Unfit> {
    for entry in fs::read_dir("/proc").map_err(Unfit::Proc)? {
        let name = entry.map_err(Unfit::Proc)?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid == vmm || pid == std::process::id() {
            continue;
        }
        if files.iter().any(|&file| maps_file(pid, file) == Some(true)) {
            return Err(Unfit::Shared { pid });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, used: u64) -> RamBlock {
        RamBlock { name: name.to_owned(), page_size: 4096, used, total: used }
    }

    #[test]
    fn blocks_outside_of_files_are_held_against_the_limit_together() {
        let mut blocks = vec![block("vga.vram", MAX_OUTSIDE - 8192), block("pc.bios", 8192)];
        assert!(outside(&blocks).is_ok());
        assert!(outside(&[]).is_ok());
        blocks.push(block("pc.rom", 4096));
        let Err(Unfit::Outside { block, bytes }) = outside(&blocks) else {
            panic!("they are too many bytes")
        };
        assert_eq!((block.as_str(), bytes), ("vga.vram", MAX_OUTSIDE + 4096));
    }
}
