//! What handlers need of a request: who asks, the body, the query; and how they answer.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, header};
use axum::response::{IntoResponse, Response};
use dwcp_flags::MAX_DOCUMENT;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::Shared;
use crate::api::error::{Code, Problem};
use crate::state::{Actor, Command};
use crate::tokens::Denied;

/// For how long a body may be under way.
const BODY: Duration = Duration::from_secs(10);

/// The type of every answer but the metrics.
pub(crate) const JSON: [(HeaderName, &str); 1] = [(header::CONTENT_TYPE, "application/json")];

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin(pub(crate) SocketAddr);

/// A request that has shown its token, and its body.
#[derive(Debug)]
pub(crate) struct Authorized {
    pub(crate) actor: Actor,
    pub(crate) origin: String,
    pub(crate) body: Bytes,
}

/// Whose token the request carries.
pub(crate) fn actor(shared: &Shared, headers: &HeaderMap) -> Result<Actor, Denied> {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let (scheme, token) = given.and_then(|value| value.split_once(' ')).ok_or(Denied::Missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Denied::Missing);
    }
    shared.tokens.actor(token.trim(), crate::time::now_ms())
}

/// Token first, then the body: nothing is read for someone who may not ask.
pub(crate) async fn authorized(shared: &Shared, request: Request) -> Result<Authorized, Problem> {
    let actor = actor(shared, request.headers())?;
    let origin = request.extensions().get::<Origin>().map(|Origin(address)| address.ip().to_string());
    let origin = origin.unwrap_or_else(|| "unknown".to_owned());
    Ok(Authorized { actor, origin, body: body(request.into_body()).await? })
}

/// Makes a change, and counts it.
pub(crate) async fn change(
    shared: &Shared,
    command: Command,
    actor: Actor,
    origin: String,
) -> Result<bool, Problem> {
    let changed = shared.writer.change(command, actor, origin).await;
    let count = if changed.is_ok() { &shared.counts.changes } else { &shared.counts.refusals };
    count.fetch_add(1, Ordering::Relaxed);
    Ok(changed?)
}

/// Reads a body of another form than a flag's.
pub(crate) fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| {
        let (line, column) = (error.line().max(1), error.column().max(1));
        let message = error.to_string();
        let place = format!(" at line {} column {}", error.line(), error.column());
        let what = message.strip_suffix(&place).unwrap_or(&message);
        Problem::new(Code::Body, format!("line {line}, column {column}: {what}"))
            .at(line, column)
            .hint("nothing was changed")
    })
}

/// The values of a query; each key may be given once, and only those that are `known`.
pub(crate) fn query<'a>(request: &'a Request, known: &[&str]) -> Result<BTreeMap<&'a str, &'a str>, Problem> {
    let mut values = BTreeMap::new();
    for pair in request.uri().query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if !known.contains(&key) || values.insert(key, value).is_some() {
            let message = format!("the query takes {} once each", known.join(", "));
            return Err(Problem::new(Code::Query, message));
        }
    }
    Ok(values)
}

/// A number of a query.
pub(crate) fn number(values: &BTreeMap<&str, &str>, key: &str, otherwise: u64) -> Result<u64, Problem> {
    let Some(value) = values.get(key) else { return Ok(otherwise) };
    value.parse().map_err(|_| Problem::new(Code::Query, format!("{key} is a whole number")))
}

/// An answer for people and scripts.
pub(crate) fn answer(value: &impl Serialize) -> Response {
    match serde_json::to_string_pretty(value) {
        Ok(text) => (JSON, text + "\n").into_response(),
        Err(error) => Problem::new(Code::Store, error.to_string()).into_response(),
    }
}

async fn body(body: Body) -> Result<Bytes, Problem> {
    let read = axum::body::to_bytes(body, MAX_DOCUMENT);
    match tokio::time::timeout(BODY, read).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            let limit = format!("a body has {MAX_DOCUMENT} bytes at most");
            // The connection broke, or this: axum has no finer word, and for a broken one nobody reads the answer.
            Err(Problem::new(Code::TooLarge, format!("{limit}: {error}")))
        }
        Err(_) => Err(Problem::new(Code::TooSlow, "the body took too long")),
    }
}
