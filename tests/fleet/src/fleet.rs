//! All nodes together.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustls::ClientConfig;
use serde_json::json;
use tokio::sync::watch;

use crate::node::{Node, Shown, World, key};

/// Nodes of a batch of enrolments: its body stays far below the server's limit.
const BATCH: usize = 1000;
/// How fast a fleet is started: not what is measured.
const STARTS_PER_SECOND: usize = 1000;
/// How often the drill looks at the nodes. They note the moments themselves.
const LOOK: Duration = Duration::from_millis(20);

/// The nodes.
#[derive(Debug)]
pub(crate) struct Fleet {
    origin: Instant,
    nodes: Vec<watch::Receiver<Shown>>,
    partitioned: watch::Sender<bool>,
    /// Nodes from this one on can be partitioned.
    first_partitioned: usize,
    address: watch::Sender<SocketAddr>,
}

impl Fleet {
    /// Starts `count` nodes, of which the last twentieth can be partitioned.
    pub(crate) fn start(count: usize, server: SocketAddr, tls: Arc<ClientConfig>) -> Result<Self> {
        let (address, server) = watch::channel(server);
        let world = Arc::new(World { origin: Instant::now(), tls, server });
        let (partitioned, cut) = watch::channel(false);
        let (_, whole) = watch::channel(false);
        let first_partitioned = count - count.div_ceil(20);
        let mut nodes = Vec::with_capacity(count);
        for index in 0..count {
            let wait = Duration::from_secs_f64(index as f64 / STARTS_PER_SECOND as f64);
            let cut = if index < first_partitioned { &whole } else { &cut };
            let (node, shown) = Node::new(Arc::clone(&world), index, wait, cut.clone())?;
            tokio::spawn(node.live());
            nodes.push(shown);
        }
        Ok(Fleet { origin: world.origin, nodes, partitioned, first_partitioned, address })
    }

    /// The bodies that enrol `count` nodes.
    pub(crate) fn enrolments(count: usize) -> Result<Vec<String>> {
        let node = |index: usize| -> Result<serde_json::Value> {
            let public = key(index)?.public();
            let digits: String = public.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
            Ok(json!({"name": public.node(), "public_key": digits}))
        };
        let nodes = (0..count).map(node).collect::<Result<Vec<_>>>()?;
        Ok(nodes.chunks(BATCH).map(|nodes| json!({"nodes": nodes}).to_string()).collect())
    }

    /// The time on the nodes' clock.
    pub(crate) fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    /// The server is elsewhere from now on.
    pub(crate) fn moved(&self, server: SocketAddr) {
        self.address.send_replace(server);
    }

    /// Cuts a twentieth of the nodes off, or heals the cut.
    pub(crate) fn partition(&self, cut: bool) {
        self.partitioned.send_replace(cut);
    }

    /// What the nodes show: those that are always reachable, then the others.
    pub(crate) fn shown(&self) -> (Vec<Shown>, Vec<Shown>) {
        let mut reachable: Vec<Shown> = self.nodes.iter().map(|node| *node.borrow()).collect();
        let others = reachable.split_off(self.first_partitioned);
        (reachable, others)
    }

    /// Waits until all nodes show something.
    pub(crate) async fn until(
        &self,
        what: &str,
        limit: Duration,
        holds: impl Fn(&Shown) -> bool,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            let missing = self.nodes.iter().filter(|node| !holds(&node.borrow())).count();
            if missing == 0 {
                return Ok(());
            }
            if started.elapsed() > limit {
                bail!("{missing} of {} nodes: not {what} within {limit:?}", self.nodes.len());
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}
