//! Logs to standard error, where systemd and containers pick them up. Every line of a migration carries its id: the
//! engine opens a span `migration{id=...}`.
//!
//! `RUST_LOG` (levels, as `[log] level`) and `DWCP_LOG_FORMAT` (`text`, `json`) override the configuration.

use std::io::IsTerminal;

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, fmt};

use crate::config::{Log, LogFormat};

/// Starts logging. To be called once.
pub(crate) fn start(log: &Log) {
    let levels = std::env::var("RUST_LOG").unwrap_or_else(|_| log.level.0.clone());
    let format = match std::env::var("DWCP_LOG_FORMAT").as_deref() {
        Ok("json") => LogFormat::Json,
        Ok("text") => LogFormat::Text,
        _ => log.format,
    };
    let text = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let layer = match format {
        LogFormat::Json => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
        // The journal has its own time on each line.
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => text.without_time().boxed(),
        LogFormat::Text => text.boxed(),
    };
    // The configuration was checked; a bad level in the environment leaves errors alone visible.
    let filter = EnvFilter::builder().parse_lossy(levels);
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
}
