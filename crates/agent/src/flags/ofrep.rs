//! Speaks OFREP: the server evaluates the flag, and its word holds for as long as the lease.

use dwcp_flags::ofrep::{self, OFREP_PATH};
use dwcp_flags::{Absence, FEATURE, Moment};
use hyper::header::{ACCEPT, CONTENT_TYPE, ETAG, HeaderValue};
use hyper::{Method, StatusCode};

use super::client::{Answer, Ask};
use super::keeper::Keeper;
use super::metrics::Poll;
use super::server::{Trouble, if_none_match, text};

const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// One side of the conversation.
#[derive(Debug)]
pub(super) struct Ofrep {
    node: String,
    /// Of the evaluation in force.
    etag: Option<HeaderValue>,
    /// Whether there is one.
    evaluated: bool,
}

impl Ofrep {
    pub(super) fn new(node: &str) -> Self {
        Ofrep { node: node.to_owned(), etag: None, evaluated: false }
    }

    pub(super) fn ask(&self) -> Ask {
        let mut ask = Ask {
            method: Method::POST,
            path: OFREP_PATH.to_owned(),
            headers: vec![(CONTENT_TYPE, JSON), (ACCEPT, JSON)],
            body: ofrep::request(&self.node),
        };
        if_none_match(&mut ask, self.etag.as_ref());
        ask
    }

    pub(super) fn take_in(
        &mut self,
        keeper: &mut Keeper,
        answer: &Answer,
        asked: Moment,
    ) -> Result<Poll, Trouble> {
        match answer.status {
            StatusCode::OK => self.evaluation(keeper, answer, asked),
            StatusCode::NOT_MODIFIED if self.evaluated => {
                keeper.confirm(asked);
                Ok(Poll::Confirmed)
            }
            _ => Err(Trouble::status(answer, ofrep::error(&answer.body))),
        }
    }

    fn evaluation(&mut self, keeper: &mut Keeper, answer: &Answer, asked: Moment) -> Result<Poll, Trouble> {
        // What stands between answers with a page of its own; that is not the flag system's word.
        if !text(&answer.headers, CONTENT_TYPE.as_str())
            .is_some_and(|kind| kind.starts_with("application/json"))
        {
            return Err(Trouble::failed("it answers with something else than JSON"));
        }
        self.etag = None;
        self.evaluated = false;
        match ofrep::parse(&answer.body, FEATURE) {
            Ok(evaluation) => {
                let before = keeper.reason();
                keeper.evaluated(evaluation, asked);
                self.evaluated = true;
                self.etag = answer.headers.get(ETAG).cloned();
                Ok(if keeper.reason() == before { Poll::Confirmed } else { Poll::Changed })
            }
            Err(bad) => {
                let absence = Absence::from(&bad);
                keeper.withdraw(absence);
                Err(Trouble::refused(super::refusal(absence), bad.to_string()))
            }
        }
    }
}
