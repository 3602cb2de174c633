//! The real `dwcpctl resolve` and `explain` against an agent that follows a script: nothing is done unless it was confirmed.

#![allow(clippy::unwrap_used)]

mod scripted;

use std::process::Stdio;

use dwcp_rpc::failure;
use dwcp_rpc::v1::{self, Decision};
use scripted::{Agent, end, text};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const FENCED: [&str; 4] = ["resolve", "m-1", "--start-here", "--peer-fenced"];

#[tokio::test]
async fn without_a_terminal_and_without_yes_it_only_explains() {
    let agent = Agent::in_doubt();
    let output = end(agent.run(&FENCED)).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let out = text(&output.stdout);
    for expected in [
        "m-1 of web-1, as its destination; the peer is hv-02\n",
        "guest     in doubt: here or at hv-02",
        "decision  start here; the peer's VMM has ended",
        "effect    runs it at once\n",
    ] {
        assert!(out.contains(expected), "{expected}: {output:?}");
    }
    assert!(text(&output.stderr).contains("hint: add --yes"), "{output:?}");
    assert_eq!(acts(&agent), [false]);
}

#[tokio::test]
async fn with_yes_it_explains_and_acts() {
    let agent = Agent::in_doubt();
    let output = end(agent.run(&[&FENCED[..], &["--yes"]].concat())).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("effect    runs it at once\ndone; "), "{output:?}");
    assert_eq!(acts(&agent), [false, true]);
    for request in agent.decisions() {
        assert_eq!((request.id.as_str(), request.decision()), ("m-1", Decision::StartHere));
        assert!(request.peer_fenced);
    }
}

#[tokio::test]
async fn a_terminal_is_asked_for_the_word_yes() {
    for (answer, exit, asked_and_done) in
        [("yes\n", 0, &[false, true][..]), ("y\n", 1, &[false]), ("\n", 1, &[false]), ("\x04", 1, &[false])]
    {
        let agent = Agent::in_doubt();
        let output = on_a_terminal(&agent, "resolve m-1 --leave-to-peer", answer).await;
        assert_eq!(output.status.code(), Some(exit), "{answer:?}: {output:?}");
        assert!(text(&output.stdout).contains("Type yes to do this"), "{output:?}");
        assert_eq!(acts(&agent), asked_and_done, "{answer:?}");
        assert!(agent.decisions().iter().all(|r| r.decision() == Decision::LeaveToPeer && !r.peer_fenced));
    }
}

#[tokio::test]
async fn json_is_one_object_and_never_asks() {
    let agent = Agent::in_doubt();
    for (args, exit, acted, code) in
        [(&[][..], 2, false, "\"not_confirmed\""), (&["--yes"][..], 0, true, "null")]
    {
        let output = end(agent.run(&[&FENCED[..], &["--json"], args].concat())).await;
        assert_eq!(output.status.code(), Some(exit), "{output:?}");
        let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&object["id"], &object["decision"]), (&"m-1".into(), &"start_here".into()));
        assert_eq!((&object["peer_fenced"], &object["acted"]), (&true.into(), &acted.into()));
        assert_eq!(object["text"], "runs it at once");
        assert_eq!(object.pointer("/error/code").map_or("null".to_owned(), ToString::to_string), code);
    }
}

#[tokio::test]
async fn a_refused_decision_is_not_asked_about() {
    let agent = Agent::in_doubt();
    let refusal = v1::Failure {
        code: "peer_not_fenced".to_owned(),
        blame: v1::Blame::Operator.into(),
        message: "the peer may run the guest".to_owned(),
        hint: "end its VMM first".to_owned(),
    };
    agent.knows(vec![in_doubt()], Some(refusal));
    let output = end(agent.run(&["resolve", "m-1", "--start-here", "--yes"])).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).starts_with("error: peer_not_fenced: "), "{output:?}");
    assert!(text(&output.stderr).contains("hint: end its VMM first"), "{output:?}");
    assert_eq!(acts(&agent), [false]);
}

#[tokio::test]
async fn a_story_is_told_to_people_and_to_scripts() {
    let agent = Agent::in_doubt();
    let output = end(agent.run(&["explain", "m-1"])).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    for expected in [
        "error     link_lost: no word\n",
        "next      wait for hv-02\n",
        "2025-12-01  00:00:00.000                accepted  over v3\n",
        "            00:00:00.950      +0.950 s  receipt\n",
        "the other side is told at hv-02: dwcpctl explain m-1\n",
    ] {
        assert!(text(&output.stdout).contains(expected), "{expected}: {output:?}");
    }

    let output = end(agent.run(&["explain", "m-1", "--json"])).await;
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let side = &object["sides"][0];
    assert_eq!((&object["id"], &side["owner"]), (&"m-1".into(), &"in_doubt".into()));
    assert_eq!(side["cause"]["code"], "link_lost");
    assert_eq!(side["timeline"][1]["time"], "2025-12-01T00:00:00.950Z");
    assert_eq!(side["timeline"][1]["unix_ms"], 1_764_547_200_950_u64);
}

#[tokio::test]
async fn both_ends_are_told_each_by_its_node() {
    let agent = Agent::start();
    let theirs = v1::Explanation {
        role: v1::Role::Source.into(),
        peer: "hv-01".to_owned(),
        phase: "commit".to_owned(),
        owner: "source".to_owned(),
        told_by: "hv-02".to_owned(),
        ..in_doubt()
    };
    agent.knows(vec![in_doubt(), theirs], None);
    let output = end(agent.run(&["explain", "m-1"])).await;
    let told = text(&output.stdout);
    for expected in [
        "m-1 of web-1, as its destination; the peer is hv-02\n",
        "m-1 of web-1, as its source, told by hv-02; the peer is hv-01\n",
        "guest     at hv-02\n",
    ] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    assert!(!told.contains("the other side is told at"), "{told}");
    let output = end(agent.run(&["explain", "m-1", "--json"])).await;
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["peers"][0]["told_by"], "hv-02");
}

#[tokio::test]
async fn an_unknown_migration_is_said_clearly() {
    let agent = Agent::start();
    for args in [&["explain", "m-9"][..], &["resolve", "m-9", "--leave-to-peer", "--yes"]] {
        let output = end(agent.run(args)).await;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let expected = format!("error: {}: ", failure::UNKNOWN_MIGRATION);
        assert!(text(&output.stderr).starts_with(&expected), "{output:?}");
    }
    assert!(agent.decisions().is_empty());
}

impl Agent {
    fn in_doubt() -> Self {
        let agent = Agent::start();
        agent.knows(vec![in_doubt()], None);
        agent
    }
}

fn in_doubt() -> v1::Explanation {
    let moment = |unix_ms, what: &str, text: &str| v1::Moment {
        unix_ms,
        what: what.to_owned(),
        text: text.to_owned(),
    };
    v1::Explanation {
        id: "m-1".to_owned(),
        vm: "web-1".to_owned(),
        role: v1::Role::Destination.into(),
        peer: "hv-02".to_owned(),
        phase: "receipt".to_owned(),
        owner: "in_doubt".to_owned(),
        cause: Some(v1::Failure {
            code: "link_lost".to_owned(),
            message: "no word".to_owned(),
            ..Default::default()
        }),
        next: "wait for hv-02".to_owned(),
        timeline: vec![
            moment(1_764_547_200_000, "accepted", "over v3"),
            moment(1_764_547_200_950, "receipt", ""),
        ],
        moments_left_out: 0,
        status: None,
        told_by: String::new(),
    }
}

fn acts(agent: &Agent) -> Vec<bool> {
    agent.decisions().iter().map(|request| request.act).collect()
}

/// Runs the command on a terminal of its own, and types.
async fn on_a_terminal(agent: &Agent, args: &str, typed: &str) -> std::process::Output {
    let line = format!("{} --agent unix:{} {args}", env!("CARGO_BIN_EXE_dwcpctl"), agent.socket().display());
    let mut ctl = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut keyboard = ctl.stdin.take().unwrap();
    keyboard.write_all(typed.as_bytes()).await.unwrap();
    // Held until the end: `script` would take a closed standard input for the end of file.
    let output = end(ctl).await;
    drop(keyboard);
    output
}
