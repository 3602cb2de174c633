//! The state folder: claimed by one server at a time; how it begins, and how a backup comes back.
//!
//! | name | what |
//! |---|---|
//! | `control.db`, `-wal`, `-shm` | the database |
//! | `lock` | held by the server that uses the folder |
//! | `listen.json` | where it listens |
//! | `replaced-MOMENT/` | the database that a restore took away |

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use dwcp_flags::Epoch;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::state::{State, Write};
use crate::store::{DATABASE, Entry, Sqlite, Store};
use crate::time;

const REPLACED: &str = "replaced-";
const LISTEN: &str = "listen.json";

/// A folder that is ours until the process ends.
#[derive(Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// Makes the folder if need be, and claims it.
    pub(crate) fn claim(path: &Path) -> Result<Self> {
        let unusable = || format!("state folder {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(unusable)?;
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(path.join("lock")).with_context(unusable)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Folder { path: path.to_owned(), _lock: lock }),
            Err(Errno::WOULDBLOCK) => bail!("state folder {}: another dwcp-control uses it", path.display()),
            Err(error) => Err(error).with_context(unusable),
        }
    }

    /// The database, which is made if there is none.
    pub(crate) fn store(&self) -> Result<Sqlite> {
        let database = self.path.join(DATABASE);
        if database.exists() {
            return Ok(Sqlite::open(&database)?);
        }
        if let Some(replaced) = self.replaced()? {
            bail!(
                "{} is missing: a restore was interrupted; run it again ({} has what was there before)",
                database.display(),
                replaced.display()
            );
        }
        let state = State::new(new_cluster()?);
        // Beside its place first: a database that is half made is not found there.
        let new = self.path.join("new.db");
        remove_database(&new)?;
        Sqlite::create(&new, &state)?.close()?;
        sync(&new)?;
        fs::rename(&new, &database)?;
        sync(&self.path)?;
        Ok(Sqlite::open(&database)?)
    }

    /// Writes down where the server listens.
    pub(crate) fn publish(&self, address: std::net::SocketAddr) -> Result<()> {
        let (path, new) = (self.path.join(LISTEN), self.path.join("listen.json.new"));
        let mut file = File::create(&new).with_context(|| format!("write {}", new.display()))?;
        writeln!(file, "{}", serde_json::json!({"http": address}))?;
        Ok(fs::rename(new, path)?)
    }

    /// Takes that back.
    pub(crate) fn retract(&self) {
        let _ = fs::remove_file(self.path.join(LISTEN));
    }

    fn replaced(&self) -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(REPLACED) {
                return Ok(Some(entry.path()));
            }
        }
        Ok(None)
    }
}

/// The database of a folder that a server may be using.
pub(crate) fn existing(folder: &Path) -> Result<Sqlite> {
    Ok(Sqlite::open(&folder.join(DATABASE))?)
}

/// Puts a backup in place. All flags are off then, and their epochs higher than all before: nodes obey it at once, and v3
/// comes back only when someone says so.
pub(crate) fn restore(folder: &Path, from: &Path) -> Result<()> {
    let folder = Folder::claim(folder).context("stop the server first")?;
    let database = folder.path.join(DATABASE);
    let new = folder.path.join("restore.db");
    remove_database(&new)?;
    fs::copy(from, &new).with_context(|| format!("read {}", from.display()))?;
    let mut store = Sqlite::open(&new).with_context(|| format!("{} is no backup", from.display()))?;
    store.check()?;
    store.verify_audit()?;
    let (state, _) = store.load()?;

    let now_ms = time::now_ms();
    let before = highest(&database);
    let writes: Vec<Write> = state
        .flags
        .values()
        .cloned()
        .map(|mut flag| {
            let last = flag.epoch().incarnation.max(before);
            // The same backup may come back twice, and onto another machine: the time tells one life from the other.
            let incarnation = last.saturating_add(1).max(now_ms / 1000);
            flag.document.enabled = false;
            flag.document.epoch = Some(Epoch { incarnation, counter: 1 });
            Write::Flag(flag)
        })
        .collect();
    let entry = Entry {
        at_ms: now_ms,
        who: "operator".to_owned(),
        origin: "dwcp-control restore".to_owned(),
        action: "restore".to_owned(),
        detail: serde_json::json!({"from": from, "cluster": state.cluster}).to_string(),
    };
    store.commit(&writes, &entry)?;
    store.close()?;
    sync(&new)?;

    if database.exists() {
        let aside = folder.path.join(format!("{REPLACED}{now_ms}"));
        DirBuilder::new().mode(0o700).create(&aside)?;
        for part in parts(&database).into_iter().filter(|part| part.exists()) {
            let name = part.file_name().context("a file without a name")?;
            fs::rename(&part, aside.join(name))?;
        }
        sync(&folder.path)?;
        println!("what was there before is in {}", aside.display());
    }
    fs::rename(&new, &database)?;
    sync(&folder.path)?;
    for write in &writes {
        if let Write::Flag(flag) = write {
            println!("{} is off, at epoch {}", flag.document.feature, flag.epoch());
        }
    }
    Ok(())
}

/// Writes a file or folder through to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    let sync = File::open(path).and_then(|file| file.sync_all());
    sync.with_context(|| format!("sync {}", path.display()))
}

/// The highest incarnation in a database, as far as it can still be read.
fn highest(database: &Path) -> u64 {
    let state = Sqlite::open(database).and_then(|mut store| store.load());
    match state {
        Ok((state, _)) => state.flags.values().map(|flag| flag.epoch().incarnation).max().unwrap_or(0),
        Err(_) => 0,
    }
}

fn remove_database(database: &Path) -> Result<()> {
    for part in parts(database).into_iter().filter(|part| part.exists()) {
        fs::remove_file(&part).with_context(|| format!("remove {}", part.display()))?;
    }
    Ok(())
}

/// The files of a database.
fn parts(database: &Path) -> [PathBuf; 3] {
    ["", "-wal", "-shm"].map(|part| PathBuf::from(format!("{}{part}", database.display())))
}

/// 64 random bits in hexadecimal: two clusters that one node could reach do not share them.
fn new_cluster() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use dwcp_flags::{FEATURE, Percentage};

    use super::*;

    fn raise(store: &mut Sqlite) -> Epoch {
        let mut flag = store.load().unwrap().0.flags[FEATURE].clone();
        flag.document.enabled = true;
        flag.document.percentage = Percentage::new(50).unwrap();
        flag.document.epoch = flag.document.epoch.map(|epoch| Epoch { counter: epoch.counter + 1, ..epoch });
        let text = str::to_owned;
        let entry =
            Entry { at_ms: 1, who: text("me"), origin: text("x"), action: text("set"), detail: text("{}") };
        store.commit(&[Write::Flag(flag.clone())], &entry).unwrap();
        flag.epoch()
    }

    #[test]
    fn a_restored_server_is_off_in_a_new_incarnation_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let (state, backup) = (dir.path().join("state"), dir.path().join("backup.db"));
        let folder = Folder::claim(&state).unwrap();
        let mut store = folder.store().unwrap();
        let cluster = store.load().unwrap().0.cluster;
        let backed_up = raise(&mut store);
        store.copy_to(&backup).unwrap();
        assert!(store.copy_to(&backup).is_err(), "a backup is not overwritten");
        let mut last = raise(&mut store);
        assert!(last > backed_up);
        assert!(restore(&state, &backup).unwrap_err().to_string().contains("stop the server"));
        drop((store, folder));

        for _ in 0..2 {
            restore(&state, &backup).unwrap();
            let folder = Folder::claim(&state).unwrap();
            let mut store = folder.store().unwrap();
            let (loaded, _) = store.load().unwrap();
            let flag = &loaded.flags[FEATURE];
            assert_eq!((flag.document.enabled, flag.document.percentage.value()), (false, 50));
            assert!(flag.epoch().incarnation > last.incarnation, "{} after {last}", flag.epoch());
            assert_eq!(loaded.cluster, cluster);
            assert_eq!(store.verify_audit().unwrap(), 2);
            last = raise(&mut store);
        }
    }

    #[test]
    fn a_folder_is_one_servers_and_an_interrupted_restore_is_no_new_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::claim(dir.path()).unwrap();
        assert!(Folder::claim(dir.path()).unwrap_err().to_string().contains("another"));
        folder.store().unwrap();
        fs::create_dir(dir.path().join("replaced-1")).unwrap();
        folder.store().unwrap();
        remove_database(&dir.path().join(DATABASE)).unwrap();
        assert!(folder.store().unwrap_err().to_string().contains("interrupted"));
    }

    #[test]
    fn what_is_no_backup_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (state, junk) = (dir.path().join("state"), dir.path().join("junk"));
        Folder::claim(&state).unwrap().store().unwrap();
        fs::write(&junk, "junk").unwrap();
        assert!(restore(&state, &junk).is_err());
        assert!(restore(&state, &dir.path().join("none")).is_err());
        assert!(Folder::claim(&state).unwrap().store().is_ok());
    }
}
