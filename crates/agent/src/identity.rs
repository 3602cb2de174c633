//! The node's own key and the keys that it trusts.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use dwcp_link::Peers;
use dwcp_migrate::{Blame, Failure};
use dwcp_proto::{NodeKey, NodeName};
use tracing::{error, info};
use zeroize::Zeroizing;

/// Bytes of a key file: one line, and room for comments.
const MAX_KEY_FILE: u64 = 4096;

/// Reads the node's key; refuses one that others could have read.
pub(crate) fn key(path: &Path, node: &NodeName) -> Result<NodeKey, Failure> {
    let fail = |what: String, hint: String| {
        Failure::new("identity_key", Blame::Operator, format!("key {}: {what}", path.display()), hint)
    };
    let unreadable = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => format!("make a pair: dwcpctl keygen --node {node} --out DIR"),
            _ => "the agent's user must be able to read it".to_owned(),
        };
        fail(error.to_string(), hint)
    };
    let file = File::open(path).map_err(unreadable)?;
    let meta = file.metadata().map_err(unreadable)?;
    if !meta.is_file() {
        return Err(fail("not a regular file".to_owned(), String::new()));
    }
    if meta.mode() & 0o077 != 0 {
        let what = format!("others may read it (mode {:04o})", meta.mode() & 0o7777);
        let hint = format!("chmod 600 {}; if others may have read it, make a new pair", path.display());
        return Err(fail(what, hint));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_KEY_FILE).read_to_string(&mut text).map_err(unreadable)?;
    let key = NodeKey::parse(&text).map_err(|error| fail(error.to_string(), String::new()))?;
    if key.node() != node {
        let what = format!("it is the key of {}, and this node is {node}", key.node());
        return Err(fail(what, "the configuration's `node` and the key must agree".to_owned()));
    }
    Ok(key)
}

/// Reads the folder of trusted keys.
pub(crate) fn peers(dir: &Path) -> Result<Peers, Failure> {
    let fail = |error: dwcp_link::RosterError| {
        Failure::new(
            "identity_peers",
            Blame::Operator,
            error.to_string(),
            "each file is a NODE.pub of dwcpctl keygen",
        )
    };
    let peers = Peers::load(dir).map_err(fail)?;
    info!(trusted = peers.roster().len(), folder = %dir.display(), "peers read");
    Ok(peers)
}

/// Reads the folder again. On an error the old keys stay in force, which is safe, and the log says so.
pub(crate) fn reload(peers: &Peers) {
    match peers.reload() {
        Ok(change) => {
            let name = |key: &dwcp_proto::PeerKey| format!("{} {}", key.node(), key.fingerprint());
            let added: Vec<_> = change.added.iter().map(name).collect();
            let removed: Vec<_> = change.removed.iter().map(name).collect();
            info!(?added, ?removed, "peers read again");
        }
        Err(error) => error!(%error, "peers could not be read again; the old ones stay trusted"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn write(dir: &Path, mode: u32) -> std::path::PathBuf {
        let path = dir.join("hv-01.key");
        fs::write(&path, &*NodeKey::from_seed("hv-01".parse().unwrap(), &[7; 32]).to_text()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        for mode in [0o640, 0o604, 0o644, 0o620] {
            let failure = key(&write(dir.path(), mode), &"hv-01".parse().unwrap()).unwrap_err();
            assert!(failure.message.contains("others may read it"), "{failure}");
            assert!(failure.hint.contains("chmod 600"), "{failure}");
        }
        key(&write(dir.path(), 0o600), &"hv-01".parse().unwrap()).unwrap();
        key(&write(dir.path(), 0o400), &"hv-01".parse().unwrap()).unwrap();
    }

    #[test]
    fn the_key_must_be_there_and_be_this_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let failure = key(&dir.path().join("none.key"), &"hv-01".parse().unwrap()).unwrap_err();
        assert!(failure.hint.contains("dwcpctl keygen --node hv-01"), "{failure}");
        let failure = key(&write(dir.path(), 0o600), &"hv-02".parse().unwrap()).unwrap_err();
        assert!(failure.message.contains("the key of hv-01, and this node is hv-02"), "{failure}");
        fs::write(dir.path().join("hv-01.key"), "not a key").unwrap();
        assert!(key(&dir.path().join("hv-01.key"), &"hv-01".parse().unwrap()).is_err());
    }
}
