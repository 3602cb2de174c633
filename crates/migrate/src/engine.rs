//! The engine: every migration of this node.
//!
//! It listens for other agents, keeps a registry of what runs, and gives each migration a task of its own
//! ([`source`](crate::source), [`destination`](crate::destination)).

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use dwcp_hde::HDE_VERSION;
use dwcp_link::{Identity, ListenOptions, Listener};
use dwcp_proto::handover::Resolution;
use dwcp_proto::message::{MINOR, Offer};
use dwcp_proto::negotiate::{MAX_STREAMS, MIN_WINDOW};
use dwcp_proto::{Codec, MigrationId, NodeKey, SessionId, Side, VmName};
use dwcp_vmm::preflight;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{Instrument, debug, info, info_span, warn};

use crate::destination::{self, Agreed};
use crate::error::{Blame, Failure};
use crate::guest::{Guest, qmp_failure};
use crate::handshake::{Arrival, Greeted, Joining, Newcomer, Session, nonce, receive};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::reins::{Held, Order, Reins, reins};
use crate::report::Report;
use crate::spec::{IncomingSpec, MigrateSpec, Vmm};
use crate::status::{Explanation, Phase, Role, Status};
use crate::wire::link_failure;
use crate::{explain, journal, recovery, source};

/// Whether v3 may be used now, and why; the flag source keeps it up to date.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gate {
    /// The flag and its lease allow v3 for this node as a source.
    pub source: bool,
    /// This node vetoes v3 as a destination: excluded, or it sees the flag off.
    pub veto: bool,
    /// The reason, as `dwcp-flags` words it.
    pub reason: String,
    /// The flag document's epoch: incarnation and counter.
    pub epoch: (u64, u64),
}

/// Where v1 may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum V1Policy {
    /// Anywhere.
    #[default]
    Any,
    /// Only on links that count as datacenter.
    Datacenter,
    /// Nowhere.
    Never,
}

/// Local policy; flags choose inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// v1's data connection may be plain TCP, where the link counts as datacenter and the peer agrees.
    pub v1_plain: bool,
    /// Where v1 may be used.
    pub v1: V1Policy,
    /// v3's data connections may be plain TCP in datacenter mode (chunks stay signed).
    pub datacenter_plain: bool,
}

/// Bounds on what this agent takes of its machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in flight of one migration: read from the VMM and not yet acknowledged.
    pub inflight: u64,
    /// Codec threads, shared by all migrations.
    pub workers: usize,
    /// Migrations at once, both directions together.
    pub migrations: usize,
}

/// What the engine is built from.
#[derive(Debug)]
pub struct EngineConfig {
    /// This node's identity.
    pub key: Arc<NodeKey>,
    /// Whom it trusts.
    pub peers: Arc<dwcp_link::Peers>,
    /// Where journals and sockets live; mode 0700.
    pub state_dir: PathBuf,
    /// Local policy.
    pub policy: Policy,
    /// Local bounds.
    pub limits: Limits,
    /// The flag's verdict, kept up to date.
    pub gate: watch::Receiver<Gate>,
    /// Where the data listener binds; port 0 takes a free one.
    pub listen: SocketAddr,
}

/// What `migrate --check` found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Whether a migration would be started.
    pub ok: bool,
    /// What speaks against it.
    pub problems: Vec<Failure>,
    /// What the operator should know.
    pub notes: Vec<String>,
    /// The path and mode that would be used.
    pub path: Option<String>,
    /// The mode that would be used.
    pub mode: Option<String>,
    /// Round trip to the peer, milliseconds.
    pub rtt_ms: Option<f64>,
}

/// Every migration of this node. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

/// What all migrations share.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) identity: Identity,
    pub(crate) pool: Pool,
    pub(crate) metrics: Metrics,
    /// How long a small synced write to the state folder takes.
    pub(crate) write_time: Duration,
    data_addr: SocketAddr,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    migrations: HashMap<MigrationId, Entry>,
    /// VMs that wait for their source, by name.
    waiting: HashMap<VmName, Waiting>,
    sessions: HashMap<SessionId, (Arc<Session>, mpsc::Sender<Arrival>)>,
    /// Since when the agent is stopping.
    closing: Option<Instant>,
}

/// A migration and its task.
struct Entry {
    report: Arc<Report>,
    held: Held,
    task: Option<JoinHandle<()>>,
    /// What was asked for at the source: the same request again is the same migration.
    asked: Option<MigrateSpec>,
}

/// A VMM that waits for its source.
struct Waiting {
    id: MigrationId,
    spec: IncomingSpec,
    guest: Guest,
    report: Arc<Report>,
    reins: Reins,
}

/// Connections that have not yet said what they want, or wait for the answer; a plain one has proved nothing until then. Each has
/// [`PATIENCE`](crate::wire::PATIENCE) for a message.
const MAX_NEWCOMERS: usize = 256;
impl Waiting {
    /// Its VMM has died.
    fn end_gone(self) {
        let text = "the waiting VMM ended before its guest came";
        let failure =
            Failure::new("vmm_gone_destination", Blame::Vmm, text, "see its log, and start it anew");
        self.report.end(Phase::Aborted, Some(failure));
    }
}

/// Ended migrations that `list` and `get` still know; the oldest are forgotten first.
const MAX_ENDED: usize = 256;
/// How long a stop waits for running migrations to end.
const STOPPING: Duration = Duration::from_secs(20);

impl Engine {
    /// Binds the data listener and makes the state folder ready.
    pub async fn start(config: EngineConfig) -> Result<Engine, Failure> {
        let write_time = prepare_state_dir(&config.state_dir).await?;
        let identity = Identity::new(config.key.clone(), config.peers.clone()).map_err(link_failure)?;
        let plain = config.policy.v1_plain || config.policy.datacenter_plain;
        let options = ListenOptions { plain, ..ListenOptions::default() };
        let listener = Listener::bind(config.listen, &identity, options).await.map_err(link_failure)?;
        let pool = Pool::new(config.limits.workers, config.limits.migrations).map_err(|error| {
            Failure::new(
                "threads",
                Blame::Local,
                format!("cannot start codec threads: {error}"),
                "check the process limits",
            )
        })?;
        let shared = Arc::new(Shared {
            identity,
            pool,
            metrics: Metrics::new(),
            write_time,
            data_addr: listener.local_addr(),
            registry: Mutex::default(),
            config,
        });
        // Before anybody is let in: a peer that asks for a session of the life before must find it.
        recovery::recover(&shared).await;
        tokio::spawn(accept(Arc::downgrade(&shared), listener));
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
        let shared = &self.shared;
        if !shared.config.peers.roster().knows(&spec.from) {
            let text = format!("there is no key of node {} in the peers folder", spec.from);
            let hint = format!("put {}.pub into [identity] peers and reload", spec.from);
            return Err(Failure::new("unknown_peer", Blame::Operator, text, hint));
        }
        let path = match &spec.vmm {
            Vmm::Qmp(path) => path.clone(),
            Vmm::Relay(_) => {
                let text = "--relay is not supported by this version";
                return Err(Failure::new("unsupported", Blame::Operator, text, "drive QEMU through --qmp"));
            }
        };
        shared.admits(|_| ())?;
        shared.registry().refuse_awaited(&spec.vm)?;
        let guest = Guest::connect(&path).await?;
        let findings =
            preflight::destination(&guest.reach().await.map_err(qmp_failure)?).await.map_err(qmp_failure)?;
        if let Some(failure) = source::failures(findings).into_iter().next() {
            return Err(failure);
        }
        let id = made_id("in", &spec.vm)?;
        let report = Arc::new(Report::new(id.clone(), spec.vm.clone(), Role::Destination, spec.from.clone()));
        let (held, reins) = reins();
        let entry = Entry { report: report.clone(), held, task: None, asked: None };
        let waiting = Waiting { id: id.clone(), spec: spec.clone(), guest, report: report.clone(), reins };
        let mut registry = shared.registry();
        registry.forget_ended();
        // Somebody else may have been as fast.
        registry.refuse_awaited(&spec.vm)?;
        registry.migrations.insert(id, entry);
        registry.waiting.insert(spec.vm, waiting);
        Ok(report.status())
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
            if entry.asked.as_ref() == Some(&spec) {
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
        if journal::path(&self.shared.config.state_dir, &id, Side::Source).exists() {
            let text = format!("a migration {id} has been journaled here before");
            return Err(Failure::new("id_used", Blame::Operator, text, "choose another --id"));
        }
        let report = Arc::new(Report::new(id.clone(), spec.vm.clone(), Role::Source, spec.to.clone()));
        let (held, reins) = reins();
        let span = info_span!("migration", id = %id, vm = %spec.vm, role = "source");
        let run = source::run(self.shared.clone(), id.clone(), spec.clone(), report.clone(), reins);
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
                    rtt_ms: None,
                };
            }
        };
        source::check(&self.shared, &id, &spec).await
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

    /// Tells what happened to a migration, from its journals: also after a restart. One story for each side that this node was.
    pub async fn explain(&self, id: &MigrationId) -> Result<Vec<Explanation>, Failure> {
        let (dir, id, status) = (self.shared.config.state_dir.clone(), id.clone(), self.get(id));
        let told = tokio::task::spawn_blocking(move || explain::explain(&dir, &id, status));
        let failed =
            |_| Err(Failure::new("task", Blame::Local, "reading the journal failed", "please report this"));
        told.await.unwrap_or_else(failed)
    }

    /// An operator decides where the agents may not. Returns what the decision does; with `act` it has been taken.
    pub async fn resolve(
        &self,
        id: &MigrationId,
        decision: Resolution,
        act: bool,
    ) -> Result<String, Failure> {
        let held = self.shared.registry().migrations.get(id).map(|entry| entry.held.clone());
        let Some(held) = held else {
            let text = format!("there is no migration {id} here");
            return Err(Failure::new(
                "unknown_migration",
                Blame::Operator,
                text,
                "see dwcpctl list and explain",
            ));
        };
        let (reply, answer) = oneshot::channel();
        let order = Order { decision, act, reply };
        let over = || {
            let text = format!("migration {id} is over; there is nothing to resolve");
            Failure::new("not_in_doubt", Blame::Operator, text, "see dwcpctl explain")
        };
        held.order(order).await.map_err(|_| over())?;
        answer.await.map_err(|_| over())?
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

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks into the registry if new work may begin.
    fn admits<T>(&self, look: impl FnOnce(&Registry) -> T) -> Result<T, Failure> {
        let registry = self.registry();
        if registry.closing.is_some() {
            return Err(Failure::new(
                "stopping",
                Blame::Local,
                "the agent is stopping",
                "try again when it is back",
            ));
        }
        let running = registry.migrations.values().filter(|e| !e.report.status().phase.is_end()).count();
        if running >= self.config.limits.migrations {
            let text = format!("{running} migrations run here, and no more are allowed");
            return Err(Failure::new("too_many", Blame::Local, text, "wait, or raise [limits] migrations"));
        }
        Ok(look(&registry))
    }

    fn offer(&self, v3: bool, gate: &Gate) -> Offer {
        Offer {
            minor_min: MINOR,
            minor_max: MINOR,
            v1: match self.config.policy.v1 {
                V1Policy::Never => 0,
                V1Policy::Datacenter => 1,
                V1Policy::Any => 2,
            },
            v1_plain: self.config.policy.v1_plain,
            v3,
            v3_reason: gate.reason.clone(),
            v3_plain: self.config.policy.datacenter_plain,
            codecs: [Codec::Raw, Codec::Lz4, Codec::Zstd].iter().map(|c| 1 << *c as u32).sum(),
            hde: u32::from(HDE_VERSION),
            streams: MAX_STREAMS,
            window: self.config.limits.inflight.max(MIN_WINDOW),
            epoch_incarnation: gate.epoch.0,
            epoch_counter: gate.epoch.1,
        }
    }

    /// What this node offers as a source: the flag decides.
    pub(crate) fn offer_as_source(&self) -> Offer {
        let gate = self.config.gate.borrow().clone();
        self.offer(gate.source, &gate)
    }

    /// What this node offers as a destination: v3 unless it vetoes.
    fn offer_as_destination(&self) -> Offer {
        let gate = self.config.gate.borrow().clone();
        self.offer(!gate.veto, &gate)
    }

    /// A migration of an earlier life of this agent.
    pub(crate) fn adopt(
        &self,
        report: Arc<Report>,
        session: Option<(Arc<Session>, mpsc::Sender<Arrival>)>,
        held: Held,
        task: JoinHandle<()>,
    ) {
        let mut registry = self.registry();
        if let Some((session, arrivals)) = session {
            registry.sessions.insert(session.id, (session, arrivals));
        }
        registry.migrations.insert(report.status().id, Entry { report, held, task: Some(task), asked: None });
    }

    /// How long the agent has been stopping.
    pub(crate) fn closing_for(&self) -> Duration {
        self.registry().closing.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The session is over; nobody may join it any more.
    pub(crate) fn forget(&self, session: &SessionId) {
        self.registry().sessions.remove(session);
    }

    /// Brings the number of migrations in doubt up to date.
    pub(crate) fn count_unresolved(&self) {
        let registry = self.registry();
        let unresolved =
            registry.migrations.values().filter(|e| e.report.status().phase == Phase::InDoubt).count();
        self.metrics.unresolved(unresolved);
    }

    async fn newcomer(self: Arc<Self>, connection: dwcp_link::Connection) {
        let addr = connection.peer_addr();
        match receive(connection).await {
            Ok(Newcomer::Greeted(greeted)) => self.hello(*greeted).await,
            Ok(Newcomer::Joining(joining)) => self.join(joining).await,
            Err(failure) => debug!(?addr, %failure, "connection dropped"),
        }
    }

    async fn join(&self, joining: Box<Joining>) {
        let found = joining.session().and_then(|id| self.registry().sessions.get(&id).cloned());
        let Some((session, arrivals)) = found else {
            // An honest source comes like this after a restart here; a replay could not be told from it.
            let text = "there is no such session here";
            let hint = "the destination's agent was restarted, or the migration has ended there";
            return joining
                .refuse(&Failure::new("unknown_session", Blame::PeerIncompatible, text, hint))
                .await;
        };
        match joining.authenticate(&session) {
            Ok(arrival) => {
                // A full queue is a peer that joins faster than any honest one.
                if let Err(mpsc::error::TrySendError::Full(arrival)) = arrivals.try_send(arrival) {
                    let failure =
                        Failure::new("busy", Blame::PeerMisbehaving, "too many connections at once", "");
                    arrival.refuse(&failure).await;
                }
            }
            Err((joining, failure)) => {
                self.metrics.byzantine_attempt("sig_forge");
                joining.refuse(&failure).await;
            }
        }
    }

    async fn hello(self: &Arc<Self>, greeted: Greeted) {
        let waiting = match self.expect(&greeted) {
            Ok(waiting) => waiting,
            Err(failure) => {
                warn!(peer = %greeted.peer.node(), "{failure}");
                return greeted.refuse(&failure).await;
            }
        };
        if let Err((waiting, failure)) = self.greet(greeted, waiting).await {
            if let Some(failure) = failure {
                info!("{failure}");
            }
            let mut registry = self.registry();
            if waiting.guest.is_gone() {
                waiting.end_gone();
            } else if waiting.reins.is_cancelled() || registry.closing.is_some() {
                let failure = Failure::new("cancelled", Blame::Operator, "cancelled on request", "");
                waiting.report.end(Phase::Aborted, Some(failure));
            } else {
                registry.waiting.insert(waiting.spec.vm.clone(), waiting);
            }
        }
    }

    /// The VM that `greeted` is about, if it is awaited from this very node. It is taken out of the waiting ones.
    fn expect(&self, greeted: &Greeted) -> Result<Waiting, Failure> {
        let hello = &greeted.hello;
        let (ours, theirs) = (self.config.key.node(), greeted.peer.node());
        if hello.destination != ours.as_str() || hello.source != theirs.as_str() {
            let text = format!("this is {ours}, and the connection is {theirs}'s; the hello says otherwise");
            return Err(Failure::new("wrong_node", Blame::PeerMisbehaving, text, "check --to"));
        }
        let vm = VmName::new(hello.vm.clone());
        let mut registry = self.registry();
        let waiting = vm.ok().and_then(|vm| registry.waiting.remove(&vm));
        match waiting {
            Some(waiting) if waiting.spec.from == *theirs => Ok(waiting),
            other => {
                if let Some(waiting) = other {
                    registry.waiting.insert(waiting.spec.vm.clone(), waiting);
                }
                let text = format!("node {ours} does not wait for this VM from {theirs}");
                let hint = "first say `dwcpctl incoming VM --qmp PATH --from NODE` at the destination";
                Err(Failure::new("not_awaited", Blame::Operator, text, hint))
            }
        }
    }

    /// Answers a hello; the VM goes back to the waiting ones unless a session came of it.
    async fn greet(
        self: &Arc<Self>,
        greeted: Greeted,
        waiting: Waiting,
    ) -> Result<(), (Waiting, Option<Failure>)> {
        let looked = async {
            let qemu = waiting.guest.reach().await.map_err(qmp_failure)?;
            let findings = preflight::destination(&qemu).await.map_err(qmp_failure)?;
            if let Some(failure) = source::failures(findings).into_iter().next() {
                return Err(failure);
            }
            let description = qemu.describe().await.map_err(qmp_failure)?;
            description
                .to_json()
                .map_err(|e| Failure::new("description", Blame::Local, e.to_string(), "please report this"))
        };
        let description = match looked.await {
            Ok(description) => description,
            Err(failure) => {
                greeted.refuse(&failure).await;
                return Err((waiting, Some(failure)));
            }
        };
        let id = match MigrationId::new(greeted.hello.migration.clone()) {
            Ok(id) => id,
            Err(error) => {
                let failure = Failure::new("bad_name", Blame::PeerMisbehaving, error.to_string(), "");
                greeted.refuse(&failure).await;
                return Err((waiting, Some(failure)));
            }
        };
        let journaled = journal::path(&self.config.state_dir, &id, Side::Destination).exists();
        if journaled || self.registry().migrations.contains_key(&id) {
            let text = format!("the destination knows a migration {id} already");
            let failure = Failure::new("id_used", Blame::Operator, text, "choose another --id");
            greeted.refuse(&failure).await;
            return Err((waiting, Some(failure)));
        }
        let (arrivals_tx, arrivals) = mpsc::channel(destination::ARRIVALS);
        let register = |session: &Session| {
            self.registry().sessions.insert(session.id, (Arc::new(session.clone()), arrivals_tx.clone()));
        };
        let key = self.config.key.clone();
        let agreed = greeted.welcome(key, self.offer_as_destination(), description, register).await;
        let (session, reader, writer) = match agreed {
            Ok(Some(agreed)) => agreed,
            Ok(None) => return Err((waiting, None)),
            Err(failure) => return Err((waiting, Some(failure))),
        };
        let Waiting { id: old, spec, guest, report, reins } = waiting;
        report.set(|s| s.id = id.clone());
        let span = info_span!("migration", id = %id, vm = %spec.vm, role = "destination");
        let agreed = Agreed { id: id.clone(), spec, guest, session, control: (reader, writer), arrivals };
        let mut registry = self.registry();
        let run = destination::run(self.clone(), agreed, report.clone(), reins);
        let task = Some(tokio::spawn(run.instrument(span)));
        if let Some(entry) = registry.migrations.remove(&old) {
            registry.migrations.insert(id, Entry { task, ..entry });
        }
        Ok(())
    }
}

impl Registry {
    /// Refuses a VM that is awaited already; one whose VMM has died meanwhile is awaited no more.
    fn refuse_awaited(&mut self, vm: &VmName) -> Result<(), Failure> {
        let Some(waiting) = self.waiting.get(vm) else { return Ok(()) };
        if waiting.guest.is_gone() {
            self.waiting.remove(vm).into_iter().for_each(Waiting::end_gone);
            return Ok(());
        }
        let text = format!("VM {vm} is awaited here already, as {}", waiting.id);
        Err(Failure::new("already_incoming", Blame::Operator, text, "cancel that one first"))
    }

    /// Keeps the number of ended migrations bounded.
    fn forget_ended(&mut self) {
        let mut ended: Vec<_> = self
            .migrations
            .iter()
            .filter(|(_, entry)| entry.report.status().phase.is_end())
            .map(|(id, entry)| (entry.report.started(), id.clone()))
            .collect();
        if ended.len() > MAX_ENDED {
            ended.sort();
            for (_, id) in &ended[..ended.len() - MAX_ENDED] {
                self.migrations.remove(id);
            }
        }
    }
}

/// Takes connections until the engine is gone.
async fn accept(shared: Weak<Shared>, mut listener: Listener) {
    let places = Arc::new(Semaphore::new(MAX_NEWCOMERS));
    while let Some(connection) = listener.accept().await {
        let Some(shared) = shared.upgrade() else { return };
        let Ok(place) = places.clone().try_acquire_owned() else {
            shared.metrics.byzantine_attempt("conn_flood");
            debug!(addr = ?connection.peer_addr(), "too many connections that have not said what they want");
            continue;
        };
        tokio::spawn(async move {
            shared.newcomer(connection).await;
            drop(place);
        });
    }
}

/// An id that nobody chose: what it is, the VM, and eight random digits.
fn made_id(kind: &str, vm: &VmName) -> Result<MigrationId, Failure> {
    let random = u32::from_be_bytes(nonce()?[..4].try_into().unwrap_or_default());
    let vm: String = vm.as_str().chars().take(40).collect();
    MigrationId::new(format!("{kind}-{vm}-{random:08x}"))
        .map_err(|error| Failure::new("bad_name", Blame::Operator, error.to_string(), "pass --id"))
}

/// Makes the state folder, and measures a small synced write to it: the first sign of a full or read-only disk.
async fn prepare_state_dir(dir: &Path) -> Result<Duration, Failure> {
    let (dir, shown) = (dir.to_owned(), dir.display().to_string());
    let made = tokio::task::spawn_blocking(move || -> io::Result<Duration> {
        for folder in [dir.clone(), journal::folder(&dir), dir.join("run")] {
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
