//! A migration whose flag is turned in the middle, as an operator would: by writing the flag's file.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::agent::{ATTACHES, AgentConfig};
use crate::guest::GuestLoad;
use crate::kit::{Kit, QemuVersion};
use crate::qemu::{Backing, QemuSpec, Role};
use crate::ram;
use crate::relay::Relay;
use crate::scene::Scene;
use crate::wait::until;
use crate::watch::Watcher;

/// For one turn to be seen. The promise is five seconds from the flag; the machine may be slow.
const TURN: Duration = Duration::from_secs(15);
/// After a path was left nothing may go out on it from then on.
const QUIET: Duration = Duration::from_secs(1);
/// How long the guest checks its memory afterwards.
const CHECKED: Duration = Duration::from_secs(5);

/// What is done to one migration.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which QEMU.
    pub version: QemuVersion,
    /// The guest runs and writes; otherwise it is paused, and its RAM is compared.
    pub live: bool,
    /// Bytes on the link at which each turn comes: off, on, off, and so on.
    pub at: Vec<u64>,
    /// The link is cut before the first turn, and mended after it was ordered.
    pub cut: bool,
    /// On the wire.
    pub bandwidth: String,
    /// From QEMU to its agent: 1, or so many with multifd.
    pub channels: u8,
    /// The agent reads the guest's RAM itself.
    pub direct: bool,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The last line of `dwcpctl migrate --json`.
    pub result: Value,
    /// For each turn to v1, seconds from the flag's file to the agent's word that it is on v1.
    pub seconds_to_v1: Vec<f64>,
    /// v3 bytes that went out later than a second after that word.
    pub late_v3_bytes: u64,
}

/// Carries the plan out. All claims are checked: the guest's memory, its owner at every moment, the agent's figures.
///
/// # Errors
/// Whatever does not hold, with the agents' logs.
pub fn turn_in_flight(kit: &Kit, plan: &Plan) -> Result<Outcome> {
    let flags = tempfile::tempdir()?;
    let flag = Flag(flags.path().join("flag.json"));
    flag.turn(true)?;
    let mut config = AgentConfig { flags: format!("file:{}", flag.0.display()), ..AgentConfig::default() };
    let mut spec = QemuSpec::new(plan.version, Role::Source);
    if plan.direct {
        config.extra = ATTACHES.into();
        spec.backing = Backing::shared_file();
    }
    spec.load = GuestLoad { rate: 200, ..GuestLoad::default() };
    // The destination's own flag stays on: one hand turns.
    let mut scene = Scene::with(kit, spec.clone(), config, AgentConfig::default())?;
    if !plan.live {
        scene.from.watch().run("stop", serde_json::json!({}))?;
    }
    let relay = Relay::start(scene.b.listen()?.data)?;
    scene.via = Some(relay.address());
    let watcher = plan.live.then(|| Watcher::start(&[&scene.from, &scene.to])).transpose()?;
    scene.incoming()?.success()?;

    let hand = Mutex::new(Hand::default());
    let channels = plan.channels.to_string();
    let slow = ["--mode", "internet", "--bandwidth-limit", &plan.bandwidth, "--downtime-limit", "500ms"];
    let source = if plan.direct { "direct" } else { "auto" };
    let arguments = [&slow[..], &["--channels", &channels, "--source", source, "--id", ID]].concat();
    let result = std::thread::scope(|scope| {
        let turner = scope.spawn(|| turn(&scene, &relay, &flag, plan, &hand));
        let result = scene.migrate(&arguments)?.success()?.json();
        let turned = turner.join().map_err(|_| anyhow::anyhow!("the turning thread failed"))?;
        turned.and(result)
    });
    let result = result.with_context(|| scene.logs())?;
    let hand = hand.into_inner().unwrap_or_default();

    ensure!(result["status"] == "completed", "{result}");
    ensure!(result["path_switches"] == plan.at.len(), "turns were missed: {result}\n{}", scene.logs());
    match watcher {
        Some(watcher) => {
            scene.to.guest_ok_for(CHECKED).with_context(|| format!("{result}\n{}", scene.logs()))?;
            watcher.finish()?;
        }
        None => {
            let difference = ram::compare(&scene.from, &scene.to, spec.ram_bytes())?;
            ensure!(difference.is_none(), "the RAM differs: {difference:?}\n{result}");
        }
    }
    Ok(Outcome { result, seconds_to_v1: hand.seconds_to_v1, late_v3_bytes: hand.late_v3_bytes })
}

const ID: &str = "turned";

/// What the turning thread saw.
#[derive(Debug, Default)]
struct Hand {
    seconds_to_v1: Vec<f64>,
    late_v3_bytes: u64,
}

/// Turns the flag at each moment of the plan, and looks on.
fn turn(scene: &Scene, relay: &Relay, flag: &Flag, plan: &Plan, hand: &Mutex<Hand>) -> Result<()> {
    for (n, &at) in plan.at.iter().enumerate() {
        let switches = n as u64 + 1;
        until("the moment of the turn", Duration::from_secs(120), || {
            Ok((relay.passed() >= at).then_some(()))
        })?;
        if n == 0 && plan.cut {
            relay.cut();
        }
        let on = n % 2 == 1;
        let turned = Instant::now();
        flag.turn(on)?;
        if on {
            // By itself the node waits for a minute or more before it returns; an operator need not. What the agent has not
            // read yet it refuses.
            until("the operator's switch to be taken", TURN, || {
                let asked = scene.a.ctl(&[&"switch", &ID, &"--path", &"v3"])?;
                Ok((asked.status == Some(0)).then_some(()))
            })?;
        }
        if n == 0 && plan.cut {
            // v3 is left while nobody hears of it.
            let left = until("v3 to fall silent during the cut", TURN, || silent(scene))?;
            relay.mend();
            ensure!(left == sent(scene)?, "v3 bytes went out during the cut");
        }
        until("the path to change", TURN, || Ok((switched(scene)? >= switches).then_some(())))?;
        if !on {
            let before = sent(scene)?;
            lock(hand).seconds_to_v1.push(turned.elapsed().as_secs_f64());
            // Not a blind wait: the promise is about what happens in this time.
            std::thread::sleep(QUIET);
            lock(hand).late_v3_bytes += sent(scene)? - before;
        }
    }
    Ok(())
}

fn lock(hand: &Mutex<Hand>) -> std::sync::MutexGuard<'_, Hand> {
    hand.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// v3 bytes that the source has sent, once that number stands still.
fn silent(scene: &Scene) -> Result<Option<u64>> {
    let before = sent(scene)?;
    std::thread::sleep(Duration::from_millis(500));
    Ok((sent(scene)? == before).then_some(before))
}

/// v3 bytes that the source has sent, by its own count.
fn sent(scene: &Scene) -> Result<u64> {
    sum(scene, "dwcp_v3_bytes_wire_total")
}

/// Changes of path that the source has made, by its own count.
fn switched(scene: &Scene) -> Result<u64> {
    sum(scene, "dwcp_path_switches_total")
}

fn sum(scene: &Scene, name: &str) -> Result<u64> {
    let metrics = scene.a.http_get("/metrics")?;
    let values = metrics.lines().filter(|line| line.starts_with(name) && line[name.len()..].starts_with('{'));
    values.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<u64>()?)).sum()
}

/// The flag's file.
struct Flag(PathBuf);

impl Flag {
    /// Replaces the file at once, as an operator's tool would.
    fn turn(&self, on: bool) -> Result<()> {
        let mut text = String::new();
        write!(text, r#"{{"feature":"dwcp_v3_hde","percentage":100,"enabled":{on}}}"#)?;
        let fresh: &Path = &self.0.with_extension("new");
        fs::write(fresh, text)?;
        Ok(fs::rename(fresh, &self.0)?)
    }
}
