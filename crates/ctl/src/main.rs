//! `dwcpctl`: the operator's command line for the node agent.
//!
//! ```text
//! args -> (request) -> client --gRPC over a unix socket--> dwcpd
//!                        '-> watch -> progress (people) or json (scripts) -> summary, exit status
//! ```
//!
//! Exit status: see [`error::Exit`].

mod args;
mod client;
mod error;
mod estimate;
mod explain;
mod flags;
mod incoming;
mod json;
mod keygen;
mod migrate;
mod nodes;
mod progress;
mod resolve;
mod show;
mod utc;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::error::{CtlError, Exit};

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.command.json();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return CtlError::local("cannot start", &error).report(json),
    };
    let result = runtime.block_on(run(args));
    // A detached wait may still hold a blocking read of the signal pipe.
    runtime.shutdown_background();
    match result {
        Ok(exit) => exit.into(),
        Err(error) => error.report(json),
    }
}

async fn run(args: Args) -> Result<Exit, CtlError> {
    let agent = args.agent;
    match args.command {
        Command::Keygen(args) => keygen::run(&args),
        Command::Incoming(args) => incoming::run(client::connect(&agent).await?, args).await,
        Command::Migrate(args) => migrate::run(&agent, *args).await,
        Command::Estimate(args) => estimate::run(client::connect(&agent).await?, &args).await,
        Command::Status(args) => show::status(client::connect(&agent).await?, args).await,
        Command::List(args) => show::list(client::connect(&agent).await?, &args).await,
        Command::Cancel(args) => show::cancel(client::connect(&agent).await?, args).await,
        Command::Switch(args) => show::switch(client::connect(&agent).await?, &args).await,
        Command::Explain(args) => explain::run(client::connect(&agent).await?, &args).await,
        Command::Flags(args) => flags::run(client::connect(&agent).await?, &args).await,
        Command::Nodes(args) => nodes::run(&args).await,
        Command::Resolve(args) => resolve::run(client::connect(&agent).await?, &args).await,
    }
}
