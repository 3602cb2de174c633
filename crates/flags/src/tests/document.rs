//! What is read, and what is refused with its place.

use proptest::prelude::*;

use crate::*;

fn parse(text: &str) -> Result<FlagDocument, BadDocument> {
    FlagDocument::parse(text.as_bytes(), FEATURE)
}

fn refusal(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

/// The body of the plans' POST, with another percentage.
fn body(percentage: &str) -> String {
    format!("{{\n  \"feature\": \"dwcp_v3_hde\",\n  \"percentage\": {percentage},\n  \"enabled\": true\n}}")
}

#[test]
fn the_body_of_the_plans_post_is_a_document() {
    let document = parse(&body("10")).unwrap();
    assert_eq!(
        (document.feature.as_str(), document.enabled, document.percentage.value()),
        (FEATURE, true, 10)
    );
    assert_eq!((document.on_stale, document.epoch), (OnStale::V1New, None));
    assert!(document.excluded.is_empty() && document.canaries.is_empty());
}

#[test]
fn every_key_is_read() {
    let document = parse(
        r#"{"feature":"dwcp_v3_hde","enabled":false,"percentage":100,"excluded":["b","a","b"],"canaries":["hv-01.dc1"],
            "on_stale":"v1-all","epoch":{"incarnation":2,"counter":18446744073709551615}}"#,
    )
    .unwrap();
    assert_eq!(document.excluded.into_iter().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(document.canaries.into_iter().collect::<Vec<_>>(), ["hv-01.dc1"]);
    assert_eq!(document.on_stale, OnStale::V1All);
    assert_eq!(document.epoch.unwrap().to_string(), "2.18446744073709551615");
    assert_eq!(
        parse(&body("0").replace("true", r#"true, "on_stale": "hold""#)).unwrap().on_stale,
        OnStale::Hold
    );
}

#[test]
fn a_percentage_is_a_whole_number_from_0_to_100() {
    for bad in
        ["101", "-1", "10.5", "10.0", "1e1", "\"10\"", "null", "true", "[10]", "256", "99999999999999999999"]
    {
        let expected =
            format!("line 3, column 17: \"percentage\" must be a whole number from 0 to 100, not {bad}");
        assert_eq!(refusal(&body(bad)), expected);
    }
    assert_eq!(refusal(&body("NaN")), "line 3, column 17: expected value");
    assert_eq!(refusal(&body("010")), "line 3, column 18: invalid number");
}

#[test]
fn a_comment_is_named_as_what_it_is() {
    let printed = "{\n  \"feature\": \"dwcp_v3_hde\",\n  \"percentage\": 10,  # or 0\n  \"enabled\": true\n}";
    assert_eq!(refusal(printed), "line 3, column 22: JSON has no comments: remove it");
    assert_eq!(refusal(&body("10 // or 0")), "line 3, column 20: JSON has no comments: remove it");
}

#[test]
fn keys_are_known_complete_and_given_once() {
    let ok = r#"{"feature":"dwcp_v3_hde","enabled":true,"percentage":1"#;
    for (text, reason) in [
        (format!(r#"{ok},"percentage":2}}"#), "duplicate field `percentage`"),
        (format!(r#"{ok},"p\u0065rcentage":2}}"#), "duplicate field `percentage`"),
        (format!(r#"{ok},"percent":2}}"#), "unknown field `percent`"),
        (r#"{"feature":"dwcp_v3_hde","enabled":true}"#.into(), "missing field `percentage`"),
        (format!(r#"{ok}}} {{}}"#), "trailing characters"),
        (ok.into(), "EOF while parsing an object"),
        (String::new(), "EOF while parsing a value"),
    ] {
        let error = parse(&text).unwrap_err();
        assert!(error.to_string().contains(reason), "{text}: {error}");
        assert!(error.line == 1 && error.column <= text.len().max(1), "{text}: {error}");
    }
    let epoch = |epoch: &str| refusal(&format!(r#"{ok},"epoch":{epoch}}}"#));
    for bad in [
        r#"{"incarnation":1}"#,
        r#"{"incarnation":1,"counter":1,"counter":2}"#,
        "7",
        r#"{"incarnation":-1,"counter":1}"#,
    ] {
        assert!(epoch(bad).starts_with("line 1, column 64: \"epoch\" must be {"), "{}", epoch(bad));
    }
}

#[test]
fn another_flag_is_unknown() {
    let other = body("10").replace(FEATURE, "dwcp_v4");
    assert_eq!(refusal(&other), "line 2, column 14: unknown feature \"dwcp_v4\"");
    assert_eq!(Absence::from(&parse(&other).unwrap_err()), Absence::UnknownFlag);
    assert_eq!(Absence::from(&parse("").unwrap_err()), Absence::Malformed);
    assert!(FlagDocument::parse(other.as_bytes(), "dwcp_v4").is_ok());
}

#[test]
fn lists_hold_node_names_and_have_an_end() {
    let with = |list: &str| body("1").replace("true", &format!("true,\n  \"excluded\": {list}"));
    for bad in ["\"\"", "\"a b\"", "\"../x\"", "7", "\"é\"", &format!("\"{}\"", "x".repeat(65))] {
        let error = refusal(&with(&format!("[\"fine\", {bad}]")));
        assert!(error.starts_with("line 5, column 24: \"excluded\" must be a list of node names"), "{error}");
    }
    assert!(refusal(&with("\"hv-01\"")).contains("must be a list of node names"));
    let list = |count: usize| {
        let names: Vec<String> = (0..count).map(|n| format!("\"{n:064}\"")).collect();
        format!("[{}]", names.join(","))
    };
    // Both lists at their longest fit into a document.
    let longest = parse(&with(&format!("{0}, \"canaries\": {0}", list(MAX_NODES)))).unwrap();
    assert_eq!((longest.excluded.len(), longest.canaries.len()), (MAX_NODES, MAX_NODES));
    assert!(refusal(&with(&list(MAX_NODES + 1))).contains("lists more than"));
    assert_eq!(
        refusal(&format!("{}{}", " ".repeat(MAX_DOCUMENT), body("1"))),
        "line 1, column 1: longer than 1048576 bytes"
    );
}

#[test]
fn what_a_message_quotes_cannot_forge_a_log_line() {
    let error = refusal(&format!("{{\"a\\nforged line\": 1, \"{}\": 2}}", "x".repeat(10_000)));
    assert!(!error.contains('\n') && error.len() < 400, "{error}");
    let long = refusal(&body(&format!("\"{}\"", "9".repeat(100_000))));
    assert!(long.len() < 400, "{long}");
    assert_eq!(
        FlagDocument::parse(b"{\n \"feature\": \"\xff\"}", FEATURE).unwrap_err().to_string(),
        "line 2, column 14: not UTF-8"
    );
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = FlagDocument::parse(&bytes, FEATURE);
    }

    #[test]
    fn a_damaged_document_is_read_or_refused(at in 0usize..90, byte in any::<u8>()) {
        let mut bytes = body("42").into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Err(error) = FlagDocument::parse(&bytes, FEATURE) {
            prop_assert!(error.line <= 6 && error.column <= 40, "{}", error);
        }
    }

    #[test]
    fn a_document_reads_back_as_it_was_written(document in document()) {
        prop_assert_eq!(FlagDocument::parse(document.to_json().as_bytes(), FEATURE).unwrap(), document);
    }
}

/// Any legal document.
pub(super) fn document() -> impl Strategy<Value = FlagDocument> {
    let nodes = || proptest::collection::btree_set("[a-c]", 0..3);
    let on_stale = prop_oneof![Just(OnStale::V1New), Just(OnStale::V1All), Just(OnStale::Hold)];
    let epoch = (0u64..3, 0u64..4).prop_map(|(incarnation, counter)| Epoch { incarnation, counter });
    (any::<bool>(), 0u8..=100, nodes(), nodes(), on_stale, proptest::option::of(epoch)).prop_map(
        |(enabled, percentage, excluded, canaries, on_stale, epoch)| FlagDocument {
            feature: FEATURE.into(),
            enabled,
            percentage: Percentage::new(percentage).unwrap(),
            excluded,
            canaries,
            on_stale,
            epoch,
        },
    )
}
