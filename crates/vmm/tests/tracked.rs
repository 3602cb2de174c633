//! What real QEMUs write to their RAM is told from outside, while a live, self-checking guest runs. A machine that was not
//! set up (`cargo xtask setup`) skips these by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use dwcp_tests::{Backing, Kit, Qemu as Vm, QemuSpec, QemuVersion, Role};
use dwcp_vmm::direct::Tracker;
use dwcp_vmm::qmp::{Qemu, QmpConfig};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const PAGE: u64 = 4096;

/// Where a process has mapped a file.
fn mapped(pid: u32, file: &Path) -> Range<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with(file.to_str().unwrap())).unwrap();
    let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
    let hex = |text| u64::from_str_radix(text, 16).unwrap();
    hex(start)..hex(end)
}

fn bytes(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// A copy that is kept up with what is told to have been written is, once the guest stands still, the guest's memory.
async fn a_copy_is_kept_up(name: &str, version: QemuVersion) {
    let Some(kit) = Kit::or_skip(name) else { return };
    let dir = tempfile::tempdir().unwrap();
    let ram = tempfile::Builder::new().prefix("dwcp-track").tempfile_in("/dev/shm").unwrap();
    let mut spec = QemuSpec::new(version, Role::Source);
    spec.backing = Backing::File(ram.path().to_owned());
    if rustix::process::geteuid().is_root() {
        // As in production: a QEMU without privileges, to which less is allowed.
        let user = match version {
            QemuVersion::V7_2 => ["-runas", "nobody"],
            QemuVersion::V10_0 => ["-run-with", "user=nobody"],
        };
        spec.extra.extend(user.map(String::from));
    }
    let vm = Vm::launch(&kit, dir.path(), "a", &spec).unwrap().booted().unwrap();
    let qemu = Qemu::connect(&vm.qmp_path(), QmpConfig::default()).await.unwrap();
    let pid = vm.pid();
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let range = mapped(pid, ram.path());

    let begin = || Tracker::begin(pid as i32, pidfd.as_fd(), vec![range.clone()]).unwrap();
    let mut tracker = begin();
    tracker.written().unwrap();
    let mut copy = vec![0; (range.end - range.start) as usize];
    ram.as_file().read_exact_at(&mut copy, 0).unwrap();
    let mut keep_up = |written: &[Range<u64>]| {
        for written in written {
            let (start, end) = (written.start - range.start, written.end - range.start);
            ram.as_file().read_exact_at(&mut copy[start as usize..end as usize], start).unwrap();
        }
    };
    for _ in 0..10 {
        vm.guest_ok_for(Duration::from_millis(200)).unwrap();
        let begun = Instant::now();
        let written = tracker.written().unwrap();
        let (scan, pages) = (begun.elapsed(), bytes(&written) / PAGE);
        eprintln!("{pages} pages in {} ranges, found in {scan:?}", written.len());
        assert!(pages > 0, "the guest writes all the time");
        keep_up(&written);
    }
    qemu.stop().await.unwrap();
    keep_up(&tracker.written().unwrap());
    assert_eq!(tracker.written().unwrap(), []);
    let mut memory = vec![0; copy.len()];
    ram.as_file().read_exact_at(&mut memory, 0).unwrap();
    let wrong: Vec<_> = (0..copy.len())
        .step_by(PAGE as usize)
        .filter(|&at| copy[at..at + PAGE as usize] != memory[at..at + PAGE as usize])
        .collect();
    assert!(wrong.is_empty(), "{} pages differ, the first at {:#x}", wrong.len(), wrong[0]);

    qemu.cont().await.unwrap();
    drop(tracker);
    // Again and again, while the guest runs.
    let begun = Instant::now();
    for _ in 0..100 {
        let mut tracker = begin();
        tracker.written().unwrap();
    }
    eprintln!("{:?} for each beginning, first look and end", begun.elapsed() / 100);
    vm.guest_ok_for(Duration::from_secs(1)).unwrap();
    for file in std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let file = std::fs::read_link(file.unwrap().path()).unwrap_or_default();
        assert!(!file.to_string_lossy().contains("userfaultfd"), "{}", file.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_guest_in_qemu_7_2_is_kept_up() {
    a_copy_is_kept_up("a_copy_of_a_guest_in_qemu_7_2_is_kept_up", QemuVersion::V7_2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_a_guest_in_qemu_10_0_is_kept_up() {
    a_copy_is_kept_up("a_copy_of_a_guest_in_qemu_10_0_is_kept_up", QemuVersion::V10_0).await;
}
