//! A long line between two network namespaces, for agents that are to be far from each other: see `dwcp-wan`.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::agent::program;
use crate::kit::skip;
use crate::netns::{End, Namespaces, entering, namespace};

/// Which way packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From `a` to `b`.
    AToB,
    /// From `b` to `a`.
    BToA,
    /// Either way.
    Both,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::AToB => "ab",
            Direction::BToA => "ba",
            Direction::Both => "both",
        })
    }
}

/// What a direction of the line is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LineProfile {
    /// Bits a second; 0 is as fast as the machine.
    pub bits_per_second: u64,
    /// From one end to the other; half of the round trip.
    pub delay: Duration,
    /// Packets lost of a million.
    pub loss_ppm: u32,
    /// Packets of a million that come 3 ms later, after those that were sent behind them.
    pub reorder_ppm: u32,
    /// Bytes that wait for their turn before packets are dropped.
    pub queue: u64,
}

impl LineProfile {
    /// A line of this rate and delay, without loss, whose queue holds some two round trips' worth.
    pub fn new(bits_per_second: u64, delay: Duration) -> Self {
        let queue = (bits_per_second as f64 / 8.0 * delay.as_secs_f64() * 4.0) as u64;
        LineProfile { bits_per_second, delay, loss_ppm: 0, reorder_ppm: 0, queue: queue.max(256 << 10) }
    }
}

/// Packets that one direction delivered and lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Delivered.
    pub delivered: u64,
    /// Lost by chance, cut or a full queue.
    pub dropped: u64,
    /// Bytes delivered, IP headers included.
    pub bytes: u64,
}

/// Two namespaces and the line between them; all of it is gone when this is dropped.
#[derive(Debug)]
pub struct Wan {
    ends: Namespaces,
    line: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Wan {
    /// The line; or `None`, after a line `SKIPPED test: why`, where the machine does not allow it.
    ///
    /// # Errors
    /// It is allowed, but cannot be made.
    ///
    /// # Panics
    /// In CI (`CI=true`), where nothing may be skipped.
    pub fn start_or_skip(test: &str, profile: LineProfile) -> Result<Option<Self>> {
        let root = std::fs::metadata("/proc/self")?.uid() == 0;
        let ip = ["/sbin/ip", "/usr/sbin/ip", "/bin/ip"].iter().any(|path| Path::new(path).exists());
        let tun = Path::new("/dev/net/tun").exists();
        let why = match (root, ip, tun) {
            (true, true, true) => match program("dwcp-wan") {
                Ok(_) => return Wan::start(profile).map(Some),
                Err(why) => why.to_string(),
            },
            (false, ..) => "network namespaces need root".to_owned(),
            (_, false, _) => "no ip here: `apt-get install iproute2`".to_owned(),
            (.., false) => "no /dev/net/tun here".to_owned(),
        };
        skip(test, &why);
        Ok(None)
    }

    fn start(profile: LineProfile) -> Result<Self> {
        let ends = Namespaces::start()?;
        let line = program("dwcp-wan")?;
        let mut line = namespace(&[&line.to_string_lossy()])
            .args(End::ALL.map(|end| ends.pid(end).to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = line.stdin.take().context("the line's standard input")?;
        let answers = BufReader::new(line.stdout.take().context("the line's standard output")?);
        let mut wan = Wan { ends, line, commands, answers };
        ensure!(wan.answer()? == "ready", "the line between the namespaces is not there");
        for end in End::ALL {
            wan.ends.configure(end)?;
        }
        wan.set(Direction::Both, profile)?;
        Ok(wan)
    }

    /// The network namespace of an end, as `nsenter --net=` takes it.
    pub fn namespace(&self, end: End) -> PathBuf {
        self.ends.namespace(end)
    }

    /// The process id of the line, for whoever counts what it costs.
    pub fn line_pid(&self) -> u32 {
        self.line.id()
    }

    /// Gives a direction another nature, from the next packet on.
    ///
    /// # Errors
    /// The line is gone.
    pub fn set(&mut self, direction: Direction, profile: LineProfile) -> Result<()> {
        let LineProfile { bits_per_second: rate, delay, loss_ppm: loss, reorder_ppm: reorder, queue } =
            profile;
        let delay = delay.as_micros();
        self.obey(&format!(
            "set {direction} rate={rate} delay={delay} loss={loss} reorder={reorder} queue={queue}"
        ))
        .map(drop)
    }

    /// Lets packets vanish, those under way too; the ends are not told.
    ///
    /// # Errors
    /// The line is gone.
    pub fn cut(&mut self, direction: Direction) -> Result<()> {
        self.obey(&format!("cut {direction}")).map(drop)
    }

    /// Ends a cut.
    ///
    /// # Errors
    /// The line is gone.
    pub fn mend(&mut self, direction: Direction) -> Result<()> {
        self.obey(&format!("mend {direction}")).map(drop)
    }

    /// Has the kernel end all TCP connections at an end, as an operator with `ss -K` would.
    ///
    /// # Errors
    /// It refuses: a kernel without INET_DIAG_DESTROY.
    pub fn kill_connections(&self, end: End) -> Result<()> {
        let mut command = entering(&self.namespace(end));
        let output = command.args(["ss", "-K", "dst", "192.0.2.0/24"]).output()?;
        ensure!(output.status.success(), "ss -K: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// What was delivered and lost so far, `a` to `b` and back.
    ///
    /// # Errors
    /// The line is gone.
    pub fn count(&mut self) -> Result<[Count; 2]> {
        let answer = self.obey("count")?;
        let mut numbers = answer.split_whitespace().map(str::parse::<u64>);
        let mut number = || numbers.next().context("a count is missing")?.context("a count is no number");
        let mut count =
            || -> Result<Count> { Ok(Count { delivered: number()?, dropped: number()?, bytes: number()? }) };
        Ok([count()?, count()?])
    }

    /// Runs `work` on a thread in an end's namespace. A socket that it makes stays there, whoever uses it.
    ///
    /// # Errors
    /// `work`'s own; or the namespace cannot be entered.
    pub fn within<T: Send>(&self, end: End, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.ends.within(end, work)
    }

    /// Runs `ip` in an end's namespace, such as `address del` to take its address away.
    ///
    /// # Errors
    /// It refuses.
    pub fn ip(&self, end: End, arguments: &[&str]) -> Result<()> {
        self.ends.ip(end, arguments)
    }

    fn obey(&mut self, command: &str) -> Result<String> {
        writeln!(self.commands, "{command}").context("the line is gone")?;
        let answer = self.answer()?;
        let rest = answer.strip_prefix("ok").with_context(|| format!("{command}: {answer}"))?;
        Ok(rest.trim().to_owned())
    }

    fn answer(&mut self) -> Result<String> {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).context("the line is gone")?;
        Ok(answer.trim_end().to_owned())
    }
}

impl Drop for Wan {
    fn drop(&mut self) {
        let _ = self.line.kill();
        let _ = self.line.wait();
    }
}
