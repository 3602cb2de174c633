//! Follows a flag document in a file.
//!
//! Changes are noticed by inotify on the file's folder, so that a file that is replaced is seen as well as one that is
//! written in place. The file is read once a second besides: a network file system, or a symlink whose target lies elsewhere,
//! says nothing to inotify.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{Absence, Applied, FEATURE, FlagDocument, MAX_DOCUMENT};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::sync::Notify;
use tracing::warn;

use super::keeper::Keeper;
use super::metrics::{FlagMetrics, Poll};

/// Time between two looks that nothing gave cause for.
const EVERY: Duration = Duration::from_secs(1);
/// The least time between two looks: a folder in which much happens must not keep the agent busy.
const REST: Duration = Duration::from_millis(20);
/// A file that cannot be read, or not as a document, counts only if it is still so after this: somebody may be writing it.
const DOUBT: Duration = Duration::from_millis(100);

/// Follows one file.
pub(super) struct FileFollower {
    path: PathBuf,
    keeper: Keeper,
    metrics: FlagMetrics,
    watch: Option<Watch>,
    /// What the last look found.
    seen: Option<Found>,
    /// Whether that is in force.
    good: bool,
}

/// The file's bytes, or why there are none.
type Found = Result<Vec<u8>, String>;

impl FileFollower {
    /// Looks at the file for the first time.
    pub(super) async fn start(path: &Path, keeper: Keeper, metrics: FlagMetrics) -> Self {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let watch = Watch::new(folder)
            .inspect_err(|error| warn!(folder = %folder.display(), %error, "the flag file is looked at once a second only"))
            .ok();
        let mut follower =
            FileFollower { path: path.to_owned(), keeper, metrics, watch, seen: None, good: false };
        follower.look().await;
        follower
    }

    /// Looks whenever the file changes, or `look` is notified, for ever.
    pub(super) async fn follow(mut self, look: Arc<Notify>) {
        loop {
            let changed = async {
                match &self.watch {
                    Some(watch) => watch.changed().await,
                    None => std::future::pending().await,
                }
            };
            let cause = async {
                tokio::select! {
                    () = tokio::time::sleep(EVERY) => {}
                    () = look.notified() => {}
                    () = changed => {}
                }
            };
            self.keeper.during(cause).await;
            self.look().await;
            self.keeper.during(tokio::time::sleep(REST)).await;
        }
    }

    /// Obeys the file as it is now.
    pub(super) async fn look(&mut self) {
        // The folder may be another one by now.
        self.watch.iter().for_each(Watch::renew);
        let asked = self.keeper.clock().now();
        let mut found = read(&self.path).await;
        if self.seen.as_ref() == Some(&found) {
            if self.good {
                self.metrics.polled(Poll::Confirmed);
                self.keeper.confirm(asked);
            }
            return;
        }
        let mut document = parse(&found);
        if document.is_err() && self.good {
            self.keeper.during(tokio::time::sleep(DOUBT)).await;
            found = read(&self.path).await;
            document = parse(&found);
        }
        let applied = document.and_then(|document| {
            self.keeper.apply(document, asked).map_err(|refusal| (None, refusal.code(), refusal.to_string()))
        });
        self.seen = Some(found);
        self.good = applied.is_ok();
        match applied {
            Ok(Applied::Changed) => self.metrics.polled(Poll::Changed),
            Ok(Applied::Unchanged) => self.metrics.polled(Poll::Confirmed),
            Err((absence, code, what)) => {
                self.metrics.polled(Poll::Refused);
                self.metrics.refused(code);
                absence.into_iter().for_each(|absence| self.keeper.withdraw(absence));
                self.keeper.failed(format!("{}: {what}", self.path.display()));
            }
        }
    }

    #[cfg(test)]
    pub(super) fn keeper(&self) -> &Keeper {
        &self.keeper
    }
}

/// The document, or what its absence means, its name in metrics, and the reason.
fn parse(found: &Found) -> Result<FlagDocument, (Option<Absence>, &'static str, String)> {
    let bytes = found.as_ref().map_err(|error| (Some(Absence::NoAnswer), "malformed", error.clone()))?;
    FlagDocument::parse(bytes, FEATURE).map_err(|bad| {
        let absence = Absence::from(&bad);
        (Some(absence), super::refusal(absence), bad.to_string())
    })
}

async fn read(path: &Path) -> Found {
    try_read(path).await.map_err(|error| error.to_string())
}

/// The file's bytes; a directory, a pipe or a giant is an error.
async fn try_read(path: &Path) -> io::Result<Vec<u8>> {
    if !tokio::fs::metadata(path).await?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    // One more than allowed: enough for the parser to see that it is too long.
    let limit = MAX_DOCUMENT as u64 + 1;
    tokio::fs::File::open(path).await?.take(limit).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// Says when something happens in a folder that may have changed a file.
pub(super) struct Watch {
    events: AsyncFd<OwnedFd>,
    folder: PathBuf,
}

impl Watch {
    pub(super) fn new(folder: &Path) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        // Deprecated because a type might answer with another descriptor each time it is asked; an `OwnedFd` does not.
        #[allow(deprecated)]
        let events = AsyncFd::with_interest(events, Interest::READABLE)?;
        let watch = Watch { events, folder: folder.to_owned() };
        watch.renew();
        Ok(watch)
    }

    /// Watches the folder that has the name now. It may be away for a while: then there is nothing to watch.
    pub(super) fn renew(&self) {
        // A file that is being written has changed only when it is closed.
        let what =
            WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO | WatchFlags::DELETE;
        let _ = inotify::add_watch(&self.events, &self.folder, what | WatchFlags::ONLYDIR);
    }

    /// Waits for something to happen; all that has happened by then is one event.
    pub(super) async fn changed(&self) {
        loop {
            let Ok(mut ready) = self.events.readable().await else {
                return std::future::pending().await;
            };
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(self.events.get_ref(), &mut buffer);
            let mut any = false;
            let end = loop {
                match events.next() {
                    Ok(_) => any = true,
                    Err(error) => break error,
                }
            };
            if end == Errno::WOULDBLOCK {
                ready.clear_ready();
            }
            if any {
                return;
            }
        }
    }
}
