//! The QMP client: commands with ids and time limits, events without loss.
//!
//! One task owns the socket. It writes commands in the order in which they were given, matches answers by id, and
//! hands each event to every subscriber. Source of the format: QEMU's `docs/interop/qmp-spec.rst`.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::error::{Ended, EventsError, QmpError};
use super::event::Event;
use super::types::Version;
use crate::socket;

/// Bytes of a line from the VMM. The largest regular answer is `query-qmp-schema`, some 200 KiB.
pub const MAX_LINE: usize = 4 << 20;
/// Commands that wait to be written; QMP executes one at a time, so more callers wait here.
const MAX_QUEUED: usize = 32;
/// Commands that were written and not answered at which those are forgotten that nobody waits for any more.
const MAX_PENDING: usize = 256;
/// Events that a subscriber may leave unread before it counts as overrun: a migration has some tens, plus one a round.
const MAX_UNREAD_EVENTS: usize = 1024;
/// Characters of a VMM's words that go into an error.
const MAX_EXCERPT: usize = 200;

/// Time limits of a QMP connection.
#[derive(Debug, Clone, Copy)]
pub struct QmpConfig {
    /// For the greeting and the negotiation, together.
    pub connect: Duration,
    /// For each command, from the call to the answer.
    pub command: Duration,
}

impl Default for QmpConfig {
    fn default() -> Self {
        QmpConfig { connect: Duration::from_secs(5), command: Duration::from_secs(10) }
    }
}

/// A QMP connection. Clones share it; it closes with the last one.
#[derive(Debug, Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
    requests: mpsc::Sender<Request>,
    config: QmpConfig,
    version: Version,
    pid: Option<i32>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    next_id: AtomicU64,
    subscribers: Mutex<Subscribers>,
    ended: OnceLock<Ended>,
}

impl Qmp {
    /// Connects to the QMP socket at `path`, waits for the greeting, and leaves the negotiation mode.
    pub async fn connect(path: &Path, config: QmpConfig) -> Result<Self, QmpError> {
        let limit = tokio::time::Instant::now() + config.connect;
        let connected = tokio::time::timeout_at(limit, async {
            let stream = socket::connect(path).await;
            let stream = stream.map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
            let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
            let (read, write) = stream.into_split();
            let mut lines = Lines { reader: BufReader::with_capacity(64 << 10, read), line: Vec::new() };
            let version = greeting(path, &mut lines).await?;
            Ok((version, lines, write, pid))
        });
        let (version, lines, write, pid) = connected
            .await
            .map_err(|_| QmpError::NoGreeting { path: path.to_owned(), after: config.connect })??;
        let shared = Arc::new(Shared {
            path: path.to_owned(),
            next_id: AtomicU64::new(1),
            subscribers: Mutex::default(),
            ended: OnceLock::new(),
        });
        let (requests, queue) = mpsc::channel(MAX_QUEUED);
        let link = Link {
            lines,
            write,
            queue,
            outgoing: Vec::new(),
            passing: None,
            writable: true,
            pending: HashMap::new(),
            shared: shared.clone(),
        };
        tokio::spawn(link.run());
        let qmp = Qmp { shared, requests, config, version, pid };
        let left = limit.saturating_duration_since(tokio::time::Instant::now());
        qmp.execute_within("qmp_capabilities", Value::Null, left).await?;
        Ok(qmp)
    }

    /// Executes a command within the time limit of the configuration. `arguments` is an object, or null for none.
    ///
    /// Cancel safe: a command whose future was dropped before it was written is never written; later, its answer is
    /// thrown away.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.config.command).await
    }

    /// Executes a command within `limit`, from this call to the answer.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.exchange(command, arguments, None, limit).await
    }

    /// Executes a command that takes a descriptor (`getfd`), which goes along with it (`SCM_RIGHTS` of unix(7)) and is
    /// closed here.
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        descriptor: OwnedFd,
    ) -> Result<Value, QmpError> {
        self.exchange(command, arguments, Some(descriptor), self.config.command).await
    }

    async fn exchange(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut line = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            line["arguments"] = arguments;
        }
        let mut line = line.to_string().into_bytes();
        line.push(b'\n');
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.requests.send(Request { id, line, descriptor, reply }).await.ok()?;
            answer.await.ok()
        };
        match timeout(limit, exchange).await {
            Ok(Some(Ok(value))) => Ok(value),
            Ok(Some(Err(Refusal { class, desc }))) => {
                Err(QmpError::Refused { command: command.into(), class, desc: excerpt(&desc) })
            }
            Ok(None) => Err(QmpError::Closed {
                command: command.into(),
                path: self.shared.path.clone(),
                source: self.shared.ended(),
            }),
            Err(_) => Err(QmpError::Timeout { command: command.into(), after: limit }),
        }
    }

    /// The events from now on. Each subscriber gets all of them.
    pub fn events(&self) -> Events {
        let (sender, receiver) = mpsc::channel(MAX_UNREAD_EVENTS);
        let overrun = Arc::new(AtomicBool::new(false));
        let mut subscribers = self.shared.subscribers();
        if !subscribers.closed {
            subscribers.list.push(Subscriber { sender, overrun: overrun.clone() });
        }
        drop(subscribers);
        Events { receiver, overrun, shared: self.shared.clone() }
    }

    /// The version from the greeting.
    pub fn version(&self) -> &Version {
        &self.version
    }

    /// The process that opened the QMP socket for listening: the VMM, unless somebody handed the socket to it.
    pub fn pid(&self) -> Option<i32> {
        self.pid
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Why the connection ended, once it did.
    pub fn ended(&self) -> Option<Ended> {
        self.shared.ended.get().cloned()
    }
}

/// Events of one QMP connection, in order, none left out.
#[derive(Debug)]
pub struct Events {
    receiver: mpsc::Receiver<Event>,
    overrun: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Events {
    /// The next event. Cancel safe. After an error there are no more.
    pub async fn recv(&mut self) -> Result<Event, EventsError> {
        match self.receiver.recv().await {
            Some(event) => Ok(event),
            None if self.overrun.load(Ordering::Acquire) => Err(EventsError::Overrun),
            None => Err(EventsError::Closed(self.shared.ended())),
        }
    }

    /// The next event, if one is there.
    pub fn try_recv(&mut self) -> Option<Event> {
        self.receiver.try_recv().ok()
    }
}

impl Shared {
    fn ended(&self) -> Ended {
        self.ended.get().cloned().unwrap_or(Ended::Here)
    }

    fn subscribers(&self) -> std::sync::MutexGuard<'_, Subscribers> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Subscribers {
    list: Vec<Subscriber>,
    closed: bool,
}

#[derive(Debug)]
struct Subscriber {
    sender: mpsc::Sender<Event>,
    overrun: Arc<AtomicBool>,
}

impl Subscribers {
    fn deliver(&mut self, event: &Event) {
        self.list.retain(|subscriber| match subscriber.sender.try_send(event.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                subscriber.overrun.store(true, Ordering::Release);
                false
            }
        });
    }
}

#[derive(Debug)]
struct Request {
    id: u64,
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
    reply: oneshot::Sender<Result<Value, Refusal>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Refusal {
    class: String,
    desc: String,
}

/// The task that owns the socket.
struct Link {
    lines: Lines,
    write: OwnedWriteHalf,
    queue: mpsc::Receiver<Request>,
    /// What is left of the command that is being written.
    outgoing: Vec<u8>,
    /// What goes along with its first byte.
    passing: Option<OwnedFd>,
    writable: bool,
    pending: HashMap<u64, oneshot::Sender<Result<Value, Refusal>>>,
    shared: Arc<Shared>,
}

impl Link {
    async fn run(mut self) {
        let why = loop {
            let step = tokio::select! {
                line = self.lines.next() => line.and_then(|line| self.handle(line)),
                request = self.queue.recv(), if self.writable && self.outgoing.is_empty() => match request {
                    Some(request) => self.take(request),
                    None => Err(Ended::Here),
                },
                written = write(self.write.as_ref(), &self.outgoing, self.passing.as_ref()),
                    if !self.outgoing.is_empty() => match written
                {
                    Ok(len) => {
                        self.outgoing.drain(..len);
                        self.passing = None;
                        Ok(())
                    }
                    // What the VMM said before it went may still be there to read.
                    Err(_) => {
                        self.outgoing.clear();
                        self.passing = None;
                        self.writable = false;
                        Ok(())
                    }
                },
            };
            if let Err(why) = step {
                break why;
            }
        };
        if !matches!(why, Ended::Here | Ended::ByVmm) {
            warn!(path = %self.shared.path.display(), %why, "QMP connection ended");
        }
        // Recorded before anyone is woken: answers and event streams end when their senders drop.
        let _ = self.shared.ended.set(why);
        let mut subscribers = self.shared.subscribers();
        subscribers.closed = true;
        subscribers.list.clear();
    }

    fn take(&mut self, request: Request) -> Result<(), Ended> {
        if request.reply.is_closed() {
            return Ok(());
        }
        if self.pending.len() >= MAX_PENDING {
            self.pending.retain(|_, reply| !reply.is_closed());
        }
        self.pending.insert(request.id, request.reply);
        self.outgoing = request.line;
        self.passing = request.descriptor;
        Ok(())
    }

    fn handle(&mut self, line: Vec<u8>) -> Result<(), Ended> {
        let garbage = || Ended::Garbage(excerpt(&String::from_utf8_lossy(&line)));
        let Ok(Value::Object(mut message)) = serde_json::from_slice(&line) else { return Err(garbage()) };
        if let Some(name) = message.remove("event") {
            let event = Event::parse(name, message).ok_or_else(garbage)?;
            debug!(path = %self.shared.path.display(), event = %event.name, "QMP event");
            self.shared.subscribers().deliver(&event);
            return Ok(());
        }
        let outcome = match (message.remove("return"), message.remove("error")) {
            (Some(value), _) => Ok(value),
            (None, Some(error)) => Err(Refusal::deserialize(error).map_err(|_| garbage())?),
            // Something newer than this client.
            (None, None) => return Ok(()),
        };
        let id = message.get("id").and_then(Value::as_u64);
        match (id.and_then(|id| self.pending.remove(&id)), outcome) {
            // Nobody waits any more if this fails.
            (Some(reply), outcome) => drop(reply.send(outcome)),
            // An error without an id: the VMM could not even read what we wrote.
            (None, Err(_)) if id.is_none() => return Err(garbage()),
            (None, _) => debug!(?id, "QMP answer that nobody waits for"),
        }
        Ok(())
    }
}

/// Writes some of `bytes`, at least one, with `descriptor` along with the first. Cancel safe: what was written is told.
async fn write(stream: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<usize> {
    let write = || {
        let descriptors = descriptor.map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.as_slice().is_empty() {
            control.push(SendAncillaryMessage::ScmRights(descriptors.as_slice()));
        }
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, write).await
}

/// Lines of bounded length.
struct Lines {
    reader: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    /// The next line that is not blank, without its end. Cancel safe: what was read stays.
    async fn next(&mut self) -> Result<Vec<u8>, Ended> {
        loop {
            let available = self.reader.fill_buf().await.map_err(|source| match source.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ended::ByVmm,
                _ => Ended::Io(Arc::new(source)),
            })?;
            if available.is_empty() {
                return Err(Ended::ByVmm);
            }
            let end = available.iter().position(|&byte| byte == b'\n');
            let part = &available[..end.unwrap_or(available.len())];
            if self.line.len() + part.len() > MAX_LINE {
                return Err(Ended::LineTooLong);
            }
            self.line.extend_from_slice(part);
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                if !line.trim_ascii().is_empty() {
                    return Ok(line);
                }
            }
        }
    }
}

async fn greeting(path: &Path, lines: &mut Lines) -> Result<Version, QmpError> {
    let not_qmp = |line: &[u8]| QmpError::NotQmp {
        path: path.to_owned(),
        line: excerpt(&String::from_utf8_lossy(line)),
    };
    let line = lines.next().await.map_err(|source| match source {
        Ended::LineTooLong => not_qmp(&lines.line),
        source => QmpError::Closed { command: "greeting".into(), path: path.to_owned(), source },
    })?;
    let greeting: Value = serde_json::from_slice(&line).map_err(|_| not_qmp(&line))?;
    Version::parse(&greeting["QMP"]["version"]).ok_or_else(|| not_qmp(&line))
}

fn excerpt(text: &str) -> String {
    text.chars().take(MAX_EXCERPT).collect()
}
