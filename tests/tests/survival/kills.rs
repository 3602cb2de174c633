//! `kill -9` of each of the four processes, at each named moment of the handover and at random ones. The end is one
//! running guest, and never two on the way.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dwcp_tests::{
    AgentConfig, CtlOutput, Ending, SimGuest, SimScene, Victim, never_both, soak_count, soak_report, until,
};
use serde_json::Value;

/// For an agent to come to its fault point, and for everything to come to its end after a kill.
const LIMIT: Duration = Duration::from_secs(60);
/// Scenes at a time: each has four processes, most of which wait.
const ABREAST: usize = 3;
/// Random kills in an ordinary run of the tests; `cargo xtask soak` makes more.
const RANDOM: u64 = 12;

/// A moment at which an agent dies, and who has the guest in the end.
struct Moment {
    at: &'static str,
    /// The migration is cancelled on the way.
    cancelled: bool,
    ending: Ending,
}

const fn stays(at: &'static str) -> Moment {
    Moment { at, cancelled: false, ending: Ending::Stayed }
}

const fn moves(at: &'static str) -> Moment {
    Moment { at, cancelled: false, ending: Ending::Moved }
}

const fn cancelled(at: &'static str) -> Moment {
    Moment { at, cancelled: true, ending: Ending::Stayed }
}

/// The source has written nothing down yet, so it comes back knowing nothing; the destination has agreed to a session and
/// waits for it, for as long as it would for a dark link. An operator may end that wait.
const FORGOTTEN: &str = "before.journal.Prepared";

const SOURCE: [Moment; 16] = [
    stays("before.journal.Prepared"),
    stays("after.journal.Prepared"),
    stays("before.vmm.StartMigration"),
    stays("before.journal.Commit"),
    moves("after.journal.Commit"),
    moves("before.send.Commit"),
    moves("after.send.Commit"),
    moves("before.journal.Done"),
    moves("after.journal.Done"),
    moves("before.send.Settled"),
    moves("after.send.Settled"),
    cancelled("before.send.Abort"),
    cancelled("before.vmm.CancelMigration"),
    cancelled("after.vmm.CancelMigration"),
    cancelled("before.journal.Aborted"),
    cancelled("after.journal.Aborted"),
];

const DESTINATION: [Moment; 21] = [
    stays("before.journal.Accepted"),
    stays("after.journal.Accepted"),
    stays("before.vmm.StopWhileIncoming"),
    stays("after.vmm.StopWhileIncoming"),
    stays("before.vmm.AcceptStream"),
    stays("before.journal.Receipt"),
    moves("after.journal.Receipt"),
    moves("before.send.Receipt"),
    moves("after.send.Receipt"),
    moves("before.journal.Starting"),
    moves("after.journal.Starting"),
    moves("before.vmm.Cont"),
    moves("after.vmm.Cont"),
    moves("before.journal.Running"),
    moves("after.journal.Running"),
    moves("before.send.Running"),
    moves("after.send.Running"),
    moves("before.vmm.AnnounceSelf"),
    cancelled("before.journal.NeverRan"),
    cancelled("after.journal.NeverRan"),
    cancelled("before.send.NeverRan"),
];

#[test]
fn a_source_agent_that_dies_at_any_moment() -> Result<()> {
    at_each("a_source_agent_that_dies_at_any_moment", Victim::SourceAgent, &SOURCE)
}

#[test]
fn a_destination_agent_that_dies_at_any_moment() -> Result<()> {
    at_each("a_destination_agent_that_dies_at_any_moment", Victim::DestinationAgent, &DESTINATION)
}

#[test]
fn any_process_killed_at_random() -> Result<()> {
    if !SimScene::possible("any_process_killed_at_random") {
        return Ok(());
    }
    let kills = soak_count("KILLS", RANDOM);
    let failed = abreast(kills, |number| random_kill(number).with_context(|| format!("kill {number}")));
    soak_report("random kills, simulated guest", kills, failed.len() as u64)?;
    ensure!(failed.is_empty(), "{} of {kills} failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

/// One migration for each of the moments, each with agents of its own.
fn at_each(test: &str, victim: Victim, moments: &[Moment]) -> Result<()> {
    if !SimScene::possible_with_fault_points(test) {
        return Ok(());
    }
    let failed = abreast(moments.len() as u64, |number| {
        let moment = &moments[number as usize];
        die_at(victim, moment).context(moment.at)
    });
    ensure!(failed.is_empty(), "{} of {} moments:\n{}", failed.len(), moments.len(), failed.join("\n"));
    Ok(())
}

/// Does this `n` times, some at a time, and gives what failed.
fn abreast(n: u64, each: impl Fn(u64) -> Result<()> + Sync) -> Vec<String> {
    let (next, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..ABREAST {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= n {
                        return;
                    }
                    if let Err(error) = each(number) {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn die_at(victim: Victim, moment: &Moment) -> Result<()> {
    let faulty = AgentConfig {
        program: "dwcpd-faulty",
        env: vec![("DWCP_FAULT", moment.at.to_owned())],
        ..AgentConfig::default()
    };
    let (a, b) = match victim {
        Victim::SourceAgent => (faulty, AgentConfig::default()),
        _ => (AgentConfig::default(), faulty),
    };
    let mut scene = SimScene::with(SimGuest::default(), a, b)?;
    scene.incoming()?;
    let limit = if moment.cancelled { &["--bandwidth-limit", "8Mbit"][..] } else { &[] };
    // The agent may die before it answers.
    scene.begin("m1", limit)?;
    if moment.cancelled {
        until("precopy", LIMIT, || Ok((status(&scene, "m1")? == "precopy").then_some(())))?;
        scene.a.ctl(&[&"cancel", &"m1"])?;
    }
    let agent = if victim == Victim::SourceAgent { &mut scene.a } else { &mut scene.b };
    let ended = agent.ended_within(LIMIT)?;
    ensure!(ended.is_some(), "the moment never came\n{}", scene.logs());
    let config = agent.config_mut();
    (config.program, config.env) = ("dwcpd", Vec::new());
    agent.start()?;

    if moment.at == FORGOTTEN {
        scene.b.ctl(&[&"cancel", &"m1"])?.success()?;
    }
    let ending = scene.ending("m1")?;
    ensure!(ending == moment.ending, "the guest has {ending:?}\n{}", scene.logs());
    nothing_is_left(&scene)?;
    if ending == Ending::Stayed { scene.again() } else { Ok(()) }
}

/// Kills one of the four at a random moment of a migration, from before it begins until after it has ended.
fn random_kill(number: u64) -> Result<()> {
    let mut random = Random(0x5eed ^ number);
    let victim = Victim::ALL[random.below(4) as usize];
    let path = ["v1", "v3"][random.below(2) as usize];
    let mut scene = SimScene::new()?;
    scene.incoming()?;
    // An undisturbed migration takes some 0.3 s here; slow ones are killed in precopy, quick ones in the handover too.
    let limit = ["40Mbit", "400Mbit", "4Gbit"][random.below(3) as usize];
    scene.begin("m1", &["--path", path, "--bandwidth-limit", limit])?.success()?;
    let delay = Duration::from_micros(random.below(500_000));
    let what = format!("{victim:?} over {path} at {limit} after {delay:?}");
    std::thread::sleep(delay);
    scene.kill(victim);
    match victim {
        Victim::SourceAgent => scene.a.start()?,
        Victim::DestinationAgent => scene.b.start()?,
        Victim::SourceVmm | Victim::DestinationVmm => {}
    }
    judge(&mut scene, victim).with_context(|| format!("{what}\n{}", scene.logs()))
}

/// After a kill: one guest runs, or the guest died with its VMM, or what is in doubt says how to end that.
fn judge(scene: &mut SimScene, victim: Victim) -> Result<()> {
    if matches!(victim, Victim::SourceAgent | Victim::DestinationAgent) {
        if victim == Victim::SourceAgent && status(scene, "m1")? == "unknown" {
            // See `FORGOTTEN`; or it never came to a session, and there is nothing to cancel.
            scene.b.ctl(&[&"cancel", &"m1"])?;
        }
        // In doubt they may be for a while, but not for good: both agents are back.
        return if scene.ending("m1")? == Ending::Stayed { scene.again() } else { Ok(()) };
    }
    let settled = until("the end of the migration", LIMIT, || {
        let said = [status(scene, "m1")?, at_destination(scene)?];
        let over = said
            .iter()
            .all(|s| ["completed", "aborted", "failed", "unknown", "in_doubt"].contains(&s.as_str()));
        Ok(over.then_some(said))
    })?;
    never_both(&scene.from, &scene.to)?;
    if victim == Victim::SourceVmm {
        // The guest has moved before, or died with its VMM; a part of it never runs.
        let to = scene.to.state();
        let runs = to.as_ref().is_ok_and(|state| state.run == "running");
        ensure!(!runs || to?.guest.is_some(), "a part of a guest runs: {settled:?}");
        ensure!(runs || settled[0] != "completed", "nobody has the guest: {settled:?}");
        return Ok(());
    }
    match (scene.from.is_running(), !scene.to.ran()?.is_empty()) {
        (true, false) => scene.again(),
        (false, true) => Ok(()),
        // Told to start, and dead before anybody could see whether it did: an operator decides.
        (false, false) => resolvable(scene).with_context(|| format!("{settled:?}")),
        (true, true) => bail!("both have had the guest: {settled:?}"),
    }
}

/// The source's agent tells how to end the doubt; so does the operator, and the guest runs.
fn resolvable(scene: &SimScene) -> Result<()> {
    scene.a.ctl(&[&"resolve", &"m1", &"--start-here", &"--peer-fenced", &"--yes"])?.success()?;
    until("the guest to run", LIMIT, || Ok(scene.from.is_running().then_some(())))
}

/// What the source says of a migration; `unknown` where it knows none.
fn status(scene: &SimScene, id: &str) -> Result<String> {
    word(scene.a.ctl(&[&"status", &id, &"--json"])?)
}

fn at_destination(scene: &SimScene) -> Result<String> {
    word(scene.b.ctl(&[&"status", &"m1", &"--json"])?)
}

fn word(said: CtlOutput) -> Result<String> {
    if said.status != Some(0) {
        return Ok("unknown".to_owned());
    }
    let status: Value = said.json()?;
    Ok(status["status"].as_str().unwrap_or_default().to_owned())
}

/// I4: no socket of the migration is left.
fn nothing_is_left(scene: &SimScene) -> Result<()> {
    for agent in [&scene.a, &scene.b] {
        let run = agent.state_dir().join("run");
        let Ok(left) = std::fs::read_dir(&run) else { continue };
        let left: Vec<_> = left.flatten().map(|entry| entry.file_name()).collect();
        ensure!(left.is_empty(), "left behind in {}: {left:?}", run.display());
    }
    Ok(())
}

/// SplitMix64 (Steele, Lea, Flood 2014).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
