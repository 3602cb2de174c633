//! The journal's format: one file a migration and side, from which [`handover`](crate::handover) goes on after a restart.
//!
//! ```text
//! {"v":1,"seq":0,"unix_ms":1764547200000,"entry":{"kind":"prepared",...},"sum":"<64 hex digits>"}
//! {"v":1,"seq":1,"unix_ms":1764547200950,"entry":{"kind":"commit",...},"sum":"<64 hex digits>"}
//! ```
//! - One JSON object a line, `\n` at its end, in the order of writing; `seq` counts from 0 without gaps.
//! - `sum` is BLAKE3, keyed with the line before's sum (32 zero bytes for the first), over the line's bytes in front of `,"sum"`.
//!   So no line can be changed, left out, added or moved unnoticed, by a faulty disk that is; it is no signature.
//! - `v` is [`VERSION`]; a reader refuses another one, and a kind that it does not know: what it cannot read may be a
//!   decision.
//! - A last line without its newline, or with a hole of zero bytes, was never durable: [`replay`] reports and ignores it.
//!   Any other damage is an error, in the last line too: a journal that lies must not decide who owns a guest.
//! - The writer appends, syncs, and only then takes [`Line::next`] for its chain. After a failed write it cuts the file back to
//!   its last durable length before it writes again; [`Replay::len`] is that length after a restart.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::fault::Mechanism;
use crate::handover::{AbortReason, Afterwards, Resolution, Transfer};
use crate::ids::{MigrationId, NodeName, SessionId, VmName};

/// Version of the format.
pub const VERSION: u32 = 1;

/// Bytes of one line, its newline included: paths and names are bounded, a note is cut to [`MAX_NOTE`].
pub const MAX_LINE: usize = 16 << 10;

/// Lines of one journal.
pub const MAX_LINES: u64 = 8192;

/// Notes stop here, so that there is always room for the decisions.
pub const MAX_NOTED_LINES: u64 = MAX_LINES - 1024;

/// Bytes of a note's text.
pub const MAX_NOTE: usize = 1024;

/// Bytes of one journal file.
pub const MAX_JOURNAL: usize = 16 << 20;

/// Which side wrote an entry, and what it decides.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Entry {
    /// Source: about to touch the VMM.
    Prepared(Box<Prepared>),
    /// Source: its VMM died after this was delivered; the only copy is at the destination.
    SourceLost(Transfer),
    /// Source: the guest is the destination's, by this receipt.
    Commit(Transfer),
    /// Source: decided against.
    Aborted {
        /// Why.
        reason: AbortReason,
    },
    /// Destination: about to touch the VMM.
    Accepted(Box<Accepted>),
    /// Destination: holds the whole guest, paused; in doubt from here on.
    Receipt(Transfer),
    /// Destination: committed; about to run the guest.
    Starting {
        /// Whether it shall run, or stay paused as it was.
        run: bool,
    },
    /// Destination: the guest is here.
    Running,
    /// Destination: the guest never ran here and never will.
    NeverRan {
        /// Why.
        reason: AbortReason,
    },
    /// Either: the guest ran at the destination, or may have, and is gone there.
    Lost,
    /// Either: an operator decided.
    Resolved(Resolution),
    /// Either: nothing is left to do with the VMM.
    Done {
        /// Whether the guest is the destination's.
        moved: bool,
    },
    /// Either: what happened, for people; decides nothing.
    Note(Note),
}

/// What both sides write down before they touch a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Job {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmName,
    /// The node at the other end.
    pub peer: NodeName,
    /// Its public key, by which its words are still known after a restart.
    #[serde(with = "hex32")]
    pub peer_key: [u8; 32],
    /// Where its agent listens: the source dials it; the destination only asks there what happened.
    pub peer_addr: Option<SocketAddr>,
    /// The VMM's QMP socket, or the relay's.
    pub qmp: String,
    /// The session, as hexadecimal digits.
    #[serde(with = "session_hex")]
    pub session: SessionId,
    /// The path it began on, as the status prints it.
    pub path: String,
    /// When it began, in milliseconds since 1970; for people.
    pub started_unix_ms: u64,
    /// The VMM's process, where it could be told: whoever else serves that socket later is not this VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<Process>,
    /// Which attempt at this migration, counted from 1.
    #[serde(default = "first", skip_serializing_if = "is_first")]
    pub attempt: u32,
    /// What was asked for, in the agent's own words, where it may be tried again after an abort.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub again: Option<String>,
    /// Source: it stops the guest by itself for the switchover, so a guest that stands paused later was stopped by it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub halts: bool,
}

fn first() -> u32 {
    1
}

fn is_first(attempt: &u32) -> bool {
    *attempt == 1
}

/// A process of the machine that writes the journal. Together the three do not come twice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// When it started, in clock ticks after the boot: the 22nd field of `/proc/PID/stat`.
    pub started: u64,
    /// Which boot: `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
}

/// The source's first entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prepared {
    /// What and where.
    pub job: Job,
    /// Whether the guest ran, and so shall run wherever it ends.
    pub guest_ran: bool,
    /// What becomes of the source's VMM once the guest has moved.
    pub on_success: Afterwards,
}

/// The destination's first entry.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Accepted {
    /// What and where.
    pub job: Job,
    /// What becomes of the destination's VMM if the guest does not come.
    pub on_abort: Afterwards,
}

/// A line of the timeline that `explain` prints.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Note {
    /// What it is about: a phase's or alarm's stable name.
    pub what: String,
    /// More, for people; cut to [`MAX_NOTE`] bytes when written.
    pub text: String,
}

impl Note {
    /// A note; `text` is cut at [`MAX_NOTE`] bytes.
    pub fn new(what: impl Into<String>, text: impl Into<String>) -> Self {
        let cut = |mut s: String| {
            let end = (0..=MAX_NOTE.min(s.len())).rev().find(|at| s.is_char_boundary(*at));
            s.truncate(end.unwrap_or(0));
            s
        };
        Note { what: cut(what.into()), text: cut(text.into()) }
    }
}

/// Why a line cannot be written or a journal not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// An entry does not fit.
    #[error("a journal line of {len} bytes exceeds {MAX_LINE}")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// There is no room for this entry.
    #[error("the journal has {lines} lines and takes no more of this kind")]
    Full {
        /// How many it has.
        lines: u64,
    },
    /// The file is larger than any journal.
    #[error("{len} bytes are no journal: more than {MAX_JOURNAL}")]
    TooLarge {
        /// Its length.
        len: usize,
    },
    /// A line is damaged, missing or moved.
    #[error(
        "line {line} of the journal is damaged ({why}); it must not decide who owns a guest: resolve by hand"
    )]
    Damaged {
        /// Counted from 1.
        line: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// Written by another version.
    #[error(
        "line {line} of the journal has version {version}, this build reads {VERSION}: use the agent that wrote it"
    )]
    Version {
        /// Counted from 1.
        line: u64,
        /// Its version.
        version: u32,
    },
    /// The line is whole, and this build does not understand it.
    #[error("line {line} of the journal is not understood; use the agent that wrote it")]
    Unknown {
        /// Counted from 1.
        line: u64,
    },
}

/// Where a journal ends: what the next line chains to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain {
    seq: u64,
    sum: [u8; 32],
}

/// A line, ready to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Its bytes, with the newline.
    pub text: String,
    /// The chain once the line is durable.
    pub next: Chain,
}

/// An entry and when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped {
    /// By the writer's clock, in milliseconds since 1970; for people.
    pub unix_ms: u64,
    /// The entry.
    pub entry: Entry,
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Its entries, in order.
    pub entries: Vec<Stamped>,
    /// For the next line.
    pub chain: Chain,
    /// Bytes of the whole lines: cut the file to it before appending.
    pub len: u64,
    /// Bytes after them, of a line that was never durable.
    pub torn: Option<u64>,
}

impl Replay {
    /// The entries without their times, for `recover`.
    pub fn decisions(&self) -> Vec<Entry> {
        self.entries.iter().map(|e| e.entry.clone()).filter(|e| !matches!(e, Entry::Note(_))).collect()
    }
}

#[derive(Serialize, Deserialize)]
struct Body {
    v: u32,
    seq: u64,
    unix_ms: u64,
    entry: Entry,
}

/// The part that is read first, whatever the version.
#[derive(Deserialize)]
struct Head {
    v: u32,
    seq: u64,
}

const SUM_KEY: &str = ",\"sum\":\"";
/// Bytes of `,"sum":"<64 hex digits>"}`.
const SUM_LEN: usize = SUM_KEY.len() + 64 + 2;

/// Renders `entry` as the line that follows `chain`. The chain itself moves on only when the line is durable.
pub fn encode(entry: &Entry, unix_ms: u64, chain: &Chain) -> Result<Line, JournalError> {
    let room = if matches!(entry, Entry::Note(_)) { MAX_NOTED_LINES } else { MAX_LINES };
    if chain.seq >= room {
        return Err(JournalError::Full { lines: chain.seq });
    }
    let body = Body { v: VERSION, seq: chain.seq, unix_ms, entry: entry.clone() };
    // Plain structs with string keys: serialising into memory has no way to fail.
    let mut text = serde_json::to_string(&body).unwrap_or_default();
    text.pop();
    let sum = chained(&chain.sum, text.as_bytes());
    text.push_str(SUM_KEY);
    text.push_str(&SessionId(sum).to_string());
    text.push_str("\"}\n");
    if text.len() > MAX_LINE {
        return Err(JournalError::TooLong { len: text.len() });
    }
    Ok(Line { text, next: Chain { seq: chain.seq + 1, sum } })
}

/// Reads a journal. A torn last line is reported in the result; any other damage is an error.
pub fn replay(bytes: &[u8]) -> Result<Replay, JournalError> {
    match replay_whole_lines(bytes) {
        (replay, None) => Ok(replay),
        (_, Some(error)) => Err(error),
    }
}

/// Reads a journal up to its damage, if there is any: for people to see, never to decide by.
pub fn replay_whole_lines(bytes: &[u8]) -> (Replay, Option<JournalError>) {
    let mut replay = Replay { entries: Vec::new(), chain: Chain::default(), len: 0, torn: None };
    if bytes.len() > MAX_JOURNAL {
        return (replay, Some(JournalError::TooLarge { len: bytes.len() }));
    }
    let mut rest = bytes;
    while !rest.is_empty() {
        let end = rest.iter().position(|b| *b == b'\n');
        let (line, after) = match end {
            Some(end) => (&rest[..end], &rest[end + 1..]),
            None => (rest, &[][..]),
        };
        match read_line(line, end.is_some(), &replay.chain) {
            Ok((stamped, chain)) => {
                replay.entries.push(stamped);
                replay.chain = chain;
                replay.len += line.len() as u64 + 1;
            }
            Err(JournalError::Damaged { .. })
                if after.is_empty()
                    && (end.is_none() || line.contains(&0))
                    && !Mechanism::TornLine.is_off() =>
            {
                replay.torn = Some(rest.len() as u64);
            }
            Err(error) => return (replay, Some(error)),
        }
        rest = after;
    }
    (replay, None)
}

fn read_line(line: &[u8], whole: bool, chain: &Chain) -> Result<(Stamped, Chain), JournalError> {
    let number = chain.seq + 1;
    let damaged = |why| JournalError::Damaged { line: number, why };
    if chain.seq >= MAX_LINES {
        return Err(JournalError::Full { lines: chain.seq });
    }
    if !whole {
        return Err(damaged("it has no end"));
    }
    if line.len() >= MAX_LINE || line.len() <= SUM_LEN {
        return Err(damaged("its length"));
    }
    let (body, tail) = line.split_at(line.len() - SUM_LEN);
    let sum = chained(&chain.sum, body);
    if tail != format!("{SUM_KEY}{}\"}}", SessionId(sum)).as_bytes() {
        return Err(damaged("its checksum, or the line before is missing"));
    }
    let mut text = body.to_vec();
    text.push(b'}');
    let unknown = |_| JournalError::Unknown { line: number };
    let head: Head = serde_json::from_slice(&text).map_err(unknown)?;
    if head.v != VERSION {
        return Err(JournalError::Version { line: number, version: head.v });
    }
    if head.seq != chain.seq {
        return Err(damaged("its number"));
    }
    let body: Body = serde_json::from_slice(&text).map_err(unknown)?;
    Ok((Stamped { unix_ms: body.unix_ms, entry: body.entry }, Chain { seq: number, sum }))
}

fn chained(before: &[u8; 32], body: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(before, body).as_bytes()
}

/// 32 bytes as 64 lower-case hexadecimal digits.
pub(crate) mod hex32 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::ids::SessionId;

    pub(crate) fn serialize<S: Serializer>(bytes: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&SessionId(*bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        parse(text.as_bytes()).ok_or_else(|| D::Error::custom("expected 64 hexadecimal digits"))
    }

    fn parse(digits: &[u8]) -> Option<[u8; 32]> {
        let mut bytes = [0; 32];
        if digits.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |d: u8| char::from(d).to_digit(16);
            *byte = u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?;
        }
        Some(bytes)
    }
}

mod session_hex {
    use serde::{Deserializer, Serializer};

    use crate::ids::SessionId;

    pub(super) fn serialize<S: Serializer>(id: &SessionId, serializer: S) -> Result<S::Ok, S::Error> {
        super::hex32::serialize(&id.0, serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SessionId, D::Error> {
        super::hex32::deserialize(deserializer).map(SessionId)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            migration: MigrationId::new("m-1").unwrap(),
            vm: VmName::new("web").unwrap(),
            peer: NodeName::new("hv-02").unwrap(),
            peer_key: [5; 32],
            peer_addr: "[::1]:7400".parse().ok(),
            qmp: "/run/vm/\"web\"\n.qmp".into(),
            session: SessionId([0xab; 32]),
            path: "v3".into(),
            started_unix_ms: 1,
            vmm: Some(Process { pid: 7, started: 9, boot: "b".into() }),
            attempt: 3,
            again: Some("{}".into()),
            halts: true,
        }
    }

    fn every_entry() -> Vec<Entry> {
        let transfer = Transfer { stream_len: u64::MAX, root: [7; 32] };
        let reason = AbortReason::LinkLost;
        vec![
            Entry::Prepared(Prepared { job: job(), guest_ran: true, on_success: Afterwards::Quit }.into()),
            Entry::SourceLost(transfer),
            Entry::Commit(transfer),
            Entry::Aborted { reason },
            Entry::Accepted(Accepted { job: job(), on_abort: Afterwards::Leave }.into()),
            Entry::Receipt(transfer),
            Entry::Starting { run: true },
            Entry::Running,
            Entry::NeverRan { reason },
            Entry::Lost,
            Entry::Resolved(Resolution::StartHere { peer_fenced: true }),
            Entry::Resolved(Resolution::LeaveToPeer),
            Entry::Done { moved: true },
            Entry::Note(Note::new("round", "é\n\"2\"")),
        ]
    }

    fn written(entries: &[Entry]) -> (Vec<String>, Chain) {
        let mut chain = Chain::default();
        let lines = entries.iter().map(|entry| {
            let line = encode(entry, 5, &chain).unwrap();
            chain = line.next;
            line.text
        });
        (lines.collect(), chain)
    }

    #[test]
    fn every_entry_comes_back() {
        let entries = every_entry();
        let (lines, chain) = written(&entries);
        let bytes = lines.concat();
        assert_eq!(bytes.lines().count(), entries.len());
        let replay = replay(bytes.as_bytes()).unwrap();
        assert_eq!(replay.entries.iter().map(|e| e.entry.clone()).collect::<Vec<_>>(), entries);
        assert_eq!((replay.chain, replay.len, replay.torn), (chain, bytes.len() as u64, None));
        assert_eq!(replay.decisions().len(), entries.len() - 1);
    }

    #[test]
    fn the_format_is_the_documented_one() {
        let (lines, _) = written(&[Entry::Starting { run: true }]);
        let sum = SessionId(chained(&[0; 32], &lines[0].as_bytes()[..lines[0].len() - SUM_LEN - 1]));
        let body = r#"{"v":1,"seq":0,"unix_ms":5,"entry":{"kind":"starting","run":true}"#;
        assert_eq!(lines[0], format!("{body},\"sum\":\"{sum}\"}}\n"));
    }

    #[test]
    fn a_torn_end_at_any_byte_is_ignored_and_writing_goes_on_behind_the_rest() {
        let (lines, _) = written(&every_entry());
        let (last, kept) = lines.split_last().unwrap();
        let kept = kept.concat();
        for cut in 0..last.len() {
            let file = format!("{kept}{}", String::from_utf8_lossy(&last.as_bytes()[..cut]));
            let replay = replay(&file.as_bytes()[..kept.len() + cut]).unwrap();
            assert_eq!(replay.len, kept.len() as u64);
            assert_eq!(replay.torn, (cut > 0).then_some(cut as u64));
            let next = encode(&Entry::Running, 6, &replay.chain).unwrap();
            super::replay(format!("{kept}{}", next.text).as_bytes()).unwrap();
        }
        // Blocks that were allocated and never written.
        let zeros = format!("{kept}{}\n", "\0".repeat(40));
        assert_eq!(replay(zeros.as_bytes()).unwrap().torn, Some(41));
    }

    #[test]
    fn damage_is_an_error_wherever_it_is() {
        let (lines, _) = written(&every_entry());
        let whole = lines.concat().into_bytes();
        // Without its newline a last line is torn.
        for at in 0..whole.len() - 1 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            assert!(replay(&bytes).is_err(), "byte {at}");
            let whole_before = bytes[..at].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(replay_whole_lines(&bytes).0.entries.len(), whole_before);
        }
        for gone in 0..lines.len() - 2 {
            let mut fewer = lines.clone();
            fewer.remove(gone);
            assert!(replay(fewer.concat().as_bytes()).is_err(), "line {gone}");
        }
        let mut swapped = lines.clone();
        swapped.swap(1, 2);
        assert!(replay(swapped.concat().as_bytes()).is_err());
    }

    #[test]
    fn a_job_without_what_came_later_is_read() {
        let older = Job { vmm: None, attempt: 1, again: None, halts: false, ..job() };
        let text = serde_json::to_string(&older).unwrap();
        assert!(!["vmm", "attempt", "again"].iter().any(|later| text.contains(later)));
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), older);
    }

    #[test]
    fn what_a_newer_agent_wrote_is_refused_even_at_the_end() {
        let sealed = |body: &str| {
            let sum = SessionId(chained(&[0; 32], body.as_bytes()));
            format!("{body},\"sum\":\"{sum}\"}}\n")
        };
        let newer = sealed(r#"{"v":2,"seq":0,"unix_ms":5,"entry":{"kind":"running"}"#);
        assert_eq!(replay(newer.as_bytes()), Err(JournalError::Version { line: 1, version: 2 }));
        for body in [
            r#"{"v":1,"seq":0,"unix_ms":5,"entry":{"kind":"given_away"}"#,
            r#"{"v":1,"seq":0,"unix_ms":5,"entry":{"kind":"starting","run":true,"unless":1}"#,
            r#"{"v":1,"seq":0,"unix_ms":5,"entry":{"kind":"aborted","reason":"bored"}"#,
        ] {
            assert_eq!(replay(sealed(body).as_bytes()), Err(JournalError::Unknown { line: 1 }), "{body}");
        }
    }

    #[test]
    fn limits_hold_and_decisions_always_find_room() {
        let mut long = job();
        long.qmp = "x".repeat(MAX_LINE);
        let entry = Entry::Accepted(Accepted { job: long, on_abort: Afterwards::Quit }.into());
        assert!(matches!(encode(&entry, 0, &Chain::default()), Err(JournalError::TooLong { .. })));
        let noted = Chain { seq: MAX_NOTED_LINES, sum: [0; 32] };
        let note = Entry::Note(Note::new("x", "é".repeat(MAX_NOTE)));
        assert_eq!(encode(&note, 0, &noted), Err(JournalError::Full { lines: MAX_NOTED_LINES }));
        assert!(encode(&note, 0, &Chain::default()).unwrap().text.len() < MAX_LINE);
        assert!(encode(&Entry::Running, 0, &noted).is_ok());
        assert!(encode(&Entry::Running, 0, &Chain { seq: MAX_LINES, sum: [0; 32] }).is_err());
        assert!(matches!(replay(&vec![b'x'; MAX_JOURNAL + 1]), Err(JournalError::TooLarge { .. })));
        assert_eq!(replay(b"").unwrap().entries, []);
    }
}
