//! Where the state is kept: one trait, so that a replicated store can follow the embedded one.

mod sqlite;

use std::path::PathBuf;

use serde::Serialize;

use crate::state::{State, Write};

pub(crate) use sqlite::{DATABASE, Sqlite};

/// Keeps the state. What [`commit`](Store::commit) has returned from is durable, and nothing is ever half there.
pub(crate) trait Store: Send {
    /// All that is kept.
    fn load(&mut self) -> Result<(State, Vec<Seen>), StoreError>;
    /// Keeps all writes and their entry in the audit, or none of them.
    fn commit(&mut self, writes: &[Write], entry: &Entry) -> Result<(), StoreError>;
    /// Keeps when nodes were heard; a moment that is lost with the process does no harm.
    fn note_seen(&mut self, seen: &[Seen]) -> Result<(), StoreError>;
    /// Entries of the audit after number `after`, oldest first.
    fn audit(&mut self, after: u64, limit: usize) -> Result<Vec<Record>, StoreError>;
}

/// When a node was heard last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) node: String,
    /// Of its last report.
    pub(crate) boot: u64,
    /// Of its last report.
    pub(crate) sequence: u64,
    /// Milliseconds since 1970.
    pub(crate) at_ms: u64,
}

/// Who changed what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) at_ms: u64,
    pub(crate) who: String,
    /// The address that the request came from, or the name of a local command.
    pub(crate) origin: String,
    pub(crate) action: String,
    /// JSON.
    pub(crate) detail: String,
}

/// An entry as it stands in the audit.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Record {
    /// From 1, without gaps.
    pub(crate) number: u64,
    pub(crate) at: String,
    pub(crate) who: String,
    pub(crate) origin: String,
    pub(crate) action: String,
    pub(crate) detail: serde_json::Value,
    /// BLAKE3 over the hash before and this entry, in hexadecimal: an entry that is changed or taken out shows.
    pub(crate) hash: String,
}

/// Why something could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The database said no.
    #[error("{}: {source}", .path.display())]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    /// What is there is not what was written.
    #[error("{}: {what}", .path.display())]
    Damaged { path: PathBuf, what: String },
}
