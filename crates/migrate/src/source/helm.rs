//! When the data path of a running migration turns to another path or mode: `dwcp_proto::path` and `dwcp_proto::mode` with a clock,
//! the flag, the operator, this node's own troubles and what the link is like.

use std::future::pending;
use std::time::{Duration, Instant};

use dwcp_proto::mode::{Link, ModeChange, ModeChoice};
use dwcp_proto::path::{Cause, Change, PathChoice, Permit};
use dwcp_proto::{Leg, Mode, Path};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep, sleep_until};
use tracing::info;

use super::breaker::{Breaker, Finding};
use crate::config::{Gate, Running};
use crate::error::{Blame, Failure};

/// After so long without a word against it a migration goes (back) to v3. The flag has its own, longer, patience.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two looks at this node's memory and processors.
const LOOK: Duration = Duration::from_secs(1);
/// Characters of a reason. The destination refuses a switch for which more bytes of words are made, its frame of words included.
const MAX_WORDS: usize = 200;

/// An operator's wish for a path, and where to answer it.
pub(crate) struct SwitchOrder {
    pub(crate) path: Path,
    pub(crate) reply: oneshot::Sender<Result<String, Failure>>,
}

/// See the module.
pub(crate) struct Helm {
    choice: PathChoice,
    mode: ModeChoice,
    /// The change of mode that should be made.
    wanted: Option<ModeChange>,
    started: Instant,
    gate: watch::Receiver<Gate>,
    orders: mpsc::Receiver<SwitchOrder>,
    /// The guest stands still for the switchover: from then on the way leads forward only.
    stopped: watch::Receiver<bool>,
    breaker: Breaker,
    /// When it looks at this node next. Kept: whoever waits for a turn begins to wait anew with each chunk.
    look_at: Instant,
    said: bool,
}

impl Helm {
    pub(crate) fn new(
        path: Path,
        fixed: Option<Path>,
        mode: ModeChoice,
        mut gate: watch::Receiver<Gate>,
        orders: mpsc::Receiver<SwitchOrder>,
        stopped: watch::Receiver<bool>,
        breaker: Breaker,
    ) -> Self {
        let permit = permit(&gate.borrow_and_update());
        let choice = PathChoice::new(path, fixed, permit, PATIENCE, Duration::ZERO);
        let started = Instant::now();
        Helm {
            choice,
            mode,
            wanted: None,
            started,
            gate,
            orders,
            stopped,
            breaker,
            look_at: started,
            said: false,
        }
    }

    /// Waits until the path or the mode should change. Cancel safe.
    pub(crate) async fn turn(&mut self) -> Change {
        loop {
            let now = self.started.elapsed();
            let stopped = *self.stopped.borrow_and_update();
            if let Some(change) = self.choice.poll(now).or_else(|| self.wanted()) {
                if !stopped {
                    return change;
                }
                if !std::mem::replace(&mut self.said, true) {
                    info!(to = change.to.name(), mode = self.mode().name(), cause = %change.cause, reason = %change.reason,
                        "the switchover has begun: it is finished on the present path");
                }
            }
            let wait = self.choice.next_poll(now).filter(|wait| !wait.is_zero());
            let watches = self.breaker.watches();
            tokio::select! {
                Ok(()) = self.gate.changed() => {
                    let permit = permit(&self.gate.borrow_and_update());
                    self.choice.permit(permit, self.started.elapsed());
                }
                Ok(()) = self.stopped.changed() => {}
                Some(order) = self.orders.recv() => self.obey(order, stopped),
                () = async { match wait { Some(wait) => sleep(wait).await, None => pending().await } } => {}
                () = sleep_until(self.look_at.into()), if watches => self.look(),
            }
        }
    }

    /// Whether nothing more may be sent on v3 before the path changes; a switchover that has begun is finished.
    pub(crate) fn holds(&self) -> bool {
        self.choice.leaving() && !*self.stopped.borrow()
    }

    /// What the destination says of v3.
    pub(crate) fn veto(&mut self, reason: &str) {
        let veto = (!reason.is_empty()).then(|| words(reason));
        self.choice.veto(veto, self.started.elapsed());
    }

    /// The encoder has failed: this migration has no more use for it.
    pub(crate) fn encoder_failed(&mut self, why: String) {
        self.choice.trouble(Some((Cause::Encoder, words(&why))), self.started.elapsed());
    }

    /// What the link is like now; whether its queues should be kept short until more is known.
    pub(crate) fn measured(&mut self, link: Link) -> bool {
        self.wanted = self.mode.measured(link, self.started.elapsed());
        self.mode.doubts()
    }

    /// The mode that v3 should be in from the next leg on.
    pub(crate) fn mode(&self) -> Mode {
        self.wanted.as_ref().map_or(self.mode.mode(), |change| change.to)
    }

    /// The data goes on as `leg`.
    pub(crate) fn turned(&mut self, leg: &Leg, cause: Cause) {
        let now = self.started.elapsed();
        if !Cause::OF_MODE.contains(&cause) {
            self.choice.changed(leg.path, now);
        }
        if leg.path == Path::V3 && leg.mode != self.mode.mode() {
            self.mode.changed(leg.mode, now);
        }
        self.wanted = None;
    }

    /// The change of mode that is due, as a change of the leg.
    fn wanted(&self) -> Option<Change> {
        let ModeChange { cause, reason, .. } = self.wanted.clone()?;
        (self.choice.path() == Path::V3).then_some(Change { to: Path::V3, cause, reason })
    }

    fn obey(&mut self, order: SwitchOrder, stopped: bool) {
        let answer = if stopped {
            let text = "the switchover has begun: it is finished on the present path";
            Err(Failure::new("too_late", Blame::Operator, text, "wait for the end"))
        } else if order.path == self.choice.path() {
            self.choice.ask(order.path).ok();
            Ok(format!("the migration is on {} already, and stays there", order.path.name()))
        } else {
            match self.choice.ask(order.path) {
                Ok(()) => Ok(format!("the migration changes to {}", order.path.name())),
                Err(why) => Err(Failure::new("v3_barred", Blame::Operator, why, "see dwcpctl flags")),
            }
        };
        // The operator may have gone away; the order stands.
        let _ = order.reply.send(answer);
    }

    fn look(&mut self) {
        self.look_at = Instant::now() + LOOK;
        let now = self.started.elapsed();
        for (cause, finding) in self.breaker.look() {
            match finding {
                Finding::Tripped(words) => self.choice.trouble(Some((cause, words)), now),
                Finding::Lifted => self.choice.lifted(cause, now),
            }
        }
    }
}

/// A reason as it may be shown, logged and told on: it may come from the peer or from a flag's file.
fn words(reason: &str) -> String {
    reason.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect()
}

fn permit(gate: &Gate) -> Permit {
    let running = gate.source.running;
    Permit {
        stay: running != Running::Leave,
        enter: running == Running::Return,
        allow: gate.source.new == Path::V3,
        reason: words(&gate.source.reason.text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_inject_a_reason_from_outside_is_short_and_on_one_line() {
        let bad = format!("no\n2026-11-22 ERROR forged\u{1b}[2J{}", "\u{10ffff}".repeat(5000));
        let told = words(&bad);
        assert!(!told.chars().any(char::is_control), "{told}");
        // Four bytes a character at most, and the words around it: below what a destination takes.
        assert!(told.len() <= 800 && told.starts_with("no2026"), "{}", told.len());
    }
}
