//! The one owner of what this node knows of the flag: turns it into the engine's [`Gate`], at each change and at each moment
//! at which time alone changes it (a lease ends, a wait is over).

use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{
    Absence, Applied, Comeback, Conditions, Epoch, Evaluation, FEATURE, FlagDocument, FlagState, Lease,
    Moment, OnStale, Reason, Refusal, Scope, bucket,
};
use dwcp_migrate::{FlagReason, Gate, Running, Verdict};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

/// A clock for [`Moment`]s: tokio's, which tests can turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(Instant);

impl Clock {
    pub(super) fn start() -> Self {
        Clock(Instant::now())
    }

    pub(super) fn now(self) -> Moment {
        Moment(self.0.elapsed())
    }

    pub(super) async fn sleep_until(self, moment: Moment) {
        tokio::time::sleep_until(self.0 + moment.0).await;
    }
}

/// What there is to show of the flag, beside the gate.
#[derive(Debug, Clone, Default)]
pub(super) struct View {
    /// The document in force, where there is one.
    pub(super) document: Option<Shown>,
    /// The lease, where the source is a server.
    pub(super) lease: Option<Lease>,
    /// When the source last confirmed what is in force, or was asked for it.
    pub(super) confirmed: Option<Moment>,
    /// The endpoint that did.
    pub(super) endpoint: Option<String>,
    /// The cluster that the node obeys.
    pub(super) cluster: Option<String>,
    /// What went wrong last, and when; it may be over.
    pub(super) error: Option<(String, Moment)>,
    /// When running migrations may return to v3, if nothing changes.
    pub(super) returns: Option<Moment>,
}

/// What there is to show of a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) enabled: bool,
    pub(super) percentage: u8,
    pub(super) on_stale: OnStale,
    pub(super) epoch: Option<Epoch>,
    pub(super) excluded: bool,
    pub(super) canary: bool,
}

/// The owner.
pub(super) struct Keeper {
    node: Arc<str>,
    state: FlagState,
    comeback: Comeback,
    clock: Clock,
    gate: watch::Sender<Gate>,
    /// What time asks for after this moment is not in the gate yet.
    published: Moment,
    view: watch::Sender<View>,
    /// What is wrong with the source at the moment; stands behind the reason.
    wrong: Option<String>,
}

impl Keeper {
    /// Begins with `state`, which no source has touched yet.
    pub(super) fn new(node: &str, state: FlagState, return_after: Duration) -> Self {
        let clock = Clock::start();
        let view = View { lease: state.lease(), ..View::default() };
        let now = clock.now();
        let gate = gate(&state, Running::Leave, now);
        Keeper {
            node: node.into(),
            state,
            comeback: Comeback::new(return_after),
            clock,
            gate: watch::Sender::new(gate),
            published: now,
            view: watch::Sender::new(view),
            wrong: None,
        }
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    pub(super) fn gate(&self) -> watch::Receiver<Gate> {
        self.gate.subscribe()
    }

    pub(super) fn view(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// The document in force.
    pub(super) fn document(&self) -> Option<&FlagDocument> {
        self.state.document()
    }

    /// The reason for the path of new migrations.
    pub(super) fn reason(&self) -> Reason {
        self.state.decide(self.clock.now(), Scope::New, Conditions::default())
    }

    /// Takes in what was on disk.
    pub(super) fn remember(&mut self, document: FlagDocument) {
        self.state.remember(document);
        self.publish();
    }

    /// The source gave a document, asked for at `asked`.
    pub(super) fn apply(&mut self, document: FlagDocument, asked: Moment) -> Result<Applied, Refusal> {
        let applied = self.state.apply(document, asked);
        if applied.is_ok() {
            self.confirmed(asked);
        }
        applied
    }

    /// The source evaluated the flag itself.
    pub(super) fn evaluated(&mut self, evaluation: Evaluation, asked: Moment) {
        self.state.evaluated(evaluation, asked);
        self.confirmed(asked);
    }

    /// The source confirmed what is in force.
    pub(super) fn confirm(&mut self, asked: Moment) {
        self.state.confirm(asked);
        self.confirmed(asked);
    }

    /// The source answered, and what is in force is so no longer.
    pub(super) fn withdraw(&mut self, absence: Absence) {
        self.state.withdraw(absence);
        self.publish();
    }

    /// Something went wrong with the source; what is in force stays so for as long as it may.
    pub(super) fn failed(&mut self, what: String) {
        let now = self.clock.now();
        if self.wrong.as_ref() != Some(&what) {
            warn!(%what, "the flag's source");
        }
        self.view.send_modify(|view| view.error = Some((what.clone(), now)));
        self.wrong = Some(what);
        self.publish();
    }

    /// Says which endpoint of which cluster is obeyed.
    pub(super) fn served_by(&mut self, endpoint: String, cluster: Option<String>) {
        self.view.send_modify(|view| (view.endpoint, view.cluster) = (Some(endpoint), cluster));
    }

    /// Waits for `future`, and meanwhile does what time asks for.
    pub(super) async fn during<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = std::pin::pin!(future);
        loop {
            // Not from now on: a moment at which the future ended too may have passed unpublished.
            let wait = self.comeback.due().filter(|due| *due > self.published);
            let next = [self.state.next_change(self.published), wait].into_iter().flatten().min();
            let clock = self.clock;
            let tick = async {
                match next {
                    Some(next) => clock.sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                result = &mut future => return result,
                () = tick => self.publish(),
            }
        }
    }

    fn confirmed(&mut self, asked: Moment) {
        if self.wrong.take().is_some() {
            info!("the flag's source confirms again");
        }
        self.view.send_modify(|view| view.confirmed = view.confirmed.max(Some(asked)));
        self.publish();
    }

    /// Brings the gate up to now; those who follow it hear of changes only.
    fn publish(&mut self) {
        let now = self.clock.now();
        self.published = now;
        let decide = |scope| path(self.state.decide(now, scope, Conditions::default()));
        let allowed = decide(Scope::New) == dwcp_proto::Path::V3;
        self.comeback.observe(now, allowed, random);
        let running = match decide(Scope::Running) {
            dwcp_proto::Path::V1 => Running::Leave,
            dwcp_proto::Path::V3 if self.comeback.is_due(now) => Running::Return,
            dwcp_proto::Path::V3 => Running::Keep,
        };
        let mut gate = gate(&self.state, running, now);
        if let Some(wrong) = &self.wrong
            && gate.source.new == dwcp_proto::Path::V1
        {
            let text = &mut gate.source.reason.text;
            *text = format!("{text} ({wrong})");
        }
        let shown = self.state.document().map(|document| shown(document, &self.node));
        let (lease, returns) = (self.state.lease(), self.comeback.due());
        self.view.send_modify(|view| (view.document, view.lease, view.returns) = (shown, lease, returns));
        self.gate.send_if_modified(|old| {
            let changed = *old != gate;
            if old.source.new != gate.source.new || old.source.running != gate.source.running {
                let Verdict { new, running, reason } = &gate.source;
                info!(path = new.name(), ?running, veto = gate.veto.is_some(), reason = %reason.text, "the flag");
            }
            *old = gate;
            changed
        });
    }
}

fn gate(state: &FlagState, running: Running, now: Moment) -> Gate {
    let new = state.decide(now, Scope::New, Conditions::default());
    let epoch = state.document().and_then(|document| document.epoch);
    Gate {
        source: Verdict { new: path(new), running, reason: reason(new) },
        veto: state.veto().map(reason),
        epoch: epoch.map_or((0, 0), |epoch| (epoch.incarnation, epoch.counter)),
    }
}

fn shown(document: &FlagDocument, node: &str) -> Shown {
    Shown {
        enabled: document.enabled,
        percentage: document.percentage.value(),
        on_stale: document.on_stale,
        epoch: document.epoch,
        excluded: document.excluded.contains(node),
        canary: document.canaries.contains(node),
    }
}

/// The node's bucket of the flag.
pub(super) fn bucket_of(node: &str) -> u8 {
    bucket(FEATURE, node)
}

/// The path that a decision means, in the engine's words.
pub(super) fn path(reason: Reason) -> dwcp_proto::Path {
    match reason.path() {
        dwcp_flags::Path::V1 => dwcp_proto::Path::V1,
        dwcp_flags::Path::V3 => dwcp_proto::Path::V3,
    }
}

/// A decision in the engine's words.
pub(super) fn reason(reason: Reason) -> FlagReason {
    FlagReason { code: reason.code(), text: reason.to_string() }
}

/// Any number. Where the system has none to give, the middle one: nothing depends on its being secret.
pub(super) fn random() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX / 2)
}
