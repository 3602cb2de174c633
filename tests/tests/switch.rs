//! The flag is turned while a guest of a real QEMU is on its way: nothing is lost, and v3 is left in time.

use anyhow::{Result, ensure};
use dwcp_tests::{QemuVersion, Scene, TurnPlan, turn_in_flight};

const MIB: u64 = 1 << 20;

#[test]
fn a_live_guest_turns_to_v1_and_back_and_again() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("a_live_guest_turns_to_v1_and_back_and_again") else { return Ok(()) };
    let plan = TurnPlan {
        version: QemuVersion::V10_0,
        live: true,
        at: vec![6 * MIB, 20 * MIB, 26 * MIB],
        cut: false,
        bandwidth: "60Mbit".into(),
        channels: 1,
        direct: false,
    };
    let outcome = turn_in_flight(&kit, &plan)?;
    ensure!(outcome.late_v3_bytes == 0, "{outcome:?}");
    ensure!(outcome.seconds_to_v1.iter().all(|seconds| *seconds < 5.0), "{outcome:?}");
    Ok(())
}

#[test]
fn a_paused_guest_turns_to_v1_while_its_link_is_cut() -> Result<()> {
    let Some(kit) = Scene::kit_or_skip("a_paused_guest_turns_to_v1_while_its_link_is_cut") else {
        return Ok(());
    };
    let plan = TurnPlan {
        version: QemuVersion::V7_2,
        live: false,
        at: vec![6 * MIB],
        cut: true,
        bandwidth: "80Mbit".into(),
        channels: 1,
        direct: false,
    };
    let outcome = turn_in_flight(&kit, &plan)?;
    ensure!(outcome.late_v3_bytes == 0, "{outcome:?}");
    Ok(())
}
