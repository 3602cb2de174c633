//! `dwcpctl migrate`: starts a migration, or checks what would speak against it, and waits for the end.

use std::path::Path;
use std::time::Duration;

use dwcp_rpc::failure;
use dwcp_rpc::v1::{self, Blame, Phase};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use crate::args::MigrateArgs;
use crate::client::{Client, QUICK, SLOW, connect, within};
use crate::error::{CtlError, Exit, explain};
use crate::json;
use crate::progress::Display;
use crate::show;

/// How long an agent that went away may take to come back: it is restarted and reads its journal.
const RETURN: Duration = Duration::from_secs(30);
/// How long a migration may be in doubt before the wait ends: a lost commit is sent again after reconnection.
const DOUBT: Duration = Duration::from_secs(60);

/// Runs the command.
pub(crate) async fn run(agent: &Path, args: MigrateArgs) -> Result<Exit, CtlError> {
    let mut client = connect(agent).await?;
    let spec = Some(args.spec());
    if args.check {
        let report = client.check(within(SLOW, v1::CheckRequest { spec })).await?.into_inner();
        show::check(&report, args.json);
        return Ok(if report.ok { Exit::Done } else { Exit::Failed });
    }

    let id = client.start(within(SLOW, v1::StartRequest { spec })).await?.into_inner().id;
    if args.detach {
        match args.json {
            true => json::print(&serde_json::json!({ "id": id })),
            false => println!("{id}"),
        }
        return Ok(Exit::Done);
    }
    let display = Display::new(args.json);
    let (asked_to_cancel, came_back, doubt) = (false, false, None);
    Wait { agent, client, id, display, asked_to_cancel, came_back, doubt }.until_the_end().await
}

/// One wait for a migration's end.
struct Wait<'a> {
    agent: &'a Path,
    client: Client,
    id: String,
    display: Display,
    asked_to_cancel: bool,
    came_back: bool,
    doubt: Option<Instant>,
}

/// What ended one stream of statuses.
enum Pause {
    /// The migration ended.
    End(Box<v1::Status>),
    /// The agent went away.
    Gone,
    /// The operator does not want to wait any longer.
    Left,
    /// The migration has been in doubt for too long.
    InDoubt,
}

impl Wait<'_> {
    async fn until_the_end(&mut self) -> Result<Exit, CtlError> {
        let mut interrupts =
            signal(SignalKind::interrupt()).map_err(|e| CtlError::local("cannot catch Ctrl-C", &e))?;
        loop {
            let request = v1::WatchRequest { id: self.id.clone() };
            let pause = match self.client.watch(request).await {
                Ok(stream) => self.follow(stream.into_inner(), &mut interrupts).await?,
                Err(status) if gone(&status) => Pause::Gone,
                Err(status) if self.came_back => return Err(self.forgotten(status)),
                Err(status) => return Err(status.into()),
            };
            match pause {
                Pause::End(status) => return Ok(self.finish(&status)),
                Pause::Left => return Err(self.left()),
                Pause::InDoubt => return Err(self.in_doubt()),
                Pause::Gone => self.reconnect(&mut interrupts).await?,
            }
        }
    }

    /// Shows statuses until something ends the stream.
    async fn follow(
        &mut self,
        mut stream: Streaming<v1::Status>,
        interrupts: &mut Signal,
    ) -> Result<Pause, CtlError> {
        loop {
            let next = tokio::select! {
                next = stream.message() => next,
                _ = interrupts.recv() => {
                    if self.asked_to_cancel {
                        return Ok(Pause::Left);
                    }
                    self.cancel().await;
                    continue;
                }
                () = until(self.doubt.map(|since| since + DOUBT)) => return Ok(Pause::InDoubt),
            };
            match next {
                Ok(Some(status)) if ended(&status) => return Ok(Pause::End(Box::new(status))),
                Ok(Some(status)) => {
                    self.doubt =
                        (status.phase() == Phase::InDoubt).then(|| self.doubt.unwrap_or_else(Instant::now));
                    self.display.update(&status);
                }
                Ok(None) => return Ok(Pause::Gone),
                Err(status) if gone(&status) => return Ok(Pause::Gone),
                Err(status) => return Err(status.into()),
            }
        }
    }

    async fn cancel(&mut self) {
        self.asked_to_cancel = true;
        self.display.note("aborting the migration; Ctrl-C again leaves without waiting");
        // In a task of its own: the wait goes on, and a second Ctrl-C is not held up by a slow answer.
        let (mut client, request) = (self.client.clone(), v1::CancelRequest { id: self.id.clone() });
        tokio::spawn(async move {
            if let Err(status) = client.cancel(within(SLOW, request)).await {
                explain(&CtlError::from(status).failure);
            }
        });
    }

    /// Waits for an agent that went away. The migration may well go on: the agent finds it in its journal.
    async fn reconnect(&mut self, interrupts: &mut Signal) -> Result<(), CtlError> {
        self.display.note("the agent went away; waiting for it");
        let deadline = Instant::now() + RETURN;
        loop {
            let pause = tokio::select! {
                () = sleep(Duration::from_millis(500)) => None,
                _ = interrupts.recv() => Some(()),
            };
            if pause.is_some() {
                return Err(self.left());
            }
            match timeout(QUICK, connect(self.agent)).await {
                Ok(Ok(client)) => {
                    self.client = client;
                    self.came_back = true;
                    return Ok(());
                }
                Ok(Err(error)) if Instant::now() >= deadline => return Err(error),
                Err(_) if Instant::now() >= deadline => {
                    return Err(CtlError::unreachable(
                        self.agent,
                        "it accepts connections but does not answer",
                    ));
                }
                _ => {}
            }
        }
    }

    fn finish(&mut self, status: &v1::Status) -> Exit {
        self.display.finish(status);
        if let Some(failure) = &status.error {
            explain(failure);
        }
        match status.phase() {
            Phase::Completed => Exit::Done,
            _ if status.error.as_ref().is_some_and(|e| e.code == "in_doubt") => Exit::InDoubt,
            _ => Exit::Failed,
        }
    }

    fn left(&self) -> CtlError {
        let hint = format!("see how it ends: dwcpctl status {}", self.id);
        CtlError::new(Exit::Failed, Blame::Operator, "left", "left before the migration ended", hint)
    }

    /// The agent came back without the migration: what became of the guest is not known here.
    fn forgotten(&self, status: tonic::Status) -> CtlError {
        let error = CtlError::from(status);
        if error.failure.code != failure::UNKNOWN_MIGRATION {
            return error;
        }
        let message = format!("the agent was restarted and no longer knows migration {}", self.id);
        let hint = format!(
            "ask at both nodes: dwcpctl explain {}; if neither knows, ask both VMMs (query-status) before anything else",
            self.id
        );
        CtlError::new(Exit::InDoubt, Blame::Local, "forgotten", message, hint)
    }

    fn in_doubt(&self) -> CtlError {
        let message = format!("the peer has not said for {} s who owns the guest", DOUBT.as_secs());
        let hint = format!(
            "restore the link to the peer, which ends the doubt by itself; until then start the guest nowhere by hand; \
             if the peer is gone for good: dwcpctl explain {}",
            self.id
        );
        CtlError::new(Exit::InDoubt, Blame::Link, "in_doubt", message, hint)
    }
}

fn ended(status: &v1::Status) -> bool {
    matches!(status.phase(), Phase::Completed | Phase::Aborted | Phase::Failed)
}

/// Whether the call failed because the agent is not there, rather than because it said so.
fn gone(status: &tonic::Status) -> bool {
    CtlError::from(status.clone()).exit == Exit::Unreachable
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
