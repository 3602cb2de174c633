//! `dwcp-control`, the DWCP control plane: flag API, inventory, health.
//!
//! ```text
//! nodes      GET + report ──> api ──> fleet (who applied what)     in memory
//! operators  GET          ──> api ──> view  (flags, fleet)         in memory
//!            POST         ──> api ──> writer ──> state (rules) ──> store (SQLite) ──> view
//! ```
//!
//! [`serve::serve`] is the whole life of the server on one page; [`api`] lists the requests. Exit status: 0 when it is done,
//! 1 when it could not be done, 2 when the command line is wrong.

mod api;
mod fleet;
mod folder;
mod listen;
mod serve;
mod state;
mod store;
mod time;
mod tokens;
mod turns;
mod writer;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::state::Role;

/// For how long a token holds if nobody says otherwise.
const TOKEN_DAYS: u64 = 365;

/// The DWCP control plane: decides which nodes use path v3, and knows which of them do.
#[derive(Debug, Parser)]
#[command(name = "dwcp-control", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API. A state folder that is empty becomes a new cluster, its flag off.
    Serve(ServeArgs),
    /// Make tokens for those who may write.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Copy the state of a server, running or not, to a file.
    Backup {
        /// The server's state folder.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
        /// The file; it must not exist.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Put a backup in place of the state of a stopped server. Every flag is off then, in a new incarnation of its epoch.
    Restore {
        /// The server's state folder.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
        /// A file that `backup` wrote.
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
    },
    /// Check that no entry of the audit was changed or taken out.
    VerifyAudit {
        /// The server's state folder.
        #[arg(long, value_name = "DIR")]
        state: PathBuf,
    },
}

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeArgs {
    /// The address to serve; with port 0 a free one, which `listen.json` in the state folder tells.
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) listen: SocketAddr,
    /// The folder of the database; made if need be.
    #[arg(long, value_name = "DIR")]
    pub(crate) state: PathBuf,
    /// Lines `NAME ROLES HASH EXPIRY`, see `token new`. Read again on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub(crate) admin_token_file: PathBuf,
    /// The certificate and its chain, PEM. Without it the server speaks plain HTTP. Read again on SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The certificate's key, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub(crate) tls_key: Option<PathBuf>,
    /// A key that signs the answers to nodes, as `dwcpctl keygen` writes it.
    #[arg(long, value_name = "FILE")]
    pub(crate) signing_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Append a token to the file, and print it as the last line. It is written down nowhere else.
    New {
        /// Whose it is, for the audit.
        #[arg(long)]
        name: String,
        /// What it allows: admin (everything), rollback (lower, exclude, hold), nodes (the inventory).
        #[arg(long, value_delimiter = ',', required = true, value_parser = role)]
        roles: Vec<Role>,
        /// The token file; made if need be.
        #[arg(long, value_name = "FILE")]
        file: PathBuf,
        /// When it ends, in UTC: a date such as 2027-01-31, or never. A year from now where absent.
        #[arg(long, value_name = "DATE", value_parser = ends)]
        expires: Option<Ends>,
    },
}

/// When a token ends, in milliseconds since 1970; `None` for never.
#[derive(Debug, Clone, Copy)]
struct Ends(Option<u64>);

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Serve(args) => serve::run(args),
        Command::Token(TokenCommand::New { name, roles, file, expires }) => {
            let roles: BTreeSet<Role> = roles.into_iter().collect();
            let year = time::now_ms() + TOKEN_DAYS * 24 * 3600 * 1000;
            let ends = expires.map_or(Some(year), |Ends(ends)| ends);
            let token = tokens::new_token(&file, &name, &roles, ends)?;
            let until =
                ends.map_or("without an end".to_owned(), |ends| format!("until {}", time::rfc3339(ends)));
            println!("token of {name}, {until}; its hash is in {}", file.display());
            println!("{token}");
            Ok(())
        }
        Command::Backup { state, out } => {
            folder::existing(&state)?.copy_to(&out).context("backup")?;
            folder::sync(&out)?;
            println!("{}", out.display());
            Ok(())
        }
        Command::Restore { state, from } => folder::restore(&state, &from),
        Command::VerifyAudit { state } => {
            let entries = folder::existing(&state)?.verify_audit()?;
            println!("{entries} entries, none changed");
            Ok(())
        }
    }
}

fn role(text: &str) -> Result<Role, String> {
    let role = Role::ALL.into_iter().find(|role| role.name() == text);
    role.ok_or_else(|| "roles are admin, rollback and nodes".to_owned())
}

fn ends(text: &str) -> Result<Ends, String> {
    match text {
        "never" => Ok(Ends(None)),
        _ => match time::parse(text) {
            Some(ends) if ends > time::now_ms() => Ok(Ends(Some(ends))),
            Some(_) => Err("that is in the past".to_owned()),
            None => Err("expected a date such as 2027-01-31, or never".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_certificate_needs_its_key() {
        let serve = "dwcp-control serve --listen 127.0.0.1:0 --state s --admin-token-file t";
        let parse = |more: &str| Cli::try_parse_from(format!("{serve} {more}").split_whitespace());
        assert!(parse("").is_ok() && parse("--tls-cert c --tls-key k").is_ok());
        assert!(parse("--tls-cert c").is_err() && parse("--tls-key k").is_err());
    }
}
