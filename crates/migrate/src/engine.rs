//! The engine: every migration of this node.
//!
//! It listens for other agents, keeps a registry of what runs, and gives each migration a task of its own
//! (`source`, `destination`). The registry is in `shared`, who comes to the listener in `reception`.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_link::{Identity, ListenOptions, Listener};
use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::Resolution;
use dwcp_proto::{MigrationId, Path, Side, VmName};
use tokio::sync::{oneshot, watch};
use tracing::{Instrument, info_span, warn};

use crate::config::{CheckReport, EngineConfig, Transport};
use crate::error::{Blame, Failure};
use crate::estimate::Estimate;
use crate::explain::Tale;
use crate::handshake::nonce;
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::reins::{Order, reins};
use crate::report::Report;
use crate::shared::{Entry, Shared};
use crate::source::SwitchOrder;
use crate::spec::{IncomingSpec, MigrateSpec};
use crate::status::{Explanation, Phase, Role, Status, Story};
use crate::wire::link_failure;
use crate::{estimate, explain, inquiry, journal, reception, recovery, retry, source};

/// Every migration of this node. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// How long a stop waits for running migrations to end.
const STOPPING: Duration = Duration::from_secs(20);

/// How long the data path may take to answer an operator.
const SWITCHING: Duration = Duration::from_secs(2);

impl Engine {
    /// Binds the data listener and makes the state folder ready.
    pub async fn start(config: EngineConfig) -> Result<Engine, Failure> {
        #[cfg(feature = "fault-points")]
        crate::fault::begin();
        let write_time = prepare_state_dir(&config.state_dir).await?;
        let identity = Identity::new(config.key.clone(), config.peers.clone()).map_err(link_failure)?;
        let plain = config.policy.v1_plain || config.policy.datacenter_plain;
        let quic = config.transport != Transport::Tcp;
        let options = ListenOptions { plain, quic, ..ListenOptions::default() };
        let listener = Listener::bind(config.listen, &identity, options).await.map_err(link_failure)?;
        let pool = Pool::new(config.limits.workers, config.limits.migrations).map_err(|error| {
            Failure::new(
                "threads",
                Blame::Local,
                format!("cannot start codec threads: {error}"),
                "check the process limits",
            )
        })?;
        let addr = listener.local_addr();
        let refusals = listener.refusals();
        if let Some(error) = listener.without_quic() {
            warn!(code = error.code(), "no QUIC here, TCP only: UDP: {error}");
        }
        let takes_quic = quic && listener.without_quic().is_none();
        let shared = Arc::new(Shared::new(config, identity, pool, write_time, addr, takes_quic));
        shared.metrics.listens(refusals);
        // Before anybody is let in: a peer that asks for a session of the life before must find it.
        recovery::recover(&shared).await;
        tokio::spawn(reception::accept(Arc::downgrade(&shared), listener));
        Ok(Engine { shared })
    }

    /// Where the data listener is bound.
    pub fn data_addr(&self) -> SocketAddr {
        self.shared.data_addr
    }

    /// What this node counts.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Prepares to receive a VM: its VMM is looked at, and left untouched until its source has come.
    pub async fn prepare_incoming(&self, spec: IncomingSpec) -> Result<Status, Failure> {
        reception::prepare(&self.shared, spec).await
    }

    /// Starts to move a VM, and returns at once; watch the id for how it goes. Idempotent by `spec.id`.
    pub async fn migrate(&self, spec: MigrateSpec) -> Result<MigrationId, Failure> {
        let id = match &spec.id {
            Some(id) => id.clone(),
            None => made_id("m", &spec.vm)?,
        };
        self.shared.admits(|_| ())?;
        let mut registry = self.shared.registry();
        registry.forget_ended();
        if let Some(entry) = registry.migrations.get(&id) {
            let status = entry.report.status();
            let same = match &entry.asked {
                Some(asked) => *asked == spec,
                // Of an earlier life of this agent, in which the id was taken for it.
                None => (status.role, &status.vm, &status.peer) == (Role::Source, &spec.vm, &spec.to),
            };
            if same && !Mechanism::Idempotence.is_off() {
                return Ok(id);
            }
            let text = format!("{id} is the id of another migration of this node");
            return Err(Failure::new("id_used", Blame::Operator, text, "choose another --id"));
        }
        let busy = registry.migrations.iter().find(|(_, entry)| {
            let status = entry.report.status();
            status.vm == spec.vm && status.role == Role::Source && !status.phase.is_end()
        });
        if let Some((other, _)) = busy {
            let text = format!("VM {} is being migrated already, as {other}", spec.vm);
            return Err(Failure::new("already_migrating", Blame::Operator, text, "wait for it or cancel it"));
        }
        if journal::is_used(&self.shared.config.state_dir, &id, Side::Source) {
            let text = format!("a migration {id} has been journaled here before");
            return Err(Failure::new("id_used", Blame::Operator, text, "choose another --id"));
        }
        let report = Arc::new(Report::new(id.clone(), spec.vm.clone(), Role::Source, spec.to.clone()));
        let (held, reins) = reins();
        let span = info_span!("migration", id = %id, vm = %spec.vm, role = "source");
        let run = retry::run(self.shared.clone(), id.clone(), spec.clone(), report.clone(), reins);
        let task = Some(tokio::spawn(run.instrument(span)));
        registry.migrations.insert(id.clone(), Entry { report, held, task, asked: Some(spec) });
        Ok(id)
    }

    /// Says whether a migration would be started, without changing anything at either end.
    pub async fn check(&self, spec: MigrateSpec) -> CheckReport {
        let id = match spec.id.clone().map_or_else(|| made_id("check", &spec.vm), Ok) {
            Ok(id) => id,
            Err(failure) => {
                return CheckReport {
                    ok: false,
                    problems: vec![failure],
                    notes: Vec::new(),
                    path: None,
                    mode: None,
                    mode_reason: None,
                    rtt_ms: None,
                };
            }
        };
        source::check(&self.shared, &id, &spec).await
    }

    /// Says what a migration would take, from a look at the guest and at the link of some seconds. Moves nothing.
    pub async fn estimate(&self, spec: MigrateSpec) -> Result<Estimate, Failure> {
        let id = match &spec.id {
            Some(id) => id.clone(),
            None => made_id("e", &spec.vm)?,
        };
        estimate::estimate(&self.shared, &id, &spec).await
    }

    /// The status of a migration, as it changes; `None` for an id unknown here.
    pub fn watch(&self, id: &MigrationId) -> Option<watch::Receiver<Status>> {
        self.shared.registry().migrations.get(id).map(|entry| entry.report.watch())
    }

    /// The status of a migration; `None` for an id unknown here.
    pub fn get(&self, id: &MigrationId) -> Option<Status> {
        self.shared.registry().migrations.get(id).map(|entry| entry.report.status())
    }

    /// All migrations of this node since it started, ended ones as far back as they are kept.
    pub fn list(&self) -> Vec<Status> {
        self.shared.registry().migrations.values().map(|entry| entry.report.status()).collect()
    }

    /// Asks a migration to end with the guest at the source, and waits until it has ended or decided otherwise.
    pub async fn cancel(&self, id: &MigrationId) -> Result<Status, Failure> {
        let mut watched = {
            let mut registry = self.shared.registry();
            let Some(entry) = registry.migrations.get(id) else {
                let text = format!("there is no migration {id} here");
                return Err(Failure::new("unknown_migration", Blame::Operator, text, "see dwcpctl list"));
            };
            entry.held.cancel();
            let (report, watched) = (entry.report.clone(), entry.report.watch());
            // One that still waits for its source has no task to tell.
            if let Some(vm) = registry.waiting.values().find(|w| w.id == *id).map(|w| w.spec.vm.clone()) {
                registry.waiting.remove(&vm);
                let failure = Failure::new("cancelled", Blame::Operator, "cancelled on request", "");
                report.end(Phase::Aborted, Some(failure));
            }
            watched
        };
        let ended = watched.wait_for(|status| status.phase.is_end());
        let _ = tokio::time::timeout(STOPPING, ended).await;
        let status = watched.borrow().clone();
        Ok(status)
    }

    /// Tells what happened to a migration, from this node's journals and by asking the other node: also after a restart.
    pub async fn explain(&self, id: &MigrationId) -> Result<Story, Failure> {
        let tales = self.tales(id).await?;
        let asked = tales.iter().map(|tale| self.ask_peer(tale));
        let (mut peers, mut unheard) = (Vec::new(), Vec::new());
        for heard in futures_util::future::join_all(asked).await {
            match heard {
                Ok(peer) => peers.push(peer),
                Err(failure) => unheard.push(failure),
            }
        }
        Ok(Story { sides: tales.into_iter().map(|tale| tale.explanation).collect(), peers, unheard })
    }

    /// What the journals of this node say; at least one.
    async fn tales(&self, id: &MigrationId) -> Result<Vec<Tale>, Failure> {
        let (dir, wanted, status) = (self.shared.config.state_dir.clone(), id.clone(), self.get(id));
        let told = tokio::task::spawn_blocking(move || explain::tales(&dir, &wanted, status.as_ref())).await;
        match told {
            Ok(tales) if !tales.is_empty() => Ok(tales),
            Ok(_) => {
                let text = format!("there is no journal of a migration {id} here");
                Err(Failure::new("unknown_migration", Blame::Operator, text, "see dwcpctl list"))
            }
            Err(_) => {
                Err(Failure::new("task", Blame::Local, "reading the journal failed", "please report this"))
            }
        }
    }

    async fn ask_peer(&self, tale: &Tale) -> Result<Explanation, Failure> {
        let unknown = || {
            let text = "where the other node's agent listens is not known here";
            Failure::new("peer_unknown", Blame::Operator, text, "ask at the other node, too")
        };
        let (to, addr) = tale.explanation.peer.clone().zip(tale.peer_addr).ok_or_else(unknown)?;
        inquiry::ask(&self.shared.dialler(addr, to), &tale.explanation).await
    }

    /// An operator decides where the agents may not. Returns what the decision does; with `act` it has been taken.
    pub async fn resolve(
        &self,
        id: &MigrationId,
        decision: Resolution,
        act: bool,
    ) -> Result<String, Failure> {
        let held = self.shared.registry().migrations.get(id).map(|entry| entry.held.clone());
        let Some(held) = held else { return Err(self.nothing_to_resolve(id).await) };
        let (reply, answer) = oneshot::channel();
        let order = Order { decision, act, reply };
        match held.order(order).await {
            Ok(()) => match answer.await {
                Ok(answer) => answer,
                Err(_) => Err(self.nothing_to_resolve(id).await),
            },
            Err(_) => Err(self.nothing_to_resolve(id).await),
        }
    }

    /// Why no decision is taken about a migration that nobody works on: what became of it.
    async fn nothing_to_resolve(&self, id: &MigrationId) -> Failure {
        let tales = match self.tales(id).await {
            Ok(tales) => tales,
            Err(failure) => return failure,
        };
        let last = tales.last().map(|tale| &tale.explanation);
        let owner = match last.map(|side| side.owner.as_str()) {
            Some("in_doubt") => "and nobody here works on it",
            Some("nobody") => "the guest is lost",
            Some("destination") => "the guest is at its destination",
            _ => "the guest is at its source",
        };
        let text = format!("migration {id} is over, {owner}; there is nothing to resolve");
        let hint = last.map_or(String::new(), |side| side.next.clone());
        Failure::new("not_in_doubt", Blame::Operator, text, hint)
    }

    /// An operator wants a running migration on this path. Returns what becomes of it; the change itself shows in the status.
    pub async fn switch(&self, id: &MigrationId, path: Path) -> Result<String, Failure> {
        let held = self.shared.registry().migrations.get(id).map(|entry| entry.held.clone());
        let Some(held) = held else {
            let text = format!("there is no migration {id} here");
            return Err(Failure::new("unknown_migration", Blame::Operator, text, "see dwcpctl list"));
        };
        let cannot = || {
            let text = format!("migration {id} carries no memory from here now");
            let hint = "ask the source's agent, between the migration's start and its switchover";
            Failure::new("no_data_path", Blame::Operator, text, hint)
        };
        let (reply, answer) = oneshot::channel();
        held.switch(SwitchOrder { path, reply }).map_err(|_| cannot())?;
        let answer = tokio::time::timeout(SWITCHING, answer).await;
        answer.map_err(|_| cannot())?.map_err(|_| cannot())?
    }

    /// Refuses new work, takes back what has not committed, and lets handovers come to their end; bounded in time.
    pub async fn shutdown(&self) {
        let tasks: Vec<_> = {
            let mut registry = self.shared.registry();
            registry.closing = Some(Instant::now());
            registry.waiting.clear();
            registry
                .migrations
                .values_mut()
                .filter_map(|entry| {
                    entry.held.cancel();
                    entry.task.take()
                })
                .collect()
        };
        let all = async {
            for task in tasks {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(STOPPING, all).await.is_err() {
            warn!("migrations still running at the stop; their journals say how to go on");
        }
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Engine({})", self.shared.config.key.node())
    }
}

/// An id that nobody chose: what it is, the VM, and eight random digits.
pub(crate) fn made_id(kind: &str, vm: &VmName) -> Result<MigrationId, Failure> {
    let random = u32::from_be_bytes(nonce()?[..4].try_into().unwrap_or_default());
    let vm: String = vm.as_str().chars().take(40).collect();
    MigrationId::new(format!("{kind}-{vm}-{random:08x}"))
        .map_err(|error| Failure::new("bad_name", Blame::Operator, error.to_string(), "pass --id"))
}

/// Makes the state folder, and measures a small synced write to it: the first sign of a full or read-only disk.
async fn prepare_state_dir(dir: &FilePath) -> Result<Duration, Failure> {
    let (dir, shown) = (dir.to_owned(), dir.display().to_string());
    let made = tokio::task::spawn_blocking(move || -> io::Result<Duration> {
        for folder in [dir.clone(), journal::folder(&dir), journal::archive(&dir)] {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let probe = dir.join(".probe");
        let mut times = Vec::new();
        for _ in 0..3 {
            let started = Instant::now();
            let mut file = File::create(&probe)?;
            file.write_all(&[0; 512])?;
            file.sync_data()?;
            times.push(started.elapsed());
        }
        fs::remove_file(&probe)?;
        times.sort();
        Ok(times[1])
    });
    let outcome = made.await.unwrap_or_else(|_| Err(io::Error::other("the probe failed")));
    outcome.map_err(|error| {
        let text = format!("the state folder {shown} cannot be written: {error}");
        Failure::new("state_dir", Blame::Operator, text, "check state_dir, its owner and its disk")
    })
}
