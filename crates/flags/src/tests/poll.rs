//! Reports and answers: one form for one content, and nothing else is read.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::poll::*;
use crate::{Epoch, FEATURE, Path};

fn report() -> PollReport {
    PollReport {
        node: "hv-01.dc1".into(),
        cluster: "c0ffee".into(),
        feature: FEATURE.into(),
        boot: 7,
        sequence: 42,
        applied: Some(Epoch { incarnation: 1, counter: 9 }),
        path: Path::V3,
        reason: "flag_in_cohort".into(),
        v3_inflight: 2,
        data_loss: 0,
        byzantine_successes: 0,
        critical_errors: 1,
        labels: BTreeMap::from([("datacenter".into(), "dc1".into()), ("rack".into(), "4".into())]),
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}"
}

fn any_report() -> impl Strategy<Value = PollReport> {
    let epoch = any::<(u64, u64)>().prop_map(|(incarnation, counter)| Epoch { incarnation, counter });
    let names = (name(), prop_oneof![Just(String::new()), name()], name(), name());
    let numbers = any::<(u64, u64, u32, u64, u64, u64)>();
    let labels = prop::collection::btree_map(name(), name(), 0..=MAX_LABELS);
    (names, numbers, prop::option::of(epoch), any::<bool>(), labels).prop_map(
        |((node, cluster, feature, reason), (boot, sequence, inflight, a, b, c), applied, v3, labels)| {
            PollReport {
                node,
                cluster,
                feature,
                boot,
                sequence,
                applied,
                path: if v3 { Path::V3 } else { Path::V1 },
                reason,
                v3_inflight: inflight,
                data_loss: a,
                byzantine_successes: b,
                critical_errors: c,
                labels,
            }
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_is_read_back(report in any_report(), signature in any::<[u8; 32]>()) {
        let bytes = report.encode().unwrap();
        prop_assert!(bytes.len() <= MAX_REPORT);
        prop_assert_eq!(&PollReport::decode(&bytes).unwrap(), &report);
        let signed = SignedReport { signature: [signature, signature].concat().try_into().unwrap(), report: bytes };
        let header = signed.to_header();
        prop_assert!(header.len() <= MAX_REPORT_HEADER);
        prop_assert_eq!(SignedReport::from_header(header.as_bytes()).unwrap(), signed);
    }

    #[test]
    fn what_is_read_has_one_form(change in any::<(prop::sample::Index, u8)>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = report().encode().unwrap();
        prop_assert!(PollReport::decode(&bytes[..cut.index(bytes.len())]).is_err());
        let at = change.0.index(bytes.len());
        bytes[at] = change.1;
        if let Ok(report) = PollReport::decode(&bytes) {
            prop_assert_eq!(report.encode().unwrap(), bytes);
        }
    }
}

#[test]
fn what_is_too_much_is_refused() {
    let bytes = report().encode().unwrap();
    assert_eq!(PollReport::decode(&[&bytes[..], b"x"].concat()), Err(BadReport::Trailing));
    assert_eq!(PollReport::decode(&[0; MAX_REPORT + 1]), Err(BadReport::TooLong));
    assert_eq!(PollReport::decode(&[&[2], &bytes[1..]].concat()), Err(BadReport::Version(2)));
    assert_eq!(SignedReport::from_header(&[b'A'; MAX_REPORT_HEADER + 4]), Err(BadReport::TooLong));
    assert_eq!(SignedReport::from_header(b"AAAA"), Err(BadReport::Short));
    assert_eq!(SignedReport::from_header(b"\xff"), Err(BadReport::Base64));
    let many = (0..=MAX_LABELS).map(|n| (format!("l{n}"), "x".to_owned())).collect();
    assert_eq!(PollReport { labels: many, ..report() }.encode(), Err(BadReport::Field("labels")));
    assert_eq!(PollReport { node: "a b".into(), ..report() }.encode(), Err(BadReport::Field("node")));
    assert!(PollReport { cluster: String::new(), ..report() }.encode().is_ok());
}

#[test]
fn a_later_report_may_say_the_same() {
    let later = PollReport { sequence: 43, ..report() };
    assert!(later.is_after(&report()) && !report().is_after(&later) && !report().is_after(&report()));
    assert!(later.says_the_same(&report()));
    assert!(!PollReport { v3_inflight: 0, ..later.clone() }.says_the_same(&report()));
    assert!(PollReport { boot: 8, sequence: 0, ..later.clone() }.is_after(&later));
}

#[test]
fn the_document_of_an_answer_is_read_and_the_rest_is_not() {
    let flag =
        r#"{"feature":"dwcp_v3_hde","enabled":true,"percentage":10,"epoch":{"incarnation":1,"counter":2}}"#;
    let body = format!(r#"{{"flag": {flag}, "acked": "1/2", "laggards": ["hv-02"]}}"#);
    let served = Served::parse(body.as_bytes(), FEATURE).unwrap();
    assert_eq!((served.document.percentage.value(), served.text.as_str()), (10, flag));
    for bad in ["", "{}", "[]", r#"{"flag": 1}"#, flag, r#"{"flag": {}, "flag": {}}"#] {
        assert!(Served::parse(bad.as_bytes(), FEATURE).is_err(), "{bad}");
    }
    assert!(Served::parse(&vec![b' '; MAX_ANSWER + 1], FEATURE).is_err());
}

#[test]
fn an_answers_signature_is_for_one_report() {
    let signature = AnswerSignature { age_ms: 12, signature: [9; 64] };
    assert_eq!(AnswerSignature::from_header(&signature.to_header()), Some(signature));
    for bad in ["", "12", "12 AAAA", "x AAAA", &"1".repeat(1000)] {
        assert_eq!(AnswerSignature::from_header(bad), None, "{bad}");
    }
    // Bytes cannot move from one part into the next.
    assert_ne!(answer_message("ab", b"c", 0, ""), answer_message("a", b"bc", 0, ""));
    assert_ne!(answer_message("a", b"c", 0, "d"), answer_message("a", b"c", 1, "d"));
}
