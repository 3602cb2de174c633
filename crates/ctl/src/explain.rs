//! `dwcpctl explain`: what happened in a migration, who owns the guest, what to do next.

use dwcp_rpc::v1;

use crate::args::ExplainArgs;
use crate::client::{Client, SLOW, within};
use crate::error::{CtlError, Exit, one_line};
use crate::{json, show, utc};

/// Runs the command.
pub(crate) async fn run(mut client: Client, args: &ExplainArgs) -> Result<Exit, CtlError> {
    let id = args.id.to_string();
    let told = told(&mut client, &id).await?;
    if args.json {
        json::print(&json::story(&id, &told));
        return Ok(Exit::Done);
    }
    let stories: Vec<String> = told.sides.iter().chain(&told.peers).map(story).collect();
    print!("{}", stories.join("\n"));
    for failure in &told.unheard {
        println!("\n{}: {}", one_line(&failure.code), one_line(&failure.message));
    }
    if let ([side], []) = (told.sides.as_slice(), told.peers.as_slice()) {
        println!("\nthe other side is told at {}: dwcpctl explain {id}", one_line(&side.peer));
    }
    Ok(Exit::Done)
}

/// What this node knows of a migration.
pub(crate) async fn sides(client: &mut Client, id: &str) -> Result<Vec<v1::Explanation>, CtlError> {
    Ok(told(client, id).await?.sides)
}

async fn told(client: &mut Client, id: &str) -> Result<v1::ExplainResponse, CtlError> {
    let request = v1::ExplainRequest { id: id.to_owned() };
    Ok(client.explain(within(SLOW, request)).await?.into_inner())
}

/// Where one side stands: what it is, the last decision, and who owns the guest.
pub(crate) fn standing(e: &v1::Explanation) -> String {
    let by = if e.told_by.is_empty() { String::new() } else { format!(", told by {}", e.told_by) };
    let known = |name: &str| if name.is_empty() { "(unknown)".to_owned() } else { name.to_owned() };
    let (vm, peer) = (known(&e.vm), known(&e.peer));
    let title = format!("{} of {vm}, as its {}{by}; the peer is {peer}", e.id, json::role(e.role()));
    let stands = match &e.status {
        Some(status) if json::phase(status.phase()) != e.phase => {
            format!("{}; last decision: {}", words(json::phase(status.phase())), words(&e.phase))
        }
        Some(_) => words(&e.phase),
        None if e.told_by.is_empty() => {
            format!("last decision: {}; the agent no longer works on it", words(&e.phase))
        }
        None => format!("last decision: {}", words(&e.phase)),
    };
    format!("{}\n{}{}", one_line(&title), field("stands at", &stands), field("guest", &owner(e)))
}

/// One labelled line.
pub(crate) fn field(name: &str, value: &str) -> String {
    format!("  {name:<10}{}\n", one_line(value))
}

fn story(e: &v1::Explanation) -> String {
    let mut text = standing(e);
    if let Some(cause) = &e.cause {
        text += &field("error", &format!("{}: {}", cause.code, cause.message));
        if !cause.hint.is_empty() {
            text += &field("hint", &cause.hint);
        }
    }
    text += &field("next", &e.next);
    if e.moments_left_out > 0 {
        text += &field("", &format!("{} older moments are left out here", e.moments_left_out));
    }
    text + &timeline(&e.timeline)
}

/// Who owns the guest, and what that means for the operator.
fn owner(e: &v1::Explanation) -> String {
    match (e.owner.as_str(), e.role()) {
        ("source", v1::Role::Source) | ("destination", v1::Role::Destination) => match e.told_by.as_str() {
            "" => "here".to_owned(),
            node => format!("at {node}"),
        },
        ("source" | "destination", _) => format!("at {}", e.peer),
        ("in_doubt", _) => {
            let here = if e.told_by.is_empty() { "here" } else { "there" };
            format!("in doubt: {here} or at {}; start it nowhere by hand", e.peer)
        }
        ("nobody", _) => "lost: nobody has it".to_owned(),
        (other, _) => words(other),
    }
}

fn timeline(moments: &[v1::Moment]) -> String {
    let header = ["", "DATE", "TIME (UTC)", "SINCE", "WHAT", ""].map(str::to_owned);
    let mut before: Option<(u64, String)> = None;
    let rows = moments.iter().map(|moment| {
        let (date, time) = utc::date_and_time(moment.unix_ms);
        let same_day = before.as_ref().is_some_and(|(_, day)| *day == date);
        let since = before.as_ref().map(|(ms, _)| since(*ms, moment.unix_ms)).unwrap_or_default();
        before = Some((moment.unix_ms, date.clone()));
        let date = if same_day { String::new() } else { date };
        [String::new(), date, time, since, words(&moment.what), moment.text.clone()]
    });
    let rows: Vec<_> = rows.collect();
    match rows.is_empty() {
        true => String::new(),
        false => format!("\n{}", show::table(std::iter::once(header).chain(rows))),
    }
}

/// The time between two moments; it may be negative, as a clock may be set back.
fn since(before: u64, now: u64) -> String {
    let ms = i128::from(now) - i128::from(before);
    format!("{:>+10.3} s", ms as f64 / 1000.0)
}

fn words(name: &str) -> String {
    name.replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explanation() -> v1::Explanation {
        let moment = |unix_ms, what: &str, text: &str| v1::Moment {
            unix_ms,
            what: what.to_owned(),
            text: text.to_owned(),
        };
        v1::Explanation {
            id: "m-1".to_owned(),
            vm: "web-1".to_owned(),
            role: v1::Role::Destination.into(),
            peer: "hv-01".to_owned(),
            phase: "receipt".to_owned(),
            owner: "in_doubt".to_owned(),
            cause: Some(v1::Failure {
                code: "peer_gone".to_owned(),
                message: "no\nword".to_owned(),
                hint: "look at hv-01".to_owned(),
                ..Default::default()
            }),
            next: "wait for hv-01".to_owned(),
            timeline: vec![
                moment(1_764_547_199_950, "accepted", "over v3"),
                moment(1_764_547_200_000, "link_lost", "a\x1b[2Jb"),
                moment(1_764_547_199_000, "receipt", ""),
            ],
            moments_left_out: 0,
            status: None,
            told_by: String::new(),
        }
    }

    #[test]
    fn a_story_tells_state_error_next_and_times() {
        assert_eq!(
            story(&explanation()),
            "\
m-1 of web-1, as its destination; the peer is hv-01
  stands at last decision: receipt; the agent no longer works on it
  guest     in doubt: here or at hv-01; start it nowhere by hand
  error     peer_gone: no word
  hint      look at hv-01
  next      wait for hv-01

  DATE        TIME (UTC)    SINCE         WHAT
  2025-11-30  23:59:59.950                accepted   over v3
  2025-12-01  00:00:00.000      +0.050 s  link lost  a [2Jb
  2025-11-30  23:59:59.000      -1.000 s  receipt
"
        );
    }

    #[test]
    fn the_guest_is_told_from_where_the_reader_sits() {
        let told = |owner_is: &str, role: v1::Role| {
            owner(&v1::Explanation { owner: owner_is.to_owned(), role: role.into(), ..explanation() })
        };
        assert_eq!(told("source", v1::Role::Source), "here");
        assert_eq!(told("source", v1::Role::Destination), "at hv-01");
        assert_eq!(told("destination", v1::Role::Source), "at hv-01");
        assert_eq!(told("destination", v1::Role::Destination), "here");
        assert!(told("nobody", v1::Role::Source).starts_with("lost"));
        // A word of a newer agent.
        assert_eq!(told("third_node", v1::Role::Source), "third node");
    }

    #[test]
    fn what_is_left_out_or_not_there_is_said() {
        let left_out = v1::Explanation { moments_left_out: 7, timeline: Vec::new(), ..explanation() };
        assert!(story(&left_out).contains("7 older moments are left out here\n"));
        let status = v1::Status { phase: v1::Phase::InDoubt.into(), ..Default::default() };
        let running = v1::Explanation { status: Some(status), ..explanation() };
        assert!(story(&running).contains("stands at in doubt; last decision: receipt\n"));
    }
}
