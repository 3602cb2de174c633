//! Precopy outlives its agents: the destination's is killed in the middle and comes back.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{Agent, AgentConfig, GuestLoad, QemuSpec, QemuVersion, Relay, Role, Scene, Watcher, until};
use serde_json::Value;

/// Bytes on the link at which the destination's agent is killed: in the first round, and again some time later.
const KILLS: [u64; 2] = [8 << 20, 20 << 20];
/// For that moment to come.
const COMES: Duration = Duration::from_secs(60);

#[test]
fn v3_goes_on_after_the_destinations_agent_was_killed_twice() -> Result<()> {
    let name = "v3_goes_on_after_the_destinations_agent_was_killed_twice";
    killed(name, QemuVersion::V10_0, &["--path", "v3", "--mode", "internet", "--bandwidth-limit", "60Mbit"])
}

#[test]
fn v1_goes_on_after_the_destinations_agent_was_killed_twice() -> Result<()> {
    let name = "v1_goes_on_after_the_destinations_agent_was_killed_twice";
    killed(name, QemuVersion::V7_2, &["--path", "v1", "--bandwidth-limit", "160Mbit"])
}

fn killed(name: &str, version: QemuVersion, arguments: &[&str]) -> Result<()> {
    let Some(kit) = Scene::kit_or_skip(name) else { return Ok(()) };
    let mut spec = QemuSpec::new(version, Role::Source);
    spec.load = GuestLoad { rate: 200, ..GuestLoad::default() };
    let attaches = AgentConfig { extra: "[vmm]\nattach = \"ptrace\"\n".into(), ..AgentConfig::default() };
    let mut scene = Scene::with(&kit, spec, AgentConfig::default(), attaches)?;
    // The next life listens where the first did.
    let listens = scene.b.listen()?.data;
    scene.b.config_mut().data = listens;
    let relay = Relay::start(listens)?;
    scene.via = Some(relay.address());
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    scene.incoming()?.success()?;

    let Scene { a, b, from, .. } = &mut scene;
    let (qmp, target) = (from.qmp_path().display().to_string(), format!("b={}", relay.address()));
    let result: Result<Value> = std::thread::scope(|scope| {
        let mut line: Vec<&dyn std::fmt::Display> = vec![&"migrate", &dwcp_tests::VM, &"--qmp", &qmp];
        line.extend([&"--to" as &dyn std::fmt::Display, &target, &"--downtime-limit", &"500ms", &"--json"]);
        line.extend(arguments.iter().map(|word| word as &dyn std::fmt::Display));
        let line: Vec<String> = line.iter().map(ToString::to_string).collect();
        let a: &Agent = a;
        let moving = scope.spawn(move || a.ctl(&line.iter().map(|word| word as _).collect::<Vec<_>>()));
        // Here, since an agent dies with the thread that started it.
        for at in KILLS {
            until("the moment to kill", COMES, || Ok((relay.passed() >= at).then_some(())))?;
            b.kill();
            b.start()?;
        }
        moving.join().map_err(|_| anyhow::anyhow!("the migrating thread failed"))??.success()?.json()
    });
    let result = result.with_context(|| scene.logs())?;
    ensure!(result["status"] == "completed" && result["path_switches"] == 0, "{result}");
    scene.to.guest_ok_for(Duration::from_secs(5)).with_context(|| format!("{result}\n{}", scene.logs()))?;
    watcher.finish()?;
    let told = scene.a.ctl(&[&"explain", &result["id"].as_str().unwrap_or_default()])?.stdout;
    ensure!(told.matches("peer_restarted").count() == 2 * KILLS.len(), "both ends tell each: {told}");
    Ok(())
}
