//! Sizes, rates and durations as people write them: `64MiB`, `200Mbit`, `300ms`. One reader and one writer of each,
//! shared by the configuration and the command line.
//!
//! A number may have a fraction; between it and its unit there may be one space. Decimal prefixes (`MB`, `Mbit`) count
//! by 1000, binary ones (`MiB`) by 1024. A number without a unit is refused: a wrong guess would be off by a million.
//!
//! Also the day in the calendar, for whoever writes moments.

use std::time::Duration;

/// A text that is no size, rate or duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found:?}")]
pub struct BadUnit {
    expected: &'static str,
    found: String,
}

/// Characters of a refused text that an error repeats.
const MAX_QUOTED: usize = 40;

/// Units of a size, and how many bytes each has.
const SIZES: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// Units of a rate that count bits a second, and how many bits each has.
const BITS: [(&str, u64); 4] = [("kbit", 1_000), ("Mbit", 1_000_000), ("Gbit", 1_000_000_000), ("bit", 1)];

/// Units of a duration, and how many nanoseconds each has.
const TIMES: [(&str, u64); 5] = [
    ("ms", 1_000_000),
    ("us", 1_000),
    ("s", 1_000_000_000),
    ("min", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Reads a size: bytes.
pub fn parse_size(text: &str) -> Result<u64, BadUnit> {
    parse(text, &SIZES).ok_or_else(|| bad(text, "a size with its unit, such as 64MiB or 1GB"))
}

/// Reads a rate: bytes a second. `Mbit` and its like count bits, `MB` and its like bytes; a trailing `/s` may stand.
pub fn parse_rate(text: &str) -> Result<u64, BadUnit> {
    let bare = text.strip_suffix("/s").unwrap_or(text);
    // A bit a second would round to no bytes at all, and 0 means "no limit" in places.
    let bits = parse(bare, &BITS).map(|bits| bits.div_ceil(8));
    bits.or_else(|| parse(bare, &SIZES))
        .filter(|rate| *rate > 0)
        .ok_or_else(|| bad(text, "a rate above zero with its unit, such as 200Mbit or 25MB"))
}

/// Reads a duration.
pub fn parse_duration(text: &str) -> Result<Duration, BadUnit> {
    let nanoseconds = parse(text, &TIMES);
    nanoseconds
        .map(Duration::from_nanos)
        .ok_or_else(|| bad(text, "a duration with its unit, such as 300ms, 2s or 5min"))
}

/// Writes a size in the largest binary unit that leaves at least 1, with one digit after the point.
pub fn size(bytes: u64) -> String {
    const NAMES: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 && unit + 1 < NAMES.len() {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let digits = usize::from(unit > 0);
    format!("{value:.digits$} {}", NAMES[unit])
}

/// Writes a rate given in bytes a second, in bits a second, as networks are spoken of.
pub fn rate(bytes_per_second: f64) -> String {
    let bits = bytes_per_second * 8.0;
    match bits {
        b if b >= 1e9 => format!("{:.2} Gbit/s", b / 1e9),
        b if b >= 1e6 => format!("{:.1} Mbit/s", b / 1e6),
        b => format!("{:.0} kbit/s", b / 1e3),
    }
}

/// The text's number times its unit, to the nearest; `None` where it is none or too large.
fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(end);
    let unit = unit.strip_prefix(' ').unwrap_or(unit);
    let (_, scale) = units.iter().find(|(name, _)| *name == unit)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let whole = whole.parse::<u64>().ok()?.checked_mul(*scale)?;
    // Nine digits after the point are more than any unit needs, and fit.
    let digits = u32::try_from(fraction.len()).ok().filter(|n| (1..=9).contains(n))?;
    let part = u128::from(fraction.parse::<u64>().ok()?) * u128::from(*scale) / 10u128.pow(digits);
    whole.checked_add(u64::try_from(part).ok()?)
}

fn bad(text: &str, expected: &'static str) -> BadUnit {
    BadUnit { expected, found: text.chars().take(MAX_QUOTED).collect() }
}

/// Year, month and day of a day since 1970 in the Gregorian calendar. Counted from 1 March of year 0, a leap day is the last
/// day of its year and of its era of 400 years (Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`).
pub fn date(days: u64) -> (u64, u64, u64) {
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
    fn sizes() {
        for (text, bytes) in [
            ("64MiB", 64 << 20),
            ("1.5 GiB", 3 << 29),
            ("0B", 0),
            ("10kB", 10_000),
            ("2TB", 2_000_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "64",
            "MiB",
            "64mib",
            "64Mb",
            "-1B",
            "1e3B",
            "1.B",
            ".5B",
            "1..5B",
            "64  MiB",
            "64MiB ",
            "99999999TiB",
            "1.0000000001MiB",
        ] {
            let error = parse_size(text).unwrap_err().to_string();
            assert!(error.contains("such as 64MiB"), "{text}: {error}");
        }
    }

    #[test]
    fn rates_tell_bits_from_bytes() {
        for (text, bytes) in [
            ("200Mbit", 25_000_000),
            ("1Gbit", 125_000_000),
            ("25MB", 25_000_000),
            ("1MiB/s", 1 << 20),
            ("0.5 Mbit/s", 62_500),
            ("1bit", 1),
        ] {
            assert_eq!(parse_rate(text), Ok(bytes), "{text}");
        }
        for text in ["200", "200Mbps", "0Mbit", "200mbit", "/s"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        for (text, ms) in [("300ms", 300), ("2s", 2000), ("1.5s", 1500), ("5min", 300_000), ("1h", 3_600_000)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["300", "2 seconds", "-1s", "99999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_error_repeats_little_of_a_long_text() {
        assert!(parse_size(&"9".repeat(10_000)).unwrap_err().to_string().len() < 120);
    }

    #[test]
    fn written_for_people() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(rate(25_000_000.0), "200.0 Mbit/s");
        assert_eq!(rate(0.0), "0 kbit/s");
        assert_eq!(rate(312_500_000.0), "2.50 Gbit/s");
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
    }
}
