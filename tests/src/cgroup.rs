//! A control group with a memory limit of its own, on either version of the kernel's interface.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The group; it is removed when this is dropped, by when its processes must have ended.
#[derive(Debug)]
pub struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// A group whose processes may take so many bytes, without swap.
    ///
    /// # Errors
    /// There is no memory controller here, or it may not be used.
    pub fn new(bytes: u64) -> Result<Self> {
        let (unified, legacy) = (Path::new("/sys/fs/cgroup"), Path::new("/sys/fs/cgroup/memory"));
        let name = format!("dwcp-test-{}-{}", std::process::id(), number());
        let controllers = fs::read_to_string(unified.join("cgroup.controllers")).unwrap_or_default();
        let (group, limits) = if controllers.split_whitespace().any(|name| name == "memory") {
            fs::write(unified.join("cgroup.subtree_control"), "+memory").context("the memory controller")?;
            (unified.join(name), ["memory.max", "memory.swap.max"])
        } else {
            (legacy.join(name), ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"])
        };
        fs::create_dir(&group).with_context(|| format!("no control group {}", group.display()))?;
        let group = MemoryGroup(group);
        fs::write(group.0.join(limits[0]), bytes.to_string()).context("a memory limit")?;
        // Kernels without accounting of swap have no such file.
        let swap = if limits[1] == "memory.swap.max" { 0 } else { bytes };
        let _ = fs::write(group.0.join(limits[1]), swap.to_string());
        Ok(group)
    }

    /// Puts a process into it. What it took before stays where it was.
    ///
    /// # Errors
    /// There is no such process any more.
    pub fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string()).context("a process for the control group")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Tells apart the groups of one process.
fn number() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
