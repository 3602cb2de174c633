//! Journals on disk: one file a migration and side, appended and synced; the format is `dwcp_proto::journal`'s.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dwcp_proto::journal::{Chain, Entry, JournalError, MAX_JOURNAL, Note, Replay, encode, replay};
use dwcp_proto::{MigrationId, Side};

const ARCHIVE: &str = "archive";
/// Journals in the archive: some 10 KB each.
const MAX_ARCHIVED: usize = 1024;
/// How long a journal is kept in the archive.
const ARCHIVED_FOR: Duration = Duration::from_secs(90 * 24 * 3600);
/// Journals of one migration and side: each attempt has its own.
pub(crate) const MAX_ATTEMPTS: u32 = 16;

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

/// The note of how it ended.
const ENDED: &str = "ended";

/// An open journal. Writes go through a blocking thread and are awaited, one at a time.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    inner: Option<Inner>,
    /// The end was noted already, by this life or one before.
    ended: bool,
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

/// The folder of journals that need nothing more, within the state folder.
pub(crate) fn archive(state_dir: &Path) -> PathBuf {
    folder(state_dir).join(ARCHIVE)
}

/// Where the journal of a migration lies while it may still decide something.
pub(crate) fn path(state_dir: &Path, id: &MigrationId, side: Side) -> PathBuf {
    folder(state_dir).join(format!("{id}.{}.jsonl", side_name(side)))
}

/// All journals of one side of a migration, in the order of its attempts.
pub(crate) fn all(state_dir: &Path, id: &MigrationId, side: Side) -> Vec<PathBuf> {
    let live = path(state_dir, id, side);
    let archived = (1..=MAX_ATTEMPTS).map(|n| archived(&live, n));
    archived.chain([live.clone()]).filter(|path| path.exists()).collect()
}

/// Whether `id` names a migration of which this side has a journal.
pub(crate) fn is_used(state_dir: &Path, id: &MigrationId, side: Side) -> bool {
    !all(state_dir, id, side).is_empty()
}

/// The bytes of a journal file, as far as one may be long.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_JOURNAL as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The migration and side that a journal's file name tells.
pub(crate) fn named(path: &Path) -> Option<(MigrationId, Side)> {
    let (id, side) = path.file_name()?.to_str()?.strip_suffix(".jsonl")?.rsplit_once('.')?;
    let side = [Side::Source, Side::Destination].into_iter().find(|each| side_name(*each) == side)?;
    Some((MigrationId::new(id).ok()?, side))
}

/// Moves a journal that needs nothing more out of the way of recovery. The oldest in the archive are removed.
pub(crate) fn retire(live: &Path) -> io::Result<()> {
    let free = (1..=MAX_ATTEMPTS).map(|n| archived(live, n)).find(|path| !path.exists());
    // As many attempts as there can be names: the last one's journal is the one of interest.
    let target = free.unwrap_or_else(|| archived(live, MAX_ATTEMPTS));
    fs::rename(live, &target)?;
    match target.parent() {
        Some(folder) => prune(folder),
        None => Ok(()),
    }
}

/// Removes what is too much of an archive, or too old beside its newest journal: a clock that is wrong costs none.
fn prune(folder: &Path) -> io::Result<()> {
    let mut all = Vec::new();
    for file in fs::read_dir(folder)? {
        let file = file?;
        all.push((file.metadata()?.modified()?, file.path()));
    }
    all.sort();
    let Some((newest, _)) = all.last().cloned() else { return Ok(()) };
    let surplus = all.len().saturating_sub(MAX_ARCHIVED);
    for (n, (written, path)) in all.iter().enumerate() {
        let old = newest.duration_since(*written).is_ok_and(|age| age > ARCHIVED_FOR);
        if old || n < surplus {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Where the `n`th journal of this name lies in the archive.
fn archived(live: &Path, n: u32) -> PathBuf {
    let name = live.file_stem().unwrap_or_default().to_string_lossy();
    live.with_file_name(ARCHIVE).join(format!("{name}.{n}.jsonl"))
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Source => "source",
        Side::Destination => "destination",
    }
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
        Ok(Journal { path, inner: Some(Inner { file, chain: Chain::default(), len: 0 }), ended: false })
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
        let bytes = read(path).map_err(io)?;
        let replay = replay(&bytes)?;
        let file = OpenOptions::new().write(true).open(path).map_err(io)?;
        let inner = Inner { file, chain: replay.chain, len: replay.len };
        let noted = |entry: &Entry| matches!(entry, Entry::Note(note) if note.what == ENDED);
        let ended = replay.entries.iter().any(|stamped| noted(&stamped.entry));
        Ok((Journal { path: path.to_owned(), inner: Some(inner), ended }, replay))
    }

    /// Appends a decision; it is durable when this returns. Also says how long the disk took.
    pub(crate) async fn append(&mut self, entry: Entry) -> Result<Duration, WriteError> {
        self.write(entry, true).await
    }

    /// Moves it to the archive: nobody needs it to decide anything.
    pub(crate) async fn retire(&mut self) {
        let path = self.path.clone();
        let retired = tokio::task::spawn_blocking(move || retire(&path)).await;
        if let Err(error) = retired.unwrap_or_else(|_| Err(io::Error::other("the thread failed"))) {
            tracing::warn!(%error, path = %self.path.display(), "journal not archived");
        }
    }

    /// Appends a line for people. Not synced: the next decision does that. The end is noted once.
    pub(crate) async fn note(&mut self, what: &str, text: impl Into<String>) {
        if what == ENDED && std::mem::replace(&mut self.ended, true) {
            return;
        }
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
        #[cfg(feature = "fault-points")]
        let broken = crate::fault::is_named("fails", "sync", &entry);
        let task = tokio::task::spawn_blocking(move || {
            #[cfg(feature = "fault-points")]
            if broken {
                let _ = inner.file.write_all(line.text.as_bytes());
                return (inner, Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())));
            }
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

    #[tokio::test]
    async fn what_is_settled_goes_to_the_archive_and_its_end_is_noted_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(archive(dir.path())).unwrap();
        let id = MigrationId::new("m.source.1").unwrap();
        for attempt in 1..=2 {
            let mut journal = Journal::create(dir.path(), &id, Side::Source).await.unwrap();
            let live = journal.path.clone();
            assert_eq!(named(&live), Some((id.clone(), Side::Source)));
            journal.note(ENDED, "aborted").await;
            let (mut journal, replay) = Journal::open(&live).unwrap();
            journal.note(ENDED, "again").await;
            assert_eq!((replay.entries.len(), read(&live).unwrap().len() as u64), (1, replay.len));
            journal.retire().await;
            assert!(!live.exists());
            assert_eq!(all(dir.path(), &id, Side::Source).len(), attempt);
            assert!(!is_used(dir.path(), &MigrationId::new("m").unwrap(), Side::Source));
        }
    }

    #[test]
    fn the_archive_is_bounded_in_number_and_age() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        for n in 0..MAX_ARCHIVED + 2 {
            let file = File::create(dir.path().join(n.to_string())).unwrap();
            file.set_modified(now - Duration::from_secs(n as u64)).unwrap();
        }
        let ancient = File::create(dir.path().join("ancient")).unwrap();
        ancient.set_modified(now - ARCHIVED_FOR - Duration::from_secs(1)).unwrap();
        prune(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), MAX_ARCHIVED);
        let exists = |name: String| dir.path().join(name).exists();
        assert!(!exists("ancient".into()) && !exists((MAX_ARCHIVED + 1).to_string()) && exists("0".into()));
    }
}
