//! What a node and a flag server say to each other: the poll, its report, and the answer.
//!
//! ```text
//! GET /v1/feature-flags/dwcp_v3_hde
//! if-none-match: W/"..."                    the etag of the last answer
//! dwcp-report: BASE64                       signature (64 bytes) + report, see PollReport and SignedReport
//!
//! 200  etag, dwcp-cluster-id                {"flag": FlagDocument, ...}, see Served
//! 304  etag, dwcp-cluster-id                the document that the node holds is confirmed
//!      dwcp-answer-signature: AGE BASE64    where the server has a key, see AnswerSignature
//! 404                                       the server does not know the flag
//! ```
//!
//! A poll without a report, or with one that no enrolled node has signed, is answered all the same and counts for nothing.
//!
//! A report is bound to its purpose by a context in front of what is signed, to its cluster and flag by its content, and
//! to its moment by `(boot, sequence)`, which rises from report to report: an older one is a replay.
//! The answer's signature covers the report it answers, so an answer cannot be replayed either.
//!
//! Signing and verifying is done with the identities of `dwcp-proto`, at either end; here are the bytes.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::document::{BadDocument, Epoch, Fault, FlagDocument};
use crate::text::{is_node_name, shorten};
use crate::{MAX_DOCUMENT, MAX_NODE_NAME, Path};

/// The header of a request that carries a [`SignedReport`].
pub const REPORT: &str = "dwcp-report";
/// The header of an answer that names the cluster: a node obeys one cluster and ignores the others.
pub const CLUSTER_ID: &str = "dwcp-cluster-id";
/// The header of an answer that carries an [`AnswerSignature`].
pub const ANSWER_SIGNATURE: &str = "dwcp-answer-signature";

/// Bytes of an encoded report: more than the longest names and labels need.
pub const MAX_REPORT: usize = 2048;
/// Characters of a report's header: base64 of signature and report.
pub const MAX_REPORT_HEADER: usize = (SIGNATURE + MAX_REPORT).div_ceil(3) * 4;
/// Bytes of an answer's body: the document and what stands beside it.
pub const MAX_ANSWER: usize = MAX_DOCUMENT + (64 << 10);
/// Labels of one node.
pub const MAX_LABELS: usize = 8;
/// Characters of a label's value, and of any other name in a report.
pub const MAX_LABEL: usize = MAX_NODE_NAME;

/// Bytes of an Ed25519 signature.
const SIGNATURE: usize = 64;
/// The layout's version, the first byte of a report.
const VERSION: u8 = 1;
const REPORT_CONTEXT: &[u8] = b"dwcp flag report\0";
const ANSWER_CONTEXT: &[u8] = b"dwcp flag answer\0";

/// What a node says of itself with a poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PollReport {
    /// The node's name.
    pub node: String,
    /// The cluster that the node obeys, as [`CLUSTER_ID`] named it; empty before the first answer.
    pub cluster: String,
    /// The flag that is polled.
    pub feature: String,
    /// Which start of the agent this is: higher after every start. A counter on disk, or microseconds since 1970.
    pub boot: u64,
    /// Which report of this start: higher with every poll.
    pub sequence: u64,
    /// The epoch of the document in force; `None` before the first.
    pub applied: Option<Epoch>,
    /// The path that a new migration with this node as its source takes now.
    pub path: Path,
    /// Why, as [`Reason::code`](crate::Reason::code) says it.
    pub reason: String,
    /// Migrations that run on v3 at the moment, at either end.
    pub v3_inflight: u32,
    /// Data losses found since this start.
    pub data_loss: u64,
    /// Attacks that came through, found since this start.
    pub byzantine_successes: u64,
    /// Critical errors since this start.
    pub critical_errors: u64,
    /// What the node's configuration says of it, such as `datacenter` and `criticality`.
    pub labels: BTreeMap<String, String>,
}

impl PollReport {
    /// The report's bytes: one form for one content, so what is signed cannot be read in two ways.
    ///
    /// Version, node, cluster, feature, boot, sequence, epoch, path, reason, four counts, labels; numbers are
    /// big-endian, a text has its length in one byte before it, and an absent epoch is one zero byte.
    ///
    /// # Errors
    /// A name that [`decode`](Self::decode) would refuse.
    pub fn encode(&self) -> Result<Vec<u8>, BadReport> {
        let mut out = Vec::with_capacity(256);
        out.push(VERSION);
        put_text(&mut out, name(&self.node, "node")?);
        put_text(&mut out, name_or_empty(&self.cluster, "cluster")?);
        put_text(&mut out, name(&self.feature, "feature")?);
        out.extend(self.boot.to_be_bytes());
        out.extend(self.sequence.to_be_bytes());
        match self.applied {
            None => out.push(0),
            Some(Epoch { incarnation, counter }) => {
                out.push(1);
                out.extend(incarnation.to_be_bytes());
                out.extend(counter.to_be_bytes());
            }
        }
        out.push(match self.path {
            Path::V1 => 1,
            Path::V3 => 3,
        });
        put_text(&mut out, name(&self.reason, "reason")?);
        out.extend(self.v3_inflight.to_be_bytes());
        for count in [self.data_loss, self.byzantine_successes, self.critical_errors] {
            out.extend(count.to_be_bytes());
        }
        let labels = u8::try_from(self.labels.len()).ok().filter(|count| usize::from(*count) <= MAX_LABELS);
        out.push(labels.ok_or(BadReport::Field("labels"))?);
        for (key, value) in &self.labels {
            put_text(&mut out, name(key, "labels")?);
            put_text(&mut out, name(value, "labels")?);
        }
        Ok(out)
    }

    /// Reads what [`encode`](Self::encode) wrote, and nothing else.
    ///
    /// # Errors
    /// See [`BadReport`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadReport> {
        if bytes.len() > MAX_REPORT {
            return Err(BadReport::TooLong);
        }
        let mut rest = Reader(bytes);
        match rest.byte()? {
            VERSION => {}
            version => return Err(BadReport::Version(version)),
        }
        let report = PollReport {
            node: name(rest.text()?, "node")?.to_owned(),
            cluster: name_or_empty(rest.text()?, "cluster")?.to_owned(),
            feature: name(rest.text()?, "feature")?.to_owned(),
            boot: rest.u64()?,
            sequence: rest.u64()?,
            applied: match rest.byte()? {
                0 => None,
                1 => Some(Epoch { incarnation: rest.u64()?, counter: rest.u64()? }),
                _ => return Err(BadReport::Field("applied")),
            },
            path: match rest.byte()? {
                1 => Path::V1,
                3 => Path::V3,
                _ => return Err(BadReport::Field("path")),
            },
            reason: name(rest.text()?, "reason")?.to_owned(),
            v3_inflight: u32::from_be_bytes(rest.array()?),
            data_loss: rest.u64()?,
            byzantine_successes: rest.u64()?,
            critical_errors: rest.u64()?,
            labels: rest.labels()?,
        };
        match rest.0 {
            [] => Ok(report),
            _ => Err(BadReport::Trailing),
        }
    }

    /// Whether `self` says the same as `other` at another moment: all but `sequence`.
    pub fn says_the_same(&self, other: &PollReport) -> bool {
        *self == PollReport { sequence: self.sequence, ..other.clone() }
    }

    /// Whether this report was made after `other`, both of one node.
    pub fn is_after(&self, other: &PollReport) -> bool {
        (self.boot, self.sequence) > (other.boot, other.sequence)
    }
}

/// What the node's key signs for an encoded report.
pub fn report_message(report: &[u8]) -> Vec<u8> {
    [REPORT_CONTEXT, report].concat()
}

/// An encoded report with its signature, as the header [`REPORT`] carries it. Nothing is verified by reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedReport {
    /// By the node's key, over [`report_message`].
    pub signature: [u8; SIGNATURE],
    /// The encoded report.
    pub report: Vec<u8>,
}

impl SignedReport {
    /// The header's value.
    pub fn to_header(&self) -> String {
        BASE64.encode([&self.signature[..], &self.report].concat())
    }

    /// Reads a header's value.
    ///
    /// # Errors
    /// [`BadReport::TooLong`], [`BadReport::Base64`] and [`BadReport::Short`].
    pub fn from_header(header: &[u8]) -> Result<Self, BadReport> {
        if header.len() > MAX_REPORT_HEADER {
            return Err(BadReport::TooLong);
        }
        let bytes = BASE64.decode(header).map_err(|_| BadReport::Base64)?;
        let (signature, report) = bytes.split_first_chunk().ok_or(BadReport::Short)?;
        Ok(SignedReport { signature: *signature, report: report.to_vec() })
    }
}

/// The document of an answer with status 200: the object's key `flag`. What stands beside it is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// The document.
    pub document: FlagDocument,
    /// Its text as it stood in the answer: what [`AnswerSignature`] covers, in this answer and in each 304 that confirms it.
    pub text: String,
}

impl Served {
    /// Reads an answer's body.
    ///
    /// # Errors
    /// As [`FlagDocument::parse`]; places are those within the value of `flag`.
    pub fn parse(body: &[u8], feature: &str) -> Result<Self, BadDocument> {
        #[derive(Deserialize)]
        struct Answer<'a> {
            #[serde(borrow)]
            flag: &'a RawValue,
        }
        if body.len() > MAX_ANSWER {
            return Err(BadDocument { line: 1, column: 1, fault: Fault::TooLarge });
        }
        let answer: Answer<'_> = serde_json::from_slice(body).map_err(|error| BadDocument {
            line: error.line().max(1),
            column: error.column().max(1),
            fault: Fault::Syntax(shorten(&error.to_string())),
        })?;
        let text = answer.flag.get();
        Ok(Served { document: FlagDocument::parse(text.as_bytes(), feature)?, text: text.to_owned() })
    }
}

/// What the server's key signs: its answer to this report.
///
/// `age_ms` says how long ago, in milliseconds, the server knew the document to be in force; a single server always says 0.
/// `flag` is the document's text, see [`Served::text`].
pub fn answer_message(cluster: &str, report: &[u8], age_ms: u64, flag: &str) -> Vec<u8> {
    let mut message = ANSWER_CONTEXT.to_vec();
    for part in [cluster.as_bytes(), report] {
        message.extend((part.len() as u64).to_be_bytes());
        message.extend(part);
    }
    message.extend(age_ms.to_be_bytes());
    message.extend(flag.as_bytes());
    message
}

/// The signature of an answer, as the header [`ANSWER_SIGNATURE`] carries it: `AGE_MS BASE64`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerSignature {
    /// See [`answer_message`].
    pub age_ms: u64,
    /// By the server's key, over [`answer_message`].
    pub signature: [u8; SIGNATURE],
}

impl AnswerSignature {
    /// The header's value.
    pub fn to_header(&self) -> String {
        format!("{} {}", self.age_ms, BASE64.encode(self.signature))
    }

    /// Reads a header's value; `None` if it is none.
    pub fn from_header(header: &str) -> Option<Self> {
        // A number of 64 bits, a space, 64 bytes in base64.
        if header.len() > 20 + 1 + 88 {
            return None;
        }
        let (age, signature) = header.split_once(' ')?;
        let signature = BASE64.decode(signature).ok()?.try_into().ok()?;
        Some(AnswerSignature { age_ms: age.parse().ok()?, signature })
    }
}

/// Why a report was refused. It counts for nothing; the poll is answered all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadReport {
    /// More than a report may have.
    #[error("longer than {MAX_REPORT} bytes")]
    TooLong,
    /// The header is not base64.
    #[error("not base64")]
    Base64,
    /// It ends before it is complete.
    #[error("ends before it is complete")]
    Short,
    /// It goes on after it is complete.
    #[error("goes on after its end")]
    Trailing,
    /// A version that this build does not know.
    #[error("version {0} is not known here")]
    Version(u8),
    /// Not what that field holds.
    #[error("\"{0}\" is not a legal value")]
    Field(&'static str),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], BadReport> {
        let (head, rest) = self.0.split_first_chunk().ok_or(BadReport::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8, BadReport> {
        self.array().map(|[byte]| byte)
    }

    fn u64(&mut self) -> Result<u64, BadReport> {
        self.array().map(u64::from_be_bytes)
    }

    fn text(&mut self) -> Result<&'a str, BadReport> {
        let length = usize::from(self.byte()?);
        let (head, rest) = self.0.split_at_checked(length).ok_or(BadReport::Short)?;
        self.0 = rest;
        std::str::from_utf8(head).map_err(|_| BadReport::Field("text"))
    }

    fn labels(&mut self) -> Result<BTreeMap<String, String>, BadReport> {
        let count = usize::from(self.byte()?);
        if count > MAX_LABELS {
            return Err(BadReport::Field("labels"));
        }
        let mut labels = BTreeMap::new();
        for _ in 0..count {
            let key = name(self.text()?, "labels")?;
            let value = name(self.text()?, "labels")?;
            // In rising order, as the map writes them.
            if labels.last_key_value().is_some_and(|(last, _): (&String, _)| last.as_str() >= key) {
                return Err(BadReport::Field("labels"));
            }
            labels.insert(key.to_owned(), value.to_owned());
        }
        Ok(labels)
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names have at most 64 characters.
    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    out.extend(text.as_bytes());
}

/// Every text in a report is a name, so it is safe in a log line and a metric's label.
fn name<'a>(text: &'a str, field: &'static str) -> Result<&'a str, BadReport> {
    is_node_name(text).then_some(text).ok_or(BadReport::Field(field))
}

fn name_or_empty<'a>(text: &'a str, field: &'static str) -> Result<&'a str, BadReport> {
    if text.is_empty() { Ok(text) } else { name(text, field) }
}
