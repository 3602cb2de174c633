//! The main job: a guest goes from one agent to the other, on both paths, between QEMUs of both versions.

use std::time::Duration;

use anyhow::{Context, Result};
use dwcp_tests::{AgentConfig, QemuSpec, QemuVersion, Role, Scene, Watcher, ram};
use serde_json::{Value, json};

/// How long the guest is followed at its new place.
const AFTER: Duration = Duration::from_secs(10);

/// A test for each version and path.
macro_rules! matrix {
    ($($name:ident: $case:ident($version:ident, $path:literal);)+) => {
        $(#[test]
        fn $name() -> Result<()> {
            let Some(kit) = Scene::kit_or_skip(stringify!($name)) else { return Ok(()) };
            $case(Scene::new(&kit, QemuVersion::$version)?, $path)
        })+
    };
}

matrix! {
    live_guest_over_v1_qemu_7_2: live(V7_2, "v1");
    live_guest_over_v3_qemu_7_2: live(V7_2, "v3");
    live_guest_over_v1_qemu_10_0: live(V10_0, "v1");
    live_guest_over_v3_qemu_10_0: live(V10_0, "v3");
    paused_guest_over_v1_qemu_7_2: paused(V7_2, "v1");
    paused_guest_over_v3_qemu_7_2: paused(V7_2, "v3");
    paused_guest_over_v1_qemu_10_0: paused(V10_0, "v1");
    paused_guest_over_v3_qemu_10_0: paused(V10_0, "v3");
    there_and_back_qemu_10_0: there_and_back(V10_0, "v3");
}

/// A test for each further way that bytes can take, with a paused guest: name, QEMU, both agents' policy, arguments, and
/// what the result must say of path, mode and encryption.
macro_rules! ways {
    ($($name:ident: $version:ident, $config:expr, $arguments:expr, $way:expr;)+) => {
        $(#[test]
        fn $name() -> Result<()> {
            let Some(kit) = Scene::kit_or_skip(stringify!($name)) else { return Ok(()) };
            let spec = QemuSpec::new(QemuVersion::$version, Role::Source);
            let scene = Scene::with(&kit, spec, $config, $config)?;
            let result = paused_by(&scene, &$arguments)?;
            let way = ["path", "mode", "encryption"].map(|key| result[key].as_str().unwrap_or_default());
            assert_eq!(way, $way, "{result}");
            let leg = format!("dwcp_legs_total{{path=\"{}\",encryption=\"{}\",transport=\"tcp\"}} 1", way[0], way[2]);
            let metrics = scene.a.http_get("/metrics")?;
            assert!(metrics.lines().any(|line| line == leg), "{leg}: {metrics}");
            check_result(&result, way[0])
        })+
    };
}

ways! {
    paused_guest_over_v1_in_the_plain: V10_0, AgentConfig { v1_plain: true, ..AgentConfig::default() },
        ["--path", "v1", "--mode", "datacenter"], ["v1", "", "none"];
    paused_guest_over_v3_in_the_plain: V10_0, AgentConfig { datacenter_encryption: "none", ..AgentConfig::default() },
        ["--path", "v3", "--mode", "datacenter"], ["v3", "datacenter", "none"];
    // What the policy allows within a datacenter has no effect across sites.
    paused_guest_over_v3_internet_qemu_7_2: V7_2, AgentConfig { datacenter_encryption: "none", ..AgentConfig::default() },
        ["--path", "v3", "--mode", "internet"], ["v3", "internet", "tls"];
}

/// The guest rewrites its memory all the while; afterwards it finds no wrong page, and the two never ran at once.
fn live(scene: Scene, path: &str) -> Result<()> {
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let result = scene.move_guest(&["--path", path])?;
    scene.to.guest_ok_for(AFTER).with_context(|| format!("{result}\n{}", scene.logs()))?;
    let timeline = watcher.finish()?;

    assert_eq!(scene.from.status()?, "postmigrate", "the source's copy is kept, and does not run");
    check_result(&result, path)?;
    // What the agent says about the downtime is a bound: never less than what the VMMs themselves stamped.
    let seen = timeline.downtime(0, 1)?.as_secs_f64() * 1e3;
    let said = result["downtime_ms"].as_f64().context("downtime_ms")?;
    assert!(
        said >= seen && said < seen + 1000.0,
        "the agent says {said} ms, the VMMs {seen} ms:\n{timeline}"
    );
    Ok(())
}

fn paused(scene: Scene, path: &str) -> Result<()> {
    check_result(&paused_by(&scene, &["--path", path])?, path)
}

/// A guest that was paused stays paused, and its memory is the same to the byte on both sides.
fn paused_by(scene: &Scene, arguments: &[&str]) -> Result<Value> {
    scene.from.watch().run("stop", json!({}))?;
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let result = scene.move_guest(arguments)?;
    let timeline = watcher.finish()?;

    assert!(timeline.moments.iter().all(|moment| moment.what != "RESUME"), "{timeline}");
    assert_eq!(scene.to.status()?, "paused");
    assert_eq!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?, None);
    scene.to.watch().run("cont", json!({}))?;
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    Ok(result)
}

/// A second migration of the same VM between the same agents, the other way.
fn there_and_back(scene: Scene, path: &str) -> Result<()> {
    scene.move_guest(&["--path", "v1"])?;
    let back = scene.turn_round()?;
    let watcher = Watcher::start(&[&back.from, &back.to])?;
    let result = back.move_guest(&["--path", path, "--mode", "internet"])?;
    back.to.guest_ok_for(Duration::from_secs(3))?;
    watcher.finish()?;
    assert_eq!(result["mode"], "internet");
    check_result(&result, path)
}

/// The last line of `dwcpctl migrate --json`.
fn check_result(result: &Value, path: &str) -> Result<()> {
    assert_eq!(result["status"], "completed", "{result}");
    assert_eq!(result["path"], path, "{result}");
    let number = |key: &str| result[key].as_u64().with_context(|| format!("\"{key}\" in {result}"));
    let (raw, wire) = (number("raw_bytes")?, number("wire_bytes")?);
    // The guest keeps 64 MiB of its own, of which a quarter is zero pages.
    assert!(raw > 48 << 20, "{result}");
    match path {
        // TLS adds a little; nothing is taken away.
        "v1" => assert!(wire >= raw / 2 && wire < raw + raw / 10, "{result}"),
        // As the link was measured: loopback is mostly a datacenter, but not on a busy machine.
        _ if result["mode"] == "datacenter" => assert!(wire > 0 && wire < raw + raw / 10, "{result}"),
        _ => assert!(wire > 0 && wire < raw, "a compressible guest must get smaller: {result}"),
    }
    if path == "v3" {
        assert!(number("chunks")? > 0, "{result}");
    }
    for key in ["reconnects", "retransmitted_chunks", "path_switches"] {
        assert_eq!(number(key)?, 0, "{result}");
    }
    assert!(number("agent_peak_anon_bytes")? > 0, "{result}");
    assert!(result["total_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{result}");
    Ok(())
}
