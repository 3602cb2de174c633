//! What can go wrong between us and a VMM's QMP socket.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::client::MAX_LINE;
use crate::socket::SocketError;

/// An error of the QMP connection or of a command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QmpError {
    /// The socket could not be connected to.
    #[error("no QMP; is QEMU started with -qmp unix:{},server=on,wait=off?", .path.display())]
    Connect {
        /// The QMP path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: SocketError,
    },
    /// Something accepted, but said nothing.
    #[error("{} gives no QMP greeting within {after:?}; QMP serves one client a socket: is another one connected?", .path.display())]
    NoGreeting {
        /// The QMP path.
        path: PathBuf,
        /// How long it was waited for.
        after: Duration,
    },
    /// The first line was something else than a greeting.
    #[error("{} does not speak QMP; it began with {line:?}", .path.display())]
    NotQmp {
        /// The QMP path.
        path: PathBuf,
        /// The start of what it said.
        line: String,
    },
    /// The connection ended, before the answer or before the command.
    #[error("{command}: the QMP connection {} ended", .path.display())]
    Closed {
        /// The command that was not answered.
        command: String,
        /// The QMP path.
        path: PathBuf,
        /// Why it ended.
        #[source]
        source: Ended,
    },
    /// No answer in time. The command may still take effect.
    #[error("{command}: no answer within {after:?}; does the VMM hang?")]
    Timeout {
        /// The command.
        command: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The VMM that was meant has ended; somebody else may have its socket now.
    #[error("the VMM at {} has ended", .path.display())]
    Gone {
        /// The QMP path.
        path: PathBuf,
    },
    /// The VMM refused the command.
    #[error("{command}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// QMP's error class, such as `GenericError` or `CommandNotFound`.
        class: String,
        /// The VMM's words.
        desc: String,
    },
    /// The VMM's answer has not the form that it should have.
    #[error("{command}: unexpected answer, {what}")]
    Unexpected {
        /// The command.
        command: String,
        /// What is missing or wrong.
        what: String,
    },
}

impl QmpError {
    /// Whether the VMM itself said no, while the connection is fine.
    pub fn is_refusal(&self) -> bool {
        matches!(self, QmpError::Refused { .. })
    }
}

/// Why a QMP connection ended.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Ended {
    /// The VMM closed it: it quit, or died.
    #[error("the VMM closed it")]
    ByVmm,
    /// Reading or writing failed.
    #[error("the socket failed")]
    Io(#[source] Arc<io::Error>),
    /// A line that is not JSON of the form that QMP has.
    #[error("the VMM sent garbage: {0:?}")]
    Garbage(String),
    /// A line beyond the limit.
    #[error("the VMM sent a line of more than {MAX_LINE} bytes")]
    LineTooLong,
    /// Our side let go of it.
    #[error("it was closed here")]
    Here,
}

/// Why an event stream gives no more events.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum EventsError {
    /// The connection ended.
    #[error("no more events: the QMP connection ended")]
    Closed(#[source] Ended),
    /// This reader was so slow that an event would have been lost. The ones before it were delivered.
    #[error("events came faster than they were read; some are lost")]
    Overrun,
}
