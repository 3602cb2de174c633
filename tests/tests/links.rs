//! A link that breaks in the middle of a migration is back-pressure: the agents connect again and go on.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{AgentConfig, GuestLoad, Kit, QemuSpec, QemuVersion, Relay, Role, Scene, Watcher};
use serde_json::Value;

/// The first cut comes once so many bytes are through: in the middle of the first round.
const FIRST: u64 = 8 << 20;
/// The second comes so many bytes later: what the first left behind has been sent again by then.
const SECOND: u64 = FIRST + (8 << 20);
/// Lines of status, one a second, for which nobody gets through after the second cut.
const LINES_DOWN: u32 = 2;

#[test]
fn v1_goes_on_after_its_link_was_cut() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("v1_goes_on_after_its_link_was_cut") else { return Ok(()) };
    cut_twice(scene(&kit)?, &["--path", "v1", "--bandwidth-limit", "160Mbit"])
}

#[test]
fn v3_goes_on_after_its_links_were_cut() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("v3_goes_on_after_its_links_were_cut") else { return Ok(()) };
    let arguments = ["--path", "v3", "--mode", "internet", "--streams", "3", "--bandwidth-limit", "80Mbit"];
    cut_twice(scene(&kit)?, &arguments)
}

/// A guest that writes slowly enough for the bandwidth that the tests allow.
fn scene(kit: &Kit) -> Result<Scene> {
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    spec.load = GuestLoad { rate: 200, ..GuestLoad::default() };
    Scene::with(kit, spec, AgentConfig::default(), AgentConfig::default())
}

/// All connections are reset in two moments of precopy; after the second nobody gets through for two lines of status,
/// some seconds.
fn cut_twice(mut scene: Scene, arguments: &[&str]) -> Result<()> {
    let relay = Relay::start(scene.b.listen()?.data)?;
    scene.via = Some(relay.address());
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;

    let mut cut = Cut::default();
    let result = scene.move_guest_watched(arguments, |line| cut.after(line, &relay))?;
    scene.to.guest_ok_for(Duration::from_secs(5)).with_context(|| format!("{result}\n{}", scene.logs()))?;
    watcher.finish()?;
    println!("{result}");

    ensure!(result["status"] == "completed", "{result}");
    ensure!(cut.lines_down > LINES_DOWN, "the migration was over before its link was cut: {result}");
    let reconnects = result["reconnects"].as_u64().unwrap_or_default();
    ensure!(cut.reconnects > 0, "the first cut was not noticed: {result}");
    ensure!(reconnects > cut.reconnects, "the second cut was not noticed: {result}");
    ensure!(result["path_switches"] == 0, "{result}");
    Ok(())
}

/// How far the two cuts are.
#[derive(Default)]
struct Cut {
    first_done: bool,
    /// Connections that were made anew when the second cut came.
    reconnects: u64,
    /// Lines of status since the second cut.
    lines_down: u32,
}

impl Cut {
    /// Takes a line of `dwcpctl migrate --json`, and cuts or mends when it is time.
    fn after(&mut self, line: &str, relay: &Relay) {
        let Ok(status) = serde_json::from_str::<Value>(line) else { return };
        if status["status"] == "precopy" && !self.first_done && relay.passed() > FIRST {
            relay.cut();
            relay.mend();
            self.first_done = true;
        } else if self.lines_down > 0 || relay.passed() > SECOND {
            match self.lines_down {
                0 => {
                    self.reconnects = status["reconnects"].as_u64().unwrap_or_default();
                    relay.cut();
                }
                LINES_DOWN => relay.mend(),
                _ => {}
            }
            self.lines_down += 1;
        }
    }
}
