//! The results as a page of Markdown.

use std::fmt::Write;

use crate::drill::{Outage, PARTITIONED, REACHABLE, Result, Spread};

/// The whole page.
pub(crate) fn table(results: &[Result]) -> String {
    let mut page = String::from(HEAD);
    let mut row = |name: &str, bound: &str, value: &dyn Fn(&Result) -> String| {
        let values: Vec<String> = results.iter().map(value).collect();
        // Writing to a string does not fail.
        let _ = writeln!(page, "| {name} | {bound} | {} |", values.join(" | "));
    };
    row("nodes", "bound", &|result| result.nodes.to_string());
    row("---", "---", &|_| "---".to_owned());
    let reachable = format!("max {} s", REACHABLE.as_secs());
    let partitioned = format!("max {} s", PARTITIONED.as_secs());
    row("POST answered to node on v1, s", &reachable, &|result| spread(&result.rollback));
    row("POST answered to all acked, s", "", &|result| spread(&result.acked));
    row("the same with 5 % cut off: the others, s", &reachable, &|result| spread(&result.beside));
    row("those cut off, under `v1-all`, s", &partitioned, &|result| spread(&result.partitioned));
    row("planned restart", "0 leases", &|result| outage(&result.restart));
    row("kill -9, started after 0.1 s", "", &|result| outage(&result.kill));
    row("kill -9, started after 5 s", "", &|result| outage(&result.cold));
    row("polls a second (failed in 10 s)", "", &|result| {
        format!("{:.0} ({})", result.polls_per_second, result.failed_polls)
    });
    row("CPU while only polls: server, nodes", "2.00 in all", &|result| {
        format!("{:.2}, {:.2}", result.server_cpu, result.nodes_cpu)
    });
    row("server's memory, MiB", "", &|result| format!("{:.0}", result.server_memory as f64 / 1048576.0));
    page
}

const HEAD: &str = "\
# Drill: rollback of a fleet

`cargo xtask drill rollback` writes this page. One real `dwcp-control`, and all nodes in one other process on the same
two-core machine: each with a TLS connection of its own, the real document, lease and schedule of `dwcp-flags`, and
reports signed by its key. A node counts as on v1 when migrations that run on v3 have to leave it.

Times are p50 / p99 / max. A restart shows: seconds without a listening server, seconds from its end until every node had been
confirmed by the new one (seconds from when that one listened), leases that ended meanwhile, CPU seconds of the new server until then.

";

fn spread(Spread { p50, p99, max }: &Spread) -> String {
    format!("{p50:.2} / {p99:.2} / {max:.2}")
}

fn outage(Outage { away, healed, healed_after, lapses, cpu }: &Outage) -> String {
    format!("away {away:.2}, back {healed:.2} ({healed_after:.2}), {lapses} leases, CPU {cpu:.2}")
}
