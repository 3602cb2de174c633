//! The embedded store: SQLite with a write-ahead log, synced at each commit.

use std::path::{Path, PathBuf};

use blake3::{Hash, Hasher};
use dwcp_flags::{FlagDocument, MAX_DOCUMENT};
use dwcp_proto::{NodeName, PeerKey};
use rusqlite::{Connection, OptionalExtension, Transaction, params};

use crate::state::{Flag, Node, State, Write};
use crate::store::{Entry, Record, Seen, Store, StoreError};
use crate::time::rfc3339;

/// The database's file in the state folder.
pub(crate) const DATABASE: &str = "control.db";

/// Which layout the file has. Raised with each change that an older build could not read.
const LAYOUT: i64 = 1;

/// Numbers that may be as large as 64 bits are stored bit for bit as SQLite's signed ones.
const TABLES: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
    CREATE TABLE flags (feature TEXT PRIMARY KEY, document TEXT NOT NULL, holds TEXT NOT NULL) STRICT;
    CREATE TABLE nodes (
        name TEXT PRIMARY KEY, public_key BLOB NOT NULL, labels TEXT NOT NULL, drained INTEGER NOT NULL,
        boot INTEGER, sequence INTEGER, seen_ms INTEGER
    ) STRICT;
    CREATE TABLE audit (
        number INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, who TEXT NOT NULL, origin TEXT NOT NULL,
        action TEXT NOT NULL, detail TEXT NOT NULL, hash BLOB NOT NULL
    ) STRICT;
    CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit only grows'); END;
    CREATE TRIGGER audit_is_not_cut BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit only grows'); END;
";

/// A database file.
#[derive(Debug)]
pub(crate) struct Sqlite {
    path: PathBuf,
    connection: Connection,
}

impl Sqlite {
    /// Opens the file, which must be there.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let store = Self::connect(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        match store.layout()? {
            LAYOUT => Ok(store),
            layout => Err(store.damaged(format!("layout {layout}, and this build knows {LAYOUT}"))),
        }
    }

    /// Makes the file with this state in it, in one step.
    pub(crate) fn create(path: &Path, state: &State) -> Result<Self, StoreError> {
        use rusqlite::OpenFlags;
        let mut store =
            Self::connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE)?;
        if store.layout()? != 0 {
            return Err(store.damaged("is there already".to_owned()));
        }
        store.transaction(|transaction| {
            transaction.execute_batch(TABLES)?;
            transaction.pragma_update(None, "user_version", LAYOUT)?;
            transaction.execute("INSERT INTO meta VALUES ('cluster', ?1)", [&state.cluster])?;
            state.flags.values().try_for_each(|flag| put_flag(transaction, flag))
        })?;
        Ok(store)
    }

    /// Writes a copy, whole and as of now, to a file that must not exist.
    pub(crate) fn copy_to(&self, to: &Path) -> Result<(), StoreError> {
        let to = to.to_string_lossy();
        self.connection.execute("VACUUM INTO ?1", [to.as_ref()]).map(drop).map_err(|error| self.failed(error))
    }

    /// Checks the file page by page.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        let verdict: String = self
            .connection
            .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
            .map_err(|error| self.failed(error))?;
        if verdict == "ok" { Ok(()) } else { Err(self.damaged(verdict)) }
    }

    /// Moves everything into the one file, so that it can be moved.
    pub(crate) fn close(self) -> Result<(), StoreError> {
        let path = self.path.clone();
        let fold = self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        let fold = fold.map_err(|error| self.failed(error));
        self.connection.close().map_err(|(_, source)| StoreError::Sqlite { path, source })?;
        fold
    }

    fn connect(path: &Path, flags: rusqlite::OpenFlags) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Sqlite { path: path.to_owned(), source };
        let flags = flags | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        // A backup may be reading.
        connection.busy_timeout(std::time::Duration::from_secs(5)).map_err(failed)?;
        for (pragma, value) in [("journal_mode", "WAL"), ("synchronous", "FULL"), ("trusted_schema", "OFF")] {
            connection.pragma_update(None, pragma, value).map_err(failed)?;
        }
        Ok(Sqlite { path: path.to_owned(), connection })
    }

    fn layout(&self) -> Result<i64, StoreError> {
        let layout = self.connection.pragma_query_value(None, "user_version", |row| row.get(0));
        layout.map_err(|error| self.failed(error))
    }

    fn transaction<T>(
        &mut self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let done = self.connection.transaction().and_then(|transaction| {
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        });
        done.map_err(|error| self.failed(error))
    }

    fn rows<T>(
        &self,
        sql: &str,
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, StoreError> {
        let rows = self.connection.prepare(sql).and_then(|mut query| query.query_map([], read)?.collect());
        rows.map_err(|error| self.failed(error))
    }

    fn flag(&self, (feature, document, holds): (String, String, String)) -> Result<Flag, StoreError> {
        let wrong = |what: String| self.damaged(format!("flag {feature}: {what}"));
        let document =
            FlagDocument::parse(document.as_bytes(), &feature).map_err(|error| wrong(error.to_string()))?;
        if document.epoch.is_none() {
            return Err(wrong("no epoch".to_owned()));
        }
        let holds = serde_json::from_str(&holds).map_err(|error| wrong(error.to_string()))?;
        Ok(Flag { document, holds })
    }

    fn node(
        &self,
        (name, key, labels, drained): (String, Vec<u8>, String, bool),
    ) -> Result<Node, StoreError> {
        let wrong = |what: String| self.damaged(format!("node {name}: {what}"));
        let node = NodeName::new(&*name).map_err(|error| wrong(error.to_string()))?;
        let key: &[u8; 32] = key.as_slice().try_into().map_err(|_| wrong("no key".to_owned()))?;
        let key = PeerKey::from_bytes(node, key).map_err(|error| wrong(error.to_string()))?;
        let labels = serde_json::from_str(&labels).map_err(|error| wrong(error.to_string()))?;
        Ok(Node { key, labels, drained })
    }

    fn failed(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Sqlite { path: self.path.clone(), source }
    }

    fn damaged(&self, what: String) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), what }
    }
}

impl Store for Sqlite {
    fn load(&mut self) -> Result<(State, Vec<Seen>), StoreError> {
        let cluster = self
            .connection
            .query_row("SELECT value FROM meta WHERE key = 'cluster'", [], |row| row.get(0))
            .map_err(|error| self.failed(error))?;
        let mut state = State { flags: Default::default(), nodes: Default::default(), ..State::new(cluster) };
        let flags = self.rows("SELECT feature, document, holds FROM flags", |row| row.try_into())?;
        for row in flags {
            let flag = self.flag(row)?;
            state.flags.insert(flag.document.feature.clone(), flag);
        }
        let nodes = self.rows("SELECT name, public_key, labels, drained FROM nodes", |row| row.try_into())?;
        for row in nodes {
            let node = self.node(row)?;
            state.nodes.insert(node.name().to_owned(), node);
        }
        let seen =
            self.rows("SELECT name, boot, sequence, seen_ms FROM nodes WHERE seen_ms IS NOT NULL", |row| {
                Ok(Seen {
                    node: row.get(0)?,
                    boot: row.get::<_, i64>(1)?.cast_unsigned(),
                    sequence: row.get::<_, i64>(2)?.cast_unsigned(),
                    at_ms: row.get::<_, i64>(3)?.cast_unsigned(),
                })
            })?;
        Ok((state, seen))
    }

    fn commit(&mut self, writes: &[Write], entry: &Entry) -> Result<(), StoreError> {
        self.transaction(|transaction| {
            for write in writes {
                match write {
                    Write::Flag(flag) => put_flag(transaction, flag)?,
                    Write::Node(node) => put_node(transaction, node)?,
                    Write::Gone(name) => {
                        transaction.prepare("DELETE FROM nodes WHERE name = ?1")?.execute([name])?;
                    }
                }
            }
            put_entry(transaction, entry)
        })
    }

    fn note_seen(&mut self, seen: &[Seen]) -> Result<(), StoreError> {
        self.transaction(|transaction| {
            let mut update = transaction
                .prepare("UPDATE nodes SET boot = ?2, sequence = ?3, seen_ms = ?4 WHERE name = ?1")?;
            for Seen { node, boot, sequence, at_ms } in seen {
                let [boot, sequence, at_ms] = [boot, sequence, at_ms].map(|number| number.cast_signed());
                update.execute(params![node, boot, sequence, at_ms])?;
            }
            Ok(())
        })
    }

    fn audit(&mut self, after: u64, limit: usize) -> Result<Vec<Record>, StoreError> {
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let read = |row: &rusqlite::Row<'_>| {
            let detail: String = row.get(5)?;
            let hash: Vec<u8> = row.get(6)?;
            Ok(Record {
                number: row.get::<_, i64>(0)?.cast_unsigned(),
                at: rfc3339(row.get::<_, i64>(1)?.cast_unsigned()),
                who: row.get(2)?,
                origin: row.get(3)?,
                action: row.get(4)?,
                detail: serde_json::from_str(&detail).unwrap_or(serde_json::Value::String(detail)),
                hash: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
            })
        };
        let records = self
            .connection
            .prepare(
                "SELECT number, at_ms, who, origin, action, detail, hash FROM audit WHERE number > ?1 ORDER BY number LIMIT ?2",
            )
            .and_then(|mut query| query.query_map([after, limit], read)?.collect());
        records.map_err(|error| self.failed(error))
    }
}

impl Sqlite {
    /// Goes through the whole audit and says how many entries it has.
    pub(crate) fn verify_audit(&self) -> Result<u64, StoreError> {
        let mut before = Hash::from_bytes([0; 32]);
        let mut count = 0;
        let rows = self.rows(
            "SELECT number, at_ms, who, origin, action, detail, hash FROM audit ORDER BY number",
            |row| {
                let entry = Entry {
                    at_ms: row.get::<_, i64>(1)?.cast_unsigned(),
                    who: row.get(2)?,
                    origin: row.get(3)?,
                    action: row.get(4)?,
                    detail: row.get(5)?,
                };
                Ok((row.get::<_, i64>(0)?, entry, row.get::<_, Vec<u8>>(6)?))
            },
        )?;
        for (number, entry, hash) in rows {
            count += 1;
            before = link(&before, &entry);
            if number != count || hash != before.as_bytes() {
                return Err(self.damaged(format!("the audit was changed at entry {count}")));
            }
        }
        Ok(count.cast_unsigned())
    }
}

fn put_flag(transaction: &Transaction<'_>, flag: &Flag) -> rusqlite::Result<()> {
    let document = flag.document.to_json();
    debug_assert!(document.len() <= MAX_DOCUMENT);
    let holds = serde_json::to_string(&flag.holds).unwrap_or_default();
    transaction
        .prepare("INSERT OR REPLACE INTO flags (feature, document, holds) VALUES (?1, ?2, ?3)")?
        .execute(params![flag.document.feature, document, holds])
        .map(drop)
}

fn put_node(transaction: &Transaction<'_>, node: &Node) -> rusqlite::Result<()> {
    let labels = serde_json::to_string(&node.labels).unwrap_or_default();
    // Another key is another agent: what the old one said last does not bind it.
    transaction
        .prepare(
            "INSERT INTO nodes (name, public_key, labels, drained) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (name) DO UPDATE SET labels = ?3, drained = ?4,
                boot = CASE WHEN public_key = ?2 THEN boot END, sequence = CASE WHEN public_key = ?2 THEN sequence END,
                seen_ms = CASE WHEN public_key = ?2 THEN seen_ms END, public_key = ?2",
        )?
        .execute(params![node.name(), node.key.as_bytes(), labels, node.drained])
        .map(drop)
}

fn put_entry(transaction: &Transaction<'_>, entry: &Entry) -> rusqlite::Result<()> {
    let last: Option<(i64, Vec<u8>)> = transaction
        .prepare("SELECT number, hash FROM audit ORDER BY number DESC LIMIT 1")?
        .query_row([], |row| row.try_into())
        .optional()?;
    let (number, before) = last.unwrap_or((0, vec![0; 32]));
    // A hash of another length was not written by us; what it chains to will show that.
    let before = Hash::from_slice(&before).unwrap_or(Hash::from_bytes([0; 32]));
    let hash = link(&before, entry);
    transaction
        .prepare("INSERT INTO audit VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
        .execute(params![
            number + 1,
            entry.at_ms.cast_signed(),
            entry.who,
            entry.origin,
            entry.action,
            entry.detail,
            hash.as_bytes()
        ])
        .map(drop)
}

/// The hash of an entry, over the one before it.
fn link(before: &Hash, entry: &Entry) -> Hash {
    let mut hasher = Hasher::new_derive_key("dwcp 2026-11 control audit");
    hasher.update(before.as_bytes()).update(&entry.at_ms.to_be_bytes());
    for text in [&entry.who, &entry.origin, &entry.action, &entry.detail] {
        hasher.update(&(text.len() as u64).to_be_bytes()).update(text.as_bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use dwcp_flags::FEATURE;
    use dwcp_proto::NodeKey;

    use super::*;
    use crate::state::{Hold, HoldKind};

    fn entry(action: &str) -> Entry {
        let text = str::to_owned;
        Entry { at_ms: 7, who: text("me"), origin: text("here"), action: text(action), detail: text("{}") }
    }

    fn node(name: &str, seed: u8) -> Node {
        let key = NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32]).public();
        Node { key, labels: [("datacenter".to_owned(), "dc1".to_owned())].into(), drained: true }
    }

    #[test]
    fn what_is_kept_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DATABASE);
        let mut state = State::new("c1".into());
        let mut store = Sqlite::create(&path, &state).unwrap();
        let mut flag = state.flags[FEATURE].clone();
        flag.document.enabled = true;
        flag.document.excluded.insert("x".into());
        let hold = Hold { by: "me".into(), reason: "why \"not\"".into(), since_ms: u64::MAX };
        flag.holds.insert(HoldKind::Latch, hold);
        let writes = [
            Write::Flag(flag),
            Write::Node(node("a", 1)),
            Write::Node(node("b", 2)),
            Write::Gone("b".into()),
        ];
        store.commit(&writes, &entry("all")).unwrap();
        let seen = Seen { node: "a".into(), boot: u64::MAX, sequence: 3, at_ms: 9 };
        store.note_seen(std::slice::from_ref(&seen)).unwrap();
        drop(store);
        state.take(writes.to_vec());

        let mut store = Sqlite::open(&path).unwrap();
        let (loaded, heard) = store.load().unwrap();
        assert_eq!((loaded.cluster, loaded.flags, loaded.nodes), (state.cluster, state.flags, state.nodes));
        assert_eq!(heard, [seen]);
        // The same key keeps what was heard, another one does not.
        store.commit(&[Write::Node(Node { drained: false, ..node("a", 1) })], &entry("undrain")).unwrap();
        assert_eq!(store.load().unwrap().1.len(), 1);
        store.commit(&[Write::Node(node("a", 3))], &entry("rekey")).unwrap();
        assert_eq!(store.load().unwrap().1.len(), 0);
    }

    #[test]
    fn the_audit_only_grows_and_shows_what_was_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DATABASE);
        let mut store = Sqlite::create(&path, &State::new("c1".into())).unwrap();
        for action in ["one", "two", "three"] {
            store.commit(&[], &entry(action)).unwrap();
        }
        let page = store.audit(1, 1).unwrap();
        assert_eq!((page.len(), page[0].number, page[0].action.as_str()), (1, 2, "two"));
        assert_eq!(store.verify_audit().unwrap(), 3);
        for sql in ["DELETE FROM audit", "UPDATE audit SET who = 'you'"] {
            assert!(store.connection.execute(sql, []).is_err(), "{sql}");
        }
        // Whoever owns the file can do so nevertheless.
        store.connection.execute_batch("DROP TRIGGER audit_is_not_changed").unwrap();
        store.connection.execute("UPDATE audit SET who = 'you' WHERE number = 2", []).unwrap();
        assert!(store.verify_audit().unwrap_err().to_string().contains("entry 2"));
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(DATABASE);
        assert!(Sqlite::open(&path).is_err());
        std::fs::write(&path, "no database").unwrap();
        assert!(Sqlite::open(&path).is_err());
    }
}
