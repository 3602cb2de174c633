//! Moments as people and scripts read them: in UTC, since an operator compares the logs of two nodes.

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

/// Year, month and day of a day since 1970 in the Gregorian calendar. Counted from 1 March of year 0, a leap day is the last
/// day of its year and of its era of 400 years (Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
fn date(days: u64) -> (u64, u64, u64) {
    const ERA: u64 = 146_097;
    let days = days + 719_468;
    let (era, day) = (days / ERA, days % ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = if month < 10 { (year, month + 3) } else { (year + 1, month - 9) };
    (year + 400 * era, month, day)
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
    fn every_day_follows_the_one_before() {
        let (mut year, mut month, mut day) = date(0);
        for days in 1..400 * 366 {
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length = match month {
                2 if leap => 29,
                2 => 28,
                4 | 6 | 9 | 11 => 30,
                _ => 31,
            };
            day += 1;
            if day > length {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
            assert_eq!(date(days), (year, month, day));
        }
        // No clock says so, but a file may.
        assert!(rfc3339(u64::MAX).ends_with('Z'));
    }
}
