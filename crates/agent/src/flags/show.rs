//! The flag as an operator sees it: the answer to `dwcpctl flags`.

use dwcp_migrate::{Gate, Running};
use dwcp_rpc::v1;

use super::keeper::{Clock, bucket_of};
use super::metrics::REFUSALS;
use super::{FEATURE, Flag};

impl Flag {
    /// All there is to show, as of now.
    pub(crate) fn status(&self) -> v1::FlagsStatus {
        let Gate { source, veto, .. } = self.followed.gate.borrow().clone();
        let view = self.followed.view.borrow().clone();
        let now = self.followed.clock.map(Clock::now).unwrap_or_default();
        let since = |moment: dwcp_flags::Moment| now.0.saturating_sub(moment.0).as_secs_f64();
        let until = |moment: dwcp_flags::Moment| moment.0.saturating_sub(now.0).as_secs_f64();
        let (veto_code, veto) = veto.map(|veto| (veto.code.to_owned(), veto.text)).unwrap_or_default();
        let (error, error_age_seconds) = view.error.map(|(what, at)| (what, since(at))).unzip();
        v1::FlagsStatus {
            node: self.node.clone(),
            feature: FEATURE.to_owned(),
            source: self.source.clone(),
            path: source.new.name().to_owned(),
            running: match source.running {
                Running::Leave => v1::RunningMigrations::Leave,
                Running::Keep => v1::RunningMigrations::Keep,
                Running::Return => v1::RunningMigrations::Return,
            }
            .into(),
            reason_code: source.reason.code.to_owned(),
            reason: source.reason.text,
            veto_code,
            veto,
            bucket: bucket_of(&self.node).into(),
            document: view.document.map(|document| v1::FlagDocument {
                enabled: document.enabled,
                percentage: document.percentage.into(),
                excluded: document.excluded,
                canary: document.canary,
                on_stale: document.on_stale.name().to_owned(),
                epoch: document
                    .epoch
                    .map(|epoch| v1::Epoch { incarnation: epoch.incarnation, counter: epoch.counter }),
            }),
            age_seconds: view.confirmed.map(since),
            lease_seconds: view.lease.map(|lease| lease.left(now).as_secs_f64()),
            endpoint: view.endpoint,
            cluster: view.cluster.filter(|cluster| !cluster.is_empty()),
            error,
            error_age_seconds,
            return_seconds: view.returns.map(until),
            refused: REFUSALS
                .iter()
                .map(|reason| ((*reason).to_owned(), self.metrics.refusals(reason)))
                .filter(|(_, count)| *count > 0)
                .collect(),
        }
    }
}
