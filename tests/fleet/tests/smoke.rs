//! The drill with a handful of nodes: all of its steps work. How fast they are is for a quiet machine to say.

use std::path::Path;
use std::process::Command;

#[test]
fn a_small_fleet_goes_through_all_steps() {
    let fleet = Path::new(env!("CARGO_BIN_EXE_dwcp-fleet"));
    let control = fleet.with_file_name("dwcp-control");
    if !control.exists() {
        assert!(std::env::var_os("CI").is_none(), "build dwcp-control first");
        println!("SKIPPED a_small_fleet_goes_through_all_steps: no {} here", control.display());
        return;
    }
    let mut drill = Command::new(fleet);
    let drill = drill.arg("--control").arg(control).args(["--nodes", "20", "--rounds", "1"]);
    let output = drill.output().expect("start the drill");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("| planned restart | 0 leases | away"), "{said}");
}
