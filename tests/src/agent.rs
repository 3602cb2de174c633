//! Real agents: the built `dwcpd` with a configuration of its own, driven by the built `dwcpctl`.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::faults::OFF;
use crate::kit::target_dir;
use crate::netns::{entering, within};
use crate::wait::until;

/// From the start of the process to an answer on its RPC socket.
const START: Duration = Duration::from_secs(15);
/// From SIGTERM to the end of an agent without migrations.
const STOP: Duration = Duration::from_secs(15);
/// For any one `dwcpctl`, a migration included.
const CTL: Duration = Duration::from_secs(120);

/// Where an agent listens, as it says itself in `STATE_DIR/listen.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// For other agents: TCP and QUIC.
    pub data: SocketAddr,
    /// For Prometheus.
    pub metrics: SocketAddr,
}

/// What an agent is configured to do; every key that tests vary.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// `[listen] data`. Port 0 takes a free one.
    pub data: SocketAddr,
    /// `[flags] source`.
    pub flags: String,
    /// `[flags] return_after`; the agent's own where `None`.
    pub return_after: Option<&'static str>,
    /// `[flags] ca`; the system's where `None`.
    pub flags_ca: Option<PathBuf>,
    /// `[flags] without`: the path where the source is `none`.
    pub without: &'static str,
    /// `[policy] v1`.
    pub v1: &'static str,
    /// `[policy] v1_plain`.
    pub v1_plain: bool,
    /// `[policy] datacenter_encryption`.
    pub datacenter_encryption: &'static str,
    /// `state_dir`; the agent's own folder where `None`.
    pub state_dir: Option<PathBuf>,
    /// The program: `dwcpd`, or `dwcpd-faulty`, which has fault points.
    pub program: &'static str,
    /// Further environment variables.
    pub env: Vec<(&'static str, String)>,
    /// The network namespace that it runs in: [`crate::Wan::namespace`].
    pub namespace: Option<PathBuf>,
    /// Further lines of TOML, put at the end.
    pub extra: String,
}

/// [`AgentConfig::extra`] of an agent that may attach to its VMMs, and writes into mapped RAM all the same.
pub const ATTACHES: &str = "[vmm]\nattach = \"ptrace\"\noutlive = false\n";

impl Default for AgentConfig {
    /// Any path may be asked for, and all of it is encrypted.
    fn default() -> Self {
        AgentConfig {
            data: SocketAddr::from(([127, 0, 0, 1], 0)),
            flags: "none".into(),
            return_after: None,
            flags_ca: None,
            without: "v3",
            v1: "any",
            v1_plain: false,
            datacenter_encryption: "tls",
            state_dir: None,
            // Which is inherited.
            program: if std::env::var_os(OFF).is_some() { "dwcpd-faulty" } else { "dwcpd" },
            env: Vec::new(),
            namespace: None,
            extra: String::new(),
        }
    }
}

impl AgentConfig {
    fn toml(&self, node: &str, dir: &Path) -> String {
        let AgentConfig { data, flags, without, v1, v1_plain, datacenter_encryption, extra, .. } = self;
        let path = |name: &str| dir.join(name).display().to_string();
        let wait = self.return_after.map_or_else(String::new, |wait| format!("return_after = \"{wait}\"\n"));
        let ca = self.flags_ca.as_ref().map_or_else(String::new, |ca| format!("ca = \"{}\"\n", ca.display()));
        format!(
            "node = \"{node}\"\n\
             state_dir = \"{state}\"\n\
             [listen]\ndata = \"{data}\"\nrpc = \"unix:{rpc}\"\nmetrics = \"127.0.0.1:0\"\n\
             [identity]\nkey = \"{key}\"\npeers = \"{peers}\"\n\
             [flags]\nsource = \"{flags}\"\nwithout = \"{without}\"\n{wait}{ca}\
             [policy]\nv1 = \"{v1}\"\nv1_plain = {v1_plain}\ndatacenter_encryption = \"{datacenter_encryption}\"\n\
             {extra}",
            state = self.state_dir(dir).display(),
            rpc = path("rpc.sock"),
            key = path(&format!("{node}.key")),
            peers = path("peers"),
        )
    }

    fn state_dir(&self, dir: &Path) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| dir.join("state"))
    }
}

/// What a `dwcpctl` said, and how it ended.
#[derive(Debug, Clone)]
pub struct CtlOutput {
    /// Exit status; `None` where a signal or the time limit ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl CtlOutput {
    /// The last line as JSON: with `--json` the result of the whole.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        let last = self.stdout.lines().next_back().unwrap_or_default();
        serde_json::from_str(last).with_context(|| format!("no JSON in the last line: {self:?}"))
    }

    /// Itself, if it ended with status 0.
    ///
    /// # Errors
    /// It did not; its output is in the error.
    pub fn success(self) -> Result<Self> {
        match self.status {
            Some(0) => Ok(self),
            status => bail!("dwcpctl ended with {status:?}: {}{}", self.stdout, self.stderr),
        }
    }

    /// Its complaint, if it ended with a status other than 0.
    ///
    /// # Errors
    /// It succeeded, was killed, or was silent.
    pub fn refusal(self) -> Result<String> {
        ensure!(self.status.is_some_and(|status| status != 0), "a refusal was due: {self:?}");
        ensure!(!self.stderr.trim().is_empty(), "a refusal without a reason: {self:?}");
        Ok(self.stderr)
    }

    /// The same, if the complaint carries this stable code.
    ///
    /// # Errors
    /// As [`CtlOutput::refusal`], or it has another code.
    pub fn refused_as(self, code: &str) -> Result<String> {
        let said = self.refusal()?;
        let begin = format!("error: {code}: ");
        ensure!(said.lines().any(|line| line.starts_with(&begin)), "no \"{code}\": {said}");
        Ok(said)
    }
}

/// A node: its folder with keys and configuration, and the agent's process while it runs. Killed when dropped.
#[derive(Debug)]
pub struct Agent {
    node: String,
    dir: PathBuf,
    config: AgentConfig,
    child: Option<Child>,
    listen: Option<Listen>,
}

impl Agent {
    /// Makes the node's folder `dir/NODE` and its key pair, and starts nothing.
    ///
    /// # Errors
    /// `dwcpctl keygen` fails.
    pub fn prepare(dir: &Path, node: &str, config: AgentConfig) -> Result<Self> {
        let dir = dir.join(node);
        fs::create_dir_all(dir.join("peers"))?;
        run_ctl(&["keygen", "--node", node, "--out", &dir.to_string_lossy()].map(str::to_owned))?
            .success()?;
        Ok(Agent { node: node.to_owned(), dir, config, child: None, listen: None })
    }

    /// Two nodes `a` and `b` that know each other's keys, both running.
    ///
    /// # Errors
    /// One of them does not start; its log is in the error.
    pub fn pair(dir: &Path, a: AgentConfig, b: AgentConfig) -> Result<(Self, Self)> {
        let (mut a, mut b) = (Agent::prepare(dir, "a", a)?, Agent::prepare(dir, "b", b)?);
        a.trust(&b)?;
        b.trust(&a)?;
        a.start()?;
        b.start()?;
        Ok((a, b))
    }

    /// Puts the other's public key into this node's peers.
    ///
    /// # Errors
    /// The file cannot be copied.
    pub fn trust(&self, peer: &Agent) -> Result<()> {
        let name = format!("{}.pub", peer.node);
        fs::copy(peer.dir.join(&name), self.dir.join("peers").join(&name))?;
        Ok(())
    }

    /// Starts the agent and waits until it answers. Its addresses stay the same from then on, over restarts too.
    ///
    /// # Errors
    /// It ends, or does not answer; its log is in the error.
    pub fn start(&mut self) -> Result<()> {
        ensure!(self.child.is_none(), "{} runs already", self.node);
        let listen_json = self.config.state_dir(&self.dir).join("listen.json");
        // That of an earlier life would be taken for this one's.
        let _ = fs::remove_file(&listen_json);
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut child = self
            .command(&[])?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start dwcpd")?;
        let ready = until("dwcpd's RPC socket", START, || {
            if let Some(status) = child.try_wait()? {
                bail!("dwcpd ended with {status}");
            }
            let written = fs::read_to_string(&listen_json).ok();
            Ok(written.filter(|_| UnixStream::connect(self.rpc_path()).is_ok()))
        });
        self.child = Some(child);
        let listen = ready.and_then(|text| parse_listen(&text)).map_err(|error| {
            self.kill();
            error.context(format!("agent {}:\n{}", self.node, self.log()))
        })?;
        self.config.data = listen.data;
        self.listen = Some(listen);
        Ok(())
    }

    /// Runs the agent where it cannot start, and gives its exit status and its last words. `privileges` are arguments
    /// of `setpriv`.
    ///
    /// # Errors
    /// It does start.
    pub fn start_refused(&self, privileges: &[&str]) -> Result<CtlOutput> {
        let output = bounded(START, &self.command(privileges)?).output()?;
        let output = collect(output);
        // 124: it went on until the time was over.
        ensure!(output.status != Some(124), "dwcpd started, though it was not to: {output:?}");
        Ok(output)
    }

    fn command(&self, privileges: &[&str]) -> Result<Command> {
        let config = self.dir.join("dwcpd.toml");
        fs::write(&config, self.config.toml(&self.node, &self.dir))?;
        let mut command = match &self.config.namespace {
            Some(namespace) => entering(namespace),
            None => Command::new("env"),
        };
        command.args(["setpriv", "--pdeathsig", "KILL"]).args(privileges);
        command.arg(program(self.config.program)?).arg("--config").arg(config).env("RUST_LOG", "info");
        command.envs(self.config.env.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Runs `dwcpctl --agent THIS args...` to its end.
    ///
    /// # Errors
    /// It cannot be started; that it fails is in its output.
    pub fn ctl(&self, args: &[&dyn Display]) -> Result<CtlOutput> {
        self.ctl_within(CTL, args)
    }

    /// The same, for one that may take as long as `limit`.
    ///
    /// # Errors
    /// As [`Agent::ctl`].
    pub fn ctl_within(&self, limit: Duration, args: &[&dyn Display]) -> Result<CtlOutput> {
        let command = ctl_command(&self.with_address(args))?;
        Ok(collect(bounded(limit, &command).stdin(Stdio::null()).output()?))
    }

    /// The same, with each line of its standard output handed to `line` as it comes.
    ///
    /// # Errors
    /// As [`Agent::ctl`].
    pub fn ctl_watched(&self, args: &[&dyn Display], mut line: impl FnMut(&str)) -> Result<CtlOutput> {
        let mut command = bounded(CTL, &ctl_command(&self.with_address(args))?);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("standard output")?;
        let stderr = child.stderr.take().context("standard error")?;
        // Read beside it, since a full pipe would stop the program.
        let stderr = std::thread::spawn(move || std::io::read_to_string(stderr));
        let mut said = String::new();
        for text in BufReader::new(stdout).lines() {
            let text = text?;
            line(&text);
            said += &(text + "\n");
        }
        let status = child.wait()?.code();
        let stderr = stderr.join().map_err(|_| anyhow!("standard error"))??;
        Ok(CtlOutput { status, stdout: said, stderr })
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.config.state_dir(&self.dir)
    }

    /// Its configuration, for the next start.
    pub fn config_mut(&mut self) -> &mut AgentConfig {
        &mut self.config
    }

    /// `NODE=IP:PORT`, as `dwcpctl migrate --to` wants it.
    ///
    /// # Errors
    /// It was never started.
    pub fn target(&self) -> Result<String> {
        Ok(format!("{}={}", self.node, self.listen()?.data))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// It was never started.
    pub fn listen(&self) -> Result<Listen> {
        self.listen.ok_or_else(|| anyhow!("agent {} was never started", self.node))
    }

    /// The body of a `GET` from its metrics address, such as `/metrics` or `/healthz`.
    ///
    /// # Errors
    /// It does not answer with status 200.
    pub fn http_get(&self, path: &str) -> Result<String> {
        let address = self.listen()?.metrics;
        let connect = || Ok(std::net::TcpStream::connect(address)?);
        let mut stream = match &self.config.namespace {
            Some(namespace) => within(namespace, connect)?,
            None => connect()?,
        };
        stream.set_read_timeout(Some(START))?;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let answer = std::io::read_to_string(stream)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
        Ok(body.to_owned())
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Everything it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Ends it as systemd would (SIGTERM), and gives its exit status.
    ///
    /// # Errors
    /// It goes on.
    pub fn stop(&mut self) -> Result<Option<i32>> {
        let mut child = self.child.take().context("it does not run")?;
        let asked = Command::new("kill").args(["-TERM", &child.id().to_string()]).status()?;
        ensure!(asked.success(), "kill -TERM failed");
        let ended = until("dwcpd to stop", STOP, || Ok(child.try_wait()?));
        self.child = Some(child);
        ended.map(|status| status.code())
    }

    /// Waits until it has ended by itself, and gives how; `None` while it runs on after `limit`.
    ///
    /// # Errors
    /// It was never started, or has ended before.
    pub fn ended_within(&mut self, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
        let child = self.child.as_mut().context("it does not run")?;
        let ended = until("the agent's end", limit, || Ok(child.try_wait()?)).ok();
        if ended.is_some() {
            self.child = None;
        }
        Ok(ended)
    }

    /// Ends it as a crash would (SIGKILL).
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn with_address(&self, args: &[&dyn Display]) -> Vec<String> {
        let address = ["--agent".to_owned(), format!("unix:{}", self.rpc_path().display())];
        address.into_iter().chain(args.iter().map(|word| word.to_string())).collect()
    }

    fn rpc_path(&self) -> PathBuf {
        self.dir.join("rpc.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("dwcpd.log")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // One that counts the lines that it runs writes them down when it ends by itself: `cargo xtask coverage`.
        if std::env::var_os("LLVM_PROFILE_FILE").is_some() {
            let _ = self.stop();
        }
        self.kill();
    }
}

/// The built program of this name.
///
/// # Errors
/// It has not been built.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let path = target_dir()?.join("release").join(name);
    ensure!(path.is_file(), "{name} is not built: run `cargo xtask test`, which builds all programs");
    Ok(path)
}

fn run_ctl(args: &[String]) -> Result<CtlOutput> {
    Ok(collect(bounded(CTL, &ctl_command(args)?).stdin(Stdio::null()).output()?))
}

fn ctl_command(args: &[String]) -> Result<Command> {
    let mut command = Command::new(program("dwcpctl")?);
    command.args(args);
    Ok(command)
}

/// The same command under timeout(1).
fn bounded(limit: Duration, command: &Command) -> Command {
    let mut bounded = Command::new("timeout");
    bounded.arg("--kill-after=5").arg(limit.as_secs().to_string());
    bounded.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        bounded.env(key, value.unwrap_or_default());
    }
    bounded
}

fn collect(output: std::process::Output) -> CtlOutput {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    CtlOutput { status: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

fn parse_listen(text: &str) -> Result<Listen> {
    let value: Value = serde_json::from_str(text).context("listen.json")?;
    let address = |key: &str| -> Result<SocketAddr> {
        value[key].as_str().and_then(|text| text.parse().ok()).with_context(|| format!("\"{key}\" in {text}"))
    };
    Ok(Listen { data: address("data")?, metrics: address("metrics")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_json_is_read() {
        let listen = parse_listen(r#"{"data":"127.0.0.1:4000","metrics":"127.0.0.1:4001"}"#).unwrap();
        assert_eq!((listen.data.port(), listen.metrics.port()), (4000, 4001));
        assert!(parse_listen(r#"{"data":"127.0.0.1:4000"}"#).is_err());
    }
}
