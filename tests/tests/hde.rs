//! Internet mode between real QEMUs: pages refer to what the destination holds, in the guest's RAM or in a cache.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{
    AgentConfig, Backing, GuestLoad, QemuSpec, QemuVersion, Role, Scene, VM, Watcher, ram, until,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Slow enough that the guest is ahead for some rounds, and far below what it writes: 8 MB of pages a second.
const SLOW: [&str; 6] = ["--mode", "internet", "--bandwidth-limit", "40Mbit", "--downtime-limit", "500ms"];

fn scene(kit: &dwcp_tests::Kit, version: QemuVersion, backing: Backing) -> Result<Scene> {
    let mut spec = QemuSpec { backing, ..QemuSpec::new(version, Role::Source) };
    spec.load = GuestLoad { mib: 32, rate: 2000, hot_mib: 16, ..GuestLoad::default() };
    Scene::with(kit, spec, AgentConfig::default(), AgentConfig::default())
}

/// How many pages the source has sent by this layer.
fn pages(scene: &Scene, layer: &str) -> Result<u64> {
    let text = scene.a.http_get("/metrics")?;
    let series = format!("dwcp_v3_pages_total{{layer=\"{layer}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&series));
    value.with_context(|| format!("{series} in\n{text}"))?.parse().context("a number")
}

fn live(version: QemuVersion, backing: Backing, sink: &str, test: &str) -> Result<()> {
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let scene = scene(&kit, version, backing)?;
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let result = scene.move_guest(&SLOW)?;
    scene.to.guest_ok_for(Duration::from_secs(2)).with_context(|| format!("{result}\n{}", scene.logs()))?;
    watcher.finish()?;
    ensure!(result["sink"] == sink, "{result}");
    let reasons = result["fallback_reasons"].to_string();
    ensure!(reasons.contains("sink stream instead of mapped") == (sink == "stream"), "{result}");
    ensure!(pages(&scene, "delta")? > 100, "deltas: {result}\n{}", scene.a.http_get("/metrics")?);
    ensure!(pages(&scene, "zero")? > 1000 && pages(&scene, "whole")? > 1000, "{result}");
    Ok(())
}

#[test]
fn a_live_guest_into_mapped_ram_qemu_7_2() -> Result<()> {
    live(QemuVersion::V7_2, Backing::Memfd, "mapped", "a_live_guest_into_mapped_ram_qemu_7_2")
}

#[test]
fn a_live_guest_through_a_cache_qemu_10_0() -> Result<()> {
    live(QemuVersion::V10_0, Backing::Anonymous, "stream", "a_live_guest_through_a_cache_qemu_10_0")
}

/// The path is left for v1 in the middle, where the VMM's socket has seen no page of what is in RAM, and entered again.
#[test]
fn mapped_ram_is_equal_after_v1_and_v3_again() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("mapped_ram_is_equal_after_v1_and_v3_again") else { return Ok(()) };
    let scene = scene(&kit, QemuVersion::V10_0, Backing::Memfd)?;
    scene.from.watch().run("stop", json!({}))?;
    scene.incoming()?.success()?;
    let carried = AtomicU64::new(0);
    let arguments = [&SLOW[..], &["--id", "turned"]].concat();
    let result: Result<Value> = std::thread::scope(|scope| {
        let turner = scope.spawn(|| -> Result<()> {
            for (at, path) in [(20 * MIB, "v1"), (28 * MIB, "v3")] {
                until("the moment of the turn", Duration::from_secs(120), || {
                    Ok((carried.load(Ordering::Relaxed) >= at).then_some(()))
                })?;
                scene.a.ctl(&[&"switch", &"turned", &"--path", &path])?.success()?;
            }
            Ok(())
        });
        let result = scene.migrate_watched(&arguments, |line| {
            let value: Value = serde_json::from_str(line).unwrap_or_default();
            carried.fetch_max(value["raw_bytes"].as_u64().unwrap_or_default(), Ordering::Relaxed);
        });
        let result = result?.success()?.json();
        turner.join().map_err(|_| anyhow::anyhow!("the turning thread failed"))??;
        result
    });
    let result = result.with_context(|| scene.logs())?;
    ensure!(result["path_switches"] == 2 && result["sink"] == "stream", "{VM}: {result}");
    ensure!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?.is_none(), "{result}");
    scene.to.watch().run("cont", json!({}))?;
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    Ok(())
}
