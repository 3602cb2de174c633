//! QMP events.

use std::time::Duration;

use serde_json::{Map, Value};

use super::types::MigrationStatus;

/// An event, as QEMU reported it.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What belongs to it, null if nothing does.
    pub data: Value,
    /// When it happened, on the VMM's wall clock since 1970, in microseconds' steps; `None` when QEMU could not tell.
    pub at: Option<Duration>,
}

/// The events that a migration depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// The guest stopped.
    Stop,
    /// The guest runs again, or for the first time.
    Resume,
    /// The migration's status changed (capability `events`).
    Migration(MigrationStatus),
    /// A round over RAM begins, counted from 1 (capability `events`).
    MigrationPass(u64),
    /// The VMM goes away or the guest powered down.
    Shutdown,
    /// The guest was reset.
    Reset,
    /// Any other.
    Other,
}

impl Event {
    /// What it means for a migration.
    pub fn kind(&self) -> EventKind {
        match self.name.as_str() {
            "STOP" => EventKind::Stop,
            "RESUME" => EventKind::Resume,
            "MIGRATION" => EventKind::Migration(self.data["status"].as_str().unwrap_or_default().into()),
            "MIGRATION_PASS" => EventKind::MigrationPass(self.data["pass"].as_u64().unwrap_or_default()),
            "SHUTDOWN" => EventKind::Shutdown,
            "RESET" => EventKind::Reset,
            _ => EventKind::Other,
        }
    }

    /// From the parts of a message; `None` where it has not the form of an event.
    pub(super) fn parse(name: Value, mut message: Map<String, Value>) -> Option<Self> {
        let Value::String(name) = name else { return None };
        let timestamp = message.remove("timestamp").unwrap_or_default();
        // QEMU writes -1 for both when its clock fails.
        let part = |part: &str| timestamp[part].as_u64();
        let at = part("seconds").zip(part("microseconds")).and_then(|(seconds, micros)| {
            Duration::from_secs(seconds).checked_add(Duration::from_micros(micros))
        });
        Some(Event { name, data: message.remove("data").unwrap_or_default(), at })
    }
}
