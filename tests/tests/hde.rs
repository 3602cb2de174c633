//! Internet mode between real QEMUs: pages refer to what the destination holds, in the guest's RAM or in a cache.

use std::os::unix::fs::FileExt;
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

fn spec(version: QemuVersion, backing: Backing) -> QemuSpec {
    let load = GuestLoad { mib: 32, rate: 2000, hot_mib: 16, ..GuestLoad::default() };
    QemuSpec { backing, load, ..QemuSpec::new(version, Role::Source) }
}

fn scene(kit: &dwcp_tests::Kit, version: QemuVersion, backing: Backing) -> Result<Scene> {
    Scene::with(kit, spec(version, backing), AgentConfig::default(), AgentConfig::default())
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
    let delta = &result["layers"]["delta"];
    ensure!(delta["pages"].as_u64() > Some(100), "{result}");
    ensure!(delta["after_bytes"].as_u64() < delta["before_bytes"].as_u64(), "{result}");
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

/// An operator takes it to v1 and back.
#[test]
fn mapped_ram_is_equal_after_v1_and_v3_again() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("mapped_ram_is_equal_after_v1_and_v3_again") else { return Ok(()) };
    let scene = scene(&kit, QemuVersion::V10_0, Backing::Memfd)?;
    let result = turned(&scene, "40Mbit", [20 * MIB, 28 * MIB], &|path| {
        scene.a.ctl(&[&"switch", &ID, &"--path", &path])?.success().map(drop)
    })?;
    ensure!(result["fallback_reasons"].to_string().matches(" on: operator: ").count() == 2, "{result}");
    Ok(())
}

/// The flag goes off, and on again: the migration returns by itself.
#[test]
fn mapped_ram_is_equal_after_the_flag_was_off() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("mapped_ram_is_equal_after_the_flag_was_off") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let (file, fresh) = (folder.path().join("flag.json"), folder.path().join("fresh.json"));
    let turn = |path: &str| -> Result<()> {
        let on = path == "v3";
        let text = format!(r#"{{"feature":"dwcp_v3_hde","percentage":100,"enabled":{on}}}"#);
        std::fs::write(&fresh, text)?;
        Ok(std::fs::rename(&fresh, &file)?)
    };
    turn("v3")?;
    let flags = format!("file:{}", file.display());
    // By default a migration waits for a minute or more before it returns, here for a second to three.
    let config = AgentConfig { flags, return_after: Some("1s"), ..AgentConfig::default() };
    let mut spec = spec(QemuVersion::V10_0, Backing::Memfd);
    // That wait, and two seconds more, are on v1 at 3 MB a second: much has to be left after it.
    spec.load.mib = 64;
    let scene = Scene::with(&kit, spec, config, AgentConfig::default())?;
    let result = turned(&scene, "24Mbit", [8 * MIB, 10 * MIB], &turn)?;
    ensure!(result["fallback_reasons"].to_string().matches(" on: flag: ").count() == 2, "{result}");
    Ok(())
}

const ID: &str = "turned";

/// Moves a paused guest into mapped RAM, and has its path turned to v1 and to v3 again, as soon as so many bytes of its stream were
/// carried: v1 goes through the VMM's socket, which has seen no page of what is in RAM. Both guests' RAM is equal then.
fn turned(
    scene: &Scene,
    bandwidth: &str,
    at: [u64; 2],
    turn: &(dyn Fn(&str) -> Result<()> + Sync),
) -> Result<Value> {
    scene.from.watch().run("stop", json!({}))?;
    scene.incoming()?.success()?;
    let slow =
        ["--mode", "internet", "--bandwidth-limit", bandwidth, "--downtime-limit", "500ms", "--id", ID];
    let result: Result<Value> = std::thread::scope(|scope| {
        let turner = scope.spawn(|| -> Result<()> {
            for (at, from, to) in [(at[0], "v3", "v1"), (at[1], "v1", "v3")] {
                let before = until_status(scene, "the moment of the turn", |status| {
                    status["path"] == from && status["raw_bytes"].as_u64() >= Some(at)
                })?;
                ensure!((before["sink"] == "mapped") == (to == "v1"), "{before}");
                turn(to)?;
                until_status(scene, "the path to change", |status| status["path"] == to)?;
            }
            Ok(())
        });
        let result = scene.migrate(&slow)?.success()?.json();
        turner.join().map_err(|_| anyhow::anyhow!("the turning thread failed"))??;
        result
    });
    let result = result.with_context(|| scene.logs())?;
    ensure!(result["path_switches"] == 2 && result["sink"] == "stream", "{VM}: {result}");
    ensure!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?.is_none(), "{result}");
    scene.to.watch().run("cont", json!({}))?;
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    Ok(result)
}

/// The status that holds, unless the migration ends without it.
fn until_status(scene: &Scene, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
    until(what, Duration::from_secs(60), || {
        // Until it is registered there is none.
        let status = scene.a.ctl(&[&"status", &ID, &"--json"])?.json().unwrap_or_default();
        if holds(&status) {
            return Ok(Some(status));
        }
        let ended = ["completed", "aborted", "failed"].iter().any(|end| status["phase"] == *end);
        ensure!(!ended, "it ended before {what}: {status}");
        Ok(None)
    })
}

/// Somebody else writes to the destination's RAM meanwhile: what refers to such a page is found out, and goes on without.
#[test]
fn a_page_altered_behind_the_agents_back_is_not_copied() -> Result<()> {
    let test = "a_page_altered_behind_the_agents_back_is_not_copied";
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let scene = scene(&kit, QemuVersion::V10_0, Backing::Memfd)?;
    scene.from.watch().run("stop", json!({}))?;
    scene.incoming()?.success()?;
    let carried = AtomicU64::new(0);
    let (altered, result) = std::thread::scope(|scope| -> Result<_> {
        let altering = scope.spawn(|| -> Result<Altered> {
            until("the first pages", Duration::from_secs(120), || {
                Ok((carried.load(Ordering::Relaxed) >= 16 * MIB).then_some(()))
            })?;
            Altered::all_pages_of(scene.to.pid())
        });
        let result = scene.migrate_watched(&SLOW, |line| {
            let value: Value = serde_json::from_str(line).unwrap_or_default();
            carried.fetch_max(value["raw_bytes"].as_u64().unwrap_or_default(), Ordering::Relaxed);
        });
        let altered = altering.join().map_err(|_| anyhow::anyhow!("the altering thread failed"))??;
        Ok((altered, result?.success()?.json()?))
    })
    .with_context(|| scene.logs())?;
    ensure!(altered.pages.len() > 100, "{} pages altered", altered.pages.len());
    let reasons = result["fallback_reasons"].to_string();
    ensure!(reasons.contains("was not what was sent"), "{result}");
    let metrics = scene.b.http_get("/metrics")?;
    let attempts = metrics.lines().find(|line| line.contains("attempts_total{kind=\"delta_base\"}"));
    ensure!(attempts.is_some_and(|line| !line.ends_with(" 0")), "{attempts:?}");
    // Nothing that was put together from an altered page is there: with these put right all is right.
    altered.put_right()?;
    ensure!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?.is_none(), "{result}");
    Ok(())
}

/// The RAM of a QEMU whose pages have another byte each.
struct Altered {
    file: std::fs::File,
    /// Where, and what was there before.
    pages: Vec<(u64, u8)>,
}

impl Altered {
    fn all_pages_of(pid: u32) -> Result<Self> {
        let memfd = |path: &std::path::PathBuf| {
            std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:memory-backend"))
        };
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?;
        let path = open.flatten().map(|entry| entry.path()).find(memfd).context("the memfd")?;
        let file = std::fs::File::options().read(true).write(true).open(path)?;
        let mut pages = Vec::new();
        let mut page = [0; 4096];
        for at in (0..file.metadata()?.len()).step_by(page.len()) {
            file.read_exact_at(&mut page, at)?;
            // A page that is there will not come again, since the guest is paused.
            if page != [0; 4096] {
                pages.push((at + 2000, page[2000]));
                file.write_all_at(&[page[2000] ^ 1], at + 2000)?;
            }
        }
        Ok(Altered { file, pages })
    }

    fn put_right(&self) -> Result<()> {
        for &(at, before) in &self.pages {
            let mut now = [0];
            self.file.read_exact_at(&mut now, at)?;
            if now[0] == before ^ 1 {
                self.file.write_all_at(&[before], at)?;
            }
        }
        Ok(())
    }
}
