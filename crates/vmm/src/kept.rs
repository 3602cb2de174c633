//! A connection to a waiting VMM that outlives the agent.
//!
//! The VMM is handed its end, as any other, and a copy of the agent's end too, which it keeps without using. So the connection
//! stands when the agent dies, and the agent's next life takes its end out of the VMM's process again (pidfd_getfd(2), which needs the
//! right to attach to that process). How far the life before had come is the kernel's to say: it counts the bytes of a
//! TCP connection, which is why this is one.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream as StdStream};
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::fstat;
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

use crate::qmp::{Qemu, QmpError};
use crate::socket::{OpenError, hand_over};

/// Under which name a VMM keeps the copy.
const COPY: &str = "dwcp-kept";
/// Connections of others that are turned away before the pair is given up.
const STRANGERS: usize = 64;

/// How to know the agent's end again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The socket's number in the kernel's file system of sockets.
    pub inode: u64,
}

/// Lets a VMM that waits in `-incoming defer` read from a new connection that outlives this process. Say `stop` first, or the guest
/// starts by itself.
pub async fn open_incoming(qemu: &Qemu) -> Result<(TcpStream, Mark), OpenError> {
    let (ours, theirs) = pair().map_err(OpenError::Pair)?;
    let inode = fstat(&ours).map_err(|error| OpenError::Pair(error.into()))?.st_ino;
    let copy = ours.try_clone().map_err(OpenError::Pair)?;
    qemu.give(COPY, copy.into()).await?;
    if let Err(error) = hand_over(qemu, theirs.into()).await {
        // It may keep what it was given for nothing.
        let _ = forget(qemu).await;
        return Err(error);
    }
    ours.set_nonblocking(true).map_err(OpenError::Pair)?;
    let ours = TcpStream::from_std(ours).map_err(OpenError::Pair)?;
    Ok((ours, Mark { inode }))
}

/// Lets the VMM close its copy: the connection ends with this process again.
pub async fn forget(qemu: &Qemu) -> Result<(), QmpError> {
    qemu.close(COPY).await
}

/// Takes the agent's end out of a VMM's process, which `pidfd` is and `pid` its number.
///
/// # Errors
/// The process has no such socket (any more), or may not be attached to.
pub fn find_again(pid: u32, pidfd: BorrowedFd<'_>, mark: Mark) -> io::Result<TcpStream> {
    let wanted = format!("socket:[{}]", mark.inode);
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        let entry = entry?;
        let is_it =
            std::fs::read_link(entry.path()).is_ok_and(|target| target.as_os_str() == wanted.as_str());
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number.filter(|_| is_it) {
            let socket: OwnedFd = pidfd_getfd(pidfd, number, PidfdGetfdFlags::empty())?;
            // The number may have come to mean another file meanwhile.
            if fstat(&socket)?.st_ino != mark.inode {
                break;
            }
            let stream = StdStream::from(socket);
            stream.set_nonblocking(true)?;
            return TcpStream::from_std(stream);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "the VMM no longer has the agent's end of its connection"))
}

/// Both ends of a connection over loopback that nobody else can have come into.
fn pair() -> io::Result<(StdStream, StdStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let ours = StdStream::connect(listener.local_addr()?)?;
    let expected: SocketAddr = ours.local_addr()?;
    for _ in 0..STRANGERS {
        let (theirs, from) = listener.accept()?;
        if from == expected {
            ours.set_nodelay(true)?;
            return Ok((ours, theirs));
        }
    }
    Err(io::Error::other("too many strangers connect to a port that was never told to anybody"))
}
