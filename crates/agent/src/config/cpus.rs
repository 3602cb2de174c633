//! How many CPUs the agent spreads over, or which ones.

use rustix::thread::CpuSet;
use serde::Deserialize;

/// What `[limits] cpus` says.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "toml::Value")]
pub(crate) enum Cpus {
    /// As many of those that the agent is allowed.
    Count(usize),
    /// These, at least one: no thread of the agent runs elsewhere.
    List(CpuSet),
}

impl Cpus {
    /// How many they are.
    pub(crate) fn count(&self) -> usize {
        match self {
            Cpus::Count(count) => *count,
            Cpus::List(set) => set.count() as usize,
        }
    }
}

impl TryFrom<toml::Value> for Cpus {
    type Error = String;

    fn try_from(value: toml::Value) -> Result<Self, String> {
        match value {
            toml::Value::Integer(number) => match usize::try_from(number) {
                Ok(count) if (1..=CpuSet::MAX_CPU).contains(&count) => Ok(Cpus::Count(count)),
                _ => Err(format!("expected a number from 1 to {}, found {number}", CpuSet::MAX_CPU)),
            },
            toml::Value::String(text) => list(&text).map(Cpus::List),
            _ => Err("expected a number of CPUs, or a list of them such as \"0-1,4\"".to_owned()),
        }
    }
}

/// A list as in cpuset(7): CPUs and ranges of them.
fn list(text: &str) -> Result<CpuSet, String> {
    let mut set = CpuSet::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (number(first), number(last)) {
            (Some(first), Some(last)) if first > last => {
                return Err(format!("expected the lower CPU of a range first, found {part:?}"));
            }
            (Some(first), Some(last)) if last < CpuSet::MAX_CPU => {
                (first..=last).for_each(|cpu| set.set(cpu));
            }
            _ => {
                let most = CpuSet::MAX_CPU - 1;
                return Err(format!("expected CPUs from 0 to {most}, such as \"0-1,4\", found {part:?}"));
            }
        }
    }
    Ok(set)
}

fn number(text: &str) -> Option<usize> {
    // A sign would be read as well.
    text.parse::<usize>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A set as such a list, as short as can be.
pub(crate) fn listed(set: &CpuSet) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)) {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let part = |&(first, last): &(usize, usize)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    ranges.iter().map(part).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_shown() {
        for (text, count, shown) in [
            ("0", 1, "0"),
            ("0-1,4", 3, "0-1,4"),
            ("4, 0,1", 3, "0-1,4"),
            ("7-7", 1, "7"),
            ("0-3,2-5,3", 6, "0-5"),
            ("63-64,1023", 3, "63-64,1023"),
            ("0-1023", 1024, "0-1023"),
        ] {
            let set = list(text).unwrap();
            assert_eq!((Cpus::List(set).count(), listed(&set).as_str()), (count, shown), "{text}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        let known = "expected CPUs from 0 to 1023, such as \"0-1,4\"";
        for (text, expected) in [
            ("", known),
            (" ", known),
            (",", known),
            ("0,", known),
            ("0,,1", known),
            ("all", known),
            ("+1", known),
            ("-1", known),
            ("1-", known),
            ("0-1-2", known),
            ("0-6:2", known),
            ("0x1", known),
            ("1024", known),
            ("0-1024", known),
            ("99999999999999999999", known),
            ("3-1", "expected the lower CPU of a range first, found \"3-1\""),
            ("0,9-8", "expected the lower CPU of a range first, found \"9-8\""),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.starts_with(expected), "{text}: {error}");
        }
    }
}
