//! The steps of the drill, for one size of the fleet.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result as AnyResult, ensure};
use dwcp_flags::FEATURE;

use crate::fleet::Fleet;
use crate::node::Shown;
use crate::server::{Server, own_usage};

/// From the answered POST to the last node, if it is reachable.
pub(crate) const REACHABLE: Duration = Duration::from_secs(3);
/// The same for a node that is cut off, under `v1-all`.
pub(crate) const PARTITIONED: Duration = Duration::from_secs(4);

/// For a fleet to come to where it should be.
const LIMIT: Duration = Duration::from_secs(60);
/// For how long a fleet that has nothing to do is watched.
const IDLE: Duration = Duration::from_secs(10);
/// As the unit's `RestartSec`.
const RESTART: Duration = Duration::from_millis(100);
/// Long enough for every lease to end.
const OUTAGE: Duration = Duration::from_secs(5);

/// What was measured.
#[derive(Debug, Default)]
pub(crate) struct Result {
    pub(crate) nodes: usize,
    /// Seconds from the answer to POST until each node was on v1.
    pub(crate) rollback: Spread,
    /// Until the server knew of all.
    pub(crate) acked: Spread,
    /// The same with a twentieth of the nodes cut off, for the others.
    pub(crate) beside: Spread,
    /// And for those.
    pub(crate) partitioned: Spread,
    pub(crate) restart: Outage,
    pub(crate) kill: Outage,
    pub(crate) cold: Outage,
    /// CPU seconds a second, with nothing to do but polls.
    pub(crate) server_cpu: f64,
    pub(crate) nodes_cpu: f64,
    pub(crate) polls_per_second: f64,
    pub(crate) failed_polls: u64,
    pub(crate) server_memory: u64,
}

/// Seconds.
#[derive(Debug, Default)]
pub(crate) struct Spread {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
}

/// What a server that was away cost.
#[derive(Debug, Default)]
pub(crate) struct Outage {
    /// Seconds from its end until it listened again.
    pub(crate) away: f64,
    /// Seconds from its end until every node had been confirmed again.
    pub(crate) healed: f64,
    /// The same from when it listened.
    pub(crate) healed_after: f64,
    /// Leases that ended meanwhile.
    pub(crate) lapses: u64,
    /// CPU seconds of the server from its start until all were back.
    pub(crate) cpu: f64,
}

/// Goes through all steps.
pub(crate) async fn drill(control: &Path, nodes: usize, rounds: usize) -> AnyResult<Result> {
    ensure!(nodes > 0 && rounds > 0, "at least one node and one round");
    let mut server = Server::start(control).await?;
    for body in Fleet::enrolments(nodes)? {
        server.ask("POST", "/v1/nodes", &body).await?;
    }
    let fleet = Fleet::start(nodes, server.address, server.tls.clone())?;
    let mut result = Result { nodes, ..Result::default() };
    say(nodes, "the fleet connects");
    on(&mut server, &fleet, "v1-new").await?;

    idle(&server, &fleet, &mut result).await?;
    say(nodes, "rollbacks");
    let (mut rollback, mut acked) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        on(&mut server, &fleet, "v1-new").await?;
        let answered = off(&mut server, &fleet).await?;
        acked.push(converged(&mut server).await?.as_secs_f64());
        fleet.until("on v1", LIMIT, |node| !node.v3).await?;
        let (reachable, others) = fleet.shown();
        rollback.extend(since(reachable.iter().chain(&others), answered));
    }
    (result.rollback, result.acked) = (Spread::of(rollback), Spread::of(acked));

    say(nodes, "rollbacks with a cut");
    let (mut beside, mut partitioned) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        on(&mut server, &fleet, "v1-all").await?;
        fleet.partition(true);
        let answered = off(&mut server, &fleet).await?;
        fleet.until("on v1", LIMIT, |node| !node.v3).await?;
        let (reachable, others) = fleet.shown();
        beside.extend(since(reachable.iter(), answered));
        partitioned.extend(since(others.iter(), answered));
        fleet.partition(false);
    }
    (result.beside, result.partitioned) = (Spread::of(beside), Spread::of(partitioned));

    say(nodes, "restarts");
    on(&mut server, &fleet, "v1-new").await?;
    result.restart = outage(&mut server, &fleet, Fault::Restart).await?;
    settle(&fleet).await?;
    result.kill = outage(&mut server, &fleet, Fault::Kill(RESTART)).await?;
    settle(&fleet).await?;
    result.cold = outage(&mut server, &fleet, Fault::Kill(OUTAGE)).await?;
    settle(&fleet).await?;
    // What was answered is what is served.
    let page = server.ask("GET", &format!("/v1/feature-flags/{FEATURE}"), "").await?;
    ensure!(page["flag"]["percentage"] == 100 && page["flag"]["enabled"] == true, "{page}");
    result.server_memory = result.server_memory.max(server.usage()?.memory);
    server.kill().await?;
    Ok(result)
}

impl Result {
    /// The first bound that was missed.
    pub(crate) fn missed(&self) -> Option<String> {
        let bounds = [
            ("a reachable node", &self.rollback, REACHABLE),
            ("a reachable node beside a cut", &self.beside, REACHABLE),
            ("a node that was cut off", &self.partitioned, PARTITIONED),
        ];
        let late = bounds.into_iter().find(|(_, spread, bound)| spread.max > bound.as_secs_f64());
        let late = late.map(|(who, spread, bound)| format!("{who} took {:.2} s, not {bound:?}", spread.max));
        let lapsed = (self.restart.lapses > 0)
            .then(|| format!("a planned restart cost {} leases", self.restart.lapses));
        late.or(lapsed).map(|missed| format!("{} nodes: {missed}", self.nodes))
    }
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let rank = |part: f64| {
            // The smallest value that so large a part does not exceed.
            let index = (part * values.len() as f64).ceil() as usize;
            values.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        Spread { p50: rank(0.5), p99: rank(0.99), max: rank(1.0) }
    }
}

enum Fault {
    Restart,
    /// Killed, and started again after this long.
    Kill(Duration),
}

/// Turns all nodes to v3.
async fn on(server: &mut Server, fleet: &Fleet, on_stale: &str) -> AnyResult<()> {
    let body =
        format!(r#"{{"feature":"{FEATURE}","percentage":100,"enabled":true,"on_stale":"{on_stale}"}}"#);
    server.ask("POST", "/v1/feature-flags", &body).await?;
    fleet.until("on v3", LIMIT, |node| node.v3 && node.lease).await
}

/// Rolls back, as the plans do; the moment of the answer on the nodes' clock.
async fn off(server: &mut Server, fleet: &Fleet) -> AnyResult<Duration> {
    let body = format!(r#"{{"feature":"{FEATURE}","percentage":0,"enabled":false}}"#);
    server.ask("POST", "/v1/feature-flags", &body).await?;
    Ok(fleet.now())
}

/// How long it takes until the server says that all is done.
async fn converged(server: &mut Server) -> AnyResult<Duration> {
    let started = Instant::now();
    loop {
        let page = server.ask("GET", &format!("/v1/feature-flags/{FEATURE}"), "").await?;
        if page["converged"] == true {
            return Ok(started.elapsed());
        }
        ensure!(started.elapsed() < LIMIT, "not converged: acked {}", page["acked"]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn idle(server: &Server, fleet: &Fleet, result: &mut Result) -> AnyResult<()> {
    settle(fleet).await?;
    let polls = |fleet: &Fleet| {
        let (reachable, others) = fleet.shown();
        let all = reachable.iter().chain(&others);
        all.fold((0, 0), |sum, node| (sum.0 + node.polls, sum.1 + node.failures))
    };
    let (server_before, nodes_before, before) = (server.usage()?, own_usage()?, polls(fleet));
    let started = Instant::now();
    tokio::time::sleep(IDLE).await;
    let seconds = started.elapsed().as_secs_f64();
    let (server_after, nodes_after, after) = (server.usage()?, own_usage()?, polls(fleet));
    result.server_cpu = (server_after.cpu.saturating_sub(server_before.cpu)).as_secs_f64() / seconds;
    result.nodes_cpu = (nodes_after.cpu.saturating_sub(nodes_before.cpu)).as_secs_f64() / seconds;
    result.polls_per_second = (after.0 - before.0) as f64 / seconds;
    result.failed_polls = after.1 - before.1;
    result.server_memory = server_after.memory;
    Ok(())
}

/// Waits until the fleet is as if nothing had happened.
async fn settle(fleet: &Fleet) -> AnyResult<()> {
    fleet.until("with a lease", LIMIT, |node| node.lease).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    fleet.until("with a lease", LIMIT, |node| node.lease).await
}

async fn outage(server: &mut Server, fleet: &Fleet, fault: Fault) -> AnyResult<Outage> {
    let lapses = |fleet: &Fleet| -> u64 {
        let (reachable, others) = fleet.shown();
        reachable.iter().chain(&others).map(|node| node.lapses).sum()
    };
    let before = lapses(fleet);
    let began = fleet.now();
    match fault {
        Fault::Restart => server.restart().await?,
        Fault::Kill(pause) => {
            server.kill().await?;
            tokio::time::sleep(pause).await;
            server.relaunch().await?;
        }
    }
    let up = fleet.now();
    fleet.moved(server.address);
    // Confirmed by the new server: it was asked after it came up.
    fleet.until("confirmed again", LIMIT, |node| node.confirmed > up).await.context("after an outage")?;
    let healed = fleet.now();
    Ok(Outage {
        away: (up - began).as_secs_f64(),
        healed: (healed - began).as_secs_f64(),
        healed_after: (healed - up).as_secs_f64(),
        lapses: lapses(fleet) - before,
        cpu: server.usage()?.cpu.as_secs_f64(),
    })
}

/// Seconds from `answered` until each of these nodes was on v1; 0 for one that was there before the answer was.
fn since<'a>(nodes: impl Iterator<Item = &'a Shown>, answered: Duration) -> Vec<f64> {
    nodes.map(|node| node.since.saturating_sub(answered).as_secs_f64()).collect()
}

fn say(nodes: usize, what: &str) {
    eprintln!("{nodes} nodes: {what}");
}
