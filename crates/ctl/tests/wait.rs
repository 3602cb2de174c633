//! The real `dwcpctl` against an agent that follows a script: ends that a real migration reaches seldom, or not on demand.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dwcp_rpc::v1::migrations_server::{Migrations, MigrationsServer};
use dwcp_rpc::v1::{self, Phase};
use dwcp_rpc::{failure, v1::Blame};
use tokio::net::UnixListener;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Request, Response, Status};

/// Longer than anything here takes, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn the_exit_status_and_the_last_line_say_how_it_ended() {
    for (phase, code, exit) in [
        (Phase::Completed, "", 0),
        (Phase::Aborted, "cancelled", 1),
        (Phase::Failed, "vmm_died", 1),
        (Phase::Failed, "in_doubt", 4),
    ] {
        let agent = Agent::start();
        agent.say(status(Phase::Precopy, ""));
        let ctl = agent.migrate(&["--json"]);
        agent.watched().await;
        agent.say(status(phase, code));
        let output = end(ctl).await;
        assert_eq!(output.status.code(), Some(exit), "{output:?}");
        let lines: Vec<serde_json::Value> =
            text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let last = lines.last().unwrap();
        assert_eq!(last["phase"], format!("{phase:?}").to_lowercase());
        assert_eq!(text(&output.stderr).contains(&format!("error: {code}: ")), !code.is_empty());
    }
}

#[tokio::test]
async fn without_a_terminal_lines_and_a_summary() {
    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.say(status(Phase::Completed, ""));
    let output = end(ctl).await;
    assert!(text(&output.stderr).contains(" 50 %  v3 internet precopy  200.0 Mbit/s  round 2"), "{output:?}");
    for expected in ["web-1 moved to hv-02", "path          v3 internet", "fallback      because"] {
        assert!(text(&output.stdout).contains(expected), "{expected}: {output:?}");
    }
}

#[tokio::test]
async fn ctrl_c_cancels_and_waits_and_a_second_one_leaves() {
    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    interrupt(&ctl);
    agent.cancelled().await;
    agent.say(status(Phase::Aborted, "cancelled"));
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("web-1 stays here"), "{output:?}");

    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    interrupt(&ctl);
    agent.cancelled().await;
    interrupt(&ctl);
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("dwcpctl status m-1"), "{output:?}");
}

#[tokio::test]
async fn an_agent_that_comes_back_is_waited_for() {
    let mut agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.restart(Some(status(Phase::Completed, "")));
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stderr).contains("the agent went away"), "{output:?}");
}

#[tokio::test]
async fn an_agent_that_forgot_the_migration_leaves_doubt() {
    let mut agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.restart(None);
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(text(&output.stderr).contains("error: forgotten: "), "{output:?}");
}

#[tokio::test]
async fn nobody_there_and_a_refusal_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let output = end(migrate(&dir.path().join("none.sock"), &[])).await;
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).starts_with("error: agent_unreachable: "), "{output:?}");

    let agent = Agent::start();
    let output = end(agent.migrate(&["--memory-file", "/ram", "--json"])).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).starts_with("{\"error\":{\"code\":\"unsupported\""), "{output:?}");
    assert!(text(&output.stderr).contains("\nhint: "), "{output:?}");
}

fn status(phase: Phase, code: &str) -> v1::Status {
    let error = (!code.is_empty()).then(|| v1::Failure {
        code: code.to_owned(),
        message: "as scripted".to_owned(),
        ..Default::default()
    });
    let progress = v1::Progress { fraction: 0.5, wire_rate: 25e6, ..Default::default() };
    v1::Status {
        id: "m-1".to_owned(),
        vm: "web-1".to_owned(),
        role: v1::Role::Source.into(),
        peer: "hv-02".to_owned(),
        phase: phase.into(),
        path: Some("v3".to_owned()),
        mode: Some("internet".to_owned()),
        fallback_reasons: vec!["because".to_owned()],
        rounds: 2,
        progress: Some(progress),
        error,
        ..Default::default()
    }
}

fn migrate(socket: &Path, args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_dwcpctl"))
        .arg("--agent")
        .arg(format!("unix:{}", socket.display()))
        .args(["migrate", "web-1", "--qmp", "/run/web-1.qmp", "--to", "hv-02=192.0.2.2:7400"])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

async fn end(ctl: Child) -> Output {
    tokio::time::timeout(PATIENCE, ctl.wait_with_output()).await.unwrap().unwrap()
}

fn interrupt(ctl: &Child) {
    let pid = ctl.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// An agent that says what the test has it say.
struct Agent {
    dir: tempfile::TempDir,
    script: Script,
    server: JoinHandle<()>,
}

impl Agent {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = Script::default();
        let server = script.serve(&dir.path().join("agent.sock"));
        Agent { dir, script, server }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn migrate(&self, args: &[&str]) -> Child {
        migrate(&self.socket(), args)
    }

    /// The migration's status from now on.
    fn say(&self, status: v1::Status) {
        self.script.0.status.send_replace(Some(status));
    }

    /// Waits until the status was sent to a watcher.
    async fn watched(&self) {
        self.reached(|log| log.sent > 0).await;
    }

    async fn cancelled(&self) {
        self.reached(|log| log.cancels > 0).await;
    }

    async fn reached(&self, what: impl Fn(&Log) -> bool) {
        let mut log = self.script.0.log.subscribe();
        tokio::time::timeout(PATIENCE, log.wait_for(|log| what(log))).await.unwrap().unwrap();
    }

    /// Goes away and comes back, with or without the migration.
    fn restart(&mut self, status: Option<v1::Status>) {
        self.server.abort();
        for follower in self.script.0.followers.lock().unwrap().drain(..) {
            follower.abort();
        }
        std::fs::remove_file(self.socket()).unwrap();
        self.script = Script::default();
        self.script.0.status.send_replace(status);
        self.server = self.script.serve(&self.socket());
    }
}

#[derive(Clone, Default)]
struct Script(Arc<Inner>);

#[derive(Default)]
struct Inner {
    status: watch::Sender<Option<v1::Status>>,
    log: watch::Sender<Log>,
    followers: Mutex<Vec<JoinHandle<()>>>,
}

/// What was asked of the agent.
#[derive(Default)]
struct Log {
    sent: usize,
    cancels: usize,
}

impl Script {
    fn serve(&self, socket: &Path) -> JoinHandle<()> {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let server = tonic::transport::Server::builder().add_service(MigrationsServer::new(self.clone()));
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() })
    }

    fn refuse(code: &str) -> Status {
        failure::to_status(&v1::Failure {
            code: code.to_owned(),
            blame: Blame::Operator.into(),
            message: "as scripted".to_owned(),
            hint: "do otherwise".to_owned(),
        })
    }
}

#[tonic::async_trait]
impl Migrations for Script {
    async fn start(&self, request: Request<v1::StartRequest>) -> Result<Response<v1::StartResponse>, Status> {
        match request.into_inner().spec.unwrap().memory_file.as_str() {
            "" => Ok(Response::new(v1::StartResponse { id: "m-1".to_owned() })),
            _ => Err(Self::refuse(failure::UNSUPPORTED)),
        }
    }

    type WatchStream = ReceiverStream<Result<v1::Status, Status>>;

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut statuses = self.0.status.subscribe();
        if statuses.borrow().is_none() {
            return Err(Self::refuse(failure::UNKNOWN_MIGRATION));
        }
        let (sender, receiver) = mpsc::channel(1);
        let inner = Arc::clone(&self.0);
        let follower = tokio::spawn(async move {
            loop {
                let Some(status) = statuses.borrow_and_update().clone() else { return };
                if sender.send(Ok(status)).await.is_err() {
                    return;
                }
                inner.log.send_modify(|log| log.sent += 1);
                if statuses.changed().await.is_err() {
                    return;
                }
            }
        });
        self.0.followers.lock().unwrap().push(follower);
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn cancel(&self, _: Request<v1::CancelRequest>) -> Result<Response<v1::Status>, Status> {
        self.0.log.send_modify(|log| log.cancels += 1);
        Ok(Response::new(status(Phase::Precopy, "")))
    }

    async fn prepare_incoming(
        &self,
        _: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::Status>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn check(&self, _: Request<v1::CheckRequest>) -> Result<Response<v1::CheckReport>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get(&self, _: Request<v1::GetRequest>) -> Result<Response<v1::Status>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn estimate(
        &self,
        _: Request<v1::EstimateRequest>,
    ) -> Result<Response<v1::EstimateResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve(&self, _: Request<v1::ResolveRequest>) -> Result<Response<v1::Status>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn node(&self, _: Request<v1::NodeRequest>) -> Result<Response<v1::NodeStatus>, Status> {
        Err(Status::unimplemented(""))
    }
}
