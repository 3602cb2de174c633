//! The flag document and how it is read.
//!
//! One JSON object, as the body of `POST /v1/feature-flags` and in a `file:` source:
//!
//! ```json
//! {
//!   "feature": "dwcp_v3_hde",
//!   "enabled": true,
//!   "percentage": 10,
//!   "excluded": ["hv-07"],
//!   "canaries": ["hv-01", "hv-02"],
//!   "on_stale": "v1-new",
//!   "epoch": {"incarnation": 1, "counter": 42}
//! }
//! ```
//!
//! The first three are required. Nothing is guessed: an unknown key, a key given twice, a number in quotes or out of
//! range each refuse the whole document, with its place.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::change::FlagChange;
use crate::{MAX_DOCUMENT, MAX_NODES};

/// Who may use the feature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlagDocument {
    /// The flag's name.
    pub feature: String,
    /// Off means off for everyone, at once, and for running migrations too.
    pub enabled: bool,
    /// Which part of the nodes is in. At 0 nobody is, canaries included: that is how the plans roll back.
    pub percentage: Percentage,
    /// Nodes that are never in, as source or destination.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub excluded: BTreeSet<String>,
    /// Nodes that are in at any percentage above 0, unless excluded.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub canaries: BTreeSet<String>,
    /// What an expired lease does.
    pub on_stale: OnStale,
    /// Which version of the flag this is; absent where an operator wrote it by hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
}

impl FlagDocument {
    /// Reads the document of the flag `feature`; one of another flag is refused as unknown.
    pub fn parse(bytes: &[u8], feature: &str) -> Result<Self, BadDocument> {
        let change = FlagChange::parse(bytes, feature)?;
        Ok(FlagDocument {
            feature: change.feature,
            enabled: change.enabled,
            percentage: change.percentage,
            excluded: change.excluded.unwrap_or_default(),
            canaries: change.canaries.unwrap_or_default(),
            on_stale: change.on_stale.unwrap_or_default(),
            epoch: change.epoch,
        })
    }

    /// The document as JSON, which [`parse`](Self::parse) reads back as the same.
    pub fn to_json(&self) -> String {
        // Strings, numbers, lists and a struct: nothing that JSON could not hold.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A whole number from 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(try_from = "u8")]
pub struct Percentage(u8);

impl Percentage {
    /// `None` above 100.
    pub fn new(percent: u8) -> Option<Self> {
        (percent <= 100).then_some(Percentage(percent))
    }

    /// The number.
    pub fn value(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for Percentage {
    type Error = &'static str;

    fn try_from(percent: u8) -> Result<Self, Self::Error> {
        Percentage::new(percent).ok_or("above 100")
    }
}

impl fmt::Display for Percentage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.0)
    }
}

/// What happens when the lease expires because the flag's server does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum OnStale {
    /// New migrations take v1, running ones go on: a short restart of the control plane must not turn them all.
    #[default]
    #[serde(rename = "v1-new")]
    V1New,
    /// Running migrations turn to v1 too: the flag's limit then holds for a node that is cut off as well.
    #[serde(rename = "v1-all")]
    V1All,
    /// Nothing: for a rollout that is finished.
    #[serde(rename = "hold")]
    Hold,
}

impl OnStale {
    /// As it is written in a document.
    pub fn name(self) -> &'static str {
        match self {
            OnStale::V1New => "v1-new",
            OnStale::V1All => "v1-all",
            OnStale::Hold => "hold",
        }
    }
}

/// Which version of the flag: the incarnation first (a server restored from a backup starts a new one), then a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Epoch {
    /// Life of the flag's store.
    pub incarnation: u64,
    /// Change within it.
    pub counter: u64,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation, self.counter)
    }
}

/// Why a document was refused, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {fault}")]
pub struct BadDocument {
    /// From 1.
    pub line: usize,
    /// From 1, in bytes: where the value that is wrong begins, or where the JSON stops being JSON.
    pub column: usize,
    /// What is wrong there.
    pub fault: Fault,
}

/// What is wrong with a document. Quoted text is escaped and cut short.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// More bytes than a document may have.
    #[error("longer than {MAX_DOCUMENT} bytes")]
    TooLarge,
    /// Not JSON; or a key is missing, unknown or given twice.
    #[error("{0}")]
    Syntax(String),
    /// A comment, as the plans print one.
    #[error("JSON has no comments: remove it")]
    Comment,
    /// Another flag's name.
    #[error("unknown feature \"{0}\"")]
    UnknownFeature(String),
    /// Not what that key holds.
    #[error("\"{key}\" must be {expected}, not {found}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// A list that must name somebody.
    #[error("\"{key}\" is empty")]
    Empty {
        /// The key.
        key: &'static str,
    },
    /// A list with too many entries.
    #[error("\"{key}\" lists more than {MAX_NODES} nodes")]
    TooMany {
        /// The key.
        key: &'static str,
    },
}
