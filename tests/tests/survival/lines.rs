//! Faults of a long line under the agents with a real, self-checking guest, and under plain QEMU beside them. They take
//! minutes, so only `cargo xtask faults --long` runs them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dwcp_tests::{
    AgentConfig, Direction, End, GuestLoad, Kit, LineProfile, Qemu, QemuSpec, QemuVersion, Role, Scene, Seen,
    Wan, Watcher, begin_plain_migration, detected, end_of_plain_migration, fault_report, unix_ms, until,
};
use serde_json::json;

/// The line when nothing is wrong with it: some ten seconds for the guest.
const RATE: u64 = 60_000_000;
const DELAY: Duration = Duration::from_millis(10);
/// Packets that have come through when the fault begins: in the middle of the first round.
const BEGUN: u64 = 4000;
/// Packets that have come through once data flows again.
const FLOWING: u64 = 100;
/// For a migration to end, once the line is well again. Plain TCP's back-off may make it wait two minutes more.
const LIMIT: Duration = Duration::from_secs(300);
/// A port in a namespace of its own.
const PORT: u16 = 4444;

/// A test for each fault of the line: name, row of the table, the fault, and what it is.
macro_rules! lines {
    ($($name:ident: $row:literal, $fault:expr;)+) => {
        $(#[test]
        #[ignore = "takes minutes: cargo xtask faults --long"]
        fn $name() -> Result<()> {
            beside_plain_qemu(stringify!($name), $row, $fault)
        })+
    };
}

lines! {
    link_dark_for_1_s: "dark_1s", Fault::Dark(Direction::Both, Duration::from_secs(1));
    link_dark_for_10_s: "dark_10s", Fault::Dark(Direction::Both, Duration::from_secs(10));
    link_dark_for_60_s: "dark_60s", Fault::Dark(Direction::Both, Duration::from_secs(60));
    link_dark_for_20_min: "dark_20min", Fault::Dark(Direction::Both, Duration::from_secs(1200));
    link_black_hole_towards_the_destination: "hole_forth", Fault::Dark(Direction::AToB, Duration::from_secs(10));
    link_black_hole_towards_the_source: "hole_back", Fault::Dark(Direction::BToA, Duration::from_secs(10));
    link_kernel_reset: "kernel_reset", Fault::KernelReset;
    link_address_goes_and_comes_back: "address_moves", Fault::Address(Duration::from_secs(5));
    link_loses_1_packet_of_1000: "loss_0.1", Fault::Always(lossy(1000));
    link_loses_20_packets_of_1000: "loss_2", Fault::Always(lossy(20_000));
    link_out_of_order: "reordering", Fault::Always(LineProfile { reorder_ppm: 20_000, ..LineProfile::new(RATE, DELAY) });
    link_of_300_ms: "far", Fault::Always(LineProfile::new(RATE, Duration::from_millis(150)));
    link_at_1_kb_a_second: "slow", Fault::Slow(crawling(), Duration::from_secs(20));
}

fn lossy(ppm: u32) -> LineProfile {
    LineProfile { loss_ppm: ppm, ..LineProfile::new(RATE, DELAY) }
}

/// 1 kB a second. What waits for its turn then goes at that rate for good: the line is not to be stuck with it afterwards.
fn crawling() -> LineProfile {
    LineProfile { queue: 3000, ..LineProfile::new(8000, DELAY) }
}

#[derive(Clone, Copy)]
enum Fault {
    /// Nothing comes through that way for so long.
    Dark(Direction, Duration),
    /// The kernel ends all connections, as `ss -K` has it do.
    KernelReset,
    /// The destination has no address for so long.
    Address(Duration),
    /// The line is like this from the beginning to the end.
    Always(LineProfile),
    /// The line is like this for so long.
    Slow(LineProfile, Duration),
}

impl Fault {
    fn time(self) -> Duration {
        match self {
            Fault::Dark(_, time) | Fault::Address(time) | Fault::Slow(_, time) => time,
            Fault::KernelReset | Fault::Always(_) => Duration::ZERO,
        }
    }

    fn begin(self, wan: &mut Wan) -> Result<()> {
        match self {
            Fault::Dark(direction, _) => wan.cut(direction),
            Fault::KernelReset => wan.kill_connections(End::A),
            Fault::Address(_) => wan.ip(End::B, &["address", "del", &network(End::B), "dev", "dwcp-b"]),
            Fault::Slow(profile, _) => wan.set(Direction::Both, profile),
            Fault::Always(_) => Ok(()),
        }
    }

    fn end(self, wan: &mut Wan) -> Result<()> {
        match self {
            Fault::Dark(direction, _) => wan.mend(direction),
            Fault::Address(_) => wan.ip(End::B, &["address", "add", &network(End::B), "dev", "dwcp-b"]),
            Fault::Slow(..) => wan.set(Direction::Both, LineProfile::new(RATE, DELAY)),
            Fault::KernelReset | Fault::Always(_) => Ok(()),
        }
    }
}

fn network(end: End) -> String {
    format!("{}/30", end.address())
}

/// The fault on both paths, and on plain QEMU for comparison, whose failures are its own.
fn beside_plain_qemu(test: &str, row: &str, fault: Fault) -> Result<()> {
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let first = match fault {
        Fault::Always(profile) => profile,
        _ => LineProfile::new(RATE, DELAY),
    };
    for path in ["v1", "v3"] {
        let Some(wan) = Wan::start_or_skip(test, first)? else { return Ok(()) };
        let seen = through_agents(&kit, wan, path, fault).with_context(|| format!("{row} on {path}"));
        let result = if seen.is_ok() { "moved, guest right" } else { "FAILED" };
        fault_report(row, &format!("dwcp {path}"), result, *seen.as_ref().unwrap_or(&Seen::default()))?;
        seen?;
    }
    let Some(wan) = Wan::start_or_skip(test, first)? else { return Ok(()) };
    match through_nothing(&kit, wan, fault) {
        Ok(seen) => fault_report(row, "plain QEMU", "moved, guest right", seen),
        Err(error) => {
            // QEMU's failures are not ours, but how it failed is worth knowing.
            eprintln!("plain QEMU: {error:#}");
            let why = format!("{:#}", error.root_cause());
            fault_report(row, "plain QEMU", &format!("failed: {}", why.trim()), Seen::default())
        }
    }
}

fn spec(wan: &Wan, namespaces: bool) -> [QemuSpec; 2] {
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    // Slow enough for the line.
    spec.load = GuestLoad { rate: 200, ..GuestLoad::default() };
    let mut at = End::ALL.map(|end| QemuSpec { namespace: Some(wan.namespace(end)), ..spec.clone() });
    if !namespaces {
        at = [spec.clone(), spec];
    }
    at[1] = at[1].destination();
    at
}

fn through_agents(kit: &Kit, mut wan: Wan, path: &str, fault: Fault) -> Result<Seen> {
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        // The faults come by the number of packets: those of a look at QUIC are not to count.
        extra: "[link]\ntransport = \"tcp\"\n".into(),
        ..AgentConfig::default()
    };
    let [from, _] = spec(&wan, false);
    let scene = Scene::with(kit, from, at(End::A), at(End::B))?;
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let arguments = ["--path", path, "--mode", "internet", "--id", "m1", "--downtime-limit", "1s"];
    let (seen, result) = std::thread::scope(|scope| -> Result<_> {
        let migration = scope.spawn(|| scene.move_guest_patiently(&arguments, LIMIT + fault.time()));
        let seen = strike(&mut wan, fault);
        let result = migration.join().map_err(|_| anyhow!("the migration's thread panicked"))?;
        Ok((seen, result))
    })?;
    let (result, (began, recovered)) = (result?, seen?);
    scene.to.guest_ok_for(Duration::from_secs(3)).with_context(|| format!("{result}\n{}", scene.logs()))?;
    watcher.finish()?;
    ensure!(result["status"] == "completed", "{result}");
    Ok(Seen { detected: detected(&scene.a, "m1", began)?, recovered })
}

fn through_nothing(kit: &Kit, mut wan: Wan, fault: Fault) -> Result<Seen> {
    let dir = tempfile::tempdir()?;
    let [from, to] = spec(&wan, true);
    let to = Qemu::launch(kit, dir.path(), "b", &to)?;
    let from = Qemu::launch(kit, dir.path(), "a", &from)?.booted()?;
    from.watch().run("migrate-set-parameters", json!({ "downtime-limit": 1000 }))?;
    begin_plain_migration(&from, &to, &format!("tcp:{}", SocketAddr::from((End::B.address(), PORT))))?;
    let (_, recovered) = strike(&mut wan, fault)?;
    end_of_plain_migration(&from, &to, LIMIT)?;
    to.guest_ok_for(Duration::from_secs(3))?;
    Ok(Seen { detected: None, recovered })
}

/// Waits for the middle of precopy and lets the fault happen. When it began, in Unix milliseconds, and how long after
/// its end data flowed again.
fn strike(wan: &mut Wan, fault: Fault) -> Result<(u64, Option<Duration>)> {
    let delivered = |wan: &mut Wan| -> Result<u64> { Ok(wan.count()?[0].delivered) };
    until("the middle of precopy", LIMIT, || Ok((delivered(wan)? > BEGUN).then_some(())))?;
    let began = unix_ms();
    fault.begin(wan)?;
    let end = Instant::now() + fault.time();
    until("the end of the fault", fault.time() + LIMIT, || Ok((Instant::now() >= end).then_some(())))?;
    let before = delivered(wan)?;
    fault.end(wan)?;
    let ended = Instant::now();
    // A plain migration that was killed sends nothing any more.
    let flows = until("data to flow again", LIMIT, || Ok((delivered(wan)? > before + FLOWING).then_some(())));
    Ok((began, flows.is_ok().then(|| ended.elapsed())))
}
