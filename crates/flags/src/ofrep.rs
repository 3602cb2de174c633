//! The bulk evaluation of OFREP, the OpenFeature Remote Evaluation Protocol 0.3, as a client reads it.
//!
//! ```text
//! POST /ofrep/v1/evaluate/flags   {"context":{"targetingKey":"hv-01"}}     If-None-Match: ETAG
//! 200, ETag   {"flags":[{"key":"dwcp_v3_hde","value":true,"reason":"SPLIT"}, {"key":"other","errorCode":"..."}]}
//! 304         nothing has changed
//! ```
//!
//! The server decides, by its own rules and its own hash: there is no document, no epoch and no bucket, only the value.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::MAX_DOCUMENT;
use crate::state::{Absence, Evaluation};
use crate::text::shorten;

/// Where the bulk evaluation is, below the server's base URL.
pub const OFREP_PATH: &str = "/ofrep/v1/evaluate/flags";

/// The body of the request for a node.
pub fn request(node: &str) -> String {
    json!({"context": {"targetingKey": node}}).to_string()
}

/// Reads the body of a 200: what the server decided on `feature`.
pub fn parse(bytes: &[u8], feature: &str) -> Result<Evaluation, BadEvaluation> {
    if bytes.len() > MAX_DOCUMENT {
        return Err(BadEvaluation::Malformed(format!("longer than {MAX_DOCUMENT} bytes")));
    }
    let bulk: Bulk = serde_json::from_slice(bytes)
        .map_err(|error| BadEvaluation::Malformed(shorten(&error.to_string())))?;
    let mut flags = bulk.flags.into_iter().filter(|flag| flag.key == feature);
    let flag = flags.next().ok_or(BadEvaluation::Unknown)?;
    if flags.next().is_some() {
        return Err(BadEvaluation::Malformed(format!("\"{feature}\" is there twice")));
    }
    match (flag.error_code.as_deref(), flag.value) {
        (Some("FLAG_NOT_FOUND"), _) => Err(BadEvaluation::Unknown),
        (Some(code), _) => Err(BadEvaluation::Server {
            code: shorten(code),
            details: shorten(&flag.error_details.unwrap_or_default()),
        }),
        (None, _) if flag.reason.as_deref() == Some("DISABLED") => Ok(Evaluation::Disabled),
        (None, Some(Value::Bool(true))) => Ok(Evaluation::On),
        // No value means the default of the code, which is v1.
        (None, Some(Value::Bool(false)) | None) => Ok(Evaluation::Off),
        (None, Some(value)) => {
            let what = format!(
                "the value of \"{feature}\" must be true or false, not {}",
                shorten(&value.to_string())
            );
            Err(BadEvaluation::Malformed(what))
        }
    }
}

/// The body of an answer that means an error, in one line; `None` if it is none of OFREP's.
pub fn error(bytes: &[u8]) -> Option<String> {
    let flag: ErrorBody = serde_json::from_slice(bytes).ok()?;
    let details = flag.error_details.map(|details| format!(": {}", shorten(&details))).unwrap_or_default();
    Some(format!("{}{details}", shorten(&flag.error_code)))
}

/// Why there is no evaluation in an answer. Quoted text is escaped and cut short.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadEvaluation {
    /// The server does not know the flag.
    #[error("the flag server does not know the flag")]
    Unknown,
    /// The server failed to evaluate it.
    #[error("the flag server cannot evaluate the flag: {code} {details}")]
    Server {
        /// OFREP's error code.
        code: String,
        /// What the server adds.
        details: String,
    },
    /// It is not what OFREP says.
    #[error("{0}")]
    Malformed(String),
}

impl From<&BadEvaluation> for Absence {
    fn from(bad: &BadEvaluation) -> Self {
        match bad {
            BadEvaluation::Unknown => Absence::UnknownFlag,
            BadEvaluation::Server { .. } | BadEvaluation::Malformed(_) => Absence::Malformed,
        }
    }
}

#[derive(Deserialize)]
struct Bulk {
    flags: Vec<Flag>,
}

/// One flag; what else it holds is none of ours.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Flag {
    key: String,
    // A null is no value.
    value: Option<Value>,
    reason: Option<String>,
    error_code: Option<String>,
    error_details: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ErrorBody {
    error_code: String,
    error_details: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FEATURE;

    fn read(flags: &str) -> Result<Evaluation, BadEvaluation> {
        parse(format!(r#"{{"flags":[{flags}],"metadata":{{"x":1}}}}"#).as_bytes(), FEATURE)
    }

    #[test]
    fn the_value_decides_and_none_means_v1() {
        let flag =
            |rest: &str| read(&format!(r#"{{"key":"other","value":7}},{{"key":"dwcp_v3_hde"{rest}}}"#));
        assert_eq!(
            flag(r#","value":true,"reason":"SPLIT","variant":"on","metadata":{}"#),
            Ok(Evaluation::On)
        );
        assert_eq!(flag(r#","value":false,"reason":"STATIC""#), Ok(Evaluation::Off));
        assert_eq!(flag(r#","reason":"UNKNOWN""#), Ok(Evaluation::Off));
        assert_eq!(flag(r#","value":null"#), Ok(Evaluation::Off));
        assert_eq!(flag(r#","value":true,"reason":"DISABLED""#), Ok(Evaluation::Disabled));
    }

    #[test]
    fn a_flag_with_an_error_or_none_at_all_is_no_permission() {
        assert_eq!(read(""), Err(BadEvaluation::Unknown));
        assert_eq!(
            read(r#"{"key":"dwcp_v3_hde","errorCode":"FLAG_NOT_FOUND"}"#),
            Err(BadEvaluation::Unknown)
        );
        let general =
            read(r#"{"key":"dwcp_v3_hde","value":true,"errorCode":"GENERAL","errorDetails":"a\nb"}"#);
        assert_eq!(general.unwrap_err().to_string(), "the flag server cannot evaluate the flag: GENERAL a b");
        for bad in [
            r#"{"key":"dwcp_v3_hde","value":"true"}"#,
            r#"{"key":"dwcp_v3_hde","value":1}"#,
            r#"{"value":true}"#,
            "7",
        ] {
            assert!(matches!(read(bad), Err(BadEvaluation::Malformed(_))), "{bad}");
        }
        let twice = r#"{"key":"dwcp_v3_hde","value":true}"#;
        assert!(matches!(read(&format!("{twice},{twice}")), Err(BadEvaluation::Malformed(_))));
        for bad in [&b""[..], b"<html>", b"[]", b"{}", &[b' '; MAX_DOCUMENT + 1]] {
            assert!(matches!(parse(bad, FEATURE), Err(BadEvaluation::Malformed(_))));
        }
    }

    #[test]
    fn an_error_body_is_one_line() {
        assert_eq!(
            error(br#"{"errorCode":"INVALID_CONTEXT","errorDetails":"x\ny"}"#).as_deref(),
            Some("INVALID_CONTEXT: x y")
        );
        assert_eq!(error(b"<html>"), None);
        assert_eq!(request("hv\"1"), r#"{"context":{"targetingKey":"hv\"1"}}"#);
    }
}
