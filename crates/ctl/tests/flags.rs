//! The real `dwcpctl flags` against an agent that follows a script.

#![allow(clippy::unwrap_used)]

mod scripted;

use dwcp_rpc::v1;
use scripted::{Agent, end, text};
use serde_json::{Value, json};

fn served() -> v1::FlagsStatus {
    v1::FlagsStatus {
        node: "hv-01".to_owned(),
        feature: "dwcp_v3_hde".to_owned(),
        source: "http://192.0.2.1:7500, http://192.0.2.2:7500".to_owned(),
        path: "v3".to_owned(),
        running: v1::RunningMigrations::Keep.into(),
        reason_code: "flag_in_cohort".to_owned(),
        reason: "bucket 51 is within 60 %".to_owned(),
        bucket: 51,
        document: Some(v1::FlagDocument {
            enabled: true,
            percentage: 60,
            on_stale: "v1-new".to_owned(),
            epoch: Some(v1::Epoch { incarnation: 1, counter: 42 }),
            ..Default::default()
        }),
        age_seconds: Some(0.4),
        lease_seconds: Some(2.6),
        endpoint: Some("http://192.0.2.2:7500".to_owned()),
        cluster: Some("c1".to_owned()),
        error: Some("http://192.0.2.1:7500: no answer\nwithin 800 ms".to_owned()),
        error_age_seconds: Some(65.0),
        return_seconds: Some(118.0),
        refused: [("lower_epoch".to_owned(), 3), ("cluster".to_owned(), 1)].into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn people_read_a_line_for_each() {
    let agent = Agent::start();
    agent.sees(served());
    let output = end(agent.run(&["flags"])).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(
        text(&output.stdout),
        "flag        dwcp_v3_hde from http://192.0.2.1:7500, http://192.0.2.2:7500\n\
         new         v3: bucket 51 is within 60 %\n\
         running     stay on their path, and may return to v3 in 118 s\n\
         bucket      51 of 100\n\
         document    on at 60 %, on_stale v1-new\n\
         epoch       1.42\n\
         age         0.4 s\n\
         lease       2.6 s left\n\
         endpoint    http://192.0.2.2:7500 of cluster c1\n\
         last error  65 s ago: http://192.0.2.1:7500: no answer within 800 ms\n\
         refused     cluster 1, lower_epoch 3\n"
    );

    agent.sees(v1::FlagsStatus {
        path: "v1".to_owned(),
        running: v1::RunningMigrations::Leave.into(),
        reason: "the flag is off".to_owned(),
        veto: "the flag is off".to_owned(),
        lease_seconds: Some(0.0),
        ..served()
    });
    let output = end(agent.run(&["flags"])).await;
    for line in [
        "new         v1: the flag is off\n",
        "running     leave v3\n",
        "incoming    v1: the flag is off\n",
        "lease       expired\n",
    ] {
        assert!(text(&output.stdout).contains(line), "{line}: {output:?}");
    }
}

#[tokio::test]
async fn scripts_read_one_object() {
    let agent = Agent::start();
    agent.sees(served());
    let output = end(agent.run(&["flags", "--json"])).await;
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(text(&output.stdout).lines().count(), 1);
    for (key, expected) in [
        ("value", json!(true)),
        ("path", json!("v3")),
        ("running", json!("keep")),
        ("reason_code", json!("flag_in_cohort")),
        ("bucket", json!(51)),
        ("percentage", json!(60)),
        ("epoch", json!([1, 42])),
        ("age_seconds", json!(0.4)),
        ("lease_seconds", json!(2.6)),
        ("endpoint", json!("http://192.0.2.2:7500")),
        ("veto", json!(null)),
        ("refused", json!({"cluster": 1, "lower_epoch": 3})),
    ] {
        assert_eq!(value[key], expected, "{key}");
    }

    // Without a source there is little to say, and every key is there.
    agent.sees(v1::FlagsStatus { path: "v1".to_owned(), source: "none".to_owned(), ..Default::default() });
    let output = end(agent.run(&["flags", "--json"])).await;
    let bare: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(bare.as_object().unwrap().len(), value.as_object().unwrap().len());
    assert_eq!(
        (&bare["value"], &bare["epoch"], &bare["age_seconds"]),
        (&json!(false), &json!(null), &json!(null))
    );
}
