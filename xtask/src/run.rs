//! Running other programs, each with a limit of time.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dwcp_tests::in_ci;

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// A command that is ended after `limit`, with all that it started.
pub(crate) fn bounded(limit: Duration, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.arg("--kill-after=10").arg(format!("{}", limit.as_secs())).arg(program);
    command
}

/// The cargo that started us, in the repository's root, within `limit`.
pub(crate) fn cargo(limit: Duration) -> Command {
    let mut command = bounded(limit, std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs to the end with the terminal's own output.
///
/// # Errors
/// It cannot start, or ends with another status than 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("start {}", shown(command)))?;
    if !status.success() {
        bail!("{} ended with {status}{}", shown(command), if_late(status.code()));
    }
    Ok(())
}

/// Runs to the end and gives what it wrote to its standard output.
///
/// # Errors
/// As [`run`], with what it wrote to standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {}", shown(command)))?;
    if !output.status.success() {
        let late = if_late(output.status.code());
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        bail!("{} ended with {}{late}:\n{}", shown(command), output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{} wrote no text", shown(command)))
}

/// Whether a program of this name is on the path.
pub(crate) fn installed(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|folder| folder.join(program).is_file())
}

/// Says that this machine cannot do a part of a chore, and why.
///
/// # Errors
/// In CI, where nothing may be skipped.
pub(crate) fn skip(what: &str, why: &str) -> Result<()> {
    if in_ci() {
        bail!("{what}: {why}");
    }
    println!("SKIPPED {what}: {why}");
    Ok(())
}

fn if_late(code: Option<i32>) -> &'static str {
    // What timeout(1) says for itself.
    if code == Some(124) { " (out of time)" } else { "" }
}

fn shown(command: &Command) -> String {
    let words = command.get_args().map(OsStr::to_string_lossy);
    // Without timeout's own words.
    words
        .skip_while(|word| word.starts_with("--kill-after") || word.parse::<u64>().is_ok())
        .collect::<Vec<_>>()
        .join(" ")
}
