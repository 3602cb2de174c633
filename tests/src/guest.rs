//! The self-checking guest from outside: what it is asked to do, and what it says on its serial console.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::wait::until;

/// Longest time without a line (it writes five a second) until a running guest counts as stuck. Generous, since two
/// emulated machines and two agents share few cores.
const SILENCE: Duration = Duration::from_secs(10);

/// What the guest's pages look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// A quarter each of the others.
    Mixed,
    /// Incompressible.
    Random,
    /// Text-like.
    Text,
    /// Pointers and small numbers.
    Pointers,
    /// All or almost all zeros.
    Zero,
}

/// What the guest does: its kernel parameters.
#[derive(Debug, Clone, Copy)]
pub struct GuestLoad {
    /// MiB under test.
    pub mib: u32,
    /// Pages rewritten a second; 0 is an idle guest.
    pub rate: u32,
    /// Bytes changed in each.
    pub bytes: u32,
    /// Rewrites stay within the first so many MiB; 0 means all.
    pub hot_mib: u32,
    /// Pages checked a second.
    pub check: u32,
    /// What pages look like.
    pub mix: Mix,
    /// Seed of content and order.
    pub seed: u32,
}

impl Default for GuestLoad {
    fn default() -> Self {
        GuestLoad { mib: 64, rate: 2000, bytes: 64, hot_mib: 0, check: 20_000, mix: Mix::Mixed, seed: 1 }
    }
}

impl GuestLoad {
    /// A guest that checks but does not write.
    pub fn idle(self) -> Self {
        GuestLoad { rate: 0, ..self }
    }
}

impl fmt::Display for GuestLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mix = match self.mix {
            Mix::Mixed => "mixed",
            Mix::Random => "random",
            Mix::Text => "text",
            Mix::Pointers => "pointers",
            Mix::Zero => "zero",
        };
        let GuestLoad { mib, rate, bytes, hot_mib, check, seed, .. } = self;
        write!(
            f,
            "guest_mib={mib} guest_rate={rate} guest_bytes={bytes} guest_hot_mib={hot_mib} guest_check={check} \
             guest_mix={mix} guest_seed={seed}"
        )
    }
}

/// One line of the guest: counts since it booted, on whichever side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Report {
    /// Number of the line.
    pub seq: u64,
    /// Pages checked.
    pub checked: u64,
    /// Whole passes over the memory.
    pub passes: u64,
    /// Pages rewritten.
    pub wrote: u64,
    /// Pages found wrong.
    pub wrong: u64,
}

impl Report {
    fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("guest ok ").or_else(|| line.strip_prefix("guest bad "))?;
        let mut fields = rest.split(' ');
        let mut number = |key: &str| fields.next()?.strip_prefix(key)?.strip_prefix('=')?.parse().ok();
        Some(Report {
            seq: number("seq")?,
            checked: number("checked")?,
            passes: number("passes")?,
            wrote: number("wrote")?,
            wrong: number("wrong")?,
        })
    }
}

/// The file into which QEMU writes the guest's serial console.
#[derive(Debug, Clone)]
pub struct SerialLog {
    path: PathBuf,
}

impl SerialLog {
    /// The log in this file, which need not exist yet.
    pub fn new(path: &Path) -> Self {
        SerialLog { path: path.to_owned() }
    }

    /// Everything so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.path).unwrap_or_default()).into_owned()
    }

    /// The newest whole report.
    ///
    /// # Errors
    /// The guest found a wrong page, or its kernel gave up.
    pub fn last(&self) -> Result<Option<Report>> {
        let text = self.text();
        // A line without its end is still being written.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let lines = || whole.lines().map(str::trim_end);
        if let Some(line) = lines().find(|line| line.contains("guest WRONG") || line.contains("Kernel panic"))
        {
            bail!("{line}");
        }
        let last = lines().rev().find_map(Report::parse);
        if let Some(report) = last {
            ensure!(report.wrong == 0, "the guest found {} wrong pages", report.wrong);
        }
        Ok(last)
    }

    /// Waits for a report newer than `after`.
    ///
    /// # Errors
    /// As [`SerialLog::last`], or silence for the length of `limit`.
    pub fn next(&self, after: Option<Report>, limit: Duration) -> Result<Report> {
        until("a line of the guest", limit, || {
            Ok(self.last()?.filter(|report| after.is_none_or(|after| report.seq > after.seq)))
        })
        .map_err(|error| error.context(format!("the guest's last lines:\n{}", self.tail())))
    }

    /// Follows the guest for `duration` and until it has checked all of its memory at least once since the call.
    ///
    /// # Errors
    /// A wrong page, silence, or a pass that does not end.
    pub fn ok_for(&self, duration: Duration) -> Result<Report> {
        let start = Instant::now();
        let first = self.next(self.last()?, SILENCE)?;
        let mut report = first;
        // The pass under way when we came counts only in part: two ends of passes hold one whole pass between them.
        while start.elapsed() < duration || report.passes < first.passes + 2 {
            ensure!(
                start.elapsed() < duration + Duration::from_secs(60),
                "the guest's check makes no progress"
            );
            report = self.next(Some(report), SILENCE)?;
        }
        Ok(report)
    }

    fn tail(&self) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(text: &str) -> (tempfile::TempDir, SerialLog) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        std::fs::write(&path, text).unwrap();
        (dir, SerialLog::new(&path))
    }

    #[test]
    fn the_newest_whole_line_counts_and_half_lines_do_not() {
        let (_dir, log) = log(
            "6 checked=1 passes=0\r\nguest ok seq=7 checked=9 passes=1 wrote=4 wrong=0\r\nguest ok seq=8",
        );
        assert_eq!(log.last().unwrap(), Some(Report { seq: 7, checked: 9, passes: 1, wrote: 4, wrong: 0 }));
        assert!(log.next(log.last().unwrap(), Duration::ZERO).is_err(), "line 8 is not whole");
    }

    #[test]
    fn a_wrong_page_is_an_error_wherever_it_stands() {
        let (_dir, named) =
            log("guest WRONG page=3 why=version version=1 expected=2\r\nguest start pages=1 rate=2\r\n");
        assert!(named.last().unwrap_err().to_string().contains("page=3"));
        let (_dir, counted) = log("guest bad seq=1 checked=9 passes=1 wrote=4 wrong=2\r\n");
        assert!(counted.last().unwrap_err().to_string().contains("2 wrong pages"));
    }
}
