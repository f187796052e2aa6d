//! Certificate, key and token: made at the first start in `--state-dir`, or the user's own.

use std::io::Write;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use peapod_proto::secure::{Fingerprint, JoinString, Token, read_certificates};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};

use crate::config::SecurityArgs;

/// The certificate and its key, in one file so that neither is ever without the other.
pub(crate) const IDENTITY: &str = "identity.pem";
const TOKEN: &str = "token";
/// The join string of the coordinator that runs, or ran last, in a state folder.
pub const JOIN: &str = "join";

/// What a coordinator that other machines can reach asks for and shows.
#[derive(Debug)]
pub struct Secrets {
    /// Its end of TLS.
    pub tls: Arc<ServerConfig>,
    /// What every call must carry.
    pub token: Token,
    /// Of the certificate it shows.
    pub fingerprint: Fingerprint,
    /// Whether the token was made now: then nobody has been told it.
    pub is_new: bool,
    /// Whether it is the user's own, which is printed nowhere.
    pub is_own_token: bool,
}

impl Secrets {
    /// Loads what the arguments name and makes what they do not; `listening` goes into a certificate that is made.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn prepare(args: &SecurityArgs, state_dir: &Path, host_name: &str, listening: IpAddr) -> Result<Self, String> {
        let (chain, key) = match (&args.tls_cert, &args.tls_key) {
            (Some(certificate), Some(key)) => {
                let read = PrivateKeyDer::from_pem_file(key).map_err(|error| format!("key file {}: {error}", key.display()))?;
                (read_certificates(certificate)?, read)
            }
            _ => own_identity(&state_dir.join(IDENTITY), host_name, listening)?,
        };
        let Some(shown) = chain.first() else { return Err("there is no certificate".into()) };
        let fingerprint = Fingerprint::of(shown);
        let (token, is_new) = match &args.token_file {
            Some(path) => (Token::read(path)?, false),
            None => own_token(&state_dir.join(TOKEN))?,
        };
        let tls = Arc::new(server_config(chain, key, args.tls_client_ca.as_deref())?);
        Ok(Self { tls, token, fingerprint, is_new, is_own_token: args.token_file.is_some() })
    }

    /// What a worker joins with.
    #[must_use]
    pub fn join_string(&self, authority: String) -> JoinString {
        JoinString { authority, token: self.token.clone(), fingerprint: self.fingerprint }
    }
}

fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    client_ca: Option<&Path>,
) -> Result<ServerConfig, String> {
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in read_certificates(path)? {
                roots.add(authority).map_err(|error| format!("--tls-client-ca {}: {error}", path.display()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| format!("--tls-client-ca {}: {error}", path.display()))?)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| format!("the certificate and its key do not fit: {error}"))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// The certificate and key in the state folder, made if they are not there.
fn own_identity(path: &Path, host_name: &str, listening: IpAddr) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), String> {
    if !path.exists() {
        let failed = |error: rcgen::Error| format!("cannot make a certificate: {error}");
        // Workers know the certificate by its hash; the names are for other tools that people may point at the port.
        let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        if !listening.is_unspecified() {
            names.push(listening.to_string());
        }
        if host_name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.')) {
            names.push(host_name.to_owned());
        }
        let key = rcgen::KeyPair::generate().map_err(failed)?;
        let mut params = rcgen::CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name.push(rcgen::DnType::CommonName, "peapod coordinator");
        let certificate = params.self_signed(&key).map_err(failed)?;
        write_secret(path, &format!("{}{}", key.serialize_pem(), certificate.pem()))?;
    }
    let key = PrivateKeyDer::from_pem_file(path).map_err(|error| format!("{}: {error}; delete it for a new one", path.display()))?;
    Ok((read_certificates(path)?, key))
}

/// The token in the state folder, made if it is not there; and whether it was.
fn own_token(path: &Path) -> Result<(Token, bool), String> {
    if path.exists() {
        return Ok((Token::read(path)?, false));
    }
    let token = Token::random()?;
    write_secret(path, &format!("{}\n", token.reveal()))?;
    Ok((token, true))
}

/// Writes a whole file that only its owner can read: under another name, to the disk, then in place.
///
/// # Errors
/// One line that names the file.
pub fn write_secret(path: &Path, text: &str) -> Result<(), String> {
    use std::os::unix::fs::OpenOptionsExt;
    let beside = path.with_extension("new");
    let write = || {
        // One that a crash left may have been made with other rights.
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&beside, path)?;
        if let Some(folder) = path.parent() {
            std::fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|error: std::io::Error| format!("cannot write {}: {error}", path.display()))
}

/// The join string that a coordinator left in its state folder, if it left one.
///
/// # Errors
/// If there is one that cannot be read.
pub fn join_string_in(state_dir: &Path) -> Result<Option<JoinString>, String> {
    let path = state_dir.join(JOIN);
    match std::fs::read_to_string(&path) {
        Ok(text) => text.parse().map(Some).map_err(|problem| format!("{}: {problem}", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read {}: {error}; only the user who started the coordinator can", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn secrets_are_made_once_and_only_their_owner_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let prepare = || Secrets::prepare(&SecurityArgs::default(), folder.path(), "master", [127, 0, 0, 1].into()).unwrap();
        let (first, second) = (prepare(), prepare());
        assert!(first.is_new && !second.is_new && !first.is_own_token);
        assert_eq!((first.fingerprint, first.token.reveal()), (second.fingerprint, second.token.reveal()));
        for name in [IDENTITY, TOKEN] {
            let mode = std::fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert!(!format!("{first:?}").contains(first.token.reveal()));
    }

    #[test]
    fn files_that_do_not_fit_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            Some(path)
        };
        let made = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let other = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        let certificate = file("certificate.pem", &made.cert.pem());
        let prepare = |args: SecurityArgs| Secrets::prepare(&args, folder.path(), "master", [127, 0, 0, 1].into()).unwrap_err();
        let args = SecurityArgs { tls_cert: certificate.clone(), tls_key: file("key.pem", "no key"), ..SecurityArgs::default() };
        assert!(prepare(args).contains("key.pem"));
        let args =
            SecurityArgs { tls_cert: certificate, tls_key: file("key.pem", &other.signing_key.serialize_pem()), ..SecurityArgs::default() };
        assert!(prepare(args).contains("do not fit"));
        let args = SecurityArgs { token_file: file("short", "abc"), ..SecurityArgs::default() };
        assert!(prepare(args).contains("short: a token has 16 to 512 characters, this one has 3"));
    }
}
