//! Speaks the flag API: documents with epochs, of one cluster, and a signed report with each poll. What the bytes mean
//! stands in [`dwcp_flags::poll`].

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dwcp_flags::poll::{
    ANSWER_SIGNATURE, AnswerSignature, CLUSTER_ID, PollReport, REPORT, Served, SignedReport, answer_message,
    report_message,
};
use dwcp_flags::{Absence, Applied, FEATURE, Moment};
use dwcp_migrate::Metrics;
use dwcp_proto::{NodeKey, NodeName, PeerKey};
use hyper::header::{ETAG, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use tracing::{error, warn};

use crate::config::Labels;

use super::client::{Answer, Ask};
use super::keeper::Keeper;
use super::memory::{Memory, Remembered};
use super::metrics::Poll;
use super::server::{Trouble, if_none_match, text};

/// One side of the conversation.
pub(super) struct Api {
    key: Arc<NodeKey>,
    labels: Labels,
    server_key: Option<PeerKey>,
    memory: Memory,
    /// Counts what reports tell, once there is an engine.
    engine: Arc<OnceLock<Metrics>>,
    /// The only one that is obeyed; the first that was, if nothing was remembered.
    cluster: Option<String>,
    /// The document in force.
    held: Option<Held>,
    boot: u64,
    sequence: u64,
    /// The last report: a signed answer covers it.
    report: Vec<u8>,
}

#[derive(Debug)]
struct Held {
    etag: HeaderValue,
    /// As the server wrote it.
    text: String,
}

impl Api {
    /// Begins a conversation. What `memory` holds restricts `keeper` from now on.
    pub(super) fn new(
        key: Arc<NodeKey>,
        labels: Labels,
        server_key: Option<PeerKey>,
        memory: Memory,
        engine: Arc<OnceLock<Metrics>>,
        keeper: &mut Keeper,
    ) -> Self {
        let remembered = memory.recall().unwrap_or_else(|error| {
            error!(file = %memory.path().display(), %error, "the last flag document cannot be read, so it restricts nothing");
            None
        });
        let cluster = remembered.map(|remembered| {
            keeper.remember(remembered.document);
            remembered.cluster
        });
        // Each start comes after the one before as long as the clock does; the server says where a node's does not.
        let boot = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let boot = u64::try_from(boot).unwrap_or(u64::MAX);
        let (held, sequence, report) = (None, 0, Vec::new());
        Api { key, labels, server_key, memory, engine, cluster, held, boot, sequence, report }
    }

    /// The cluster that is obeyed, once there is one.
    pub(super) fn cluster(&self) -> Option<&str> {
        self.cluster.as_deref()
    }

    pub(super) fn ask(&mut self, keeper: &Keeper) -> Ask {
        let path = format!("/v1/feature-flags/{FEATURE}");
        let mut ask = Ask { method: Method::GET, path, headers: Vec::new(), body: String::new() };
        if_none_match(&mut ask, self.held.as_ref().map(|held| &held.etag));
        self.sequence += 1;
        self.report = self.report(keeper).encode().unwrap_or_else(|error| {
            // Every text in it was checked before; without a report the poll still serves the flag.
            warn!(%error, "no report goes with the poll");
            Vec::new()
        });
        let signature = self.key.sign(&report_message(&self.report));
        let signed = SignedReport { signature, report: self.report.clone() };
        if let (false, Ok(value)) = (self.report.is_empty(), HeaderValue::from_str(&signed.to_header())) {
            ask.headers.push((HeaderName::from_static(REPORT), value));
        }
        ask
    }

    pub(super) fn take_in(
        &mut self,
        keeper: &mut Keeper,
        answer: Answer,
        asked: Moment,
    ) -> Result<Poll, Trouble> {
        let cluster = text(&answer.headers, CLUSTER_ID).unwrap_or_default();
        let ours = self.cluster.as_deref().is_none_or(|ours| ours == cluster);
        match answer.status {
            StatusCode::OK | StatusCode::NOT_MODIFIED => {}
            // Nobody signs this one; and what stands between may say it too, but does not know the cluster's name.
            StatusCode::NOT_FOUND if ours && self.server_key.is_none() => {
                return Err(self.withdraw(
                    keeper,
                    Absence::UnknownFlag,
                    "it does not know the flag".to_owned(),
                ));
            }
            _ => return Err(Trouble::status(&answer, None)),
        }
        if !ours {
            return Err(self.stranger(cluster));
        }
        if !cluster.is_empty() && NodeName::new(cluster).is_err() {
            return Err(Trouble::failed("its cluster's name is none"));
        }
        match answer.status {
            StatusCode::NOT_MODIFIED => self.confirmation(keeper, &answer, cluster, asked),
            _ => self.document(keeper, &answer, cluster, asked),
        }
    }

    /// Keeps the document in force on disk; `None` if there is none.
    pub(super) fn save(&self, keeper: &Keeper) -> Option<impl Future<Output = ()> + use<>> {
        let document = keeper.document()?.clone();
        let remembered = Remembered { cluster: self.cluster.clone()?, document };
        let memory = self.memory.clone();
        Some(async move {
            let file = memory.path().to_owned();
            let kept = tokio::task::spawn_blocking(move || memory.keep(&remembered)).await;
            if let Err(error) = kept.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
                error!(file = %file.display(), %error, "the flag document is not kept: a restart would not remember it");
            }
        })
    }

    fn confirmation(
        &mut self,
        keeper: &mut Keeper,
        answer: &Answer,
        cluster: &str,
        asked: Moment,
    ) -> Result<Poll, Trouble> {
        let Some(held) = &self.held else {
            return Err(Trouble::failed("it confirms what nobody asked about (304)"));
        };
        if answer.headers.get(ETAG).is_some_and(|etag| *etag != held.etag) {
            self.held = None;
            return Err(Trouble::failed("it confirms another document than the one asked about"));
        }
        let age = self.verify(answer, cluster, &held.text)?;
        keeper.confirm(Moment(asked.0.saturating_sub(age)));
        Ok(Poll::Confirmed)
    }

    fn document(
        &mut self,
        keeper: &mut Keeper,
        answer: &Answer,
        cluster: &str,
        asked: Moment,
    ) -> Result<Poll, Trouble> {
        let served = match Served::parse(&answer.body, FEATURE) {
            Ok(served) => served,
            // With a key, only what the server signed can take anything away.
            Err(bad) if self.server_key.is_some() => {
                return Err(Trouble::refused("signature", bad.to_string()));
            }
            Err(bad) => return Err(self.withdraw(keeper, Absence::from(&bad), bad.to_string())),
        };
        let age = self.verify(answer, cluster, &served.text)?;
        let asked = Moment(asked.0.saturating_sub(age));
        let applied = keeper
            .apply(served.document, asked)
            .map_err(|refusal| Trouble::refused(refusal.code(), refusal.to_string()))?;
        self.cluster = Some(cluster.to_owned());
        self.held = answer.headers.get(ETAG).cloned().map(|etag| Held { etag, text: served.text });
        Ok(match applied {
            Applied::Changed => Poll::Changed,
            Applied::Unchanged => Poll::Confirmed,
        })
    }

    /// The age that the server's signature vouches for; none where no key is configured.
    fn verify(&self, answer: &Answer, cluster: &str, flag: &str) -> Result<Duration, Trouble> {
        let Some(key) = &self.server_key else { return Ok(Duration::ZERO) };
        let signed = text(&answer.headers, ANSWER_SIGNATURE).and_then(AnswerSignature::from_header);
        let signed = signed.ok_or_else(|| Trouble::refused("signature", "its answer is not signed"))?;
        let message = answer_message(cluster, &self.report, signed.age_ms, flag);
        match key.verify(&message, &signed.signature) {
            true => Ok(Duration::from_millis(signed.age_ms)),
            false => Err(Trouble::refused("signature", "the signature of its answer is wrong")),
        }
    }

    fn withdraw(&mut self, keeper: &mut Keeper, absence: Absence, what: String) -> Trouble {
        // The next answer must be whole.
        self.held = None;
        keeper.withdraw(absence);
        Trouble::refused(super::refusal(absence), what)
    }

    fn stranger(&self, cluster: &str) -> Trouble {
        let ours = self.cluster.as_deref().unwrap_or_default();
        let theirs: String = cluster.chars().take(dwcp_flags::MAX_NODE_NAME).collect();
        let what = format!(
            "it is of cluster \"{theirs}\", and this node obeys \"{ours}\"; to change that, stop the agent and remove {}",
            self.memory.path().display()
        );
        Trouble::refused("cluster", what)
    }

    fn report(&self, keeper: &Keeper) -> PollReport {
        let tally = self.engine.get().map(Metrics::tally).unwrap_or_default();
        let reason = keeper.reason();
        PollReport {
            node: self.key.node().to_string(),
            cluster: self.cluster.clone().unwrap_or_default(),
            feature: FEATURE.to_owned(),
            boot: self.boot,
            sequence: self.sequence,
            applied: keeper.document().and_then(|document| document.epoch),
            path: reason.path(),
            reason: reason.code().to_owned(),
            v3_inflight: tally.v3_inflight,
            data_loss: tally.data_loss,
            byzantine_successes: tally.byzantine_successes,
            critical_errors: tally.critical_errors,
            labels: self.labels.0.clone(),
        }
    }
}
