//! A simulated VMM in a process of its own: see `dwcp-sim`. Its guest is small and quick, and equal to another if their
//! checksums are.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::agent::program;
use crate::qemu::Role;
use crate::wait::until;

/// For a process that was killed, or that dies by a fault, to be gone.
const DEATH: Duration = Duration::from_secs(20);

/// What a simulated guest is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimGuest {
    /// Where contents and writes come from.
    pub seed: u64,
    /// Pages of RAM.
    pub pages: u64,
    /// Share of them that are zero at the start.
    pub zero_percent: u8,
    /// Pages that it writes to.
    pub hot_pages: u64,
    /// Writes between two slices of 64 pages of a migration.
    pub writes_per_step: u32,
}

impl Default for SimGuest {
    /// 16 MiB with a light load.
    fn default() -> Self {
        SimGuest { seed: 7, pages: 4096, zero_percent: 30, hot_pages: 100, writes_per_step: 10 }
    }
}

/// What a simulated VMM says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimState {
    /// The run state, as `query-status` names it.
    pub run: String,
    /// The guest's steps since it booted and its RAM's checksum, if there is a whole guest.
    pub guest: Option<(u64, String)>,
}

/// A simulated VMM's process; killed when dropped.
#[derive(Debug)]
pub struct Sim {
    qmp: PathBuf,
    log: PathBuf,
    child: Child,
    talk: Mutex<(ChildStdin, BufReader<ChildStdout>)>,
    /// When it was killed, by the monotonic clock: until then its guest may have run.
    killed_at: Option<u128>,
}

impl Sim {
    /// Starts it with its QMP socket at `dir/NAME.qmp` and its log at `dir/NAME.log`.
    ///
    /// # Errors
    /// It does not start.
    pub fn launch(dir: &Path, name: &str, role: Role, guest: SimGuest) -> Result<Self> {
        let (qmp, log) = (dir.join(format!("{name}.qmp")), dir.join(format!("{name}.log")));
        let SimGuest { seed, pages, zero_percent, hot_pages, writes_per_step } = guest;
        let guest = json!({
            "seed": seed, "pages": pages, "zero_percent": zero_percent, "hot_pages": hot_pages,
            "writes_per_step": writes_per_step,
        });
        let role = match role {
            Role::Source => "running",
            Role::Destination => "incoming",
        };
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program("dwcp-sim")?)
            .arg(&qmp)
            .arg(&log)
            .args([role, &guest.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start dwcp-sim")?;
        let commands = child.stdin.take().context("its standard input")?;
        let answers = BufReader::new(child.stdout.take().context("its standard output")?);
        let mut sim = Sim { qmp, log, child, talk: Mutex::new((commands, answers)), killed_at: None };
        let mut ready = String::new();
        let read = sim.talk().1.read_line(&mut ready);
        if read.is_err() || ready.trim_end() != "ready" {
            sim.kill();
            bail!("dwcp-sim did not get ready: {read:?} {ready}");
        }
        Ok(sim)
    }

    /// The QMP socket, for the agent.
    pub fn qmp_path(&self) -> &Path {
        &self.qmp
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It is dead.
    pub fn state(&self) -> Result<SimState> {
        let answer = self.ask("state")?;
        let words: Vec<&str> = answer.split(' ').collect();
        let [run, steps, checksum] = words[..] else { bail!("unexpected state: {answer}") };
        let guest = steps.parse().ok().map(|steps| (steps, checksum.to_owned()));
        Ok(SimState { run: run.to_owned(), guest })
    }

    /// Whether it lives and its guest runs.
    pub fn is_running(&self) -> bool {
        self.state().is_ok_and(|state| state.run == "running")
    }

    /// Makes something go wrong: `fail-at`, `die-at` or `stall-at` with an offset in the stream, `die-on`, `hang` or
    /// `refuse` with a QMP command, `say` with a command and a line.
    ///
    /// # Errors
    /// It is dead.
    pub fn fault(&self, fault: &str) -> Result<()> {
        self.ask(&format!("fault {fault}")).map(drop)
    }

    /// Takes all faults back.
    ///
    /// # Errors
    /// It is dead.
    pub fn heal(&self) -> Result<()> {
        self.ask("heal").map(drop)
    }

    /// Kills the process at once.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.killed_at.get_or_insert_with(monotonic_nanos);
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process has died by itself.
    ///
    /// # Errors
    /// It goes on.
    pub fn died(&mut self) -> Result<()> {
        let child = &mut self.child;
        until("the simulated VMM to die", DEATH, || Ok(child.try_wait()?))?;
        self.killed_at.get_or_insert_with(monotonic_nanos);
        Ok(())
    }

    /// When the guest ran, as pairs of monotonic nanoseconds; the last one is open where it runs on.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn ran(&self) -> Result<Vec<(u128, u128)>> {
        let mut spans: Vec<(u128, u128)> = Vec::new();
        let mut since = None;
        for line in std::fs::read_to_string(&self.log)?.lines() {
            let (at, state) = line.split_once(' ').with_context(|| format!("log line {line}"))?;
            let at = at.parse()?;
            match (since, state == "running") {
                (None, true) => since = Some(at),
                (Some(from), false) => {
                    spans.push((from, at));
                    since = None;
                }
                _ => {}
            }
        }
        spans.extend(since.map(|from| (from, self.killed_at.unwrap_or(u128::MAX))));
        Ok(spans)
    }

    fn talk(&self) -> MutexGuard<'_, (ChildStdin, BufReader<ChildStdout>)> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, command: &str) -> Result<String> {
        let (commands, answers) = &mut *self.talk();
        writeln!(commands, "{command}").context("the simulated VMM is gone")?;
        let mut answer = String::new();
        ensure!(answers.read_line(&mut answer)? > 0, "the simulated VMM is gone");
        let rest = answer.trim_end().strip_prefix("ok").with_context(|| format!("{command}: {answer}"))?;
        Ok(rest.trim_start().to_owned())
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The monotonic clock, by which `dwcp-sim` writes its log.
fn monotonic_nanos() -> u128 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u128::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000
        + u128::try_from(now.tv_nsec).unwrap_or_default()
}

/// Whether two VMMs' guests ran at the same time.
///
/// # Errors
/// They did; or a log cannot be read.
pub fn never_both(one: &Sim, other: &Sim) -> Result<()> {
    for left in one.ran()? {
        for right in other.ran()? {
            ensure!(left.1 <= right.0 || right.1 <= left.0, "two guests ran at once: {left:?} and {right:?}");
        }
    }
    Ok(())
}
