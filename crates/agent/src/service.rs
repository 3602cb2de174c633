//! The RPC service: parses a request, asks the engine, and words the answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use dwcp_link::Peers;
use dwcp_migrate::status::Status as MigrationStatus;
use dwcp_migrate::{Blame, Engine, Failure};
use dwcp_proto::{MigrationId, NodeKey};
use dwcp_rpc::v1::migrations_server::Migrations;
use dwcp_rpc::{failure, v1};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::info;

use crate::config::Config;
use crate::convert::{self, Bounds, refusal};
use crate::flags::Flag;
use crate::readiness::Readiness;
use crate::state_dir::Addresses;

/// Time between two statuses of one watcher.
const WATCH_EVERY: Duration = Duration::from_millis(100);

/// Serves `dwcp.agent.v1.Migrations`.
#[derive(Debug)]
pub(crate) struct Service {
    engine: Engine,
    bounds: Bounds,
    readiness: Readiness,
    node: Node,
}

/// What the agent says of itself.
#[derive(Debug)]
struct Node {
    name: String,
    fingerprint: String,
    addresses: Addresses,
    started: Instant,
    flag: Arc<Flag>,
    peers: Arc<Peers>,
}

impl Service {
    /// A service for this engine.
    pub(crate) fn new(
        config: &Config,
        engine: Engine,
        key: &NodeKey,
        peers: Arc<Peers>,
        flag: Arc<Flag>,
        readiness: Readiness,
        addresses: &Addresses,
    ) -> Self {
        let folders = config.vmm.paths.iter().map(|path| path.0.clone()).collect();
        let bounds = Bounds {
            paths: crate::allowed::Allowed::new(folders),
            bandwidth: config.limits.bandwidth.map(|rate| rate.0),
        };
        let node = Node {
            name: config.node.to_string(),
            fingerprint: key.public().fingerprint(),
            addresses: addresses.clone(),
            started: Instant::now(),
            flag,
            peers,
        };
        Service { engine, bounds, readiness, node }
    }

    fn find<T>(&self, id: &str, look: impl FnOnce(&Engine, &MigrationId) -> Option<T>) -> Result<T, Status> {
        let id = convert::parse("id", id).map_err(refusal)?;
        look(&self.engine, &id).ok_or_else(|| unknown(&id))
    }
}

fn unknown(id: &MigrationId) -> Status {
    let message = format!("there is no migration {id} here");
    refusal(Failure::new(failure::UNKNOWN_MIGRATION, Blame::Operator, message, "see dwcpctl list"))
}

#[tonic::async_trait]
impl Migrations for Service {
    async fn prepare_incoming(
        &self,
        request: Request<v1::PrepareIncomingRequest>,
    ) -> Result<Response<v1::Status>, Status> {
        let spec = convert::incoming(request.get_ref(), &self.bounds).map_err(refusal)?;
        info!(vm = %spec.vm, from = %spec.from, "asked to receive");
        let status = self.engine.prepare_incoming(spec).await.map_err(refusal)?;
        Ok(Response::new(convert::status(status)))
    }

    async fn start(&self, request: Request<v1::StartRequest>) -> Result<Response<v1::StartResponse>, Status> {
        let spec = convert::migrate(request.get_ref().spec.as_ref(), &self.bounds).map_err(refusal)?;
        info!(vm = %spec.vm, to = %spec.to, address = %spec.addr, "asked to migrate");
        let id = self.engine.migrate(spec).await.map_err(refusal)?;
        Ok(Response::new(v1::StartResponse { id: id.into() }))
    }

    async fn check(&self, request: Request<v1::CheckRequest>) -> Result<Response<v1::CheckReport>, Status> {
        let spec = convert::migrate(request.get_ref().spec.as_ref(), &self.bounds).map_err(refusal)?;
        Ok(Response::new(convert::check_report(self.engine.check(spec).await)))
    }

    type WatchStream = ReceiverStream<Result<v1::Status, Status>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let watched = self.find(&request.get_ref().id, Engine::watch)?;
        // One status is enough to hold: a slow reader gets the newest next.
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(follow(watched, sender));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::Status>, Status> {
        let status = self.find(&request.get_ref().id, Engine::get)?;
        Ok(Response::new(convert::status(status)))
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Result<Response<v1::ListResponse>, Status> {
        let mut list = self.engine.list();
        list.sort_by(|a, b| (a.phase.is_end(), &a.id).cmp(&(b.phase.is_end(), &b.id)));
        Ok(Response::new(v1::ListResponse { migrations: list.into_iter().map(convert::status).collect() }))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Result<Response<v1::Status>, Status> {
        let id = convert::parse("id", &request.get_ref().id).map_err(refusal)?;
        info!(%id, "asked to cancel");
        let status = self.engine.cancel(&id).await.map_err(refusal)?;
        Ok(Response::new(convert::status(status)))
    }

    async fn estimate(
        &self,
        request: Request<v1::EstimateRequest>,
    ) -> Result<Response<v1::EstimateResponse>, Status> {
        let spec = convert::migrate(request.get_ref().spec.as_ref(), &self.bounds).map_err(refusal)?;
        info!(vm = %spec.vm, to = %spec.to, address = %spec.addr, "asked to estimate");
        let estimate = self.engine.estimate(spec).await.map_err(refusal)?;
        Ok(Response::new(convert::estimate(estimate)))
    }

    async fn switch(
        &self,
        request: Request<v1::SwitchRequest>,
    ) -> Result<Response<v1::SwitchResponse>, Status> {
        let request = request.get_ref();
        let id = convert::parse("id", &request.id).map_err(refusal)?;
        let path = convert::path(request.path).map_err(refusal)?;
        info!(%id, path = path.name(), "asked to change the path");
        let text = self.engine.switch(&id, path).await.map_err(refusal)?;
        Ok(Response::new(v1::SwitchResponse { text }))
    }

    async fn resolve(
        &self,
        request: Request<v1::ResolveRequest>,
    ) -> Result<Response<v1::ResolveResponse>, Status> {
        let request = request.get_ref();
        let id = convert::parse("id", &request.id).map_err(refusal)?;
        let resolution = convert::resolution(request).map_err(refusal)?;
        let act = request.act;
        info!(%id, ?resolution, act, "asked to resolve");
        let text = self.engine.resolve(&id, resolution, act).await.map_err(refusal)?;
        Ok(Response::new(v1::ResolveResponse { acted: act, text }))
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        let id = convert::parse("id", &request.get_ref().id).map_err(refusal)?;
        let story = match (self.engine.explain(&id).await, self.engine.get(&id)) {
            (Ok(story), _) => convert::story(story),
            // It failed, or waits, before there was anything to write down.
            (Err(failure), Some(status)) if failure.code == failure::UNKNOWN_MIGRATION => {
                v1::ExplainResponse { sides: vec![convert::unwritten(status)], ..Default::default() }
            }
            (Err(failure), _) => return Err(refusal(failure)),
        };
        Ok(Response::new(story))
    }

    async fn node(&self, _: Request<v1::NodeRequest>) -> Result<Response<v1::NodeStatus>, Status> {
        let (node, reason) = (&self.node, self.readiness.reason());
        let roster = node.peers.roster();
        let inflight = self.engine.list().iter().filter(|status| !status.phase.is_end()).count();
        Ok(Response::new(v1::NodeStatus {
            node: node.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fingerprint: node.fingerprint.clone(),
            data_address: node.addresses.data.to_string(),
            metrics_address: node.addresses.metrics.to_string(),
            uptime_seconds: node.started.elapsed().as_secs_f64(),
            ready: reason.is_none(),
            not_ready_reason: reason.unwrap_or_default().to_owned(),
            gate: Some(convert::gate(&node.flag.gate().borrow(), node.flag.source().to_owned())),
            peers: roster
                .nodes()
                .flat_map(|node| roster.keys(node))
                .map(|key| v1::Peer { node: key.node().to_string(), fingerprint: key.fingerprint() })
                .collect(),
            migrations_inflight: u32::try_from(inflight).unwrap_or(u32::MAX),
        }))
    }

    async fn flags(&self, _: Request<v1::FlagsRequest>) -> Result<Response<v1::FlagsStatus>, Status> {
        Ok(Response::new(self.node.flag.status()))
    }
}

/// Sends a migration's status at once, whenever it changes, and at its end.
async fn follow(
    mut watched: watch::Receiver<MigrationStatus>,
    sender: mpsc::Sender<Result<v1::Status, Status>>,
) {
    loop {
        let status = watched.borrow_and_update().clone();
        let end = status.phase.is_end();
        if sender.send(Ok(convert::status(status))).await.is_err() || end {
            return;
        }
        let next = async {
            tokio::time::sleep(WATCH_EVERY).await;
            watched.changed().await
        };
        tokio::select! {
            changed = next => if changed.is_err() { return },
            () = sender.closed() => return,
        }
    }
}
