//! The one who writes: a thread that owns the state and its store, and publishes what it has written.
//!
//! Changes are taken one after the other: planned against the state, written to disk, then published to readers, then
//! answered. So what was answered is durable, and readers never wait.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use axum::body::Bytes;
use axum::http::HeaderValue;
use tokio::sync::oneshot;
use tracing::{error, info};

use crate::fleet::Fleet;
use crate::state::{Actor, Command, Flag, Refused, State, Write};
use crate::store::{Entry, Record, Seen, Store, StoreError};
use crate::time;

/// Changes that may wait. At some milliseconds each that is less than a client waits; more would only grow old.
const WAITING: usize = 64;

/// A flag as readers have it: made once per change, shared by all polls.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) flag: Flag,
    /// The document's text.
    pub(crate) text: String,
    /// The answer to a node: the document alone.
    pub(crate) answer: Bytes,
    /// Weak: what stands beside the document for people changes without it.
    pub(crate) etag: HeaderValue,
}

/// What readers see.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) cluster: String,
    pub(crate) fleet: Fleet,
    flags: RwLock<Arc<BTreeMap<String, Arc<Served>>>>,
    /// Why the last change could not be kept, if it could not.
    trouble: RwLock<Option<String>>,
}

/// The way to the writer; cheap to clone. The writer ends when all are gone.
#[derive(Debug, Clone)]
pub(crate) struct Writer {
    jobs: SyncSender<Job>,
}

/// Why a change was not made.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum WriteError {
    /// By the rules.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Too many are waiting.
    #[error("too many changes at once")]
    Busy,
    /// It may be on disk or not; it is not in force.
    #[error("the change could not be kept: {0}")]
    Store(String),
    /// The server is on its way out.
    #[error("the server is stopping")]
    Stopping,
}

enum Job {
    Change { command: Command, actor: Actor, origin: String, done: oneshot::Sender<Result<bool, WriteError>> },
    Seen { seen: Vec<Seen>, done: oneshot::Sender<()> },
    Audit { after: u64, limit: usize, done: oneshot::Sender<Result<Vec<Record>, WriteError>> },
}

/// Loads the state, publishes it, and starts the writer.
pub(crate) fn start(mut store: Box<dyn Store>) -> Result<(Writer, Arc<View>, JoinHandle<()>), StoreError> {
    let (state, seen) = store.load()?;
    let view = Arc::new(View {
        cluster: state.cluster.clone(),
        fleet: Fleet::new(&state, seen),
        flags: RwLock::new(Arc::new(served(&state))),
        trouble: RwLock::new(None),
    });
    let (jobs, inbox) = sync_channel(WAITING);
    let desk = Desk { state, store, view: Arc::clone(&view), doubtful: false };
    let thread = std::thread::spawn(move || desk.work(&inbox));
    Ok((Writer { jobs }, view, thread))
}

impl Writer {
    /// Makes a change; whether there was anything to change.
    pub(crate) async fn change(
        &self,
        command: Command,
        actor: Actor,
        origin: String,
    ) -> Result<bool, WriteError> {
        let (done, answer) = oneshot::channel();
        self.ask(Job::Change { command, actor, origin, done }, answer).await?
    }

    /// Keeps when nodes were heard.
    pub(crate) async fn note_seen(&self, seen: Vec<Seen>) -> Result<(), WriteError> {
        let (done, answer) = oneshot::channel();
        self.ask(Job::Seen { seen, done }, answer).await
    }

    /// A page of the audit.
    pub(crate) async fn audit(&self, after: u64, limit: usize) -> Result<Vec<Record>, WriteError> {
        let (done, answer) = oneshot::channel();
        self.ask(Job::Audit { after, limit, done }, answer).await?
    }

    async fn ask<T>(&self, job: Job, answer: oneshot::Receiver<T>) -> Result<T, WriteError> {
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => WriteError::Busy,
            TrySendError::Disconnected(_) => WriteError::Stopping,
        })?;
        answer.await.map_err(|_| WriteError::Stopping)
    }
}

impl View {
    /// The flags as they are now.
    pub(crate) fn flags(&self) -> Arc<BTreeMap<String, Arc<Served>>> {
        Arc::clone(&self.flags.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Why changes cannot be kept, if they cannot.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, state: &State) {
        *self.flags.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(served(state));
    }
}

/// The writer's own.
struct Desk {
    state: State,
    store: Box<dyn Store>,
    view: Arc<View>,
    /// The last commit failed: what the store holds has to be read before anything is built on it.
    doubtful: bool,
}

impl Desk {
    fn work(mut self, inbox: &Receiver<Job>) {
        // An answer that nobody waits for any more is no matter.
        while let Ok(job) = inbox.recv() {
            match job {
                Job::Change { command, actor, origin, done } => {
                    let _ = done.send(self.change(&command, &actor, origin));
                }
                Job::Seen { seen, done } => {
                    if let Err(error) = self.store.note_seen(&seen) {
                        error!(%error, "when nodes were heard is not kept");
                    }
                    let _ = done.send(());
                }
                Job::Audit { after, limit, done } => {
                    let page = self.store.audit(after, limit);
                    let _ = done.send(page.map_err(|error| WriteError::Store(error.to_string())));
                }
            }
        }
    }

    fn change(&mut self, command: &Command, actor: &Actor, origin: String) -> Result<bool, WriteError> {
        if self.doubtful {
            self.look_again().map_err(|error| self.fail(&error))?;
        }
        let now_ms = time::now_ms();
        let writes = self.state.plan(command, actor, now_ms).inspect_err(|refused| {
            info!(who = actor.name, %origin, action = command.name(), %refused, "refused");
        })?;
        let (action, detail) = (command.name(), command.detail().to_string());
        let entry =
            Entry { at_ms: now_ms, who: actor.name.clone(), origin, action: action.to_owned(), detail };
        self.store.commit(&writes, &entry).map_err(|error| {
            self.doubtful = true;
            self.fail(&error)
        })?;
        info!(who = entry.who, origin = entry.origin, action, detail = entry.detail, "changed");
        self.trouble(None);
        self.view.fleet.follow(&writes);
        let changed = !writes.is_empty();
        let flags = writes.iter().any(|write| matches!(write, Write::Flag(_)));
        self.state.take(writes);
        if flags {
            self.view.publish(&self.state);
        }
        Ok(changed)
    }

    fn look_again(&mut self) -> Result<(), StoreError> {
        let (state, _) = self.store.load()?;
        let nodes = state.nodes.values().cloned().map(Write::Node);
        let gone = self.state.nodes.keys().filter(|name| !state.nodes.contains_key(*name));
        let writes: Vec<Write> = nodes.chain(gone.cloned().map(Write::Gone)).collect();
        self.view.fleet.follow(&writes);
        self.view.publish(&state);
        (self.state, self.doubtful) = (state, false);
        Ok(())
    }

    fn fail(&self, error: &StoreError) -> WriteError {
        error!(%error, "a change could not be kept");
        self.trouble(Some(error.to_string()));
        WriteError::Store(error.to_string())
    }

    fn trouble(&self, trouble: Option<String>) {
        *self.view.trouble.write().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

fn served(state: &State) -> BTreeMap<String, Arc<Served>> {
    let served = |(feature, flag): (&String, &Flag)| {
        let text = flag.document.to_json();
        let etag = format!("W/\"{}-{}\"", state.cluster, flag.epoch());
        // The cluster's id is hexadecimal.
        let etag = HeaderValue::from_str(&etag).unwrap_or(HeaderValue::from_static("W/\"\""));
        let answer = Bytes::from(format!("{{\"flag\":{text}}}\n"));
        (feature.clone(), Arc::new(Served { flag: flag.clone(), text, answer, etag }))
    };
    state.flags.iter().map(served).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use dwcp_flags::{FEATURE, FlagChange};

    use super::*;
    use crate::state::Role;

    /// A store whose disk is full now and then: what it says no to may be there all the same.
    struct Flaky {
        kept: State,
        commits: Vec<Disk>,
    }

    enum Disk {
        Works,
        Fails,
        FailsAfterwards,
    }

    impl Store for Flaky {
        fn load(&mut self) -> Result<(State, Vec<Seen>), StoreError> {
            Ok((self.kept.clone(), Vec::new()))
        }

        fn commit(&mut self, writes: &[Write], _entry: &Entry) -> Result<(), StoreError> {
            let disk = self.commits.remove(0);
            if !matches!(disk, Disk::Fails) {
                self.kept.take(writes.to_vec());
            }
            match disk {
                Disk::Works => Ok(()),
                _ => Err(StoreError::Damaged { path: "disk".into(), what: "full".into() }),
            }
        }

        fn note_seen(&mut self, _seen: &[Seen]) -> Result<(), StoreError> {
            Ok(())
        }

        fn audit(&mut self, _after: u64, _limit: usize) -> Result<Vec<Record>, StoreError> {
            Ok(Vec::new())
        }
    }

    fn set(percentage: u8) -> Command {
        let body = format!(r#"{{"feature":"{FEATURE}","percentage":{percentage},"enabled":true}}"#);
        Command::Set(FlagChange::parse(body.as_bytes(), FEATURE).unwrap())
    }

    #[tokio::test]
    async fn what_cannot_be_kept_is_not_in_force_and_what_was_kept_counts() {
        let commits = vec![Disk::Works, Disk::Fails, Disk::FailsAfterwards, Disk::Works];
        let store = Flaky { kept: State::new("c1".into()), commits };
        let (writer, view, thread) = start(Box::new(store)).unwrap();
        let actor = Actor { name: "me".into(), roles: BTreeSet::from([Role::Admin]) };
        let change = async |percentage| {
            writer
                .change(set(percentage), actor.clone(), "here".into())
                .await
                .map_err(|error| error.to_string())
        };
        let now = || {
            let served = Arc::clone(&view.flags()[FEATURE]);
            (served.flag.document.percentage.value(), served.flag.epoch().counter, view.trouble().is_some())
        };
        assert_eq!(change(1).await, Ok(true));
        assert_eq!(now(), (1, 2, false));
        assert!(change(2).await.unwrap_err().contains("full"));
        assert_eq!(now(), (1, 2, true));
        assert!(change(3).await.is_err());
        assert_eq!(now(), (1, 2, true));
        // The third was kept after all, so the fourth has the epoch after it.
        assert_eq!(change(4).await, Ok(true));
        assert_eq!(now(), (4, 4, false));
        drop(writer);
        thread.join().unwrap();
    }
}
