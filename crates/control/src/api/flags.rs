//! Flags: what nodes poll and operators set.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dwcp_flags::poll::{ANSWER_SIGNATURE, AnswerSignature, CLUSTER_ID, REPORT, answer_message};
use dwcp_flags::{FEATURE, FlagChange, NodeList};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::api::Shared;
use crate::api::error::{Code, Problem};
use crate::api::request::{self, Authorized, JSON, answer, authorized};
use crate::fleet::Convergence;
use crate::state::{Command, Hold, HoldKind};
use crate::writer::Served;

/// Characters of a reason.
const MAX_REASON: usize = 200;

/// A flag as people see it.
#[derive(Debug, Serialize)]
pub(crate) struct Page {
    flag: Box<RawValue>,
    cluster: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    changed: Option<bool>,
    /// What keeps it from being raised.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    holds: BTreeMap<HoldKind, Hold>,
    #[serde(flatten)]
    pub(crate) convergence: Convergence,
}

/// `GET /v1/feature-flags/NAME`: a poll if it carries a report, or is asked for anew.
pub(crate) async fn show(
    State(shared): State<Arc<Shared>>,
    Path(feature): Path<String>,
    headers: HeaderMap,
) -> Response {
    let flags = shared.view.flags();
    let Some(served) = flags.get(&feature) else { return unknown(&feature).into_response() };
    let report = headers.get(REPORT).map(HeaderValue::as_bytes);
    let signed = report.and_then(|report| shared.view.fleet.hear(report, &feature, shared.clock.now_ms()).1);
    let mut response = if holds(&headers, &served.etag) {
        shared.counts.confirmed.fetch_add(1, Ordering::Relaxed);
        StatusCode::NOT_MODIFIED.into_response()
    } else if report.is_some() {
        shared.counts.served.fetch_add(1, Ordering::Relaxed);
        (JSON, served.answer.clone()).into_response()
    } else {
        answer(&page(&shared, served, None))
    };
    let out = response.headers_mut();
    out.insert(header::ETAG, served.etag.clone());
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(cluster) = HeaderValue::from_str(&shared.view.cluster) {
        out.insert(CLUSTER_ID, cluster);
    }
    if let Some((key, signed)) = shared.key.as_ref().zip(signed) {
        // There is but one server, and what it serves is in force as it says so.
        let age_ms = 0;
        let message = answer_message(&shared.view.cluster, &signed.report, age_ms, &served.text);
        let signature = AnswerSignature { age_ms, signature: key.sign(&message) };
        if let Ok(signature) = HeaderValue::from_str(&signature.to_header()) {
            out.insert(ANSWER_SIGNATURE, signature);
        }
    }
    response
}

/// `GET /v1/feature-flags`.
pub(crate) async fn list(State(shared): State<Arc<Shared>>) -> Response {
    answer(&pages(&shared))
}

/// `POST /v1/feature-flags`.
pub(crate) async fn set(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    let asked = authorized(&shared, request).await?;
    let change = FlagChange::parse(&asked.body, FEATURE)?;
    carry_out(&shared, &change.feature.clone(), Command::Set(change), asked).await
}

/// `POST /v1/feature-flags/exclude`.
pub(crate) async fn exclude(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, Problem> {
    let asked = authorized(&shared, request).await?;
    let list = NodeList::parse(&asked.body, FEATURE)?;
    carry_out(&shared, &list.feature.clone(), Command::Exclude(list), asked).await
}

/// `POST /v1/feature-flags/include`.
pub(crate) async fn include(
    State(shared): State<Arc<Shared>>,
    request: Request,
) -> Result<Response, Problem> {
    let asked = authorized(&shared, request).await?;
    let list = NodeList::parse(&asked.body, FEATURE)?;
    carry_out(&shared, &list.feature.clone(), Command::Include(list), asked).await
}

/// `POST /v1/feature-flags/NAME/freeze`.
pub(crate) async fn freeze(
    State(shared): State<Arc<Shared>>,
    Path(feature): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    hold(&shared, feature, HoldKind::Freeze, request).await
}

/// `POST /v1/feature-flags/NAME/latch`.
pub(crate) async fn latch(
    State(shared): State<Arc<Shared>>,
    Path(feature): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    hold(&shared, feature, HoldKind::Latch, request).await
}

/// `DELETE /v1/feature-flags/NAME/freeze`.
pub(crate) async fn unfreeze(
    State(shared): State<Arc<Shared>>,
    Path(feature): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    lift(&shared, feature, HoldKind::Freeze, request).await
}

/// `DELETE /v1/feature-flags/NAME/latch`.
pub(crate) async fn unlatch(
    State(shared): State<Arc<Shared>>,
    Path(feature): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    lift(&shared, feature, HoldKind::Latch, request).await
}

/// All flags, by name.
pub(crate) fn pages(shared: &Shared) -> BTreeMap<String, Page> {
    let flags = shared.view.flags();
    flags.iter().map(|(feature, served)| (feature.clone(), page(shared, served, None))).collect()
}

async fn hold(
    shared: &Shared,
    feature: String,
    kind: HoldKind,
    request: Request,
) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Reason {
        reason: String,
    }
    let asked = authorized(shared, request).await?;
    let Reason { reason } = request::json(&asked.body)?;
    if reason.trim().is_empty() || reason.chars().count() > MAX_REASON || reason.chars().any(char::is_control)
    {
        let message = format!("\"reason\" is one line of 1 to {MAX_REASON} characters");
        return Err(Problem::new(Code::Body, message).hint("nothing was changed"));
    }
    carry_out(shared, &feature.clone(), Command::Hold { feature, kind, reason }, asked).await
}

async fn lift(
    shared: &Shared,
    feature: String,
    kind: HoldKind,
    request: Request,
) -> Result<Response, Problem> {
    let asked = authorized(shared, request).await?;
    carry_out(shared, &feature.clone(), Command::Lift { feature, kind }, asked).await
}

/// Makes the change and shows the flag as it is then.
async fn carry_out(
    shared: &Shared,
    feature: &str,
    command: Command,
    asked: Authorized,
) -> Result<Response, Problem> {
    let changed = request::change(shared, command, asked.actor, asked.origin).await?;
    let flags = shared.view.flags();
    let served = flags.get(feature).ok_or_else(|| unknown(feature))?;
    Ok(answer(&page(shared, served, Some(changed))))
}

fn page(shared: &Shared, served: &Served, changed: Option<bool>) -> Page {
    let flag = &served.flag;
    let off = flag.document.reach() == 0;
    Page {
        // It is JSON: our own serializer wrote it.
        flag: RawValue::from_string(served.text.clone()).unwrap_or_default(),
        cluster: shared.view.cluster.clone(),
        changed,
        holds: flag.holds.clone(),
        convergence: shared.view.fleet.convergence(flag.epoch(), off, shared.clock.now_ms()),
    }
}

/// Whether the client holds the document of this tag.
fn holds(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    let given = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    given.flat_map(|value| value.split(',')).any(|tag| tag.trim().as_bytes() == etag.as_bytes())
}

fn unknown(feature: &str) -> Problem {
    let shown: String = feature.chars().take(64).map(|c| if c.is_control() { ' ' } else { c }).collect();
    Problem::new(Code::Feature, format!("unknown feature \"{shown}\""))
        .hint(format!("this server knows {FEATURE}"))
}
