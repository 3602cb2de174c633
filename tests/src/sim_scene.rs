//! Two real agents and two simulated VMMs, four processes: a whole migration in a fraction of a second.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, AgentConfig, CtlOutput, program};
use crate::kit::skip;
use crate::qemu::Role;
use crate::scene::VM;
use crate::sim::{Sim, SimGuest, never_both};
use crate::wait::until;

/// For a migration to end on both sides, restarts included, whatever else the machine does.
const END: Duration = Duration::from_secs(60);

/// The scene. Its folder goes with it.
#[derive(Debug)]
pub struct SimScene {
    /// The node where the guest runs.
    pub a: Agent,
    /// The node where a VMM waits for it.
    pub b: Agent,
    /// The guest.
    pub from: Sim,
    /// The VMM that waits.
    pub to: Sim,
    /// Where `a` reaches `b`, as `--to` takes it, if not at its own address.
    pub via: Option<String>,
    guest: SimGuest,
    vms: u32,
    // Last, so that the processes are gone before their folder is.
    dir: TempDir,
}

/// How a migration ended, on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The guest runs at the destination.
    Moved,
    /// It runs at the source.
    Stayed,
}

/// One of the four processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Victim {
    /// The agent at the source.
    SourceAgent,
    /// The agent at the destination.
    DestinationAgent,
    /// The VMM at the source.
    SourceVmm,
    /// The VMM at the destination.
    DestinationVmm,
}

impl Victim {
    /// All four.
    pub const ALL: [Victim; 4] =
        [Victim::SourceAgent, Victim::DestinationAgent, Victim::SourceVmm, Victim::DestinationVmm];
}

impl SimScene {
    /// Whether the programs are built; else a line says why `test` is skipped.
    ///
    /// # Panics
    /// In CI, where nothing may be skipped.
    pub fn possible(test: &str) -> bool {
        possible(test, &["dwcpd", "dwcpctl", "dwcp-sim"])
    }

    /// The same, with the agent that has fault points.
    ///
    /// # Panics
    /// As [`SimScene::possible`].
    pub fn possible_with_fault_points(test: &str) -> bool {
        possible(test, &["dwcpd", "dwcpd-faulty", "dwcpctl", "dwcp-sim"])
    }

    /// The default guest and default agents.
    ///
    /// # Errors
    /// Something does not start.
    pub fn new() -> Result<Self> {
        SimScene::with(SimGuest::default(), AgentConfig::default(), AgentConfig::default())
    }

    /// A scene of other settings.
    ///
    /// # Errors
    /// Something does not start.
    pub fn with(guest: SimGuest, a: AgentConfig, b: AgentConfig) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let (mut a, mut b) = (a, b);
        for config in [&mut a, &mut b] {
            if config.data.ip() == Ipv4Addr::LOCALHOST {
                config.data.set_ip(own_loopback());
            }
        }
        let from = Sim::launch(dir.path(), "vm-a", Role::Source, guest)?;
        let to = Sim::launch(dir.path(), "vm-b", Role::Destination, guest)?;
        let (a, b) = Agent::pair(dir.path(), a, b)?;
        Ok(SimScene { a, b, from, to, via: None, guest, vms: 0, dir })
    }

    /// Asks `b` to receive the guest from `a`.
    ///
    /// # Errors
    /// It refuses.
    pub fn incoming(&self) -> Result<()> {
        let qmp = self.to.qmp_path().display();
        self.b.ctl(&[&"incoming", &VM, &"--qmp", &qmp, &"--from", &self.a.node()])?.success().map(drop)
    }

    /// Migrates with these arguments, and waits for the end.
    ///
    /// # Errors
    /// `dwcpctl` cannot be started.
    pub fn migrate(&self, arguments: &[&str]) -> Result<CtlOutput> {
        self.migrate_watched(arguments, |_| ())
    }

    /// The same, with each line of `dwcpctl --json` handed to `line` as it comes.
    ///
    /// # Errors
    /// As [`SimScene::migrate`].
    pub fn migrate_watched(&self, arguments: &[&str], line: impl FnMut(&str)) -> Result<CtlOutput> {
        let qmp = self.from.qmp_path().display();
        let target = self.target()?;
        let mut all: Vec<&dyn Display> = vec![&"migrate", &VM, &"--qmp", &qmp, &"--to", &target, &"--json"];
        all.extend(arguments.iter().map(|word| word as &dyn Display));
        self.a.ctl_watched(&all, line)
    }

    /// Starts migration `id` with these further arguments, and does not wait.
    ///
    /// # Errors
    /// `dwcpctl` cannot be started. That the agent refuses, or dies of it, is for the caller to see.
    pub fn begin(&self, id: &str, arguments: &[&str]) -> Result<CtlOutput> {
        let qmp = self.from.qmp_path().display();
        let target = self.target()?;
        let mut all: Vec<&dyn Display> =
            vec![&"migrate", &VM, &"--qmp", &qmp, &"--to", &target, &"--id", &id, &"--detach"];
        all.extend(arguments.iter().map(|word| word as &dyn Display));
        self.a.ctl(&all)
    }

    /// Waits until the migration has ended at the source and at the destination (as far as either knows it), and says
    /// how. What the VMMs say must be the same.
    ///
    /// # Errors
    /// It does not end, both guests run, or none.
    pub fn ending(&self, id: &str) -> Result<Ending> {
        for agent in [&self.a, &self.b] {
            until(&format!("the end of {id} at {}", agent.node()), END, || {
                Ok(ended(agent, id)?.then_some(()))
            })
            .with_context(|| self.logs())?;
        }
        self.ending_of_guests().with_context(|| self.logs())
    }

    /// Waits until exactly one of the guests runs.
    ///
    /// # Errors
    /// It does not come to that; or both ran at the same time.
    pub fn ending_of_guests(&self) -> Result<Ending> {
        let ending = until("one running guest", END, || {
            Ok(match (self.from.is_running(), self.to.is_running()) {
                (true, false) => Some(Ending::Stayed),
                (false, true) => Some(Ending::Moved),
                _ => None,
            })
        })?;
        never_both(&self.from, &self.to)?;
        if ending == Ending::Moved {
            self.same_guest()?;
        }
        Ok(ending)
    }

    /// Whether both VMMs hold the same guest: the source's is the one that left.
    ///
    /// # Errors
    /// They do not, or one of them is dead.
    pub fn same_guest(&self) -> Result<()> {
        let (from, to) = (self.from.state()?.guest, self.to.state()?.guest);
        ensure!(from.is_some() && from == to, "the guests differ: {from:?} left, {to:?} arrived");
        Ok(())
    }

    /// A second migration, with a fresh VMM at the destination and straight to `b`: it must succeed.
    ///
    /// # Errors
    /// It does not.
    pub fn again(&mut self) -> Result<()> {
        self.fresh_destination()?;
        self.via = None;
        self.incoming()?;
        let moved = self.migrate(&[])?.success();
        moved.with_context(|| self.logs()).context("the second migration")?;
        ensure!(self.ending_of_guests()? == Ending::Moved);
        Ok(())
    }

    /// Replaces the VMM at the destination by one that waits.
    ///
    /// # Errors
    /// It does not start.
    pub fn fresh_destination(&mut self) -> Result<()> {
        self.vms += 1;
        let name = format!("vm-b{}", self.vms);
        self.to = Sim::launch(self.dir.path(), &name, Role::Destination, self.guest)?;
        Ok(())
    }

    /// Replaces the VMM at the source by one whose guest has just booted.
    ///
    /// # Errors
    /// It does not start.
    pub fn fresh_source(&mut self) -> Result<()> {
        self.vms += 1;
        let name = format!("vm-a{}", self.vms);
        self.from = Sim::launch(self.dir.path(), &name, Role::Source, self.guest)?;
        Ok(())
    }

    /// Kills a process at once.
    pub fn kill(&mut self, victim: Victim) {
        match victim {
            Victim::SourceAgent => self.a.kill(),
            Victim::DestinationAgent => self.b.kill(),
            Victim::SourceVmm => self.from.kill(),
            Victim::DestinationVmm => self.to.kill(),
        }
    }

    /// Both agents' logs, for whoever reads a failed test.
    pub fn logs(&self) -> String {
        format!("agent a:\n{}\nagent b:\n{}", self.a.log(), self.b.log())
    }

    /// The folder of it all.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn target(&self) -> Result<String> {
        match &self.via {
            Some(target) => Ok(target.clone()),
            None => self.b.target(),
        }
    }
}

/// A loopback address that no other agent has. An agent that died comes back at its port, which somebody else's
/// connection, made meanwhile, may have taken at the usual address.
fn own_loopback() -> IpAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(64).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
    let [_, high, middle, low] = number.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, high, middle, low.clamp(2, 254)))
}

fn possible(test: &str, programs: &[&str]) -> bool {
    let built = programs.iter().try_for_each(|name| program(name).map(drop));
    built.inspect_err(|why| skip(test, &format!("{why:#}"))).is_ok()
}

/// Attacks that this agent has refused so far, by kind; kinds without any are left out.
///
/// # Errors
/// It does not answer.
pub fn attempts(agent: &Agent) -> Result<BTreeMap<String, u64>> {
    let text = agent.http_get("/metrics")?;
    let lines = text.lines().filter_map(|line| line.strip_prefix("dwcp_v3_byzantine_attempts_total{kind=\""));
    let counts = lines.filter_map(|line| {
        let (kind, count) = line.split_once("\"} ")?;
        Some((kind.to_owned(), count.parse().ok()?)).filter(|(_, count)| *count > 0)
    });
    Ok(counts.collect())
}

/// Whether `agent` has nothing to do for migration `id` any more: it ended, or was never journaled here.
fn ended(agent: &Agent, id: &str) -> Result<bool> {
    let said = agent.ctl(&[&"status", &id, &"--json"])?;
    match said.status {
        Some(0) => {
            let status: Value = said.json()?;
            Ok(["completed", "aborted", "failed"].iter().any(|end| status["status"] == *end))
        }
        // Unknown: it began and ended in an earlier life, or came to nothing.
        Some(_) => Ok(said.stderr.contains("unknown_migration")),
        None => Ok(false),
    }
}
