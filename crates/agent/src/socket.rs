//! The RPC socket: bound so that nobody but the agent's user can connect at any moment, and served with health and
//! reflection.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dwcp_migrate::{Blame, Failure};
use dwcp_rpc::v1::migrations_server::MigrationsServer;
use dwcp_rpc::{DESCRIPTORS, MAX_MESSAGE};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tracing::{error, warn};

use crate::local;
use crate::readiness::Readiness;
use crate::service::Service;

/// Calls at once on one connection; each client needs two or three.
const MAX_CALLS: usize = 64;

/// A bound socket that is not served yet: clients wait in its backlog.
#[derive(Debug)]
pub(crate) struct RpcSocket {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's name in the file system; goes with its owner.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Binds the socket. One that a dead process left behind is replaced; one that answers is not.
pub(crate) fn bind(path: &Path) -> Result<RpcSocket, Failure> {
    let fail = |what: String, hint: &str| {
        Failure::new("rpc_socket", Blame::Operator, format!("rpc socket {}: {what}", path.display()), hint)
    };
    let unusable = |error: io::Error| {
        fail(error.to_string(), "[listen] rpc must name a socket in a folder that the agent may write")
    };

    if let Some(folder) = path.parent() {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(unusable)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(fail(
                "it exists and is no socket".to_owned(),
                "remove it, or choose another [listen] rpc",
            ));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => {
            return Err(fail("another process listens on it".to_owned(), "is another dwcpd running?"));
        }
        Ok(_) => warn!(path = %path.display(), "replacing the socket of a process that is gone"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unusable(error)),
    }

    // Bound under another name, closed to others, then renamed: at its own name it was never open to others.
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let _ = fs::remove_file(&temporary);
    let bind = || -> io::Result<UnixListener> {
        let listener = UnixListener::bind(&temporary)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
        fs::rename(&temporary, path)?;
        Ok(listener)
    };
    let listener = bind().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        unusable(error)
    })?;
    Ok(RpcSocket { listener, file: SocketFile(path.to_owned()) })
}

impl RpcSocket {
    /// Serves the calls; health follows the agent's readiness.
    pub(crate) fn serve(self, service: Service, readiness: Readiness) -> Result<RpcServer, Failure> {
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .map_err(|error| local("reflection", error.to_string(), ""))?;
        let (reporter, health) = tonic_health::server::health_reporter();
        let follow = tokio::spawn(async move {
            let mut ready = readiness.watch();
            loop {
                let reason = *ready.borrow_and_update();
                match reason {
                    None => reporter.set_serving::<MigrationsServer<Service>>().await,
                    Some(_) => reporter.set_not_serving::<MigrationsServer<Service>>().await,
                }
                if ready.changed().await.is_err() {
                    return;
                }
            }
        });

        let migrations = MigrationsServer::new(service)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = Server::builder()
            .concurrency_limit_per_connection(MAX_CALLS)
            .add_service(health)
            .add_service(reflection)
            .add_service(migrations)
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.listener), async move {
                let _ = stopped.await;
            });
        let task = tokio::spawn(async move {
            if let Err(error) = serving.await {
                error!(%error, "the RPC server ended");
            }
        });
        Ok(RpcServer { stop, task, follow, file: self.file })
    }
}

/// The running RPC server.
#[derive(Debug)]
pub(crate) struct RpcServer {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    follow: JoinHandle<()>,
    file: SocketFile,
}

impl RpcServer {
    /// Takes no more calls, and gives the open ones so long to end.
    pub(crate) async fn stop(self, grace: Duration) {
        drop(self.file);
        let _ = self.stop.send(());
        let mut task = self.task;
        if tokio::time::timeout(grace, &mut task).await.is_err() {
            task.abort();
        }
        self.follow.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/agent.sock");
        let first = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let failure = bind(&path).unwrap_err();
        assert!(failure.message.contains("another process listens"), "{failure}");
        drop(first);
        assert!(!path.exists());

        // What a killed process leaves behind.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        bind(&path).unwrap();
    }

    #[tokio::test]
    async fn a_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(bind(&path).unwrap_err().message.contains("no socket"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }
}
