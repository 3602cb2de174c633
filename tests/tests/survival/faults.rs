//! Faults of links, disks, VMMs and operators on two real agents with simulated VMMs: see `dwcp_tests::FAULTS`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dwcp_proto::handover::Message as Word;
use dwcp_proto::message::Body;
use dwcp_tests::{
    AgentConfig, Direction, End, Ending, LineProfile, Relay, Seen, SimGuest, SimScene, Wan, detected,
    fault_report, never_both, unix_ms, until,
};
use serde_json::Value;

use crate::middle::{Attack, Middle};

/// For anything to happen that is to happen.
const LIMIT: Duration = Duration::from_secs(60);
/// A migration at this rate takes some seconds: what is to go wrong goes wrong in the middle of it.
const SLOW: [&str; 2] = ["--bandwidth-limit", "24Mbit"];

#[test]
fn a_link_that_is_dark_for_a_second() -> Result<()> {
    for path in ["v1", "v3"] {
        let dark = Dark { direction: Direction::Both, time: Duration::from_secs(1), anew: 0 };
        dark.over("a_link_that_is_dark_for_a_second", "cut_1s", path)?;
    }
    Ok(())
}

/// Longer than the agents wait for a sign of life, so that the control connection is given up and made anew; and so is then a data
/// connection, which the kernel would leave silent for some time more.
#[test]
fn a_black_hole_in_one_direction() -> Result<()> {
    for path in ["v1", "v3"] {
        let dark = Dark { direction: Direction::BToA, time: Duration::from_secs(6), anew: 2 };
        dark.over("a_black_hole_in_one_direction", "black_hole", path)?;
    }
    Ok(())
}

#[test]
fn a_link_that_is_dark_at_switchover() -> Result<()> {
    let test = "a_link_that_is_dark_at_switchover";
    let Some((mut wan, mut scene)) = far_apart(test)? else { return Ok(()) };
    scene.incoming()?;
    // A guest that writes more than the line carries has a long last round.
    scene.begin("m1", &["--path", "v3", "--mode", "internet", "--downtime-limit", "3s"])?.success()?;
    until("switchover", LIMIT, || Ok((scene.from.state()?.run == "finish-migrate").then_some(())))?;
    wan.cut(Direction::Both)?;
    let cut = Instant::now();
    until("the guest to run again", LIMIT, || Ok(scene.from.is_running().then_some(())))
        .with_context(|| scene.logs())?;
    let recovered = Some(cut.elapsed());
    wan.mend(Direction::Both)?;
    ensure!(scene.ending("m1")? == Ending::Stayed, "{}", scene.logs());
    scene.again()?;
    fault_report(
        "cut_at_switchover",
        "dwcp v3",
        "guest back at the source",
        Seen { recovered, detected: None },
    )
}

#[test]
fn a_lost_receipt() -> Result<()> {
    lost("a_lost_receipt", "receipt_lost", |relay| {
        let mut lost = false;
        Attack::to_source(move |body, _| match body {
            Body::Signed(_) if !std::mem::replace(&mut lost, true) => reset(&relay),
            body => vec![body],
        })
    })
}

#[test]
fn a_lost_commit() -> Result<()> {
    lost("a_lost_commit", "commit_lost", |relay| {
        let mut lost = false;
        Attack::to_destination(move |body, _| match body {
            Body::Signed(_) if !std::mem::replace(&mut lost, true) => reset(&relay),
            body => vec![body],
        })
    })
}

#[test]
fn a_lost_last_word() -> Result<()> {
    lost("a_lost_last_word", "last_word_lost", |relay| {
        let mut lost = false;
        Attack::losing(move |word| {
            matches!(word, Word::Running) && !std::mem::replace(&mut lost, true) && reset(&relay).is_empty()
        })
    })
}

#[test]
fn a_vmm_that_stops_reading() -> Result<()> {
    if !SimScene::possible("a_vmm_that_stops_reading") {
        return Ok(());
    }
    for path in ["v1", "v3"] {
        // Twice what the agents may hold, and all sockets on the way.
        let agent =
            || AgentConfig { extra: "[limits]\nmemory = \"8MiB\"\n".into(), ..AgentConfig::default() };
        let guest = SimGuest { pages: 12 << 10, zero_percent: 0, ..SimGuest::default() };
        let mut scene = SimScene::with(guest, agent(), agent())?;
        scene.to.fault(&format!("stall-at {}", 2 << 20))?;
        scene.incoming()?;
        scene.begin("m1", &["--path", path])?.success()?;
        // As much as fits into the window and the sockets on the way goes, and then nothing.
        let carried = until("a standstill", LIMIT, || {
            let before = bytes(&scene)?;
            std::thread::sleep(Duration::from_millis(1200));
            Ok((before > 0 && bytes(&scene)? == before).then_some(before))
        })?;
        ensure!(scene.from.is_running(), "the guest does not run on");
        ensure!(carried < 32 << 20, "the agents took {carried} bytes for a VMM that does not read");
        scene.a.ctl(&[&"cancel", &"m1"])?.success()?;
        ensure!(scene.ending_of_guests()? == Ending::Stayed);
        scene.again()?;
    }
    Ok(())
}

/// Runs itself in a mount namespace of its own, where the state folder of `a` is a small disk.
#[test]
fn a_full_disk() -> Result<()> {
    const INSIDE: &str = "DWCP_TEST_MOUNTS";
    if !SimScene::possible("a_full_disk") {
        return Ok(());
    }
    if std::env::var_os(INSIDE).is_none() {
        let arguments = ["--mount", "--propagation", "private", "--"];
        let mut again = std::process::Command::new("unshare");
        again.args(arguments).arg(std::env::current_exe()?).args([
            "--exact",
            "faults::a_full_disk",
            "--nocapture",
        ]);
        let output = again.env(INSIDE, "1").output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if said.contains("unshare failed") {
            dwcp_tests::skip("a_full_disk", said.trim());
            return Ok(());
        }
        ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stdout));
        return Ok(());
    }
    let disk = tempfile::tempdir()?;
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
        .arg(disk.path())
        .status()?;
    ensure!(mounted.success());
    let a = AgentConfig { state_dir: Some(disk.path().join("state")), ..AgentConfig::default() };
    let mut scene = SimScene::with(SimGuest::default(), a, AgentConfig::default())?;
    let relay = Relay::start(scene.b.listen()?.data)?;
    scene.via = Some(format!("b={}", relay.address()));
    scene.incoming()?;
    scene.begin("m1", &["--bandwidth-limit", "10Mbit"])?.success()?;
    until("precopy", LIMIT, || Ok((bytes(&scene)? > 0).then_some(())))?;
    let filler = disk.path().join("filler");
    let full = std::fs::write(&filler, vec![0; 1 << 20]);
    ensure!(full.is_err(), "the disk takes more than it has");
    // The journal still has the rest of its last block. Each lost link takes two lines of that, until none fits.
    let journal = scene.a.state_dir().join("journal/m1.source.jsonl");
    let mut before = 0;
    until("the journal to be full", LIMIT, || {
        ensure!(!ended(&scene)?, "over before the disk was full: {}", scene.logs());
        relay.cut();
        std::thread::sleep(Duration::from_millis(50));
        relay.mend();
        std::thread::sleep(Duration::from_millis(400));
        let size = std::fs::metadata(&journal)?.len();
        Ok((std::mem::replace(&mut before, size) == size && size > 3600).then_some(()))
    })?;
    // The commit cannot be written, so there is none.
    until("the guest back", LIMIT, || Ok(ended(&scene)?.then_some(()))).with_context(|| scene.logs())?;
    ensure!(scene.ending_of_guests()? == Ending::Stayed, "{}", scene.logs());
    scene.fresh_destination()?;
    scene.incoming()?;
    scene.migrate(&[])?.refused_as("journal_failed")?;
    ensure!(scene.from.is_running());
    std::fs::remove_file(&filler)?;
    scene.again()
}

#[test]
fn a_torn_journal() -> Result<()> {
    if !SimScene::possible("a_torn_journal") {
        return Ok(());
    }
    let mut scene = SimScene::new()?;
    scene.incoming()?;
    scene.begin("m1", &SLOW)?.success()?;
    until("precopy", LIMIT, || Ok((bytes(&scene)? > 0).then_some(())))?;
    scene.a.kill();
    // What a crash of the machine may leave of a last line.
    let path = scene.a.state_dir().join("journal/m1.source.jsonl");
    let mut text = std::fs::read(&path)?;
    text.extend_from_slice(b"{\"unix_ms\":17");
    std::fs::write(&path, text)?;
    scene.a.start()?;
    ensure!(scene.ending("m1")? == Ending::Stayed);
    scene.again()
}

#[test]
fn an_agent_that_runs_out_of_descriptors() -> Result<()> {
    if !SimScene::possible("an_agent_that_runs_out_of_descriptors") {
        return Ok(());
    }
    let mut scene = SimScene::new()?;
    let pid = scene.b.pid().context("b runs")?;
    let limit = |files: u32| -> Result<()> {
        let set = std::process::Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--nofile={files}:4096")])
            .status()?;
        ensure!(set.success(), "prlimit");
        Ok(())
    };
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u32;
    scene.incoming()?;
    limit(open + 4)?;
    let said = scene.migrate(&["--path", "v3", "--streams", "8", "--deadline", "5s"])?;
    limit(4096)?;
    never_both(&scene.from, &scene.to)?;
    ensure!(scene.b.http_get("/healthz").is_ok(), "the agent does not live on");
    let ending = scene.ending_of_guests()?;
    ensure!((said.status == Some(0)) == (ending == Ending::Moved), "{said:?}\n{}", scene.logs());
    if ending == Ending::Stayed { scene.again() } else { Ok(()) }
}

#[test]
fn a_vmm_that_answers_no_more() -> Result<()> {
    if !SimScene::possible("a_vmm_that_answers_no_more") {
        return Ok(());
    }
    // At the destination, before anything was touched: refused at once.
    let mut scene = SimScene::new()?;
    scene.incoming()?;
    scene.to.fault("hang query-memdev")?;
    scene.to.fault("hang qom-get")?;
    let said = scene.migrate(&[])?.refusal()?;
    // Who loses patience first, the destination with its VMM or the source with the destination, says so.
    ensure!(said.contains("error: qmp_") || said.contains("error: peer_timeout"), "{said}");
    ensure!(scene.ending_of_guests()? == Ending::Stayed);
    scene.to.kill();
    scene.again()?;

    // At the source, in its middle: the VMM does not say how far it is; its data goes on.
    let scene = SimScene::new()?;
    scene.incoming()?;
    scene.from.fault("hang query-migrate")?;
    scene.begin("m1", &SLOW)?.success()?;
    until("an end", LIMIT, || Ok(ended(&scene)?.then_some(()))).with_context(|| scene.logs())?;
    never_both(&scene.from, &scene.to)?;
    Ok(())
}

#[test]
fn a_vmm_that_talks_nonsense() -> Result<()> {
    if !SimScene::possible("a_vmm_that_talks_nonsense") {
        return Ok(());
    }
    // What a newer QEMU may say.
    let scene = SimScene::new()?;
    for vmm in [&scene.from, &scene.to] {
        let stamp = "\"timestamp\":{\"seconds\":1,\"microseconds\":2}";
        vmm.fault(&format!("say query-migrate {{\"event\":\"NEWS\",\"data\":{{\"x\":[1]}},{stamp}}}"))?;
        vmm.fault(&format!(
            "say query-status {{\"event\":\"MIGRATION\",\"data\":{{\"status\":\"new\"}},{stamp}}}"
        ))?;
    }
    scene.incoming()?;
    scene.migrate(&[])?.success().with_context(|| scene.logs())?;
    ensure!(scene.ending_of_guests()? == Ending::Moved);

    // What none says.
    let mut scene = SimScene::new()?;
    scene.incoming()?;
    scene.to.fault("say stop this is not JSON")?;
    scene.migrate(&["--deadline", "3s"])?.refusal()?;
    ensure!(scene.ending_of_guests()? == Ending::Stayed);
    scene.to.kill();
    scene.again()
}

#[test]
fn a_cancel_at_any_moment() -> Result<()> {
    if !SimScene::possible("a_cancel_at_any_moment") {
        return Ok(());
    }
    for step in 0..8 {
        let mut scene = SimScene::new()?;
        scene.incoming()?;
        scene.begin("m1", &[])?.success()?;
        // The same once more is the same migration; another one of the same VM is refused.
        scene.begin("m1", &[])?.success()?;
        let second = scene.begin("m2", &[])?;
        let moment = Instant::now() + Duration::from_millis(25 * step);
        until("the moment", LIMIT, || Ok((Instant::now() >= moment).then_some(())))?;
        // Whether it still could be cancelled is for the agent to say.
        scene.a.ctl(&[&"cancel", &"m1"])?;
        let ending = scene.ending("m1").with_context(|| format!("cancelled at step {step}"))?;
        if second.status == Some(0) {
            // It came after the end of the first.
            scene.ending("m2")?;
        }
        if ending == Ending::Stayed && scene.from.is_running() {
            scene.again()?;
        }
    }
    Ok(())
}

#[test]
fn a_service_that_is_stopped() -> Result<()> {
    if !SimScene::possible("a_service_that_is_stopped") {
        return Ok(());
    }
    for at_source in [true, false] {
        let mut scene = SimScene::new()?;
        scene.incoming()?;
        scene.begin("m1", &SLOW)?.success()?;
        until("precopy", LIMIT, || Ok((bytes(&scene)? > 0).then_some(())))?;
        let agent = if at_source { &mut scene.a } else { &mut scene.b };
        let status = agent.stop()?;
        ensure!(status == Some(0), "stopped with {status:?}\n{}", agent.log());
        ensure!(scene.from.is_running(), "the guest does not outlive the agent");
        let agent = if at_source { &mut scene.a } else { &mut scene.b };
        agent.kill();
        agent.start()?;
        ensure!(scene.ending("m1")? == Ending::Stayed);
        scene.again()?;
    }
    Ok(())
}

/// A link that is dark for some time, in the middle of a migration.
struct Dark {
    direction: Direction,
    time: Duration,
    /// Connections that are made anew, at least.
    anew: u64,
}

impl Dark {
    fn over(&self, test: &str, row: &str, path: &str) -> Result<()> {
        let Some((mut wan, scene)) = far_apart(test)? else { return Ok(()) };
        scene.incoming()?;
        scene.begin("m1", &["--path", path, "--mode", "internet"])?.success()?;
        let delivered = |wan: &mut Wan| -> Result<u64> { Ok(wan.count()?[0].delivered) };
        until("the middle of precopy", LIMIT, || Ok((delivered(&mut wan)? > 1000).then_some(())))?;
        wan.cut(self.direction)?;
        let began = unix_ms();
        let end = Instant::now() + self.time;
        until("the end of the dark", LIMIT, || Ok((Instant::now() >= end).then_some(())))?;
        ensure!(scene.from.is_running(), "the guest does not run on: {}", scene.logs());
        let before = delivered(&mut wan)?;
        wan.mend(self.direction)?;
        let mended = Instant::now();
        until("data to flow again", LIMIT, || Ok((delivered(&mut wan)? > before + 50).then_some(())))?;
        let recovered = Some(mended.elapsed());
        ensure!(scene.ending("m1")? == Ending::Moved, "{}", scene.logs());
        let result = status(&scene)?;
        let anew = result["reconnects"].as_u64();
        ensure!(anew >= Some(self.anew), "{anew:?} connections were made anew: {}", scene.logs());
        let detected = detected(&scene.a, "m1", began)?;
        fault_report(row, &format!("dwcp {path}"), "moved, guest right", Seen { recovered, detected })
    }
}

/// Two agents at the ends of a line of 20 Mbit/s and 10 ms.
fn far_apart(test: &str) -> Result<Option<(Wan, SimScene)>> {
    if !SimScene::possible(test) {
        return Ok(None);
    }
    let profile = LineProfile::new(20_000_000, Duration::from_millis(5));
    let Some(wan) = Wan::start_or_skip(test, profile)? else { return Ok(None) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        // The line is cut by the number of packets: those of a look at QUIC are not to count.
        extra: "[link]\ntransport = \"tcp\"\n".into(),
        ..AgentConfig::default()
    };
    let guest = SimGuest { pages: 3072, hot_pages: 1000, writes_per_step: 20, ..SimGuest::default() };
    let scene = SimScene::with(guest, at(End::A), at(End::B))?;
    Ok(Some((wan, scene)))
}

/// A word of the handover that is lost with the connections, once: it is said again, and the guest moves.
fn lost(test: &str, row: &str, attack: impl FnOnce(Arc<Relay>) -> Attack) -> Result<()> {
    if !SimScene::possible(test) {
        return Ok(());
    }
    let mut scene = SimScene::new()?;
    let relay = Arc::new(Relay::start(scene.b.listen()?.data)?);
    let middle = Middle::start_towards(&scene.a, &scene.b, relay.address(), attack(relay.clone()))?;
    scene.via = Some(middle.target());
    scene.incoming()?;
    let through = ["--path", "v3", "--mode", "internet", "--streams", "1"];
    scene.begin("m1", &through)?.success()?;
    ensure!(scene.ending("m1")? == Ending::Moved, "{}", scene.logs());
    ensure!(status(&scene)?["reconnects"].as_u64() > Some(0), "nothing was lost: {}", scene.logs());
    fault_report(row, "dwcp v3", "moved, guest right", Seen::default())
}

/// Loses a message with all connections.
fn reset(relay: &Relay) -> Vec<Body> {
    relay.cut();
    relay.mend();
    Vec::new()
}

/// The source's status of `m1`; null where it knows none.
fn status(scene: &SimScene) -> Result<Value> {
    let said = scene.a.ctl(&[&"status", &"m1", &"--json"])?;
    if said.status == Some(0) { said.json() } else { Ok(Value::Null) }
}

/// Bytes that the source has given to the network.
fn bytes(scene: &SimScene) -> Result<u64> {
    Ok(status(scene)?["wire_bytes"].as_u64().unwrap_or_default())
}

fn ended(scene: &SimScene) -> Result<bool> {
    let status = status(scene)?;
    Ok(["completed", "aborted", "failed"].iter().any(|end| status["status"] == *end))
}
