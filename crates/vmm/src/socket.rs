//! Unix sockets between an agent and the VMM beside it.
//!
//! A migration's own socket has no name in the file system: [`open_outgoing`] and [`open_incoming`] make a pair of sockets
//! and hand one of it to the VMM over QMP. So it does not matter as which user the VMM runs, and nobody else can come to the
//! guest's memory. Only several connections (multifd) need a path: [`MigrationListener`].

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

use crate::qmp::{Qemu, QmpError};

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
/// It lies in a folder that only this user may enter, so that no other user reaches the guest's memory. A VMM that
/// runs as another user needs the listener's owner or group changed by the caller.
#[derive(Debug)]
pub struct MigrationListener {
    listener: UnixListener,
    path: PathBuf,
}

impl MigrationListener {
    /// Listens on `folder/name`. Makes the folder, with mode 0700, if it is not there; a folder that is there gets
    /// that mode. A socket left over by an earlier process is replaced, any other file is refused.
    pub fn bind(folder: &Path, name: &str) -> Result<Self, SocketError> {
        let path = folder.join(name);
        check_path(&path)?;
        let failed = |source| SocketError::new(&path, source);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_socket() => std::fs::remove_file(&path).map_err(failed)?,
            Ok(_) => return Err(SocketError::NotASocket { path }),
            Err(source) if source.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(failed(source)),
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        Ok(MigrationListener { listener, path })
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
