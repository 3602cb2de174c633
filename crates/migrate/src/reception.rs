//! Who comes to the data listener: a source that says hello, or a connection that joins its session.

use std::sync::{Arc, Weak};

use dwcp_link::Listener;
use dwcp_proto::message::Purpose;
use dwcp_proto::{MigrationId, Side, VmName};
use dwcp_vmm::mapped::{Ram, Unmapped};
use dwcp_vmm::preflight;
use tokio::sync::{Semaphore, mpsc};
use tracing::{Instrument, debug, info, info_span, warn};

use crate::destination::{self, Agreed};
use crate::engine::made_id;
use crate::error::{Blame, Failure};
use crate::explain::Tale;
use crate::guest::{Guest, qmp_failure};
use crate::handshake::{Greeted, Joining, Newcomer, Session, receive};
use crate::reins::reins;
use crate::report::Report;
use crate::shared::{Entry, Shared, Waiting};
use crate::spec::{IncomingSpec, Vmm};
use crate::status::{Phase, Role, Status};
use crate::{explain, hde, inquiry, probe, recovery, retry, source};

/// Connections that have not yet said what they want, or wait for the answer; a plain one has proved nothing until then. Each has
/// [`PATIENCE`](crate::wire::PATIENCE) for a message, and a source that has proved itself [`CHOOSING`](crate::wire::CHOOSING) for its choice.
const MAX_NEWCOMERS: usize = 256;

/// Takes connections until the engine is gone.
pub(crate) async fn accept(shared: Weak<Shared>, mut listener: Listener) {
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

/// Prepares to receive a VM: its VMM is looked at, and left untouched until its source has come.
pub(crate) async fn prepare(shared: &Shared, spec: IncomingSpec) -> Result<Status, Failure> {
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

impl Shared {
    async fn newcomer(self: Arc<Self>, connection: dwcp_link::Connection) {
        let addr = connection.peer_addr();
        match receive(connection).await {
            Ok(Newcomer::Greeted(greeted)) => self.hello(*greeted).await,
            Ok(Newcomer::Joining(joining)) => self.join(joining).await,
            Ok(Newcomer::Asking(asking)) => inquiry::answer(&self, *asking).await,
            Ok(Newcomer::Probing(probing)) => probe::answer(&self, *probing).await,
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
                // v1's bytes carry no signatures of their own: the join is all that keeps others out.
                let bytes = joining.join.purpose == Purpose::Bytes as i32;
                self.metrics.byzantine_attempt(if bytes { "v1_hijack" } else { "sig_forge" });
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
            let ram = match (self.config.outlive, self.config.hde.mapped) {
                (true, _) => Err(hde::words(&Unmapped::Kept)),
                (false, false) => Err("switched off here by [hde] mapped".to_owned()),
                (false, true) => Ram::open(&qemu).await.map_err(|why| hde::words(&why)),
            };
            let offer = hde::offer(
                self.offer_as_destination(),
                &ram,
                &description,
                self.config.limits.memory,
                self.config.hde,
            );
            let json = description.to_json();
            let json = json.map_err(|e| {
                Failure::new("description", Blame::Local, e.to_string(), "please report this")
            })?;
            Ok((json, offer, ram.ok()))
        };
        let (description, offer, ram) = match looked.await {
            Ok(looked) => looked,
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
        let attempt = greeted.hello.attempt.max(1);
        if !self.is_free(&id, attempt) {
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
        let peer_addr = greeted.peer_addr;
        let agreed = greeted.welcome(key, offer, description, register).await;
        let (session, reader, writer) = match agreed {
            Ok(Some(agreed)) => agreed,
            Ok(None) => return Err((waiting, None)),
            Err(failure) => return Err((waiting, Some(failure))),
        };
        let Waiting { id: old, spec, guest, report, reins } = waiting;
        self.give_way(&id);
        report.set(|s| (s.id, s.attempt) = (id.clone(), attempt));
        let again = (self.clone(), spec.clone(), report.clone());
        let span = info_span!("migration", id = %id, vm = %spec.vm, role = "destination");
        let agreed = Agreed {
            id: id.clone(),
            spec,
            guest,
            session,
            peer_addr,
            ram,
            control: (reader, writer),
            arrivals,
        };
        let mut registry = self.registry();
        let run = destination::run(self.clone(), agreed, report.clone(), reins);
        let (shared, again_spec, ended) = again;
        let task = retry::waiting_again(run, shared, Some(again_spec), ended);
        let task = Some(tokio::spawn(task.instrument(span)));
        if let Some(entry) = registry.migrations.remove(&old) {
            registry.migrations.insert(id, Entry { task, ..entry });
        }
        Ok(())
    }

    /// Whether a migration may have this id: nobody had it, or this is a further attempt at one that was taken back here, too.
    fn is_free(&self, id: &MigrationId, attempt: u32) -> bool {
        let known = explain::tales(&self.config.state_dir, id, None);
        let taken_back = |tale: &Tale| {
            tale.explanation.role == Role::Destination && tale.taken_back && tale.attempt < attempt
        };
        let listed = self.registry().migrations.get(id).map(|entry| entry.report.status());
        let over = |status: Status| {
            status.role == Role::Destination && status.phase == Phase::Aborted && status.attempt < attempt
        };
        known.iter().all(taken_back) && listed.is_none_or(over)
    }

    /// Lets the attempts before go, which are over: their source has begun another one.
    fn give_way(&self, id: &MigrationId) {
        let entry = self.registry().migrations.remove(id);
        if let Some(task) = entry.and_then(|entry| entry.task) {
            task.abort();
        }
        recovery::retire(self, id, Side::Destination);
    }
}
