//! What a request that is not obeyed is told.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use dwcp_flags::{BadDocument, Fault};
use serde_json::json;

use crate::state::Refused;
use crate::tokens::Denied;
use crate::writer::WriteError;

/// An answer other than success.
#[derive(Debug)]
pub(crate) struct Problem {
    code: Code,
    message: String,
    hint: Option<String>,
    place: Option<(usize, usize)>,
}

/// What is wrong, as a script reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Body,
    Query,
    Feature,
    TooLarge,
    TooSlow,
    Token,
    Forbidden,
    Address,
    Method,
    UnknownNodes,
    Held,
    Stale,
    Full,
    Busy,
    Store,
}

impl Code {
    fn text(self) -> (StatusCode, &'static str) {
        match self {
            Code::Body => (StatusCode::BAD_REQUEST, "bad_body"),
            Code::Query => (StatusCode::BAD_REQUEST, "bad_query"),
            Code::Feature => (StatusCode::NOT_FOUND, "unknown_feature"),
            Code::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too_large"),
            Code::TooSlow => (StatusCode::REQUEST_TIMEOUT, "too_slow"),
            Code::Token => (StatusCode::UNAUTHORIZED, "token"),
            Code::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Code::Address => (StatusCode::NOT_FOUND, "unknown_address"),
            Code::Method => (StatusCode::METHOD_NOT_ALLOWED, "method"),
            Code::UnknownNodes => (StatusCode::NOT_FOUND, "unknown_nodes"),
            Code::Held => (StatusCode::CONFLICT, "held"),
            Code::Stale => (StatusCode::CONFLICT, "stale"),
            Code::Full => (StatusCode::UNPROCESSABLE_ENTITY, "full"),
            Code::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy"),
            Code::Store => (StatusCode::SERVICE_UNAVAILABLE, "store"),
        }
    }
}

impl Problem {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Problem { code, message: message.into(), hint: None, place: None }
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Problem { hint: Some(hint.into()), ..self }
    }

    /// At this line and column of the body, from 1.
    pub(crate) fn at(self, line: usize, column: usize) -> Self {
        Problem { place: Some((line, column)), ..self }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, code) = self.code.text();
        let mut error = json!({"code": code, "message": self.message});
        if let Some((line, column)) = self.place {
            error["line"] = line.into();
            error["column"] = column.into();
        }
        if let Some(hint) = self.hint {
            error["hint"] = hint.into();
        }
        let body = format!("{:#}\n", json!({"error": error}));
        let mut response = (status, super::request::JSON, body).into_response();
        if self.code == Code::Token {
            let scheme = HeaderValue::from_static("Bearer");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

impl From<BadDocument> for Problem {
    fn from(bad: BadDocument) -> Self {
        let code = match bad.fault {
            Fault::UnknownFeature(_) => Code::Feature,
            Fault::TooLarge => Code::TooLarge,
            _ => Code::Body,
        };
        Problem::new(code, bad.to_string()).at(bad.line, bad.column).hint("nothing was changed")
    }
}

impl From<Denied> for Problem {
    fn from(denied: Denied) -> Self {
        let hint = "make one with `dwcp-control token new`, and have the server read it with SIGHUP";
        Problem::new(Code::Token, denied.to_string()).hint(hint)
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Self {
        let message = error.to_string();
        let (code, hint) = match &error {
            WriteError::Refused(refused) => match refused {
                Refused::Forbidden(_) => {
                    (Code::Forbidden, "a token with the role admin, or nodes for the inventory".to_owned())
                }
                Refused::UnknownFeature(_) => (Code::Feature, "nothing was changed".to_owned()),
                Refused::Held { feature, kind, .. } => {
                    let lift = format!("DELETE /v1/feature-flags/{feature}/{} lifts it", kind.name());
                    (Code::Held, format!("lowering and excluding are allowed all the same; {lift}"))
                }
                Refused::Stale { .. } => (Code::Stale, "read it again, and decide anew".to_owned()),
                Refused::TooManyExcluded | Refused::TooManyNodes => {
                    (Code::Full, "nothing was changed".to_owned())
                }
                Refused::UnknownNodes(_) => (Code::UnknownNodes, "nothing was changed".to_owned()),
            },
            WriteError::Busy | WriteError::Stopping => {
                (Code::Busy, "nothing was changed; ask again".to_owned())
            }
            WriteError::Store(_) => (
                Code::Store,
                "it is not in force, but may come into force at the server's next start: ask again"
                    .to_owned(),
            ),
        };
        Problem::new(code, message).hint(hint)
    }
}
