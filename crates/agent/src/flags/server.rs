//! Follows a flag server: polls its endpoints on schedule, and hands what they answer to the protocol that they speak.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dwcp_flags::{Moment, Schedule};
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use hyper::{StatusCode, header};
use tokio::sync::Notify;

use super::api::Api;
use super::client::{Answer, Ask, Endpoint, retry_after};
use super::keeper::{Keeper, random};
use super::metrics::{FlagMetrics, Poll};
use super::ofrep::Ofrep;

/// Bytes of a bearer token.
const MAX_TOKEN: usize = 4096;

/// What the endpoints speak.
pub(super) enum Protocol {
    Api(Box<Api>),
    Ofrep(Ofrep),
}

/// An answer that is not obeyed.
#[derive(Debug)]
pub(super) struct Trouble {
    /// In one sentence; the endpoint is put before it.
    pub(super) what: String,
    /// One of the reasons in the metrics, where the answer was whole and yet refused.
    pub(super) refused: Option<&'static str>,
    /// For how long the server wants to be left alone.
    pub(super) pause: Option<Duration>,
}

impl Trouble {
    /// As good as no answer.
    pub(super) fn failed(what: impl Into<String>) -> Self {
        Trouble { what: what.into(), refused: None, pause: None }
    }

    /// An answer that an honest server does not give.
    pub(super) fn refused(reason: &'static str, what: impl Into<String>) -> Self {
        Trouble { what: what.into(), refused: Some(reason), pause: None }
    }

    /// A status that holds no flag. Being refused, or asked to slow down, is no reason to stop polling: the lease runs out.
    pub(super) fn status(answer: &Answer, more: Option<String>) -> Self {
        let word = match answer.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "it refuses this node",
            StatusCode::TOO_MANY_REQUESTS => "it is asked too often",
            _ => "it has no answer",
        };
        let more = more.map(|more| format!(": {more}")).unwrap_or_default();
        Trouble {
            pause: retry_after(&answer.headers),
            ..Trouble::failed(format!("{word} ({}){more}", answer.status))
        }
    }
}

/// Follows a flag server.
pub(super) struct ServerFollower {
    pub(super) keeper: Keeper,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) schedule: Schedule,
    pub(super) protocol: Protocol,
    pub(super) metrics: FlagMetrics,
    pub(super) token_file: Option<PathBuf>,
}

impl ServerFollower {
    /// Polls for ever; at once when `look` is notified.
    pub(super) async fn follow(mut self, look: Arc<Notify>) {
        loop {
            let (clock, due) = (self.keeper.clock(), self.schedule.due());
            let cause = async {
                tokio::select! {
                    () = clock.sleep_until(due) => {}
                    () = look.notified() => {}
                }
            };
            self.keeper.during(cause).await;
            self.poll().await;
        }
    }

    /// Asks the endpoint whose turn it is.
    pub(super) async fn poll(&mut self) {
        let asked = self.keeper.clock().now();
        self.schedule.sent(asked, random());
        let result = self.exchange(asked).await;
        let now = self.keeper.clock().now();
        match result {
            Ok(poll) => {
                self.schedule.answered();
                self.metrics.polled(poll);
            }
            Err(trouble) => {
                let endpoint = &self.endpoints[self.schedule.endpoint()];
                let what = format!("{}: {}", endpoint.url(), trouble.what);
                self.schedule.failed(now, random());
                trouble.pause.into_iter().for_each(|pause| self.schedule.pause(now, pause));
                trouble.refused.into_iter().for_each(|reason| self.metrics.refused(reason));
                self.metrics.polled(if trouble.refused.is_some() { Poll::Refused } else { Poll::Failed });
                self.keeper.failed(what);
            }
        }
    }

    async fn exchange(&mut self, asked: Moment) -> Result<Poll, Trouble> {
        let mut ask = match &mut self.protocol {
            Protocol::Api(api) => api.ask(&self.keeper),
            Protocol::Ofrep(ofrep) => ofrep.ask(),
        };
        if let Some(file) = &self.token_file {
            ask.headers.push((AUTHORIZATION, self.keeper.during(bearer(file)).await?));
        }
        // In range: the schedule counts these very endpoints.
        let endpoint = &mut self.endpoints[self.schedule.endpoint()];
        let answer = self.keeper.during(endpoint.ask(&ask)).await;
        let answer = answer.map_err(|error| Trouble::failed(error.to_string()))?;
        let poll = match &mut self.protocol {
            Protocol::Api(api) => api.take_in(&mut self.keeper, answer, asked)?,
            Protocol::Ofrep(ofrep) => ofrep.take_in(&mut self.keeper, &answer, asked)?,
        };
        let cluster = match &self.protocol {
            Protocol::Api(api) => api.cluster().map(str::to_owned),
            Protocol::Ofrep(_) => None,
        };
        self.keeper.served_by(endpoint.url().to_string(), cluster);
        if let (Poll::Changed, Protocol::Api(api)) = (poll, &self.protocol)
            && let Some(save) = api.save(&self.keeper)
        {
            self.keeper.during(save).await;
        }
        Ok(poll)
    }
}

/// Asks for a new answer only.
pub(super) fn if_none_match(ask: &mut Ask, etag: Option<&HeaderValue>) {
    ask.headers.extend(etag.map(|etag| (header::IF_NONE_MATCH, etag.clone())));
}

/// A header's value, if it is text.
pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The token is read for each request, so it can be changed at any time.
async fn bearer(file: &PathBuf) -> Result<HeaderValue, Trouble> {
    let fail =
        |what: String| Trouble::failed(format!("no request without a token: {}: {what}", file.display()));
    let text = tokio::fs::read_to_string(file).await.map_err(|error| fail(error.to_string()))?;
    let token = text.trim();
    if token.is_empty() || token.len() > MAX_TOKEN {
        return Err(fail("it holds no token".to_owned()));
    }
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| fail("it holds what no header can".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}
