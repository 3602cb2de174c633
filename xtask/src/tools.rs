//! Cargo subcommands that a machine may lack: built once, into `target/tools`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use dwcp_tests::target_dir;

use crate::run::{bounded, installed, run};

/// For the largest of them, cargo-deny, on two cores.
const BUILD: Duration = Duration::from_secs(15 * 60);

/// A cargo subcommand of a fixed line of versions.
pub(crate) struct Tool {
    /// Its crate and program.
    pub(crate) name: &'static str,
    /// As `cargo install --version` takes it.
    pub(crate) version: &'static str,
}

pub(crate) const FUZZ: Tool = Tool { name: "cargo-fuzz", version: "^0.13" };
pub(crate) const DENY: Tool = Tool { name: "cargo-deny", version: "^0.20" };

impl Tool {
    /// Whether the machine or the target folder has it.
    pub(crate) fn present(&self) -> Result<bool> {
        Ok(installed(self.name) || folder()?.join("bin").join(self.name).is_file())
    }

    /// Builds it if nobody has it.
    pub(crate) fn ensure(&self) -> Result<()> {
        if self.present()? {
            return Ok(());
        }
        println!("building {}, once", self.name);
        run(bounded(BUILD, "cargo")
            .args(["install", "--quiet", "--locked", "--root"])
            .arg(folder()?)
            .args([self.name, "--version", self.version])
            // Not as part of this repository.
            .current_dir("/"))
    }
}

/// Lets `command` find the tools.
pub(crate) fn with_tools(command: &mut Command) -> Result<&mut Command> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain([folder()?.join("bin")]);
    let path: OsString = std::env::join_paths(folders)?;
    Ok(command.env("PATH", path))
}

fn folder() -> Result<PathBuf> {
    Ok(target_dir()?.join("tools"))
}
