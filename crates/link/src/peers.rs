//! Whom this node trusts: a folder of public keys, which can be read again while the agent runs.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use dwcp_proto::{KeyError, NodeName, PeerKey};

/// Keys in one folder: more than any fleet, and some 5 MB of memory.
const MAX_KEYS: usize = 16_384;

/// Bytes of one key file: the line takes at most 160, the rest is room for comments.
const MAX_KEY_FILE: u64 = 4096;

/// The suffixes by which a node may have a second and a third key while it changes from one to the next.
const ROTATION: [&str; 2] = [".next", ".old"];

/// The keys of all nodes that this one trusts, and the folder they come from.
///
/// The folder holds `NODE.pub` for each node, and while a node changes its key also `NODE.next.pub` or `NODE.old.pub`:
/// every one of a node's keys is accepted. The name inside must be `NODE`. Everything else in the folder is an error,
/// because a key under a wrong file name would otherwise be missing without a word; only names that start with a dot are
/// passed over. Symlinks are refused, and files that others may write.
///
/// To change the key of `hv-02` without a pause: put the new one on all peers as `hv-02.next.pub` and have them reload;
/// restart `hv-02` with its new key; rename `hv-02.next.pub` to `hv-02.pub` on the peers and have them reload. From then
/// on the old key is refused. Connections that stand are not cut by a reload.
#[derive(Debug)]
pub struct Peers {
    dir: Option<PathBuf>,
    roster: RwLock<Arc<Roster>>,
}

impl Peers {
    /// Reads the folder.
    pub fn load(dir: impl Into<PathBuf>) -> Result<Self, RosterError> {
        let dir = dir.into();
        let roster = RwLock::new(Arc::new(Roster::read(&dir)?));
        Ok(Peers { dir: Some(dir), roster })
    }

    /// A roster without a folder, for tests and embedding.
    pub fn of(keys: impl IntoIterator<Item = PeerKey>) -> Self {
        let mut roster = Roster::default();
        keys.into_iter().for_each(|key| roster.add(key));
        Peers { dir: None, roster: RwLock::new(Arc::new(roster)) }
    }

    /// Reads the folder again; handshakes from now on see the result. On an error the old keys stay in force.
    pub fn reload(&self) -> Result<RosterChange, RosterError> {
        let new = match &self.dir {
            Some(dir) => Arc::new(Roster::read(dir)?),
            None => return Ok(RosterChange::default()),
        };
        let mut current = self.roster.write().unwrap_or_else(PoisonError::into_inner);
        let change = RosterChange { added: new.minus(&current), removed: current.minus(&new) };
        *current = new;
        Ok(change)
    }

    /// The keys as they are now.
    pub fn roster(&self) -> Arc<Roster> {
        self.roster.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a reload changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RosterChange {
    /// Keys that are accepted from now on.
    pub added: Vec<PeerKey>,
    /// Keys that are no longer accepted. Connections made with them stand until they are closed.
    pub removed: Vec<PeerKey>,
}

/// The trusted keys at one moment.
#[derive(Debug, Default)]
pub struct Roster {
    keys: HashMap<[u8; 32], PeerKey>,
    nodes: BTreeMap<NodeName, usize>,
}

impl Roster {
    /// The key's entry, which says whose it is.
    pub fn find(&self, key: &[u8; 32]) -> Option<&PeerKey> {
        self.keys.get(key)
    }

    /// Whether this very key is that node's, still.
    pub fn trusts(&self, key: &PeerKey) -> bool {
        self.find(key.as_bytes()).is_some_and(|known| known == key)
    }

    /// Whether the node has any key.
    pub fn knows(&self, node: &NodeName) -> bool {
        self.nodes.contains_key(node)
    }

    /// The node's keys: one, or several while it changes from one to the next.
    pub fn keys<'a>(&'a self, node: &'a NodeName) -> impl Iterator<Item = &'a PeerKey> {
        self.keys.values().filter(move |key| key.node() == node)
    }

    /// The nodes, in order.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeName> {
        self.nodes.keys()
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn read(dir: &Path) -> Result<Self, RosterError> {
        let fail = |source| RosterError::Io { path: dir.into(), source };
        let mut roster = Roster::default();
        let mut files: HashMap<[u8; 32], PathBuf> = HashMap::new();
        for entry in fs::read_dir(dir).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".")) {
                continue;
            }
            let key = read_key(&path)?;
            if roster.len() >= MAX_KEYS {
                return Err(RosterError::TooMany { path: dir.into() });
            }
            match files.insert(*key.as_bytes(), path.clone()) {
                // One key for two nodes would let either pass for the other.
                Some(other) => return Err(RosterError::Twice { path, other }),
                None => roster.add(key),
            }
        }
        Ok(roster)
    }

    fn add(&mut self, key: PeerKey) {
        *self.nodes.entry(key.node().clone()).or_default() += 1;
        self.keys.insert(*key.as_bytes(), key);
    }

    fn minus(&self, other: &Roster) -> Vec<PeerKey> {
        let mut rest: Vec<PeerKey> = self.keys.values().filter(|key| !other.trusts(key)).cloned().collect();
        rest.sort_by(|a, b| (a.node(), a.as_bytes()).cmp(&(b.node(), b.as_bytes())));
        rest
    }
}

/// Why the folder was not taken over. Each names the file, and the line where there is one.
#[derive(Debug, thiserror::Error)]
pub enum RosterError {
    /// The folder or a file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something that is not a key file.
    #[error("{}: {what}; only regular files NODE.pub, NODE.next.pub and NODE.old.pub belong here", path.display())]
    Odd {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// A key file with something else in it.
    #[error("{}:{line}: {source}", path.display())]
    Key {
        /// Which file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        source: KeyError,
    },
    /// The name inside is not the file's.
    #[error("{}:{line}: this is the key of {node}: name the file {node}.pub, or put the right key into it", path.display())]
    Name {
        /// Which file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The name inside.
        node: NodeName,
    },
    /// The same key in two files.
    #[error("{}: same key as in {}: remove one", path.display(), other.display())]
    Twice {
        /// One file.
        path: PathBuf,
        /// The other.
        other: PathBuf,
    },
    /// More keys than we are ready to hold.
    #[error("{}: more than {MAX_KEYS} keys", path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
}

fn read_key(path: &Path) -> Result<PeerKey, RosterError> {
    let odd = |what| RosterError::Odd { path: path.into(), what };
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| odd("name is not text"))?;
    let stem = match name.strip_suffix(".pub") {
        Some(stem) => stem,
        None if name.ends_with(".key") => return Err(odd("a secret key does not belong here")),
        None => return Err(odd("not a .pub file")),
    };
    let text = read_text(open(path)?, path)?;
    let line = line_of_key(&text);
    let key = PeerKey::parse(&text).map_err(|source| RosterError::Key { path: path.into(), line, source })?;
    let rest = stem.strip_prefix(key.node().as_str());
    if rest.is_some_and(|rest| rest.is_empty() || ROTATION.contains(&rest)) {
        Ok(key)
    } else {
        Err(RosterError::Name { path: path.into(), line, node: key.node().clone() })
    }
}

/// Opens a regular file that is no symlink; looks at what was opened, not at what the name meant a moment ago.
fn open(path: &Path) -> Result<File, RosterError> {
    let odd = |what| RosterError::Odd { path: path.into(), what };
    let fail = |source| RosterError::Io { path: path.into(), source };
    // Without NONBLOCK a FIFO would hang us.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(odd("a symlink")),
        Err(error) => return Err(fail(error)),
    };
    let meta = file.metadata().map_err(fail)?;
    if !meta.is_file() {
        return Err(odd("not a regular file"));
    }
    if meta.mode() & 0o002 != 0 {
        return Err(odd("writable by everyone"));
    }
    if meta.len() > MAX_KEY_FILE {
        return Err(odd("too large for a key file"));
    }
    Ok(file)
}

fn read_text(file: File, path: &Path) -> Result<String, RosterError> {
    let mut bytes = Vec::new();
    file.take(MAX_KEY_FILE)
        .read_to_end(&mut bytes)
        .map_err(|source| RosterError::Io { path: path.into(), source })?;
    String::from_utf8(bytes).map_err(|_| RosterError::Odd { path: path.into(), what: "not text" })
}

/// The line to point at, from 1: the key's, or the second line with content, which should not be there.
fn line_of_key(text: &str) -> usize {
    let content = |line: &str| !line.trim().is_empty() && !line.trim_start().starts_with('#');
    let mut lines = text.lines().zip(1..).filter(|(line, _)| content(line)).map(|(_, number)| number);
    let first = lines.next();
    lines.next().or(first).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use dwcp_proto::NodeKey;
    use tempfile::TempDir;

    use super::*;

    fn key(node: &str, seed: u8) -> PeerKey {
        NodeKey::from_seed(NodeName::new(node).unwrap(), &[seed; 32]).public()
    }

    fn folder(files: &[(&str, &PeerKey)]) -> TempDir {
        let dir = TempDir::new().unwrap();
        for (name, key) in files {
            fs::write(dir.path().join(name), key.to_text()).unwrap();
        }
        dir
    }

    fn refusal(dir: &TempDir) -> String {
        Peers::load(dir.path()).unwrap_err().to_string().replace(dir.path().to_str().unwrap(), "DIR")
    }

    #[test]
    fn every_key_of_a_node_is_accepted_during_rotation() {
        let keys = [key("hv-01.dc1", 1), key("hv-02", 2), key("hv-02", 3), key("hv-02", 4)];
        let names = ["hv-01.dc1.pub", "hv-02.pub", "hv-02.next.pub", "hv-02.old.pub"];
        let files: Vec<_> = names.into_iter().zip(&keys).collect();
        let dir = folder(&files);
        fs::write(dir.path().join(".hv-03.pub.swp"), "an editor's").unwrap();
        let roster = Peers::load(dir.path()).unwrap().roster();
        assert!(keys.iter().all(|key| roster.trusts(key)));
        assert_eq!(roster.keys(&NodeName::new("hv-02").unwrap()).count(), 3);
        assert_eq!(roster.nodes().map(NodeName::as_str).collect::<Vec<_>>(), ["hv-01.dc1", "hv-02"]);
    }

    #[test]
    fn a_reload_says_what_changed_and_an_error_changes_nothing() {
        let (old, new) = (key("hv-02", 2), key("hv-02", 3));
        let dir = folder(&[("hv-02.pub", &old)]);
        let peers = Peers::load(dir.path()).unwrap();
        fs::write(dir.path().join("hv-02.next.pub"), new.to_text()).unwrap();
        assert_eq!(peers.reload().unwrap(), RosterChange { added: vec![new.clone()], removed: vec![] });
        fs::rename(dir.path().join("hv-02.next.pub"), dir.path().join("hv-02.pub")).unwrap();
        assert_eq!(peers.reload().unwrap(), RosterChange { added: vec![], removed: vec![old.clone()] });
        fs::write(dir.path().join("hv-02.pub"), "damaged").unwrap();
        assert!(peers.reload().is_err());
        assert!(peers.roster().trusts(&new) && !peers.roster().trusts(&old));
    }

    #[test]
    fn a_bad_file_is_named_with_its_line() {
        let two = folder(&[]);
        fs::write(two.path().join("a.pub"), format!("# one\n{0}\n{0}", key("a", 1).to_text())).unwrap();
        assert!(refusal(&two).starts_with("DIR/a.pub:4: "), "{}", refusal(&two));
        let other = folder(&[("hv-01.pub", &key("hv-02", 1))]);
        assert!(
            refusal(&other).starts_with("DIR/hv-01.pub:1: this is the key of hv-02"),
            "{}",
            refusal(&other)
        );
        // A longer name is another node, not a rotation of the shorter one.
        let longer = folder(&[("hv-01.dc1.pub", &key("hv-01", 1))]);
        assert!(refusal(&longer).contains("key of hv-01:"), "{}", refusal(&longer));
        let twice = folder(&[("a.pub", &key("a", 1)), ("b.pub", &key("b", 1))]);
        assert!(refusal(&twice).contains("same key as in DIR/"), "{}", refusal(&twice));
    }

    #[test]
    fn what_is_no_key_file_is_refused_by_name() {
        for name in ["hv-01.pub.txt", "hv-01", "hv-01.key"] {
            assert!(refusal(&folder(&[(name, &key("hv-01", 1))])).contains(&format!("DIR/{name}: ")));
        }
        let link = folder(&[]);
        symlink("/etc/hostname", link.path().join("a.pub")).unwrap();
        assert!(refusal(&link).contains("a symlink"));
        let nested = folder(&[]);
        fs::create_dir(nested.path().join("a.pub")).unwrap();
        assert!(refusal(&nested).contains("not a regular file"));
        let large = folder(&[]);
        fs::write(large.path().join("a.pub"), "#".repeat(5000)).unwrap();
        assert!(refusal(&large).contains("too large"));
        let open = folder(&[("a.pub", &key("a", 1))]);
        fs::set_permissions(open.path().join("a.pub"), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(refusal(&open).contains("writable by everyone"));
    }
}
