//! Faults of what is around the agents: a middlebox that swallows, a disk that does not sync, a clock that jumps, a memory limit.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dwcp_tests::{
    AgentConfig, Ending, Kit, MemoryGroup, Relay, Seen, SimGuest, SimScene, fault_report, never_both, until,
};
use serde_json::Value;

/// For anything to happen that is to happen.
const LIMIT: Duration = Duration::from_secs(60);
/// A migration at this rate takes some seconds: what is to go wrong goes wrong in the middle of it, though its status comes once a second.
const SLOW: [&str; 2] = ["--bandwidth-limit", "12Mbit"];

/// One connection stays open at both ends, and nothing comes through any more. What was on it goes over another one.
#[test]
fn a_stream_that_stalls() -> Result<()> {
    if !SimScene::possible("a_stream_that_stalls") {
        return Ok(());
    }
    for path in [["v3", "3"], ["v1", "1"]] {
        let mut scene = SimScene::new()?;
        let relay = Relay::start(scene.b.listen()?.data)?;
        scene.via = Some(format!("b={}", relay.address()));
        scene.incoming()?;
        let mut stalled = None;
        let arguments = [SLOW[0], SLOW[1], "--path", path[0], "--streams", path[1], "--deadline", "60s"];
        let said = scene.migrate_watched(&arguments, |_| {
            if relay.passed() > 1 << 20 && stalled.is_none() {
                relay.stall_busiest();
                stalled = Some((Instant::now(), relay.passed()));
            }
        })?;
        let result = said.success().with_context(|| scene.logs())?.json()?;
        ensure!(stalled.is_some(), "it was over before anything could stall: {result}");
        ensure!(result["reconnects"].as_u64() > Some(0), "the stall was not noticed: {result}");
        ensure!(result["path_switches"] == 0, "{result}");
        ensure!(scene.ending_of_guests()? == Ending::Moved);
        scene.same_guest()?;
        fault_report("stalled_stream", &format!("dwcp {}", path[0]), "moved, guest right", Seen::default())?;
    }
    Ok(())
}

/// The disk takes the line that decides, and does not sync it: it counts as not written.
#[test]
fn a_disk_that_does_not_sync() -> Result<()> {
    if !SimScene::possible_with_fault_points("a_disk_that_does_not_sync") {
        return Ok(());
    }
    let broken = |line: &str| AgentConfig {
        program: "dwcpd-faulty",
        env: vec![("DWCP_FAULT", format!("fails.sync.{line}"))],
        ..AgentConfig::default()
    };
    let healthy = AgentConfig::default();
    let cases = [
        ("Prepared", broken("Prepared"), healthy.clone()),
        ("Commit", broken("Commit"), healthy.clone()),
        ("Accepted", healthy.clone(), broken("Accepted")),
        ("Receipt", healthy.clone(), broken("Receipt")),
    ];
    for (line, a, b) in cases {
        let mut scene = SimScene::with(SimGuest::default(), a, b)?;
        // An agent that cannot write refuses, or ends it with the guest at the source; it never says that the guest moved.
        let begun = scene.incoming().and_then(|()| scene.migrate(&["--id", "m1", "--deadline", "10s"]));
        if let Ok(said) = &begun {
            ensure!(said.status != Some(0), "{line}: {said:?}");
        }
        let logs = || format!("{line}: {begun:?}\n{}", scene.logs());
        never_both(&scene.from, &scene.to)?;
        until("the guest at the source", LIMIT, || Ok(scene.from.is_running().then_some(())))
            .with_context(logs)?;
        ensure!(scene.ending_of_guests()? == Ending::Stayed, "{}", logs());
        // With a disk that syncs, the same agents move it.
        for agent in [&mut scene.a, &mut scene.b] {
            agent.kill();
            agent.config_mut().env.clear();
            agent.start()?;
        }
        scene.again().with_context(|| format!("{line}: {}", scene.logs()))?;
    }
    fault_report("fsync_eio", "dwcp v3", "guest at the source", Seen::default())
}

/// The source's wall clock jumps ten years ahead, the destination's an hour back, in the middle of a migration.
#[test]
fn a_clock_that_jumps() -> Result<()> {
    let test = "a_clock_that_jumps";
    if !SimScene::possible(test) {
        return Ok(());
    }
    let Some(kit) = Kit::or_skip(test) else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let clocks = ["a", "b"].map(|node| dir.path().join(node));
    let config = |clock: &std::path::Path| -> Result<AgentConfig> {
        std::fs::write(clock, "+0d")?;
        let env = vec![
            ("LD_PRELOAD", kit.faketime().display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", clock.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ];
        Ok(AgentConfig { env, ..AgentConfig::default() })
    };
    // More than the agents and their sockets hold: precopy must still be going on when the clocks jump.
    let guest = SimGuest { pages: 16 << 10, ..SimGuest::default() };
    let mut scene = SimScene::with(guest, config(&clocks[0])?, config(&clocks[1])?)?;
    scene.incoming()?;
    let mut jumped = false;
    let said = scene.migrate_watched(
        &["--bandwidth-limit", "64Mbit", "--id", "m1", "--deadline", "60s"],
        |line| {
            let status: Value = serde_json::from_str(line).unwrap_or_default();
            if status["status"] == "precopy" && !jumped {
                let set =
                    std::fs::write(&clocks[0], "+3650d").and_then(|()| std::fs::write(&clocks[1], "-3600"));
                jumped = set.is_ok();
            }
        },
    )?;
    let result = said.success().with_context(|| scene.logs())?.json()?;
    ensure!(jumped, "it was over before the clocks could jump: {result}");
    let seconds = result["total_seconds"].as_f64().unwrap_or(f64::MAX);
    ensure!(seconds < 60.0, "a jump of the clock counted as time: {result}");
    ensure!(scene.ending_of_guests()? == Ending::Moved);
    // The journal tells that the clock was another one, and is read all the same.
    let story = scene.a.ctl(&[&"explain", &"m1", &"--json"])?.success()?.json()?;
    let moments = story["sides"][0]["timeline"].as_array().cloned().unwrap_or_default();
    let times: Vec<u64> = moments.iter().filter_map(|moment| moment["unix_ms"].as_u64()).collect();
    let years = |ms: u64| ms / (365 * 24 * 3600 * 1000);
    ensure!(
        times.windows(2).any(|pair| years(pair[1].saturating_sub(pair[0])) >= 9),
        "the clock did not jump: {story}"
    );
    // After a restart under the new clocks, too.
    for agent in [&mut scene.a, &mut scene.b] {
        agent.kill();
        agent.start()?;
    }
    fault_report("clock", "dwcp v3", "moved, guest right", Seen::default())
}

/// The destination's agent may hardly take any memory beyond what it has when the migration begins.
#[test]
fn an_agent_short_of_memory() -> Result<()> {
    const SPARE: u64 = 6 << 20;
    let test = "an_agent_short_of_memory";
    if !SimScene::possible(test) {
        return Ok(());
    }
    let mut scene = SimScene::with(
        SimGuest { pages: 16 << 10, zero_percent: 0, ..SimGuest::default() },
        AgentConfig::default(),
        AgentConfig::default(),
    )?;
    let group = match MemoryGroup::new(SPARE) {
        Ok(group) => group,
        Err(why) => {
            dwcp_tests::skip(test, &format!("{why:#}"));
            return Ok(());
        }
    };
    scene.incoming()?;
    group.add(scene.b.pid().context("b runs")?)?;
    let said = scene.migrate(&["--deadline", "20s"])?;
    never_both(&scene.from, &scene.to)?;
    let ending = scene.ending_of_guests()?;
    ensure!((said.status == Some(0)) == (ending == Ending::Moved), "{said:?}\n{}", scene.logs());
    let result = match ending {
        Ending::Moved => "moved within the limit",
        Ending::Stayed => "guest at the source",
    };
    fault_report("memory", "dwcp v3", result, Seen::default())?;
    // Without the limit it moves.
    scene.b.kill();
    drop(group);
    scene.b.start()?;
    if ending == Ending::Stayed { scene.again() } else { Ok(()) }
}
