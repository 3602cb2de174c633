//! Fault points: named moments at which a test has the agent die, as by `kill -9`.
//!
//! They are compiled in with the feature `fault-points` only, which no released program has. The variable `DWCP_FAULT`
//! names the point: `before.journal.Commit`, `after.send.Receipt`, `before.vmm.Cont` and so on, whatever the handover's
//! machine asks for; [`pilot`](crate::pilot) has them all. The first process to come to it ends there. At
//! `fails.sync.Commit` and so on the disk takes a line of the journal and does not sync it, each time.
//!
//! The variable `DWCP_OFF` names a mechanism to go without, so that a test of it is seen to fail.

/// Dies here if this point is the one that `DWCP_FAULT` names: a moment, a kind of action, and the action, of which
/// the variant's name counts.
macro_rules! fault_point {
    ($moment:literal, $kind:literal, $action:expr) => {
        #[cfg(feature = "fault-points")]
        $crate::fault::strike($moment, $kind, $action);
    };
}
pub(crate) use fault_point;

/// Switches off what `DWCP_OFF` names: see [`dwcp_proto::fault`].
#[cfg(feature = "fault-points")]
pub(crate) fn begin() {
    if let Ok(name) = std::env::var("DWCP_OFF") {
        let off = dwcp_proto::fault::switch_off(&name);
        tracing::warn!(name, off, "this agent goes without");
    }
}

/// See [`fault_point`].
#[cfg(feature = "fault-points")]
pub(crate) fn strike(moment: &str, kind: &str, action: &dyn std::fmt::Debug) {
    if is_named(moment, kind, action) {
        eprintln!("fault point {moment}.{kind}");
        std::process::abort();
    }
}

/// Whether `DWCP_FAULT` names this point.
#[cfg(feature = "fault-points")]
pub(crate) fn is_named(moment: &str, kind: &str, action: &dyn std::fmt::Debug) -> bool {
    use std::sync::LazyLock;

    static NAMED: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("DWCP_FAULT").ok());
    let Some(named) = &*NAMED else { return false };
    let action = format!("{action:?}");
    let variant = action.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    *named == format!("{moment}.{kind}.{variant}")
}
