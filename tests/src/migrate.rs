//! QEMU to QEMU without an agent: the yardstick, and the proof that the laboratory itself works.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::qemu::Qemu;
use crate::wait::until;

/// Moves the guest over a unix socket in `to`'s folder, QEMU to QEMU, and waits for the end at both.
///
/// # Errors
/// Either QEMU refuses, fails, or is not done within `limit`.
pub fn plain_migration(from: &Qemu, to: &Qemu, limit: Duration) -> Result<()> {
    let uri = format!("unix:{}", to.dir().join("migration.sock").display());
    begin_plain_migration(from, to, &uri)?;
    end_of_plain_migration(from, to, limit)
}

/// Starts to move the guest to where `to` is made to listen, such as `tcp:IP:PORT`.
///
/// # Errors
/// Either QEMU refuses.
pub fn begin_plain_migration(from: &Qemu, to: &Qemu, uri: &str) -> Result<()> {
    to.watch().run("migrate-incoming", json!({ "uri": uri }))?;
    from.watch().run("migrate-set-parameters", json!({ "max-bandwidth": 1_u64 << 34 }))?;
    from.watch().run("migrate", json!({ "uri": uri }))?;
    Ok(())
}

/// Waits for the end of a plain migration at both.
///
/// # Errors
/// Either fails, or is not done within `limit`.
pub fn end_of_plain_migration(from: &Qemu, to: &Qemu, limit: Duration) -> Result<()> {
    for (side, qemu) in [("source", from), ("destination", to)] {
        until("the end of the migration", limit, || {
            let state = qemu.watch().run("query-migrate", json!({}))?;
            match state["status"].as_str() {
                Some("completed") => Ok(Some(())),
                Some("failed" | "cancelled") => bail!("QEMU says {state}"),
                _ => Ok(None),
            }
        })
        .context(side)?;
    }
    // The destination has "completed" a moment before it runs or is paused for good.
    until("the guest's arrival", limit, || Ok((to.status()? != "inmigrate").then_some(())))
}
