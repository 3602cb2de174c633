//! What the server keeps, and the rules by which it changes. No I/O, no clock.
//!
//! ```text
//! Command --State::plan()--> writes --(on disk)--> State::take()
//!                 └--> Refused: nothing has changed
//! ```

use std::collections::{BTreeMap, BTreeSet};

use dwcp_flags::{Epoch, FEATURE, FlagChange, FlagDocument, MAX_NODES, NodeList, OnStale, Percentage};
use dwcp_proto::PeerKey;
use serde::{Deserialize, Serialize};

/// Nodes in the inventory.
pub(crate) const MAX_ENROLLED: usize = 100_000;

/// Unknown nodes that a refusal names.
const NAMED: usize = 10;

/// All that outlives the process.
#[derive(Debug, Clone)]
pub(crate) struct State {
    /// Which cluster this is, for life: a node obeys one and ignores the others.
    pub(crate) cluster: String,
    /// By name. The set is fixed: only flags that a node would obey.
    pub(crate) flags: BTreeMap<String, Flag>,
    /// The inventory, by name.
    pub(crate) nodes: BTreeMap<String, Node>,
}

/// A flag and what keeps it from being raised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flag {
    pub(crate) document: FlagDocument,
    pub(crate) holds: BTreeMap<HoldKind, Hold>,
}

/// What keeps a flag from being raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HoldKind {
    /// People decided that nothing moves for now.
    Freeze,
    /// A rollback happened; somebody has to say that its cause is gone.
    Latch,
}

/// One hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hold {
    pub(crate) by: String,
    pub(crate) reason: String,
    pub(crate) since_ms: u64,
}

/// A node of the inventory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Name and public key.
    pub(crate) key: PeerKey,
    /// What the operators say of it; goes before what it says of itself.
    pub(crate) labels: BTreeMap<String, String>,
    /// It is being taken out of service: its silence is no news.
    pub(crate) drained: bool,
}

/// A node to be taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Enrolment {
    pub(crate) key: PeerKey,
    /// Without them a known node keeps those that it has.
    pub(crate) labels: Option<BTreeMap<String, String>>,
}

/// What someone asks for.
#[derive(Debug, Clone)]
pub(crate) enum Command {
    /// Sets a flag; what the change leaves out stays.
    Set(FlagChange),
    /// Adds nodes to a flag's excluded ones.
    Exclude(NodeList),
    /// Takes nodes from them.
    Include(NodeList),
    /// Holds a flag down.
    Hold { feature: String, kind: HoldKind, reason: String },
    /// Lifts a hold.
    Lift { feature: String, kind: HoldKind },
    /// Takes nodes into the inventory, or changes what is known of them.
    Enrol(Vec<Enrolment>),
    /// Takes nodes out of service, or back into it.
    Drain { nodes: BTreeSet<String>, drained: bool },
    /// Forgets nodes.
    Remove(BTreeSet<String>),
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// Everything.
    Admin,
    /// To lower, exclude and hold: for those who may only roll back.
    Rollback,
    /// The inventory.
    Nodes,
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Actor {
    /// The name of the token.
    pub(crate) name: String,
    pub(crate) roles: BTreeSet<Role>,
}

/// One thing to write down, whole.
#[derive(Debug, Clone)]
pub(crate) enum Write {
    Flag(Flag),
    Node(Node),
    Gone(String),
}

/// Why a command is not obeyed. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// The token is good for other things.
    #[error("the token of {0} does not allow this")]
    Forbidden(String),
    /// No such flag.
    #[error("unknown feature \"{0}\"")]
    UnknownFeature(String),
    /// It would raise a flag that is held.
    #[error("{} may not be raised: {} by {}: {}", .feature, .kind.past(), .hold.by, .hold.reason)]
    Held { feature: String, kind: HoldKind, hold: Hold },
    /// It would raise a flag that is not any more as it was.
    #[error("{feature} has changed since epoch {given}: it is at {current}")]
    Stale { feature: String, given: Epoch, current: Epoch },
    /// The list of excluded nodes would be too long.
    #[error("a flag can exclude {MAX_NODES} nodes at most")]
    TooManyExcluded,
    /// The inventory would be too large.
    #[error("the inventory holds {MAX_ENROLLED} nodes at most")]
    TooManyNodes,
    /// Not in the inventory.
    #[error("not in the inventory: {}", .0.join(", "))]
    UnknownNodes(Vec<String>),
}

impl State {
    /// A new cluster: the flag that nodes obey, off.
    pub(crate) fn new(cluster: String) -> Self {
        let document = FlagDocument {
            feature: FEATURE.to_owned(),
            enabled: false,
            percentage: Percentage::default(),
            excluded: BTreeSet::new(),
            canaries: BTreeSet::new(),
            on_stale: OnStale::default(),
            epoch: Some(Epoch { incarnation: 1, counter: 1 }),
        };
        let flag = Flag { document, holds: BTreeMap::new() };
        State { cluster, flags: BTreeMap::from([(FEATURE.to_owned(), flag)]), nodes: BTreeMap::new() }
    }

    /// What would have to be written down for `command`; empty if everything is as it asks already.
    pub(crate) fn plan(&self, command: &Command, actor: &Actor, now_ms: u64) -> Result<Vec<Write>, Refused> {
        actor.may(command)?;
        match command {
            Command::Set(change) => {
                let flag = self.flag(&change.feature)?;
                self.replace(flag, change.over(&flag.document), change.epoch, actor)
            }
            Command::Exclude(list) => {
                let flag = self.flag(&list.feature)?;
                let mut document = flag.document.clone();
                document.excluded.extend(list.nodes.iter().cloned());
                self.replace(flag, document, None, actor)
            }
            Command::Include(list) => {
                let flag = self.flag(&list.feature)?;
                let mut document = flag.document.clone();
                document.excluded.retain(|node| !list.nodes.contains(node));
                self.replace(flag, document, None, actor)
            }
            Command::Hold { feature, kind, reason } => {
                let mut flag = self.flag(feature)?.clone();
                let hold = Hold { by: actor.name.clone(), reason: reason.clone(), since_ms: now_ms };
                flag.holds.insert(*kind, hold);
                Ok(vec![Write::Flag(flag)])
            }
            Command::Lift { feature, kind } => {
                let mut flag = self.flag(feature)?.clone();
                Ok(flag.holds.remove(kind).map(|_| Write::Flag(flag)).into_iter().collect())
            }
            Command::Enrol(nodes) => {
                let enrolled: BTreeMap<&str, Node> =
                    nodes.iter().map(|node| (node.key.node().as_str(), self.enrolled(node))).collect();
                let new = enrolled.keys().filter(|name| !self.nodes.contains_key(**name)).count();
                if self.nodes.len() + new > MAX_ENROLLED {
                    return Err(Refused::TooManyNodes);
                }
                let changed = enrolled.into_iter().filter(|(name, node)| self.nodes.get(*name) != Some(node));
                Ok(changed.map(|(_, node)| Write::Node(node)).collect())
            }
            Command::Drain { nodes, drained } => {
                let nodes = self.known(nodes)?.into_iter().filter(|node| node.drained != *drained);
                Ok(nodes.map(|node| Write::Node(Node { drained: *drained, ..node.clone() })).collect())
            }
            Command::Remove(nodes) => {
                Ok(self.known(nodes)?.into_iter().map(|node| Write::Gone(node.name().to_owned())).collect())
            }
        }
    }

    /// Takes in what has been written down.
    pub(crate) fn take(&mut self, writes: Vec<Write>) {
        for write in writes {
            match write {
                Write::Flag(flag) => drop(self.flags.insert(flag.document.feature.clone(), flag)),
                Write::Node(node) => drop(self.nodes.insert(node.name().to_owned(), node)),
                Write::Gone(name) => drop(self.nodes.remove(&name)),
            }
        }
    }

    fn flag(&self, feature: &str) -> Result<&Flag, Refused> {
        self.flags.get(feature).ok_or_else(|| Refused::UnknownFeature(feature.to_owned()))
    }

    /// The flag with another document, under the next epoch.
    fn replace(
        &self,
        flag: &Flag,
        mut document: FlagDocument,
        against: Option<Epoch>,
        actor: &Actor,
    ) -> Result<Vec<Write>, Refused> {
        let current = flag.epoch();
        let feature = || document.feature.clone();
        if document == flag.document {
            return Ok(Vec::new());
        }
        if document.excluded.len() > MAX_NODES {
            return Err(Refused::TooManyExcluded);
        }
        if document.raises(&flag.document) {
            if !actor.roles.contains(&Role::Admin) {
                return Err(Refused::Forbidden(actor.name.clone()));
            }
            if let Some((kind, hold)) = flag.holds.first_key_value() {
                return Err(Refused::Held { feature: feature(), kind: *kind, hold: hold.clone() });
            }
            if let Some(given) = against.filter(|given| *given != current) {
                return Err(Refused::Stale { feature: feature(), given, current });
            }
        }
        // A change a nanosecond would take six centuries to get there.
        document.epoch = Some(Epoch { counter: current.counter.saturating_add(1), ..current });
        Ok(vec![Write::Flag(Flag { document, holds: flag.holds.clone() })])
    }

    fn enrolled(&self, Enrolment { key, labels }: &Enrolment) -> Node {
        let known = self.nodes.get(key.node().as_str());
        let labels = labels.clone().or_else(|| known.map(|node| node.labels.clone()));
        Node {
            key: key.clone(),
            labels: labels.unwrap_or_default(),
            drained: known.is_some_and(|node| node.drained),
        }
    }

    fn known(&self, names: &BTreeSet<String>) -> Result<Vec<&Node>, Refused> {
        let unknown: Vec<String> =
            names.iter().filter(|name| !self.nodes.contains_key(*name)).take(NAMED).cloned().collect();
        match unknown.is_empty() {
            true => Ok(names.iter().filter_map(|name| self.nodes.get(name)).collect()),
            false => Err(Refused::UnknownNodes(unknown)),
        }
    }
}

impl Flag {
    /// The document's epoch, which a served one always has.
    pub(crate) fn epoch(&self) -> Epoch {
        self.document.epoch.unwrap_or(Epoch { incarnation: 0, counter: 0 })
    }
}

impl Node {
    pub(crate) fn name(&self) -> &str {
        self.key.node().as_str()
    }
}

impl HoldKind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            HoldKind::Freeze => "freeze",
            HoldKind::Latch => "latch",
        }
    }

    fn past(self) -> &'static str {
        match self {
            HoldKind::Freeze => "frozen",
            HoldKind::Latch => "rolled back and latched",
        }
    }
}

impl Command {
    /// A stable name for the audit and the metrics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Command::Set(_) => "set",
            Command::Exclude(_) => "exclude",
            Command::Include(_) => "include",
            Command::Hold { .. } => "hold",
            Command::Lift { .. } => "lift",
            Command::Enrol(_) => "enrol",
            Command::Drain { drained: true, .. } => "drain",
            Command::Drain { drained: false, .. } => "undrain",
            Command::Remove(_) => "remove",
        }
    }

    /// What was asked for, as JSON for the audit.
    pub(crate) fn detail(&self) -> serde_json::Value {
        use serde_json::json;
        match self {
            Command::Set(change) => {
                let mut detail = json!({
                    "feature": change.feature, "enabled": change.enabled, "percentage": change.percentage,
                });
                let lists = [("excluded", &change.excluded), ("canaries", &change.canaries)];
                for (key, list) in lists.into_iter().filter_map(|(key, list)| Some((key, list.as_ref()?))) {
                    detail[key] = json!(list);
                }
                if let Some(on_stale) = change.on_stale {
                    detail["on_stale"] = json!(on_stale);
                }
                detail
            }
            Command::Exclude(list) | Command::Include(list) => {
                json!({"feature": list.feature, "nodes": list.nodes})
            }
            Command::Hold { feature, kind, reason } => {
                json!({"feature": feature, "kind": kind, "reason": reason})
            }
            Command::Lift { feature, kind } => json!({"feature": feature, "kind": kind}),
            Command::Enrol(nodes) => {
                let node = |Enrolment { key, labels }: &Enrolment| json!({"name": key.node(), "key": key.fingerprint(), "labels": labels});
                json!({"nodes": nodes.iter().map(node).collect::<Vec<_>>()})
            }
            Command::Drain { nodes, .. } | Command::Remove(nodes) => json!({"nodes": nodes}),
        }
    }
}

impl Role {
    pub(crate) const ALL: [Role; 3] = [Role::Admin, Role::Rollback, Role::Nodes];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Admin => "admin",
            Role::Rollback => "rollback",
            Role::Nodes => "nodes",
        }
    }
}

impl Actor {
    /// Whether this is someone's to ask at all; what would raise a flag is looked at once more.
    fn may(&self, command: &Command) -> Result<(), Refused> {
        let role = match command {
            Command::Set(_) | Command::Exclude(_) | Command::Hold { .. } => Role::Rollback,
            Command::Include(_) | Command::Lift { .. } => Role::Admin,
            Command::Enrol(_) | Command::Drain { .. } | Command::Remove(_) => Role::Nodes,
        };
        match self.roles.contains(&Role::Admin) || self.roles.contains(&role) {
            true => Ok(()),
            false => Err(Refused::Forbidden(self.name.clone())),
        }
    }
}

#[cfg(test)]
mod tests {
    use dwcp_proto::{NodeKey, NodeName};

    use super::*;

    fn actor(role: Role) -> Actor {
        Actor { name: role.name().to_owned(), roles: BTreeSet::from([role]) }
    }

    fn set(percentage: u8, enabled: bool) -> Command {
        let body = format!(r#"{{"feature":"{FEATURE}","percentage":{percentage},"enabled":{enabled}}}"#);
        Command::Set(FlagChange::parse(body.as_bytes(), FEATURE).unwrap())
    }

    fn list(nodes: &str) -> NodeList {
        NodeList::parse(format!(r#"{{"feature":"{FEATURE}","nodes":{nodes}}}"#).as_bytes(), FEATURE).unwrap()
    }

    fn run(state: &mut State, command: &Command, role: Role) -> Result<usize, Refused> {
        let writes = state.plan(command, &actor(role), 5)?;
        let count = writes.len();
        state.take(writes);
        Ok(count)
    }

    fn epoch(state: &State) -> u64 {
        state.flags[FEATURE].epoch().counter
    }

    fn node(name: &str, seed: u8) -> Enrolment {
        let key = NodeKey::from_seed(NodeName::new(name).unwrap(), &[seed; 32]).public();
        Enrolment { key, labels: None }
    }

    #[test]
    fn each_change_has_an_epoch_and_what_is_no_change_has_none() {
        let mut state = State::new("c".into());
        assert_eq!(epoch(&state), 1);
        assert_eq!(run(&mut state, &set(10, true), Role::Admin), Ok(1));
        assert_eq!(run(&mut state, &set(10, true), Role::Admin), Ok(0));
        assert_eq!(epoch(&state), 2);
        assert_eq!(run(&mut state, &Command::Exclude(list(r#"["a","b"]"#)), Role::Admin), Ok(1));
        assert_eq!(run(&mut state, &Command::Include(list(r#"["a","z"]"#)), Role::Admin), Ok(1));
        let document = &state.flags[FEATURE].document;
        assert_eq!((document.excluded.len(), document.percentage.value(), epoch(&state)), (1, 10, 4));
    }

    #[test]
    fn a_held_flag_goes_down_but_not_up() {
        for kind in [HoldKind::Freeze, HoldKind::Latch] {
            let mut state = State::new("c".into());
            run(&mut state, &set(50, true), Role::Admin).unwrap();
            let hold = Command::Hold { feature: FEATURE.into(), kind, reason: "storm".into() };
            run(&mut state, &hold, Role::Rollback).unwrap();
            let refused = run(&mut state, &set(51, true), Role::Admin).unwrap_err();
            assert!(matches!(&refused, Refused::Held { kind: held, .. } if *held == kind), "{refused}");
            assert!(refused.to_string().contains("storm"), "{refused}");
            assert_eq!(epoch(&state), 2);
            run(&mut state, &Command::Exclude(list(r#"["a"]"#)), Role::Admin).unwrap();
            assert!(run(&mut state, &Command::Include(list(r#"["a"]"#)), Role::Admin).is_err());
            run(&mut state, &set(10, true), Role::Admin).unwrap();
            run(&mut state, &set(10, false), Role::Admin).unwrap();
            assert!(run(&mut state, &set(10, true), Role::Admin).is_err());
            let lift = Command::Lift { feature: FEATURE.into(), kind };
            assert!(run(&mut state, &lift, Role::Rollback).is_err());
            assert_eq!(
                (run(&mut state, &lift, Role::Admin), run(&mut state, &lift, Role::Admin)),
                (Ok(1), Ok(0))
            );
            run(&mut state, &set(100, true), Role::Admin).unwrap();
        }
    }

    #[test]
    fn a_raise_made_against_an_older_epoch_is_refused_and_a_lowering_is_not() {
        let mut state = State::new("c".into());
        run(&mut state, &set(50, true), Role::Admin).unwrap();
        let against = |counter, percentage| {
            let Command::Set(change) = set(percentage, true) else { unreachable!() };
            Command::Set(FlagChange { epoch: Some(Epoch { incarnation: 1, counter }), ..change })
        };
        assert!(matches!(run(&mut state, &against(1, 60), Role::Admin), Err(Refused::Stale { .. })));
        assert_eq!(run(&mut state, &against(1, 40), Role::Admin), Ok(1));
        assert_eq!(run(&mut state, &against(3, 60), Role::Admin), Ok(1));
    }

    #[test]
    fn a_role_allows_what_it_says() {
        let mut state = State::new("c".into());
        run(&mut state, &set(50, true), Role::Admin).unwrap();
        assert_eq!(run(&mut state, &set(10, true), Role::Rollback), Ok(1));
        for (command, role) in [
            (set(11, true), Role::Rollback),
            (set(0, false), Role::Nodes),
            (Command::Include(list(r#"["a"]"#)), Role::Rollback),
            (Command::Enrol(vec![node("a", 1)]), Role::Rollback),
        ] {
            let before = epoch(&state);
            assert!(matches!(run(&mut state, &command, role), Err(Refused::Forbidden(_))), "{command:?}");
            assert_eq!(epoch(&state), before);
        }
    }

    #[test]
    fn nodes_come_and_go() {
        let mut state = State::new("c".into());
        let enrol = Command::Enrol(vec![node("a", 1), node("b", 2)]);
        assert_eq!(run(&mut state, &enrol, Role::Nodes), Ok(2));
        assert_eq!(run(&mut state, &enrol, Role::Nodes), Ok(0));
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let drain = Command::Drain { nodes: names(&["a"]), drained: true };
        assert_eq!(
            (run(&mut state, &drain, Role::Nodes), run(&mut state, &drain, Role::Nodes)),
            (Ok(1), Ok(0))
        );
        // Enrolled again, under another key and with labels, it is drained still.
        let labels = BTreeMap::from([("datacenter".to_owned(), "dc1".to_owned())]);
        let again = Command::Enrol(vec![Enrolment { labels: Some(labels.clone()), ..node("a", 3) }]);
        assert_eq!(run(&mut state, &again, Role::Nodes), Ok(1));
        assert_eq!(run(&mut state, &Command::Enrol(vec![node("a", 4)]), Role::Nodes), Ok(1));
        assert!(state.nodes["a"].drained && state.nodes["a"].labels == labels);
        let remove = Command::Remove(names(&["a", "x"]));
        assert_eq!(run(&mut state, &remove, Role::Nodes), Err(Refused::UnknownNodes(vec!["x".into()])));
        assert_eq!(run(&mut state, &Command::Remove(names(&["a"])), Role::Nodes), Ok(1));
        assert_eq!(state.nodes.len(), 1);
    }
}
