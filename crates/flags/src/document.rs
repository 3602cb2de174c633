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

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{MAX_DOCUMENT, MAX_NODE_NAME, MAX_NODES};

/// Characters of a message about a document: it may quote the document, which may be anything.
const MAX_MESSAGE: usize = 200;

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
        if bytes.len() > MAX_DOCUMENT {
            return Err(BadDocument { line: 1, column: 1, fault: Fault::TooLarge });
        }
        let text = std::str::from_utf8(bytes).map_err(|error| {
            let (line, column) = place(&bytes[..error.valid_up_to()]);
            BadDocument { line, column, fault: Fault::Syntax("not UTF-8".into()) }
        })?;
        let source = Text(text);
        let fields: Fields<'_> = serde_json::from_str(text).map_err(|error| source.syntax(&error))?;
        let document = FlagDocument {
            feature: source.read(fields.feature, "feature", "a name in quotes")?,
            enabled: source.read(fields.enabled, "enabled", "true or false")?,
            percentage: source.read(fields.percentage, "percentage", "a whole number from 0 to 100")?,
            excluded: source.nodes(fields.excluded, "excluded")?,
            canaries: source.nodes(fields.canaries, "canaries")?,
            on_stale: match fields.on_stale {
                Some(raw) => source.read(raw, "on_stale", r#""v1-new", "v1-all" or "hold""#)?,
                None => OnStale::default(),
            },
            epoch: match fields.epoch {
                Some(raw) => Some(source.read(
                    raw,
                    "epoch",
                    r#"{"incarnation": N, "counter": N}, each once and from 0 up"#,
                )?),
                None => None,
            },
        };
        match document.feature == feature {
            true => Ok(document),
            false => Err(source.fault(fields.feature, Fault::UnknownFeature(shorten(&document.feature)))),
        }
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
    /// A list with too many entries.
    #[error("\"{key}\" lists more than {MAX_NODES} nodes")]
    TooMany {
        /// The key.
        key: &'static str,
    },
}

/// The document's values as they stand in it, to be read one by one where their place is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    #[serde(borrow)]
    feature: &'a RawValue,
    #[serde(borrow)]
    enabled: &'a RawValue,
    #[serde(borrow)]
    percentage: &'a RawValue,
    #[serde(borrow)]
    excluded: Option<&'a RawValue>,
    #[serde(borrow)]
    canaries: Option<&'a RawValue>,
    #[serde(borrow)]
    on_stale: Option<&'a RawValue>,
    #[serde(borrow)]
    epoch: Option<&'a RawValue>,
}

struct Text<'a>(&'a str);

impl Text<'_> {
    fn read<T: DeserializeOwned>(
        &self,
        raw: &RawValue,
        key: &'static str,
        expected: &'static str,
    ) -> Result<T, BadDocument> {
        serde_json::from_str(raw.get()).map_err(|_| self.value(raw, key, expected))
    }

    fn nodes(&self, raw: Option<&RawValue>, key: &'static str) -> Result<BTreeSet<String>, BadDocument> {
        let Some(raw) = raw else { return Ok(BTreeSet::new()) };
        let nodes: Vec<&RawValue> =
            serde_json::from_str(raw.get()).map_err(|_| self.value(raw, key, "a list of node names"))?;
        if nodes.len() > MAX_NODES {
            return Err(self.fault(raw, Fault::TooMany { key }));
        }
        let read = |raw: &&RawValue| match serde_json::from_str::<String>(raw.get()) {
            Ok(name) if is_node_name(&name) => Ok(name),
            _ => {
                Err(self.value(raw, key, "a list of node names (letters, digits, '.', '_', '-'; at most 64)"))
            }
        };
        nodes.iter().map(read).collect()
    }

    fn value(&self, raw: &RawValue, key: &'static str, expected: &'static str) -> BadDocument {
        self.fault(raw, Fault::Value { key, expected, found: shorten(raw.get()) })
    }

    fn fault(&self, raw: &RawValue, fault: Fault) -> BadDocument {
        // A raw value is a slice of the text it was read from.
        let at = (raw.get().as_ptr() as usize).saturating_sub(self.0.as_ptr() as usize).min(self.0.len());
        let (line, column) = place(&self.0.as_bytes()[..at]);
        BadDocument { line, column, fault }
    }

    fn syntax(&self, error: &serde_json::Error) -> BadDocument {
        let (line, column) = (error.line().max(1), error.column().max(1));
        let byte = self.0.lines().nth(line - 1).and_then(|text| text.as_bytes().get(column - 1));
        let message = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let fault = match byte {
            Some(b'#' | b'/') if error.is_syntax() => Fault::Comment,
            _ => Fault::Syntax(shorten(message.strip_suffix(&place).unwrap_or(&message))),
        };
        BadDocument { line, column, fault }
    }
}

/// Line and column, from 1, of what follows `before`.
fn place(before: &[u8]) -> (usize, usize) {
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
    (line, column)
}

pub(crate) fn is_node_name(name: &str) -> bool {
    name.len() <= MAX_NODE_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

/// Makes a stranger's text safe for one line of a log.
pub(crate) fn shorten(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut short: String = text.chars().take(MAX_MESSAGE).map(clean).collect();
    if short.len() < text.len() {
        short.push_str("...");
    }
    short
}
