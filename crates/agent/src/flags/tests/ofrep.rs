//! OFREP: the server decides, and its silence is no decision.

use std::fs;
use std::time::Duration;

use dwcp_migrate::Running;
use dwcp_proto::Path;
use hyper::Response;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, ETAG, IF_NONE_MATCH};

use super::scripted::{Server, Setup, pass, status};

/// Answers with this list of flags, and 304 from then on.
fn evaluates(server: &Server, flags: &str) {
    let body = format!(r#"{{"flags":[{flags}]}}"#);
    let etag = body.replace('"', "'");
    server.does(move |request| {
        assert_eq!((request.method().as_str(), request.uri().path()), ("POST", "/ofrep/v1/evaluate/flags"));
        match request.headers().get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == etag.as_bytes()) {
            true => Some(status(304)),
            false => Some(
                Response::builder()
                    .header(CONTENT_TYPE, "application/json; charset=utf-8")
                    .header(ETAG, etag.clone())
                    .body(body.clone())
                    .unwrap(),
            ),
        }
    });
}

#[tokio::test(start_paused = true)]
async fn the_value_is_obeyed_for_as_long_as_the_lease() {
    let server = Server::start();
    evaluates(&server, r#"{"key":"dwcp_v3_hde","value":true,"reason":"SPLIT"}"#);
    let mut node = Setup::new().ofrep(&[&server]).await;
    assert_eq!((node.new_path(), node.code(), node.veto()), (Path::V3, "flag_evaluated_on", None));
    // 304s confirm it.
    assert!(node.changes(Duration::from_secs(20)).await.is_empty());

    for (refusal, error) in
        [(401, "refuses this node"), (403, "refuses this node"), (429, "too often"), (404, "no answer")]
    {
        server.does(move |_| Some(status(refusal)));
        let changes = node.changes(Duration::from_secs(15)).await;
        assert!(
            matches!(changes.as_slice(), [(at, Path::V1, Running::Keep)] if *at > 1.7),
            "{refusal}: {changes:?}"
        );
        assert!(node.error().contains(error), "{}", node.error());
        evaluates(&server, r#"{"key":"dwcp_v3_hde","value":true}"#);
        pass(2.0).await;
        assert_eq!(node.new_path(), Path::V3, "{refusal}");
    }
    server.does(|_| {
        let body = r#"{"errorCode":"INVALID_CONTEXT","errorDetails":"no such node"}"#.to_owned();
        Some(Response::builder().status(400).body(body).unwrap())
    });
    pass(2.0).await;
    assert!(node.error().contains("INVALID_CONTEXT: no such node"), "{}", node.error());
}

#[tokio::test(start_paused = true)]
async fn no_value_no_flag_and_no_json_mean_v1() {
    let server = Server::start();
    let on = r#"{"key":"dwcp_v3_hde","value":true}"#;
    evaluates(&server, on);
    let node = Setup::new().ofrep(&[&server]).await;
    for (flags, code, veto) in [
        (r#"{"key":"dwcp_v3_hde","reason":"UNKNOWN"}"#, "flag_evaluated_off", None),
        (r#"{"key":"dwcp_v3_hde","value":false,"reason":"TARGETING_MATCH"}"#, "flag_evaluated_off", None),
        (r#"{"key":"dwcp_v3_hde","value":true,"reason":"DISABLED"}"#, "flag_disabled", Some("flag_disabled")),
        (r#"{"key":"dwcp_v3_hde","errorCode":"FLAG_NOT_FOUND"}"#, "flag_unknown", None),
        (r#"{"key":"dwcp_v3_hde","value":"on"}"#, "flag_malformed", None),
        ("", "flag_unknown", None),
        ("7", "flag_malformed", None),
    ] {
        evaluates(&server, flags);
        pass(2.0).await;
        // It was said in so many words: running ones leave as well.
        assert_eq!((node.code(), node.veto(), node.running()), (code, veto, Running::Leave), "{flags}");
        evaluates(&server, on);
        pass(2.0).await;
        assert_eq!(node.new_path(), Path::V3, "{flags}");
    }
    // A page that something between put in place of the answer is not the flag system's word.
    server.does(|_| Some(Response::new("<html>".to_owned())));
    pass(1.3).await;
    assert_eq!((node.new_path(), node.running()), (Path::V3, Running::Keep));
}

#[tokio::test(start_paused = true)]
async fn the_token_is_read_for_each_request() {
    let (mut setup, server) = (Setup::new(), Server::start());
    let file = setup.dir.path().join("token");
    setup.token_file = Some(file.clone());
    evaluates(&server, r#"{"key":"dwcp_v3_hde","value":true}"#);
    let node = setup.ofrep(&[&server]).await;
    assert!(server.asked().is_empty() && node.error().contains("token"), "{}", node.error());
    for token in ["one", "two"] {
        fs::write(&file, format!("{token}\n")).unwrap();
        pass(3.0).await;
        let last = server.asked().last().unwrap().1[AUTHORIZATION].clone();
        assert_eq!(last, format!("Bearer {token}"));
    }
    assert_eq!(node.new_path(), Path::V3);
}
