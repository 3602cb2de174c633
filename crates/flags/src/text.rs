//! Reading JSON so that each fault has its place.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use crate::document::{BadDocument, Fault};
use crate::{MAX_DOCUMENT, MAX_NODE_NAME, MAX_NODES};

/// Characters of a message about a document: it may quote the document, which may be anything.
const MAX_MESSAGE: usize = 200;

/// A document's text, from which values are read one by one, so that their places are known.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    /// The text, if it is one and short enough.
    pub(crate) fn new(bytes: &'a [u8]) -> Result<Self, BadDocument> {
        if bytes.len() > MAX_DOCUMENT {
            return Err(BadDocument { line: 1, column: 1, fault: Fault::TooLarge });
        }
        std::str::from_utf8(bytes).map(Text).map_err(|error| {
            let (line, column) = place(&bytes[..error.valid_up_to()]);
            BadDocument { line, column, fault: Fault::Syntax("not UTF-8".into()) }
        })
    }

    /// The whole of it: an object with raw values.
    pub(crate) fn fields<T: Deserialize<'a>>(&self) -> Result<T, BadDocument> {
        serde_json::from_str(self.0).map_err(|error| self.syntax(&error))
    }

    /// One value.
    pub(crate) fn read<T: DeserializeOwned>(
        &self,
        raw: &RawValue,
        key: &'static str,
        expected: &'static str,
    ) -> Result<T, BadDocument> {
        serde_json::from_str(raw.get()).map_err(|_| self.value(raw, key, expected))
    }

    /// The name of the flag, which must be `feature`.
    pub(crate) fn feature(&self, raw: &RawValue, feature: &str) -> Result<String, BadDocument> {
        let name: String = self.read(raw, "feature", "a name in quotes")?;
        match name == feature {
            true => Ok(name),
            false => Err(self.fault(raw, Fault::UnknownFeature(shorten(&name)))),
        }
    }

    /// A list of nodes' names.
    pub(crate) fn nodes(&self, raw: &RawValue, key: &'static str) -> Result<BTreeSet<String>, BadDocument> {
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

    /// Something is wrong with this value.
    pub(crate) fn fault(&self, raw: &RawValue, fault: Fault) -> BadDocument {
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

/// Whether this is a legal name of a node, as everywhere in DWCP.
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
