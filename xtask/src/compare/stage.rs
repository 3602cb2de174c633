//! One guest that leaves for a fresh destination again and again, and what each move took.
//!
//! A contender takes its memory there, the destination is thrown away, and the source's copy is woken so that it may leave once
//! more. Every contender is timed by the same clock: the stamps that the VMMs themselves put on their migration events.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use dwcp_tests::{Agent, Event, Kit, Qemu, QemuSpec, Role, VM, ram};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cost::{Usage, anonymous, quiet};
use super::table::median;

/// No limit of bandwidth: far above what memory itself carries, and the same as the agents tell QEMU.
const UNLIMITED: u64 = 1 << 40;
/// For one move of the guest.
const MOVE: Duration = Duration::from_secs(120);
/// Between two looks at a migration's state: rare, so that looking costs none of the time that is measured.
const LOOK: Duration = Duration::from_millis(50);
/// How long a run waits for a machine without other work, if nothing else is asked for.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// A run counts as disturbed when others took so large a part of the machine during it. The kernel's own work, which no process
/// is charged for, and the two QMP clients are below that.
const DISTURBED: f64 = 0.15;
/// How often a disturbed run is made again, in a row.
const AGAIN: usize = 5;

/// What one move took. Times are in seconds from the source's `setup`.
#[derive(Debug, Clone, Default)]
pub(super) struct Run {
    /// To the source's `completed`.
    pub(super) sent: f64,
    /// To the destination's `completed`.
    pub(super) arrived: f64,
    /// `total-time` of the source's `query-migrate`.
    pub(super) total_time: f64,
    /// Bytes of memory that the source sent.
    pub(super) bytes: f64,
    /// CPU seconds, from before the first command to after the last.
    pub(super) used: Usage,
    /// CPU seconds of others: what is neither the contender's nor the VMMs', and what the host took.
    pub(super) others: f64,
    /// Whether those were more than [`DISTURBED`].
    pub(super) disturbed: bool,
    /// The most anonymous memory of each process that carried the guest, bytes.
    pub(super) memory: Vec<f64>,
}

impl Run {
    /// GB (10^9 bytes) of memory a second.
    pub(super) fn rate(&self) -> f64 {
        self.bytes / self.sent / 1e9
    }
}

/// Runs of several contenders, in order.
#[derive(Debug)]
pub(super) struct Runs<C> {
    /// What was measured.
    pub(super) of: Vec<(C, Vec<Run>)>,
    /// How many runs were made again since others disturbed them.
    pub(super) repeated: usize,
}

impl<C> Runs<C> {
    /// `runs` runs of each contender, after one to warm up (`run` is told which); the order turns round every time.
    pub(super) fn measure(
        contenders: Vec<C>,
        runs: usize,
        name: impl Fn(&C) -> String,
        mut run: impl FnMut(&C, bool) -> Result<Run>,
    ) -> Result<Self> {
        let mut all = Runs { of: contenders.into_iter().map(|c| (c, Vec::new())).collect(), repeated: 0 };
        for round in 0..=runs {
            for index in order(all.of.len(), round) {
                let (contender, done) = &mut all.of[index];
                let warm_up = round == 0;
                let mut this = run(contender, warm_up)?;
                for _ in 0..AGAIN {
                    if warm_up || !this.disturbed {
                        break;
                    }
                    all.repeated += 1;
                    println!("  others used {:.2} CPU s of the last run: once more", this.others);
                    this = run(contender, false)?;
                }
                println!(
                    "  {round}/{runs} {:<34} {:.3} s, arrived {:.3} s, {:.2} GB/s, CPU {:.2} + {:.2} of {:.2} s",
                    name(contender),
                    this.sent,
                    this.arrived,
                    this.rate(),
                    this.used.movers,
                    this.used.vmms,
                    this.used.machine
                );
                if !warm_up {
                    done.push(this);
                }
            }
        }
        Ok(all)
    }

    /// What went on beside them, in the words of a report; `load` is the machine's before and after.
    pub(super) fn circumstances(&self, load: (f64, f64)) -> Vec<String> {
        let all = || self.of.iter().flat_map(|(_, runs)| runs);
        let others = median(all().map(|run| run.others)).unwrap_or_default();
        let disturbed = all().filter(|run| run.disturbed).count();
        let stolen = all().map(|run| run.used.stolen).fold(0.0, f64::max);
        vec![
            format!(
                "load average over one minute: {:.2} before, {:.2} after (the comparison's own work included)",
                load.0, load.1
            ),
            format!(
                "noise: beside the contender and the QEMUs {others:.2} CPU s were used in the median run, mostly by the kernel; \
                 the host took {stolen:.2} s at the most; {} disturbed runs were made again, {disturbed} disturbed ones are in \
                 the table",
                self.repeated
            ),
        ]
    }

    /// Those of one contender.
    pub(super) fn by(&self, wanted: impl Fn(&C) -> bool) -> Option<&[Run]> {
        self.of.iter().find(|(contender, _)| wanted(contender)).map(|(_, runs)| runs.as_slice())
    }
}

/// Every other round goes backwards, and each pair of rounds begins with another contender, so that nobody always comes after the
/// same one.
pub(super) fn order(count: usize, round: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).map(|index| (index + round / 2) % count.max(1)).collect();
    if round % 2 == 1 {
        order.reverse();
    }
    order
}

/// The guest at its source, and where it leaves for.
pub(super) struct Stage {
    pub(super) kit: Kit,
    pub(super) cores: usize,
    pub(super) source: Qemu,
    spec: QemuSpec,
    /// The network namespace of the destinations.
    there: Option<PathBuf>,
    /// How long a run waits for a machine without other work; with zero, disturbed runs count as well.
    pub(super) patience: Duration,
    moves: u32,
    // Last, so that the processes are gone before their folder is.
    dir: TempDir,
}

impl Stage {
    /// Boots the guest and pauses it.
    pub(super) fn start(kit: Kit, spec: QemuSpec, there: Option<PathBuf>) -> Result<Self> {
        ensure!(spec.role == Role::Source, "a guest boots at its source");
        let dir = tempfile::tempdir()?;
        let source = Qemu::launch(&kit, dir.path(), "source", &spec)?.booted()?;
        source.watch().run("stop", json!({}))?;
        let cores = std::thread::available_parallelism()?.get();
        Ok(Stage { kit, cores, source, spec, there, patience: PATIENCE, moves: 0, dir })
    }

    /// A folder for what belongs to the guest's moves.
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// One move to a fresh destination by `carry`, of the paused guest or of the one that `runs`. With `compare` both
    /// memories are compared afterwards.
    pub(super) fn move_guest(
        &mut self,
        runs: bool,
        compare: bool,
        carry: impl FnOnce(&Stage, &Qemu) -> Result<Run>,
    ) -> Result<Run> {
        self.moves += 1;
        let name = format!("destination-{}", self.moves);
        let spec = QemuSpec { namespace: self.there.clone(), ..self.spec.destination() };
        let mut destination = Qemu::launch(&self.kit, self.dir.path(), &name, &spec)?;
        for vm in [&self.source, &destination] {
            let capabilities = [("events", true), ("multifd", false), ("x-ignore-shared", false)]
                .map(|(name, state)| json!({ "capability": name, "state": state }));
            vm.watch().run("migrate-set-capabilities", json!({ "capabilities": capabilities }))?;
        }
        // What the agents told QEMU in an earlier run must not help or hinder anyone.
        let parameters =
            json!({ "max-bandwidth": UNLIMITED, "avail-switchover-bandwidth": 0, "downtime-limit": 300 });
        self.source.watch().run("migrate-set-parameters", parameters)?;
        if runs {
            self.source.watch().run("cont", json!({}))?;
        }
        self.source.watch().events().for_each(drop);

        let run = carry(self, &destination)?;
        if compare && !runs {
            let difference = ram::compare(&self.source, &destination, self.spec.ram_bytes())?;
            ensure!(difference.is_none(), "the memories differ: {difference:?}");
        }
        // Never two that run: the other one first.
        destination.kill();
        fs::remove_dir_all(destination.dir())?;
        for command in ["cont", "stop"] {
            self.source.watch().run(command, json!({}))?;
        }
        Ok(run)
    }

    /// Two agents as the carriers: `arguments` are further ones of `dwcpctl migrate`, `check` holds its result against what
    /// was asked for.
    pub(super) fn by_agents(
        &self,
        (a, b): (&Agent, &Agent),
        destination: &Qemu,
        arguments: &[&str],
        check: impl FnOnce(&Value) -> Result<()>,
    ) -> Result<Run> {
        let qmp = destination.qmp_path();
        b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &a.node()])?.success()?;
        let pids: Vec<u32> = [a, b].into_iter().filter_map(Agent::pid).collect();
        let (qmp, to) = (self.source.qmp_path(), b.target()?);
        let carried = || {
            let qmp = qmp.display();
            let mut all: Vec<&dyn std::fmt::Display> =
                vec![&"migrate", &VM, &"--qmp", &qmp, &"--to", &to, &"--json"];
            all.extend(arguments.iter().map(|word| word as &dyn std::fmt::Display));
            check(&a.ctl(&all)?.success()?.json()?)
        };
        let logs = || format!("agent a:\n{}\nagent b:\n{}", a.log(), b.log());
        self.measured(destination, &pids, carried).with_context(logs)
    }

    /// QEMU's own migration to `uri`.
    pub(super) fn migrate(&self, uri: &str) -> Result<()> {
        self.source.watch().run("migrate", json!({ "uri": uri }))?;
        Ok(())
    }

    /// Waits for quiet, lets `action` begin or do the whole, waits for both ends and reads what it took.
    pub(super) fn measured(
        &self,
        destination: &Qemu,
        movers: &[u32],
        action: impl FnOnce() -> Result<()>,
    ) -> Result<Run> {
        let vmms = [self.source.pid(), destination.pid()];
        if !self.patience.is_zero() && !quiet(self.cores, self.patience)? {
            println!("  the machine has other work, and it does not end");
        }
        let memory = MemoryWatch::start(movers);
        let (start, before) = (Instant::now(), Usage::sample(movers, &vmms)?);
        action()?;
        let state = completed(&self.source).context("source")?;
        completed(destination).context("destination")?;
        let used = Usage::sample(movers, &vmms)?.since(before);
        let capacity = start.elapsed().as_secs_f64() * self.cores as f64;
        let memory = memory.finish()?;

        let sent: Vec<Event> = self.source.watch().events().collect();
        let received: Vec<Event> = destination.watch().events().collect();
        let began = stamp(&sent, "setup")?;
        let since = |micros: u64| micros.saturating_sub(began) as f64 / 1e6;
        let number = |value: &Value| value.as_f64().with_context(|| format!("no figures in {state}"));
        let others = (used.machine - used.movers - used.vmms).max(0.0) + used.stolen;
        Ok(Run {
            sent: since(stamp(&sent, "completed")?),
            arrived: since(stamp(&received, "completed")?),
            total_time: number(&state["total-time"])? / 1e3,
            bytes: number(&state["ram"]["transferred"])?,
            used,
            others,
            disturbed: !self.patience.is_zero() && others > DISTURBED * capacity,
            memory,
        })
    }
}

/// Looks at the anonymous memory of processes, now and then.
struct MemoryWatch {
    stop: Sender<()>,
    thread: JoinHandle<Vec<f64>>,
}

impl MemoryWatch {
    fn start(pids: &[u32]) -> Self {
        let (stop, stopped) = channel();
        let pids = pids.to_vec();
        let thread = spawn(move || {
            let mut most = vec![0.0; pids.len()];
            loop {
                for (most, &pid) in most.iter_mut().zip(&pids) {
                    // One that has ended has no memory.
                    *most = f64::max(*most, anonymous(pid).unwrap_or_default());
                }
                if stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout) {
                    return most;
                }
            }
        });
        MemoryWatch { stop, thread }
    }

    fn finish(self) -> Result<Vec<f64>> {
        drop(self.stop);
        self.thread.join().map_err(|_| anyhow!("the thread that looks at memory panicked"))
    }
}

/// Waits until a VMM's migration is done, and gives what it says of it.
fn completed(vm: &Qemu) -> Result<Value> {
    let start = Instant::now();
    loop {
        let state = vm.watch().run("query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return Ok(state),
            Some("failed" | "cancelled") => bail!("QEMU says {state}"),
            _ if start.elapsed() > MOVE => bail!("not done after {} s: {state}", MOVE.as_secs()),
            _ => sleep(LOOK),
        }
    }
}

/// QEMU's own stamp on the migration's change to `status`, microseconds since the epoch.
fn stamp(events: &[Event], status: &str) -> Result<u64> {
    let found = events.iter().find(|event| event.name == "MIGRATION" && event.data["status"] == status);
    Ok(found.with_context(|| format!("QEMU announced no \"{status}\": {events:?}"))?.micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_turns_round_and_leaves_nobody_out() {
        assert_eq!(order(3, 0), [0, 1, 2]);
        assert_eq!(order(3, 1), [2, 1, 0]);
        assert_eq!(order(3, 2), [1, 2, 0]);
        for round in 0..8 {
            let mut sorted = order(7, round);
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4, 5, 6]);
        }
    }
}
