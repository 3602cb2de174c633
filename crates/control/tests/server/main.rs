//! The server as a process: what the plans print works, what was answered outlives kill -9, and it restarts without a gap.

#![allow(clippy::unwrap_used)]

mod client;
mod process;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::client::{ask, plans};
use crate::process::{HOST, Server, Setup};

const FLAGS: &str = "/v1/feature-flags";
const FLAG: &str = "/v1/feature-flags/dwcp_v3_hde";

fn set(percentage: u64) -> String {
    json!({"feature": "dwcp_v3_hde", "percentage": percentage, "enabled": percentage > 0}).to_string()
}

/// Epoch (incarnation, counter) and percentage.
fn state(page: &Value) -> ((u64, u64), u64) {
    let number = |value: &Value| value.as_u64().expect("a number");
    let (flag, epoch) = (&page["flag"], &page["flag"]["epoch"]);
    ((number(&epoch["incarnation"]), number(&epoch["counter"])), number(&flag["percentage"]))
}

#[test]
fn the_commands_of_the_plans_work_as_printed() {
    let setup = Setup::new();
    let server = setup.start_with_tls();
    for (command, works, says) in [
        (plans::TEN, true, "\"percentage\":10"),
        (plans::FIFTY, true, "\"percentage\":50"),
        (plans::HUNDRED, true, "\"percentage\":100"),
        (plans::EXCLUDE, true, "\"excluded\":[\"node-123\",\"node-456\"]"),
        // The comment in it is not JSON.
        (plans::PARTIAL, false, "line 3, column 24"),
        (&plans::PARTIAL.replace("  # or 0", ""), true, "\"percentage\":10"),
        (plans::ROLLBACK, true, "\"enabled\":false"),
        // A POST without a list of nodes leaves the excluded ones as they are.
        (plans::VERIFY, true, "\"excluded\":[\"node-123\",\"node-456\"]"),
        (plans::STATUS, true, "\"converged\": true"),
        (plans::HEALTH, true, "\"status\": \"ok\""),
        (plans::CANARY, true, "\"cohort\""),
    ] {
        let (ok, said) = plans::run(command, HOST, server.address, &setup);
        assert!(ok == works && said.contains(says), "{command}\n{said}");
    }
}

/// Kills the server again and again while changes are made. `DWCP_CONTROL_KILLS` says how often.
#[test]
fn what_was_answered_outlives_a_kill() {
    let rounds =
        std::env::var("DWCP_CONTROL_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(200u64);
    let setup = Setup::new();
    let mut answered = ((1, 1), 0);
    for round in 0..rounds {
        let mut server = setup.start();
        // Whatever was answered is there; at most the one change that had no answer is there as well.
        let found = state(&ask(server.address, "GET", FLAG, None, "").unwrap().json());
        let ahead = found.0.1 - answered.0.1;
        assert!(found == answered || ahead == 1, "round {round}: {found:?} after {answered:?}");
        let address = server.address;
        let token = setup.token.clone();
        let last = std::thread::scope(|scope| {
            let changes = scope.spawn(move || {
                let mut last = found;
                for change in 0.. {
                    let percentage = 1 + (found.1 + change) % 100;
                    match ask(address, "POST", FLAGS, Some(&token), &set(percentage)) {
                        Ok(answer) => last = state(&answer.json()),
                        // It is gone.
                        Err(_) => break,
                    }
                }
                last
            });
            // At another point of the work each time: it waits for this many answers, then kills amid the next one.
            let kill_at = found.0.1 + 2 + round % 5;
            server.wait_for(|| {
                let page = ask(address, "GET", FLAG, None, "").map(|answer| state(&answer.json()));
                page.is_ok_and(|((_, counter), _)| counter >= kill_at)
            });
            server.kill();
            changes.join().unwrap()
        });
        assert!(last.0 > found.0);
        answered = last;
    }
    let verified = setup.run(&["verify-audit", "--state", setup.path("state").to_str().unwrap()]);
    assert!(verified.contains("none changed"), "{verified}");
}

#[test]
fn a_backup_comes_back_switched_off_and_above_all_epochs() {
    let setup = Setup::new();
    let (backup, folder) = (setup.path("backup.db"), setup.path("state"));
    let (backup, folder) = (backup.to_str().unwrap(), folder.to_str().unwrap());
    let server = setup.start();
    let post = |server: &Server, percentage| {
        state(&ask(server.address, "POST", FLAGS, Some(&setup.token), &set(percentage)).unwrap().json())
    };
    let backed_up = post(&server, 10);
    setup.run(&["backup", "--state", folder, "--out", backup]);
    let last = post(&server, 50);
    let restore = ["restore", "--state", folder, "--from", backup];
    assert!(setup.fail(&restore).contains("stop the server first"));
    server.stop();
    setup.run(&restore);

    let server = setup.start();
    let page = ask(server.address, "GET", FLAG, None, "").unwrap().json();
    let (epoch, percentage) = state(&page);
    assert!(epoch.0 > last.0.0 && backed_up.0 < last.0, "{page}");
    assert_eq!((&page["flag"]["enabled"], percentage), (&json!(false), 10));
    assert!(post(&server, 20).0 > epoch);
}

#[test]
fn tokens_are_read_again_and_a_restart_takes_no_time() {
    let setup = Setup::new();
    let server = setup.start();
    let new = ["token", "new", "--name", "second", "--roles", "rollback,nodes", "--file"];
    let said = setup.run(&[&new[..], &[setup.path("tokens").to_str().unwrap()]].concat());
    let second = said.lines().last().unwrap().to_owned();
    let status = |token: &str| ask(server.address, "POST", FLAGS, Some(token), &set(0)).unwrap().status;
    assert_eq!(status(&second), 401);
    server.signal(Signal::HUP);
    server.wait_for(|| status(&second) == 200);
    assert_eq!(status(&setup.token), 200);

    // An idle connection does not hold up the end, and the address is free at once.
    let idle = std::net::TcpStream::connect(server.address).unwrap();
    let address = server.address;
    let began = Instant::now();
    server.stop();
    let server = setup.start_at(address);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(ask(server.address, "GET", "/readyz", None, "").unwrap().status, 200);
    drop(idle);
}
