//! Newtypes for every number and name with an identity or a unit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::limits::MAX_NAME;

/// A name that is not one: empty, too long, or with a character outside `[A-Za-z0-9._-]`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {text:?} must be 1 to {MAX_NAME} characters from A-Z a-z 0-9 . _ - and start with a letter or digit"
)]
pub struct BadName {
    what: &'static str,
    text: String,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Parses a name; the rule keeps it safe in file names, log lines and metric labels.
            pub fn new(text: impl Into<String>) -> Result<Self, BadName> {
                let text = text.into();
                let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
                let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
                if first && text.len() <= MAX_NAME && text.chars().all(legal) {
                    Ok(Self(text))
                } else {
                    // An over-long name is cut before it can reach a log.
                    Err(BadName { what: $what, text: text.chars().take(MAX_NAME).collect() })
                }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = BadName;
            fn from_str(text: &str) -> Result<Self, BadName> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;
            fn try_from(text: String) -> Result<Self, BadName> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

name!(
    /// A hypervisor node, as its peers know it: the stem of `peers/NAME.pub`.
    NodeName, "node name"
);
name!(
    /// A VM, as the orchestrator names it on both nodes.
    VmName, "VM name"
);
name!(
    /// One migration; chosen by the orchestrator or made by the source agent. RPCs are idempotent by it.
    MigrationId, "migration id"
);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number!(
    /// Position of a chunk in its session, from 0 without gaps.
    Seq(u64)
);
number!(
    /// Bytes from the start of the VMM's migration stream.
    StreamOffset(u64)
);
number!(
    /// Which ordered sub-stream of chunks a chunk belongs to; a decoder may keep state per lane.
    Lane(u16)
);
number!(
    /// Version of every page in a chunk: a page sent again carries a higher one.
    /// It counts the source's rounds over RAM, starting at 0.
    PageVersion(u32)
);
number!(
    /// Index of a RAM block in a [`BlockNames`](crate::record::BlockNames) table.
    RamBlockId(u16)
);
number!(
    /// Index of a page within its RAM block: byte offset / page size.
    PageIndex(u64)
);
number!(
    /// Index of a data connection within its session.
    LinkId(u16)
);

impl Seq {
    /// The sequence number that follows.
    pub fn next(self) -> Self {
        Seq(self.0 + 1)
    }
}

impl StreamOffset {
    /// The offset `bytes` further on, or `None` past the end of the number space.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(StreamOffset)
    }
}

/// Identity of a session: a hash over all that both sides agreed on (see `session`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 32]);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_safe_in_a_path_and_a_label() {
        for good in ["hv-01.dc1", "node_1", "7"] {
            assert_eq!(NodeName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "a\"b", "é", &"x".repeat(MAX_NAME + 1)] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
        }
    }
}
