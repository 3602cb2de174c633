//! What an operator asks a flag server for: the bodies of its POST requests, and whether a change goes towards v3.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::document::{BadDocument, Epoch, Fault, FlagDocument, OnStale, Percentage};
use crate::text::Text;

/// The body of `POST /v1/feature-flags`: a flag document in which what is left out stays as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlagChange {
    /// The flag's name.
    pub feature: String,
    /// See [`FlagDocument::enabled`].
    pub enabled: bool,
    /// See [`FlagDocument::percentage`].
    pub percentage: Percentage,
    /// The whole list, in place of the one before.
    pub excluded: Option<BTreeSet<String>>,
    /// The whole list, in place of the one before.
    pub canaries: Option<BTreeSet<String>>,
    /// What an expired lease does.
    pub on_stale: Option<OnStale>,
    /// The epoch that the change was made against: a server refuses to raise a flag that has changed since.
    pub epoch: Option<Epoch>,
}

impl FlagChange {
    /// Reads a change of the flag `feature`; one of another flag is refused as unknown.
    ///
    /// # Errors
    /// With the place and the reason. Nothing is guessed, see [`FlagDocument`].
    pub fn parse(bytes: &[u8], feature: &str) -> Result<Self, BadDocument> {
        let text = Text::new(bytes)?;
        let fields: Fields<'_> = text.fields()?;
        let nodes = |raw: Option<&RawValue>, key| raw.map(|raw| text.nodes(raw, key)).transpose();
        let on_stale = |raw| text.read(raw, "on_stale", r#""v1-new", "v1-all" or "hold""#);
        let epoch =
            |raw| text.read(raw, "epoch", r#"{"incarnation": N, "counter": N}, each once and from 0 up"#);
        let name = text.read::<String>(fields.feature, "feature", "a name in quotes")?;
        let change = FlagChange {
            feature: name,
            enabled: text.read(fields.enabled, "enabled", "true or false")?,
            percentage: text.read(fields.percentage, "percentage", "a whole number from 0 to 100")?,
            excluded: nodes(fields.excluded, "excluded")?,
            canaries: nodes(fields.canaries, "canaries")?,
            on_stale: fields.on_stale.map(on_stale).transpose()?,
            epoch: fields.epoch.map(epoch).transpose()?,
        };
        text.feature(fields.feature, feature)?;
        Ok(change)
    }

    /// The document that follows from `before`; its epoch is that of `before` still.
    pub fn over(&self, before: &FlagDocument) -> FlagDocument {
        FlagDocument {
            feature: before.feature.clone(),
            enabled: self.enabled,
            percentage: self.percentage,
            excluded: self.excluded.clone().unwrap_or_else(|| before.excluded.clone()),
            canaries: self.canaries.clone().unwrap_or_else(|| before.canaries.clone()),
            on_stale: self.on_stale.unwrap_or(before.on_stale),
            epoch: before.epoch,
        }
    }
}

/// The body of `POST /v1/feature-flags/exclude` and `/include`: nodes that are added to, or taken from, the excluded ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeList {
    /// The flag's name.
    pub feature: String,
    /// At least one.
    pub nodes: BTreeSet<String>,
}

impl NodeList {
    /// Reads a list for the flag `feature`.
    ///
    /// # Errors
    /// With the place and the reason, as [`FlagChange::parse`].
    pub fn parse(bytes: &[u8], feature: &str) -> Result<Self, BadDocument> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields<'a> {
            #[serde(borrow)]
            feature: &'a RawValue,
            #[serde(borrow)]
            nodes: &'a RawValue,
        }
        let text = Text::new(bytes)?;
        let fields: Fields<'_> = text.fields()?;
        let nodes = text.nodes(fields.nodes, "nodes")?;
        if nodes.is_empty() {
            return Err(text.fault(fields.nodes, Fault::Empty { key: "nodes" }));
        }
        Ok(NodeList { feature: text.feature(fields.feature, feature)?, nodes })
    }
}

impl FlagDocument {
    /// The percentage that is in force: 0 while the flag is off.
    pub fn reach(&self) -> u8 {
        if self.enabled { self.percentage.value() } else { 0 }
    }

    /// Whether, compared with `before`, any node could use v3 that could not, or for longer without the server. To lower a
    /// flag is always allowed; to raise one is not while it is frozen.
    pub fn raises(&self, before: &FlagDocument) -> bool {
        if self.reach() == 0 {
            return false;
        }
        self.reach() > before.reach()
            || !self.canaries.is_subset(&before.canaries)
            || !before.excluded.is_subset(&self.excluded)
            || patience(self.on_stale) > patience(before.on_stale)
    }
}

/// How long v3 stays when the server is silent, in order.
fn patience(on_stale: OnStale) -> u8 {
    match on_stale {
        OnStale::V1All => 0,
        OnStale::V1New => 1,
        OnStale::Hold => 2,
    }
}

/// A document's values as they stand in it, to be read one by one where their place is known.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields<'a> {
    #[serde(borrow)]
    feature: &'a RawValue,
    #[serde(borrow)]
    enabled: &'a RawValue,
    #[serde(borrow)]
    percentage: &'a RawValue,
    #[serde(borrow)]
    excluded: Option<&'a RawValue>,
    #[serde(borrow)]
    canaries: Option<&'a RawValue>,
    #[serde(borrow)]
    on_stale: Option<&'a RawValue>,
    #[serde(borrow)]
    epoch: Option<&'a RawValue>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Conditions, FEATURE, FlagState, Moment, Path, Scope, Source};

    fn document(json: &str) -> FlagDocument {
        FlagDocument::parse(json.as_bytes(), FEATURE).unwrap()
    }

    #[test]
    fn what_a_change_leaves_out_stays() {
        let before = document(
            r#"{"feature":"dwcp_v3_hde","enabled":false,"percentage":1,"excluded":["a"],"canaries":["b"],"on_stale":"v1-all"}"#,
        );
        let plans = br#"{"feature":"dwcp_v3_hde","percentage":10,"enabled":true}"#;
        let after = FlagChange::parse(plans, FEATURE).unwrap().over(&before);
        assert_eq!(
            (after.reach(), &after.excluded, &after.canaries),
            (10, &before.excluded, &before.canaries)
        );
        assert_eq!(after.on_stale, OnStale::V1All);
        let empty = br#"{"feature":"dwcp_v3_hde","percentage":10,"enabled":true,"excluded":[]}"#;
        assert!(FlagChange::parse(empty, FEATURE).unwrap().over(&before).excluded.is_empty());
    }

    #[test]
    fn a_list_is_read_and_a_bad_one_has_its_place() {
        let good = br#"{"feature": "dwcp_v3_hde", "nodes": ["node-123", "node-456"]}"#;
        assert_eq!(NodeList::parse(good, FEATURE).unwrap().nodes.len(), 2);
        for (bad, says) in [
            ("{\"feature\": \"dwcp_v3_hde\",\n \"nodes\": []}", "line 2, column 11: \"nodes\" is empty"),
            ("{\"feature\": \"other\", \"nodes\": [\"a\"]}", "line 1, column 13: unknown feature"),
            ("{\"feature\": \"dwcp_v3_hde\", \"nodes\": [\"a b\"]}", "line 1, column 38: \"nodes\" must be"),
            ("{\"feature\": \"dwcp_v3_hde\"}", "missing field `nodes`"),
        ] {
            let error = NodeList::parse(bad.as_bytes(), FEATURE).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    fn any_document() -> impl Strategy<Value = FlagDocument> {
        let nodes = || prop::collection::btree_set("n[0-9]", 0..4);
        let on_stale = prop_oneof![Just(OnStale::V1New), Just(OnStale::V1All), Just(OnStale::Hold)];
        (any::<bool>(), 0..=100u8, nodes(), nodes(), on_stale).prop_map(
            |(enabled, percentage, excluded, canaries, on_stale)| FlagDocument {
                feature: FEATURE.to_owned(),
                enabled,
                percentage: Percentage::new(percentage).unwrap(),
                excluded,
                canaries,
                on_stale,
                epoch: Some(Epoch { incarnation: 1, counter: 1 }),
            },
        )
    }

    proptest! {
        /// Against the evaluation itself: what is no raise gives v3 to nobody who did not have it, at no time.
        #[test]
        fn what_does_not_raise_lets_nobody_in(before in any_document(), after in any_document()) {
            prop_assume!(!after.raises(&before));
            for node in (0..10).map(|n| format!("n{n}")) {
                for (now, scope) in [(1, Scope::New), (9, Scope::New), (9, Scope::Running)] {
                    let v3 = |document: &FlagDocument| {
                        let mut state = FlagState::new(&*node, Source::Server(Default::default()));
                        state.apply(document.clone(), Moment::default()).unwrap();
                        let now = Moment(std::time::Duration::from_secs(now));
                        state.decide(now, scope, Conditions::default()).path() == Path::V3
                    };
                    prop_assert!(!v3(&after) || v3(&before), "{node}");
                }
            }
        }
    }
}
