//! Health, for people, scripts and monitoring; and the audit.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::api::Shared;
use crate::api::error::Problem;
use crate::api::flags::{Page, pages};
use crate::api::request::{actor, answer, number, query};
use crate::writer::WriteError;

/// Asks `/health` for the cohort.
const CANARY_DEBUG: &str = "x-canary-debug";
/// Entries on one page of the audit.
const PAGE: u64 = 500;

/// `GET /health`; with `X-Canary-Debug: 1` it says who may use v3.
pub(crate) async fn short(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    #[derive(Serialize)]
    struct Health {
        status: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        cohort: Option<BTreeMap<String, Cohort>>,
    }
    #[derive(Serialize)]
    struct Cohort {
        enabled: bool,
        percentage: u8,
        canaries: usize,
        excluded: usize,
        nodes_on_v3: u64,
        nodes: u64,
    }
    let debug = headers.get(CANARY_DEBUG).is_some_and(|value| value == "1");
    let cohort = debug.then(|| {
        let cohort = |(feature, page): (String, Page)| {
            let document = shared.view.flags().get(&feature)?.flag.document.clone();
            let cohort = Cohort {
                enabled: document.enabled,
                percentage: document.percentage.value(),
                canaries: document.canaries.len(),
                excluded: document.excluded.len(),
                nodes_on_v3: page.convergence.nodes_on_v3,
                nodes: page.convergence.present_total,
            };
            Some((feature, cohort))
        };
        pages(&shared).into_iter().filter_map(cohort).collect()
    });
    with_status(&shared, &Health { status: status(&shared), cohort })
}

/// `GET /v1/health/detailed`.
pub(crate) async fn detailed(State(shared): State<Arc<Shared>>) -> Response {
    #[derive(Serialize)]
    struct Health {
        status: &'static str,
        version: &'static str,
        cluster: String,
        uptime_seconds: u64,
        /// Why changes cannot be kept, if they cannot.
        store: String,
        nodes: usize,
        not_enrolled: Vec<String>,
        flags: BTreeMap<String, Page>,
    }
    let health = Health {
        status: status(&shared),
        version: env!("CARGO_PKG_VERSION"),
        cluster: shared.view.cluster.clone(),
        uptime_seconds: shared.clock.uptime().as_secs(),
        store: shared.view.trouble().unwrap_or_else(|| "ok".to_owned()),
        nodes: shared.view.fleet.members().len(),
        not_enrolled: shared.view.fleet.strangers(),
        flags: pages(&shared),
    };
    with_status(&shared, &health)
}

/// `GET /readyz`: whether changes are taken.
pub(crate) async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    match shared.view.trouble() {
        None => "ready\n".into_response(),
        Some(trouble) => (StatusCode::SERVICE_UNAVAILABLE, trouble + "\n").into_response(),
    }
}

/// `GET /v1/audit`.
pub(crate) async fn audit(State(shared): State<Arc<Shared>>, request: Request) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Audit<T> {
        entries: T,
    }
    actor(&shared, request.headers())?;
    let values = query(&request, &["after", "limit"])?;
    let (after, limit) = (number(&values, "after", 0)?, number(&values, "limit", PAGE)?.clamp(1, PAGE));
    let page: Result<_, WriteError> = shared.writer.audit(after, limit as usize).await;
    Ok(answer(&Audit { entries: page? }))
}

fn status(shared: &Shared) -> &'static str {
    if shared.view.trouble().is_none() { "ok" } else { "degraded" }
}

fn with_status(shared: &Shared, health: &impl Serialize) -> Response {
    let mut response = answer(health);
    if shared.view.trouble().is_some() {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}
