//! `dwcpctl flags`: the flag as the node sees it, and why it decides as it does.

use std::collections::BTreeMap;

use dwcp_rpc::v1::{self, RunningMigrations};
use serde::Serialize;

use crate::args::FlagsArgs;
use crate::client::{Client, QUICK, within};
use crate::error::{CtlError, Exit, one_line};
use crate::json;
use crate::show::seconds;

/// `dwcpctl flags`.
pub(crate) async fn run(mut client: Client, args: &FlagsArgs) -> Result<Exit, CtlError> {
    let status = client.flags(within(QUICK, v1::FlagsRequest {})).await?.into_inner();
    match args.json {
        true => json::print(&Flags::from(&status)),
        false => lines(&status).iter().for_each(|(name, value)| println!("{name:<12}{}", one_line(value))),
    }
    Ok(Exit::Done)
}

/// The JSON that scripts read; what is not known is `null`.
#[derive(Debug, Serialize)]
struct Flags<'a> {
    node: &'a str,
    feature: &'a str,
    source: &'a str,
    /// Whether new migrations from this node may take v3.
    value: bool,
    path: &'a str,
    running: &'static str,
    reason_code: &'a str,
    reason: &'a str,
    veto_code: Option<&'a str>,
    veto: Option<&'a str>,
    bucket: u32,
    enabled: Option<bool>,
    percentage: Option<u32>,
    excluded: Option<bool>,
    canary: Option<bool>,
    on_stale: Option<&'a str>,
    /// Incarnation and counter.
    epoch: Option<[u64; 2]>,
    age_seconds: Option<f64>,
    lease_seconds: Option<f64>,
    endpoint: Option<&'a str>,
    cluster: Option<&'a str>,
    error: Option<&'a str>,
    error_age_seconds: Option<f64>,
    return_seconds: Option<f64>,
    refused: BTreeMap<&'a str, u64>,
}

impl<'a> From<&'a v1::FlagsStatus> for Flags<'a> {
    fn from(s: &'a v1::FlagsStatus) -> Self {
        let document = s.document.as_ref();
        let present = |text: &'a str| (!text.is_empty()).then_some(text);
        Flags {
            node: &s.node,
            feature: &s.feature,
            source: &s.source,
            value: s.path == "v3",
            path: &s.path,
            running: match s.running() {
                RunningMigrations::Unspecified => "unknown",
                RunningMigrations::Leave => "leave",
                RunningMigrations::Keep => "keep",
                RunningMigrations::Return => "return",
            },
            reason_code: &s.reason_code,
            reason: &s.reason,
            veto_code: present(&s.veto_code),
            veto: present(&s.veto),
            bucket: s.bucket,
            enabled: document.map(|d| d.enabled),
            percentage: document.map(|d| d.percentage),
            excluded: document.map(|d| d.excluded),
            canary: document.map(|d| d.canary),
            on_stale: document.map(|d| d.on_stale.as_str()),
            epoch: document.and_then(|d| d.epoch).map(|epoch| [epoch.incarnation, epoch.counter]),
            age_seconds: s.age_seconds,
            lease_seconds: s.lease_seconds,
            endpoint: s.endpoint.as_deref(),
            cluster: s.cluster.as_deref(),
            error: s.error.as_deref(),
            error_age_seconds: s.error_age_seconds,
            return_seconds: s.return_seconds,
            refused: s.refused.iter().map(|(reason, count)| (reason.as_str(), *count)).collect(),
        }
    }
}

/// The same for people: a name and a value a line.
fn lines(s: &v1::FlagsStatus) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("flag", format!("{} from {}", s.feature, s.source)),
        ("new", format!("{}: {}", s.path, s.reason)),
        ("running", running(s)),
    ];
    if !s.veto.is_empty() {
        lines.push(("incoming", format!("v1: {}", s.veto)));
    }
    lines.push(("bucket", format!("{} of 100", s.bucket)));
    if let Some(document) = &s.document {
        lines.push(("document", about(document)));
        let epoch = document.epoch.map(|epoch| format!("{}.{}", epoch.incarnation, epoch.counter));
        lines.push(("epoch", epoch.unwrap_or_else(|| "none".to_owned())));
    }
    lines.extend(s.age_seconds.map(|age| ("age", seconds(age))));
    lines.extend(s.lease_seconds.map(|left| {
        let word = if left > 0.0 { format!("{} left", seconds(left)) } else { "expired".to_owned() };
        ("lease", word)
    }));
    lines.extend(s.endpoint.as_ref().map(|endpoint| {
        let cluster = s.cluster.as_ref().map(|cluster| format!(" of cluster {cluster}")).unwrap_or_default();
        ("endpoint", format!("{endpoint}{cluster}"))
    }));
    if let Some(error) = &s.error {
        let ago = s.error_age_seconds.map(|age| format!("{} ago: ", seconds(age))).unwrap_or_default();
        lines.push(("last error", format!("{ago}{error}")));
    }
    if !s.refused.is_empty() {
        let mut counts: Vec<_> =
            s.refused.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        counts.sort();
        lines.push(("refused", counts.join(", ")));
    }
    lines
}

fn running(s: &v1::FlagsStatus) -> String {
    match (s.running(), s.return_seconds) {
        (RunningMigrations::Leave, _) => "leave v3".to_owned(),
        (RunningMigrations::Return, _) => "may return to v3".to_owned(),
        (RunningMigrations::Keep, Some(left)) => {
            format!("stay on their path, and may return to v3 in {}", seconds(left))
        }
        (RunningMigrations::Keep, None) => "stay on their path".to_owned(),
        (RunningMigrations::Unspecified, _) => "unknown".to_owned(),
    }
}

fn about(document: &v1::FlagDocument) -> String {
    let on = if document.enabled { "on" } else { "off" };
    let mut text = format!("{on} at {} %, on_stale {}", document.percentage, document.on_stale);
    for (holds, word) in
        [(document.excluded, ", this node is excluded"), (document.canary, ", this node is a canary")]
    {
        text.push_str(if holds { word } else { "" });
    }
    text
}
