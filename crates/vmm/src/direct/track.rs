//! Which pages were written since the last look.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::inject::{InjectError, userfaultfd_in};
use super::ioctl::{self, Region};
use super::maps::mappings;

/// The unit that the kernel takes addresses in.
const PAGE: u64 = 4096;
/// Regions that the kernel reports in one call: 96 KiB, and the call holds the process's map no longer than they last.
const MAX_REGIONS: usize = 4096;
/// Bytes that are unregistered in one call, which holds up whatever faults in the process: 77 ms for a GiB were measured.
const UNREGISTERED: u64 = 64 << 20;

/// Why a process's memory cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The process could not be made to help.
    #[error(transparent)]
    Inject(#[from] InjectError),
    /// Neither the range nor the process is at fault.
    #[error("the kernel has no {what}: it takes Linux 6.7")]
    OldKernel {
        /// What it does not have.
        what: &'static str,
    },
    /// There is nothing, or not everywhere.
    #[error("{:#x}-{:#x} is not mapped in process {pid}, or not aligned to pages", range.start, range.end)]
    NotMapped {
        /// The process.
        pid: i32,
        /// The range asked for.
        range: Range<u64>,
    },
    /// A userfaultfd of the process's own has it: QEMU does this for postcopy and background snapshots.
    #[error("{:#x}-{:#x} of process {pid} has another userfaultfd already", range.start, range.end)]
    Taken {
        /// The process.
        pid: i32,
        /// The range asked for.
        range: Range<u64>,
    },
    /// Memory of a kind that cannot be write-protected: a file of another file system than tmpfs or hugetlbfs, or one that may
    /// not be written.
    #[error("the kernel does not track {:#x}-{:#x} of process {pid}", range.start, range.end)]
    Untrackable {
        /// The process.
        pid: i32,
        /// The range asked for.
        range: Range<u64>,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something else failed.
    #[error("cannot track the memory of process {pid}")]
    Process {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Knows which pages of a process's memory were written since the last look, by the process itself or by the kernel for
/// it (read(2), vhost-net). Dropping it ends the tracking; so does the end of this process.
///
/// It does not see what others write to the memory: another process that maps the same file, a device (VFIO), and the kernel in
/// pages that it had pinned before the look (O_DIRECT, io_uring). Nor pages that are taken away (MADV_REMOVE).
#[derive(Debug)]
pub struct Tracker {
    pidfd: OwnedFd,
    userfaultfd: OwnedFd,
    pagemap: File,
    /// Ascending, and none touches the next.
    ranges: Vec<Range<u64>>,
    regions: Box<[Region]>,
}

impl Tracker {
    /// Registers `ranges`, addresses in the process `pid`, which `pidfd` refers to, for tracking. They have to be
    /// aligned to the pages that they are made of.
    ///
    /// One thread of the process is led through a system call for it, see [`InjectError`] for why not. No other thread of ours
    /// may wait for the process meanwhile, if it is our child.
    ///
    /// # Errors
    /// The process then is as it was.
    pub fn begin(pid: i32, pidfd: BorrowedFd<'_>, ranges: Vec<Range<u64>>) -> Result<Tracker, TrackError> {
        let failed = |source| TrackError::Process { pid, source };
        // What can be refused without the process's help is refused first.
        let mappings = mappings(pid).map_err(failed)?;
        for range in &ranges {
            let mut mapped = range.start;
            for map in mappings.iter().filter(|map| map.start < range.end) {
                if (map.start..map.end).contains(&mapped) {
                    mapped = map.end;
                }
            }
            let aligned = range.start % PAGE == 0 && range.end % PAGE == 0;
            if !aligned || range.is_empty() || mapped < range.end {
                return Err(TrackError::NotMapped { pid, range: range.clone() });
            }
        }
        let ranges = joined(ranges);
        let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => InjectError::NotPermitted { pid }.into(),
            _ => failed(error),
        })?;
        let pidfd = pidfd.try_clone_to_owned().map_err(failed)?;
        let userfaultfd = userfaultfd_in(pid, std::os::fd::AsFd::as_fd(&pidfd))?;
        ioctl::enable(&userfaultfd).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => TrackError::OldKernel { what: "asynchronous write protection" },
            _ => failed(error),
        })?;
        let regions = vec![Region::default(); MAX_REGIONS].into();
        let mut tracker = Tracker { pidfd, userfaultfd, pagemap, ranges, regions };
        for range in &tracker.ranges {
            ioctl::register(&tracker.userfaultfd, range).map_err(|source| match source.raw_os_error() {
                Some(libc::EBUSY) => TrackError::Taken { pid, range: range.clone() },
                Some(libc::ESRCH) => InjectError::Gone { pid }.into(),
                _ => TrackError::Untrackable { pid, range: range.clone(), source },
            })?;
        }
        for range in &tracker.ranges {
            let first = range.start..range.start + PAGE;
            ioctl::scan(&tracker.pagemap, &first, false, &mut tracker.regions).map_err(
                |error| match error.raw_os_error() {
                    Some(libc::ENOTTY | libc::EINVAL) => TrackError::OldKernel { what: "PAGEMAP_SCAN" },
                    _ => failed(error),
                },
            )?;
        }
        Ok(tracker)
    }

    /// The address ranges written since the last call, ascending and joined; they are protected anew in the same step.
    /// So a page that is written while this runs is either in the answer or in the next one.
    ///
    /// The first call protects everything and returns every page that the process has used. A page that it has not used yet
    /// may have contents all the same, if the memory is a file that another process has filled: it is returned once
    /// this one reads or writes it. So send everything after the first call, whatever it returned.
    ///
    /// The answer takes 16 bytes a range: at worst, every other page written, 2 MiB for each GiB tracked.
    ///
    /// # Errors
    /// The process has ended, or has mapped something else there. What was written since the last call is lost then: only a new
    /// beginning helps.
    pub fn written(&mut self) -> io::Result<Vec<Range<u64>>> {
        let (pagemap, regions) = (&self.pagemap, &mut self.regions);
        let written =
            all_written(&self.ranges, regions, |rest, regions| ioctl::scan(pagemap, rest, true, regions))?;
        self.check()?;
        Ok(written)
    }

    /// Whether the memory looked at was still there: what is not mapped the kernel just passes over. It was if it still is.
    fn check(&self) -> io::Result<()> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the tracked process has ended");
        // A pidfd is readable once its process has ended (pidfd_open(2)).
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))? > 0 {
            return Err(gone());
        }
        for range in &self.ranges {
            // Changes nothing where it is registered.
            ioctl::register(&self.userfaultfd, range).map_err(|error| match error.raw_os_error() {
                Some(libc::ESRCH) => gone(),
                _ => error,
            })?;
        }
        Ok(())
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        // Errors do not matter: the process may be gone, and closing the descriptor does the rest. But in one go, and whatever
        // faults in the process waits as long.
        for range in &self.ranges {
            for start in (range.start..range.end).step_by(UNREGISTERED as usize) {
                let part = start..range.end.min(start.saturating_add(UNREGISTERED));
                if ioctl::unregister(&self.userfaultfd, &part).is_err() {
                    break;
                }
            }
        }
    }
}

/// What `look` finds in all of `ranges`. It fills the regions with what it found, and returns how many those are and up to where it came.
///
/// Where it came to may be told too low: the kernel gathers 512 regions at a time, and when the last of them are few it tells where it
/// stopped before (seen on Linux 6.18). What is looked at again there comes behind what lies above it.
fn all_written(
    ranges: &[Range<u64>],
    regions: &mut [Region],
    mut look: impl FnMut(&Range<u64>, &mut [Region]) -> io::Result<(usize, u64)>,
) -> io::Result<Vec<Range<u64>>> {
    let mut written = Vec::new();
    for range in ranges {
        let mut rest = range.clone();
        while !rest.is_empty() {
            let (found, end) = look(&rest, regions)?;
            written.extend(regions[..found].iter().map(|region| region.start..region.end));
            if end <= rest.start {
                return Err(io::Error::other("the kernel does not get on with its look"));
            }
            rest.start = end;
        }
    }
    Ok(joined(written))
}

/// The same ranges, ascending, with those that touch each other made one.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// As the kernel does: the second look begins where the first gathered its last 512 regions, and a page was written there meanwhile.
    #[test]
    fn a_write_between_two_looks_at_the_same_place_is_told() {
        let mut looks =
            [(vec![0..1, 4..5, 8..9], 3), (vec![6..7, 8..9], 10), (vec![21..22, 23..24], 24)].into_iter();
        let mut regions = [Region::default(); 4];
        let written = all_written(&[0..10, 20..24], &mut regions, |_, regions| {
            let (found, end) = looks.next().unwrap();
            for (region, range) in regions.iter_mut().zip(&found) {
                (region.start, region.end) = (range.start, range.end);
            }
            Ok((found.len(), end))
        });
        assert_eq!(written.unwrap(), [0..1, 4..5, 6..7, 8..9, 21..22, 23..24]);
    }
}
