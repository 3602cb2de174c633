//! Who we are and whom we trust, ready for handshakes.

use std::fmt;
use std::sync::Arc;

use dwcp_proto::{NodeKey, NodeName};
use rustls::{ClientConfig, ServerConfig};

use crate::error::LinkError;
use crate::peers::{Peers, Roster};
use crate::tls::{self, Credentials, Told};

/// This node's key with the peers it trusts. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    node: NodeName,
    peers: Arc<Peers>,
    credentials: Credentials,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Prepares TLS with `key`. A later [`Peers::reload`] takes effect without a new identity.
    pub fn new(key: Arc<NodeKey>, peers: Arc<Peers>) -> Result<Self, LinkError> {
        let node = key.node().clone();
        let credentials = Credentials::new(key);
        let server =
            tls::server_config(&credentials, peers.clone(), Told::default()).map_err(LinkError::Setup)?;
        // The first random bytes of a process take 30 to 50 ms, for aws-lc gathers its entropy from the CPU's jitter. Drawn here, they do not
        // hold up the first handshake, at both ends one after the other.
        let drawn = server.crypto_provider().secure_random.fill(&mut [0; 32]);
        drawn.map_err(|error| LinkError::Setup(error.into()))?;
        Ok(Identity { node, peers, credentials, server: Arc::new(server) })
    }

    /// This node's name.
    pub fn node(&self) -> &NodeName {
        &self.node
    }

    /// Whom this node trusts.
    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// TLS settings that accept `expected` only, and the keys by which they judge.
    pub(crate) fn client(
        &self,
        expected: &NodeName,
        told: Told,
    ) -> Result<(Arc<ClientConfig>, Arc<Roster>), LinkError> {
        let roster = self.peers.roster();
        if !roster.knows(expected) {
            return Err(LinkError::UnknownNode { node: expected.clone() });
        }
        let config = tls::client_config(&self.credentials, roster.clone(), expected, told);
        Ok((Arc::new(config.map_err(LinkError::Setup)?), roster))
    }

    /// TLS settings that accept every peer.
    pub(crate) fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// The same for one handshake, which tells whom it refused.
    pub(crate) fn server_telling(&self, told: Told) -> Result<Arc<ServerConfig>, LinkError> {
        let config = tls::server_config(&self.credentials, self.peers.clone(), told);
        Ok(Arc::new(config.map_err(LinkError::Setup)?))
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.node)
    }
}
