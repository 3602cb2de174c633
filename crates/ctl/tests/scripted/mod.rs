//! An agent that follows a script, and the real `dwcpctl` against it.

#![allow(dead_code, reason = "each test binary uses its part")]

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

/// An agent that says what the test has it say.
pub(crate) struct Agent {
    dir: tempfile::TempDir,
    script: Script,
    server: JoinHandle<()>,
}

impl Agent {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = Script::default();
        let server = script.serve(&dir.path().join("agent.sock"));
        Agent { dir, script, server }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub(crate) fn migrate(&self, args: &[&str]) -> Child {
        let migrate = ["migrate", "web-1", "--qmp", "/run/web-1.qmp", "--to", "hv-02=192.0.2.2:7400"];
        self.run(&[&migrate, args].concat())
    }

    /// Starts the command with these arguments.
    pub(crate) fn run(&self, args: &[&str]) -> Child {
        dwcpctl(&self.socket(), args)
    }

    /// What it knows of the migration, and whether it takes a decision.
    pub(crate) fn knows(&self, sides: Vec<v1::Explanation>, refuses: Option<v1::Failure>) {
        *self.script.0.story.lock().unwrap() = (sides, refuses);
    }

    /// What it says of the flag.
    pub(crate) fn sees(&self, flags: v1::FlagsStatus) {
        *self.script.0.flags.lock().unwrap() = flags;
    }

    /// The decisions that it was asked to explain or to take.
    pub(crate) fn decisions(&self) -> Vec<v1::ResolveRequest> {
        self.script.0.log.borrow().decisions.clone()
    }

    /// The migration's status from now on.
    pub(crate) fn say(&self, status: v1::Status) {
        self.script.0.status.send_replace(Some(status));
    }

    /// Waits until the status was sent to a watcher.
    pub(crate) async fn watched(&self) {
        self.reached(|log| log.sent > 0).await;
    }

    pub(crate) async fn cancelled(&self) {
        self.reached(|log| log.cancels > 0).await;
    }

    async fn reached(&self, what: impl Fn(&Log) -> bool) {
        let mut log = self.script.0.log.subscribe();
        tokio::time::timeout(PATIENCE, log.wait_for(|log| what(log))).await.unwrap().unwrap();
    }

    /// Goes away and comes back, with or without the migration.
    pub(crate) fn restart(&mut self, status: Option<v1::Status>) {
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
    story: Mutex<(Vec<v1::Explanation>, Option<v1::Failure>)>,
    flags: Mutex<v1::FlagsStatus>,
}

/// What was asked of the agent.
#[derive(Default)]
struct Log {
    sent: usize,
    cancels: usize,
    decisions: Vec<v1::ResolveRequest>,
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

    async fn switch(&self, _: Request<v1::SwitchRequest>) -> Result<Response<v1::SwitchResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn resolve(
        &self,
        request: Request<v1::ResolveRequest>,
    ) -> Result<Response<v1::ResolveResponse>, Status> {
        let request = request.into_inner();
        let acted = request.act;
        self.0.log.send_modify(|log| log.decisions.push(request));
        match &self.0.story.lock().unwrap().1 {
            Some(refusal) => Err(failure::to_status(refusal)),
            None => Ok(Response::new(v1::ResolveResponse { acted, text: "runs it at once".to_owned() })),
        }
    }

    async fn explain(&self, _: Request<v1::ExplainRequest>) -> Result<Response<v1::ExplainResponse>, Status> {
        match self.0.story.lock().unwrap().0.clone() {
            sides if sides.is_empty() => Err(Self::refuse(failure::UNKNOWN_MIGRATION)),
            sides => {
                let (peers, sides) = sides.into_iter().partition(|side| !side.told_by.is_empty());
                Ok(Response::new(v1::ExplainResponse { sides, peers, unheard: Vec::new() }))
            }
        }
    }

    async fn node(&self, _: Request<v1::NodeRequest>) -> Result<Response<v1::NodeStatus>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn flags(&self, _: Request<v1::FlagsRequest>) -> Result<Response<v1::FlagsStatus>, Status> {
        Ok(Response::new(self.0.flags.lock().unwrap().clone()))
    }
}

/// A status in this phase, with an error where `code` is not empty.
pub(crate) fn status(phase: Phase, code: &str) -> v1::Status {
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

/// Starts the command against the agent at `socket`.
pub(crate) fn dwcpctl(socket: &Path, args: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_dwcpctl"))
        .arg("--agent")
        .arg(format!("unix:{}", socket.display()))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// Waits for the command's end.
pub(crate) async fn end(ctl: Child) -> Output {
    tokio::time::timeout(PATIENCE, ctl.wait_with_output()).await.unwrap().unwrap()
}

/// Output as text.
pub(crate) fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}
