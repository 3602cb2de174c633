//! The direct source: the agent reads the guest's RAM itself, while the guest writes to it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{
    ATTACHES, AgentConfig, Backing, GuestLoad, Kit, Qemu, QemuSpec, QemuVersion, Role, Scene, TurnPlan, VM,
    Watcher, ram, turn_in_flight, until,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A way for the bytes, and what the result must say of it: path and sink.
type Way = (&'static [&'static str], [&'static str; 2]);

const MAPPED: Way = (&["--path", "v3", "--mode", "datacenter"], ["v3", "mapped"]);
const INTERNET: Way = (&["--path", "v3", "--mode", "internet"], ["v3", "mapped"]);
const CACHE: Way = (&["--path", "v3", "--mode", "internet"], ["v3", "stream"]);
const V1: Way = (&["--path", "v1"], ["v1", "opaque"]);

struct Case {
    version: QemuVersion,
    way: Way,
    live: bool,
}

fn spec(version: QemuVersion) -> QemuSpec {
    // Many more rounds than one.
    let load = GuestLoad { rate: 4000, hot_mib: 32, ..GuestLoad::default() };
    QemuSpec { backing: Backing::shared_file(), load, ..QemuSpec::new(version, Role::Source) }
}

fn attaches() -> AgentConfig {
    AgentConfig { extra: ATTACHES.into(), ..AgentConfig::default() }
}

impl Case {
    fn run(&self, kit: &Kit) -> Result<()> {
        let mapped = self.way.1[1] != "stream";
        let b = AgentConfig { extra: format!("[hde]\nmapped = {mapped}\n"), ..AgentConfig::default() };
        let scene = Scene::with(kit, spec(self.version), attaches(), b)?;
        if !self.live {
            scene.from.watch().run("stop", json!({}))?;
        }
        let watcher = Watcher::start(&[&scene.from, &scene.to])?;
        let arguments = [self.way.0, &["--source", "direct", "--bandwidth-limit", "800Mbit"]].concat();
        let result = scene.move_guest(&arguments)?;
        let context = || format!("{result}\n{}", scene.logs());
        if self.live {
            let arrived = scene.to.guest_ok_for(Duration::from_secs(3));
            arrived.with_context(|| format!("{}\n{}", at_source(&scene), context()))?;
        } else {
            let difference = ram::compare(&scene.from, &scene.to, scene.ram_bytes())?;
            ensure!(difference.is_none(), "{difference:?}\n{}", context());
            scene.to.watch().run("cont", json!({}))?;
            scene.to.guest_ok_for(Duration::from_secs(1)).with_context(context)?;
        }
        watcher.finish()?;
        let way = ["path", "sink"].map(|key| result[key].as_str().unwrap_or_default());
        ensure!(way == self.way.1 && result["source"] == "direct", "{}", context());
        ensure!(result["rounds"].as_u64() >= Some(if self.live { 2 } else { 1 }), "{}", context());
        ensure!(!result["fallback_reasons"].to_string().contains("opaque"), "{}", context());
        // QEMU itself has sent the small blocks and the devices.
        let said = scene.from.watch().run("query-migrate", json!({}))?;
        let by_qemu = said["ram"]["transferred"].as_u64().context("transferred")?;
        ensure!(by_qemu < 8 * MIB, "{said}");
        Ok(())
    }
}

/// What the guest says where it came from: whether what it misses was lost on its way.
fn at_source(scene: &Scene) -> String {
    let goes_on = scene.from.watch().run("cont", json!({}));
    match goes_on.and_then(|_| scene.from.guest_ok_for(Duration::from_secs(1)).map(drop)) {
        Ok(()) => "at the source the guest is right".to_owned(),
        Err(error) => format!("at the source, too, the guest is wrong: {error:#}"),
    }
}

macro_rules! cases {
    ($($name:ident: $version:ident, $way:ident, $live:literal;)+) => {
        $(#[test]
        fn $name() -> Result<()> {
            let Some(kit) = Scene::kit_or_skip(stringify!($name)) else { return Ok(()) };
            Case { version: QemuVersion::$version, way: $way, live: $live }.run(&kit)
        })+
    };
}

cases! {
    live_guest_read_directly_into_mapped_ram_qemu_10_0: V10_0, MAPPED, true;
    live_guest_read_directly_in_internet_mode_qemu_10_0: V10_0, INTERNET, true;
    live_guest_read_directly_through_the_cache_qemu_10_0: V10_0, CACHE, true;
    live_guest_read_directly_over_v1_qemu_10_0: V10_0, V1, true;
    paused_guest_read_directly_into_mapped_ram_qemu_10_0: V10_0, MAPPED, false;
    live_guest_read_directly_into_mapped_ram_qemu_7_2: V7_2, MAPPED, true;
    paused_guest_read_directly_qemu_7_2: V7_2, CACHE, false;
}

/// To v1 and back, at exact bytes of the stream that the agent makes.
#[test]
fn the_flag_turns_while_a_live_guest_is_read_directly() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("the_flag_turns_while_a_live_guest_is_read_directly") else {
        return Ok(());
    };
    let plan = TurnPlan {
        version: QemuVersion::V10_0,
        live: true,
        at: vec![6 * MIB, 16 * MIB],
        cut: false,
        bandwidth: "60Mbit".into(),
        channels: 1,
        direct: true,
    };
    let outcome = turn_in_flight(&kit, &plan)?;
    ensure!(outcome.late_v3_bytes == 0 && outcome.result["source"] == "direct", "{outcome:?}");
    Ok(())
}

/// The guest runs on as it was, and what was set at QEMU is no obstacle to the next.
#[test]
fn a_direct_migration_that_was_called_off_leaves_nothing_behind() -> Result<()> {
    let test = "a_direct_migration_that_was_called_off_leaves_nothing_behind";
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let scene = Scene::with(&kit, spec(QemuVersion::V10_0), attaches(), AgentConfig::default())?;
    for id in ["first", "second"] {
        let fresh =
            Qemu::launch(&kit, scene.dir(), &format!("vm-{id}"), &spec(QemuVersion::V10_0).destination())?;
        let qmp = fresh.qmp_path();
        scene.b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &"a"])?.success()?;
        let slow = ["--source", "direct", "--bandwidth-limit", "8Mbit", "--deadline", "2s", "--id", id];
        let said = scene.migrate(&slow)?;
        ensure!(said.status != Some(0) && said.json()?["status"] == "aborted", "{said:?}\n{}", scene.logs());
        scene.from.guest_ok_for(Duration::from_millis(500))?;
    }
    let result = scene.move_guest(&["--source", "stream", "--path", "v3", "--mode", "datacenter"])?;
    ensure!(result["source"] == "stream", "{result}");
    scene.to.guest_ok_for(Duration::from_secs(1)).with_context(|| scene.logs())?;
    let scene = scene.turn_round()?;
    // Here nothing may attach.
    let result = scene.move_guest(&["--source", "direct", "--path", "v3", "--mode", "datacenter"])?;
    ensure!(result["source"] == "stream" && says(&result, "[vmm] attach"), "{result}");
    scene.to.guest_ok_for(Duration::from_secs(1)).with_context(|| scene.logs())?;
    Ok(())
}

/// The agent dies when it has just stopped the guest: its next life lets the guest run again.
#[test]
fn a_guest_that_was_stopped_for_the_switchover_runs_again_after_the_agents_death() -> Result<()> {
    let test = "a_guest_that_was_stopped_for_the_switchover_runs_again_after_the_agents_death";
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let dies = AgentConfig {
        program: "dwcpd-faulty",
        env: vec![("DWCP_FAULT", "after.halt.Paused".to_owned())],
        ..attaches()
    };
    let mut scene = Scene::with(&kit, spec(QemuVersion::V10_0), dies, AgentConfig::default())?;
    scene.incoming()?.success()?;
    let said = scene.migrate(&["--source", "direct", "--id", "dies"])?;
    ensure!(said.status != Some(0), "{said:?}");
    ensure!(scene.from.status()? == "paused", "it died too early\n{}", scene.logs());
    scene.a.config_mut().env.clear();
    scene.a.kill();
    scene.a.start()?;
    until("the guest to run again", Duration::from_secs(20), || {
        Ok((scene.from.status()? == "running").then_some(()))
    })
    .with_context(|| scene.logs())?;
    scene.from.guest_ok_for(Duration::from_secs(1))?;
    // The waiting QEMU ends with its stream, or is called off.
    ensure!(!scene.to.status().is_ok_and(|status| status == "running"), "two guests");
    Ok(())
}

/// RAM that cannot be read directly is taken from QEMU's stream, and the reason is told.
#[test]
fn ram_in_a_memfd_comes_by_qemus_stream() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("ram_in_a_memfd_comes_by_qemus_stream") else { return Ok(()) };
    let spec = QemuSpec { backing: Backing::Memfd, ..spec(QemuVersion::V10_0) };
    let scene = Scene::with(&kit, spec, attaches(), AgentConfig::default())?;
    scene.incoming()?.success()?;
    let check = scene.migrate(&["--source", "direct", "--check"])?;
    ensure!(check.stdout.contains("in no named file"), "{check:?}");
    let result = scene.migrate(&["--source", "direct"])?.success()?.json()?;
    ensure!(result["source"] == "stream" && says(&result, "in no named file"), "{result}");
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    Ok(())
}

fn says(result: &Value, words: &str) -> bool {
    result["fallback_reasons"].to_string().contains(words)
}
