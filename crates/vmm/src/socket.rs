//! Unix sockets between an agent and the VMM beside it.
//!
//! A migration's own socket has no name in the file system: [`open_outgoing`] and [`open_incoming`] make a pair of sockets
//! and hand one of it to the VMM over QMP. So it does not matter as which user the VMM runs, and nobody else can come to the
//! guest's memory. Only several connections (multifd) need a path: [`MigrationListener`], [`open_channels`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::qmp::{MigrationStatus, Qemu, QmpError};

/// Bytes of a unix socket's path: what the kernel's `sun_path` holds, less its final zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// Why a unix socket could not be listened on or connected to.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit.
    #[error("socket path {} has more than {MAX_SOCKET_PATH} bytes; choose a shorter folder", .path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// There is nothing at the path.
    #[error("{} does not exist", .path.display())]
    Missing {
        /// The path.
        path: PathBuf,
    },
    /// There is something else at the path.
    #[error("{} is not a socket", .path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A socket that nobody has open for listening.
    #[error("nothing listens on {}", .path.display())]
    NobodyListens {
        /// The path.
        path: PathBuf,
    },
    /// The folder or the socket may not be used by this user.
    #[error("no permission for {}; the agent needs to read and write it", .path.display())]
    Denied {
        /// The path.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot use socket {}", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl SocketError {
    fn new(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => SocketError::Missing { path },
            io::ErrorKind::PermissionDenied => SocketError::Denied { path },
            io::ErrorKind::ConnectionRefused => match std::fs::metadata(&path) {
                Ok(meta) if !meta.file_type().is_socket() => SocketError::NotASocket { path },
                _ => SocketError::NobodyListens { path },
            },
            _ => SocketError::Io { path, source },
        }
    }
}

/// Why a VMM has no connection for its migration.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No pair of sockets could be made.
    #[error("no pair of sockets; is the limit of open files reached?")]
    Pair(#[source] io::Error),
    /// The VMM did not take its end, or does not migrate.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The VMM did not make all the connections that its migration needs.
    #[error("{have} of {wanted} connections came to {}{}", .path.display(), words(.reason.as_deref(), *.strangers))]
    Connections {
        /// Where they were awaited.
        path: PathBuf,
        /// How many came.
        have: usize,
        /// How many were awaited: the main channel's and those of multifd.
        wanted: usize,
        /// How many more came from other processes, and were closed.
        strangers: usize,
        /// What the VMM says of it.
        reason: Option<String>,
    },
    /// A connection broke before anything came over it, or none of them is the main channel, or more than one.
    #[error("the VMM's connections are not one main channel and multifd channels")]
    Roles(#[source] Option<io::Error>),
    /// The socket failed.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// The ending of a sentence.
fn words(reason: Option<&str>, strangers: usize) -> String {
    let strangers = match strangers {
        0 => String::new(),
        n => format!(", and {n} of processes other than the VMM, which were closed"),
    };
    match reason {
        Some(reason) => format!("{strangers}: {reason}"),
        None => strangers,
    }
}

/// The name under which a VMM holds its end until its migration begins.
const NAME: &str = "dwcp-migration";

/// Lets a VMM migrate into a new connection, whose other end is returned. It goes on in the background.
pub async fn open_outgoing(qemu: &Qemu) -> Result<UnixStream, OpenError> {
    let (ours, theirs) = pair()?;
    qemu.give(NAME, theirs.into()).await?;
    let begun = qemu.migrate(&format!("fd:{NAME}")).await;
    used(qemu, begun).await?;
    Ok(ours)
}

/// The connections of a migration with multifd.
#[derive(Debug)]
pub struct Channels {
    /// The main channel.
    pub main: UnixStream,
    /// The multifd channels, in the order in which they came.
    pub multifd: Vec<UnixStream>,
}

/// For all connections of one VMM on the same node, and their first bytes: each takes a millisecond.
const CONNECTING: Duration = Duration::from_secs(10);
/// Between two looks whether the VMM has given up.
const GIVEN_UP: Duration = Duration::from_millis(100);

/// Lets a VMM migrate to `listener`, over its main channel and so many multifd channels, for which it has been set up. It goes on in
/// the background; where this fails it is called off.
///
/// # Errors
/// Within ten seconds not all connections have come: the VMM cannot reach the path, or has another number of channels. Connections of
/// other processes than the one that serves QMP do not count.
pub async fn open_channels(
    qemu: &Qemu,
    listener: &MigrationListener,
    channels: usize,
) -> Result<Channels, OpenError> {
    qemu.migrate(&listener.uri()).await?;
    let opened = accept_channels(qemu, listener, channels).await;
    if opened.is_err() {
        // What it did connect is closed with this, so it gives up at any rate.
        let _ = qemu.cancel().await;
    }
    opened
}

async fn accept_channels(
    qemu: &Qemu,
    listener: &MigrationListener,
    channels: usize,
) -> Result<Channels, OpenError> {
    let wanted = channels + 1;
    let mut accepted = Vec::with_capacity(wanted);
    let mut strangers = 0;
    let mut reason = None;
    let accept = async {
        while accepted.len() < wanted {
            let stream = tokio::select! {
                stream = listener.accept() => stream?,
                () = sleep(GIVEN_UP) => {
                    let info = qemu.migration().await?;
                    if matches!(info.status, Some(MigrationStatus::Failed | MigrationStatus::Cancelled)) {
                        reason = info.error;
                        return Ok(false);
                    }
                    continue;
                }
            };
            let pid = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
            if qemu.qmp().pid().is_some_and(|vmm| pid != Some(vmm)) {
                warn!(?pid, "a connection of another process than the VMM was closed");
                strangers += 1;
                continue;
            }
            accepted.push(stream);
        }
        Ok::<bool, OpenError>(true)
    };
    let all = timeout(CONNECTING, accept).await.unwrap_or(Ok(false))?;
    if !all {
        let (path, have) = (listener.path().to_owned(), accepted.len());
        return Err(OpenError::Connections { path, have, wanted, strangers, reason });
    }
    timeout(CONNECTING, roles(accepted)).await.unwrap_or(Err(OpenError::Roles(None)))
}

/// Tells the main channel from the others by its first bytes, which stay where they are.
async fn roles(accepted: Vec<UnixStream>) -> Result<Channels, OpenError> {
    let (mut main, mut multifd) = (None, Vec::with_capacity(accepted.len()));
    for stream in accepted {
        let mut magic = [0; 4];
        let look = || Ok(recv(&stream, &mut magic[..], RecvFlags::PEEK).map(|(len, _)| len)?);
        let len = stream.async_io(Interest::READABLE, look).await.map_err(|e| OpenError::Roles(Some(e)))?;
        match (len, &magic) {
            (4, b"QEVM") if main.is_none() => main = Some(stream),
            (4, [0x11, 0x22, 0x33, 0x44]) => multifd.push(stream),
            _ => return Err(OpenError::Roles(None)),
        }
    }
    main.map(|main| Channels { main, multifd }).ok_or(OpenError::Roles(None))
}

/// Lets a VMM that waits in `-incoming defer` read from a new connection, whose other end is returned. Say `stop` first, or
/// the guest starts by itself.
pub async fn open_incoming(qemu: &Qemu) -> Result<UnixStream, OpenError> {
    let (ours, theirs) = pair()?;
    hand_over(qemu, theirs.into()).await?;
    Ok(ours)
}

/// Lets a VMM that waits in `-incoming defer` read from this end of a connection.
pub(crate) async fn hand_over(qemu: &Qemu, end: OwnedFd) -> Result<(), OpenError> {
    qemu.give(NAME, end).await?;
    let begun = qemu.incoming(&format!("fd:{NAME}")).await;
    Ok(used(qemu, begun).await?)
}

/// What is asked for as send buffer of a connection: what systems grant by default, of which the kernel makes twice as much. The
/// time that it adds to a downtime is the VMM's and the agent's for so many bytes, some tenths of a millisecond.
const BUFFER: usize = 208 << 10;

/// Both ends of a connection: ours, and the VMM's.
fn pair() -> Result<(UnixStream, std::os::unix::net::UnixStream), OpenError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(OpenError::Pair)?;
    for end in [&ours, &theirs] {
        // A wish only: without it whoever writes waits for the reader more often.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(end, BUFFER);
    }
    ours.set_nonblocking(true).map_err(OpenError::Pair)?;
    let ours = UnixStream::from_std(ours).map_err(OpenError::Pair)?;
    Ok((ours, theirs))
}

/// A VMM that does not use its end must not keep it.
async fn used(qemu: &Qemu, begun: Result<(), QmpError>) -> Result<(), QmpError> {
    if begun.is_err() {
        // It may have taken it before it failed.
        let _ = qemu.close(NAME).await;
    }
    begun
}

/// Refuses a path that no unix socket can have.
pub fn check_path(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(SocketError::PathTooLong { path: path.to_owned() });
    }
    Ok(())
}

/// Connects to the socket of a VMM: its QMP, or one where it waits for its stream.
pub async fn connect(path: &Path) -> Result<UnixStream, SocketError> {
    check_path(path)?;
    UnixStream::connect(path).await.map_err(|source| SocketError::new(path, source))
}

/// A listening socket for one migration, to which the source VMM connects as often as it likes. The file goes away with it.
///
/// No other user reaches the guest's memory: the folder is one that only this user may enter, or the socket has a name that nobody knows
/// but the VMM.
#[derive(Debug)]
pub struct MigrationListener {
    listener: UnixListener,
    path: PathBuf,
}

impl MigrationListener {
    /// Listens on `folder/name`. Makes the folder, with mode 0700, if it is not there; a folder that is there gets
    /// that mode. A socket left over by an earlier process is replaced, any other file is refused.
    pub fn bind(folder: &Path, name: &str) -> Result<Self, SocketError> {
        Self::with_modes(folder, name, 0o700, 0o600)
    }

    /// The same for a VMM of any user, which may be able to enter the folder (mode 0711) and not to list it. The name is the key: the caller makes it
    /// of at least 16 random bytes, and looks at who connects.
    pub fn bind_secret(folder: &Path, name: &str) -> Result<Self, SocketError> {
        Self::with_modes(folder, name, 0o711, 0o666)
    }

    fn with_modes(folder: &Path, name: &str, of_folder: u32, of_socket: u32) -> Result<Self, SocketError> {
        let path = folder.join(name);
        check_path(&path)?;
        let failed = |source| SocketError::new(&path, source);
        std::fs::DirBuilder::new().recursive(true).mode(of_folder).create(folder).map_err(failed)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(of_folder)).map_err(failed)?;
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(&path).map_err(failed)?,
            Ok(_) => return Err(SocketError::NotASocket { path }),
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(source)),
        }
        let listener = MigrationListener { listener: UnixListener::bind(&path).map_err(failed)?, path };
        std::fs::set_permissions(&listener.path, std::fs::Permissions::from_mode(of_socket))
            .map_err(|source| SocketError::new(&listener.path, source))?;
        Ok(listener)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The URI for QMP's `migrate`.
    pub fn uri(&self) -> String {
        format!("unix:{}", self.path.display())
    }

    /// The next connection. Cancel safe.
    pub async fn accept(&self) -> Result<UnixStream, SocketError> {
        match self.listener.accept().await {
            Ok((stream, _)) => Ok(stream),
            Err(source) => Err(SocketError::new(&self.path, source)),
        }
    }
}

impl Drop for MigrationListener {
    fn drop(&mut self) {
        // Nothing is lost if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listener_is_private_replaces_a_stale_socket_and_removes_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("run");
        let stale = {
            std::fs::create_dir(&folder).unwrap();
            std::os::unix::net::UnixListener::bind(folder.join("m1")).unwrap()
        };
        drop(stale);
        assert!(matches!(connect(&folder.join("m1")).await, Err(SocketError::NobodyListens { .. })));
        let listener = MigrationListener::bind(&folder, "m1").unwrap();
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(listener.uri(), format!("unix:{}", folder.join("m1").display()));
        let (connected, accepted) = tokio::join!(connect(listener.path()), listener.accept());
        connected.unwrap();
        accepted.unwrap();
        let path = listener.path().to_owned();
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn each_wrong_path_has_its_own_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(matches!(connect(&file).await, Err(SocketError::NotASocket { .. })));
        assert!(matches!(MigrationListener::bind(dir.path(), "file"), Err(SocketError::NotASocket { .. })));
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
        assert!(matches!(connect(&dir.path().join("no")).await, Err(SocketError::Missing { .. })));
        let long = dir.path().join("x".repeat(MAX_SOCKET_PATH));
        assert!(matches!(connect(&long).await, Err(SocketError::PathTooLong { .. })));
        let refused = MigrationListener::bind(dir.path(), &"x".repeat(MAX_SOCKET_PATH)).unwrap_err();
        assert!(refused.to_string().contains("more than 107 bytes"), "{refused}");
    }
}
