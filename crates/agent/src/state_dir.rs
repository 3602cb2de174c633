//! The state folder: claimed by one agent at a time, writable, and the place of `listen.json`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use dwcp_migrate::{Blame, Failure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Serialize;
use tracing::warn;

const LISTEN: &str = "listen.json";

/// Where the agent can be reached, as bound: with port 0 this is the only place that says so.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Addresses {
    /// Other agents.
    pub(crate) data: SocketAddr,
    /// /metrics, /healthz, /readyz.
    pub(crate) metrics: SocketAddr,
    /// The RPC socket, `unix:PATH`.
    pub(crate) rpc: String,
}

/// A claimed state folder; the claim ends with the process.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    _lock: File,
}

/// Makes the folder if need be, and claims it.
pub(crate) fn claim(path: &Path) -> Result<StateDir, Failure> {
    let fail = |what: String, hint: &str| {
        let message = format!("state folder {}: {what}", path.display());
        Failure::new("state_dir", Blame::Operator, message, hint)
    };
    let unusable = |error: io::Error| {
        fail(error.to_string(), "the agent's user must own it and its disk must have room")
    };

    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(unusable)?;
    if fs::symlink_metadata(path).map_err(unusable)?.is_symlink() {
        return Err(fail("it is a symlink".to_owned(), "name the folder itself"));
    }
    // Journals say which guest runs where; nobody else needs them.
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(unusable)?;

    let mut lock = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path.join("lock"))
        .map_err(unusable)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(fail(
                "another dwcpd uses it".to_owned(),
                "stop that one, or give this one a folder of its own",
            ));
        }
        Err(error) => return Err(unusable(error.into())),
    }
    // A full or read-only disk shows itself here, not at the first commit.
    lock.set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()))
        .and_then(|()| lock.sync_all())
        .map_err(unusable)?;
    let state = StateDir { path: path.to_owned(), _lock: lock };
    state.retract();
    Ok(state)
}

impl StateDir {
    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes `listen.json`, whole or not at all: whoever sees it may connect.
    pub(crate) fn publish(&self, addresses: &Addresses) -> Result<(), Failure> {
        let write = || -> io::Result<()> {
            let temporary = self.path.join(".listen.json.new");
            fs::write(&temporary, serde_json::to_vec(addresses)?)?;
            fs::rename(temporary, self.path.join(LISTEN))
        };
        write().map_err(|error| {
            let message = format!("state folder {}: cannot write {LISTEN}: {error}", self.path.display());
            Failure::new("state_dir", Blame::Local, message, "")
        })
    }

    /// Removes `listen.json`: nobody should connect any more.
    pub(crate) fn retract(&self) {
        match fs::remove_file(self.path.join(LISTEN)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => warn!(%error, "{LISTEN} stays behind"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let first = claim(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let failure = claim(&path).unwrap_err();
        assert!(failure.message.contains("another dwcpd uses it"), "{failure}");
        drop(first);
        claim(&path).unwrap();
    }

    #[test]
    fn what_is_no_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(claim(&file).unwrap_err().message.contains("file"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(claim(&link).unwrap_err().message.contains("symlink"));
    }

    #[test]
    fn listen_json_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let state = claim(dir.path()).unwrap();
        let any: SocketAddr = "127.0.0.1:7".parse().unwrap();
        state.publish(&Addresses { data: any, metrics: any, rpc: "unix:/x".to_owned() }).unwrap();
        let text = fs::read_to_string(dir.path().join(LISTEN)).unwrap();
        assert_eq!(text, r#"{"data":"127.0.0.1:7","metrics":"127.0.0.1:7","rpc":"unix:/x"}"#);
        state.retract();
        assert!(!dir.path().join(LISTEN).exists());
    }
}
