//! The connection to the agent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dwcp_rpc::MAX_MESSAGE;
use dwcp_rpc::v1::migrations_client::MigrationsClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

use crate::error::CtlError;

/// A connected client.
pub(crate) type Client = MigrationsClient<Channel>;

/// For calls that the agent answers from memory.
pub(crate) const QUICK: Duration = Duration::from_secs(10);
/// For calls in which the agent asks a VMM or the peer; those have deadlines of their own, which are shorter.
pub(crate) const SLOW: Duration = Duration::from_secs(120);

/// Connects to the agent's socket.
pub(crate) async fn connect(socket: &Path) -> Result<Client, CtlError> {
    // Tried plainly first: its error says whether the file is missing, closed to us, or nobody listens.
    drop(UnixStream::connect(socket).await.map_err(|error| CtlError::unreachable(socket, error))?);
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The host is never looked up; HTTP/2 wants one.
    let channel = Endpoint::from_static("http://agent")
        .connect_timeout(QUICK)
        .connect_with_connector(connector)
        .await
        .map_err(|error| CtlError::unreachable(socket, error))?;
    Ok(MigrationsClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE))
}

/// A request that gives up after `timeout`.
pub(crate) fn within<T>(timeout: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}
