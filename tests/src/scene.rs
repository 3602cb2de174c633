//! The usual scene of an end-to-end test: a guest at node `a`, a QEMU that waits at node `b`, and an agent at each.

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, AgentConfig, CtlOutput, program};
use crate::kit::{Kit, QemuVersion};
use crate::qemu::{Qemu, QemuSpec, Role};

/// The VM's name in every scene.
pub const VM: &str = "vm1";

/// What timeout(1) says for itself.
const TIMED_OUT: i32 = 124;

/// Two agents and two QEMUs. The folder goes with it.
#[derive(Debug)]
pub struct Scene {
    /// The node where the guest runs.
    pub a: Agent,
    /// The node where a QEMU waits for it.
    pub b: Agent,
    /// The guest.
    pub from: Qemu,
    /// The QEMU that waits.
    pub to: Qemu,
    /// Where `a` reaches `b` if not at its own address: a [`crate::Relay`] between them.
    pub via: Option<SocketAddr>,
    spec: QemuSpec,
    kit: Kit,
    turns: u32,
    // Last, so that the processes are gone before their folder is.
    dir: TempDir,
}

impl Scene {
    /// The kit, once programs and laboratory are there; or `None` after a line that says why `test` is skipped.
    ///
    /// # Panics
    /// In CI, as [`Kit::or_skip`].
    pub fn kit_or_skip(test: &str) -> Option<Kit> {
        Kit::or_skip_without(test, || program("dwcpd").and_then(|_| program("dwcpctl")).map(drop))
    }

    /// Two agents of the default configuration and a booted guest of the default load.
    ///
    /// # Errors
    /// Something does not start.
    pub fn new(kit: &Kit, version: QemuVersion) -> Result<Self> {
        Scene::with(kit, QemuSpec::new(version, Role::Source), AgentConfig::default(), AgentConfig::default())
    }

    /// A scene of other settings.
    ///
    /// # Errors
    /// Something does not start.
    pub fn with(kit: &Kit, spec: QemuSpec, a: AgentConfig, b: AgentConfig) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let from = Qemu::launch(kit, dir.path(), "vm-a", &spec)?;
        let to = Qemu::launch(kit, dir.path(), "vm-b", &spec.destination())?;
        // The guest boots while the agents start.
        let (a, b) = Agent::pair(dir.path(), a, b)?;
        Ok(Scene { a, b, from: from.booted()?, to, via: None, spec, kit: kit.clone(), turns: 0, dir })
    }

    /// Asks `b` to receive the guest from `a`.
    ///
    /// # Errors
    /// `dwcpctl` cannot be started.
    pub fn incoming(&self) -> Result<CtlOutput> {
        let qmp = self.to.qmp_path();
        self.b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &self.a.node()])
    }

    /// Asks `a` what a migration to `b` would take, with these further arguments; `b` need not wait for it.
    ///
    /// # Errors
    /// `dwcpctl` cannot be started.
    pub fn estimate(&self, arguments: &[&str]) -> Result<CtlOutput> {
        let (qmp, target) = (self.from.qmp_path(), self.b.target()?);
        let qmp = qmp.display();
        let mut all: Vec<&dyn Display> = vec![&"estimate", &VM, &"--qmp", &qmp, &"--to", &target, &"--json"];
        all.extend(arguments.iter().map(|word| word as &dyn Display));
        self.a.ctl(&all)
    }

    /// Migrates `a` to `b` with these further arguments and waits for the end.
    ///
    /// # Errors
    /// `dwcpctl` cannot be started.
    pub fn migrate(&self, arguments: &[&str]) -> Result<CtlOutput> {
        self.migrate_watched(arguments, |_| ())
    }

    /// The same, with each line of `dwcpctl --json` handed to `line` as it comes.
    ///
    /// # Errors
    /// As [`Scene::migrate`].
    pub fn migrate_watched(&self, arguments: &[&str], line: impl FnMut(&str)) -> Result<CtlOutput> {
        let qmp = self.from.qmp_path();
        let target = match self.via {
            Some(relay) => format!("{}={relay}", self.b.node()),
            None => self.b.target()?,
        };
        let qmp = qmp.display();
        let mut all: Vec<&dyn Display> = vec![&"migrate", &VM, &"--qmp", &qmp, &"--to", &target, &"--json"];
        all.extend(arguments.iter().map(|word| word as &dyn Display));
        self.a.ctl_watched(&all, line)
    }

    /// Both steps, with the result's JSON.
    ///
    /// # Errors
    /// Either step fails; the agents' logs are in the error.
    pub fn move_guest(&self, arguments: &[&str]) -> Result<Value> {
        self.move_guest_watched(arguments, |_| ())
    }

    /// The same, with each line of `dwcpctl --json` handed to `line` as it comes.
    ///
    /// # Errors
    /// As [`Scene::move_guest`].
    pub fn move_guest_watched(&self, arguments: &[&str], line: impl FnMut(&str)) -> Result<Value> {
        let moved = || -> Result<Value> {
            self.incoming()?.success()?;
            self.migrate_watched(arguments, line)?.success()?.json()
        };
        moved().with_context(|| self.logs())
    }

    /// Both steps, for a migration that may take as long as `limit`.
    ///
    /// # Errors
    /// As [`Scene::move_guest`].
    pub fn move_guest_patiently(&self, arguments: &[&str], limit: Duration) -> Result<Value> {
        self.incoming()?.success()?;
        self.finish_patiently(arguments, limit)
    }

    /// The second step alone. The arguments name an `--id` where it may take longer than one `dwcpctl` waits.
    ///
    /// # Errors
    /// As [`Scene::move_guest`].
    pub fn finish_patiently(&self, arguments: &[&str], limit: Duration) -> Result<Value> {
        let started = Instant::now();
        // One `dwcpctl` waits for two minutes at most; the next one waits for the same migration.
        let mut said = self.migrate(arguments)?;
        while said.status == Some(TIMED_OUT) && started.elapsed() < limit {
            said = self.migrate(arguments)?;
        }
        said.success().with_context(|| self.logs())?.json()
    }

    /// Both agents' logs, for whoever reads a failed test.
    pub fn logs(&self) -> String {
        format!("agent a:\n{}\nagent b:\n{}", self.a.log(), self.b.log())
    }

    /// Turns the scene round after a migration: the guest is at `a` again, and a fresh QEMU waits at `b`.
    ///
    /// # Errors
    /// The fresh QEMU does not start.
    pub fn turn_round(mut self) -> Result<Self> {
        self.from.kill();
        std::mem::swap(&mut self.a, &mut self.b);
        self.turns += 1;
        let name = format!("vm-{}-{}", self.b.node(), self.turns);
        let fresh = Qemu::launch(&self.kit, self.dir.path(), &name, &self.spec.destination())?;
        self.from = std::mem::replace(&mut self.to, fresh);
        Ok(self)
    }

    /// The folder of it all.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The guest's RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.spec.ram_bytes()
    }
}
