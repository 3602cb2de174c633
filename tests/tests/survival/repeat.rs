//! Many migrations in a row, and kills with real QEMUs: few of them in an ordinary run, as many as asked for by
//! `cargo xtask soak`.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dwcp_tests::{
    Agent, AgentConfig, Ending, GuestLoad, Kit, QemuSpec, QemuVersion, Role, Scene, SimScene, VM, Victim,
    Watcher, soak_count, soak_report, until,
};
use serde_json::Value;

use crate::kills::Random;

/// For everything to come to its end after a kill.
const LIMIT: Duration = Duration::from_secs(90);
/// Migrations in a row in an ordinary run.
const USUAL: u64 = 10;
/// A guest that checks its memory for so long after each migration with QEMU.
const AFTER: Duration = Duration::from_secs(2);

/// The same two agents all along: what one migration leaves behind would show in a later one.
#[test]
fn migrations_in_a_row() -> Result<()> {
    if !SimScene::possible("migrations_in_a_row") {
        return Ok(());
    }
    let migrations = soak_count("MIGRATIONS", USUAL);
    let mut scene = SimScene::new()?;
    let files = |scene: &SimScene| -> Result<usize> {
        let count = |pid: u32| Ok::<_, std::io::Error>(std::fs::read_dir(format!("/proc/{pid}/fd"))?.count());
        Ok(count(scene.a.pid().context("a runs")?)? + count(scene.b.pid().context("b runs")?)?)
    };
    let mut failed = Vec::new();
    let mut open = 0;
    for number in 0..migrations {
        let path = ["v1", "v3"][number as usize % 2];
        if let Err(error) = one_more(&mut scene, path) {
            failed.push(format!("migration {number} over {path}: {error:#}"));
        }
        // The first few make what stays: threads, connections of the laboratory itself.
        if number == USUAL / 2 {
            open = files(&scene)?;
        }
    }
    soak_report("migrations in a row, simulated guest", migrations, failed.len() as u64)?;
    ensure!(failed.is_empty(), "{} of {migrations} failed:\n{}", failed.len(), failed.join("\n"));
    until("all files to be closed", LIMIT, || Ok((files(&scene)? <= open + 2).then_some(())))
        .context("descriptors leak")
}

fn one_more(scene: &mut SimScene, path: &str) -> Result<()> {
    scene.fresh_source()?;
    scene.fresh_destination()?;
    scene.incoming()?;
    let limit = Duration::from_secs(60);
    let said = scene.migrate(&["--path", path, "--downtime-limit", "500ms"])?;
    if let Err(error) = said.success() {
        // The last lines are of this migration; the agents have seen many.
        let tail = |agent: &Agent| {
            let log = agent.log();
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(20)..].join("\n")
        };
        return Err(error.context(format!("agent a:\n{}\nagent b:\n{}", tail(&scene.a), tail(&scene.b))));
    }
    until("the guest's arrival", limit, || Ok(scene.to.is_running().then_some(())))?;
    ensure!(scene.ending_of_guests()? == Ending::Moved);
    Ok(())
}

#[test]
#[ignore = "takes minutes: cargo xtask soak"]
fn migrations_in_a_row_with_qemu() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("migrations_in_a_row_with_qemu") else { return Ok(()) };
    let migrations = soak_count("QEMU_MIGRATIONS", 2);
    let mut failures = 0;
    let mut scene = Some(scene(&kit)?);
    for number in 0..migrations {
        let path = ["v1", "v3"][number as usize % 2];
        let outcome = match scene.take() {
            Some(scene) => there(scene, path),
            None => continue,
        };
        match outcome {
            Ok(next) => scene = Some(next),
            Err(error) => {
                eprintln!("migration {number} over {path}: {error:#}");
                failures += 1;
                scene = Some(self::scene(&kit)?);
            }
        }
    }
    soak_report("migrations in a row, QEMU and self-checking guest", migrations, failures)?;
    ensure!(failures == 0, "{failures} of {migrations} failed");
    Ok(())
}

/// One migration, and everything ready for the next one, the other way.
fn there(scene: Scene, path: &str) -> Result<Scene> {
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    scene.move_guest(&["--path", path])?;
    scene.to.guest_ok_for(AFTER)?;
    watcher.finish()?;
    scene.turn_round()
}

#[test]
#[ignore = "takes minutes: cargo xtask faults --long, cargo xtask soak"]
fn any_process_killed_at_random_with_qemu() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("any_process_killed_at_random_with_qemu") else { return Ok(()) };
    let kills = soak_count("QEMU_KILLS", 2);
    let mut failed = Vec::new();
    for number in 0..kills {
        if let Err(error) = random_kill(&kit, number) {
            failed.push(format!("kill {number}: {error:#}"));
        }
    }
    soak_report("random kills, QEMU and self-checking guest", kills, failed.len() as u64)?;
    ensure!(failed.is_empty(), "{} of {kills} failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}

fn scene(kit: &Kit) -> Result<Scene> {
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    spec.load = GuestLoad { rate: 500, ..GuestLoad::default() };
    Scene::with(kit, spec, AgentConfig::default(), AgentConfig::default())
}

/// A kill at a random moment from before a migration of some four seconds until after it.
fn random_kill(kit: &Kit, number: u64) -> Result<()> {
    let mut random = Random(0x9e11 ^ number);
    let victim = Victim::ALL[random.below(4) as usize];
    let path = ["v1", "v3"][random.below(2) as usize];
    let delay = Duration::from_millis(random.below(5000));
    let mut scene = scene(kit)?;
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    scene.incoming()?.success()?;
    let (qmp, target) = (scene.from.qmp_path(), scene.b.target()?);
    let arguments: [&dyn std::fmt::Display; 13] = [
        &"migrate",
        &VM,
        &"--qmp",
        &qmp.display(),
        &"--to",
        &target,
        &"--id",
        &"m1",
        &"--detach",
        &"--path",
        &path,
        &"--bandwidth-limit",
        &"160Mbit",
    ];
    scene.a.ctl(&arguments)?.success()?;
    std::thread::sleep(delay);
    match victim {
        Victim::SourceAgent => scene.a.kill(),
        Victim::DestinationAgent => scene.b.kill(),
        Victim::SourceVmm => scene.from.kill(),
        Victim::DestinationVmm => scene.to.kill(),
    }
    match victim {
        Victim::SourceAgent => scene.a.start()?,
        Victim::DestinationAgent => scene.b.start()?,
        Victim::SourceVmm | Victim::DestinationVmm => {}
    }
    judge(&scene, victim, watcher)
        .with_context(|| format!("{victim:?} over {path} after {delay:?}\n{}", scene.logs()))
}

fn judge(scene: &Scene, victim: Victim, watcher: Watcher) -> Result<()> {
    until("the end of the migration", LIMIT, || Ok(over(scene)?.then_some(())))?;
    let runs = |vm: &dwcp_tests::Qemu| vm.status().is_ok_and(|status| status == "running");
    match victim {
        Victim::SourceAgent | Victim::DestinationAgent => {
            let one = until("one running guest", LIMIT, || match (runs(&scene.from), runs(&scene.to)) {
                (true, false) => Ok(Some(&scene.from)),
                (false, true) => Ok(Some(&scene.to)),
                (false, false) => Ok(None),
                (true, true) => bail!("two guests run"),
            })?;
            one.guest_ok_for(AFTER)?;
        }
        // The guest died with its VMM, or had moved and is well.
        Victim::SourceVmm if runs(&scene.to) => drop(scene.to.guest_ok_for(AFTER)?),
        Victim::SourceVmm => {}
        Victim::DestinationVmm if runs(&scene.from) => drop(scene.from.guest_ok_for(AFTER)?),
        // It had the guest when it died, or may have.
        Victim::DestinationVmm => {
            let status = scene.from.status()?;
            ensure!(status == "postmigrate", "the source's guest is {status}, and nobody runs");
        }
    }
    watcher.finish().map(drop)
}

/// Whether neither agent has anything to do any more without an operator.
fn over(scene: &Scene) -> Result<bool> {
    for agent in [&scene.a, &scene.b] {
        let said = agent.ctl(&[&"status", &"m1", &"--json"])?;
        let Some(0) = said.status else { continue };
        let status: Value = said.json()?;
        if !["completed", "aborted", "failed", "in_doubt"].iter().any(|end| status["status"] == *end) {
            return Ok(false);
        }
    }
    Ok(true)
}
