//! One agent asks the other what it knows of a migration: both ends' stories, told at one of them.
//!
//! The question travels on a TLS connection of its own, outside of any session, so it works before, during and after a
//! restart of either agent. Only the two nodes that a journal names tell each other what is in it.

use std::time::Duration;

use dwcp_proto::MigrationId;
use dwcp_proto::message::Told;
use tokio::time::timeout;

use crate::error::{Blame, Failure, clean};
use crate::explain::{Tale, tales};
use crate::handshake::{Asking, Dialler};
use crate::shared::Shared;
use crate::status::Explanation;

/// How long the peer may take, connecting included: an operator waits for the answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes of a story on the wire, within the limit of a message.
const MAX_STORY: usize = 12 << 10;

/// Asks the node behind `dialler` for its side; `ours` is the side here.
pub(crate) async fn ask(dialler: &Dialler, ours: &Explanation) -> Result<Explanation, Failure> {
    let story = timeout(PATIENCE, dialler.ask(&ours.id)).await.unwrap_or_else(|_| {
        let text = format!("{} did not answer within {} s", dialler.to, PATIENCE.as_secs());
        Err(Failure::new("peer_timeout", Blame::Link, text, ""))
    });
    let text = |what: &str| format!("{} does not tell its side: {what}", dialler.to);
    let story = story.map_err(|failure| Failure { message: text(&failure.message), ..failure })?;
    let told: Option<Explanation> = serde_json::from_slice(&story).ok();
    match told.filter(|told| told.id == ours.id && told.role != ours.role) {
        Some(told) => Ok(cleaned(told)),
        None => {
            let hint = "compare both agents' versions";
            Err(Failure::new(
                "protocol",
                Blame::PeerMisbehaving,
                text("its story is none of this migration"),
                hint,
            ))
        }
    }
}

/// Answers a peer that asks.
pub(crate) async fn answer(shared: &Shared, asking: Asking) {
    let known = match MigrationId::new(asking.ask.migration.clone()) {
        Ok(id) => {
            let (dir, key) = (shared.config.state_dir.clone(), *asking.peer.as_bytes());
            let theirs = move |tale: &Tale| tale.peer_key == Some(key);
            let told = tokio::task::spawn_blocking(move || tales(&dir, &id, None).into_iter().find(theirs));
            told.await.ok().flatten()
        }
        Err(_) => None,
    };
    match known {
        Some(tale) => asking.tell(Told { story: bounded(tale.explanation) }).await,
        None => {
            let text = "there is no journal here of such a migration with this node";
            let failure = Failure::new("unknown_migration", Blame::Operator, text, "");
            asking.refuse(&failure).await;
        }
    }
}

/// A story with as many of its newest moments as fit.
fn bounded(mut story: Explanation) -> Vec<u8> {
    loop {
        let bytes = serde_json::to_vec(&story).unwrap_or_default();
        if bytes.len() <= MAX_STORY || story.timeline.is_empty() {
            return bytes;
        }
        // Half of what is too much, at least one: few passes whatever the texts' lengths.
        story.timeline.drain(..story.timeline.len().div_ceil(2));
    }
}

/// A peer's words, fit for logs and terminals.
fn cleaned(mut story: Explanation) -> Explanation {
    for text in [&mut story.phase, &mut story.owner, &mut story.next] {
        *text = clean(std::mem::take(text));
    }
    for moment in &mut story.timeline {
        moment.what = clean(std::mem::take(&mut moment.what));
        moment.text = clean(std::mem::take(&mut moment.text));
    }
    story.cause =
        story.cause.map(|cause| Failure::new(&clean(cause.code), cause.blame, cause.message, cause.hint));
    story.status = None;
    story
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::{Moment, Role};

    fn story(moments: usize) -> Explanation {
        let moment = |n| Moment { unix_ms: n as u64, what: "link_down".into(), text: "\u{1b}[2J".repeat(20) };
        Explanation {
            id: "m".parse().unwrap(),
            vm: None,
            role: Role::Source,
            peer: None,
            phase: "commit".into(),
            owner: "in_doubt".into(),
            cause: Some(Failure {
                code: "a\nb".into(),
                blame: Blame::Link,
                message: String::new(),
                hint: String::new(),
            }),
            next: "wait".into(),
            timeline: (0..moments).map(moment).collect(),
            status: None,
        }
    }

    #[test]
    fn a_long_story_keeps_its_newest_moments_and_fits() {
        let bytes = bounded(story(5000));
        assert!(bytes.len() <= MAX_STORY);
        let told: Explanation = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(told.timeline.last().unwrap().unix_ms, 4999);
        assert!(told.timeline.len() > 10);
    }

    #[test]
    fn log_inject_a_peers_story_cannot_steer_a_terminal() {
        let told = cleaned(story(2));
        let words = [&told.timeline[1].text, &told.cause.unwrap().code];
        assert!(words.iter().all(|word| !word.is_empty() && !word.chars().any(char::is_control)));
    }
}
