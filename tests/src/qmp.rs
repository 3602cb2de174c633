//! A small blocking QMP client, independent of the one under test.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

/// How long any one answer may take; `pmemsave` of a large guest is the slowest.
const ANSWER: Duration = Duration::from_secs(60);

/// QEMU refused a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// QEMU's class, such as `GenericError`.
    pub class: String,
    /// QEMU's text.
    pub desc: String,
}

impl std::fmt::Display for QmpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.class, self.desc)
    }
}

impl std::error::Error for QmpError {}

/// Something that QEMU told by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Such as `STOP` or `RESUME`.
    pub name: String,
    /// QEMU's own time stamp: microseconds since the epoch.
    pub micros: u64,
    /// The event's data, or null.
    pub data: Value,
}

/// A connection to one QMP socket, past its greeting.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects and takes the monitor out of its negotiation.
    ///
    /// # Errors
    /// No socket there yet, or no QMP behind it.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).with_context(|| format!("connect to {}", path.display()))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = Qmp { stream, reader, events: VecDeque::new() };
        if qmp.read()?.get("QMP").is_none() {
            bail!("{} did not greet like QMP", path.display());
        }
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returned.
    ///
    /// # Errors
    /// A [`QmpError`] where QEMU refused; else the socket failed or was silent for a minute.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream, "{request}").with_context(|| format!("send {command}"))?;
        loop {
            let mut answer = self.read().with_context(|| format!("answer to {command}"))?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
                let error = QmpError { class: text("class"), desc: text("desc") };
                return Err(anyhow!(error).context(format!("{command} was refused")));
            }
        }
    }

    /// The run state, as `query-status` names it.
    ///
    /// # Errors
    /// As [`Qmp::run`].
    pub fn status(&mut self) -> Result<String> {
        let status = self.run("query-status", json!({}))?;
        Ok(status["status"].as_str().context("query-status without a status")?.to_owned())
    }

    /// The events that arrived with the answers so far, oldest first; each is given once.
    pub fn events(&mut self) -> impl Iterator<Item = Event> + '_ {
        self.events.drain(..)
    }

    /// The next message that is no event; events are put aside.
    fn read(&mut self) -> Result<Value> {
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                bail!("QEMU closed the QMP socket");
            }
            let message: Value = serde_json::from_str(&line).context("QMP line")?;
            let Some(name) = message["event"].as_str() else {
                return Ok(message);
            };
            let part = |key: &str| message["timestamp"][key].as_u64().unwrap_or_default();
            let micros = part("seconds") * 1_000_000 + part("microseconds");
            self.events.push_back(Event { name: name.to_owned(), micros, data: message["data"].clone() });
        }
    }
}
