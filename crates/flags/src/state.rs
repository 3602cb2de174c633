//! What this node knows of the flag, and what it decides by it.

use std::fmt;

use crate::bucket::bucket;
use crate::document::{BadDocument, Epoch, Fault, FlagDocument, OnStale, Percentage};
use crate::lease::{Lease, Moment};

/// The two paths of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// The VMM's bytes as they are.
    V1,
    /// Encoded, hashed and signed chunks.
    V3,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Path::V1 => "v1",
            Path::V3 => "v3",
        })
    }
}

/// Where the flag comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: this path is configured.
    None(Path),
    /// A file of this node. Its operator is at hand, so there is no lease, and an epoch is optional.
    File,
    /// A server, whose answers hold for as long as the lease.
    Server(Lease),
}

/// Which migrations are asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// One that is about to start.
    New,
    /// Those that run on v3 already.
    Running,
}

/// What else has a say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Conditions {
    /// The node has had too many failures on v3 of late.
    pub breaker_open: bool,
    /// The other end refuses v3, see [`FlagState::veto`].
    pub peer_veto: bool,
}

/// A decision, with its cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// No flag source: the configured path.
    NoSource(Path),
    /// The flag's source has not answered since this process started.
    NoAnswer,
    /// The source does not know the flag, or gave another one's document.
    UnknownFlag,
    /// The source's document cannot be read.
    Malformed,
    /// The flag is off, or at 0 %.
    Disabled,
    /// The flag excludes this node.
    Excluded,
    /// The flag's server decided by itself, for or against this node.
    Evaluated(Path),
    /// The flag's server has not confirmed for too long.
    LeaseExpired,
    /// Too many failures on v3.
    BreakerOpen,
    /// The other end refuses v3.
    PeerVeto,
    /// This node is named as a canary.
    Canary,
    /// The percentage reaches this node.
    InCohort {
        /// The node's bucket.
        bucket: u8,
        /// How far the flag goes.
        percentage: Percentage,
    },
    /// The percentage does not reach this node.
    NotInCohort {
        /// The node's bucket.
        bucket: u8,
        /// How far the flag goes.
        percentage: Percentage,
    },
}

impl Reason {
    /// The path that follows.
    pub fn path(self) -> Path {
        match self {
            Reason::NoSource(path) | Reason::Evaluated(path) => path,
            Reason::Canary | Reason::InCohort { .. } => Path::V3,
            Reason::NoAnswer
            | Reason::UnknownFlag
            | Reason::Malformed
            | Reason::Disabled
            | Reason::Excluded
            | Reason::LeaseExpired
            | Reason::BreakerOpen
            | Reason::PeerVeto
            | Reason::NotInCohort { .. } => Path::V1,
        }
    }

    /// A stable name for metrics, JSON and the wire.
    pub fn code(self) -> &'static str {
        match self {
            Reason::NoSource(_) => "flag_no_source",
            Reason::NoAnswer => "flag_no_answer",
            Reason::UnknownFlag => "flag_unknown",
            Reason::Malformed => "flag_malformed",
            Reason::Disabled => "flag_disabled",
            Reason::Excluded => "flag_excluded",
            Reason::Evaluated(Path::V1) => "flag_evaluated_off",
            Reason::Evaluated(Path::V3) => "flag_evaluated_on",
            Reason::LeaseExpired => "flag_lease_expired",
            Reason::BreakerOpen => "breaker_open",
            Reason::PeerVeto => "peer_veto",
            Reason::Canary => "flag_canary",
            Reason::InCohort { .. } => "flag_in_cohort",
            Reason::NotInCohort { .. } => "flag_not_in_cohort",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NoSource(path) => write!(f, "no flag source; {path} is configured"),
            Reason::NoAnswer => f.write_str("the flag source has not answered yet"),
            Reason::UnknownFlag => f.write_str("the flag source does not know the flag"),
            Reason::Malformed => f.write_str("the flag document cannot be read"),
            Reason::Disabled => f.write_str("the flag is off"),
            Reason::Excluded => f.write_str("the flag excludes this node"),
            Reason::Evaluated(path) => write!(f, "the flag source has decided on {path}"),
            Reason::LeaseExpired => f.write_str("the flag source has not confirmed for too long"),
            Reason::BreakerOpen => f.write_str("too many failures on v3"),
            Reason::PeerVeto => f.write_str("the other end refuses v3"),
            Reason::Canary => f.write_str("this node is a canary"),
            Reason::InCohort { bucket, percentage } => write!(f, "bucket {bucket} is within {percentage}"),
            Reason::NotInCohort { bucket, percentage } => write!(f, "bucket {bucket} is beyond {percentage}"),
        }
    }
}

/// What a server that evaluates flags itself decided for this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evaluation {
    /// v3.
    On,
    /// v1, for this node.
    Off,
    /// The flag is off for everyone.
    Disabled,
}

/// What a new document changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It is the one that was in force.
    Unchanged,
    /// It is in force now: save it, and look again at running migrations.
    Changed,
}

/// A document that is well formed and yet not obeyed; the one before stays in force. Each of these raises an alarm:
/// a server went back in time, or someone replays what it once said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Older than what this node has applied, now or before its restart.
    #[error("flag epoch {offered} is lower than {applied}, which is applied already")]
    Lower {
        /// Its epoch.
        offered: Epoch,
        /// The one in force.
        applied: Epoch,
    },
    /// Another document under the same epoch.
    #[error("flag epoch {0} came with two different contents")]
    Equivocal(Epoch),
    /// A server's document must have an epoch.
    #[error("the flag document of a server has no epoch")]
    NoEpoch,
}

impl Refusal {
    /// A stable name for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Refusal::Lower { .. } => "lower_epoch",
            Refusal::Equivocal(_) => "equivocal",
            Refusal::NoEpoch => "no_epoch",
        }
    }
}

/// Why there is no document to go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absence {
    /// Nothing has answered since the process started, or the file is gone.
    NoAnswer,
    /// The source answered that it does not know the flag.
    UnknownFlag,
    /// What it answered cannot be read.
    Malformed,
}

impl From<&BadDocument> for Absence {
    fn from(bad: &BadDocument) -> Self {
        match bad.fault {
            Fault::UnknownFeature(_) => Absence::UnknownFlag,
            _ => Absence::Malformed,
        }
    }
}

/// What a source says of the flag.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Document(FlagDocument),
    Evaluation(Evaluation),
}

/// What this node knows of one flag at the moment.
#[derive(Debug, Clone)]
pub struct FlagState {
    node: String,
    source: Source,
    /// What the source said since this process started.
    live: Result<Said, Absence>,
    /// What it said before: it may restrict, and never enables.
    remembered: Option<FlagDocument>,
    /// The highest epoch seen.
    floor: Option<Epoch>,
}

impl FlagState {
    /// The state of `node` at its start: v1, unless `source` is a configured v3.
    pub fn new(node: impl Into<String>, source: Source) -> Self {
        FlagState { node: node.into(), source, live: Err(Absence::NoAnswer), remembered: None, floor: None }
    }

    /// Takes in the document that was on disk: from now on a lower epoch is refused, and until the source answers this
    /// node refuses v3 as a destination too if the document switched it off.
    pub fn remember(&mut self, document: FlagDocument) {
        self.floor = self.floor.max(document.epoch);
        self.remembered = Some(document);
    }

    /// The source gave this document; the request was sent at `asked` (which matters for a server only).
    pub fn apply(&mut self, document: FlagDocument, asked: Moment) -> Result<Applied, Refusal> {
        let known = self.document().or(self.remembered.as_ref());
        match (document.epoch, self.floor) {
            (Some(offered), Some(applied)) if offered < applied => {
                return Err(Refusal::Lower { offered, applied });
            }
            (Some(epoch), Some(applied))
                if epoch == applied && self.is_served() && known != Some(&document) =>
            {
                return Err(Refusal::Equivocal(epoch));
            }
            (None, _) if self.is_served() => return Err(Refusal::NoEpoch),
            _ => {}
        }
        self.confirm(asked);
        if self.document() == Some(&document) {
            return Ok(Applied::Unchanged);
        }
        self.floor = self.floor.max(document.epoch);
        self.live = Ok(Said::Document(document));
        Ok(Applied::Changed)
    }

    /// The server evaluated the flag itself; the request was sent at `asked`.
    pub fn evaluated(&mut self, evaluation: Evaluation, asked: Moment) -> Applied {
        self.confirm(asked);
        match std::mem::replace(&mut self.live, Ok(Said::Evaluation(evaluation))) {
            Ok(Said::Evaluation(before)) if before == evaluation => Applied::Unchanged,
            _ => Applied::Changed,
        }
    }

    /// The server said that nothing has changed; the request was sent at `asked`.
    pub fn confirm(&mut self, asked: Moment) {
        if let Source::Server(lease) = &mut self.source {
            lease.confirm(asked);
        }
    }

    /// The source answered, but not with a document to go by. The last one is not forgotten: it still restricts.
    pub fn withdraw(&mut self, absence: Absence) {
        if let Ok(Said::Document(document)) = std::mem::replace(&mut self.live, Err(absence)) {
            self.remembered = Some(document);
        }
    }

    /// The document in force; `None` if there is none, which means v1 unless the server evaluates the flag itself.
    pub fn document(&self) -> Option<&FlagDocument> {
        match &self.live {
            Ok(Said::Document(document)) => Some(document),
            Ok(Said::Evaluation(_)) | Err(_) => None,
        }
    }

    /// The lease, where the source is a server.
    pub fn lease(&self) -> Option<Lease> {
        match self.source {
            Source::Server(lease) => Some(lease),
            Source::None(_) | Source::File => None,
        }
    }

    /// When the decision may change although the source says nothing new: the end of a lease that holds at `now`.
    pub fn next_change(&self, now: Moment) -> Option<Moment> {
        self.lease().and_then(|lease| lease.ends()).filter(|end| *end > now)
    }

    /// Whether this node, as the *source* of a migration, uses v3; the first reason against it decides.
    pub fn decide(&self, now: Moment, scope: Scope, conditions: Conditions) -> Reason {
        let granted = match (&self.source, &self.live) {
            (Source::None(path), _) => Reason::NoSource(*path),
            (_, Err(Absence::NoAnswer)) => Reason::NoAnswer,
            (_, Err(Absence::UnknownFlag)) => Reason::UnknownFlag,
            (_, Err(Absence::Malformed)) => Reason::Malformed,
            (_, Ok(Said::Document(document))) => self.evaluate(document, now, scope),
            (_, Ok(Said::Evaluation(Evaluation::Disabled))) => Reason::Disabled,
            (_, Ok(Said::Evaluation(Evaluation::Off))) => Reason::Evaluated(Path::V1),
            (_, Ok(Said::Evaluation(Evaluation::On))) => {
                self.unless_stale(OnStale::default(), now, scope, Reason::Evaluated(Path::V3))
            }
        };
        match granted.path() {
            Path::V3 if conditions.breaker_open => Reason::BreakerOpen,
            Path::V3 if conditions.peer_veto => Reason::PeerVeto,
            _ => granted,
        }
    }

    /// Why this node, as the *destination*, refuses v3, if it does. The flag governs sources: a destination outside of the
    /// cohort, or with an expired lease, goes along; only one that sees the flag off, or itself excluded, does not.
    pub fn veto(&self) -> Option<Reason> {
        if matches!(self.source, Source::None(_)) {
            return None;
        }
        match (&self.live, &self.remembered) {
            (Ok(Said::Evaluation(Evaluation::Disabled)), _) => Some(Reason::Disabled),
            (Ok(Said::Evaluation(_)), _) => None,
            (Ok(Said::Document(document)), _) | (Err(_), Some(document)) => self.barred(document),
            (Err(_), None) => None,
        }
    }

    fn evaluate(&self, document: &FlagDocument, now: Moment, scope: Scope) -> Reason {
        if let Some(reason) = self.barred(document) {
            return reason;
        }
        if document.canaries.contains(&self.node) {
            return self.unless_stale(document.on_stale, now, scope, Reason::Canary);
        }
        let percentage = document.percentage;
        match bucket(&document.feature, &self.node) {
            bucket if bucket <= percentage.value() => {
                self.unless_stale(document.on_stale, now, scope, Reason::InCohort { bucket, percentage })
            }
            bucket => Reason::NotInCohort { bucket, percentage },
        }
    }

    /// Only a permission can be stale. What is v1 anyway keeps its own reason, so that new and running migrations that must
    /// both take v1 do so for the same one.
    fn unless_stale(&self, on_stale: OnStale, now: Moment, scope: Scope, granted: Reason) -> Reason {
        let matters = match (on_stale, scope) {
            (OnStale::V1New, Scope::New) | (OnStale::V1All, _) => true,
            (OnStale::V1New, Scope::Running) | (OnStale::Hold, _) => false,
        };
        match self.source {
            Source::Server(lease) if matters && !lease.holds(now) => Reason::LeaseExpired,
            _ => granted,
        }
    }

    fn barred(&self, document: &FlagDocument) -> Option<Reason> {
        if !document.enabled || document.percentage.value() == 0 {
            Some(Reason::Disabled)
        } else if document.excluded.contains(&self.node) {
            Some(Reason::Excluded)
        } else {
            None
        }
    }

    fn is_served(&self) -> bool {
        matches!(self.source, Source::Server(_))
    }
}
