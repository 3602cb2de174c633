//! Whether v3 may be used now: follows the flag source and keeps the engine's [`Gate`] up to date.
//!
//! A file is read once a second and compared by content: that sees every way of writing it (in place, by rename, on a
//! network file system that has no inotify) well inside the five seconds that turning a flag off may take.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dwcp_migrate::metrics::Metrics;
use dwcp_migrate::{Blame, Failure, Gate};
use dwcp_proto::{NodeName, Path as MigrationPath};
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::config::{FlagSource, Flags, Without};

/// Time between two looks at a file.
const EVERY: Duration = Duration::from_secs(1);
/// Bytes of a flag document: room for some ten thousand excluded nodes.
const MAX_DOCUMENT: u64 = 1 << 20;

/// The flag as this node sees it.
#[derive(Debug)]
pub(crate) struct Flag {
    gate: watch::Receiver<Gate>,
    look: Arc<Notify>,
}

/// Starts to follow the source; the gate is right when this returns.
pub(crate) async fn start(flags: &Flags, node: &NodeName) -> Result<Flag, Failure> {
    let look = Arc::new(Notify::new());
    let gate = match &flags.source {
        FlagSource::None => watch::channel(fixed(flags.without)).1,
        FlagSource::File(path) => {
            let mut file = FlagFile { path: path.clone(), node: node.clone(), seen: None };
            let first =
                file.look().await.unwrap_or_else(|| restrictive("the flag file was not read".to_owned()));
            info!(v3 = first.source, veto = first.veto, reason = %first.reason, "flag read");
            let (sender, gate) = watch::channel(first);
            tokio::spawn(file.follow(sender, Arc::clone(&look)));
            gate
        }
        FlagSource::Remote(url) => return Err(not_built(url)),
    };
    Ok(Flag { gate, look })
}

/// The failure that a remote source means in this version.
pub(crate) fn not_built(url: &str) -> Failure {
    let message = format!("[flags] source {url}: flag servers are not built into this version yet");
    Failure::new(
        "unsupported",
        Blame::Operator,
        message,
        "use \"file:/PATH\", or \"none\" with [flags] without",
    )
}

impl Flag {
    /// The verdict, kept up to date.
    pub(crate) fn gate(&self) -> watch::Receiver<Gate> {
        self.gate.clone()
    }

    /// Looks at the source now.
    pub(crate) fn reload(&self) {
        self.look.notify_one();
    }

    /// Keeps the metric of the node's path up to date.
    pub(crate) fn report_to(&self, metrics: Metrics) {
        let mut gate = self.gate.clone();
        tokio::spawn(async move {
            loop {
                let v3 = gate.borrow_and_update().source;
                metrics.node_path(if v3 { MigrationPath::V3 } else { MigrationPath::V1 });
                if gate.changed().await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Follows one file.
struct FlagFile {
    path: PathBuf,
    node: NodeName,
    /// What the last look found.
    seen: Option<Result<Vec<u8>, String>>,
}

impl FlagFile {
    async fn follow(mut self, sender: watch::Sender<Gate>, look: Arc<Notify>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = look.notified() => {}
                () = sender.closed() => return,
            }
            let Some(gate) = self.look().await else { continue };
            if *sender.borrow() != gate {
                info!(v3 = gate.source, veto = gate.veto, reason = %gate.reason, "the flag changed");
                sender.send_replace(gate);
            }
        }
    }

    /// The verdict of the file as it is now; `None` when nothing changed since the last look.
    async fn look(&mut self) -> Option<Gate> {
        let found = read(&self.path).await.map_err(|error| error.to_string());
        if self.seen.as_ref() == Some(&found) {
            return None;
        }
        let gate = match &found {
            Ok(text) => evaluate(text, &self.node),
            Err(error) => Err(format!("cannot be read: {error}")),
        };
        self.seen = Some(found);
        Some(gate.unwrap_or_else(|error| {
            let reason = format!("the flag file {} {error}", self.path.display());
            warn!(%reason, "v1 until this is mended");
            restrictive(reason)
        }))
    }
}

/// The file's bytes; a directory, a pipe or a giant is an error.
async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let meta = tokio::fs::metadata(path).await?;
    if !meta.is_file() || meta.len() > MAX_DOCUMENT {
        return Err(std::io::Error::other(format!("it must be a file of at most {MAX_DOCUMENT} bytes")));
    }
    let mut text = Vec::new();
    tokio::fs::File::open(path).await?.take(MAX_DOCUMENT).read_to_end(&mut text).await?;
    Ok(text)
}

/// What the document says of this node, or what is wrong with it.
fn evaluate(_document: &[u8], _node: &NodeName) -> Result<Gate, String> {
    Err("(being laid)".to_owned())
}

/// The gate of a node without a flag. With `v1` it is a v1-only node, in both roles.
fn fixed(without: Without) -> Gate {
    let v3 = without == Without::V3;
    let path = if v3 { "v3" } else { "v1" };
    let reason = format!("no flag source; [flags] without = \"{path}\"");
    Gate { source: v3, veto: !v3, reason, epoch: (0, 0) }
}

/// The gate where the flag cannot be known.
fn restrictive(reason: String) -> Gate {
    Gate { source: false, veto: true, reason, epoch: (0, 0) }
}
