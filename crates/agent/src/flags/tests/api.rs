//! The flag API: pace, lease, lies, silence, and what a restart remembers.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dwcp_flags::Path as FlagPath;
use dwcp_flags::poll::{
    ANSWER_SIGNATURE, AnswerSignature, PollReport, SignedReport, answer_message, report_message,
};
use dwcp_migrate::Running;
use dwcp_proto::{NodeKey, Path};
use hyper::Response;
use hyper::header::{IF_NONE_MATCH, RETRY_AFTER};

use super::scripted::{Server, Setup, document, document_or_304, key, pass, status};

#[tokio::test(start_paused = true)]
async fn polls_keep_their_pace_on_one_connection() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let node = Setup::new().start(&[&server]).await;
    assert_eq!((node.new_path(), node.code()), (Path::V3, "flag_in_cohort"));
    pass(50.0).await;

    let asked = server.asked();
    assert!((42..=63).contains(&asked.len()), "{}", asked.len());
    for pair in asked.windows(2) {
        let gap = pair[1].0 - pair[0].0;
        assert!((Duration::from_millis(790)..=Duration::from_millis(1210)).contains(&gap), "{gap:?}");
    }
    assert!(asked[1..].iter().all(|(_, headers)| headers.contains_key(IF_NONE_MATCH)));
    assert_eq!(server.connections(), 1);
    assert_eq!((node.new_path(), node.running()), (Path::V3, Running::Keep));
}

#[tokio::test(start_paused = true)]
async fn off_is_obeyed_within_a_poll_and_running_ones_return_late() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let mut node = Setup::new().start(&[&server]).await;

    server.serves(&document(0, 2, ""));
    let off = node.changes(Duration::from_secs(10)).await;
    assert!(matches!(off.as_slice(), [(at, Path::V1, Running::Leave)] if *at <= 1.25), "{off:?}");
    assert_eq!(node.veto(), Some("flag_disabled"));

    server.serves(&document(100, 3, ""));
    let on = node.changes(Duration::from_secs(200)).await;
    let [(new, Path::V3, Running::Keep), (returned, Path::V3, Running::Return)] = on.as_slice() else {
        panic!("{on:?}");
    };
    assert!(*new <= 1.25 && (60.0..=182.0).contains(returned), "{on:?}");
    assert_eq!(node.veto(), None);
}

#[tokio::test(start_paused = true)]
async fn a_hanging_server_costs_the_lease_three_seconds_after_the_last_good_poll() {
    for (on_stale, new, running) in [
        ("v1-new", Path::V1, Running::Keep),
        ("v1-all", Path::V1, Running::Leave),
        ("hold", Path::V3, Running::Keep),
    ] {
        let server = Server::start();
        let document = document(100, 1, &format!(r#","on_stale":"{on_stale}""#));
        server.serves(&document);
        let mut node = Setup::new().start(&[&server]).await;
        pass(10.0).await;
        server.hangs();
        let changes = node.changes(Duration::from_secs(20)).await;
        match new {
            Path::V1 => {
                assert!(
                    matches!(changes.as_slice(), [(at, Path::V1, r)] if (1.7..=3.01).contains(at) && *r == running),
                    "{changes:?}"
                );
                assert_eq!(node.code(), "flag_lease_expired");
            }
            Path::V3 => assert!(changes.is_empty(), "{changes:?}"),
        }
        assert_eq!((node.new_path(), node.running(), node.veto()), (new, running, None));
        assert!(node.error().contains("s0: no answer within 800 ms"), "{}", node.error());
        // It went on asking, on new connections, and the first answer counts.
        server.serves(&document);
        pass(2.1).await;
        assert_eq!(node.new_path(), Path::V3);
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_is_worth_less() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    server.delays(Duration::from_millis(700));
    let mut node = Setup::new().start(&[&server]).await;
    assert_eq!(node.new_path(), Path::V3);
    server.hangs();
    // Asked 0.7 s ago: three seconds from then.
    let changes = node.changes(Duration::from_secs(5)).await;
    assert!(matches!(changes.as_slice(), [(at, Path::V1, _)] if (2.29..2.32).contains(at)), "{changes:?}");
}

#[tokio::test(start_paused = true)]
async fn a_busy_server_is_not_made_busier_by_new_connections() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let node = Setup::new().start(&[&server]).await;
    // Every answer comes, and comes too late.
    server.delays(Duration::from_millis(1100));
    pass(20.0).await;
    assert_eq!((node.code(), server.connections()), ("flag_lease_expired", 1));
    server.delays(Duration::ZERO);
    pass(3.0).await;
    assert_eq!((node.new_path(), server.connections()), (Path::V3, 1));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_restarts_between_two_polls_costs_nothing() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let mut node = Setup::new().start(&[&server]).await;
    for _ in 0..20 {
        server.cut();
        assert!(node.changes(Duration::from_millis(1500)).await.is_empty());
    }
    assert_eq!(node.error(), "");
}

#[tokio::test(start_paused = true)]
async fn lies_are_refused_and_counted() {
    let server = Server::start();
    server.serves(&document(100, 7, ""));
    let node = Setup::new().start(&[&server]).await;

    let lie = async |says: &str, reason: &'static str, error: &str| {
        let before = node.metrics.refusals(reason);
        server.serves(says);
        pass(2.5).await;
        assert!(node.metrics.refusals(reason) > before, "{reason}");
        assert!(node.error().contains(error), "{}", node.error());
    };
    // An older epoch, or the same one with another content: what is in force stays so, until the lease ends.
    lie(&document(100, 6, ""), "lower_epoch", "1.6 is lower than 1.7").await;
    lie(&document(99, 7, ""), "equivocal", "two different contents").await;
    assert_eq!(
        (node.new_path(), node.code(), node.running()),
        (Path::V1, "flag_lease_expired", Running::Keep)
    );
    server.serves(&document(100, 8, ""));
    pass(2.0).await;
    assert_eq!(node.new_path(), Path::V3);
    // What is no document means v1, for all, and the epoch is not forgotten.
    lie("{\"percentage\": 10,  # or 0\n}", "malformed", "key must be a string").await;
    assert_eq!((node.new_path(), node.code(), node.running()), (Path::V1, "flag_malformed", Running::Leave));
    lie(&document(100, 7, ""), "lower_epoch", "1.7 is lower than 1.8").await;
    lie(&document(100, 9, "").replace("dwcp_v3_hde", "dwcp_v4"), "unknown_flag", "unknown feature").await;
    assert_eq!(node.code(), "flag_unknown");
    lie(&document(101, 9, ""), "malformed", "0 to 100").await;
    server.serves(&document(100, 8, ""));
    pass(2.0).await;
    assert_eq!(node.new_path(), Path::V3);
}

#[tokio::test(start_paused = true)]
async fn what_no_flag_server_says_is_as_good_as_silence() {
    let server = Server::start();
    let long = format!("{{\"flag\":{},\"x\":\"{}\"}}", document(0, 9, ""), "x".repeat(2 << 20));
    let answers: Vec<(&str, Response<String>)> = vec![
        ("bytes", Response::builder().header("dwcp-cluster-id", "c1").body(long).unwrap()),
        ("cluster", Response::new("<html>please log in</html>".to_owned())),
        (
            "304",
            Response::builder()
                .header("dwcp-cluster-id", "c1")
                .header("etag", "\"other\"")
                .status(304)
                .body(String::new())
                .unwrap(),
        ),
        (
            "302",
            Response::builder().status(302).header("location", "http://s1/").body(String::new()).unwrap(),
        ),
        ("500", status(500)),
        ("404", status(404)),
        ("refuses this node (401", status(401)),
        ("refuses this node (403", status(403)),
    ];
    for (error, answer) in answers {
        server.serves(&document(100, 1, ""));
        let mut node = Setup::new().start(&[&server]).await;
        assert_eq!(node.new_path(), Path::V3);
        let answer = Mutex::new(answer);
        server.does(move |_| {
            let answer = answer.lock().unwrap();
            let mut copy = Response::new(answer.body().clone());
            *copy.status_mut() = answer.status();
            *copy.headers_mut() = answer.headers().clone();
            Some(copy)
        });
        let changes = node.changes(Duration::from_secs(10)).await;
        // Running migrations stay where they are.
        assert!(
            matches!(changes.as_slice(), [(at, Path::V1, Running::Keep)] if *at > 1.7),
            "{error}: {changes:?}"
        );
        assert_eq!(node.code(), "flag_lease_expired", "{error}");
        assert!(node.error().contains(error), "{error}: {}", node.error());
        assert!(server.asked().len() > 5);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_asks_for_a_pause_gets_a_short_one() {
    let server = Server::start();
    server.does(|_| {
        Some(Response::builder().status(429).header(RETRY_AFTER, "3600").body(String::new()).unwrap())
    });
    let node = Setup::new().start(&[&server]).await;
    pass(60.0).await;
    assert!((12..=13).contains(&server.asked().len()), "{}", server.asked().len());
    assert!(node.error().contains("asked too often (429"), "{}", node.error());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_flaps_moves_nothing_to_and_fro() {
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let mut node = Setup::new().start(&[&server]).await;
    pass(200.0).await;
    assert_eq!(node.running(), Running::Return);

    // Ten times a second: off and on, each with its epoch, and gone in between.
    let flapping = server.clone();
    let flapper = tokio::spawn(async move {
        for counter in 2..1202 {
            flapping.serves(&document(if counter % 4 < 2 { 0 } else { 100 }, counter, ""));
            flapping.deaf(counter % 3 == 0);
            pass(0.1).await;
        }
        flapping.deaf(false);
        flapping.serves(&document(100, 1202, ""));
    });
    let changes = node.changes(Duration::from_secs(120)).await;
    assert!(changes.iter().all(|(_, _, running)| *running != Running::Return), "{changes:?}");
    assert!(changes.iter().any(|(_, _, running)| *running == Running::Leave));
    let turns: Vec<f64> = changes.chunk_by(|a, b| a.2 == b.2).map(|same| same[0].0).collect();
    // The first may be the lease's end, which keeps no pace; from then on each turn is a poll's.
    assert!(turns[1..].windows(2).all(|pair| pair[1] - pair[0] > 0.75), "{changes:?}");
    // One endpoint is never asked faster than its pace, whatever happens on the way.
    assert!(server.asked().len() < 420, "{}", server.asked().len());
    flapper.await.unwrap();
    let after = node.changes(Duration::from_secs(200)).await;
    assert_eq!(after.iter().filter(|(_, _, running)| *running == Running::Return).count(), 1, "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn another_endpoint_of_the_cluster_takes_over_and_strangers_do_not() {
    let [a, stranger, b] = [Server::start(), Server::start(), Server::start()];
    a.serves(&document(100, 1, ""));
    b.serves(&document(100, 1, ""));
    stranger.serves_of("c2", &document(100, 99, ""));
    let mut node = Setup::new().start(&[&a, &stranger, &b]).await;
    pass(5.0).await;
    assert!(b.asked().is_empty() && stranger.asked().is_empty());

    // In so long a time running ones may return to v3; that is all that changes.
    let stays = |changes: Vec<(f64, Path, Running)>| changes.iter().all(|(_, new, _)| *new == Path::V3);
    for quiet in [true, false] {
        if quiet {
            a.hangs()
        } else {
            a.deaf(true)
        }
        assert!(stays(node.changes(Duration::from_secs(20)).await), "{quiet}");
        assert_eq!(node.view.borrow().endpoint.as_deref(), Some("http://s2"));
        a.deaf(false);
        a.serves(&document(100, 1, ""));
        b.deaf(true);
        assert!(stays(node.changes(Duration::from_secs(20)).await), "{quiet}");
        assert_eq!(node.view.borrow().endpoint.as_deref(), Some("http://s0"));
        b.deaf(false);
    }
    assert!(node.metrics.refusals("cluster") > 0);
    assert_eq!(node.gate.borrow().epoch, (1, 1));
}

#[tokio::test(start_paused = true)]
async fn polls_carry_signed_reports() {
    let server = Server::start();
    server.serves(&document(51, 4, ""));
    let node = Setup::new().start(&[&server]).await;
    pass(3.0).await;
    drop(node);
    let reports = server.reports();
    let read = |signed: &SignedReport| {
        assert!(key().public().verify(&report_message(&signed.report), &signed.signature));
        PollReport::decode(&signed.report).unwrap()
    };
    let first = read(&reports[0]);
    assert_eq!((first.node.as_str(), first.cluster.as_str(), first.applied), ("node-123", "", None));
    assert_eq!((first.path, first.reason.as_str()), (FlagPath::V1, "flag_no_answer"));
    let second = read(&reports[1]);
    assert_eq!((second.cluster.as_str(), second.applied.unwrap().counter), ("c1", 4));
    assert_eq!((second.path, second.reason.as_str()), (FlagPath::V3, "flag_in_cohort"));
    assert!(reports.windows(2).all(|pair| read(&pair[1]).is_after(&read(&pair[0]))));
}

#[tokio::test(start_paused = true)]
async fn with_a_key_only_fresh_signed_answers_count() {
    let control = Arc::new(NodeKey::from_seed("control".parse().unwrap(), &[9; 32]));
    let mut setup = Setup::new();
    setup.server_key = Some(control.public());
    let server = Server::start();
    server.serves(&document(100, 1, ""));
    let node = setup.start(&[&server]).await;
    assert!(node.error().contains("not signed"), "{}", node.error());
    assert_eq!(node.code(), "flag_no_answer");

    let signs = |document: String, age_ms: u64| {
        let control = Arc::clone(&control);
        server.does(move |request| {
            let mut answer = document_or_304(request, "c1", &document);
            let report =
                SignedReport::from_header(request.headers().get("dwcp-report").unwrap().as_bytes()).unwrap();
            let signature = control.sign(&answer_message("c1", &report.report, age_ms, &document));
            let header = AnswerSignature { age_ms, signature }.to_header();
            answer.headers_mut().insert(ANSWER_SIGNATURE, header.parse().unwrap());
            Some(answer)
        });
    };
    signs(document(100, 1, ""), 0);
    pass(10.0).await;
    assert_eq!(node.new_path(), Path::V3);
    // Nobody but the server can take anything away: a bad document, a 404, a plain off.
    server.serves(&document(0, 2, ""));
    pass(1.3).await;
    assert_eq!((node.new_path(), node.running()), (Path::V3, Running::Keep));
    signs(document(100, 1, ""), 0);
    pass(1.3).await;
    server.does(|_| {
        Some(Response::builder().status(404).header("dwcp-cluster-id", "c1").body(String::new()).unwrap())
    });
    pass(1.3).await;
    assert_eq!((node.new_path(), node.running()), (Path::V3, Running::Keep));
    // A frozen server says again and again what was true once.
    signs(document(100, 1, ""), 0);
    pass(1.3).await;
    let last = Mutex::new(None);
    let (sign, frozen) = (Arc::clone(&control), document(100, 1, ""));
    server.does(move |request| {
        let mut answer = document_or_304(request, "c1", &frozen);
        let report =
            SignedReport::from_header(request.headers().get("dwcp-report").unwrap().as_bytes()).unwrap();
        let mut last = last.lock().unwrap();
        let signature =
            *last.get_or_insert_with(|| sign.sign(&answer_message("c1", &report.report, 0, &frozen)));
        answer
            .headers_mut()
            .insert(ANSWER_SIGNATURE, AnswerSignature { age_ms: 0, signature }.to_header().parse().unwrap());
        Some(answer)
    });
    pass(6.0).await;
    assert_eq!((node.code(), node.running()), ("flag_lease_expired", Running::Keep));
    assert!(node.error().contains("signature of its answer is wrong"), "{}", node.error());
    // An age counts against the lease.
    signs(document(100, 3, ""), 2_900);
    pass(2.0).await;
    assert_eq!(node.gate.borrow().epoch, (1, 3));
    signs(document(100, 3, ""), 3_100);
    pass(2.0).await;
    assert_eq!(node.code(), "flag_lease_expired");
}

#[tokio::test(start_paused = true)]
async fn what_a_restart_remembers_restricts_and_never_enables() {
    let (setup, server) = (Setup::new(), Server::start());
    server.serves(&document(100, 7, ""));
    let node = setup.start(&[&server]).await;
    pass(2.0).await;
    assert_eq!(node.new_path(), Path::V3);
    drop(node);

    // On disk it is on, and nobody answers: v1, though no veto.
    server.hangs();
    let node = setup.start(&[&server]).await;
    assert_eq!((node.new_path(), node.code(), node.veto()), (Path::V1, "flag_no_answer", None));
    server.serves(&document(100, 6, ""));
    pass(2.0).await;
    assert_eq!((node.new_path(), node.metrics.refusals("lower_epoch") > 0), (Path::V1, true));
    server.serves_of("c2", &document(100, 8, ""));
    pass(2.0).await;
    assert!(node.error().contains("flag.json"), "{}", node.error());
    assert_eq!((node.new_path(), node.metrics.refusals("cluster") > 0), (Path::V1, true));
    server.serves(&document(100, 8, r#","excluded":["node-123"]"#));
    pass(2.0).await;
    assert_eq!((node.code(), node.veto()), ("flag_excluded", Some("flag_excluded")));
    drop(node);

    server.hangs();
    let node = setup.start(&[&server]).await;
    assert_eq!((node.code(), node.veto()), ("flag_no_answer", Some("flag_excluded")));
    drop(node);

    // A file that cannot be read restricts nothing, and stops nothing.
    fs::write(setup.dir.path().join("flag.json"), "{").unwrap();
    server.serves(&document(100, 1, ""));
    assert_eq!(setup.start(&[&server]).await.new_path(), Path::V3);
}
