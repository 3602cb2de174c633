//! A link that breaks in the middle of a migration is back-pressure: the agents connect again and go on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{AgentConfig, GuestLoad, QemuSpec, QemuVersion, Relay, Role, Scene, Watcher};
use serde_json::Value;

/// The first cut comes once so many bytes are through: in the middle of the first round.
const FIRST: u64 = 8 << 20;
/// The second comes so many bytes later: what the first left behind has been sent again by then.
const SECOND: u64 = FIRST + (8 << 20);

#[test]
fn v1_goes_on_after_its_link_was_cut() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("v1_goes_on_after_its_link_was_cut") else { return Ok(()) };
    cut_twice(scene(&kit)?, &["--path", "v1", "--bandwidth-limit", "80Mbit"])
}

#[test]
fn v3_goes_on_after_its_links_were_cut() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("v3_goes_on_after_its_links_were_cut") else { return Ok(()) };
    let arguments = ["--path", "v3", "--mode", "internet", "--streams", "3", "--bandwidth-limit", "40Mbit"];
    cut_twice(scene(&kit)?, &arguments)
}

/// A guest that writes slowly enough for the line, and whose pages only pass as they are or nearly so.
fn scene(kit: &dwcp_tests::Kit) -> Result<Scene> {
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    spec.load = GuestLoad { rate: 200, ..GuestLoad::default() };
    Scene::with(kit, spec, AgentConfig::default(), AgentConfig::default())
}

/// All connections are reset in two moments of precopy; after the second nobody gets through for three lines of
/// status, some seconds.
fn cut_twice(mut scene: Scene, arguments: &[&str]) -> Result<()> {
    let relay = Relay::start(scene.b.listen()?.data)?;
    scene.via = Some(relay.address());
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;

    let (mut first, mut second) = (None, None);
    let mut lines = 0;
    let result = scene.move_guest_watched(arguments, |line| {
        lines += 1;
        eprintln!("{} {line}", relay.passed());
        match (first, second) {
            (None, _) if relay.passed() > FIRST => {
                relay.cut();
                relay.mend();
                first = Some(lines);
            }
            (Some(_), None) if relay.passed() > SECOND => {
                relay.cut();
                second = Some(lines);
            }
            (_, Some(cut)) if lines == cut + 3 => relay.mend(),
            _ => {}
        }
    })?;
    scene.to.guest_ok_for(Duration::from_secs(5)).with_context(|| format!("{result}\n{}", scene.logs()))?;
    watcher.finish()?;

    ensure!(first.is_some() && second.is_some(), "the migration was over before its link was cut: {result}");
    check(&result)
}

fn check(result: &Value) -> Result<()> {
    eprintln!("{result}");
    ensure!(result["status"] == "completed", "{result}");
    ensure!(result["reconnects"].as_u64() >= Some(2), "each cut makes the agents connect again: {result}");
    ensure!(result["path_switches"] == 0, "{result}");
    Ok(())
}
