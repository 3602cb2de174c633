//! Whether v3 may be used now: follows the flag source and keeps the engine's [`Gate`] up to date.
//!
//! A file is read once a second and compared by its content: that sees every way of writing it (in place, by rename, on a
//! network file system that has no inotify) well inside the five seconds that turning a flag off may take.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{
    Absence, Applied, Conditions, FEATURE, FlagDocument, FlagState, MAX_DOCUMENT, Moment, Reason, Scope,
    Source,
};
use dwcp_migrate::metrics::Metrics;
use dwcp_migrate::{Blame, Failure, FlagReason, Gate, Running, Verdict};
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
        FlagSource::None => watch::channel(fixed(flags.without)).1,
        FlagSource::File(path) => {
            let mut file = FlagFile::new(path, node);
            let first = file.look().await;
            info!(path = first.source.new.name(), veto = first.veto.is_some(), reason = %first.source.reason.text, "flag read");
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
                let path = gate.borrow_and_update().source.new;
                metrics.node_path(path);
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
                let Verdict { new, reason, .. } = &gate.source;
                info!(path = new.name(), veto = gate.veto.is_some(), reason = %reason.text, "the flag changed");
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
            let text = &mut gate.source.reason.text;
            *text = format!("{text} ({wrong})");
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

/// The state's verdict. Neither a file nor `none` has a lease, so the time is no matter.
fn verdict(state: &FlagState) -> Gate {
    let decide = |scope| state.decide(Moment::default(), scope, Conditions::default());
    let epoch = state.document().and_then(|document| document.epoch);
    let running = match decide(Scope::Running).path() {
        dwcp_flags::Path::V1 => Running::Leave,
        dwcp_flags::Path::V3 => Running::Keep,
    };
    Gate {
        source: Verdict { new: path(decide(Scope::New)), running, reason: reason(decide(Scope::New)) },
        veto: state.veto().map(reason),
        epoch: epoch.map_or((0, 0), |epoch| (epoch.incarnation, epoch.counter)),
    }
}

/// The gate of a node without a flag. One that is configured for v1 is a v1-only node, as a destination too.
fn fixed(without: Without) -> Gate {
    let configured = Reason::NoSource(match without {
        Without::V1 => dwcp_flags::Path::V1,
        Without::V3 => dwcp_flags::Path::V3,
    });
    Gate::fixed(path(configured), reason(configured))
}

fn path(reason: Reason) -> dwcp_proto::Path {
    match reason.path() {
        dwcp_flags::Path::V1 => dwcp_proto::Path::V1,
        dwcp_flags::Path::V3 => dwcp_proto::Path::V3,
    }
}

fn reason(reason: Reason) -> FlagReason {
    FlagReason { code: reason.code(), text: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn node() -> NodeName {
        "hv-01".parse().unwrap()
    }

    fn v3(gate: &Gate) -> bool {
        gate.source.new == dwcp_proto::Path::V3
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
        assert!(!v3(&gate) && gate.source.reason.text.contains("flag.json"), "{gate:?}");

        fs::write(&path, document(100, r#","epoch":{"incarnation":1,"counter":7}"#)).unwrap();
        let on = file.look().await;
        assert_eq!((v3(&on), on.veto.as_ref(), on.epoch), (true, None, (1, 7)), "{on:?}");

        fs::write(&path, "{\"percentage\": 10,  # or 0\n}").unwrap();
        let bad = file.look().await;
        assert!(!v3(&bad) && bad.source.reason.text.contains("line 1"), "{bad:?}");

        fs::write(&path, document(0, "")).unwrap();
        let off = file.look().await;
        assert!(!v3(&off) && off.veto.is_some(), "{off:?}");
        // Bad again: what was last known still restricts.
        fs::write(&path, "").unwrap();
        assert!(file.look().await.veto.is_some());

        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let gate = file.look().await;
        assert!(!v3(&gate) && gate.source.reason.text.contains("not a regular file"), "{gate:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_reaches_the_gate_without_being_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("flag.json");
        fs::write(&path, document(100, "")).unwrap();
        let flags = Flags { source: FlagSource::File(path.clone()), without: Without::V1 };
        let flag = start(&flags, &node()).await.unwrap();
        let mut gate = flag.gate();
        assert!(v3(&gate.borrow()));
        fs::write(&path, document(100, r#","excluded":["hv-01"]"#)).unwrap();
        let gate = gate.wait_for(|gate| !v3(gate)).await.unwrap();
        assert!(gate.veto.as_ref().is_some_and(|veto| veto.text.contains("excludes")), "{gate:?}");
    }

    #[tokio::test]
    async fn without_a_source_the_configured_path() {
        for (without, on) in [(Without::V1, false), (Without::V3, true)] {
            let flag = start(&Flags { source: FlagSource::None, without }, &node()).await.unwrap();
            let gate = flag.gate().borrow().clone();
            assert_eq!((v3(&gate), gate.veto.is_some()), (on, !on), "{gate:?}");
        }
        let remote = Flags { source: FlagSource::Remote("http://x".to_owned()), without: Without::V3 };
        assert_eq!(start(&remote, &node()).await.unwrap_err().code, "unsupported");
    }
}
