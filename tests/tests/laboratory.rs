//! The laboratory proves itself: plain QEMU to QEMU, without an agent, in every combination of versions.

use std::time::Duration;

use anyhow::Result;
use dwcp_tests::{Kit, Qemu, QemuSpec, QemuVersion, Role, Watcher, plain_migration, ram};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_live_guest_moves_and_its_memory_stays_right() -> Result<()> {
    let Some(kit) = Kit::or_skip("a_live_guest_moves_and_its_memory_stays_right") else { return Ok(()) };
    for version in QemuVersion::ALL {
        let dir = tempfile::tempdir()?;
        let spec = QemuSpec::new(version, Role::Source);
        let to = Qemu::launch(&kit, dir.path(), "b", &spec.destination())?;
        let from = Qemu::launch(&kit, dir.path(), "a", &spec)?.booted()?;
        from.guest_ok_for(Duration::from_secs(1))?;

        let watcher = Watcher::start(&[&from, &to])?;
        plain_migration(&from, &to, LIMIT)?;
        let report = to.guest_ok_for(Duration::from_secs(3))?;
        let timeline = watcher.finish()?;

        assert_eq!(from.status()?, "postmigrate");
        assert!(report.wrote > 0, "the guest was to write all the while");
        assert!(timeline.downtime(0, 1)? < Duration::from_secs(5), "{timeline}");
    }
    Ok(())
}

#[test]
fn a_paused_guest_has_the_same_memory_on_both_sides() -> Result<()> {
    let Some(kit) = Kit::or_skip("a_paused_guest_has_the_same_memory_on_both_sides") else { return Ok(()) };
    // From the older to the newer version, which the laboratory's machine type allows.
    let dir = tempfile::tempdir()?;
    let spec = QemuSpec::new(QemuVersion::V7_2, Role::Source);
    let newer = QemuSpec { version: QemuVersion::V10_0, ..spec.destination() };
    let to = Qemu::launch(&kit, dir.path(), "b", &newer)?;
    let from = Qemu::launch(&kit, dir.path(), "a", &spec)?.booted()?;
    from.watch().run("stop", json!({}))?;
    plain_migration(&from, &to, LIMIT)?;
    assert_eq!(to.status()?, "paused");
    assert_eq!(ram::compare(&from, &to, spec.ram_bytes())?, None);

    // The comparison sees what a running guest changes.
    to.watch().run("cont", json!({}))?;
    to.guest_ok_for(Duration::from_secs(1))?;
    to.watch().run("stop", json!({}))?;
    assert!(ram::compare(&from, &to, spec.ram_bytes())?.is_some());
    Ok(())
}

#[test]
fn two_running_guests_are_noticed() -> Result<()> {
    let Some(kit) = Kit::or_skip("two_running_guests_are_noticed") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let spec = QemuSpec::new(QemuVersion::V7_2, Role::Source);
    let to = Qemu::launch(&kit, dir.path(), "b", &spec.destination())?;
    let from = Qemu::launch(&kit, dir.path(), "a", &spec)?.booted()?;
    let watcher = Watcher::start(&[&from, &to])?;
    plain_migration(&from, &to, LIMIT)?;
    // The very mistake that the agents' handover exists to prevent.
    from.watch().run("cont", json!({}))?;
    from.guest_ok_for(Duration::from_millis(200))?;
    let mistake = watcher.finish().unwrap_err().to_string();
    assert!(mistake.starts_with("two guests ran at once"), "{mistake}");
    Ok(())
}

#[test]
fn a_corrupted_page_is_found_by_the_guest() -> Result<()> {
    let Some(kit) = Kit::or_skip("a_corrupted_page_is_found_by_the_guest") else { return Ok(()) };
    let dir = tempfile::tempdir()?;
    let backing = dir.path().join("ram");
    let mut spec = QemuSpec::new(QemuVersion::V10_0, Role::Source);
    spec.backing = dwcp_tests::Backing::File(backing.clone());
    spec.load = spec.load.idle();
    let guest = Qemu::launch(&kit, dir.path(), "a", &spec)?.booted()?;
    guest.guest_ok_for(Duration::from_millis(200))?;
    ram::flip_a_test_page(&backing)?;
    let found = format!("{:#}", guest.guest_ok_for(Duration::from_secs(5)).unwrap_err());
    assert!(found.contains("why=checksum"), "{found}");
    Ok(())
}
