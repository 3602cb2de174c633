//! TLS towards the server, as an agent does it, but for one thing: that the certificate is good is found out once.
//!
//! A node has its own cores, and a certificate's chain costs it a tenth of a millisecond. Here all nodes share the server's
//! cores, and ten thousand times that is a second of them that no real server would miss. That the server holds the
//! certificate's key is verified for each connection.

use std::sync::{Arc, OnceLock};

use anyhow::Result;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

/// Trusts this certificate.
pub(crate) fn config(root: CertificateDer<'static>) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(root)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build()?;
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Once { verifier, good: OnceLock::new() }))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Verifies a certificate, and knows it again.
#[derive(Debug)]
struct Once {
    verifier: Arc<WebPkiServerVerifier>,
    /// The one that was good, and for whom.
    good: OnceLock<(CertificateDer<'static>, ServerName<'static>)>,
}

impl ServerCertVerifier for Once {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if self.good.get().is_some_and(|(good, whom)| good == end_entity && whom == name) {
            return Ok(ServerCertVerified::assertion());
        }
        let verified = self.verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now)?;
        let _ = self.good.set((end_entity.clone().into_owned(), name.to_owned()));
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}
