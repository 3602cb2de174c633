//! The API as a client meets it, with the real store, and without sockets.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use dwcp_flags::poll::{CLUSTER_ID, PollReport, REPORT, Served, SignedReport, report_message};
use dwcp_flags::{Epoch, FEATURE, FlagState, LEASE, Lease, MAX_DOCUMENT, Moment, Path, Source};
use dwcp_proto::{NodeKey, NodeName};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tower::ServiceExt;

use super::*;
use crate::folder::Folder;
use crate::state::Role;
use crate::tokens::new_token;

const FLAGS: &str = "/v1/feature-flags";
const FLAG: &str = "/v1/feature-flags/dwcp_v3_hde";
const EXCLUDE: &str = "/v1/feature-flags/exclude";
const INCLUDE: &str = "/v1/feature-flags/include";

/// A server without sockets.
struct Server {
    router: Router,
    shared: Arc<Shared>,
    admin: String,
    rollback: String,
    nodes: String,
    _dir: TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let token = |role: Role| new_token(&file, role.name(), &BTreeSet::from([role]), None).unwrap();
        let (admin, rollback, nodes) = (token(Role::Admin), token(Role::Rollback), token(Role::Nodes));
        let folder = Folder::claim(dir.path()).unwrap();
        let (writer, view, _) = crate::writer::start(Box::new(folder.store().unwrap())).unwrap();
        let key = NodeKey::from_seed(NodeName::new("control").unwrap(), &[99; 32]);
        let tokens = Tokens::load(&file).unwrap();
        let counts = Counts::default();
        let shared = Shared { view, writer, tokens, clock: Clock::start(), key: Some(key), counts };
        let shared = Arc::new(shared);
        Server { router: router(Arc::clone(&shared)), shared, admin, rollback, nodes, _dir: dir }
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.router.clone().oneshot(request.body(body.into()).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body: String::from_utf8(body.to_vec()).unwrap(),
        }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.write("POST", path, &self.admin, body).await
    }

    async fn write(&self, method: &str, path: &str, token: &str, body: impl Into<Body>) -> Answer {
        let form = ("content-type", "application/x-www-form-urlencoded");
        self.send(method, path, &[("authorization", &format!("Bearer {token}")), form], body).await
    }

    fn epoch(&self) -> Epoch {
        self.shared.view.flags()[FEATURE].flag.epoch()
    }
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    #[track_caller]
    fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// Status, code and message of a refusal.
    fn problem(&self) -> (u16, String, String) {
        let json = self.json();
        let text = |key: &str| json["error"][key].as_str().unwrap_or_default().to_owned();
        (self.status.as_u16(), text("code"), text("message"))
    }
}

fn set(percentage: u8, enabled: bool) -> String {
    format!(r#"{{"feature": "{FEATURE}", "percentage": {percentage}, "enabled": {enabled}}}"#)
}

#[tokio::test]
async fn every_wrong_body_is_told_where_and_why_and_changes_nothing() {
    let server = Server::new();
    server.post(FLAGS, set(7, true)).await.ok();
    let (epoch, before) = (server.epoch(), server.get(FLAG).await.body);
    let plans =
        "{\n    \"feature\": \"dwcp_v3_hde\",\n    \"percentage\": 10,  # or 0\n    \"enabled\": true\n  }";
    let set =
        |percentage: &str| format!(r#"{{"feature":"dwcp_v3_hde","enabled":true,"percentage":{percentage}}}"#);
    let twice = r#"{"feature":"dwcp_v3_hde","enabled":true,"enabled":true,"percentage":1}"#;
    /// Address, body, status, line and column (0 where there is no place), what the message says.
    type Case = (&'static str, String, u16, (u64, u64), &'static str);
    let cases: Vec<Case> = vec![
        (FLAGS, plans.into(), 400, (3, 24), "JSON has no comments"),
        (FLAGS, String::new(), 400, (1, 1), "EOF"),
        (FLAGS, "feature=dwcp_v3_hde&percentage=0".into(), 400, (1, 2), "expected"),
        (FLAGS, "null".into(), 400, (1, 4), "invalid type"),
        (FLAGS, "[]".into(), 400, (1, 2), ""),
        (FLAGS, "{\"feature\":\n\"dwcp_v3_hde\"}".into(), 400, (2, 14), "missing field"),
        (FLAGS, set("101"), 400, (1, 54), "a whole number from 0 to 100, not 101"),
        (FLAGS, set("-1"), 400, (1, 54), "not -1"),
        (FLAGS, set("10.5"), 400, (1, 54), "not 10.5"),
        (FLAGS, set("\"10\""), 400, (1, 54), "not \"10\""),
        (FLAGS, set("NaN"), 400, (1, 54), "expected"),
        (FLAGS, set("1e1"), 400, (1, 54), "not 1e1"),
        (FLAGS, set("null"), 400, (1, 54), "not null"),
        (FLAGS, set("99999999999999999999999"), 400, (1, 54), "not 999"),
        (FLAGS, set("10,\"enabeld\":true"), 400, (1, 65), "unknown field `enabeld`"),
        (FLAGS, set("10") + "x", 400, (1, 57), "trailing characters"),
        (FLAGS, twice.into(), 400, (1, 49), "duplicate field"),
        (FLAGS, set("10").replace("true", "\"true\""), 400, (1, 36), "true or false"),
        (FLAGS, set("10").replace("dwcp_v3_hde", "dwcp_v4"), 404, (1, 12), "unknown feature \"dwcp_v4\""),
        (FLAGS, set("10").replace("dwcp_v3_hde", "exclude"), 404, (1, 12), "unknown feature \"exclude\""),
        (FLAGS, set("10,\"excluded\":[\"a b\"]"), 400, (1, 69), "node names"),
        (FLAGS, " ".repeat(MAX_DOCUMENT + 1), 413, (0, 0), "1048576 bytes at most"),
        (EXCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":"node-1"}"#.into(), 400, (1, 34), "a list"),
        (EXCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":[1]}"#.into(), 400, (1, 35), "not 1"),
        (EXCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":[]}"#.into(), 400, (1, 34), "empty"),
        (EXCLUDE, r#"{"feature":"x","nodes":["a"]}"#.into(), 404, (1, 12), "unknown feature"),
        (INCLUDE, r#"{"nodes":["a"]}"#.into(), 400, (1, 15), "missing field"),
        ("/v1/feature-flags/dwcp_v3_hde/freeze", r#"{"reason":1}"#.into(), 400, (1, 11), "string"),
        ("/v1/feature-flags/dwcp_v3_hde/latch", r#"{"reason":" "}"#.into(), 400, (0, 0), "reason"),
        ("/v1/feature-flags/x/latch", r#"{"reason":"x"}"#.into(), 404, (0, 0), "unknown feature"),
        (
            "/v1/nodes",
            r#"{"nodes":[{"name":"a b","public_key":""}]}"#.into(),
            400,
            (1, 23),
            "1 to 64 characters",
        ),
        (
            "/v1/nodes",
            r#"{"nodes":[{"name":"a","public_key":"00"}]}"#.into(),
            400,
            (0, 0),
            "64 hexadecimal digits",
        ),
        ("/v1/nodes/drain", r#"{"nodes":["nobody"]}"#.into(), 404, (0, 0), "nobody"),
    ];
    let mut wrong = Vec::new();
    for (path, body, status, place, says) in cases {
        let answer = server.post(path, body.clone()).await;
        let (got, _, message) = answer.problem();
        let number = |key: &str| answer.json()["error"][key].as_u64().unwrap_or(0);
        let (line, column) = (number("line"), number("column"));
        let told = (line, column) == (0, 0) || message.contains(&format!("line {line}, column {column}"));
        if (got, (line, column)) != (status, place) || !message.contains(says) || !told {
            let body: String = body.chars().take(200).collect();
            wrong.push(format!("{body}: {got} at {line}:{column}: {message}"));
        }
        let not_text = server.post(path, vec![0xff, b'{']).await;
        assert!(not_text.status.is_client_error(), "{}", not_text.body);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!((server.epoch(), server.get(FLAG).await.body), (epoch, before));
}

#[tokio::test]
async fn a_wrong_token_address_or_method_changes_nothing() {
    let server = Server::new();
    let epoch = server.epoch();
    let body = set(10, true);
    for authorization in ["", "Bearer", "Bearer ", "Bearer x", "Basic eDp4", &server.admin] {
        let answer = server.send("POST", FLAGS, &[("authorization", authorization)], body.clone()).await;
        assert_eq!((answer.status.as_u16(), answer.problem().1.as_str()), (401, "token"), "{authorization}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    assert_eq!(server.send("POST", FLAGS, &[], body.clone()).await.status, 401);
    // Before the body is read at all.
    assert_eq!(server.send("POST", FLAGS, &[], "junk").await.status, 401);
    assert_eq!(server.write("POST", FLAGS, &server.nodes, body.clone()).await.problem().1, "forbidden");
    assert_eq!(server.write("POST", FLAGS, &server.rollback, body.clone()).await.problem().1, "forbidden");
    assert_eq!(server.send("GET", "/v1/audit", &[], "").await.status, 401);
    for (method, path, status) in [
        ("PUT", FLAGS, 405),
        ("DELETE", FLAG, 405),
        ("GET", EXCLUDE, 405),
        ("GET", "/", 404),
        ("GET", "/v1/feature-flags/dwcp_v4", 404),
        ("POST", "/v2/feature-flags", 404),
    ] {
        let answer = server.write(method, path, &server.admin, body.clone()).await;
        assert_eq!(answer.problem().0, status, "{method} {path}: {}", answer.body);
    }
    assert_eq!(server.epoch(), epoch);
}

#[tokio::test]
async fn a_held_flag_answers_409_and_says_how_to_lift_it() {
    let server = Server::new();
    server.post(FLAGS, set(50, true)).await.ok();
    for kind in ["freeze", "latch"] {
        let path = format!("{FLAG}/{kind}");
        let held = server.write("POST", &path, &server.rollback, r#"{"reason":"storm ahead"}"#).await.ok();
        assert_eq!(held["holds"][kind]["reason"], "storm ahead");
        let refused = server.post(FLAGS, set(60, true)).await;
        let (status, code, message) = refused.problem();
        assert_eq!((status, code.as_str()), (409, "held"));
        assert!(message.contains("storm ahead") && refused.body.contains(&path), "{}", refused.body);
        server.post(EXCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":["a"]}"#).await.ok();
        assert_eq!(server.post(INCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":["a"]}"#).await.status, 409);
        assert_eq!(server.write("DELETE", &path, &server.rollback, "").await.status, 403);
        server.write("DELETE", &path, &server.admin, "").await.ok();
        server.post(INCLUDE, r#"{"feature":"dwcp_v3_hde","nodes":["a"]}"#).await.ok();
    }
    server.post(FLAGS, set(60, true)).await.ok();
    let stale = json!({"feature": FEATURE, "percentage": 70, "enabled": true, "epoch": {"incarnation": 1, "counter": 1}});
    assert_eq!(server.post(FLAGS, stale.to_string()).await.problem().1, "stale");
    // Who did all that.
    let authorization = format!("Bearer {}", server.rollback);
    let audit =
        server.send("GET", "/v1/audit?after=1&limit=3", &[("authorization", &authorization)], "").await.ok();
    let actions: Vec<_> =
        audit["entries"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect();
    assert_eq!(actions, ["hold", "exclude", "lift"]);
    assert_eq!(
        (&audit["entries"][0]["who"], &audit["entries"][0]["number"]),
        (&json!("rollback"), &json!(2))
    );
    for query in ["after=x", "limit=-1", "what=1", "after=1&after=2"] {
        let path = format!("/v1/audit?{query}");
        assert_eq!(server.send("GET", &path, &[("authorization", &authorization)], "").await.status, 400);
    }
}

#[tokio::test]
async fn a_node_polls_applies_and_is_counted() {
    let server = Server::new();
    let key = NodeKey::from_seed(NodeName::new("hv-01").unwrap(), &[1; 32]);
    let public = key.public().to_text();
    let digits = public.split_whitespace().last().unwrap();
    let node = json!({"name": "hv-01", "public_key": digits, "labels": {"datacenter": "dc1"}});
    server.write("POST", "/v1/nodes", &server.nodes, json!({"nodes": [node]}).to_string()).await.ok();
    assert_eq!(server.get("/v1/nodes").await.ok()["nodes"][0]["state"], "absent");
    server.post(FLAGS, set(100, true)).await.ok();

    let mut state = FlagState::new("hv-01", Source::Server(Lease::new(LEASE)));
    let (mut sequence, mut cluster, mut etag) = (0, String::new(), String::new());
    let mut poll = async |state: &mut FlagState, path: Path| {
        sequence += 1;
        let report = PollReport {
            node: "hv-01".into(),
            cluster: cluster.clone(),
            feature: FEATURE.into(),
            boot: 1,
            sequence,
            applied: state.document().and_then(|document| document.epoch),
            path,
            reason: "flag_in_cohort".into(),
            v3_inflight: u32::from(path == Path::V3),
            data_loss: 0,
            byzantine_successes: 0,
            critical_errors: 0,
            labels: [("datacenter".to_owned(), "dc9".to_owned()), ("rack".to_owned(), "4".to_owned())].into(),
        };
        let bytes = report.encode().unwrap();
        let signature = key.sign(&report_message(&bytes));
        let header = SignedReport { signature, report: bytes.clone() }.to_header();
        let answer = server.send("GET", FLAG, &[(REPORT, &header), ("if-none-match", &etag)], "").await;
        cluster = answer.headers[CLUSTER_ID].to_str().unwrap().to_owned();
        etag = answer.headers["etag"].to_str().unwrap().to_owned();
        let text = match answer.status.as_u16() {
            304 => state.document().unwrap().to_json(),
            _ => {
                let served = Served::parse(answer.body.as_bytes(), FEATURE).unwrap();
                state.apply(served.document, Moment::default()).unwrap();
                served.text
            }
        };
        // The answer is signed for this very report.
        let signature = answer.headers["dwcp-answer-signature"].to_str().unwrap();
        let signature = dwcp_flags::poll::AnswerSignature::from_header(signature).unwrap();
        let message = dwcp_flags::poll::answer_message(&cluster, &bytes, signature.age_ms, &text);
        assert!(server.shared.key.as_ref().unwrap().public().verify(&message, &signature.signature));
        answer.status.as_u16()
    };

    assert_eq!(poll(&mut state, Path::V1).await, 200);
    let page = server.get(FLAG).await.ok();
    assert_eq!((&page["acked"], &page["laggards"]), (&json!("0/1"), &json!(["hv-01"])));
    assert_eq!(poll(&mut state, Path::V3).await, 304);
    let page = server.get(FLAG).await.ok();
    assert_eq!(
        (&page["acked"], &page["nodes_on_v3"], &page["v3_inflight"]),
        (&json!("1/1"), &json!(1), &json!(1))
    );

    let off = server.post(FLAGS, set(0, false)).await.ok();
    assert_eq!((&off["acked"], &off["converged"]), (&json!("0/1"), &json!(false)));
    assert_eq!(poll(&mut state, Path::V3).await, 200);
    assert_eq!(poll(&mut state, Path::V1).await, 304);
    let health = server.get("/v1/health/detailed").await.ok();
    let flag = &health["flags"][FEATURE];
    assert_eq!(
        (&flag["acked"], &flag["converged"], &flag["v3_inflight"]),
        (&json!("1/1"), &json!(true), &json!(0))
    );
    assert_eq!((&health["status"], &health["nodes"]), (&json!("ok"), &json!(1)));
    let node = &server.get("/v1/nodes").await.ok()["nodes"][0];
    assert_eq!((&node["state"], &node["path"]), (&json!("present"), &json!("v1")));
    // What the operators say goes before what the node says.
    assert_eq!(node["labels"], json!({"datacenter": "dc1", "rack": "4"}));
    let metrics = server.get("/metrics").await.body;
    assert!(metrics.contains("dwcp_control_nodes_acked{feature=\"dwcp_v3_hde\"} 1"), "{metrics}");
    assert!(metrics.contains("dwcp_control_reports_total{result=\"counted\"} 3"), "{metrics}");
}

#[tokio::test]
async fn health_echoes_the_cohort_to_who_asks() {
    let server = Server::new();
    server.post(FLAGS, set(10, true)).await.ok();
    for path in ["/health", "/v1/health"] {
        assert_eq!(server.get(path).await.ok(), json!({"status": "ok"}));
        let health = server.send("GET", path, &[("X-Canary-Debug", "1")], "").await.ok();
        assert_eq!(health["cohort"][FEATURE]["percentage"], 10);
    }
    assert_eq!(server.get("/readyz").await.body, "ready\n");
}

#[tokio::test]
async fn the_inventory_has_pages() {
    let server = Server::new();
    let key = |n: u8| {
        let name = NodeName::new(format!("n{n}")).unwrap();
        let text = NodeKey::from_seed(name.clone(), &[n + 1; 32]).public().to_text();
        json!({"name": name, "public_key": text.split_whitespace().last().unwrap()})
    };
    let all: Vec<Value> = (0..5).map(key).collect();
    let enrol = json!({"nodes": all}).to_string();
    assert_eq!(server.post("/v1/nodes", enrol.clone()).await.ok(), json!({"nodes": 5, "changed": true}));
    assert_eq!(server.post("/v1/nodes", enrol).await.ok(), json!({"nodes": 5, "changed": false}));
    server.post("/v1/nodes/drain", r#"{"nodes":["n1"]}"#).await.ok();
    let (mut after, mut names) = (String::new(), Vec::new());
    loop {
        let page = server.get(&format!("/v1/nodes?limit=2&after={after}")).await.ok();
        names.extend(
            page["nodes"].as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap().to_owned()),
        );
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["n0", "n1", "n2", "n3", "n4"]);
    server.post("/v1/nodes/remove", r#"{"nodes":["n0","n2","n3","n4"]}"#).await.ok();
    let left = server.get("/v1/nodes").await.ok();
    assert_eq!((left["nodes"].as_array().unwrap().len(), &left["nodes"][0]["state"]), (1, &json!("drained")));
}

/// The plainest server there is.
#[derive(Debug, Default)]
struct Model {
    enabled: bool,
    percentage: u8,
    excluded: BTreeSet<String>,
    frozen: bool,
    counter: u64,
}

#[derive(Debug, Clone)]
enum Step {
    Set(u8, bool),
    Exclude(BTreeSet<String>),
    Include(BTreeSet<String>),
    Freeze(bool),
    Bad,
    Get,
}

fn step() -> impl Strategy<Value = Step> {
    let nodes = || prop::collection::btree_set("n[0-5]", 1..4);
    prop_oneof![
        3 => (0..=100u8, any::<bool>()).prop_map(|(percentage, enabled)| Step::Set(percentage, enabled)),
        2 => nodes().prop_map(Step::Exclude),
        2 => nodes().prop_map(Step::Include),
        1 => any::<bool>().prop_map(Step::Freeze),
        1 => Just(Step::Bad),
        2 => Just(Step::Get),
    ]
}

impl Model {
    /// The status that the step must be answered with.
    fn step(&mut self, step: &Step) -> u16 {
        let reach = |enabled: bool, percentage: u8| if enabled { percentage } else { 0 };
        let before = reach(self.enabled, self.percentage);
        match step {
            Step::Set(percentage, enabled) => {
                if self.frozen && reach(*enabled, *percentage) > before {
                    return 409;
                }
                self.counter += u64::from((*percentage, *enabled) != (self.percentage, self.enabled));
                (self.percentage, self.enabled) = (*percentage, *enabled);
            }
            Step::Exclude(nodes) => {
                let more: BTreeSet<String> = self.excluded.union(nodes).cloned().collect();
                self.counter += u64::from(more != self.excluded);
                self.excluded = more;
            }
            Step::Include(nodes) => {
                let fewer: BTreeSet<String> = self.excluded.difference(nodes).cloned().collect();
                if self.frozen && fewer != self.excluded && before > 0 {
                    return 409;
                }
                self.counter += u64::from(fewer != self.excluded);
                self.excluded = fewer;
            }
            Step::Freeze(frozen) => self.frozen = *frozen,
            Step::Bad => return 400,
            Step::Get => {}
        }
        200
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_requests_does_what_the_model_does(steps in prop::collection::vec(step(), 1..25)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Server::new();
            let mut model = Model { counter: 1, ..Model::default() };
            let list = |nodes: &BTreeSet<String>| json!({"feature": FEATURE, "nodes": nodes}).to_string();
            for step in &steps {
                let answer = match step {
                    Step::Set(percentage, enabled) => server.post(FLAGS, set(*percentage, *enabled)).await,
                    Step::Exclude(nodes) => server.post(EXCLUDE, list(nodes)).await,
                    Step::Include(nodes) => server.post(INCLUDE, list(nodes)).await,
                    Step::Freeze(true) => server.post(&format!("{FLAG}/freeze"), r#"{"reason":"x"}"#).await,
                    Step::Freeze(false) => server.write("DELETE", &format!("{FLAG}/freeze"), &server.admin, "").await,
                    Step::Bad => server.post(FLAGS, "{").await,
                    Step::Get => server.get(FLAG).await,
                };
                assert_eq!(answer.status.as_u16(), model.step(step), "{step:?}: {}", answer.body);
                let page = server.get(FLAG).await;
                let served = Served::parse(page.body.as_bytes(), FEATURE).unwrap().document;
                let epoch = Epoch { incarnation: 1, counter: model.counter };
                assert_eq!(
                    (served.enabled, served.percentage.value(), &served.excluded, served.epoch),
                    (model.enabled, model.percentage, &model.excluded, Some(epoch)),
                    "{step:?}"
                );
                let etag = page.headers["etag"].to_str().unwrap();
                let again = server.send("GET", FLAG, &[("if-none-match", etag)], "").await;
                assert_eq!((again.status.as_u16(), again.body.as_str()), (304, ""));
            }
        });
    }
}
