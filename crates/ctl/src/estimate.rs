//! `dwcpctl estimate`: what a migration would take.

use dwcp_proto::units;
use dwcp_rpc::v1;
use serde::Serialize;

use crate::args::EstimateArgs;
use crate::client::{Client, SLOW, within};
use crate::error::{CtlError, Exit, explain, one_line};
use crate::json;
use crate::show::seconds;

/// What scripts see.
#[derive(Debug, Serialize)]
struct Estimate<'a> {
    path: &'a str,
    mode: Option<&'a str>,
    mode_reason: Option<&'a str>,
    streams: u32,
    rtt_ms: f64,
    link_rate: f64,
    ram_bytes: u64,
    zero_share: Option<f64>,
    first_ratio: Option<f64>,
    again_ratio: Option<f64>,
    dirty_rate: Option<f64>,
    hot_bytes: Option<f64>,
    converges: bool,
    seconds: f64,
    downtime_ms: f64,
    wire_bytes: u64,
    rounds: u32,
    problems: Vec<json::Failure<'a>>,
    notes: &'a [String],
}

/// Runs the command.
pub(crate) async fn run(mut client: Client, args: &EstimateArgs) -> Result<Exit, CtlError> {
    let request = v1::EstimateRequest { spec: Some(args.journey.spec()) };
    let e = client.estimate(within(SLOW, request)).await?.into_inner();
    match args.json {
        true => json::print(&object(&e)),
        false => print(&e),
    }
    Ok(if e.converges && e.problems.is_empty() { Exit::Done } else { Exit::Failed })
}

fn object(e: &v1::EstimateResponse) -> Estimate<'_> {
    Estimate {
        path: &e.path,
        mode: e.mode.as_deref(),
        mode_reason: e.mode_reason.as_deref(),
        streams: e.streams,
        rtt_ms: e.rtt_ms,
        link_rate: e.link_rate,
        ram_bytes: e.ram_bytes,
        zero_share: e.zero_share,
        first_ratio: e.first_ratio,
        again_ratio: e.again_ratio,
        dirty_rate: e.dirty_rate,
        hot_bytes: e.hot_bytes,
        converges: e.converges,
        seconds: e.seconds,
        downtime_ms: e.downtime_ms,
        wire_bytes: e.wire_bytes,
        rounds: e.rounds,
        problems: e.problems.iter().map(json::failure).collect(),
        notes: &e.notes,
    }
}

fn print(e: &v1::EstimateResponse) {
    let field = |name: &str, value: String| println!("  {name:<14}{}", one_line(&value));
    match e.converges {
        true => println!("it would take {}", seconds(e.seconds)),
        false => println!("it would not converge"),
    }
    field("path", format!("{} {}", e.path, e.mode.as_deref().unwrap_or_default()));
    e.mode_reason.iter().filter(|why| !why.is_empty()).for_each(|why| field("mode", why.clone()));
    let link = units::rate(e.link_rate);
    field("link", format!("{link} over {} connections, round trip {:.1} ms", e.streams, e.rtt_ms));
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let zero = e.zero_share.map_or("unknown".to_owned(), percent);
    field("guest memory", format!("{}, zero: {zero}", units::size(e.ram_bytes)));
    if let Some(first) = e.first_ratio {
        let again = e.again_ratio.map(|again| format!(", {} when sent again", percent(again)));
        let first = percent(first);
        field("on the wire", format!("{first} of what is not zero{}", again.unwrap_or_default()));
    }
    if let (Some(rate), Some(hot)) = (e.dirty_rate, e.hot_bytes) {
        let (rate, hot) = (units::size(rate as u64), units::size(hot as u64));
        field("writes", format!("{rate} of memory a second, over some {hot}"));
    }
    field("downtime", format!("{:.0} ms", e.downtime_ms));
    field("bytes", units::size(e.wire_bytes));
    field("rounds", e.rounds.to_string());
    e.notes.iter().for_each(|note| field("note", note.clone()));
    e.problems.iter().for_each(explain);
}
