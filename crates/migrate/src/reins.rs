//! How the engine steers a migration's task: asking it to end, and an operator's decision.

use dwcp_proto::handover::{Refused, Resolution};
use tokio::sync::{mpsc, oneshot, watch};

use crate::error::{Blame, Failure};
use crate::pilot::{Pilot, Step};
use crate::source::SwitchOrder;

/// An operator's decision on its way to the migration's task.
pub(crate) struct Order {
    pub(crate) decision: Resolution,
    /// Otherwise it is only explained.
    pub(crate) act: bool,
    pub(crate) reply: oneshot::Sender<Result<String, Failure>>,
}

/// The engine's end.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    cancel: watch::Sender<bool>,
    orders: mpsc::Sender<Order>,
    switches: mpsc::Sender<SwitchOrder>,
}

/// The task's end.
#[derive(Debug)]
pub(crate) struct Reins {
    cancel: watch::Receiver<bool>,
    orders: mpsc::Receiver<Order>,
    /// An operator's wishes for a path; the data path takes them.
    switches: Option<mpsc::Receiver<SwitchOrder>>,
    told: bool,
}

/// What came along the reins.
pub(crate) enum Pull {
    /// End, with the guest at the source.
    Cancel,
    /// An operator decides.
    Order(Order),
}

/// Both ends. One order at a time: an operator waits for its answer.
pub(crate) fn reins() -> (Held, Reins) {
    let (cancel, cancelled) = watch::channel(false);
    let (orders, received) = mpsc::channel(1);
    let (switches, wishes) = mpsc::channel(1);
    let held = Held { cancel, orders, switches };
    (held, Reins { cancel: cancelled, orders: received, switches: Some(wishes), told: false })
}

impl Held {
    /// Asks the migration to end with the guest at the source.
    pub(crate) fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Whether that was asked for.
    pub(crate) fn is_cancelled(&self) -> bool {
        *self.cancel.borrow()
    }

    /// Passes an operator's wish for a path on; the order comes back if nobody can follow it.
    pub(crate) fn switch(&self, order: SwitchOrder) -> Result<(), SwitchOrder> {
        self.switches.try_send(order).map_err(mpsc::error::TrySendError::into_inner)
    }

    /// Passes an operator's decision on; the order comes back if the task has ended.
    pub(crate) async fn order(&self, order: Order) -> Result<(), Order> {
        self.orders.send(order).await.map_err(|error| error.0)
    }
}

impl Reins {
    /// An operator's wishes for a path, for whoever can follow them; once.
    pub(crate) fn switches(&mut self) -> Option<mpsc::Receiver<SwitchOrder>> {
        self.switches.take()
    }

    /// The next pull; a cancel comes once. Cancel safe. Pending for ever once nobody holds them.
    pub(crate) async fn pull(&mut self) -> Pull {
        let told = self.told;
        let cancel = async {
            // The guard must not live across the caller's awaits.
            if told || self.cancel.wait_for(|c| *c).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = cancel => {
                self.told = true;
                Pull::Cancel
            }
            Some(order) = self.orders.recv() => Pull::Order(order),
            else => std::future::pending().await,
        }
    }

    /// Whether a cancel was asked for.
    pub(crate) fn is_cancelled(&self) -> bool {
        *self.cancel.borrow()
    }

    /// Waits for a cancel.
    pub(crate) async fn cancelled(&mut self) {
        while !matches!(self.pull().await, Pull::Cancel) {}
    }
}

impl Order {
    /// Explains or carries out the decision; the steps that follow from it.
    pub(crate) async fn give(self, pilot: &mut Pilot) -> Vec<Step> {
        let outcome = match pilot.explain(self.decision) {
            Ok(text) if self.act => pilot.resolve(self.decision).await.map(|steps| (text, steps)),
            Ok(text) => Ok((text, Vec::new())),
            Err(refused) => Err(refused),
        };
        let (answer, steps) = match outcome {
            Ok((text, steps)) => (Ok(text.to_owned()), steps),
            Err(refused) => (Err(failure(&refused)), Vec::new()),
        };
        // The operator may have gone away; the decision stands.
        let _ = self.reply.send(answer);
        steps
    }
}

fn failure(refused: &Refused) -> Failure {
    let code = match refused {
        Refused::PeerNotFenced => "peer_not_fenced",
        Refused::NotInDoubt { .. } => "not_in_doubt",
        Refused::Busy => "busy",
        Refused::Violation { .. } | Refused::Unexpected { .. } => "refused",
    };
    Failure::new(code, Blame::Operator, refused.to_string(), "see dwcpctl explain")
}
