//! Journals on disk: one file a migration and side, appended and synced; the format is `dwcp_proto::journal`'s.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_proto::journal::{Chain, Entry, JournalError, MAX_JOURNAL, Note, Replay, encode, replay};
use dwcp_proto::{MigrationId, Side};

/// Why a journal could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Format(#[from] JournalError),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("the journal's thread failed")]
    Thread,
}

/// Why a journal could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Format(#[from] JournalError),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// An open journal. Writes go through a blocking thread and are awaited, one at a time.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    inner: Option<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    chain: Chain,
    /// Bytes that are durable, or were at least written whole.
    len: u64,
}

/// The folder of journals within the state folder.
pub(crate) fn folder(state_dir: &Path) -> PathBuf {
    state_dir.join("journal")
}

/// Where the journal of a migration lies.
pub(crate) fn path(state_dir: &Path, id: &MigrationId, side: Side) -> PathBuf {
    let side = match side {
        Side::Source => "source",
        Side::Destination => "destination",
    };
    folder(state_dir).join(format!("{id}.{side}.jsonl"))
}

impl Journal {
    /// Makes the journal of a new migration; fails if there is one already.
    pub(crate) async fn create(state_dir: &Path, id: &MigrationId, side: Side) -> Result<Self, WriteError> {
        let (folder, path) = (folder(state_dir), path(state_dir, id, side));
        let made = path.clone();
        let file = tokio::task::spawn_blocking(move || -> io::Result<File> {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&made)?;
            // The name itself must survive, or a restart would not find the file.
            File::open(&folder)?.sync_all()?;
            Ok(file)
        })
        .await
        .map_err(|_| WriteError::Thread)?
        .map_err(|source| WriteError::Io { path: path.clone(), source })?;
        Ok(Journal { path, inner: Some(Inner { file, chain: Chain::default(), len: 0 }) })
    }

    /// Removes it: nothing was decided in it.
    pub(crate) fn discard(self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(%error, path = %self.path.display(), "journal not removed");
        }
    }

    /// Opens the journal of a migration that an earlier life of this agent began; cut back to what was whole.
    pub(crate) fn open(path: &Path) -> Result<(Self, Replay), OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        let mut bytes = Vec::new();
        file.take(MAX_JOURNAL as u64 + 1).read_to_end(&mut bytes).map_err(io)?;
        let replay = replay(&bytes)?;
        let file = OpenOptions::new().write(true).open(path).map_err(io)?;
        let inner = Inner { file, chain: replay.chain, len: replay.len };
        Ok((Journal { path: path.to_owned(), inner: Some(inner) }, replay))
    }

    /// Appends a decision; it is durable when this returns. Also says how long the disk took.
    pub(crate) async fn append(&mut self, entry: Entry) -> Result<Duration, WriteError> {
        self.write(entry, true).await
    }

    /// Appends a line for people. Not synced: the next decision does that.
    pub(crate) async fn note(&mut self, what: &str, text: impl Into<String>) {
        let note = Entry::Note(Note::new(what, text));
        if let Err(error) = self.write(note, false).await {
            tracing::warn!(%error, what, "journal note not written");
        }
    }

    async fn write(&mut self, entry: Entry, sync: bool) -> Result<Duration, WriteError> {
        let mut inner = self.inner.take().ok_or(WriteError::Thread)?;
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
        let line = match encode(&entry, unix_ms, &inner.chain) {
            Ok(line) => line,
            Err(error) => {
                self.inner = Some(inner);
                return Err(error.into());
            }
        };
        let task = tokio::task::spawn_blocking(move || {
            let started = Instant::now();
            let outcome = inner.append(line.text.as_bytes(), sync);
            if outcome.is_ok() {
                inner.chain = line.next;
            }
            (inner, outcome.map(|()| started.elapsed()))
        });
        let (inner, outcome) = task.await.map_err(|_| WriteError::Thread)?;
        self.inner = Some(inner);
        outcome.map_err(|source| WriteError::Io { path: self.path.clone(), source })
    }
}

impl Inner {
    fn append(&mut self, line: &[u8], sync: bool) -> io::Result<()> {
        // What a failed write left behind is cut off first.
        self.file.set_len(self.len)?;
        self.file.seek(SeekFrom::Start(self.len))?;
        self.file.write_all(line)?;
        if sync {
            self.file.sync_data()?;
        }
        self.len += line.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use dwcp_proto::handover::AbortReason;

    #[tokio::test]
    async fn what_was_appended_replays() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(folder(dir.path())).unwrap();
        let id = MigrationId::new("m1").unwrap();
        let mut journal = Journal::create(dir.path(), &id, Side::Source).await.unwrap();
        let entry = Entry::Aborted { reason: AbortReason::Cancelled };
        journal.note("phase", "precopy").await;
        journal.append(entry.clone()).await.unwrap();
        let replayed = replay(&fs::read(&journal.path).unwrap()).unwrap();
        assert_eq!(replayed.decisions(), [entry]);
        assert!(Journal::create(dir.path(), &id, Side::Source).await.is_err());
        assert!(Journal::create(dir.path(), &id, Side::Destination).await.is_ok());
    }
}
