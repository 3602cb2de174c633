//! The life of the server.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use dwcp_proto::NodeKey;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use crate::ServeArgs;
use crate::api::{Shared, router};
use crate::folder::Folder;
use crate::listen::{self, Tls};
use crate::time::Clock;
use crate::tokens::Tokens;
use crate::writer;

/// How often it is kept when nodes were heard. They are absent after ten minutes, so a minute is near enough.
const KEEP_SEEN: Duration = Duration::from_secs(60);
/// How long requests that are under way may hold up the exit. Longer would cost leases: nodes count on the next server.
const DRAIN: Duration = Duration::from_millis(300);
/// How long a thread that still writes may hold it up.
const LAST_WRITE: Duration = Duration::from_secs(5);

/// Serves until a signal says to stop.
pub(crate) fn run(args: ServeArgs) -> Result<()> {
    log();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(args));
    runtime.shutdown_timeout(LAST_WRITE);
    result
}

/// The server from its first breath to its last.
pub(crate) async fn serve(args: ServeArgs) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hup = signal(SignalKind::hangup())?;
    let files = allow_many_files();

    let folder = Folder::claim(&args.state)?;
    let tokens = Tokens::load(&args.admin_token_file)?;
    let tls = args.tls_cert.as_deref().zip(args.tls_key.as_deref());
    let tls = tls.map(|(cert, key)| Tls::load(cert, key)).transpose()?;
    let key = args.signing_key.as_deref().map(signing_key).transpose()?;
    if tls.is_none() && !args.listen.ip().is_loopback() {
        warn!("plain HTTP on a network: tokens can be read on the way; use --tls-cert and --tls-key");
    }

    // State first, address last: whoever gets through gets an answer.
    let (writer, view, thread) = writer::start(Box::new(folder.store()?))?;
    let clock = Clock::start();
    let shared = Arc::new(Shared {
        view: Arc::clone(&view),
        writer: writer.clone(),
        tokens: tokens.clone(),
        clock,
        key,
        counts: Default::default(),
    });
    let listener = listen::bind(args.listen).with_context(|| format!("listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    let (stop, stopping) = watch::channel(false);
    let server = listen::serve(
        listener,
        tls.clone(),
        router(Arc::clone(&shared)),
        Arc::clone(&shared),
        files,
        stopping,
    );
    // See there why it does not take its turn like the others.
    let server = tokio::spawn(tokio::task::coop::unconstrained(server));
    folder.publish(address)?;
    tell(&[NotifyState::Ready]);
    let nodes = view.fleet.members().len();
    info!(%address, tls = tls.is_some(), cluster = view.cluster, nodes, version = env!("CARGO_PKG_VERSION"), "ready");

    let mut keep = tokio::time::interval(KEEP_SEEN);
    keep.tick().await;
    let mut kept_ms = clock.now_ms();
    loop {
        tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            _ = hup.recv() => reload(&tokens, tls.as_ref()),
            _ = keep.tick() => {
                let since = std::mem::replace(&mut kept_ms, clock.now_ms());
                if let Err(error) = writer.note_seen(view.fleet.seen_since(since)).await {
                    warn!(%error, "when nodes were heard is kept later");
                    kept_ms = since;
                }
            }
        }
    }

    info!("stopping");
    tell(&[NotifyState::Stopping]);
    folder.retract();
    let _ = stop.send(true);
    let _ = tokio::time::timeout(DRAIN, server).await;
    if let Err(error) = writer.note_seen(view.fleet.seen_since(kept_ms)).await {
        warn!(%error, "when nodes were heard is not kept");
    }
    // Connections that outlast the drain may hold it yet; what they asked for is written, or was never answered.
    drop((writer, shared));
    if tokio::time::timeout(DRAIN, tokio::task::spawn_blocking(move || thread.join())).await.is_err() {
        debug!("the writer is left behind");
    }
    info!("stopped");
    Ok(())
}

fn reload(tokens: &Tokens, tls: Option<&Tls>) {
    match tokens.reload() {
        Ok(count) => info!(count, "tokens read"),
        Err(error) => error!(%error, "the tokens stay as they were"),
    }
    if let Some(tls) = tls {
        match tls.reload() {
            Ok(()) => info!("certificate read"),
            Err(error) => error!(error = format!("{error:#}"), "the certificate stays as it was"),
        }
    }
}

fn signing_key(file: &Path) -> Result<NodeKey> {
    let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    NodeKey::parse(&text).with_context(|| format!("{}", file.display()))
}

/// As many files as we may have: each node keeps a connection open. How many that are.
fn allow_many_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    match setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        // No limit at all is none for us.
        Ok(()) => limit.maximum.unwrap_or(u64::MAX),
        Err(error) => {
            warn!(%error, current = limit.current, "the limit of open files stays");
            limit.current.unwrap_or(u64::MAX)
        }
    }
}

/// To standard error, `RUST_LOG` as everywhere, `DWCP_LOG_FORMAT=json` for machines.
fn log() {
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;
    use tracing_subscriber::{EnvFilter, Layer, fmt};
    let levels = std::env::var("RUST_LOG").unwrap_or_else(|_| "info".to_owned());
    let text = fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let layer = match std::env::var("DWCP_LOG_FORMAT").as_deref() {
        Ok("json") => fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed(),
        _ => text.boxed(),
    };
    let filter = EnvFilter::builder().parse_lossy(levels);
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
}

fn tell(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "systemd was not told");
    }
}
