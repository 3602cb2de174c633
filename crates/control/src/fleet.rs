//! What the nodes said with their polls, and how far a flag has come with them. In memory only.
//!
//! A report counts if an enrolled node's key has signed it, for this cluster, later than the node's report before. To check
//! a signature takes far longer than to answer a poll, so a report that says the same as the last one that counted is passed
//! over until that is [`REVERIFY`] old: passed over, it has no effect at all. A fleet that polls every second without news
//! thus costs a thirtieth of the signatures.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use dwcp_flags::poll::{PollReport, SignedReport, report_message};
use dwcp_flags::{Epoch, Path};
use serde::Serialize;

use crate::state::{Node, State, Write};
use crate::store::Seen;

/// For how many milliseconds a report that says nothing new is not looked at.
pub(crate) const REVERIFY: u64 = 30_000;
/// After how many milliseconds of silence a node is absent: shown, and neither acked nor waited for.
pub(crate) const ABSENT: u64 = 10 * 60_000;
/// Names in a list for people; the rest is a number.
const NAMED: usize = 100;
/// Nodes that poll without being enrolled, of which the names are kept.
const MAX_STRANGERS: usize = 1000;

/// The nodes of the inventory and what they said. Times are milliseconds since 1970, on a clock that only goes forward
/// while the process lives.
#[derive(Debug)]
pub(crate) struct Fleet {
    cluster: String,
    members: RwLock<Arc<BTreeMap<String, Arc<Member>>>>,
    strangers: Mutex<BTreeSet<String>>,
    pub(crate) counts: [AtomicU64; Heard::ALL.len()],
}

/// One enrolled node.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) node: Node,
    live: Mutex<Live>,
}

/// What is known of a node at the moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Live {
    /// Its last report that counted, since this process started.
    pub(crate) report: Option<PollReport>,
    /// When it was heard, by this process or one before.
    pub(crate) seen_ms: Option<u64>,
    /// Boot and sequence of its last report, by this process or one before.
    last: Option<(u64, u64)>,
}

/// What became of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It counts.
    Counted,
    /// It says what is known, and was passed over.
    Same,
    /// It cannot be read, or is about another flag.
    Malformed,
    /// Its node is not enrolled.
    Stranger,
    /// It is for another cluster.
    OtherCluster,
    /// Not later than the one before.
    Replayed,
    /// Not signed by the node's key.
    Forged,
}

/// How far a flag has come.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Convergence {
    /// `998/1000`: nodes that have applied the flag as it is, of those that are not absent.
    pub(crate) acked: String,
    /// All of them have; and if the flag is off, no migration runs on v3 any more.
    pub(crate) converged: bool,
    /// Some of those that have not.
    pub(crate) laggards: Vec<String>,
    pub(crate) laggards_total: u64,
    /// Some of those that were not heard for ten minutes, or never.
    pub(crate) absent: Vec<String>,
    pub(crate) absent_total: u64,
    /// Nodes whose new migrations take v3.
    pub(crate) nodes_on_v3: u64,
    /// Migrations on v3, counted at both ends.
    pub(crate) v3_inflight: u64,
    /// Sums of what the agents counted since their start.
    pub(crate) data_loss: u64,
    pub(crate) byzantine_successes: u64,
    pub(crate) critical_errors: u64,
    #[serde(skip)]
    pub(crate) acked_total: u64,
    #[serde(skip)]
    pub(crate) present_total: u64,
}

impl Fleet {
    /// The inventory, and when its nodes were heard before this process.
    pub(crate) fn new(state: &State, seen: Vec<Seen>) -> Self {
        let member = |(name, node): (&String, &Node)| (name.clone(), Arc::new(Member::new(node.clone())));
        let members: BTreeMap<_, _> = state.nodes.iter().map(member).collect();
        for Seen { node, boot, sequence, at_ms } in seen {
            if let Some(member) = members.get(&node) {
                let mut live = member.live();
                (live.seen_ms, live.last) = (Some(at_ms), Some((boot, sequence)));
            }
        }
        Fleet {
            cluster: state.cluster.clone(),
            members: RwLock::new(Arc::new(members)),
            strangers: Mutex::default(),
            counts: Default::default(),
        }
    }

    /// Follows changes of the inventory.
    pub(crate) fn follow(&self, writes: &[Write]) {
        if !writes.iter().any(|write| matches!(write, Write::Node(_) | Write::Gone(_))) {
            return;
        }
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = BTreeMap::clone(&members);
        for write in writes {
            match write {
                Write::Flag(_) => {}
                Write::Node(node) => {
                    let member = Member::new(node.clone());
                    // Under another key it is another agent.
                    if let Some(before) =
                        changed.get(node.name()).filter(|before| before.node.key == node.key)
                    {
                        *member.live() = before.live().clone();
                    }
                    self.strangers.lock().unwrap_or_else(PoisonError::into_inner).remove(node.name());
                    changed.insert(node.name().to_owned(), Arc::new(member));
                }
                Write::Gone(name) => drop(changed.remove(name)),
            }
        }
        *members = Arc::new(changed);
    }

    /// Takes in what a node says with a poll of `feature`.
    pub(crate) fn hear(&self, header: &[u8], feature: &str, now_ms: u64) -> (Heard, Option<SignedReport>) {
        let Ok(signed) = SignedReport::from_header(header) else {
            return (self.count(Heard::Malformed), None);
        };
        let heard = match PollReport::decode(&signed.report) {
            Ok(report) if report.feature == feature => self.take(report, &signed, now_ms),
            _ => Heard::Malformed,
        };
        (self.count(heard), Some(signed))
    }

    /// The members as they are now.
    pub(crate) fn members(&self) -> Arc<BTreeMap<String, Arc<Member>>> {
        Arc::clone(&self.members.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nodes that poll and are not enrolled: some names.
    pub(crate) fn strangers(&self) -> Vec<String> {
        self.strangers.lock().unwrap_or_else(PoisonError::into_inner).iter().take(NAMED).cloned().collect()
    }

    /// How far the flag has come that is at `epoch`, and reaches anyone or not.
    pub(crate) fn convergence(&self, epoch: Epoch, off: bool, now_ms: u64) -> Convergence {
        let mut sum = Convergence::default();
        for (name, member) in self.members().iter() {
            let live = member.live();
            if live.is_absent(now_ms) {
                // Nobody waits for one that was taken out of service.
                if !member.node.drained {
                    note(&mut sum.absent, &mut sum.absent_total, name);
                }
                continue;
            }
            sum.present_total += 1;
            match live.has_applied(epoch, &self.cluster) {
                true => sum.acked_total += 1,
                false => note(&mut sum.laggards, &mut sum.laggards_total, name),
            }
            if let Some(report) = &live.report {
                sum.nodes_on_v3 += u64::from(report.path == Path::V3);
                sum.v3_inflight += u64::from(report.v3_inflight);
                sum.data_loss = sum.data_loss.saturating_add(report.data_loss);
                sum.byzantine_successes = sum.byzantine_successes.saturating_add(report.byzantine_successes);
                sum.critical_errors = sum.critical_errors.saturating_add(report.critical_errors);
            }
        }
        sum.acked = format!("{}/{}", sum.acked_total, sum.present_total);
        sum.converged = sum.laggards_total == 0 && !(off && sum.v3_inflight > 0);
        sum
    }

    /// Who was heard since `since_ms`, to be kept over a restart.
    pub(crate) fn seen_since(&self, since_ms: u64) -> Vec<Seen> {
        let members = self.members();
        let seen = members.iter().filter_map(|(name, member)| {
            let live = member.live();
            let (boot, sequence) = live.last?;
            let at_ms = live.seen_ms.filter(|seen| *seen >= since_ms)?;
            Some(Seen { node: name.clone(), boot, sequence, at_ms })
        });
        seen.collect()
    }

    fn take(&self, report: PollReport, signed: &SignedReport, now_ms: u64) -> Heard {
        let members = self.members();
        let Some(member) = members.get(&report.node) else {
            let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
            if strangers.len() < MAX_STRANGERS {
                strangers.insert(report.node);
            }
            return Heard::Stranger;
        };
        // A node that obeys no cluster yet says so.
        if !report.cluster.is_empty() && report.cluster != self.cluster {
            return Heard::OtherCluster;
        }
        let mut live = member.live();
        if live.last.is_some_and(|last| (report.boot, report.sequence) <= last) {
            return Heard::Replayed;
        }
        let recent = live.seen_ms.is_some_and(|seen| now_ms.saturating_sub(seen) < REVERIFY);
        if recent && live.report.as_ref().is_some_and(|last| report.says_the_same(last)) {
            return Heard::Same;
        }
        if !member.node.key.verify(&report_message(&signed.report), &signed.signature) {
            return Heard::Forged;
        }
        *live =
            Live { last: Some((report.boot, report.sequence)), seen_ms: Some(now_ms), report: Some(report) };
        Heard::Counted
    }

    fn count(&self, heard: Heard) -> Heard {
        self.counts[heard as usize].fetch_add(1, Ordering::Relaxed);
        heard
    }
}

impl Member {
    fn new(node: Node) -> Self {
        Member { node, live: Mutex::default() }
    }

    /// What is known of it now.
    pub(crate) fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the operators say of it, and what it says of itself where they say nothing.
    pub(crate) fn labels(&self, live: &Live) -> BTreeMap<String, String> {
        let mut labels = live.report.as_ref().map(|report| report.labels.clone()).unwrap_or_default();
        labels.extend(self.node.labels.clone());
        labels
    }
}

impl Live {
    pub(crate) fn is_absent(&self, now_ms: u64) -> bool {
        self.seen_ms.is_none_or(|seen| now_ms.saturating_sub(seen) >= ABSENT)
    }

    pub(crate) fn has_applied(&self, epoch: Epoch, cluster: &str) -> bool {
        self.report.as_ref().is_some_and(|report| report.cluster == cluster && report.applied == Some(epoch))
    }
}

impl Heard {
    pub(crate) const ALL: [Heard; 7] = [
        Heard::Counted,
        Heard::Same,
        Heard::Malformed,
        Heard::Stranger,
        Heard::OtherCluster,
        Heard::Replayed,
        Heard::Forged,
    ];

    /// A stable name for metrics.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Heard::Counted => "counted",
            Heard::Same => "same",
            Heard::Malformed => "malformed",
            Heard::Stranger => "stranger",
            Heard::OtherCluster => "other_cluster",
            Heard::Replayed => "replayed",
            Heard::Forged => "forged",
        }
    }
}

fn note(names: &mut Vec<String>, total: &mut u64, name: &str) {
    *total += 1;
    if names.len() < NAMED {
        names.push(name.to_owned());
    }
}

#[cfg(test)]
mod tests {
    use dwcp_flags::FEATURE;
    use dwcp_proto::{NodeKey, NodeName};

    use super::*;

    const EPOCH: Epoch = Epoch { incarnation: 1, counter: 5 };

    fn key(name: &str, seed: u8) -> NodeKey {
        NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32])
    }

    fn node(name: &str, seed: u8) -> Node {
        Node { key: key(name, seed).public(), labels: BTreeMap::new(), drained: false }
    }

    fn fleet() -> Fleet {
        let mut state = State::new("c1".into());
        state.take(vec![Write::Node(node("a", 1)), Write::Node(node("b", 2))]);
        Fleet::new(&state, Vec::new())
    }

    fn report(node: &str, sequence: u64) -> PollReport {
        PollReport {
            node: node.into(),
            cluster: "c1".into(),
            feature: FEATURE.into(),
            boot: 1,
            sequence,
            applied: Some(EPOCH),
            path: Path::V1,
            reason: "flag_disabled".into(),
            v3_inflight: 0,
            data_loss: 0,
            byzantine_successes: 0,
            critical_errors: 0,
            labels: BTreeMap::new(),
        }
    }

    fn hear(fleet: &Fleet, report: &PollReport, seed: u8, now_ms: u64) -> Heard {
        let bytes = report.encode().unwrap();
        let signature = key(&report.node, seed).sign(&report_message(&bytes));
        let header = SignedReport { signature, report: bytes }.to_header();
        fleet.hear(header.as_bytes(), FEATURE, now_ms).0
    }

    fn acked(fleet: &Fleet, now_ms: u64) -> String {
        fleet.convergence(EPOCH, true, now_ms).acked
    }

    #[test]
    fn only_what_a_nodes_key_signed_counts() {
        let fleet = fleet();
        assert_eq!(hear(&fleet, &report("a", 1), 9, 0), Heard::Forged);
        assert_eq!(hear(&fleet, &report("x", 1), 9, 0), Heard::Stranger);
        assert_eq!(
            hear(&fleet, &PollReport { cluster: "c2".into(), ..report("a", 1) }, 1, 0),
            Heard::OtherCluster
        );
        assert_eq!(
            hear(&fleet, &PollReport { feature: "f".into(), ..report("a", 1) }, 1, 0),
            Heard::Malformed
        );
        assert_eq!(fleet.hear(b"junk", FEATURE, 0), (Heard::Malformed, None));
        assert_eq!(acked(&fleet, 0), "0/0");
        assert_eq!(fleet.strangers(), ["x"]);
        assert_eq!(hear(&fleet, &report("a", 1), 1, 0), Heard::Counted);
        assert_eq!(acked(&fleet, 0), "1/1");
    }

    #[test]
    fn a_replay_does_not_count() {
        let fleet = fleet();
        let on_v3 = PollReport { v3_inflight: 1, ..report("a", 7) };
        assert_eq!(hear(&fleet, &on_v3, 1, 0), Heard::Counted);
        assert_eq!(hear(&fleet, &report("a", 8), 1, 0), Heard::Counted);
        assert_eq!(hear(&fleet, &on_v3, 1, 0), Heard::Replayed);
        assert_eq!(hear(&fleet, &PollReport { boot: 0, ..report("a", 9) }, 1, 0), Heard::Replayed);
        assert_eq!(fleet.convergence(EPOCH, true, 0).v3_inflight, 0);
        // Known over a restart of the server.
        let mut state = State::new("c1".into());
        state.take(vec![Write::Node(node("a", 1))]);
        let fleet = Fleet::new(&state, fleet.seen_since(0));
        assert_eq!(hear(&fleet, &on_v3, 1, 0), Heard::Replayed);
        assert_eq!(acked(&fleet, 0), "0/1");
        assert_eq!(hear(&fleet, &report("a", 9), 1, 0), Heard::Counted);
    }

    #[test]
    fn what_says_nothing_new_is_passed_over_without_effect() {
        let fleet = fleet();
        assert_eq!(hear(&fleet, &report("a", 1), 1, 0), Heard::Counted);
        // Unverified, so whoever signed it: the true ones are not replays for it.
        assert_eq!(hear(&fleet, &report("a", 1000), 9, 5), Heard::Same);
        assert_eq!(hear(&fleet, &report("a", 2), 1, REVERIFY - 1), Heard::Same);
        assert_eq!(hear(&fleet, &report("a", 3), 1, REVERIFY), Heard::Counted);
        assert_eq!(
            hear(&fleet, &PollReport { critical_errors: 1, ..report("a", 4) }, 1, REVERIFY),
            Heard::Counted
        );
    }

    #[test]
    fn laggards_are_waited_for_and_the_absent_are_shown() {
        let fleet = fleet();
        hear(&fleet, &report("a", 1), 1, 0);
        hear(&fleet, &PollReport { applied: None, ..report("b", 1) }, 2, 0);
        let sum = fleet.convergence(EPOCH, true, 0);
        assert_eq!((sum.acked.as_str(), sum.converged, sum.laggards), ("1/2", false, vec!["b".to_owned()]));
        hear(&fleet, &report("a", 2), 1, ABSENT);
        let sum = fleet.convergence(EPOCH, true, ABSENT);
        assert_eq!((sum.acked.as_str(), sum.converged, sum.absent), ("1/1", true, vec!["b".to_owned()]));
        fleet.follow(&[Write::Node(Node { drained: true, ..node("b", 2) })]);
        assert_eq!(fleet.convergence(EPOCH, true, ABSENT).absent_total, 0);
    }

    #[test]
    fn an_off_flag_has_converged_when_nothing_runs_on_v3() {
        let fleet = fleet();
        hear(&fleet, &PollReport { v3_inflight: 1, ..report("a", 1) }, 1, 0);
        assert!(!fleet.convergence(EPOCH, true, 0).converged);
        assert!(fleet.convergence(EPOCH, false, 0).converged);
        hear(&fleet, &report("a", 2), 1, 0);
        assert!(fleet.convergence(EPOCH, true, 0).converged);
    }

    #[test]
    fn a_node_with_another_key_starts_anew() {
        let fleet = fleet();
        hear(&fleet, &report("a", 5), 1, 0);
        fleet.follow(&[Write::Node(node("a", 7)), Write::Gone("b".into())]);
        assert_eq!(acked(&fleet, 0), "0/0");
        assert_eq!(hear(&fleet, &report("a", 6), 1, 0), Heard::Forged);
        assert_eq!(hear(&fleet, &report("a", 1), 7, 0), Heard::Counted);
        assert_eq!(hear(&fleet, &report("b", 1), 2, 0), Heard::Stranger);
    }
}
