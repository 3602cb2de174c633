//! Moments as people, scripts and files have them: in UTC.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_proto::units::date;

const SECOND: u64 = 1000;
const DAY: u64 = 24 * 3600 * SECOND;

/// Milliseconds since 1970 by this machine's clock. For people and for tokens' ends only: leases never see it.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A clock that starts right and goes forward only, however the machine's is set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    started: Instant,
    started_ms: u64,
}

impl Clock {
    /// Starts at the machine's time.
    pub(crate) fn start() -> Self {
        Clock { started: Instant::now(), started_ms: now_ms() }
    }

    /// Milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        self.started_ms.saturating_add(u64::try_from(self.uptime().as_millis()).unwrap_or(u64::MAX))
    }

    /// Since the start.
    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

/// `2026-01-31T23:59:59Z` for milliseconds since 1970; what is less than a second is cut off.
pub(crate) fn rfc3339(unix_ms: u64) -> String {
    let (year, month, day) = date(unix_ms / DAY);
    let s = unix_ms % DAY / SECOND;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", s / 3600, s / 60 % 60, s % 60)
}

/// Reads what [`rfc3339`] writes, and a date alone as its first moment; `None` if it is neither.
pub(crate) fn parse(text: &str) -> Option<u64> {
    let (day, clock) = match text.split_once('T') {
        Some((day, clock)) => (day, clock.strip_suffix('Z')?),
        None => (text, "00:00:00"),
    };
    let [year, month, day] = numbers(day, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(clock, ':', [2, 2, 2])?;
    if year < 1970 || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    // A year has at least 365 days, so this is at most a few years of days early.
    let first = (year - 1970) * 365 + (month.checked_sub(1)?) * 28;
    let days = (first..first + 4000).find(|days| date(*days) == (year, month, day))?;
    Some(days * DAY + ((hour * 60 + minute) * 60 + second) * SECOND)
}

fn numbers(text: &str, between: char, digits: [usize; 3]) -> Option<[u64; 3]> {
    let mut numbers = [0; 3];
    let mut parts = text.split(between);
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part =
            parts.next().filter(|part| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_written_and_read() {
        for (unix_ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_704_067_199_000, "2023-12-31T23:59:59Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
            (253_402_300_799_000, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!((rfc3339(unix_ms).as_str(), parse(text)), (text, Some(unix_ms)));
        }
        assert_eq!(parse("2000-02-29"), Some(951_782_400_000));
        for bad in [
            "",
            "2026",
            "2026-02-30",
            "2026-1-1",
            "1969-12-31",
            "2026-01-01T24:00:00Z",
            "2026-01-01T00:00:00",
            "2026-00-01",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
