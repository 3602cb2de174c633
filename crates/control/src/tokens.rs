//! The tokens of those who may write: a file with lines `NAME ROLES HASH EXPIRY`.
//!
//! `ROLES` are separated by commas, `HASH` is the BLAKE3 of the token in hexadecimal, `EXPIRY` is a date or moment in UTC or
//! `never`. Lines that start with `#` are comments. Several tokens, of one name too, may hold at once, so a token is
//! replaced without a gap. A token has 256 bits from the system's random source: nothing slower than one hash is needed
//! to keep it from being guessed.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use blake3::Hash;

use crate::state::{Actor, Role};
use crate::time;

/// What a token begins with, so that one that lies around is known for what it is.
const PREFIX: &str = "dwcp_";
/// Bytes of the token file: thousands of tokens.
const MAX_FILE: u64 = 1 << 20;
/// Characters of a token that is looked at.
const MAX_TOKEN: usize = 256;
/// Characters of a token's name.
const MAX_NAME: usize = 64;

/// The tokens of a file; cheap to clone, reloaded for all at once.
#[derive(Debug, Clone)]
pub(crate) struct Tokens {
    file: PathBuf,
    entries: Arc<RwLock<Vec<Entry>>>,
}

#[derive(Debug, Clone)]
struct Entry {
    actor: Actor,
    /// Compared in constant time.
    hash: Hash,
    /// Milliseconds since 1970; the first moment at which it does not hold.
    ends: Option<u64>,
}

/// Why a request may not write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    /// No `Authorization: Bearer`.
    #[error("this needs a token: Authorization: Bearer TOKEN")]
    Missing,
    /// Not one of ours.
    #[error("the token is not known")]
    Unknown,
    /// It was one of ours.
    #[error("the token has expired")]
    Expired,
}

/// Why a token file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadTokens {
    /// It cannot be read or written.
    #[error("{}: {source}", .file.display())]
    Io { file: PathBuf, source: io::Error },
    /// A line is wrong. Never quotes it.
    #[error("{} line {line}: {what}", .file.display())]
    Line { file: PathBuf, line: usize, what: &'static str },
    /// A name that would not fit into a line.
    #[error("a token's name has 1 to {MAX_NAME} of A-Z a-z 0-9 . _ -")]
    Name,
}

impl Tokens {
    /// Reads the file.
    pub(crate) fn load(file: &Path) -> Result<Self, BadTokens> {
        let entries = read(file)?;
        Ok(Tokens { file: file.to_owned(), entries: Arc::new(RwLock::new(entries)) })
    }

    /// Reads the file again; if it is wrong the tokens stay as they were.
    pub(crate) fn reload(&self) -> Result<usize, BadTokens> {
        let entries = read(&self.file)?;
        let count = entries.len();
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = entries;
        Ok(count)
    }

    /// Whose token this is.
    pub(crate) fn actor(&self, token: &str, now_ms: u64) -> Result<Actor, Denied> {
        if token.len() > MAX_TOKEN {
            return Err(Denied::Unknown);
        }
        let hash = blake3::hash(token.as_bytes());
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        // All of them, so that the time says nothing about the place of a match.
        let matching = entries.iter().filter(|entry| entry.hash == hash).collect::<Vec<_>>();
        match matching.iter().find(|entry| entry.ends.is_none_or(|ends| now_ms < ends)) {
            Some(entry) => Ok(entry.actor.clone()),
            None if matching.is_empty() => Err(Denied::Unknown),
            None => Err(Denied::Expired),
        }
    }
}

/// Appends a new token to the file, which is made if need be, and gives the token: it is written down nowhere.
pub(crate) fn new_token(
    file: &Path,
    name: &str,
    roles: &BTreeSet<Role>,
    ends: Option<u64>,
) -> Result<String, BadTokens> {
    let failed = |source| BadTokens::Io { file: file.to_owned(), source };
    if !is_name(name) {
        return Err(BadTokens::Name);
    }
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| failed(io::Error::other(error)))?;
    let token = format!("{PREFIX}{}", Hash::from_bytes(secret).to_hex());
    let hash = blake3::hash(token.as_bytes()).to_hex();
    let roles = roles.iter().map(|role| role.name()).collect::<Vec<_>>().join(",");
    let ends = ends.map_or("never".to_owned(), time::rfc3339);

    let mut open = OpenOptions::new();
    let mut out = open.append(true).read(true).create(true).mode(0o600).open(file).map_err(failed)?;
    let mut text = String::new();
    out.read_to_string(&mut text).map_err(failed)?;
    // Someone's editor may have left the last line open.
    let break_ = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let line = format!("{break_}{name} {roles} {hash} {ends}\n");
    out.write_all(line.as_bytes()).and_then(|()| out.sync_all()).map_err(failed)?;
    Ok(token)
}

fn read(file: &Path) -> Result<Vec<Entry>, BadTokens> {
    let failed = |source| BadTokens::Io { file: file.to_owned(), source };
    let mut text = String::new();
    let open = std::fs::File::open(file).map_err(failed)?;
    open.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(failed(io::Error::other("too long")));
    }
    let lines = text.lines().enumerate().map(|(line, text)| (line + 1, text.trim()));
    lines
        .filter(|(_, text)| !text.is_empty() && !text.starts_with('#'))
        .map(|(line, text)| entry(text).map_err(|what| BadTokens::Line { file: file.to_owned(), line, what }))
        .collect()
}

fn entry(line: &str) -> Result<Entry, &'static str> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let &[name, roles, hash, ends] = words.as_slice() else {
        return Err("expected NAME ROLES HASH EXPIRY; make one with `dwcp-control token new`");
    };
    if !is_name(name) {
        return Err("the name has characters other than A-Z a-z 0-9 . _ -, or more than 64");
    }
    let role = |text: &str| Role::ALL.into_iter().find(|role| role.name() == text);
    let roles = roles.split(',').map(role).collect::<Option<BTreeSet<Role>>>();
    let ends = match ends {
        "never" => None,
        text => Some(time::parse(text).ok_or("the expiry is a date such as 2027-01-31, or never")?),
    };
    Ok(Entry {
        actor: Actor { name: name.to_owned(), roles: roles.ok_or("roles are admin, rollback and nodes")? },
        hash: Hash::from_hex(hash).map_err(|_| "the hash has 64 hexadecimal digits")?,
        ends,
    })
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_roles_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        std::fs::write(&file, "# ours\n\n# no line's end").unwrap();
        let admin = new_token(&file, "ops", &BTreeSet::from([Role::Admin]), None).unwrap();
        let other =
            new_token(&file, "ops", &BTreeSet::from([Role::Rollback, Role::Nodes]), Some(5000)).unwrap();
        let tokens = Tokens::load(&file).unwrap();
        assert_eq!(tokens.actor(&admin, 0).unwrap().roles, BTreeSet::from([Role::Admin]));
        assert_eq!(tokens.actor(&other, 4999).unwrap().roles.len(), 2);
        assert_eq!(tokens.actor(&other, 5000), Err(Denied::Expired));
        assert_eq!(tokens.actor(&admin[..admin.len() - 1], 0), Err(Denied::Unknown));
        assert_eq!(tokens.actor(&"x".repeat(10_000), 0), Err(Denied::Unknown));
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!text.contains(&admin) && text.contains("ops rollback,nodes "), "{text}");
    }

    #[test]
    fn a_bad_file_is_refused_with_its_line_and_the_old_tokens_stay() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        let token = new_token(&file, "ops", &BTreeSet::from([Role::Admin]), None).unwrap();
        let tokens = Tokens::load(&file).unwrap();
        let good = std::fs::read_to_string(&file).unwrap();
        let hash = "0".repeat(64);
        for bad in [
            "ops",
            "ops admin x never",
            &format!("ops king {hash} never"),
            &format!("o$s admin {hash} never"),
            &format!("ops admin {hash} soon"),
        ] {
            std::fs::write(&file, format!("{good}{bad}\n")).unwrap();
            let error = tokens.reload().unwrap_err().to_string();
            assert!(error.contains("line 2") && !error.contains(&hash), "{error}");
            assert!(tokens.actor(&token, 0).is_ok());
        }
        std::fs::write(&file, "").unwrap();
        assert_eq!(tokens.reload().unwrap(), 0);
        assert_eq!(tokens.actor(&token, 0), Err(Denied::Unknown));
    }

    #[test]
    fn a_name_cannot_add_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        for name in ["", "a b", "a\nb", &"x".repeat(65)] {
            assert!(matches!(
                new_token(&file, name, &BTreeSet::from([Role::Admin]), None),
                Err(BadTokens::Name)
            ));
        }
        assert!(!file.exists());
    }
}
