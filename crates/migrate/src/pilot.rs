//! Drives one side's handover machine: carries out its actions, in order, and feeds their outcomes back.
//!
//! What only the migration itself can do (start the stream, end the task) is left to the caller as [`Step`]s.

use std::sync::Arc;
use std::time::Duration;

use dwcp_proto::fault::Mechanism;
use dwcp_proto::handover::{
    Action, Alarm, Destination, Handled, Input, Message, Outcome, Refused, Resolution, Source, Transfer,
    VmmCommand, VmmState,
};
use dwcp_proto::journal::Entry;
use dwcp_proto::message::{Body, Signed};
use dwcp_proto::{Side, signed};
use dwcp_vmm::qmp::QmpError;
use tracing::{debug, error, info, warn};

use crate::control::Control;
use crate::fault::fault_point;
use crate::guest::Guest;
use crate::handshake::Session;
use crate::journal::Journal;

/// Either side's machine.
#[derive(Debug)]
pub(crate) enum Machine {
    Source(Source),
    Destination(Destination),
}

impl Machine {
    fn handle(&mut self, input: Input) -> Result<Handled, Refused> {
        match self {
            Machine::Source(machine) => machine.handle(input),
            Machine::Destination(machine) => machine.handle(input),
        }
    }

    fn poll_action(&mut self) -> Option<Action> {
        match self {
            Machine::Source(machine) => machine.poll_action(),
            Machine::Destination(machine) => machine.poll_action(),
        }
    }

    fn phase(&self) -> &'static str {
        match self {
            Machine::Source(machine) => machine.phase().name(),
            Machine::Destination(machine) => machine.phase().name(),
        }
    }

    fn settled(&self) -> bool {
        match self {
            Machine::Source(machine) => machine.settled(),
            Machine::Destination(machine) => machine.settled(),
        }
    }
}

/// What the caller has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Source: let the VMM migrate.
    StartMigration,
    /// Destination: let the stream flow.
    AcceptStream,
    /// This side has ended.
    Finished(Outcome),
}

/// See the module.
pub(crate) struct Pilot {
    machine: Machine,
    journal: Journal,
    session: Arc<Session>,
    control: Control,
    guest: Arc<Guest>,
    /// The slowest journal write so far.
    pub(crate) slowest_write: Duration,
    /// Alarms raised so far, by code, for the status.
    pub(crate) alarms: Vec<&'static str>,
    /// What the destination says that it holds.
    pub(crate) receipt: Option<Transfer>,
}

impl Pilot {
    pub(crate) fn new(
        machine: Machine,
        journal: Journal,
        session: Arc<Session>,
        control: Control,
        guest: Arc<Guest>,
    ) -> Self {
        Pilot {
            machine,
            journal,
            session,
            control,
            guest,
            slowest_write: Duration::ZERO,
            alarms: Vec::new(),
            receipt: None,
        }
    }

    /// Whether the peer, too, knows how it ended.
    pub(crate) fn settled(&self) -> bool {
        self.machine.settled()
    }

    /// Where the machine stands, by its stable name.
    pub(crate) fn phase(&self) -> &'static str {
        self.machine.phase()
    }

    /// Writes a line for people into the journal.
    pub(crate) async fn note(&mut self, what: &str, text: impl Into<String>) {
        self.journal.note(what, text).await;
    }

    /// Moves the journal to the archive if nobody will have a question any more.
    pub(crate) async fn retire_if_settled(&mut self) {
        if self.settled() {
            self.journal.retire().await;
        }
    }

    /// Moves the journal to the archive: the peer does not know the session any more.
    pub(crate) async fn retire(&mut self) {
        self.journal.retire().await;
    }

    /// Carries out what the machine asks for from the start.
    pub(crate) async fn begin(&mut self) -> Vec<Step> {
        self.carry_out().await
    }

    /// Takes one input and carries out all that follows from it. An error is the peer's violation.
    pub(crate) async fn feed(&mut self, input: Input) -> Result<Vec<Step>, Refused> {
        match self.machine.handle(input) {
            Ok(Handled::Taken) => {}
            Ok(Handled::Ignored(why)) => debug!(?input, ?why, phase = self.phase(), "ignored"),
            Err(refused @ Refused::Violation { .. }) => return Err(refused),
            Err(refused) => warn!(?input, %refused, "not taken"),
        }
        Ok(self.carry_out().await)
    }

    /// What an operator's decision would do.
    pub(crate) fn explain(&self, decision: Resolution) -> Result<&'static str, Refused> {
        match &self.machine {
            Machine::Source(machine) => machine.explain(decision),
            Machine::Destination(machine) => machine.explain(decision),
        }
    }

    /// Takes an operator's decision.
    pub(crate) async fn resolve(&mut self, decision: Resolution) -> Result<Vec<Step>, Refused> {
        warn!(?decision, phase = self.phase(), "an operator decides");
        self.machine.handle(Input::Resolve(decision))?;
        Ok(self.carry_out().await)
    }

    /// Verifies what the peer says and feeds it.
    pub(crate) async fn hear(&mut self, message: &Signed) -> Result<Vec<Step>, String> {
        let author = match self.session.side {
            Side::Source => Side::Destination,
            Side::Destination => Side::Source,
        };
        let message = signed::open(&self.session.peer, author, &self.session.id, message)
            .map_err(|error| error.to_string())?;
        info!(?message, phase = self.phase(), "peer says");
        if let Message::Receipt(transfer) = message {
            self.receipt = Some(transfer);
        }
        self.feed(Input::Message(message)).await.map_err(|refused| refused.to_string())
    }

    async fn carry_out(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some(action) = self.machine.poll_action() {
            let outcome = match action {
                Action::Journal(entry) => Some(self.write(entry).await),
                Action::Send(message) => {
                    fault_point!("before", "send", &message);
                    let session = &self.session;
                    let signed = signed::sign(&session.key, session.side, &session.id, &message);
                    self.control.say(Body::Signed(signed)).await;
                    fault_point!("after", "send", &message);
                    None
                }
                Action::Vmm(VmmCommand::StartMigration) => {
                    fault_point!("before", "vmm", &VmmCommand::StartMigration);
                    steps.push(Step::StartMigration);
                    None
                }
                Action::Vmm(VmmCommand::AcceptStream) => {
                    fault_point!("before", "vmm", &VmmCommand::AcceptStream);
                    steps.push(Step::AcceptStream);
                    None
                }
                Action::Vmm(command) => {
                    fault_point!("before", "vmm", &command);
                    let outcome = self.command(command).await;
                    fault_point!("after", "vmm", &command);
                    outcome
                }
                Action::Alarm(alarm) => {
                    self.alarm(alarm);
                    None
                }
                Action::Finish(outcome) => {
                    steps.push(Step::Finished(outcome));
                    None
                }
            };
            if let Some(input) = outcome
                && let Err(refused) = self.machine.handle(input)
            {
                warn!(?input, %refused, "not taken");
            }
        }
        steps
    }

    async fn write(&mut self, entry: Entry) -> Input {
        fault_point!("before", "journal", &entry);
        let outcome = self.journal.append(entry.clone()).await;
        fault_point!("after", "journal", &entry);
        match outcome {
            Ok(took) => {
                self.slowest_write = self.slowest_write.max(took);
                Input::Journaled
            }
            Err(error) => {
                error!(%error, "journal not written");
                if Mechanism::JournalFailure.is_off() {
                    return Input::Journaled;
                }
                Input::JournalFailed
            }
        }
    }

    async fn command(&mut self, command: VmmCommand) -> Option<Input> {
        let guest = &self.guest;
        let at_source = self.session.side == Side::Source;
        info!(?command, "VMM");
        let outcome: Result<Option<VmmState>, QmpError> = match command {
            VmmCommand::StartMigration | VmmCommand::AcceptStream => return None,
            VmmCommand::CancelMigration => guest.cancel().await,
            VmmCommand::StopWhileIncoming => match guest.reach().await {
                Ok(qemu) => match qemu.stop().await {
                    Ok(()) => Ok(guest.at_destination().await),
                    Err(error) => Err(error),
                },
                Err(error) => Err(error),
            },
            VmmCommand::Cont => guest.cont(at_source).await,
            VmmCommand::AnnounceSelf => {
                let announced = match guest.reach().await {
                    Ok(qemu) => qemu.announce_self().await,
                    Err(error) => Err(error),
                };
                if let Err(error) = announced {
                    warn!(%error, "the guest's addresses were not announced; the network learns them from its traffic");
                }
                return None;
            }
            VmmCommand::Query => match at_source {
                true => Ok(guest.at_source().await),
                false => Ok(guest.at_destination().await),
            },
            VmmCommand::Quit => guest.quit().await,
        };
        match outcome {
            Ok(Some(state)) => Some(Input::Vmm(state)),
            // No answer: the machine waits, and a retry asks again.
            Ok(None) => {
                warn!(?command, "the VMM does not answer");
                None
            }
            Err(error) if error.is_refusal() => {
                error!(?command, %error, "the VMM refuses");
                Some(Input::VmmRefused)
            }
            Err(error) => {
                warn!(?command, %error, "the VMM does not answer");
                None
            }
        }
    }

    fn alarm(&mut self, alarm: Alarm) {
        error!(code = alarm.code(), "alarm: an operator is needed");
        if !self.alarms.contains(&alarm.code()) {
            self.alarms.push(alarm.code());
        }
    }
}
