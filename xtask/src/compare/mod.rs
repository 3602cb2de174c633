//! `cargo xtask compare`: this product beside what else there is, measured in one run.
//!
//! A comparison takes minutes and wants the machine for itself, so it is no part of CI. It writes its table, with the
//! machine and the day, into `docs/`.

mod cost;
mod dc;
mod estimate;
mod machine;
mod relay;
mod stage;
mod table;
mod tcp;
mod v1;
mod wan;

use anyhow::Result;
use clap::{Args, Subcommand};

/// What to compare.
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Path v1 beside socat and QEMU alone, on the loopback; writes docs/compare-v1.md
    V1(v1::Settings),
    /// What `dwcpctl estimate` says beside what the migration then takes, over shaped lines; writes docs/compare-estimate.md
    Estimate(estimate::Settings),
    /// What TCP and QUIC carry over long and lossy lines, by congestion control; writes docs/compare-tcp.md
    Tcp(tcp::Settings),
    /// Datacenter mode beside path v1 and QEMU alone, over a cable between two network namespaces; writes docs/compare-dc.md
    Dc(dc::Settings),
    /// Internet mode beside QEMU's own settings, over a long line; writes docs/compare-wan.md
    Wan(wan::Settings),
}

/// Runs the comparison that was asked for.
pub(crate) fn compare(arguments: &Arguments) -> Result<()> {
    match &arguments.what {
        What::V1(settings) => v1::compare(settings),
        What::Estimate(settings) => estimate::compare(settings),
        What::Tcp(settings) => tcp::compare(settings),
        What::Dc(settings) => dc::compare(settings),
        What::Wan(settings) => wan::compare(settings),
    }
}
