//! TLS 1.3 with raw Ed25519 public keys (RFC 7250) as the only credentials.
//!
//! Keys are compared with the roster, and signatures checked by [`PeerKey::verify`], so that one strict rule holds for
//! handshakes and for chunks; the secret key never leaves its [`NodeKey`].

use std::fmt;
use std::sync::{Arc, OnceLock};

use dwcp_proto::{NodeKey, NodeName, PeerKey};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    PeerIncompatible, PeerMisbehaved, ServerConfig, SignatureAlgorithm, SignatureScheme, version,
};

use crate::error::Stranger;
use crate::peers::{Peers, Roster};

/// The application protocol, which both ends must name.
pub(crate) const ALPN: &[u8] = b"dwcp/3";

/// The label of the exporter secret that binds messages to a connection.
pub(crate) const EXPORTER: &[u8] = b"EXPORTER-dwcp-v3";

/// The DER of an Ed25519 SubjectPublicKeyInfo up to the key (RFC 8410, section 4).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What we present: our raw public key, and the means to sign for it.
#[derive(Clone)]
pub(crate) struct Credentials(Arc<CertifiedKey>);

impl Credentials {
    pub(crate) fn new(key: Arc<NodeKey>) -> Self {
        let public = spki(key.public().as_bytes());
        let key = CertifiedKey::new(vec![CertificateDer::from(public)], Arc::new(Key(key)));
        Credentials(Arc::new(key))
    }
}

/// Settings for a dialler that wants `expected` and nobody else.
pub(crate) fn client_config(
    credentials: &Credentials,
    roster: Arc<Roster>,
    expected: &NodeName,
    told: Told,
) -> Result<ClientConfig, Error> {
    let verifier = OnePeer { roster, expected: expected.clone(), told };
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(credentials.0.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_early_data = false;
    Ok(config)
}

/// Settings for a listener that takes every peer in the roster of the moment.
pub(crate) fn server_config(
    credentials: &Credentials,
    peers: Arc<Peers>,
    told: Told,
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyPeer { peers, told }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(credentials.0.clone())));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    // A ticket to a peer that only writes stays unread, and closing then resets the connection and loses its tail.
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// Whether the other end named our protocol. TLS lets a client name none; we do not.
pub(crate) fn speaks_dwcp(connection: &CommonState) -> bool {
    connection.alpn_protocol() == Some(ALPN)
}

/// The peer that a finished handshake has authenticated, if the roster still holds it.
pub(crate) fn peer(connection: &CommonState, roster: &Roster) -> Option<PeerKey> {
    peer_of(connection.peer_certificates()?, roster)
}

/// The same, by what the peer presented.
pub(crate) fn peer_of(presented: &[CertificateDer<'_>], roster: &Roster) -> Option<PeerKey> {
    roster.find(raw_key(presented.first()?)?).cloned()
}

/// AES-128 first: by far the fastest where the CPU has AES, and no weaker in practice.
fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        ..aws_lc_rs::default_provider()
    }
}

fn spki(key: &[u8; 32]) -> Vec<u8> {
    [&SPKI_PREFIX[..], key].concat()
}

fn raw_key<'a>(spki: &'a CertificateDer<'_>) -> Option<&'a [u8; 32]> {
    spki.strip_prefix(&SPKI_PREFIX)?.try_into().ok()
}

/// Accepts the keys of one node.
#[derive(Debug)]
struct OnePeer {
    roster: Arc<Roster>,
    expected: NodeName,
    told: Told,
}

impl ServerCertVerifier for OnePeer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match find(&self.roster, end_entity, intermediates) {
            Ok(peer) if peer.node() == &self.expected => Ok(ServerCertVerified::assertion()),
            Ok(peer) => Err(self.told.refuse(Stranger::Node(peer.node().clone()))),
            Err(stranger) => Err(self.told.refuse(stranger)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify(&self.roster, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Accepts every key in the roster of the moment.
#[derive(Debug)]
struct AnyPeer {
    peers: Arc<Peers>,
    told: Told,
}

impl ClientCertVerifier for AnyPeer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match find(&self.peers.roster(), end_entity, intermediates) {
            Ok(_) => Ok(ClientCertVerified::assertion()),
            Err(stranger) => Err(self.told.refuse(stranger)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify(&self.peers.roster(), message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn find<'a>(
    roster: &'a Roster,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
) -> Result<&'a PeerKey, Stranger> {
    if !intermediates.is_empty() {
        return Err(Stranger::Other);
    }
    let key = raw_key(end_entity).ok_or(Stranger::Other)?;
    roster.find(key).ok_or(Stranger::Key(*key))
}

fn verify(
    roster: &Roster,
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    if dss.scheme != SignatureScheme::ED25519 {
        return Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into());
    }
    let peer = find(roster, cert, &[]).map_err(|stranger| Told::default().refuse(stranger))?;
    let signature = dss.signature().try_into().map_err(|_| Error::from(CertificateError::BadSignature))?;
    if peer.verify(message, signature) {
        Ok(HandshakeSignatureValid::assertion())
    } else {
        Err(CertificateError::BadSignature.into())
    }
}

/// Whose key a handshake refused, for whoever hears no more of the error than its alert: QUIC hands on only that.
#[derive(Debug, Clone, Default)]
pub(crate) struct Told(Arc<OnceLock<Stranger>>);

impl Told {
    /// Who was refused, if somebody was.
    pub(crate) fn stranger(&self) -> Option<&Stranger> {
        self.0.get()
    }

    /// Sent to the peer as the alert `certificate_unknown`.
    fn refuse(&self, stranger: Stranger) -> Error {
        // Attempts beside each other are refused for the same.
        let _ = self.0.set(stranger.clone());
        CertificateError::Other(OtherError(Arc::new(stranger))).into()
    }
}

/// Our secret key, as TLS asks for it. TLS puts its own context before what it has signed.
struct Key(Arc<NodeKey>);

impl SigningKey for Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered.contains(&SignatureScheme::ED25519).then(|| Box::new(Key(self.0.clone())) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(spki(self.0.public().as_bytes()).into())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.0.sign(message).to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpStream;
    use tokio_rustls::TlsConnector;

    use super::*;
    use crate::{Identity, ListenOptions, Listener};

    fn key(node: &str) -> Arc<NodeKey> {
        Arc::new(NodeKey::from_seed(NodeName::new(node).unwrap(), &[node.as_bytes()[0]; 32]))
    }

    /// What a listener that trusts `src` makes of a client with these settings.
    async fn refusals(config: ClientConfig) -> Vec<(&'static str, u64)> {
        let identity = Identity::new(key("dst"), Arc::new(Peers::of([key("src").public()]))).unwrap();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let mut listener = Listener::bind(any, &identity, ListenOptions::default()).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr()).await.unwrap();
        let name = ServerName::from(IpAddr::from(Ipv4Addr::LOCALHOST));
        if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, stream).await {
            tokio::select! {
                _ = stream.read_u8() => {}
                _ = listener.accept() => return Vec::new(),
            }
        }
        let counts = listener.refusals();
        while counts.counts().values().sum::<u64>() == 0 {
            tokio::task::yield_now().await;
        }
        counts.counts().into_iter().filter(|(_, count)| *count > 0).collect()
    }

    fn client(credentials: &Credentials) -> ClientConfig {
        let dst = Peers::of([key("dst").public()]);
        client_config(credentials, dst.roster(), key("dst").node(), Told::default()).unwrap()
    }

    #[tokio::test]
    async fn who_presents_a_trusted_key_must_hold_its_secret() {
        assert_eq!(refusals(client(&Credentials::new(key("src")))).await, []);
        let public = CertificateDer::from(spki(key("src").public().as_bytes()));
        let impostor = Credentials(Arc::new(CertifiedKey::new(vec![public], Arc::new(Key(key("mallory"))))));
        assert_eq!(refusals(client(&impostor)).await, [("tls_failed", 1)]);
    }

    #[tokio::test]
    async fn a_client_must_name_our_protocol() {
        for protocols in [vec![], vec![b"h2".to_vec()]] {
            let mut config = client(&Credentials::new(key("src")));
            config.alpn_protocols = protocols;
            assert_eq!(refusals(config).await, [("protocol", 1)]);
        }
    }

    #[tokio::test]
    async fn a_client_without_a_key_is_refused() {
        let mut config = client(&Credentials::new(key("src")));
        config.client_auth_cert_resolver = Arc::new(NoKey);
        assert_eq!(refusals(config).await, [("protocol", 1)]);
    }

    #[derive(Debug)]
    struct NoKey;

    impl rustls::client::ResolvesClientCert for NoKey {
        fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }

        fn only_raw_public_keys(&self) -> bool {
            true
        }

        fn has_certs(&self) -> bool {
            false
        }
    }
}
