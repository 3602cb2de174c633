//! One simulated node: polls, applies, decides, and says when it changes its mind.

use std::mem::take;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use dwcp_flags::poll::{PollReport, REPORT, Served, SignedReport, report_message};
use dwcp_flags::{
    Conditions, FEATURE, FlagState, LEASE, Lease, Moment, POLL_TIMEOUT, Path, Schedule, Scope, Source,
};
use dwcp_proto::{NodeKey, NodeName};
use rustls::ClientConfig;
use tokio::sync::watch;

use crate::http::{Answer, Connection, Shaking};

const FLAG: &str = "/v1/feature-flags/dwcp_v3_hde";

/// What all nodes share.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) origin: Instant,
    pub(crate) tls: Arc<ClientConfig>,
    /// Where the server is; it moves when it starts anew.
    pub(crate) server: watch::Receiver<SocketAddr>,
}

/// What a node shows to the drill.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shown {
    /// Whether a migration that runs on v3 stays there.
    pub(crate) v3: bool,
    /// When that changed last.
    pub(crate) since: Duration,
    /// Whether a lease holds, for new migrations.
    pub(crate) lease: bool,
    /// How often it has ended.
    pub(crate) lapses: u64,
    /// When the last confirmed request was sent.
    pub(crate) confirmed: Duration,
    /// Answered and failed polls.
    pub(crate) polls: u64,
    pub(crate) failures: u64,
}

/// A node.
#[derive(Debug)]
pub(crate) struct Node {
    world: Arc<World>,
    /// Its own address, as on a network.
    from: Ipv4Addr,
    key: Arc<NodeKey>,
    state: FlagState,
    schedule: Schedule,
    connection: Option<Connection>,
    /// A handshake that outlasts its poll.
    shaking: Shaking,
    sequence: u64,
    cluster: String,
    etag: String,
    random: u64,
    shown: watch::Sender<Shown>,
    /// Nothing gets through, and nothing says so.
    partitioned: watch::Receiver<bool>,
}

/// The key of node number `index`.
pub(crate) fn key(index: usize) -> Result<NodeKey> {
    let mut seed = [0x5a; 32];
    seed[..8].copy_from_slice(&(index as u64).to_le_bytes());
    Ok(NodeKey::from_seed(NodeName::new(format!("node-{index:05}"))?, &seed))
}

/// The address of node number `index`, all of which lead to this machine.
fn address(index: usize) -> Ipv4Addr {
    let [.., high, middle, low] = (index as u64 + 2).to_be_bytes();
    Ipv4Addr::new(127, high.wrapping_add(1), middle, low)
}

impl Node {
    /// A node that begins to poll after `wait`.
    pub(crate) fn new(
        world: Arc<World>,
        index: usize,
        wait: Duration,
        partitioned: watch::Receiver<bool>,
    ) -> Result<(Self, watch::Receiver<Shown>)> {
        let key = key(index)?;
        let (shown, seen) = watch::channel(Shown::default());
        let node = Node {
            state: FlagState::new(key.node().as_str(), Source::Server(Lease::new(LEASE))),
            schedule: Schedule::new(1, Moment(world.origin.elapsed() + wait)),
            world,
            from: address(index),
            key: Arc::new(key),
            connection: None,
            shaking: Shaking::default(),
            sequence: 0,
            cluster: String::new(),
            etag: String::new(),
            random: index as u64,
            shown,
            partitioned,
        };
        Ok((node, seen))
    }

    /// Lives until nobody looks any more.
    pub(crate) async fn live(mut self) {
        while !self.shown.is_closed() {
            let now = self.now();
            let due = self.schedule.due();
            if now < due {
                let next = self.state.next_change(now).map_or(due, |change| change.min(due));
                tokio::time::sleep_until((self.world.origin + next.0).into()).await;
                self.show(None);
                continue;
            }
            let random = self.random();
            self.schedule.sent(now, random);
            let answered = self.poll(now).await;
            let (now, random) = (self.now(), self.random());
            match &answered {
                Ok(()) => self.schedule.answered(),
                Err(_) => self.schedule.failed(now, random),
            }
            self.show(Some(answered.is_ok()));
        }
    }

    async fn poll(&mut self, asked: Moment) -> Result<()> {
        let deadline = self.world.origin + asked.0 + POLL_TIMEOUT;
        let report = self.report()?;
        let (key, etag) = (Arc::clone(&self.key), self.etag.clone());
        // Signed only when it is sent: ten thousand nodes that cannot send are not to take the server's cores for it.
        let request = move || {
            let signature = key.sign(&report_message(&report));
            let report = SignedReport { signature, report: report.clone() }.to_header();
            format!("if-none-match: {etag}\r\n{REPORT}: {report}\r\n")
        };
        // Both outlast a poll that is given up: to begin anew would cost a busy server far more than the poll did.
        let (mut connection, mut shaking) = (self.connection.take(), take(&mut self.shaking));
        let (kept, begun) = (&mut connection, &mut shaking);
        let (world, from, mut partitioned) = (Arc::clone(&self.world), self.from, self.partitioned.clone());
        let exchange = async move {
            partitioned.wait_for(|partitioned| !partitioned).await?;
            // A kept connection may have been closed meanwhile, which shows only now: once more on a new one.
            if let Some(connection) = kept
                && let Ok(answer) = connection.send("GET", FLAG, &request(), "").await
            {
                return anyhow::Ok(answer);
            }
            *kept = None;
            let server = *world.server.borrow();
            let connection = kept.insert(Connection::open(from, server, &world.tls, begun).await?);
            connection.send("GET", FLAG, &request(), "").await
        };
        // A lease ends on time, whatever a poll is waiting for.
        let answered = {
            let mut exchange = std::pin::pin!(tokio::time::timeout_at(deadline.into(), exchange));
            loop {
                let now = Moment(self.world.origin.elapsed());
                let change = self.state.next_change(now);
                let change = change.map_or(deadline, |change| self.world.origin + change.0);
                tokio::select! {
                    answer = exchange.as_mut() => break answer,
                    () = tokio::time::sleep_until(change.into()), if change < deadline => self.show(None),
                }
            }
        };
        // Nothing outlasts a cut.
        if !*self.partitioned.borrow() {
            let good =
                answered.as_ref().map_or(true, |answer| answer.as_ref().is_ok_and(|answer| !answer.close));
            (self.connection, self.shaking) = (connection.filter(|_| good), shaking);
        }
        let answer = answered??;
        self.take_in(&answer, asked)
    }

    fn report(&mut self) -> Result<Vec<u8>> {
        self.sequence += 1;
        let reason = self.state.decide(self.now(), Scope::New, Conditions::default());
        let report = PollReport {
            node: self.key.node().to_string(),
            cluster: self.cluster.clone(),
            feature: FEATURE.to_owned(),
            boot: 1,
            sequence: self.sequence,
            applied: self.state.document().and_then(|document| document.epoch),
            path: reason.path(),
            reason: reason.code().to_owned(),
            v3_inflight: u32::from(self.is_v3()),
            data_loss: 0,
            byzantine_successes: 0,
            critical_errors: 0,
            labels: Default::default(),
        }
        .encode()?;
        Ok(report)
    }

    fn take_in(&mut self, answer: &Answer, asked: Moment) -> Result<()> {
        ensure!(self.cluster.is_empty() || self.cluster == answer.cluster, "another cluster");
        match answer.status {
            304 => self.state.confirm(asked),
            200 => {
                let served = Served::parse(&answer.body, FEATURE)?;
                self.state.apply(served.document, asked)?;
                (self.etag, self.cluster) = (answer.etag.clone(), answer.cluster.clone());
            }
            status => bail!("status {status}"),
        }
        Ok(())
    }

    fn show(&mut self, polled: Option<bool>) {
        let now = self.now();
        let v3 = self.is_v3();
        let lease = self.state.lease();
        let holds = lease.is_some_and(|lease| lease.holds(now));
        let age = lease.and_then(|lease| lease.age(now));
        self.shown.send_modify(|shown| {
            if shown.v3 != v3 {
                (shown.v3, shown.since) = (v3, now.0);
            }
            shown.lapses += u64::from(shown.lease && !holds);
            shown.lease = holds;
            shown.confirmed = age.map_or(shown.confirmed, |age| now.0.saturating_sub(age));
            shown.polls += u64::from(polled == Some(true));
            shown.failures += u64::from(polled == Some(false));
        });
    }

    fn is_v3(&self) -> bool {
        self.state.decide(self.now(), Scope::Running, Conditions::default()).path() == Path::V3
    }

    fn now(&self) -> Moment {
        Moment(self.world.origin.elapsed())
    }

    /// Any number: splitmix64, by Sebastiano Vigna.
    fn random(&mut self) -> u32 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 32) as u32
    }
}
