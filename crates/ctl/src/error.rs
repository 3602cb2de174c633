//! How `dwcpctl` ends: an exit status, and for a failure one line that says what, and one that says what to do.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

use dwcp_rpc::failure;
use dwcp_rpc::v1::{Blame, Failure};

/// The exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// It failed or was aborted.
    Failed = 1,
    /// The request is wrong; clap uses the same number for a wrong command line.
    BadRequest = 2,
    /// The agent cannot be reached.
    Unreachable = 3,
    /// Who owns the guest is not known here.
    InDoubt = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct CtlError {
    pub(crate) exit: Exit,
    pub(crate) failure: Failure,
}

impl CtlError {
    /// A failure with its exit status.
    pub(crate) fn new(
        exit: Exit,
        blame: Blame,
        code: &str,
        message: impl Display,
        hint: impl Into<String>,
    ) -> Self {
        let (code, message, hint) = (code.to_owned(), message.to_string(), hint.into());
        CtlError { exit, failure: Failure { code, blame: blame.into(), message, hint } }
    }

    /// Something on this machine went wrong.
    pub(crate) fn local(what: impl Display, source: &dyn std::error::Error) -> Self {
        Self::new(Exit::Failed, Blame::Local, "local", format!("{what}: {source}"), "")
    }

    /// The agent cannot be reached at `agent`.
    pub(crate) fn unreachable(agent: &Path, why: impl Display) -> Self {
        let hint = "check that dwcpd runs here and that --agent or DWCP_AGENT names its [listen] rpc";
        let message = format!("no answer from the agent at unix:{}: {why}", agent.display());
        Self::new(Exit::Unreachable, Blame::Local, "agent_unreachable", message, hint)
    }

    /// Says so, on standard error; with `json` on standard output as well, where a script reads.
    pub(crate) fn report(&self, json: bool) -> ExitCode {
        if json {
            crate::json::print(&crate::json::refusal(&self.failure));
        }
        explain(&self.failure);
        self.exit.into()
    }
}

impl From<tonic::Status> for CtlError {
    fn from(status: tonic::Status) -> Self {
        use tonic::Code;
        match failure::from_status(&status) {
            Some(failure) => {
                let exit = match status.code() {
                    Code::InvalidArgument | Code::Unimplemented => Exit::BadRequest,
                    _ => Exit::Failed,
                };
                CtlError { exit, failure }
            }
            None => {
                let exit = match status.code() {
                    Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled => {
                        Exit::Unreachable
                    }
                    Code::InvalidArgument | Code::Unimplemented => Exit::BadRequest,
                    _ => Exit::Failed,
                };
                let message = format!("the call failed: {}", status.message());
                Self::new(exit, Blame::Local, "call_failed", message, "see the agent's log")
            }
        }
    }
}

/// Writes a failure to standard error: `error: CODE: message`, then `hint: ...`.
pub(crate) fn explain(failure: &Failure) {
    eprintln!("error: {}: {}", failure.code, one_line(&failure.message));
    if !failure.hint.is_empty() {
        eprintln!("hint: {}", one_line(&failure.hint));
    }
}

/// Text from afar, fit for a terminal: no control characters.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: &str, blame: Blame) -> Exit {
        let failure = CtlError::new(Exit::Failed, blame, code, "", "").failure;
        CtlError::from(failure::to_status(&failure)).exit
    }

    #[test]
    fn the_exit_status_says_who_has_to_act() {
        assert_eq!(exit(failure::BAD_REQUEST, Blame::Operator), Exit::BadRequest);
        assert_eq!(exit(failure::UNSUPPORTED, Blame::Operator), Exit::BadRequest);
        assert_eq!(exit(failure::UNKNOWN_MIGRATION, Blame::Operator), Exit::Failed);
        assert_eq!(exit("peer_unreachable", Blame::Link), Exit::Failed);
        assert_eq!(CtlError::from(tonic::Status::unavailable("")).exit, Exit::Unreachable);
    }

    #[test]
    fn a_message_from_afar_cannot_steer_the_terminal() {
        assert_eq!(one_line("a\x1b[2Jb\nc"), "a [2Jb c");
    }
}
