//! What monitoring asks over HTTP: `/metrics`, `/healthz` (the process answers), `/readyz` (it takes work).

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use dwcp_migrate::metrics::Metrics;
use dwcp_migrate::{Blame, Failure};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::flags::Flag;
use crate::process::ProcessCollector;
use crate::readiness::Readiness;

/// What Prometheus and its kin read; the encoder's own format.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The running HTTP server; it lives as long as the process.
#[derive(Debug)]
pub(crate) struct Http {
    address: SocketAddr,
    registry: Arc<OnceLock<Registry>>,
}

#[derive(Debug, Clone)]
struct Shared {
    registry: Arc<OnceLock<Registry>>,
    readiness: Readiness,
}

/// Binds the address and serves it from now on, so that a slow start can be told from a dead process.
pub(crate) async fn serve(address: SocketAddr, readiness: Readiness) -> Result<Http, Failure> {
    let fail = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AddrInUse => "another process listens there; choose another [listen] metrics",
            _ => "check [listen] metrics",
        };
        Failure::new("metrics_address", Blame::Operator, format!("metrics address {address}: {error}"), hint)
    };
    let listener = TcpListener::bind(address).await.map_err(fail)?;
    let address = listener.local_addr().map_err(fail)?;
    let registry = Arc::new(OnceLock::new());
    let shared = Shared { registry: Arc::clone(&registry), readiness };
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(shared);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(Http { address, registry })
}

impl Http {
    /// The address as bound.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves these metrics, and those of the process, from now on.
    pub(crate) fn publish(&self, metrics: &Metrics, flag: &Flag) {
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        flag.register(&mut registry);
        registry.register_collector(Box::new(ProcessCollector));
        let _ = self.registry.set(registry);
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let Some(registry) = shared.registry.get() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n").into_response();
    };
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn ready(State(shared): State<Shared>) -> Response {
    match shared.readiness.reason() {
        None => "ready\n".into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}
