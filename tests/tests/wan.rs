//! The long line proves itself with plain TCP: rate, delay, loss, cut and mend.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dwcp_tests::{
    AgentConfig, Backing, Direction, End, Ending, LineProfile, QemuSpec, QemuVersion, Role, Scene, SimGuest,
    SimScene, Wan, Watcher, ram, until,
};
use serde_json::{Value, json};

#[test]
fn the_line_paces_and_delays() -> Result<()> {
    let profile = LineProfile::new(80_000_000, Duration::from_millis(10));
    let Some(mut wan) = Wan::start_or_skip("the_line_paces_and_delays", profile)? else { return Ok(()) };
    let mut client = Client::new(&wan)?;

    let start = Instant::now();
    ensure!(client.round_trip(b"x")? == b"x");
    let round_trip = start.elapsed();
    ensure!((20..60).contains(&round_trip.as_millis()), "{round_trip:?} for a round trip of 20 ms");

    // 2 MB each way at 10 MB/s: 0.2 s at best, and the ramp of TCP.
    let start = Instant::now();
    client.round_trip(&vec![7; 2_000_000])?;
    let time = start.elapsed();
    ensure!(time >= Duration::from_millis(200), "faster than the line: {time:?}");
    ensure!(time < Duration::from_secs(5), "much slower than the line: {time:?}");
    ensure!(wan.count()?[0].delivered > 1000);
    Ok(())
}

#[test]
fn what_is_cut_goes_on_once_it_is_mended() -> Result<()> {
    let profile = LineProfile::new(0, Duration::from_millis(1));
    let Some(mut wan) = Wan::start_or_skip("what_is_cut_goes_on_once_it_is_mended", profile)? else {
        return Ok(());
    };
    let mut client = Client::new(&wan)?;
    client.round_trip(b"before")?;
    wan.cut(Direction::AToB)?;
    client.0.write_all(b"during")?;
    let dropped = dwcp_tests::until("lost packets", Duration::from_secs(10), || {
        Ok(wan.count()?.first().map(|count| count.dropped).filter(|&dropped| dropped > 0))
    })?;
    wan.mend(Direction::AToB)?;
    ensure!(client.receive(6)? == b"during", "TCP sends again what was lost ({dropped} packets)");
    Ok(())
}

#[test]
fn a_lossy_line_loses() -> Result<()> {
    let profile = LineProfile { loss_ppm: 20_000, ..LineProfile::new(0, Duration::from_millis(1)) };
    let Some(mut wan) = Wan::start_or_skip("a_lossy_line_loses", profile)? else { return Ok(()) };
    let mut client = Client::new(&wan)?;
    let sent = vec![3; 1_000_000];
    ensure!(client.round_trip(&sent)? == sent, "TCP makes good what the line loses");
    ensure!(wan.count()?.iter().all(|count| count.dropped > 0));
    Ok(())
}

/// Two agents at the ends of a line like that between two sites: 200 Mbit/s, 20 ms there and back.
#[test]
fn a_live_guest_crosses_the_line() -> Result<()> {
    let test = "a_live_guest_crosses_the_line";
    let profile = LineProfile::new(200_000_000, Duration::from_millis(10));
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let Some(mut wan) = Wan::start_or_skip(test, profile)? else { return Ok(()) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        ..AgentConfig::default()
    };
    let spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    let scene = Scene::with(&kit, spec, at(End::A), at(End::B))?;
    let watcher = Watcher::start(&[&scene.from, &scene.to])?;
    let result = scene.move_guest(&["--path", "v3"])?;
    scene.to.guest_ok_for(Duration::from_secs(2))?;
    watcher.finish()?;

    ensure!(result["mode"] == "internet", "a line of 20 ms is no datacenter: {result}");
    let carried = wan.count()?[0].delivered * 1500;
    let said = result["wire_bytes"].as_u64().unwrap_or_default();
    ensure!(said <= carried, "{said} bytes on the wire, but the line carried at most {carried}: {result}");
    Ok(())
}

/// What a live guest would take is said without touching it, before its destination even waits; then it is moved, and took about as much.
#[test]
fn an_estimate_leaves_the_guest_alone_and_is_near() -> Result<()> {
    let test = "an_estimate_leaves_the_guest_alone_and_is_near";
    let profile = LineProfile::new(200_000_000, Duration::from_millis(10));
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let Some(wan) = Wan::start_or_skip(test, profile)? else { return Ok(()) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        ..AgentConfig::default()
    };
    for backing in [Backing::Memfd, Backing::Anonymous] {
        let private = backing == Backing::Anonymous;
        let spec = QemuSpec { backing, ..QemuSpec::new(QemuVersion::V10_0, Role::Source) };
        let scene = Scene::with(&kit, spec, at(End::A), at(End::B))?;
        let watcher = Watcher::start(&[&scene.from, &scene.to])?;
        let estimate = scene.estimate(&["--path", "v3"])?.json()?;
        let number =
            |value: &Value, key: &str| value[key].as_f64().with_context(|| format!("{key}: {value}"));
        ensure!(estimate["mode"] == "internet" && estimate["problems"] == json!([]), "{estimate}");
        // The guest writes to 2000 pages a second, where the machine lets it.
        let dirty = number(&estimate, "dirty_rate")?;
        ensure!((100e3..60e6).contains(&dirty), "{estimate}");
        let notes = estimate["notes"].to_string();
        ensure!(notes.contains("does not wait for the VM yet"), "{estimate}");
        ensure!(notes.contains("cannot be read") == private, "{estimate}");
        ensure!(estimate["zero_share"].is_null() == private, "{estimate}");
        scene.from.guest_ok_for(Duration::from_secs(1))?;

        if !private {
            let moved = scene.move_guest(&["--path", "v3"])?;
            let ratio = number(&estimate, "wire_bytes")? / number(&moved, "wire_bytes")?;
            ensure!((0.4..2.5).contains(&ratio), "{ratio:.2} of the bytes that it took: {estimate}, {moved}");
        }
        watcher.finish()?;
    }
    Ok(())
}

/// The line becomes far in the middle of a migration, and near again: the mode follows, within two seconds.
#[test]
fn the_mode_follows_the_line() -> Result<()> {
    let test = "the_mode_follows_the_line";
    // A queue of 2.6 ms: what the migration itself puts there does not make the line long.
    let near = LineProfile { queue: 64 << 10, ..LineProfile::new(200_000_000, Duration::ZERO) };
    let far = LineProfile::new(200_000_000, Duration::from_millis(10));
    if !SimScene::possible(test) {
        return Ok(());
    }
    let Some(mut wan) = Wan::start_or_skip(test, near)? else { return Ok(()) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        extra: "[link]\ndatacenter_rate = \"40Mbit\"\n".into(),
        ..AgentConfig::default()
    };
    // More than the line carries in the time of this test, written to all the time.
    let guest = SimGuest { pages: 65_536, zero_percent: 0, hot_pages: 65_536, ..SimGuest::default() };
    let scene = SimScene::with(guest, at(End::A), at(End::B))?;
    scene.incoming()?;
    scene.begin("m", &["--path", "v3", "--source", "stream"])?.success()?;
    let status = || scene.a.ctl(&[&"status", &"m", &"--json"])?.success()?.json();
    let on = |mode: &str, switches: u64| {
        until(&format!("{mode} mode"), Duration::from_secs(30), || {
            let status = status()?;
            ensure!(status["status"] != "completed", "too early: {status}");
            let there = status["mode"] == mode && status["mode_switches"] == switches;
            Ok((there && status["chunks"].as_u64() > Some(8)).then_some(status))
        })
        .with_context(|| scene.logs())
    };
    on("datacenter", 0)?;
    wan.set(Direction::Both, far)?;
    let begun = Instant::now();
    let status = on("internet", 1)?;
    println!("internet after {:?}: {}", begun.elapsed(), status["mode_reason"]);
    ensure!(status["mode_reason"].as_str().is_some_and(|why| why.contains("round trip")), "{status}");
    // Three seconds lie between two changes at least.
    wan.set(Direction::Both, near)?;
    let begun = Instant::now();
    let status = on("datacenter", 2)?;
    println!("datacenter after {:?}: {}", begun.elapsed(), status["mode_reason"]);
    wan.set(Direction::Both, LineProfile { queue: 4 << 20, ..LineProfile::new(0, Duration::ZERO) })?;
    ensure!(scene.ending("m")? == Ending::Moved, "{}", scene.logs());
    let metrics = scene.a.http_get("/metrics")?;
    for series in ["to=\"internet\",cause=\"link_far\"", "to=\"datacenter\",cause=\"link_near\""] {
        ensure!(metrics.contains(&format!("dwcp_mode_switches_total{{{series}}} 1")), "{metrics}");
    }
    Ok(())
}

/// From internet mode, whose pages went straight into the destination's RAM, to datacenter mode: the guest's memory arrives whole.
#[test]
fn a_guest_arrives_whole_although_the_mode_changed() -> Result<()> {
    let test = "a_guest_arrives_whole_although_the_mode_changed";
    let far = LineProfile::new(40_000_000, Duration::from_millis(10));
    let near = LineProfile { queue: 16 << 10, ..LineProfile::new(40_000_000, Duration::ZERO) };
    let fast = LineProfile { queue: 4 << 20, ..LineProfile::new(0, Duration::ZERO) };
    let Some(kit) = Scene::kit_or_skip(test) else { return Ok(()) };
    let Some(mut wan) = Wan::start_or_skip(test, far)? else { return Ok(()) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        extra: "[link]\ndatacenter_rate = \"16Mbit\"\n".into(),
        ..AgentConfig::default()
    };
    let spec = QemuSpec { backing: Backing::Memfd, ..QemuSpec::new(QemuVersion::V10_0, Role::Source) };
    let scene = Scene::with(&kit, spec, at(End::A), at(End::B))?;
    scene.from.watch().run("stop", json!({}))?;
    scene.incoming()?.success()?;
    let result = std::thread::scope(|scope| -> Result<Value> {
        let moving = scope.spawn(|| scene.migrate(&["--path", "v3", "--id", "m"])?.success()?.json());
        let until_status = |what: &str, there: &dyn Fn(&Value) -> bool| {
            until(what, Duration::from_secs(60), || {
                // Until it is registered there is none.
                let status = scene.a.ctl(&[&"status", &"m", &"--json"])?.json().unwrap_or_default();
                Ok((there(&status) || status["phase"] == "completed").then_some(()))
            })
        };
        until_status("the first pages", &|s| s["raw_bytes"].as_u64() > Some(4 << 20))?;
        wan.set(Direction::Both, near)?;
        until_status("datacenter mode", &|s| s["mode"] == "datacenter")?;
        wan.set(Direction::Both, fast)?;
        moving.join().map_err(|_| anyhow!("the moving thread failed"))?
    });
    let result = result.with_context(|| scene.logs())?;
    ensure!(result["mode"] == "datacenter" && result["mode_switches"] == 1, "{result}");
    ensure!(result["sink"] == "stream" && result["path_switches"] == 0, "{result}");
    ensure!(result["fallback_reasons"].to_string().contains("sink stream instead of mapped"), "{result}");
    ensure!(ram::compare(&scene.from, &scene.to, scene.ram_bytes())?.is_none(), "{result}");
    Ok(())
}

/// Data that goes over QUIC waits out a dark line as TCP's does, and flows again as soon.
#[test]
fn quic_outlives_a_dark_line() -> Result<()> {
    let test = "quic_outlives_a_dark_line";
    if !SimScene::possible(test) {
        return Ok(());
    }
    let profile = LineProfile::new(60_000_000, Duration::from_millis(10));
    let Some(mut wan) = Wan::start_or_skip(test, profile)? else { return Ok(()) };
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        extra: "[link]\ntransport = \"quic\"\n".into(),
        ..AgentConfig::default()
    };
    let guest = SimGuest { pages: 8192, zero_percent: 0, ..SimGuest::default() };
    let scene = SimScene::with(guest, at(End::A), at(End::B))?;
    scene.incoming()?;
    scene.begin("m", &["--path", "v3", "--mode", "internet", "--downtime-limit", "1s"])?.success()?;
    let status = || scene.a.ctl(&[&"status", &"m", &"--json"])?.success()?.json();
    let flows = until("the middle of precopy", Duration::from_secs(30), || {
        let status = status()?;
        Ok((status["chunks"].as_u64() > Some(8)).then_some(status))
    })
    .with_context(|| scene.logs())?;
    ensure!(flows["transport"] == "quic" && flows["status"] == "precopy", "{flows}");
    wan.cut(Direction::Both)?;
    let dark = Instant::now() + Duration::from_secs(10);
    until("the end of the dark", Duration::from_secs(20), || Ok((Instant::now() >= dark).then_some(())))?;
    let before = wan.count()?[0].delivered;
    wan.mend(Direction::Both)?;
    let back = Instant::now();
    until("data to flow again", Duration::from_secs(20), || {
        Ok((wan.count()?[0].delivered > before + 200).then_some(()))
    })
    .with_context(|| scene.logs())?;
    let took = back.elapsed();
    println!("data flows again {took:?} after the line is back");
    ensure!(took < Duration::from_secs(3), "data flows again only {took:?} after the line is back");
    ensure!(scene.ending("m")? == Ending::Moved, "{}", scene.logs());
    let status = status()?;
    ensure!(status["transport"] == "quic" && status["path_switches"] == 0, "{status}\n{}", scene.logs());
    Ok(())
}

/// Where TCP takes each lost packet for a full link, QUIC carries clearly more, and is chosen for that.
#[test]
fn quic_is_chosen_where_it_was_measured_to_carry_more() -> Result<()> {
    let test = "quic_is_chosen_where_it_was_measured_to_carry_more";
    if !SimScene::possible(test) {
        return Ok(());
    }
    let profile = LineProfile { loss_ppm: 5000, ..LineProfile::new(80_000_000, Duration::from_millis(50)) };
    let Some(wan) = Wan::start_or_skip(test, profile)? else { return Ok(()) };
    // One that goes by loss, and that every kernel has; it is the namespace's own.
    let control = "/proc/sys/net/ipv4/tcp_congestion_control";
    wan.within(End::A, || std::fs::write(control, "reno").context(control))?;
    let at = |end: End| AgentConfig {
        data: (end.address(), 0).into(),
        namespace: Some(wan.namespace(end)),
        extra: "[link]\ncongestion = \"system\"\n".into(),
        ..AgentConfig::default()
    };
    let scene = SimScene::with(SimGuest::default(), at(End::A), at(End::B))?;
    scene.incoming()?;
    let moved = scene.migrate(&["--path", "v3", "--downtime-limit", "1s"])?;
    let moved = moved.success().with_context(|| scene.logs())?.json()?;
    println!("{}: {}", moved["transport"], moved["transport_reason"]);
    ensure!(moved["mode"] == "internet" && moved["transport"] == "quic", "{moved}\n{}", scene.logs());
    ensure!(moved["transport_reason"].as_str().is_some_and(|why| why.contains("and TCP")), "{moved}");
    let metrics = scene.a.http_get("/metrics")?;
    let leg = "dwcp_legs_total{path=\"v3\",encryption=\"tls\",transport=\"quic\"} 1";
    ensure!(metrics.contains(leg), "{metrics}");
    Ok(())
}

/// A connection from end `a` to an echo at end `b`.
struct Client(TcpStream);

impl Client {
    fn new(wan: &Wan) -> Result<Self> {
        let listener = wan.within(End::B, || Ok(TcpListener::bind((End::B.address(), 0))?))?;
        let address = listener.local_addr()?;
        // Ends when the client's side closes, or with the test.
        std::thread::spawn(move || -> std::io::Result<()> {
            let (mut from, _) = listener.accept()?;
            std::io::copy(&mut from.try_clone()?, &mut from)?;
            Ok(())
        });
        let stream = wan.within(End::A, || Ok(TcpStream::connect(address)?))?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        stream.set_nodelay(true)?;
        Ok(Client(stream))
    }

    fn round_trip(&mut self, data: &[u8]) -> Result<Vec<u8>> {
        let mut sender = self.0.try_clone()?;
        // Beside the reading, since the sockets' buffers are smaller than the data.
        std::thread::scope(|scope| {
            let sending = scope.spawn(move || sender.write_all(data));
            let received = self.receive(data.len());
            sending.join().map_err(|_| anyhow!("the sender panicked"))??;
            received
        })
    }

    fn receive(&mut self, length: usize) -> Result<Vec<u8>> {
        let mut data = vec![0; length];
        self.0.read_exact(&mut data)?;
        Ok(data)
    }
}
