//! What cannot work is refused with a clear error and an exit status, and the guest does not notice.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Result, ensure};
use dwcp_tests::{Agent, AgentConfig, Qemu, QemuSpec, QemuVersion, Role, Scene, VM};

/// Each refusal leaves the guest at the source running and right, and the scene fit for the real migration at the end.
#[test]
fn refused_migrations_leave_the_guest_alone() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("refused_migrations_leave_the_guest_alone") else { return Ok(()) };
    let scene = Scene::new(&kit, QemuVersion::V10_0)?;
    let target = scene.b.target()?;
    let qmp = scene.from.qmp_path().display().to_string();
    let nowhere = scene.dir().join("no.sock").display().to_string();
    // A port that was free a moment ago, and at which nobody listens.
    let closed = format!("b={}", TcpListener::bind("127.0.0.1:0")?.local_addr()?);
    // A node whose key `a` does not hold, at `b`'s address.
    let stranger = format!("stranger={}", scene.b.listen()?.data);

    scene.incoming()?.success()?;
    // What was wrong, its stable code, and what the refusal must name.
    let cases = [
        ("a wrong QMP path", &*nowhere, &*target, "qmp_connect", &*nowhere),
        ("an unreachable peer", &qmp, &closed, "connection_refused", &closed[2..]),
        ("an unknown peer", &qmp, &stranger, "unknown_node", "stranger"),
    ];
    for (case, qmp, target, code, named) in cases {
        let said = scene.a.ctl(&[&"migrate", &VM, &"--qmp", &qmp, &"--to", &target])?.refused_as(code)?;
        ensure!(said.contains(named), "{case} is not named: {said}");
        ensure!(scene.from.status()? == "running", "{case} stopped the guest");
    }
    // The command line's own refusals have no code: nothing was asked of the agent yet.
    let said = scene.a.ctl(&[&"migrate", &VM, &"--qmp", &qmp, &"--to", &"b=here"])?.refusal()?;
    ensure!(said.contains("'b=here'"), "an address that is none is not named: {said}");
    scene.from.guest_ok_for(Duration::from_secs(1))?;

    // None of it is left behind: the right command works.
    scene.migrate(&["--path", "v3"])?.success()?;
    scene.to.guest_ok_for(Duration::from_secs(1))?;
    Ok(())
}

/// `a` knows `b`, but `b` has never heard of `a`: the connection fails at the keys.
#[test]
fn a_peer_that_does_not_know_our_key_refuses_us() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("a_peer_that_does_not_know_our_key_refuses_us") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let guest = Qemu::launch(&kit, dir.path(), "vm-a", &QemuSpec::new(QemuVersion::V7_2, Role::Source))?;
    let mut a = Agent::prepare(dir.path(), "a", AgentConfig::default())?;
    let mut b = Agent::prepare(dir.path(), "b", AgentConfig::default())?;
    a.trust(&b)?;
    a.start()?;
    b.start()?;
    let guest = guest.booted()?;

    let (qmp, target) = (guest.qmp_path(), b.target()?);
    let said =
        a.ctl(&[&"migrate", &VM, &"--qmp", &qmp.display(), &"--to", &target])?.refused_as("key_refused")?;
    ensure!(said.contains("a.pub"), "what is to be done is not said: {said}");
    guest.guest_ok_for(Duration::from_secs(1))?;
    Ok(())
}

/// The QEMU named to `incoming` runs a guest of its own, which must not be stopped.
#[test]
fn a_vm_that_does_not_wait_for_a_migration_is_refused() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("a_vm_that_does_not_wait_for_a_migration_is_refused") else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let guest = Qemu::launch(&kit, dir.path(), "vm-b", &QemuSpec::new(QemuVersion::V7_2, Role::Source))?;
    let (_a, b) = Agent::pair(dir.path(), AgentConfig::default(), AgentConfig::default())?;
    let guest = guest.booted()?;

    let qmp = guest.qmp_path();
    b.ctl(&[&"incoming", &VM, &"--qmp", &qmp.display(), &"--from", &"a"])?.refused_as("not_incoming")?;
    guest.guest_ok_for(Duration::from_secs(1))?;
    Ok(())
}

#[test]
fn an_agent_whose_port_is_taken_says_so_and_ends() -> Result<()> {
    let Some(_kit) = Scene::kit_or_skip("an_agent_whose_port_is_taken_says_so_and_ends") else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let data = taken.local_addr()?;
    let agent = Agent::prepare(dir.path(), "a", AgentConfig { data, ..AgentConfig::default() })?;
    let said = agent.start_refused(&[])?.refusal()?;
    ensure!(said.contains(&data.to_string()), "the address is not named: {said}");
    Ok(())
}

#[test]
fn an_agent_that_cannot_write_its_state_says_so_and_ends() -> Result<()> {
    let Some(_kit) = Scene::kit_or_skip("an_agent_that_cannot_write_its_state_says_so_and_ends") else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let sealed = dir.path().join("sealed");
    std::fs::create_dir(&sealed)?;
    let mut permissions = std::fs::metadata(&sealed)?.permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&sealed, permissions)?;
    let state = sealed.join("state");
    let config = AgentConfig { state_dir: Some(state.clone()), ..AgentConfig::default() };
    let agent = Agent::prepare(dir.path(), "a", config)?;
    // Root writes past permissions; without this right it does not.
    let said = agent.start_refused(&["--bounding-set", "-dac_override"])?.refusal()?;
    ensure!(said.contains(&state.display().to_string()), "the folder is not named: {said}");
    Ok(())
}

#[test]
fn a_configuration_with_an_unknown_key_names_its_line() -> Result<()> {
    let Some(_kit) = Scene::kit_or_skip("a_configuration_with_an_unknown_key_names_its_line") else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let config = AgentConfig { extra: "[limits]\nsurprise = 1\n".into(), ..AgentConfig::default() };
    let said = Agent::prepare(dir.path(), "a", config)?.start_refused(&[])?.refusal()?;
    ensure!(said.contains("surprise") && said.contains("dwcpd.toml:"), "{said}");
    Ok(())
}
