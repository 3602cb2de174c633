//! What all migrations of a node share: its configuration, its pool, its figures, and the registry of what runs.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dwcp_hde::HDE_VERSION;
use dwcp_link::{DialOptions, Identity};
use dwcp_proto::message::{MINOR, Offer};
use dwcp_proto::negotiate::{MAX_STREAMS, MIN_WINDOW};
use dwcp_proto::{Codec, MigrationId, NodeName, Path, SessionId, VmName};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::config::{EngineConfig, Gate, Transport, V1Policy};
use crate::error::{Blame, Failure};
use crate::guest::Guest;
use crate::handshake::{Arrival, Dialler, Session};
use crate::metrics::Metrics;
use crate::pool::Pool;
use crate::probe::MAX_PROBES;
use crate::reins::{Held, Reins, reins};
use crate::report::Report;
use crate::spec::{IncomingSpec, MigrateSpec};
use crate::status::Phase;
use crate::throttle::NodeBandwidth;

/// Ended migrations that `list` and `get` still know; the oldest are forgotten first.
const MAX_ENDED: usize = 256;
/// Characters of the flag's reason that an offer carries.
const MAX_REASON: usize = 120;

/// What all migrations share.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) identity: Identity,
    pub(crate) pool: Pool,
    /// What may leave this node.
    pub(crate) bandwidth: Arc<NodeBandwidth>,
    pub(crate) metrics: Metrics,
    /// How long a small synced write to the state folder takes.
    pub(crate) write_time: Duration,
    pub(crate) data_addr: SocketAddr,
    /// Whether QUIC connections are taken there.
    takes_quic: bool,
    /// Places for nodes that probe the link.
    pub(crate) probes: Semaphore,
    registry: Mutex<Registry>,
}

#[derive(Default)]
pub(crate) struct Registry {
    pub(crate) migrations: HashMap<MigrationId, Entry>,
    /// VMs that wait for their source, by name.
    pub(crate) waiting: HashMap<VmName, Waiting>,
    pub(crate) sessions: HashMap<SessionId, (Arc<Session>, mpsc::Sender<Arrival>)>,
    /// Since when the agent is stopping.
    pub(crate) closing: Option<Instant>,
}

/// A migration and its task.
pub(crate) struct Entry {
    pub(crate) report: Arc<Report>,
    pub(crate) held: Held,
    pub(crate) task: Option<JoinHandle<()>>,
    /// What was asked for at the source: the same request again is the same migration.
    pub(crate) asked: Option<MigrateSpec>,
}

/// A VMM that waits for its source.
pub(crate) struct Waiting {
    pub(crate) id: MigrationId,
    pub(crate) spec: IncomingSpec,
    pub(crate) guest: Guest,
    pub(crate) report: Arc<Report>,
    pub(crate) reins: Reins,
}

impl Shared {
    /// What the migrations of a node that listens at `data_addr` share.
    pub(crate) fn new(
        config: EngineConfig,
        identity: Identity,
        pool: Pool,
        write_time: Duration,
        data_addr: SocketAddr,
        takes_quic: bool,
    ) -> Self {
        let (metrics, probes) = (Metrics::new(), Semaphore::new(MAX_PROBES));
        let bandwidth = NodeBandwidth::new(config.limits.bandwidth);
        let registry = Mutex::default();
        Shared {
            config,
            identity,
            pool,
            bandwidth,
            metrics,
            write_time,
            data_addr,
            takes_quic,
            probes,
            registry,
        }
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks into the registry if new work may begin.
    pub(crate) fn admits<T>(&self, look: impl FnOnce(&Registry) -> T) -> Result<T, Failure> {
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

    fn offer(&self, v3: bool, reason: &str, epoch: (u64, u64), quic: bool) -> Offer {
        Offer {
            quic,
            minor_min: MINOR,
            minor_max: MINOR,
            v1: match self.config.policy.v1 {
                V1Policy::Never => 0,
                V1Policy::Datacenter => 1,
                V1Policy::Any => 2,
            },
            v1_plain: self.config.policy.v1_plain,
            v3,
            v3_reason: reason.chars().filter(|c| !c.is_control()).take(MAX_REASON).collect(),
            v3_plain: self.config.policy.datacenter_plain,
            codecs: [Codec::Raw, Codec::Lz4, Codec::Zstd].iter().map(|c| 1 << *c as u32).sum(),
            hde: u32::from(HDE_VERSION),
            streams: MAX_STREAMS,
            window: self.config.limits.inflight.max(MIN_WINDOW),
            epoch_incarnation: epoch.0,
            epoch_counter: epoch.1,
            ..Offer::default()
        }
    }

    /// Who connects to the agent of node `to` at `addr`, as this node.
    pub(crate) fn dialler(&self, addr: SocketAddr, to: NodeName) -> Dialler {
        Dialler {
            addr,
            identity: self.identity.clone(),
            key: self.config.key.clone(),
            to,
            options: DialOptions::default(),
            congestion: self.config.congestion,
            quic: Arc::default(),
        }
    }

    /// What this node offers as a source: the flag decides.
    pub(crate) fn offer_as_source(&self) -> Offer {
        let Gate { source, epoch, .. } = self.config.gate.borrow().clone();
        let quic = self.config.transport != Transport::Tcp;
        self.offer(source.new == Path::V3, &source.reason.text, epoch, quic)
    }

    /// What this node offers as a destination: v3 unless it vetoes.
    pub(crate) fn offer_as_destination(&self) -> Offer {
        let Gate { source, veto, epoch } = self.config.gate.borrow().clone();
        self.offer(veto.is_none(), &veto.unwrap_or(source.reason).text, epoch, self.takes_quic)
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

    /// Fresh reins for a further attempt at a migration; a cancel of the one before holds for it, too. `None` where nothing may
    /// begin any more.
    pub(crate) fn rein(&self, id: &MigrationId) -> Option<Reins> {
        let mut registry = self.registry();
        if registry.closing.is_some() {
            return None;
        }
        let entry = registry.migrations.get_mut(id)?;
        let (held, reins) = reins();
        if entry.held.is_cancelled() {
            held.cancel();
        }
        entry.held = held;
        Some(reins)
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
}

impl Registry {
    /// Refuses a VM that is awaited already; one whose VMM has died meanwhile is awaited no more.
    pub(crate) fn refuse_awaited(&mut self, vm: &VmName) -> Result<(), Failure> {
        let Some(waiting) = self.waiting.get(vm) else { return Ok(()) };
        if waiting.guest.is_gone() {
            self.waiting.remove(vm).into_iter().for_each(Waiting::end_gone);
            return Ok(());
        }
        let text = format!("VM {vm} is awaited here already, as {}", waiting.id);
        Err(Failure::new("already_incoming", Blame::Operator, text, "cancel that one first"))
    }

    /// Keeps the number of ended migrations bounded.
    pub(crate) fn forget_ended(&mut self) {
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

impl Waiting {
    /// Its VMM has died.
    pub(crate) fn end_gone(self) {
        let text = "the waiting VMM ended before its guest came";
        let failure =
            Failure::new("vmm_gone_destination", Blame::Vmm, text, "see its log, and start it anew");
        self.report.end(Phase::Aborted, Some(failure));
    }
}
