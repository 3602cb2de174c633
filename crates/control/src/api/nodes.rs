//! The inventory.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use dwcp_flags::poll::MAX_LABELS;
use dwcp_flags::{MAX_NODES, Path};
use dwcp_proto::{NodeName, PeerKey};
use serde::{Deserialize, Serialize};

use crate::api::Shared;
use crate::api::error::{Code, Problem};
use crate::api::request::{self, answer, authorized, number, query};
use crate::fleet::Member;
use crate::state::{Command, Enrolment};
use crate::time::rfc3339;

/// Nodes on one page.
const PAGE: u64 = 1000;

/// A node as people see it.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// `present`, or `absent` after ten minutes of silence, or `drained`.
    state: &'static str,
    public_key: String,
    labels: BTreeMap<String, String>,
    /// To half a minute, since what says nothing new is not looked at any sooner.
    #[serde(skip_serializing_if = "Option::is_none")]
    seen: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epoch: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    v3_inflight: u32,
    data_loss: u64,
    byzantine_successes: u64,
    critical_errors: u64,
}

/// `GET /v1/nodes`.
pub(crate) async fn list(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Page {
        nodes: Vec<Row>,
        /// What `after` is for the next page.
        #[serde(skip_serializing_if = "Option::is_none")]
        next: Option<String>,
        /// Nodes that poll and are not enrolled.
        not_enrolled: Vec<String>,
    }
    let values = query(&request, &["after", "limit"])?;
    let after = values.get("after").copied().unwrap_or_default();
    let limit = number(&values, "limit", PAGE)?.clamp(1, PAGE);
    let (members, now_ms) = (shared.view.fleet.members(), shared.clock.now_ms());
    let mut rest = members.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
    let nodes: Vec<Row> = rest.by_ref().map(|(_, member)| row(member, now_ms)).take(limit as usize).collect();
    let next = rest.next().and_then(|_| nodes.last()).map(|row| row.name.clone());
    Ok(answer(&Page { nodes, next, not_enrolled: shared.view.fleet.strangers() }))
}

/// `POST /v1/nodes`.
pub(crate) async fn enrol(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        nodes: Vec<Given>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Given {
        name: NodeName,
        public_key: String,
        labels: Option<BTreeMap<String, String>>,
    }
    let asked = authorized(&shared, request).await?;
    let Body { nodes } = request::json(&asked.body)?;
    let mut enrolments = Vec::with_capacity(nodes.len().min(MAX_NODES));
    let mut names = BTreeSet::new();
    for Given { name, public_key, labels } in nodes {
        if !names.insert(name.clone()) {
            return Err(wrong(&name, "is named twice"));
        }
        let line = format!("dwcp-ed25519-public {name} {public_key}");
        let key = PeerKey::parse(&line).map_err(|_| {
            wrong(&name, "\"public_key\" is an Ed25519 key of 64 hexadecimal digits, as NAME.pub has it")
        })?;
        if labels.as_ref().is_some_and(|labels| !are_labels(labels)) {
            return Err(wrong(&name, "at most 8 labels, of 1 to 64 characters from A-Z a-z 0-9 . _ - each"));
        }
        enrolments.push(Enrolment { key, labels });
    }
    let count = enrolments.len();
    carry_out(&shared, Command::Enrol(enrolments), count, asked).await
}

/// `POST /v1/nodes/drain`.
pub(crate) async fn drain(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    named(&shared, request, |nodes| Command::Drain { nodes, drained: true }).await
}

/// `POST /v1/nodes/undrain`.
pub(crate) async fn undrain(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, Problem> {
    named(&shared, request, |nodes| Command::Drain { nodes, drained: false }).await
}

/// `POST /v1/nodes/remove`.
pub(crate) async fn remove(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    named(&shared, request, Command::Remove).await
}

async fn named(
    shared: &Shared,
    request: Request,
    command: impl FnOnce(BTreeSet<String>) -> Command,
) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        nodes: BTreeSet<NodeName>,
    }
    let asked = authorized(shared, request).await?;
    let Body { nodes } = request::json(&asked.body)?;
    let count = nodes.len();
    let nodes = nodes.into_iter().map(|node| node.to_string()).collect();
    carry_out(shared, command(nodes), count, asked).await
}

async fn carry_out(
    shared: &Shared,
    command: Command,
    count: usize,
    asked: request::Authorized,
) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Done {
        nodes: usize,
        changed: bool,
    }
    let changed = request::change(shared, command, asked.actor, asked.origin).await?;
    Ok(answer(&Done { nodes: count, changed }))
}

fn row(member: &Member, now_ms: u64) -> Row {
    let live = member.live();
    let report = live.report.as_ref();
    Row {
        name: member.node.name().to_owned(),
        state: match (member.node.drained, live.is_absent(now_ms)) {
            (true, _) => "drained",
            (false, true) => "absent",
            (false, false) => "present",
        },
        public_key: member.node.key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect(),
        labels: member.labels(&live),
        seen: live.seen_ms.map(rfc3339),
        epoch: report.and_then(|report| report.applied).map(|epoch| epoch.to_string()),
        path: report.map(|report| match report.path {
            Path::V1 => "v1",
            Path::V3 => "v3",
        }),
        reason: report.map(|report| report.reason.clone()),
        v3_inflight: report.map_or(0, |report| report.v3_inflight),
        data_loss: report.map_or(0, |report| report.data_loss),
        byzantine_successes: report.map_or(0, |report| report.byzantine_successes),
        critical_errors: report.map_or(0, |report| report.critical_errors),
    }
}

fn are_labels(labels: &BTreeMap<String, String>) -> bool {
    // The rule for names keeps them safe wherever they are shown.
    let legal = |text: &String| NodeName::new(text.as_str()).is_ok();
    labels.len() <= MAX_LABELS && labels.iter().all(|(key, value)| legal(key) && legal(value))
}

fn wrong(node: &NodeName, what: &str) -> Problem {
    Problem::new(Code::Body, format!("node {node}: {what}")).hint("nothing was changed")
}
