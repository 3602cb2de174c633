//! The server under test: a real process, with TLS.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustls::ClientConfig;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::http::{Connection, HOST, Shaking};

/// For the start, and for the end.
const LIMIT: Duration = Duration::from_secs(20);
/// For how long a connection that nobody uses is counted on: less than the server lets it be silent.
const KEPT: Duration = Duration::from_secs(15);

/// A server and all that it needs, in a temporary folder.
#[derive(Debug)]
pub(crate) struct Server {
    program: PathBuf,
    folder: TempDir,
    process: Child,
    pub(crate) address: SocketAddr,
    pub(crate) tls: Arc<ClientConfig>,
    token: String,
    /// The operator's connection, and when it was used last.
    admin: Option<(Connection, Instant)>,
}

/// What the process has used.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    /// Bytes of memory that is its own.
    pub(crate) memory: u64,
}

impl Server {
    /// Starts a server with a new state.
    pub(crate) async fn start(program: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let signed = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        std::fs::write(folder.path().join("cert.pem"), signed.cert.pem())?;
        std::fs::write(folder.path().join("key.pem"), signed.signing_key.serialize_pem())?;
        let tls = crate::tls::config(signed.cert.der().clone())?;

        let file = folder.path().join("tokens");
        let new = ["token", "new", "--name", "drill", "--roles", "admin", "--file"];
        let made = Command::new(program).args(new).arg(&file).output().await.context("make a token")?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let token = String::from_utf8(made.stdout)?.lines().last().context("a token")?.to_owned();

        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (process, address) = launch(program, folder.path(), any).await?;
        Ok(Server { program: program.to_owned(), folder, process, address, tls, token, admin: None })
    }

    /// Stops it as an operator would, and starts it again.
    pub(crate) async fn restart(&mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        tokio::time::timeout(LIMIT, self.process.wait()).await.context("the server does not stop")??;
        self.relaunch().await
    }

    /// Kills it.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        self.process.kill().await.context("kill the server")
    }

    /// Starts it again, at the same address.
    pub(crate) async fn relaunch(&mut self) -> Result<()> {
        self.admin = None;
        (self.process, self.address) = launch(&self.program, self.folder.path(), self.address).await?;
        Ok(())
    }

    /// What it has used so far.
    pub(crate) fn usage(&self) -> Result<Usage> {
        let id = self.process.id().context("the server has ended")?;
        usage(&format!("/proc/{id}"))
    }

    /// Asks as an operator; the answer must be a success.
    pub(crate) async fn ask(&mut self, method: &str, path: &str, body: &str) -> Result<Value> {
        // The server ends a connection that is silent for long, and a request that meets its end might have been heard or not.
        let admin = self.admin.take().filter(|(_, used)| used.elapsed() < KEPT);
        let mut admin = match admin {
            Some((admin, _)) => admin,
            None => self.connect().await?,
        };
        let token = format!("authorization: Bearer {}\r\n", self.token);
        let answer = admin.send(method, path, &token, body).await?;
        self.admin = Some((admin, Instant::now()));
        let text = String::from_utf8(answer.body)?;
        ensure!(answer.status == 200, "{method} {path}: status {}: {text}", answer.status);
        Ok(serde_json::from_str(&text)?)
    }

    /// A connection for the operator, who tries again as a node does: a server with a fleet at its door may keep one waiting.
    async fn connect(&self) -> Result<Connection> {
        let began = Instant::now();
        let mut shaking = Shaking::default();
        for attempt in 0u32.. {
            match Connection::open(Ipv4Addr::LOCALHOST, self.address, &self.tls, &mut shaking).await {
                Ok(connection) => return Ok(connection),
                Err(error) if began.elapsed() > LIMIT => return Err(error.context("connect as an operator")),
                // The fleet's polls are the chance in this; any uneven step keeps out of their pace.
                Err(_) => tokio::time::sleep(Duration::from_millis(100 + 37 * u64::from(attempt % 10))).await,
            }
        }
        bail!("not connected")
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.process.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        kill_process(id.context("the server has ended")?, signal).context("signal the server")
    }
}

/// What this process, the nodes, has used.
pub(crate) fn own_usage() -> Result<Usage> {
    usage("/proc/self")
}

async fn launch(program: &Path, folder: &Path, listen: SocketAddr) -> Result<(Child, SocketAddr)> {
    let path = |name: &str| folder.join(name);
    let mut process = Command::new(program)
        .arg("serve")
        .arg("--listen")
        .arg(listen.to_string())
        .arg("--state")
        .arg(path("state"))
        .arg("--admin-token-file")
        .arg(path("tokens"))
        .arg("--tls-cert")
        .arg(path("cert.pem"))
        .arg("--tls-key")
        .arg(path("key.pem"))
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    let mut lines = BufReader::new(process.stderr.take().context("its standard error")?).lines();
    let ready = async {
        while let Some(line) = lines.next_line().await? {
            if let Some((_, rest)) = line.split_once("ready address=") {
                let address = rest.split(' ').next().unwrap_or_default();
                return Ok(address.parse()?);
            }
            eprintln!("{line}");
        }
        bail!("the server ended before it was ready")
    };
    let address = tokio::time::timeout(LIMIT, ready).await.context("the server does not start")??;
    // A pipe that nobody reads would stop it.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok((process, address))
}

fn usage(process: &str) -> Result<Usage> {
    let stat = std::fs::read_to_string(format!("{process}/stat"))?;
    // The second field is a name in brackets, which may hold anything; times are the 14th and the 15th.
    let (_, fields) = stat.rsplit_once(") ").context("stat")?;
    let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let status = std::fs::read_to_string(format!("{process}/status"))?;
    let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).context("RssAnon")?;
    let kib: u64 = memory.trim().trim_end_matches(" kB").parse()?;
    let cpu = Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64);
    Ok(Usage { cpu, memory: kib * 1024 })
}
