//! The real `dwcpctl` against an agent that follows a script: ends that a real migration reaches seldom, or not on demand.

#![allow(clippy::unwrap_used)]

mod scripted;

use dwcp_rpc::v1::Phase;
use scripted::{Agent, dwcpctl, end, status, text};
use tokio::process::Child;

#[tokio::test]
async fn the_exit_status_and_the_last_line_say_how_it_ended() {
    for (phase, code, exit) in [
        (Phase::Completed, "", 0),
        (Phase::Aborted, "cancelled", 1),
        (Phase::Failed, "vmm_died", 1),
        (Phase::Failed, "in_doubt", 4),
    ] {
        let agent = Agent::start();
        agent.say(status(Phase::Precopy, ""));
        let ctl = agent.migrate(&["--json"]);
        agent.watched().await;
        agent.say(status(phase, code));
        let output = end(ctl).await;
        assert_eq!(output.status.code(), Some(exit), "{output:?}");
        let lines: Vec<serde_json::Value> =
            text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let last = lines.last().unwrap();
        assert_eq!(last["phase"], format!("{phase:?}").to_lowercase());
        assert_eq!(text(&output.stderr).contains(&format!("error: {code}: ")), !code.is_empty());
    }
}

#[tokio::test]
async fn without_a_terminal_lines_and_a_summary() {
    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.say(status(Phase::Completed, ""));
    let output = end(ctl).await;
    assert!(text(&output.stderr).contains(" 50 %  v3 internet precopy  200.0 Mbit/s  round 2"), "{output:?}");
    for expected in ["web-1 moved to hv-02", "path          v3 internet", "fallback      because"] {
        assert!(text(&output.stdout).contains(expected), "{expected}: {output:?}");
    }
}

#[tokio::test]
async fn ctrl_c_cancels_and_waits_and_a_second_one_leaves() {
    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    interrupt(&ctl);
    agent.cancelled().await;
    agent.say(status(Phase::Aborted, "cancelled"));
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("web-1 stays here"), "{output:?}");

    let agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    interrupt(&ctl);
    agent.cancelled().await;
    interrupt(&ctl);
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("dwcpctl status m-1"), "{output:?}");
}

#[tokio::test]
async fn an_agent_that_comes_back_is_waited_for() {
    let mut agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.restart(Some(status(Phase::Completed, "")));
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stderr).contains("the agent went away"), "{output:?}");
}

#[tokio::test]
async fn an_agent_that_forgot_the_migration_leaves_doubt() {
    let mut agent = Agent::start();
    agent.say(status(Phase::Precopy, ""));
    let ctl = agent.migrate(&[]);
    agent.watched().await;
    agent.restart(None);
    let output = end(ctl).await;
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(text(&output.stderr).contains("error: forgotten: "), "{output:?}");
}

#[tokio::test]
async fn nobody_there_and_a_refusal_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let output = end(dwcpctl(&dir.path().join("none.sock"), &["list"])).await;
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).starts_with("error: agent_unreachable: "), "{output:?}");

    let agent = Agent::start();
    let output = end(agent.migrate(&["--memory-file", "/ram", "--json"])).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stdout).starts_with("{\"error\":{\"code\":\"unsupported\""), "{output:?}");
    assert!(text(&output.stderr).contains("\nhint: "), "{output:?}");
}

fn interrupt(ctl: &Child) {
    let pid = ctl.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
}
