//! QEMU's multifd at the source: the guest comes to its agent over several channels, and leaves it as by one.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dwcp_tests::{
    AgentConfig, Backing, GuestLoad, Kit, Qemu, QemuSpec, QemuVersion, Role, Scene, TurnPlan, VM, Watcher,
    ram, turn_in_flight,
};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A way for the bytes, and what the result must say of it: path and sink.
type Way = (&'static [&'static str], [&'static str; 2]);

const MAPPED: Way = (&["--path", "v3", "--mode", "datacenter"], ["v3", "mapped"]);
const STREAM: Way = (&["--path", "v3", "--mode", "datacenter"], ["v3", "stream"]);
const INTERNET: Way = (&["--path", "v3", "--mode", "internet"], ["v3", "mapped"]);
const V1: Way = (&["--path", "v1"], ["v1", "opaque"]);

/// How QEMU synchronises its channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Machine {
    /// At the end of each section: 7.2, and 10.0 with a machine type of before 8.1.
    Old,
    /// Once a round: 10.0.
    New,
}

struct Case {
    version: QemuVersion,
    machine: Machine,
    channels: u8,
    way: Way,
    live: bool,
}

impl Case {
    fn spec(&self) -> QemuSpec {
        let backing = match self.way.1[1] {
            "mapped" => Backing::Memfd,
            _ => Backing::Anonymous,
        };
        let mut spec = QemuSpec { backing, ..QemuSpec::new(self.version, Role::Source) };
        // Many more rounds than one, and pages enough in each for all channels.
        spec.load = GuestLoad { rate: 4000, hot_mib: 32, ..GuestLoad::default() };
        if self.machine == Machine::New {
            spec.extra = ["-machine", "pc-i440fx-10.0"].map(str::to_owned).to_vec();
        }
        spec
    }

    fn scene(&self, kit: &Kit) -> Result<Scene> {
        Scene::with(kit, self.spec(), AgentConfig::default(), AgentConfig::default())
    }

    fn run(&self, kit: &Kit) -> Result<()> {
        let scene = self.scene(kit)?;
        if !self.live {
            scene.from.watch().run("stop", json!({}))?;
        }
        let watcher = Watcher::start(&[&scene.from, &scene.to])?;
        let channels = self.channels.to_string();
        let arguments = [self.way.0, &["--channels", &channels, "--bandwidth-limit", "800Mbit"]].concat();
        let result = scene.move_guest(&arguments)?;
        if self.live {
            scene
                .to
                .guest_ok_for(Duration::from_secs(2))
                .with_context(|| format!("{result}\n{}", scene.logs()))?;
        } else {
            ensure!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?.is_none(), "{result}");
            scene.to.watch().run("cont", json!({}))?;
            scene.to.guest_ok_for(Duration::from_secs(1))?;
        }
        watcher.finish()?;
        self.check(&scene, &result)
    }

    fn check(&self, scene: &Scene, result: &Value) -> Result<()> {
        let way = ["path", "sink"].map(|key| result[key].as_str().unwrap_or_default());
        ensure!(way == self.way.1 && result["channels"] == self.channels, "{result}");
        ensure!(result["fallback_reasons"].to_string().matches("opaque").count() == 0, "{result}");
        // What QEMU says that it did: so the pages did come that way, and the rounds were told apart.
        let said = scene.from.watch().run("query-migrate", json!({}))?;
        let by_channels = said["ram"]["multifd-bytes"].as_u64().context("multifd-bytes")?;
        ensure!(by_channels > 40 * MIB, "{said}");
        let rounds = said["ram"]["dirty-sync-count"].as_u64().context("dirty-sync-count")?;
        let counted = result["rounds"].as_u64().context("rounds")?;
        ensure!(counted >= 1 && counted <= rounds, "{counted} rounds of {rounds}: {result}");
        // Nothing is left of the sockets.
        let folder = scene.a.state_dir().join("sockets");
        ensure!(std::fs::read_dir(&folder)?.next().is_none(), "{} is not empty", folder.display());
        Ok(())
    }
}

macro_rules! cases {
    ($($name:ident: $version:ident, $machine:ident, $channels:literal, $way:ident, $live:literal;)+) => {
        $(#[test]
        fn $name() -> Result<()> {
            let Some(kit) = Scene::kit_or_skip(stringify!($name)) else { return Ok(()) };
            let (version, machine) = (QemuVersion::$version, Machine::$machine);
            Case { version, machine, channels: $channels, way: $way, live: $live }.run(&kit)
        })+
    };
}

cases! {
    live_guest_from_2_channels_into_mapped_ram_qemu_10_0: V10_0, New, 2, MAPPED, true;
    paused_guest_from_4_channels_qemu_10_0: V10_0, Old, 4, STREAM, false;
    live_guest_from_2_channels_over_v1_qemu_7_2: V7_2, Old, 2, V1, true;
    paused_guest_from_16_channels_into_mapped_ram_qemu_7_2: V7_2, Old, 16, MAPPED, false;
}

/// To v1 and back, at exact bytes of the one stream that the channels make.
#[test]
fn the_flag_turns_while_a_live_guest_comes_from_4_channels() -> Result<()> {
    let test = "the_flag_turns_while_a_live_guest_comes_from_4_channels";
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let plan = TurnPlan {
        version: QemuVersion::V10_0,
        live: true,
        at: vec![6 * MIB, 16 * MIB],
        cut: false,
        bandwidth: "60Mbit".into(),
        channels: 4,
        direct: false,
    };
    let outcome = turn_in_flight(&kit, &plan)?;
    ensure!(outcome.late_v3_bytes == 0 && outcome.result["channels"] == 4, "{outcome:?}");
    Ok(())
}

/// What one migration set at QEMU is no obstacle to the next: called off with channels, then without, then with others.
#[test]
fn a_migration_from_channels_that_was_called_off_leaves_nothing_behind() -> Result<()> {
    let test = "a_migration_from_channels_that_was_called_off_leaves_nothing_behind";
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let case =
        Case { version: QemuVersion::V10_0, machine: Machine::New, channels: 3, way: STREAM, live: true };
    let scene = case.scene(&kit)?;
    for (id, channels) in [("first", "2"), ("second", "1")] {
        let fresh = Qemu::launch(&kit, scene.dir(), &format!("vm-{id}"), &case.spec().destination())?;
        let qmp = fresh.qmp_path();
        scene.b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &"a"])?.success()?;
        let slow = ["--channels", channels, "--bandwidth-limit", "8Mbit", "--deadline", "2s", "--id", id];
        let said = scene.migrate(&slow)?;
        ensure!(said.status != Some(0) && said.json()?["status"] == "aborted", "{said:?}");
        let on = scene.from.watch().run("query-migrate-capabilities", json!({}))?;
        let multifd = on.as_array().and_then(|all| all.iter().find(|c| c["capability"] == "multifd"));
        ensure!(multifd.is_some_and(|multifd| multifd["state"] == false), "{on}");
        scene.from.guest_ok_for(Duration::from_millis(500))?;
    }
    let result = scene.move_guest(&["--channels", "3", "--path", "v3", "--mode", "datacenter"])?;
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    case.check(&scene, &result)
}

/// Both versions, all ways, 2, 4 and 16 channels, running and paused.
#[test]
#[ignore = "takes some twenty minutes: run it by name with --ignored"]
fn every_way_from_any_number_of_channels() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("every_way_from_any_number_of_channels") else { return Ok(()) };
    let of = [
        (QemuVersion::V7_2, Machine::Old),
        (QemuVersion::V10_0, Machine::Old),
        (QemuVersion::V10_0, Machine::New),
    ];
    let mut failed = Vec::new();
    for (version, machine) in of {
        for way in [MAPPED, STREAM, INTERNET, V1] {
            for channels in [2, 4, 16] {
                for live in [true, false] {
                    let case = Case { version, machine, channels, way, live };
                    let name =
                        format!("{version:?} {machine:?}, {:?}, {channels} channels, live {live}", way.1);
                    match case.run(&kit) {
                        Ok(()) => println!("ok: {name}"),
                        Err(error) => failed.push(format!("{name}: {error:#}")),
                    }
                }
            }
        }
    }
    ensure!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    Ok(())
}
