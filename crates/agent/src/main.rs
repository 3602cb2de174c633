//! `dwcpd`, the DWCP node agent.
//!
//! ```text
//!   config ──> state folder, key, peers ──> flag (Gate) ──┐
//!                                                         v
//!   unix socket ──> service ──convert──> dwcp_migrate::Engine ──> metrics
//!                                                         ^         │
//!   signals, systemd ─────────────── life ────────────────┘       http: /metrics /healthz /readyz
//! ```
//!
//! [`life`] is the whole life of the agent on one page. Exit status: 0 after a clean stop, 1 when the agent could not
//! start or stop cleanly, 2 when the command line or the configuration is wrong (a restart will not help).

mod affinity;
mod allowed;
mod config;
mod convert;
mod flags;
mod http;
mod identity;
mod logging;
mod memory;
mod process;
mod readiness;
mod service;
mod signals;
mod socket;
mod state_dir;
mod systemd;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, Subcommand};
use dwcp_migrate::{Blame, Engine, EngineConfig, Failure, Hde, Limits, Policy};
use dwcp_proto::mode::Bounds;
use tracing::{info, warn};

use crate::config::{Attach, Config, ConfigError, Encryption};
use crate::readiness::Readiness;
use crate::signals::{Event, Signals};

/// How long open RPCs may take to end once the engine is down. What they wait for has ended by then.
const RPC_GRACE: Duration = Duration::from_secs(2);
/// How long threads that still read a file may hold up the exit.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// Exit status of a wrong command line or configuration.
const WRONG_CONFIG: u8 = 2;

/// The DWCP node agent: moves the memory of running VMs to other nodes.
#[derive(Debug, Parser)]
#[command(name = "dwcpd", version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    /// The configuration file (TOML).
    #[arg(long, value_name = "FILE", required = true)]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a configuration file, and the key and peers that it names; start nothing.
    CheckConfig {
        /// The configuration file (TOML).
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    memory::begin();
    let cli = Cli::parse();
    match (cli.command, cli.config) {
        (Some(Command::CheckConfig { file }), _) => check_config(&file),
        (None, Some(file)) => serve(&file),
        // clap asks for one of them.
        (None, None) => ExitCode::from(WRONG_CONFIG),
    }
}

fn serve(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => return wrong(&error),
    };
    logging::start(&config.log);
    // Threads inherit it, and from here on there are some.
    match affinity::confine(config.limits.cpus).and_then(|()| run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            systemd::status(&failure.message);
            complain(&failure);
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.limits.cpus())
        .enable_all()
        .build()
        .map_err(|error| local("runtime", format!("cannot start threads: {error}"), ""))?;
    let result = runtime.block_on(life(config));
    runtime.shutdown_timeout(EXIT_GRACE);
    result
}

/// The agent from its first breath to its last.
async fn life(config: Config) -> Result<(), Failure> {
    let mut signals = Signals::catch()?;
    let readiness = Readiness::new();
    config.without_effect().iter().for_each(|what| warn!("no effect: {what}"));

    // What is ours alone comes first: a second agent stops here, before it can touch a journal.
    let state = state_dir::claim(&config.state_dir.0)?;
    let rpc = socket::bind(&config.listen.rpc.0)?;
    let http = http::serve(config.listen.metrics, readiness.clone()).await?;

    let key = Arc::new(identity::key(&config.identity.key.0, &config.node)?);
    let peers = Arc::new(identity::peers(&config.identity.peers.0)?);
    let flag = Arc::new(flags::start(&config, &key, state.path()).await?);

    let engine = Engine::start(EngineConfig {
        key: Arc::clone(&key),
        peers: Arc::clone(&peers),
        state_dir: state.path().to_owned(),
        policy: policy(&config),
        limits: limits(&config),
        hde: hde(&config),
        bounds: bounds(&config),
        congestion: config.link.congestion,
        transport: config.link.transport,
        gate: flag.gate(),
        sockets: config
            .vmm
            .sockets
            .as_ref()
            .map_or_else(|| state.path().join("sockets"), |path| path.0.clone()),
        attach: config.vmm.attach == Attach::Ptrace,
        outlive: config.vmm.attach == Attach::Ptrace && config.vmm.outlive,
        listen: config.listen.data,
    });
    let engine = tokio::select! {
        engine = engine => engine?,
        // Nothing was begun that the journals would not find again.
        () = signals.terminated() => return Ok(()),
    };
    flag.report_to(engine.metrics().clone());
    http.publish(engine.metrics(), &flag);

    let addresses = state_dir::Addresses {
        data: engine.data_addr(),
        metrics: http.address(),
        rpc: format!("unix:{}", config.listen.rpc.0.display()),
    };
    let service = service::Service::new(
        &config,
        engine.clone(),
        &key,
        Arc::clone(&peers),
        Arc::clone(&flag),
        readiness.clone(),
        &addresses,
    );
    let server = rpc.serve(service, readiness.clone())?;
    state.publish(&addresses)?;
    readiness.ready();
    systemd::ready();
    let watchdog = systemd::watchdog();
    info!(
        node = %config.node,
        version = env!("CARGO_PKG_VERSION"),
        data = %addresses.data,
        metrics = %addresses.metrics,
        rpc = %addresses.rpc,
        "ready"
    );

    while let Event::Reload = signals.next().await {
        systemd::reloading();
        identity::reload(&peers);
        flag.reload();
        systemd::ready();
    }

    info!("stopping");
    systemd::stopping();
    readiness.not_ready("stopping");
    state.retract();
    // The RPC server lives on until the engine is down: whoever watches a migration sees how it ends.
    engine.shutdown().await;
    server.stop(RPC_GRACE).await;
    drop(watchdog);
    info!("stopped");
    Ok(())
}

fn policy(config: &Config) -> Policy {
    Policy {
        v1_plain: config.policy.v1_plain,
        v1: config.policy.v1,
        datacenter_plain: config.policy.datacenter_encryption == Encryption::None,
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        inflight: config.limits.memory.0,
        workers: config.limits.workers(),
        migrations: config.limits.migrations.0,
        memory: config.limits.agent_memory.map(|memory| memory.0),
        cpu_pressure: config.limits.cpu_pressure.map(|percent| percent.0 as u8),
        bandwidth: config.limits.node_bandwidth.map(|rate| rate.0.get()),
    }
}

fn hde(config: &Config) -> Hde {
    let config::Hde { unchanged, dedup, delta, mapped, lanes } = config.hde;
    Hde { unchanged, dedup, delta, mapped, lanes }
}

fn bounds(config: &Config) -> Bounds {
    Bounds { rtt: config.link.datacenter_rtt.0, rate: config.link.datacenter_rate.0.get() }
}

/// Checks what can be checked without starting: the file, and the key and peers where they exist already.
fn check_config(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => return wrong(&error),
    };
    for what in config.without_effect() {
        println!("note: no effect: {what}");
    }
    let identity = &config.identity;
    let checks: [(&Path, Result<(), Failure>); 2] = [
        (&identity.key.0, identity::key(&identity.key.0, &config.node).map(drop)),
        (&identity.peers.0, identity::peers(&identity.peers.0).map(drop)),
    ];
    let mut sound = flags::check(&config.flags).inspect_err(complain).is_ok();
    for (path, result) in checks {
        match result {
            Ok(()) => {}
            // A package checks its default before anybody made a key.
            Err(_) if !path.exists() => println!("note: {} is not there yet", path.display()),
            Err(failure) => {
                complain(&failure);
                sound = false;
            }
        }
    }
    if !sound {
        return ExitCode::FAILURE;
    }
    println!("{}: ok", file.display());
    ExitCode::SUCCESS
}

fn wrong(error: &ConfigError) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(WRONG_CONFIG)
}

fn complain(failure: &Failure) {
    eprintln!("error: {}: {}", failure.code, failure.message);
    if !failure.hint.is_empty() {
        eprintln!("hint: {}", failure.hint);
    }
}

/// A failure of this machine or its configuration.
fn local(code: &str, message: impl Into<String>, hint: impl Into<String>) -> Failure {
    Failure::new(code, Blame::Local, message, hint)
}
