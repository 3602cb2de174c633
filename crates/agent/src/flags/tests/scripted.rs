//! A flag server on a wire within the process, and a node that follows one.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use dwcp_flags::poll::{CLUSTER_ID, REPORT, SignedReport};
use dwcp_flags::{FlagState, Lease, Schedule, Source};
use dwcp_migrate::{Gate, Running};
use dwcp_proto::{NodeKey, Path, PeerKey};
use hyper::body::Incoming;
use hyper::header::{ETAG, HeaderMap, IF_NONE_MATCH};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::Instant;

use crate::config::{Labels, Url};
use crate::flags::api::Api;
use crate::flags::client::Endpoint;
use crate::flags::keeper::{Keeper, View};
use crate::flags::memory::Memory;
use crate::flags::metrics::FlagMetrics;
use crate::flags::ofrep::Ofrep;
use crate::flags::server::{Protocol, ServerFollower};

/// What a server does with a request; `None`: it never answers.
type Behaviour = Box<dyn FnMut(&Request<Incoming>) -> Option<Response<String>> + Send>;

/// A server; it accepts from the start, and answers as it is told.
#[derive(Clone)]
pub(super) struct Server(Arc<Inner>);

struct Inner {
    wire: mpsc::UnboundedSender<DuplexStream>,
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<(Instant, HeaderMap)>>,
    connections: Mutex<Vec<AbortHandle>>,
    deaf: Mutex<bool>,
    delay: Mutex<Duration>,
}

impl Server {
    /// One that serves nothing yet: it has no answer to anything.
    pub(super) fn start() -> Self {
        let (wire, mut accepted) = mpsc::unbounded_channel();
        let server = Server(Arc::new(Inner {
            wire,
            behaviour: Mutex::new(Box::new(|_| Some(status(500)))),
            asked: Mutex::default(),
            connections: Mutex::default(),
            deaf: Mutex::new(false),
            delay: Mutex::default(),
        }));
        let inner = Arc::clone(&server.0);
        tokio::spawn(async move {
            while let Some(stream) = accepted.recv().await {
                // A deaf one hangs up.
                if !*inner.deaf.lock().unwrap() {
                    let task = tokio::spawn(serve(Arc::clone(&inner), stream));
                    inner.connections.lock().unwrap().push(task.abort_handle());
                }
            }
        });
        server
    }

    pub(super) fn does(
        &self,
        behaviour: impl FnMut(&Request<Incoming>) -> Option<Response<String>> + Send + 'static,
    ) {
        *self.0.behaviour.lock().unwrap() = Box::new(behaviour);
    }

    /// Serves this document of cluster `c1`, with its text as the etag.
    pub(super) fn serves(&self, document: &str) {
        self.serves_of("c1", document);
    }

    pub(super) fn serves_of(&self, cluster: &'static str, document: &str) {
        let document = document.to_owned();
        self.does(move |request| Some(document_or_304(request, cluster, &document)));
    }

    pub(super) fn hangs(&self) {
        self.does(|_| None);
    }

    /// Takes so long for each answer.
    pub(super) fn delays(&self, delay: Duration) {
        *self.0.delay.lock().unwrap() = delay;
    }

    /// Cuts all connections.
    pub(super) fn cut(&self) {
        self.0.connections.lock().unwrap().drain(..).for_each(|task| task.abort());
    }

    /// Cuts all connections, and every new one at once, until it hears again.
    pub(super) fn deaf(&self, deaf: bool) {
        *self.0.deaf.lock().unwrap() = deaf;
        if deaf {
            self.cut();
        }
    }

    /// When it was asked, and with which headers.
    pub(super) fn asked(&self) -> Vec<(Instant, HeaderMap)> {
        self.0.asked.lock().unwrap().clone()
    }

    /// How many connections there were in all.
    pub(super) fn connections(&self) -> usize {
        self.0.connections.lock().unwrap().len()
    }

    /// The reports that came, as they were signed.
    pub(super) fn reports(&self) -> Vec<SignedReport> {
        let report =
            |headers: &HeaderMap| SignedReport::from_header(headers.get(REPORT).unwrap().as_bytes()).unwrap();
        self.asked().iter().map(|(_, headers)| report(headers)).collect()
    }

    fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint::within(Url::try_from(format!("http://{name}").as_str()).unwrap(), self.0.wire.clone())
    }
}

async fn serve(server: Arc<Inner>, stream: DuplexStream) {
    let service = service_fn(move |request: Request<Incoming>| {
        server.asked.lock().unwrap().push((Instant::now(), request.headers().clone()));
        let answer = (server.behaviour.lock().unwrap())(&request);
        let delay = *server.delay.lock().unwrap();
        async move {
            tokio::time::sleep(delay).await;
            match answer {
                Some(answer) => Ok::<_, Infallible>(answer),
                None => std::future::pending().await,
            }
        }
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// An answer without a body.
pub(super) fn status(code: u16) -> Response<String> {
    Response::builder().status(code).body(String::new()).unwrap()
}

/// The whole answer, or 304 where the asker has it already.
pub(super) fn document_or_304(
    request: &Request<Incoming>,
    cluster: &str,
    document: &str,
) -> Response<String> {
    let etag = format!("W/\"{}\"", document.replace(['"', '\n'], "'"));
    let known = request.headers().get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == etag.as_bytes());
    let answer = Response::builder().header(ETAG, etag).header(CLUSTER_ID, cluster);
    match known {
        true => answer.status(304).body(String::new()).unwrap(),
        false => answer.body(format!(r#"{{"flag":{document},"acked":"1/2"}}"#)).unwrap(),
    }
}

/// A document of the epoch `1.counter`.
pub(super) fn document(percentage: u8, counter: u64, more: &str) -> String {
    format!(
        r#"{{"feature":"dwcp_v3_hde","enabled":true,"percentage":{percentage},"epoch":{{"incarnation":1,"counter":{counter}}}{more}}}"#
    )
}

/// A node that follows servers; it stops when it is dropped.
pub(super) struct Node {
    pub(super) gate: watch::Receiver<Gate>,
    pub(super) view: watch::Receiver<View>,
    pub(super) metrics: FlagMetrics,
    task: JoinHandle<()>,
}

/// How a node is set up.
pub(super) struct Setup {
    pub(super) dir: tempfile::TempDir,
    pub(super) server_key: Option<PeerKey>,
    pub(super) token_file: Option<std::path::PathBuf>,
}

impl Setup {
    pub(super) fn new() -> Self {
        Setup { dir: tempfile::tempdir().unwrap(), server_key: None, token_file: None }
    }

    /// A node that polls the flag API, after its first poll.
    pub(super) async fn start(&self, servers: &[&Server]) -> Node {
        let mut keeper = keeper();
        let api = Api::new(
            Arc::new(key()),
            Labels::default(),
            self.server_key.clone(),
            Memory::new(self.dir.path()),
            Arc::new(OnceLock::new()),
            &mut keeper,
        );
        self.follow(servers, keeper, Protocol::Api(Box::new(api))).await
    }

    /// A node that speaks OFREP.
    pub(super) async fn ofrep(&self, servers: &[&Server]) -> Node {
        self.follow(servers, keeper(), Protocol::Ofrep(Ofrep::new("node-123"))).await
    }

    async fn follow(&self, servers: &[&Server], keeper: Keeper, protocol: Protocol) -> Node {
        let (gate, view, metrics) = (keeper.gate(), keeper.view(), FlagMetrics::new());
        let endpoints: Vec<_> =
            servers.iter().enumerate().map(|(n, server)| server.endpoint(&format!("s{n}"))).collect();
        let mut follower = ServerFollower {
            schedule: Schedule::new(endpoints.len(), keeper.clock().now()),
            keeper,
            endpoints,
            protocol,
            metrics: metrics.clone(),
            token_file: self.token_file.clone(),
        };
        follower.poll().await;
        let task = tokio::spawn(follower.follow(Arc::new(Notify::new())));
        Node { gate, view, metrics, task }
    }
}

/// Its bucket is 51.
pub(super) fn key() -> NodeKey {
    NodeKey::from_seed("node-123".parse().unwrap(), &[7; 32])
}

/// A node's keeper of the flag, which it pulls from servers.
pub(super) fn keeper() -> Keeper {
    let state = FlagState::new("node-123", Source::Server(Lease::default()));
    Keeper::new("node-123", state, Duration::from_secs(60))
}

impl Node {
    pub(super) fn new_path(&self) -> Path {
        self.gate.borrow().source.new
    }

    pub(super) fn running(&self) -> Running {
        self.gate.borrow().source.running
    }

    pub(super) fn code(&self) -> &'static str {
        self.gate.borrow().source.reason.code
    }

    pub(super) fn veto(&self) -> Option<&'static str> {
        self.gate.borrow().veto.as_ref().map(|veto| veto.code)
    }

    /// What went wrong last.
    pub(super) fn error(&self) -> String {
        self.view.borrow().error.as_ref().map(|(what, _)| what.clone()).unwrap_or_default()
    }

    /// The changes of the verdict, each with the seconds since now, for so long.
    pub(super) async fn changes(&mut self, time: Duration) -> Vec<(f64, Path, Running)> {
        let start = Instant::now();
        let mut changes = Vec::new();
        let mut last = (self.new_path(), self.running());
        self.gate.mark_unchanged();
        while let Ok(changed) = tokio::time::timeout_at(start + time, self.gate.changed()).await {
            changed.unwrap();
            self.gate.mark_unchanged();
            let now = (self.new_path(), self.running());
            if now != last {
                changes.push((start.elapsed().as_secs_f64(), now.0, now.1));
                last = now;
            }
        }
        changes
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Lets so many seconds pass.
pub(super) async fn pass(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}
