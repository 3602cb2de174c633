//! Whether v3 may be used now: follows the flag source and keeps the engine's [`Gate`] up to date.
//!
//! A file is read once a second and compared by its content: that sees every way of writing it (in place, by rename, on a
//! network file system that has no inotify) well inside the five seconds that turning a flag off may take.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{
    Absence, Applied, Conditions, FEATURE, FlagDocument, FlagState, MAX_DOCUMENT, Moment, Scope, Source,
};
use dwcp_migrate::metrics::Metrics;
use dwcp_migrate::{Blame, Failure, Gate};
use dwcp_proto::NodeName;
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::config::{FlagSource, Flags, Without};

/// Time between two looks at a file.
const EVERY: Duration = Duration::from_secs(1);

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
        FlagSource::None => watch::channel(fixed(node, flags.without)).1,
        FlagSource::File(path) => {
            let mut file = FlagFile::new(path, node);
            let first = file.look().await;
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
                metrics.node_path(if v3 { dwcp_proto::Path::V3 } else { dwcp_proto::Path::V1 });
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
    state: FlagState,
    /// What the last look found, and what is wrong with it, if anything is.
    seen: Option<Result<Vec<u8>, String>>,
    wrong: Option<String>,
}

impl FlagFile {
    fn new(path: &Path, node: &NodeName) -> Self {
        let state = FlagState::new(node.as_str(), Source::File);
        FlagFile { path: path.to_owned(), state, seen: None, wrong: None }
    }

    async fn follow(mut self, sender: watch::Sender<Gate>, look: Arc<Notify>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = look.notified() => {}
                () = sender.closed() => return,
            }
            let gate = self.look().await;
            if *sender.borrow() != gate {
                info!(v3 = gate.source, veto = gate.veto, reason = %gate.reason, "the flag changed");
                sender.send_replace(gate);
            }
        }
    }

    /// The verdict of the file as it is now.
    async fn look(&mut self) -> Gate {
        let found = read(&self.path).await.map_err(|error| error.to_string());
        if self.seen.as_ref() != Some(&found) {
            self.wrong = self.take_in(&found).err().map(|error| format!("{}: {error}", self.path.display()));
            if let Some(wrong) = &self.wrong {
                warn!(%wrong, "the flag file is not obeyed");
            }
            self.seen = Some(found);
        }
        let mut gate = verdict(&self.state);
        if let Some(wrong) = &self.wrong {
            gate.reason = format!("{} ({wrong})", gate.reason);
        }
        gate
    }

    /// Takes in what was found; an error says why it is not obeyed, and the state is then the more careful one.
    fn take_in(&mut self, found: &Result<Vec<u8>, String>) -> Result<Applied, String> {
        let bytes = found.as_ref().map_err(|error| {
            self.state.withdraw(Absence::NoAnswer);
            error.clone()
        })?;
        let document = FlagDocument::parse(bytes, FEATURE).map_err(|bad| {
            self.state.withdraw(Absence::from(&bad));
            bad.to_string()
        })?;
        self.state.apply(document, Moment::default()).map_err(|refusal| refusal.to_string())
    }
}

/// The file's bytes; a directory, a pipe or a giant is an error.
async fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    if !tokio::fs::metadata(path).await?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    // One more than allowed: enough for the parser to see that it is too long.
    let limit = MAX_DOCUMENT as u64 + 1;
    tokio::fs::File::open(path).await?.take(limit).read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// The state's verdict on migrations that start now. Neither a file nor `none` has a lease, so the time is no matter.
fn verdict(state: &FlagState) -> Gate {
    let reason = state.decide(Moment::default(), Scope::New, Conditions::default());
    let epoch = state.document().and_then(|document| document.epoch);
    Gate {
        source: reason.path() == dwcp_flags::Path::V3,
        veto: state.veto().is_some(),
        reason: reason.to_string(),
        epoch: epoch.map_or((0, 0), |epoch| (epoch.incarnation, epoch.counter)),
    }
}

/// The gate of a node without a flag. One that is configured for v1 is a v1-only node, as a destination too.
fn fixed(node: &NodeName, without: Without) -> Gate {
    let (path, v1_only) = match without {
        Without::V1 => (dwcp_flags::Path::V1, true),
        Without::V3 => (dwcp_flags::Path::V3, false),
    };
    Gate { veto: v1_only, ..verdict(&FlagState::new(node.as_str(), Source::None(path))) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn node() -> NodeName {
        "hv-01".parse().unwrap()
    }

    fn document(percentage: u8, more: &str) -> String {
        format!(r#"{{"feature":"dwcp_v3_hde","percentage":{percentage},"enabled":true{more}}}"#)
    }

    #[tokio::test]
    async fn a_file_is_obeyed_and_a_bad_one_means_v1() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flag.json");
        let mut file = FlagFile::new(&path, &node());
        let gate = file.look().await;
        assert!(!gate.source && gate.reason.contains("flag.json"), "{gate:?}");

        fs::write(&path, document(100, r#","epoch":{"incarnation":1,"counter":7}"#)).unwrap();
        let on = file.look().await;
        assert_eq!((on.source, on.veto, on.epoch), (true, false, (1, 7)), "{on:?}");

        fs::write(&path, "{\"percentage\": 10,  # or 0\n}").unwrap();
        let bad = file.look().await;
        assert!(!bad.source && bad.reason.contains("line 1"), "{bad:?}");

        fs::write(&path, document(0, "")).unwrap();
        let off = file.look().await;
        assert!(!off.source && off.veto, "{off:?}");
        // Bad again: what was last known still restricts.
        fs::write(&path, "").unwrap();
        assert!(file.look().await.veto);

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let gate = file.look().await;
        assert!(!gate.source && gate.reason.contains("not a regular file"), "{gate:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_reaches_the_gate_without_being_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flag.json");
        fs::write(&path, document(100, "")).unwrap();
        let flags = Flags { source: FlagSource::File(path.clone()), without: Without::V1 };
        let flag = start(&flags, &node()).await.unwrap();
        let mut gate = flag.gate();
        assert!(gate.borrow().source);
        fs::write(&path, document(100, r#","excluded":["hv-01"]"#)).unwrap();
        let gate = gate.wait_for(|gate| !gate.source).await.unwrap();
        assert!(gate.veto && gate.reason.contains("excludes"), "{gate:?}");
    }

    #[tokio::test]
    async fn without_a_source_the_configured_path() {
        for (without, v3) in [(Without::V1, false), (Without::V3, true)] {
            let flag = start(&Flags { source: FlagSource::None, without }, &node()).await.unwrap();
            let gate = flag.gate().borrow().clone();
            assert_eq!((gate.source, gate.veto), (v3, !v3), "{gate:?}");
        }
        let remote = Flags { source: FlagSource::Remote("http://x".to_owned()), without: Without::V3 };
        assert_eq!(start(&remote, &node()).await.unwrap_err().code, "unsupported");
    }
}
