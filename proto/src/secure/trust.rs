//! Which certificate a client takes for the coordinator's.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use super::Fingerprint;

/// How the coordinator is recognised.
#[derive(Debug, Clone)]
pub(super) enum Trust {
    /// It shows exactly this certificate, as the join string says. Its names and dates do not matter.
    Pinned(Fingerprint),
    /// Its certificate was issued by one of these, for the name it is called by, and has not run out.
    Issued(Vec<CertificateDer<'static>>),
}

/// Reads the certificates of a PEM file.
///
/// # Errors
/// One line that names the file.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let wrong = |problem: String| format!("certificate file {}: {problem}", path.display());
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?.collect();
    let certificates = certificates.map_err(|error| wrong(error.to_string()))?;
    if certificates.is_empty() {
        return Err(wrong("there is no certificate in it (a block that begins with -----BEGIN CERTIFICATE-----)".into()));
    }
    Ok(certificates)
}

/// Builds what a client needs for TLS; `identity` are the files of the certificate and key that it shows itself.
///
/// # Errors
/// One line that names the file that is wrong.
pub(super) fn client_config(trust: &Trust, identity: Option<(&Path, &Path)>) -> Result<ClientConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let builder = match trust {
        Trust::Pinned(fingerprint) => {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Pin { fingerprint: *fingerprint, provider }))
        }
        Trust::Issued(authorities) => {
            let mut roots = RootCertStore::empty();
            for authority in authorities {
                roots.add(authority.clone()).map_err(|error| format!("--tls-ca: {error}"))?;
            }
            builder.with_root_certificates(roots)
        }
    };
    let mut config = match identity {
        Some((certificate, key)) => {
            let chain = read_certificates(certificate)?;
            let read = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("key file {}: {error}", key.display()))?;
            builder
                .with_client_auth_cert(chain, read)
                .map_err(|error| format!("{} and {} do not fit: {error}", certificate.display(), key.display()))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Takes one certificate only.
#[derive(Debug)]
struct Pin {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if Fingerprint::of(shown) == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    // That the peer also holds the certificate's key is proved by these signatures.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Why the coordinator's certificate is not taken, and what to do about it.
pub(super) fn explain(error: &Error, trust: &Trust) -> String {
    use CertificateError as Problem;
    match (error, trust) {
        (Error::InvalidCertificate(_), Trust::Pinned(_)) => {
            "its certificate is not the one in the join string: another coordinator answers there, or it has a new --state-dir; take the join string it printed last".into()
        }
        (Error::InvalidCertificate(Problem::Expired | Problem::ExpiredContext { .. }), _) => {
            "its certificate has expired: renew the coordinator's --tls-cert, and check this machine's clock".into()
        }
        (Error::InvalidCertificate(Problem::NotValidYet | Problem::NotValidYetContext { .. }), _) => {
            "its certificate is not valid yet: check the clocks of both machines".into()
        }
        (Error::InvalidCertificate(Problem::NotValidForName | Problem::NotValidForNameContext { .. }), _) => {
            format!("its certificate is for another name than the one in --coordinator ({error}): use a name it was issued for")
        }
        (Error::InvalidCertificate(Problem::UnknownIssuer | Problem::BadSignature), _) => {
            "its certificate was not issued by the authority in --tls-ca: give the one that issued the coordinator's --tls-cert".into()
        }
        (Error::InvalidMessage(_), _) => {
            "it speaks without TLS: it was started on loopback or with --insecure; connect with --coordinator http://HOST:PORT and no join string (or the port is that of its live page)".into()
        }
        (Error::AlertReceived(alert), _) => format!("it broke off the TLS handshake ({alert:?})"),
        _ => format!("TLS: {error}"),
    }
}
