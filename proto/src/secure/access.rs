//! Connecting to a coordinator: plainly, or by TLS with a token.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use clap::Args;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::codegen::InterceptedService;
use tonic::codegen::http::Uri;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tower::Service as _;

use super::trust::{Trust, client_config, explain, read_certificates};
use super::{AUTHORIZATION, BEARER, NEEDS_TLS, PAGE_ONLY, Pasted, Token};
use crate::DEFAULT_PORT;

/// How to be let in by a coordinator that other machines can reach.
#[derive(Debug, Clone, Default, Args)]
pub struct AccessArgs {
    /// Join string that the coordinator printed: its address, token and certificate in one
    #[arg(long, env = "PEAPOD_JOIN", value_name = "STRING", hide_env_values = true, conflicts_with_all = ["token_file", "tls_ca"])]
    pub join: Option<Pasted>,
    /// Certificates to know the coordinator by (PEM), instead of a join string
    #[arg(long, env = "PEAPOD_TLS_CA", value_name = "FILE", requires = "token_file")]
    pub tls_ca: Option<PathBuf>,
    /// File with the job's token, instead of a join string
    #[arg(long, env = "PEAPOD_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Certificate to show to a coordinator that asks for one (PEM)
    #[arg(long, env = "PEAPOD_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, env = "PEAPOD_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Trying again would end the same way.
    #[error("{0}")]
    Refused(String),
    /// Nobody answered, or not in time.
    #[error("{0}")]
    Failed(String),
}

/// Where a coordinator is, and all that it takes to be let in.
#[derive(Debug, Clone)]
pub struct Access {
    url: String,
    tls: Option<(Arc<ClientConfig>, Arc<Trust>)>,
    token: Option<MetadataValue<Ascii>>,
}

/// A connection whose calls carry the token.
pub type Link = InterceptedService<Channel, Bearer>;

/// Adds the token to each call.
#[derive(Debug, Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(AUTHORIZATION, token.clone());
        }
        Ok(request)
    }
}

/// What a TLS handshake failed of, as the connector hands it up.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NotTrusted(String);

impl Access {
    /// Puts together what the arguments say; `coordinator` goes before the address in a join string.
    ///
    /// # Errors
    /// One line that names the argument that is wrong, missing, or against another.
    pub fn new(coordinator: Option<&str>, args: &AccessArgs) -> Result<Self, String> {
        let join = args.join.as_ref().map(Pasted::join_string).transpose()?;
        let url = match (coordinator, join) {
            (Some(address), _) => address.to_owned(),
            (None, Some(join)) => join.url(),
            (None, None) => return Err("give --join STRING or --coordinator ADDRESS".into()),
        };
        let identity = args.tls_cert.as_deref().zip(args.tls_key.as_deref());
        let token = match (join, &args.token_file) {
            (Some(join), _) => Some(join.token.clone()),
            (None, Some(path)) => Some(Token::read(path)?),
            (None, None) => None,
        };
        if !url.starts_with("https://") {
            if !url.starts_with("http://") {
                return Err(format!("--coordinator {url} must be an address like http://master:7733 or https://master:7733"));
            }
            if join.is_some() || args.token_file.is_some() || args.tls_ca.is_some() || identity.is_some() {
                return Err(format!(
                    "--coordinator {url} would send the token without encryption: write https://, or leave --coordinator out"
                ));
            }
            return Ok(Self { url, tls: None, token: None });
        }
        let trust = match (join, &args.tls_ca) {
            (Some(join), _) => Trust::Pinned(join.fingerprint),
            (None, Some(path)) => Trust::Issued(read_certificates(path)?),
            (None, None) => {
                return Err(format!("--coordinator {url} needs --join STRING, or --tls-ca FILE and --token-file FILE"));
            }
        };
        let config = client_config(&trust, identity.map(|(certificate, key)| (certificate as &Path, key as &Path)))?;
        let token = token.map(|token| {
            let mut value = MetadataValue::try_from(format!("{BEARER}{}", token.reveal())).map_err(|_| "the token is no header value")?;
            value.set_sensitive(true);
            Ok::<_, String>(value)
        });
        Ok(Self { url, tls: Some((Arc::new(config), Arc::new(trust))), token: token.transpose()? })
    }

    /// The address.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The address as tonic takes it, for timeouts to be set on.
    ///
    /// # Errors
    /// If it is not one.
    pub fn endpoint(&self) -> Result<Endpoint, String> {
        Endpoint::from_shared(self.url.clone()).map_err(|_| format!("{} is not an address like http://master:7733", self.url))
    }

    /// Connects once. That the token is taken shows with the first call only.
    ///
    /// # Errors
    /// [`AccessError::Refused`] if the coordinator's certificate is not the right one, or one end speaks TLS and the other does not.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Link, AccessError> {
        Ok(self.connect_from(endpoint).await?.0)
    }

    /// As [`Self::connect`]; says too which of this machine's addresses the connection is from.
    ///
    /// # Errors
    /// Those of [`Self::connect`].
    pub async fn connect_from(&self, endpoint: &Endpoint) -> Result<(Link, Option<IpAddr>), AccessError> {
        let from = Arc::new(OnceLock::new());
        let tcp = {
            let from = from.clone();
            move |uri: Uri| {
                let from = from.clone();
                async move {
                    let stream = tcp(uri).await?;
                    let _ = from.set(stream.local_addr()?.ip());
                    Ok::<_, tonic::codegen::StdError>(stream)
                }
            }
        };
        let channel = match &self.tls {
            None => {
                let connector = tower::service_fn(move |uri| {
                    let stream = tcp(uri);
                    async move { Ok::<_, tonic::codegen::StdError>(TokioIo::new(stream.await?)) }
                });
                endpoint.connect_with_connector(connector).await
            }
            Some((config, trust)) => {
                let (config, trust) = (config.clone(), trust.clone());
                let connector = tower::service_fn(move |uri: Uri| {
                    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
                    let (stream, connector, trust) = (tcp(uri), TlsConnector::from(config.clone()), trust.clone());
                    async move { handshake(host, stream.await?, connector, &trust).await }
                });
                endpoint.connect_with_connector(connector).await
            }
        };
        let channel = channel.map_err(|error| match find::<NotTrusted>(&error) {
            Some(NotTrusted(why)) => AccessError::Refused(format!("the coordinator at {} is not trusted: {why}", self.url)),
            None => refusal_in(&all_words(&error)).map_or_else(|| AccessError::Failed(innermost(&error)), AccessError::Refused),
        })?;
        Ok((InterceptedService::new(channel, Bearer(self.token.clone())), from.get().copied()))
    }
}

/// Connects to whichever of a host's addresses answers first, those of the other family a moment after the preferred one's; the time is
/// limited by the endpoint's.
async fn tcp(uri: Uri) -> Result<TcpStream, tonic::codegen::StdError> {
    let mut connector = HttpConnector::new();
    // It connects, and leaves to others what is said.
    connector.enforce_http(false);
    connector.set_nodelay(true);
    Ok(connector.call(uri).await?.into_inner())
}

/// Why a call was refused for good by what guards the coordinator, if it was.
#[must_use]
pub fn refusal(status: &Status) -> Option<String> {
    match status.code() {
        Code::Unauthenticated => Some(format!("the coordinator refuses: {}", status.message())),
        _ => refusal_in(&all_words(status)),
    }
}

/// Why a call failed that may go well another time.
#[must_use]
pub fn failure(status: &Status) -> String {
    // What an older HTTP or TLS says first is taken for the length of a frame.
    if all_words(status).contains(NO_FRAME) {
        return format!(
            "what answers there is no coordinator, or speaks TLS; a coordinator listens on port {DEFAULT_PORT} unless it is told otherwise"
        );
    }
    status.message().to_owned()
}

/// What h2 says of bytes that are no HTTP/2.
const NO_FRAME: &str = "frame with invalid size";

/// What the words of a broken connection say about why it was refused, if it was.
fn refusal_in(words: &str) -> Option<String> {
    if let Some(why) = [NEEDS_TLS, PAGE_ONLY].into_iter().find(|why| words.contains(why)) {
        return Some(format!("the coordinator refuses: {why}"));
    }
    // In TLS 1.3 a client is done before its certificate is looked at: the refusal comes with the first read.
    let (_, alert) = words.split_once("received fatal alert: ")?;
    // Layers of wrapping follow its name.
    let alert = alert.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or(alert);
    Some(match alert {
        "CertificateRequired" => "the coordinator asks for a certificate: give --tls-cert and --tls-key".into(),
        other => format!("the coordinator does not take the certificate of --tls-cert ({other})"),
    })
}

/// Shakes hands with a host; the time is limited by the endpoint's.
async fn handshake(
    host: String,
    stream: TcpStream,
    connector: TlsConnector,
    trust: &Trust,
) -> Result<TokioIo<tokio_rustls::client::TlsStream<TcpStream>>, tonic::codegen::StdError> {
    let name = ServerName::try_from(host.clone()).map_err(|_| NotTrusted(format!("{host} cannot be the name of a certificate")))?;
    match connector.connect(name, stream).await {
        Ok(stream) => Ok(TokioIo::new(stream)),
        // A handshake that breaks off without a word of TLS is a network's doing: it is tried again.
        Err(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(why) => Err(NotTrusted(explain(why, trust)).into()),
            None => Err(error.into()),
        },
    }
}

/// Looks for an error of one kind among the causes of another.
fn find<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        if let Some(found) = error.downcast_ref::<std::io::Error>().and_then(|io| io.get_ref()).and_then(|inner| inner.downcast_ref()) {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// The words of an error and all its causes.
fn all_words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}

/// The deepest reason of an error: what the system said.
#[must_use]
pub fn innermost(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    deepest.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::{Fingerprint, JoinString};

    fn args(join: bool) -> AccessArgs {
        let join = join.then(|| JoinString {
            authority: "master:7733".into(),
            token: Token::parse("0123456789abcdef").unwrap(),
            fingerprint: Fingerprint::of(b"certificate"),
        });
        AccessArgs { join: join.map(Into::into), ..AccessArgs::default() }
    }

    #[test]
    fn arguments_that_contradict_each_other_are_refused() {
        for (coordinator, join, words) in [
            (None, false, "give --join STRING"),
            (Some("master:7733"), false, "http://master:7733"),
            (Some("https://master:7733"), false, "needs --join STRING, or --tls-ca FILE"),
            (Some("http://master:7733"), true, "without encryption"),
        ] {
            let problem = Access::new(coordinator, &args(join)).unwrap_err();
            assert!(problem.contains(words), "{problem}");
        }
        assert_eq!(Access::new(None, &args(true)).unwrap().url(), "https://master:7733");
        assert_eq!(Access::new(Some("https://10.0.0.1:1"), &args(true)).unwrap().url(), "https://10.0.0.1:1");
        assert_eq!(Access::new(Some("http://10.0.0.1:1"), &args(false)).unwrap().url(), "http://10.0.0.1:1");
    }

    #[test]
    fn token_is_not_shown_with_what_holds_it() {
        let access = Access::new(None, &args(true)).unwrap();
        assert!(!format!("{access:?} {:?} {:?}", args(true), Bearer(access.token.clone())).contains("0123456789abcdef"));
    }
}
