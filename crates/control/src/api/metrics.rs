//! `GET /metrics`. Everything is read when it is asked for, so the two pages, this and health, cannot differ.

use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use crate::api::Shared;
use crate::api::flags::pages;
use crate::fleet::Heard;

const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(crate) async fn page(State(shared): State<Arc<Shared>>) -> Response {
    let mut out = Text(String::new());
    let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let counts = &shared.counts;

    out.head("dwcp_control_polls_total", "counter", "Answered polls and reads of a flag's document.");
    out.value("dwcp_control_polls_total{answer=\"document\"}", count(&counts.served));
    out.value("dwcp_control_polls_total{answer=\"unchanged\"}", count(&counts.confirmed));
    out.head("dwcp_control_reports_total", "counter", "Reports of nodes, by what became of them.");
    for heard in Heard::ALL {
        let name = format!("dwcp_control_reports_total{{result=\"{}\"}}", heard.name());
        out.value(&name, count(&shared.view.fleet.counts[heard as usize]));
    }
    out.head("dwcp_control_changes_total", "counter", "Changes that were asked for.");
    out.value("dwcp_control_changes_total{result=\"made\"}", count(&counts.changes));
    out.value("dwcp_control_changes_total{result=\"refused\"}", count(&counts.refusals));
    out.head("dwcp_control_connections", "gauge", "Connections at the moment.");
    out.value("dwcp_control_connections", count(&counts.connections));
    out.head("dwcp_control_store_ok", "gauge", "Whether the last change could be kept.");
    out.value("dwcp_control_store_ok", u64::from(shared.view.trouble().is_none()));
    out.head("dwcp_control_nodes", "gauge", "Nodes in the inventory.");
    out.value("dwcp_control_nodes", shared.view.fleet.members().len() as u64);

    let flags = shared.view.flags();
    let pages = pages(&shared);
    let mut family = |name: &str, help: &str, value: &dyn Fn(&str) -> u64| {
        out.head(name, "gauge", help);
        for feature in pages.keys() {
            out.value(&format!("{name}{{feature=\"{feature}\"}}"), value(feature));
        }
    };
    let document = |feature: &str| flags.get(feature).map(|served| &served.flag.document);
    let epoch = |feature: &str| flags.get(feature).map(|served| served.flag.epoch());
    let sum = |feature: &str| pages.get(feature).map(|page| &page.convergence);
    family("dwcp_control_flag_percentage", "Percentage in force; 0 while the flag is off.", &|feature| {
        document(feature).map_or(0, |document| u64::from(document.reach()))
    });
    family("dwcp_control_flag_incarnation", "First part of the flag's epoch.", &|feature| {
        epoch(feature).map_or(0, |epoch| epoch.incarnation)
    });
    family("dwcp_control_flag_counter", "Second part of the flag's epoch.", &|feature| {
        epoch(feature).map_or(0, |epoch| epoch.counter)
    });
    family("dwcp_control_nodes_present", "Nodes heard in the last ten minutes.", &|feature| {
        sum(feature).map_or(0, |sum| sum.present_total)
    });
    family("dwcp_control_nodes_acked", "Those that have applied the flag as it is.", &|feature| {
        sum(feature).map_or(0, |sum| sum.acked_total)
    });
    family(
        "dwcp_control_nodes_absent",
        "Nodes not heard for ten minutes, drained ones not counted.",
        &|feature| sum(feature).map_or(0, |sum| sum.absent_total),
    );
    family("dwcp_control_nodes_on_v3", "Nodes whose new migrations take v3.", &|feature| {
        sum(feature).map_or(0, |sum| sum.nodes_on_v3)
    });
    family("dwcp_control_v3_migrations_inflight", "Migrations on v3, counted at both ends.", &|feature| {
        sum(feature).map_or(0, |sum| sum.v3_inflight)
    });
    ([(header::CONTENT_TYPE, TEXT)], out.0).into_response()
}

/// Prometheus' text format. Labels here are our own words, or names that need no escaping.
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn value(&mut self, name: &str, value: u64) {
        let _ = writeln!(self.0, "{name} {value}");
    }
}
