//! What is wrong with a configuration file, and where.

use std::fmt::Write;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Characters of the offending line that a message shows.
const MAX_SHOWN: usize = 100;

/// Why a configuration file was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is far too long.
    #[error("{} has {size} bytes: this is no configuration file", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        size: u64,
    },
    /// A line of the file is wrong. The message is complete: file, line, column, what was expected, the line itself.
    #[error("{0}")]
    Wrong(String),
}

impl ConfigError {
    /// Words an error of the TOML reader: `FILE:LINE:COLUMN: message`, then the line with its place underlined.
    pub(super) fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> Self {
        let message = house_words(error.message());
        let mut out = path.display().to_string();
        match error.span() {
            // What is missing from the whole file has no line.
            Some(span) if span.start > 0 || !message.starts_with("missing") => {
                point_at(&mut out, text, span, &message)
            }
            _ => drop(write!(out, ": {message}")),
        }
        ConfigError::Wrong(out)
    }
}

fn point_at(out: &mut String, text: &str, span: Range<usize>, message: &str) {
    let start = floor_char_boundary(text, span.start);
    let before = &text[..start];
    let number = before.matches('\n').count() + 1;
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let column = before[line_start..].chars().count();
    // A missing key is reported over its whole table, whose first line says enough.
    let end =
        floor_char_boundary(text, span.end).clamp(start, line_start + line.len().max(start - line_start));
    let width = text[start..end].chars().count().max(1);

    let shown: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_SHOWN).collect();
    let gutter = number.to_string().len();
    let _ = write!(out, ":{number}:{}: {message}", column + 1);
    let _ = write!(out, "\n{:gutter$} |\n{number} | {shown}", "");
    if column < MAX_SHOWN {
        let _ = write!(out, "\n{:gutter$} | {:column$}{}", "", "", "^".repeat(width.min(MAX_SHOWN - column)));
    }
}

/// serde speaks of fields and structs; an operator of keys and tables.
fn house_words(message: &str) -> String {
    message
        .trim_end()
        .replace("unknown field", "unknown key")
        .replace("missing field", "missing key")
        .replace("unknown variant", "unknown value")
        .replace('\n', ", ")
}

fn floor_char_boundary(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0)
}
