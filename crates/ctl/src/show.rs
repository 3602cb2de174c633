//! Results for people, and the commands that do little else: `status`, `list`, `switch`, `cancel`.

use dwcp_proto::units;
use dwcp_rpc::v1::{self, Phase, Role};

use crate::args::{CancelArgs, ListArgs, StatusArgs, SwitchArgs};
use crate::client::{Client, QUICK, SLOW, within};
use crate::error::{CtlError, Exit, explain, one_line};
use crate::json;

/// `dwcpctl status [ID]`.
pub(crate) async fn status(mut client: Client, args: StatusArgs) -> Result<Exit, CtlError> {
    match args.id {
        Some(id) => {
            let status = client.get(within(QUICK, v1::GetRequest { id: id.to_string() })).await?.into_inner();
            migration(&status, args.json);
        }
        None => {
            let node = client.node(within(QUICK, v1::NodeRequest {})).await?.into_inner();
            match args.json {
                true => json::print(&json::node(&node)),
                false => print_node(&node),
            }
        }
    }
    Ok(Exit::Done)
}

/// `dwcpctl list`.
pub(crate) async fn list(mut client: Client, args: &ListArgs) -> Result<Exit, CtlError> {
    let list = client.list(within(QUICK, v1::ListRequest {})).await?.into_inner().migrations;
    if args.json {
        list.iter().for_each(|status| json::print(&json::status(status)));
        return Ok(Exit::Done);
    }
    let header = ["ID", "VM", "ROLE", "PEER", "STATUS", "PATH", "DONE", "TIME"].map(str::to_owned);
    let rows = list.iter().map(|s| {
        [
            s.id.clone(),
            s.vm.clone(),
            json::role(s.role()).to_owned(),
            s.peer.clone(),
            s.status.clone(),
            path(s),
            format!("{:.0} %", 100.0 * s.progress.map_or(0.0, |p| p.fraction)),
            seconds(s.total_seconds),
        ]
    });
    print!("{}", table(std::iter::once(header).chain(rows)));
    Ok(Exit::Done)
}

/// `dwcpctl switch ID`.
pub(crate) async fn switch(mut client: Client, args: &SwitchArgs) -> Result<Exit, CtlError> {
    let request = args.request();
    let answer = client.switch(within(SLOW, request.clone())).await?.into_inner();
    match args.json {
        true => json::print(&json::Switched { id: &request.id, text: &answer.text }),
        false => println!("{}", one_line(&answer.text)),
    }
    Ok(Exit::Done)
}

/// `dwcpctl cancel ID`.
pub(crate) async fn cancel(mut client: Client, args: CancelArgs) -> Result<Exit, CtlError> {
    let request = v1::CancelRequest { id: args.id.to_string() };
    let status = client.cancel(within(SLOW, request)).await?.into_inner();
    migration(&status, args.json);
    Ok(if status.phase() == Phase::Aborted { Exit::Done } else { Exit::Failed })
}

/// What the preflight found.
pub(crate) fn check(report: &v1::CheckReport, json: bool) {
    if json {
        return json::print(&json::check(report));
    }
    let header = ["", "CODE", "WHAT", "WHAT TO DO"].map(str::to_owned);
    let problems = report
        .problems
        .iter()
        .map(|f| ["problem".to_owned(), f.code.clone(), f.message.clone(), f.hint.clone()]);
    let notes = report.notes.iter().map(|n| ["note".to_owned(), String::new(), n.clone(), String::new()]);
    let rows: Vec<_> = problems.chain(notes).collect();
    if !rows.is_empty() {
        print!("{}", table(std::iter::once(header).chain(rows)));
    }
    let path =
        [report.path.as_deref(), report.mode.as_deref()].into_iter().flatten().collect::<Vec<_>>().join(" ");
    let rtt = report.rtt_ms.map(|ms| format!(", round trip {ms:.1} ms")).unwrap_or_default();
    let why = report.mode_reason.as_ref().filter(|why| !why.is_empty());
    let rtt = rtt + &why.map(|why| format!(" ({})", one_line(why))).unwrap_or_default();
    match (report.ok, path.is_empty()) {
        (true, false) => println!("ok: would migrate over {}{rtt}", one_line(&path)),
        (true, true) => println!("ok: would migrate{rtt}"),
        (false, _) => println!("would not migrate"),
    }
}

/// A migration that ended, in a few lines on standard output.
pub(crate) fn summary(s: &v1::Status) {
    let (vm, peer) = (one_line(&s.vm), one_line(&s.peer));
    println!(
        "{}",
        match (s.phase(), s.role()) {
            (Phase::Completed, Role::Destination) => format!("{vm} came from {peer}"),
            (Phase::Completed, _) => format!("{vm} moved to {peer}"),
            (Phase::Aborted, Role::Destination) => format!("{vm} did not come from {peer}: aborted"),
            (Phase::Aborted, _) => format!("{vm} stays here: the migration to {peer} was aborted"),
            (phase, _) => format!("{vm} and {peer}: {}", json::phase(phase).replace('_', " ")),
        }
    );
    details(s);
}

fn migration(status: &v1::Status, json: bool) {
    if json {
        return json::print(&json::status(status));
    }
    println!("{} of {}, as its {}", status.id, one_line(&status.vm), json::role(status.role()));
    summary(status);
    if let Some(failure) = &status.error {
        explain(failure);
    }
}

fn details(s: &v1::Status) {
    let field = |name: &str, value: String| println!("  {name:<14}{}", one_line(&value));
    if s.path.is_none() && s.raw_bytes == 0 {
        // It ended before anything moved; there is nothing to measure.
        return;
    }
    if s.path.is_some() {
        let ends = [s.source.as_deref(), s.sink.as_deref()].map(|end| end.unwrap_or("?")).join(" -> ");
        let encryption = s.encryption.as_deref().unwrap_or("?");
        field("path", format!("{}, {ends}, encryption {encryption}", path(s)));
    }
    if let Some(reason) = s.mode_reason.as_ref().filter(|reason| !reason.is_empty()) {
        field("mode", reason.clone());
    }
    if let Some(transport) = &s.transport {
        let why = s.transport_reason.iter().map(|why| format!(": {why}")).collect::<String>();
        field("transport", format!("{transport}{why}"));
    }
    if let Some(channels) = s.channels.filter(|channels| *channels > 1) {
        field("from QEMU", format!("{channels} multifd channels"));
    }
    field("time", seconds(s.total_seconds));
    if let Some(ms) = s.downtime_ms {
        field("downtime", format!("{ms:.0} ms"));
        s.downtime_method.iter().for_each(|how| field("", how.clone()));
    }
    if s.guest_bytes > 0 {
        field("guest memory", format!("{} carried, zero pages included", units::size(s.guest_bytes)));
    }
    if s.raw_bytes > 0 {
        // Only the source knows the guest memory that the stream stands for, and so what was saved.
        let saved = match s.guest_bytes {
            0 => String::new(),
            _ => format!(", {:.1} % of the guest memory saved", 100.0 * s.saved_ratio),
        };
        field("stream", units::size(s.raw_bytes));
        field("on the wire", format!("{}{saved}", units::size(s.wire_bytes)));
        field("rounds", s.rounds.to_string());
    }
    if s.chunks > 0 {
        field(
            "chunks",
            format!("{}, {} sent again, {} reconnections", s.chunks, s.retransmitted_chunks, s.reconnects),
        );
    }
    if s.mode_switches > 0 {
        field("modes", format!("the mode changed {} times", s.mode_switches));
    }
    if s.path_switches > 0 {
        field("switches", format!("the path changed {} times", s.path_switches));
    }
    s.fallback_reasons.iter().for_each(|reason| field("fallback", reason.clone()));
}

fn print_node(n: &v1::NodeStatus) {
    let field = |name: &str, value: String| println!("{name:<12}{}", one_line(&value));
    field("node", format!("{} ({})", n.node, n.fingerprint));
    field("version", n.version.clone());
    field("state", if n.ready { "ready".to_owned() } else { format!("not ready: {}", n.not_ready_reason) });
    field("data", n.data_address.clone());
    field("metrics", n.metrics_address.clone());
    field("up", seconds(n.uptime_seconds));
    field("migrations", n.migrations_inflight.to_string());
    if let Some(gate) = &n.gate {
        let word = match (gate.source, gate.veto) {
            (true, false) => "v3",
            (false, false) => "v1 as a source, v3 as a destination",
            (_, true) => "v1",
        };
        field("flag", format!("{word}: {} (from {})", gate.reason, gate.from));
    }
    for peer in &n.peers {
        field("peer", format!("{} ({})", peer.node, peer.fingerprint));
    }
}

fn path(s: &v1::Status) -> String {
    match (&s.path, &s.mode) {
        (Some(path), Some(mode)) => format!("{path} {mode}"),
        (Some(path), None) => path.clone(),
        (None, _) => "-".to_owned(),
    }
}

/// A time as people read it.
pub(crate) fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 7200.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Rows in aligned columns; the last one is as long as it is.
pub(crate) fn table<const N: usize>(rows: impl IntoIterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = rows.into_iter().map(|row| row.map(|cell| one_line(&cell))).collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_control_characters_go() {
        let rows = [["A", "B"], ["long", "x\ny"], ["é", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table(rows), "A     B\nlong  x y\né\n");
    }

    #[test]
    fn times() {
        assert_eq!([0.25, 12.0, 600.0, 9000.0].map(seconds), ["0.2 s", "12 s", "10 min", "2.5 h"]);
    }
}
