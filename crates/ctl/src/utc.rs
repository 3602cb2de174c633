//! Moments as people and scripts read them: in UTC, since an operator compares the logs of two nodes.

use dwcp_proto::units::date;

const DAY: u64 = 24 * 3600 * 1000;

/// `2026-01-31T23:59:59.999Z` for milliseconds since 1970.
pub(crate) fn rfc3339(unix_ms: u64) -> String {
    let (year, month, day) = date(unix_ms / DAY);
    format!("{year:04}-{month:02}-{day:02}T{}Z", clock(unix_ms))
}

/// The date `2026-01-31` and the time `23:59:59.999`.
pub(crate) fn date_and_time(unix_ms: u64) -> (String, String) {
    let (year, month, day) = date(unix_ms / DAY);
    (format!("{year:04}-{month:02}-{day:02}"), clock(unix_ms))
}

fn clock(unix_ms: u64) -> String {
    let ms = unix_ms % DAY;
    let (s, ms) = (ms / 1000, ms % 1000);
    format!("{:02}:{:02}:{:02}.{ms:03}", s / 3600, s / 60 % 60, s % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        for (unix_ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_704_067_199_999, "2023-12-31T23:59:59.999Z"),
            (1_764_547_200_950, "2025-12-01T00:00:00.950Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(unix_ms), text);
        }
    }

    #[test]
    fn a_moment_that_no_clock_says_but_a_file_may() {
        assert!(rfc3339(u64::MAX).ends_with('Z'));
    }
}
