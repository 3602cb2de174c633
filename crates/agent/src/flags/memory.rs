//! The last document of a flag server, on disk: after a restart it may restrict, and never enables.
//!
//! `STATE_DIR/flag.json` holds `{"cluster":"NAME","flag":{...}}`. It binds the node to the cluster and gives the epoch
//! below which nothing is obeyed, so it must not be lost to a crash: written beside, synced, renamed, folder synced.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dwcp_flags::poll::{MAX_ANSWER, Served};
use dwcp_flags::{FEATURE, FlagDocument};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

const NAME: &str = "flag.json";

/// What is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remembered {
    /// Whose document it is.
    pub(super) cluster: String,
    /// The document.
    pub(super) document: FlagDocument,
}

#[derive(Serialize)]
struct Written<'a> {
    cluster: &'a str,
    flag: &'a RawValue,
}

#[derive(Deserialize)]
struct Cluster {
    cluster: String,
}

/// Where it is kept.
#[derive(Debug, Clone)]
pub(super) struct Memory(PathBuf);

impl Memory {
    /// In this state folder.
    pub(super) fn new(state_dir: &Path) -> Self {
        Memory(state_dir.join(NAME))
    }

    /// The file, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What was kept; `None` if nothing was.
    pub(super) fn recall(&self) -> io::Result<Option<Remembered>> {
        let file = match File::open(&self.0) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut bytes = Vec::new();
        // One more than allowed: the reader sees that it is too long.
        file.take(MAX_ANSWER as u64 + 1).read_to_end(&mut bytes)?;
        let document = Served::parse(&bytes, FEATURE).map_err(io::Error::other)?.document;
        let Cluster { cluster } = serde_json::from_slice(&bytes)?;
        Ok(Some(Remembered { cluster, document }))
    }

    /// Keeps this from now on.
    pub(super) fn keep(&self, remembered: &Remembered) -> io::Result<()> {
        let flag = RawValue::from_string(remembered.document.to_json())?;
        let bytes = serde_json::to_vec(&Written { cluster: &remembered.cluster, flag: &flag })?;
        let fresh = self.0.with_extension("json.new");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.0)?;
        File::open(self.0.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_recalled_and_what_is_damaged_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let memory = Memory::new(dir.path());
        assert_eq!(memory.recall().unwrap(), None);
        let text = r#"{"feature":"dwcp_v3_hde","enabled":true,"percentage":7,"epoch":{"incarnation":1,"counter":2}}"#;
        let document = FlagDocument::parse(text.as_bytes(), FEATURE).unwrap();
        for cluster in ["c1", ""] {
            let remembered = Remembered { cluster: cluster.into(), document: document.clone() };
            memory.keep(&remembered).unwrap();
            assert_eq!(memory.recall().unwrap(), Some(remembered));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        for damage in ["", "{}", "{\"cluster\":7,\"flag\":{}}", &"x".repeat(MAX_ANSWER + 1)] {
            fs::write(memory.path(), damage).unwrap();
            assert!(memory.recall().is_err());
        }
    }
}
