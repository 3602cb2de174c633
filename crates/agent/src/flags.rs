//! Whether v3 may be used now: follows the flag's source and keeps the engine's [`Gate`] up to date.
//!
//! ```text
//!   file ────────> FileFollower ──┐                       ┌── watch<Gate> ──> engine
//!                                 ├─> Keeper (FlagState) ─┤
//!   http, ofrep ─> ServerFollower ┘     every change,     └── watch<View> ──> dwcpctl flags, metrics
//!    Schedule, Endpoint, Api | Ofrep    every deadline
//! ```
//!
//! What a document means, when a lease ends and whom to poll next is decided in `dwcp-flags`, without I/O; here are the clock,
//! the sockets and the files.

mod api;
mod client;
mod file;
mod keeper;
mod memory;
mod metrics;
mod ofrep;
mod server;
mod show;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use dwcp_flags::{Absence, FEATURE, FlagState, Lease, Reason, Schedule, Source};
use dwcp_migrate::{Blame, Failure, Gate, Metrics};
use dwcp_proto::{NodeKey, PeerKey};
use prometheus_client::registry::Registry;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use crate::config::{Config, FlagSource, Flags, Url, Without};

use api::Api;
use client::Endpoint;
use file::FileFollower;
use keeper::{Clock, Keeper, View};
use memory::Memory;
use metrics::{Ages, FlagMetrics};
use ofrep::Ofrep;
use server::{Protocol, ServerFollower};

/// Bytes of a key file: one line, and room for comments.
const MAX_KEY_FILE: u64 = 4096;

/// The flag as this node sees it.
#[derive(Debug)]
pub(crate) struct Flag {
    node: String,
    source: String,
    followed: Followed,
    metrics: FlagMetrics,
    look: Arc<Notify>,
    engine: Arc<OnceLock<Metrics>>,
}

/// What follows the source, and what it finds.
#[derive(Debug)]
struct Followed {
    gate: watch::Receiver<Gate>,
    view: watch::Receiver<View>,
    /// The clock of `view`; `None` where there is no source, and so nothing that ages.
    clock: Option<Clock>,
    follower: Option<AbortHandle>,
}

/// Starts to follow the source, after a first look at it: a file is read, a server has had time for one answer.
pub(crate) async fn start(config: &Config, key: &Arc<NodeKey>, state_dir: &Path) -> Result<Flag, Failure> {
    let node = config.node.as_str();
    let flag = |followed| Flag {
        node: node.to_owned(),
        source: config.flags.source.to_string(),
        followed,
        metrics: FlagMetrics::new(),
        look: Arc::new(Notify::new()),
        engine: Arc::new(OnceLock::new()),
    };
    let keep = |source| Keeper::new(node, FlagState::new(node, source), config.flags.return_after.0);
    match &config.flags.source {
        FlagSource::None => Ok(flag(Followed::none(config.flags.without))),
        FlagSource::File(path) => {
            let keeper = keep(Source::File);
            let mut flag = flag(Followed::by(&keeper));
            let follower = FileFollower::start(path, keeper, flag.metrics.clone()).await;
            flag.followed.follower = Some(spawn(follower.follow(Arc::clone(&flag.look))));
            Ok(flag)
        }
        FlagSource::Server(urls) => {
            let mut keeper = keep(Source::Server(Lease::default()));
            let flag = flag(Followed::by(&keeper));
            let (server_key, memory) = (server_key(&config.flags)?, Memory::new(state_dir));
            let (key, engine) = (Arc::clone(key), Arc::clone(&flag.engine));
            let api = Api::new(key, config.labels.clone(), server_key, memory, engine, &mut keeper);
            poll(flag, keeper, urls, Protocol::Api(Box::new(api)), &config.flags).await
        }
        FlagSource::Ofrep(urls) => {
            let keeper = keep(Source::Server(Lease::default()));
            let flag = flag(Followed::by(&keeper));
            poll(flag, keeper, urls, Protocol::Ofrep(Ofrep::new(node)), &config.flags).await
        }
    }
}

async fn poll(
    mut flag: Flag,
    keeper: Keeper,
    urls: &[Url],
    protocol: Protocol,
    flags: &Flags,
) -> Result<Flag, Failure> {
    let tls = match urls.iter().any(|url| url.tls) {
        true => Some(client::tls(&flags.ca.0)?),
        false => None,
    };
    let mut follower = ServerFollower {
        schedule: Schedule::new(urls.len(), keeper.clock().now()),
        endpoints: urls.iter().map(|url| Endpoint::new(url.clone(), tls.as_ref())).collect(),
        keeper,
        protocol,
        metrics: flag.metrics.clone(),
        token_file: flags.token_file.as_ref().map(|file| file.0.clone()),
    };
    follower.poll().await;
    flag.followed.follower = Some(spawn(follower.follow(Arc::clone(&flag.look))));
    Ok(flag)
}

fn spawn(follower: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    tokio::spawn(follower).abort_handle()
}

impl Followed {
    /// What `keeper` finds.
    fn by(keeper: &Keeper) -> Self {
        Followed { gate: keeper.gate(), view: keeper.view(), clock: Some(keeper.clock()), follower: None }
    }

    /// The path of a node without a flag. One that is configured for v1 is a v1-only node, as a destination too.
    fn none(without: Without) -> Self {
        let configured = Reason::NoSource(match without {
            Without::V1 => dwcp_flags::Path::V1,
            Without::V3 => dwcp_flags::Path::V3,
        });
        let gate = Gate::fixed(keeper::path(configured), keeper::reason(configured));
        let (gate, view) = (watch::Sender::new(gate).subscribe(), watch::Sender::default().subscribe());
        Followed { gate, view, clock: None, follower: None }
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.follower.iter().for_each(AbortHandle::abort);
    }
}

/// Checks what the source needs besides itself.
pub(crate) fn check(flags: &Flags) -> Result<(), Failure> {
    if let FlagSource::Server(urls) | FlagSource::Ofrep(urls) = &flags.source {
        if urls.iter().any(|url| url.tls) {
            client::tls(&flags.ca.0)?;
        }
        server_key(flags)?;
    }
    Ok(())
}

impl Flag {
    /// The verdict, kept up to date.
    pub(crate) fn gate(&self) -> watch::Receiver<Gate> {
        self.followed.gate.clone()
    }

    /// The source, as it is configured.
    pub(crate) fn source(&self) -> &str {
        &self.source
    }

    /// Looks at the source now.
    pub(crate) fn reload(&self) {
        self.look.notify_one();
    }

    /// Keeps the metric of the node's path up to date, and has reports tell what the engine counts.
    pub(crate) fn report_to(&self, metrics: Metrics) {
        let _ = self.engine.set(metrics.clone());
        let mut gate = self.followed.gate.clone();
        tokio::spawn(async move {
            loop {
                let path = gate.borrow_and_update().source.new;
                metrics.node_path(path);
                if gate.changed().await.is_err() {
                    return;
                }
            }
        });
    }

    /// Puts the flag's own metrics into `registry`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        self.metrics
            .register(registry, Ages { view: self.followed.view.clone(), clock: self.followed.clock });
    }
}

/// What an answer without a document counts as in the metrics.
fn refusal(absence: Absence) -> &'static str {
    match absence {
        Absence::UnknownFlag => "unknown_flag",
        Absence::NoAnswer | Absence::Malformed => "malformed",
    }
}

/// The flag server's key, where one is configured.
fn server_key(flags: &Flags) -> Result<Option<PeerKey>, Failure> {
    use std::io::Read;
    let Some(path) = flags.server_key.as_ref().map(|path| &path.0) else { return Ok(None) };
    let fail = |what: String| {
        let message = format!("[flags] server_key {}: {what}", path.display());
        Failure::new("flag_server_key", Blame::Operator, message, "name the server's NAME.pub")
    };
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_KEY_FILE).read_to_string(&mut text))
        .map_err(|error| fail(error.to_string()))?;
    PeerKey::parse(&text).map(Some).map_err(|error| fail(error.to_string()))
}
