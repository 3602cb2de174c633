//! The ioctls of a userfaultfd (linux/userfaultfd.h) and of `/proc/PID/pagemap` (linux/fs.h; the kernel's
//! Documentation/admin-guide/mm/pagemap.rst): the one place that calls them.
#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Opcode, opcode};

/// The group of a userfaultfd's requests.
const UFFDIO: u8 = 0xaa;
/// `UFFD_API`: the one version that there is.
const API_VERSION: u64 = 0xaa;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`: write protection of shared memory and huge pages.
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
/// `UFFD_FEATURE_WP_UNPOPULATED`: write protection of pages that are not there yet.
const WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_ASYNC`: the kernel lifts the protection at the first write, and nobody has to be asked.
const WP_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 1 << 1;
/// `PAGE_IS_WRITTEN`: not write-protected.
const WRITTEN: u64 = 1 << 1;
/// `PM_SCAN_WP_MATCHING`: protect what is reported.
const WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: refuse what is not registered.
const CHECK_WPASYNC: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Stretch {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Stretch,
    mode: u64,
    ioctls: u64,
}

/// `struct page_region`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `UFFDIO_API`, with the features of asynchronous write protection. `EINVAL` from a kernel that does not have them.
pub(super) fn enable(userfaultfd: impl AsFd) -> io::Result<()> {
    const REQUEST: Opcode = opcode::read_write::<Api>(UFFDIO, 0x3f);
    let features = WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM;
    ioctl(userfaultfd, REQUEST, &mut Api { api: API_VERSION, features, ioctls: 0 }).map(|_| ())
}

/// `UFFDIO_REGISTER` for write protection. What is registered already stays so.
pub(super) fn register(userfaultfd: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    const REQUEST: Opcode = opcode::read_write::<Register>(UFFDIO, 0x00);
    ioctl(userfaultfd, REQUEST, &mut Register { range: range.into(), mode: MODE_WP, ioctls: 0 }).map(|_| ())
}

/// `UFFDIO_UNREGISTER`, which lifts all protection too.
pub(super) fn unregister(userfaultfd: impl AsFd, range: &Range<u64>) -> io::Result<()> {
    const REQUEST: Opcode = opcode::read::<Stretch>(UFFDIO, 0x01);
    ioctl(userfaultfd, REQUEST, &mut Stretch::from(range)).map(|_| ())
}

/// `PAGEMAP_SCAN` for what was written in a range. Returns how many regions were found, and up to where it was looked. With `protect` they are
/// protected in the same step.
pub(super) fn scan(
    pagemap: impl AsFd,
    range: &Range<u64>,
    protect: bool,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    const REQUEST: Opcode = opcode::read_write::<Scan>(b'f', 16);
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        flags: if protect { CHECK_WPASYNC | WP_MATCHING } else { CHECK_WPASYNC },
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: WRITTEN,
        category_anyof_mask: 0,
        return_mask: WRITTEN,
    };
    let found = ioctl(pagemap, REQUEST, &mut scan)?;
    let found = usize::try_from(found).ok().filter(|&found| found <= regions.len());
    Ok((found.ok_or(io::ErrorKind::InvalidData)?, scan.walk_end))
}

impl From<&Range<u64>> for Stretch {
    fn from(range: &Range<u64>) -> Self {
        Stretch { start: range.start, len: range.end - range.start }
    }
}

fn ioctl<T>(fd: impl AsFd, request: Opcode, argument: &mut T) -> io::Result<i32> {
    // SAFETY: `fd` is open for the duration of the call. The request's number has the size of `T`, and the kernel reads and
    // writes that much at `argument`; that of `Scan` also writes `vec_len` regions at `vec`, which are the caller's slice.
    // All fields are integers, for which whatever the kernel wrote is valid.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as _, argument as *mut T) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
