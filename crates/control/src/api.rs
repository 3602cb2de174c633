//! The HTTP API.
//!
//! | request | token | what |
//! |---|---|---|
//! | `GET /v1/feature-flags`, `GET /v1/feature-flags/NAME` | | the flag, and how far it has come; nodes poll the second |
//! | `POST /v1/feature-flags` | admin; rollback if it raises nothing | sets a flag, see [`FlagChange`](dwcp_flags::FlagChange) |
//! | `POST /v1/feature-flags/exclude` | admin, rollback | adds excluded nodes |
//! | `POST /v1/feature-flags/include` | admin | takes excluded nodes back |
//! | `POST /v1/feature-flags/NAME/freeze`, `/latch` `{"reason"}` | admin, rollback | holds the flag down |
//! | `DELETE /v1/feature-flags/NAME/freeze`, `/latch` | admin | lifts that |
//! | `GET /v1/nodes?after=NAME&limit=N` | | the inventory, page by page |
//! | `POST /v1/nodes` `{"nodes": [{"name", "public_key", "labels"}]}` | admin, nodes | enrols nodes |
//! | `POST /v1/nodes/drain`, `/undrain`, `/remove` `{"nodes": []}` | admin, nodes | takes nodes out of service or out of the inventory |
//! | `GET /v1/audit?after=N&limit=N` | any | who changed what |
//! | `GET /health`, `/v1/health`, `/v1/health/detailed` | | health, and how far each flag has come |
//! | `GET /healthz`, `/readyz`, `/metrics` | | for monitoring |
//!
//! A body is read as JSON whatever its `Content-Type`, since `curl -d` names another one. An answer that is not 2xx or 304
//! is `{"error": {"code", "message"}}`, with `line` and `column` where a body is wrong and a `hint` where there is one.

mod error;
mod flags;
mod health;
mod metrics;
mod nodes;
pub(crate) mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use axum::Router;
use axum::routing::{get, post};
use dwcp_proto::NodeKey;

use crate::api::error::{Code, Problem};
use crate::time::Clock;
use crate::tokens::Tokens;
use crate::writer::{View, Writer};

/// All that a request can need.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) view: Arc<View>,
    pub(crate) writer: Writer,
    pub(crate) tokens: Tokens,
    pub(crate) clock: Clock,
    /// Signs the answers to polls, where the operator gave a key.
    pub(crate) key: Option<NodeKey>,
    pub(crate) counts: Counts,
}

/// What happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Polls answered with a document.
    pub(crate) served: AtomicU64,
    /// Polls answered with 304.
    pub(crate) confirmed: AtomicU64,
    /// Changes made, those that changed nothing included.
    pub(crate) changes: AtomicU64,
    /// Changes not made.
    pub(crate) refusals: AtomicU64,
    /// Connections at the moment.
    pub(crate) connections: AtomicU64,
}

/// The routes.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/feature-flags", get(flags::list).post(flags::set))
        .route("/v1/feature-flags/exclude", post(flags::exclude))
        .route("/v1/feature-flags/include", post(flags::include))
        .route("/v1/feature-flags/{feature}", get(flags::show))
        .route("/v1/feature-flags/{feature}/freeze", post(flags::freeze).delete(flags::unfreeze))
        .route("/v1/feature-flags/{feature}/latch", post(flags::latch).delete(flags::unlatch))
        .route("/v1/nodes", get(nodes::list).post(nodes::enrol))
        .route("/v1/nodes/drain", post(nodes::drain))
        .route("/v1/nodes/undrain", post(nodes::undrain))
        .route("/v1/nodes/remove", post(nodes::remove))
        .route("/v1/audit", get(health::audit))
        .route("/health", get(health::short))
        .route("/v1/health", get(health::short))
        .route("/v1/health/detailed", get(health::detailed))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(health::ready))
        .route("/metrics", get(metrics::page))
        .method_not_allowed_fallback(async || {
            Problem::new(Code::Method, "this address does not take that method")
        })
        .fallback(async || Problem::new(Code::Address, "nothing is served at this address"))
        .with_state(shared)
}
