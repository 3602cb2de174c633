//! The laboratory of the comparison: a guest at one end of a long line, and whoever takes it to the other end.

use std::fmt::Display;
use std::fs;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, ensure};
use dwcp_tests::{
    ATTACHES, Agent, AgentConfig, CtlOutput, Direction, End as LineEnd, Event, Kit, Qemu, QemuSpec, VM, Wan,
    until,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::cases::{CHANNELS, Guest, Link, Setting, XBZRLE_CACHE};
use super::run::{End, Foretold, Run};
use crate::compare::cost::Usage;

/// The downtime that everybody is asked for.
pub(super) const DOWNTIME: Duration = Duration::from_millis(300);
/// No limit of bandwidth: far above what any of the links carries.
const UNLIMITED: u64 = 1 << 40;
/// Between two looks at a migration: rare, so that looking costs little of the time that is measured.
const LOOK: Duration = Duration::from_millis(50);
/// For a migration that was called off, and for the agents' last words.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the line may still carry of the run before.
const DRAIN: Duration = Duration::from_millis(500);

/// A guest that runs at one end of a line, and is moved again and again.
pub(super) struct Bench {
    kit: Kit,
    guest: Guest,
    spec: QemuSpec,
    wan: Wan,
    source: Qemu,
    moves: u32,
    // Last, so that the processes are gone before their folder is.
    dir: TempDir,
}

impl Bench {
    /// Boots the guest.
    pub(super) fn start(kit: &Kit, guest: Guest) -> Result<Self> {
        let wan = Wan::start_or_skip("compare wan", Link::M200.profile())?
            .context("this comparison needs network namespaces and a TUN device")?;
        let dir = tempfile::tempdir()?;
        let spec = QemuSpec { namespace: Some(wan.namespace(LineEnd::A)), ..guest.spec(kit)? };
        let source = Qemu::launch(kit, dir.path(), "source", &spec)?.booted()?;
        Ok(Bench { kit: kit.clone(), guest, spec, wan, source, moves: 0, dir })
    }

    /// Moves the guest to a fresh destination, throws that away, and has the guest go on at the source. With `verify` the
    /// guest first checks all of its memory at the destination.
    pub(super) fn run(&mut self, setting: Setting, link: Link, limit: Duration, verify: bool) -> Result<Run> {
        self.moves += 1;
        sleep(DRAIN);
        self.wan.set(Direction::Both, link.profile())?;
        let spec = QemuSpec {
            backing: setting.destination(),
            namespace: Some(self.wan.namespace(LineEnd::B)),
            ..self.spec.destination()
        };
        let name = format!("destination-{}", self.moves);
        let mut destination = Qemu::launch(&self.kit, self.dir.path(), &name, &spec)?;
        configure(&self.source, &destination, setting)?;

        let run = match setting.path() {
            None => self.natively(&destination, limit)?,
            Some(path) => self.by_agents(&destination, (path, setting), limit)?,
        };
        if verify && run.end == End::Done {
            destination.guest_ok_for(Duration::from_secs(1)).context("at the destination")?;
        }
        // Never two that run: the other one first.
        destination.kill();
        fs::remove_dir_all(destination.dir())?;
        if run.end != End::Done {
            // With each migration that is called off QEMU lets its guest write less afterwards: 18,000 pages a second before the first, 5,000
            // after the fifth.
            self.source.kill();
            fs::remove_dir_all(self.source.dir())?;
            self.source = Qemu::launch(&self.kit, self.dir.path(), "source", &self.spec)?.booted()?;
            return Ok(run);
        }
        if self.source.status()? != "running" {
            self.source.watch().run("cont", json!({}))?;
        }
        self.source.guest_ok_for(Duration::from_millis(500)).context("back at the source")?;
        Ok(run)
    }

    fn natively(&mut self, destination: &Qemu, limit: Duration) -> Result<Run> {
        let address = format!("tcp:{}:0", LineEnd::B.address());
        destination.watch().run("migrate-incoming", json!({ "uri": address }))?;
        let state = destination.watch().run("query-migrate", json!({}))?;
        let port = state["socket-address"][0]["port"].as_str().context("QEMU names no port")?;
        let uri = format!("tcp:{}:{port}", LineEnd::B.address());

        let mut gauge = Gauge::start(self, destination, &[])?;
        self.source.watch().run("migrate", json!({ "uri": uri }))?;
        let end = gauge.watch(&self.source, destination, limit, || {
            let state = self.source.watch().run("query-migrate", json!({}))?;
            let why = || state["error-desc"].as_str().unwrap_or("QEMU does not say why").to_owned();
            Ok((state["status"] == "failed").then(why))
        })?;
        let run = gauge.finish(self, end)?;
        if run.end != End::Done {
            self.source.watch().run("migrate_cancel", json!({}))?;
            until("the end of a migration that was called off", PATIENCE, || {
                let state = self.source.watch().run("query-migrate", json!({}))?;
                Ok(matches!(state["status"].as_str(), Some("cancelled" | "failed" | "completed"))
                    .then_some(()))
            })?;
        }
        Ok(run)
    }

    /// By this path; with mapped RAM they are asked first what it would take.
    fn by_agents(
        &mut self,
        destination: &Qemu,
        (path, setting): (&'static str, Setting),
        limit: Duration,
    ) -> Result<Run> {
        let way = (path, setting.source());
        let folder = self.dir.path().join(format!("agents-{}", self.moves));
        fs::create_dir(&folder)?;
        let at = |end: LineEnd| AgentConfig {
            data: SocketAddr::new(end.address(), 0),
            namespace: Some(self.wan.namespace(end)),
            extra: ATTACHES.into(),
            ..AgentConfig::default()
        };
        // Fresh ones each time, so that their memory is that of one migration.
        let (a, b) = Agent::pair(&folder, at(LineEnd::A), at(LineEnd::B))?;
        let qmp = destination.qmp_path();
        b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &a.node()])?.success()?;

        let foretold = match setting {
            Setting::V3Mapped => Some(estimate(&a, &b, &self.source)?),
            _ => None,
        };
        // What the estimate sent is through.
        sleep(DRAIN);
        let pids: Vec<u32> = [&a, &b].into_iter().filter_map(Agent::pid).collect();
        let mut gauge = Gauge::start(self, destination, &pids)?;
        let id = format!("wan-{}", self.moves);
        let (source, moved) = (&self.source, || migrate(&a, &b, &self.source, &id, way, limit + PATIENCE));
        let (end, said) = std::thread::scope(|scope| -> Result<_> {
            let moving = scope.spawn(moved);
            let end =
                gauge.watch(source, destination, limit, || Ok(moving.is_finished().then(String::new)))?;
            if end == End::Late {
                a.ctl(&[&"cancel", &id])?;
            }
            let said = moving.join().map_err(|_| anyhow!("the thread with dwcpctl panicked"))??;
            Ok((end, said))
        })?;
        let end = match end {
            End::Failed(_) => End::Failed(said.stderr.trim().replace('\n', "; ")),
            end => end,
        };
        let done = end == End::Done;
        let mut run = Run { foretold, ..gauge.finish(self, end)? };
        if done {
            run.said = said.success()?.json().with_context(|| format!("{}\n{}", a.log(), b.log()))?;
            run.said["codecs"] = codecs(&a.http_get("/metrics")?);
            let (path, source) = way;
            let internet = path == "v1" || run.said["mode"] == "internet" && run.said["source"] == source;
            ensure!(run.said["path"] == path && internet, "not as asked for: {}", run.said);
        }
        Ok(run)
    }
}

fn migrate(
    a: &Agent,
    b: &Agent,
    source: &Qemu,
    id: &str,
    (path, pages): (&str, &str),
    limit: Duration,
) -> Result<CtlOutput> {
    let (qmp, to) = (source.qmp_path(), b.target()?);
    let downtime = format!("{}ms", DOWNTIME.as_millis());
    let qmp = qmp.display();
    a.ctl_within(
        limit,
        &[
            &"migrate",
            &VM,
            &"--qmp",
            &qmp,
            &"--to",
            &to,
            &"--id",
            &id,
            &"--path",
            &path,
            &"--source",
            &pages,
            &"--mode",
            &"internet",
            &"--downtime-limit",
            &downtime,
            &"--json",
        ],
    )
}

/// What `a` says that it would take to move the guest to `b`. Where it would not converge the program's status says so, too.
fn estimate(a: &Agent, b: &Agent, source: &Qemu) -> Result<Foretold> {
    let (qmp, to) = (source.qmp_path(), b.target()?);
    let downtime = format!("{}ms", DOWNTIME.as_millis());
    let qmp = qmp.display();
    let ask: [&dyn Display; 13] = [
        &"estimate",
        &VM,
        &"--qmp",
        &qmp,
        &"--to",
        &to,
        &"--path",
        &"v3",
        &"--mode",
        &"internet",
        &"--downtime-limit",
        &downtime,
        &"--json",
    ];
    Ok(serde_json::from_value(a.ctl_within(PATIENCE, &ask)?.json()?)?)
}

/// How many chunks each codec got, from an agent's metrics.
fn codecs(metrics: &str) -> Value {
    let chunks = metrics.lines().filter_map(|line| {
        let (codec, count) =
            line.strip_prefix("dwcp_v3_chunks_encoded_total{codec=\"")?.split_once("\"} ")?;
        let count = count.parse::<u64>().ok().filter(|&count| count > 0)?;
        Some((codec.to_owned(), Value::from(count)))
    });
    Value::Object(chunks.collect())
}

/// Tells both QEMUs what this setting needs, and takes back what an earlier one was told.
fn configure(source: &Qemu, destination: &Qemu, setting: Setting) -> Result<()> {
    let wanted = |name: &str| match name {
        "events" => true,
        "xbzrle" => setting == Setting::Xbzrle,
        "multifd" => setting.zstd().is_some(),
        _ => false,
    };
    for vm in [source, destination] {
        let known = vm.watch().run("query-migrate-capabilities", json!({}))?;
        let known = known.as_array().context("query-migrate-capabilities")?;
        let names = known.iter().filter_map(|capability| capability["capability"].as_str());
        let all: Vec<Value> =
            names.map(|name| json!({ "capability": name, "state": wanted(name) })).collect();
        vm.watch().run("migrate-set-capabilities", json!({ "capabilities": all }))?;
        let parameters = json!({
            "max-bandwidth": UNLIMITED,
            "avail-switchover-bandwidth": 0,
            "downtime-limit": DOWNTIME.as_millis() as u64,
            "xbzrle-cache-size": XBZRLE_CACHE,
            "multifd-channels": CHANNELS,
            "multifd-compression": if setting.zstd().is_some() { "zstd" } else { "none" },
            "multifd-zstd-level": setting.zstd().unwrap_or(1),
            "zero-page-detection": if setting.zstd().is_some() { "multifd" } else { "legacy" },
        });
        vm.watch().run("migrate-set-parameters", parameters)?;
        vm.watch().events().for_each(drop);
    }
    Ok(())
}

/// Everything that is measured of one move, from its start on.
struct Gauge {
    agents: Vec<u32>,
    vmms: [u32; 2],
    line: u32,
    started: Instant,
    /// Microseconds since the epoch: QEMU's stamps are of the same clock.
    began: u64,
    used: [Usage; 2],
    carried: u64,
    wrote: u64,
    stopped: Option<u64>,
    resumed: Option<u64>,
    anon: Vec<u64>,
}

impl Gauge {
    fn start(bench: &mut Bench, destination: &Qemu, agents: &[u32]) -> Result<Self> {
        let (vmms, line) = ([bench.source.pid(), destination.pid()], bench.wan.line_pid());
        Ok(Gauge {
            agents: agents.to_vec(),
            vmms,
            line,
            carried: bench.carried()?,
            wrote: bench.wrote()?,
            used: usage(agents, vmms, line)?,
            started: Instant::now(),
            began: SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros() as u64,
            stopped: None,
            resumed: None,
            anon: vec![0; agents.len()],
        })
    }

    /// Waits for the guest to run at the destination, for the time to be over, or for the end by `over`, which says why.
    fn watch(
        &mut self,
        source: &Qemu,
        destination: &Qemu,
        limit: Duration,
        mut over: impl FnMut() -> Result<Option<String>>,
    ) -> Result<End> {
        loop {
            // Asked first, so that what happened before the end is among the events.
            let over = over()?;
            let last = |vm: &Qemu, name: &str| -> Result<Option<u64>> {
                // The answer brings the events with it.
                vm.status()?;
                let events: Vec<Event> = vm.watch().events().collect();
                Ok(events.iter().rfind(|event| event.name == name).map(|event| event.micros))
            };
            self.stopped = last(source, "STOP")?.or(self.stopped);
            self.resumed = last(destination, "RESUME")?.or(self.resumed);
            for (peak, pid) in self.anon.iter_mut().zip(&self.agents) {
                *peak = anon_bytes(*pid)?.max(*peak);
            }
            match (self.resumed, over) {
                (Some(_), _) => return Ok(End::Done),
                (None, Some(why)) => return Ok(End::Failed(why)),
                (None, None) if self.started.elapsed() > limit => return Ok(End::Late),
                (None, None) => sleep(LOOK),
            }
        }
    }

    fn finish(self, bench: &mut Bench, end: End) -> Result<Run> {
        let [all, line] = usage(&self.agents, self.vmms, self.line)?;
        let (all, line) = (all.since(self.used[0]), line.since(self.used[1]).movers);
        let elapsed = self.started.elapsed().as_secs_f64();
        let until = |stamp: Option<u64>| {
            stamp.map_or(elapsed, |micros| micros.saturating_sub(self.began) as f64 / 1e6)
        };
        let between = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e3;
        let at_source = if self.stopped.is_some() { until(self.stopped) } else { elapsed };
        Ok(Run {
            seconds: if end == End::Done { until(self.resumed) } else { elapsed },
            downtime_ms: self.stopped.zip(self.resumed).map(|(from, to)| between(from, to)),
            end,
            wire_bytes: bench.carried()?.saturating_sub(self.carried),
            rewrites: bench.wrote()?.saturating_sub(self.wrote) as f64 / at_source,
            machine: all.machine - line,
            agents: all.movers,
            others: (all.machine - all.movers - all.vmms - line).max(0.0) + all.stolen,
            anon_bytes: <[u64; 2]>::try_from(self.anon).ok(),
            said: Value::Null,
            foretold: None,
        })
    }
}

impl Bench {
    /// The guest under way, in the words of a table.
    pub(super) fn guest(&self) -> Guest {
        self.guest
    }

    /// Bytes that the line has delivered so far.
    fn carried(&mut self) -> Result<u64> {
        Ok(self.wan.count()?.iter().map(|count| count.bytes).sum())
    }

    /// Pages that the guest at the source says it has rewritten.
    fn wrote(&self) -> Result<u64> {
        Ok(self.source.serial().last()?.map_or(0, |report| report.wrote))
    }
}

/// What agents and VMMs have used, and what the line has.
fn usage(agents: &[u32], vmms: [u32; 2], line: u32) -> Result<[Usage; 2]> {
    Ok([Usage::sample(agents, &vmms)?, Usage::sample(&[line], &[])?])
}

/// Anonymous memory of a process, from `/proc/PID/status`: mapped guest RAM is none.
fn anon_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no RssAnon of process {pid}"))? << 10)
}
