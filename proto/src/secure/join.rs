//! The one string that a worker needs to join.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::Token;

const SCHEME: &str = "peapod://";

/// The SHA-256 of a certificate (its DER).
#[derive(Debug, Clone, Copy)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    #[must_use]
    pub fn of(certificate_der: &[u8]) -> Self {
        Self(Sha256::digest(certificate_der).into())
    }
}

impl PartialEq for Fingerprint {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Fingerprint {}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for Fingerprint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 32];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) => Ok(Self(bytes)),
            Err(_) => Err(format!("{text:?} is no fingerprint: it has 64 hexadecimal digits")),
        }
    }
}

/// Where a coordinator is, the token it asks for, and the certificate it shows: `peapod://TOKEN@HOST:PORT/FINGERPRINT`.
///
/// No character of it means anything to a shell. `Debug` hides the token.
#[derive(Debug, Clone)]
pub struct JoinString {
    /// `host:port`, an IPv6 address in brackets.
    pub authority: String,
    /// The token.
    pub token: Token,
    /// Of the coordinator's certificate.
    pub fingerprint: Fingerprint,
}

impl JoinString {
    /// The string with the token in it: for the person who starts the job, and for files that only their owner can read.
    #[must_use]
    pub fn reveal(&self) -> String {
        format!("{SCHEME}{}@{}/{}", self.token.reveal(), self.authority, self.fingerprint)
    }

    /// The address to connect to.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.authority)
    }
}

impl FromStr for JoinString {
    type Err = String;

    /// Parses a join string. Errors do not repeat it: it holds a secret.
    fn from_str(text: &str) -> Result<Self, String> {
        let shape = || format!("a join string looks like {SCHEME}TOKEN@HOST:PORT/FINGERPRINT; copy the whole line the coordinator printed");
        let rest = text.trim().strip_prefix(SCHEME).ok_or_else(shape)?;
        let (token, rest) = rest.split_once('@').ok_or_else(shape)?;
        let (authority, fingerprint) = rest.split_once('/').ok_or_else(shape)?;
        let (host, port) = authority.rsplit_once(':').ok_or_else(shape)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(shape());
        }
        Ok(Self {
            authority: authority.to_owned(),
            token: Token::parse(token).map_err(|problem| format!("the join string's token: {problem}"))?,
            fingerprint: fingerprint.parse().map_err(|problem| format!("the join string's end: {problem}"))?,
        })
    }
}

/// A join string as it was given, which may be none: an argument parser would repeat one that is refused, with the token in it.
#[derive(Debug, Clone)]
pub struct Pasted(Result<JoinString, String>);

impl Pasted {
    /// The join string.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn join_string(&self) -> Result<&JoinString, String> {
        self.0.as_ref().map_err(|problem| format!("--join: {problem}"))
    }
}

impl FromStr for Pasted {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.parse()))
    }
}

impl From<JoinString> for Pasted {
    fn from(join: JoinString) -> Self {
        Self(Ok(join))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_string_survives_being_copied() {
        for authority in ["master:7733", "10.0.0.1:1", "[::1]:7733"] {
            let token = Token::random().unwrap();
            let join = JoinString { authority: authority.into(), token, fingerprint: Fingerprint::of(b"certificate") };
            let copied: JoinString = format!(" {}\n", join.reveal()).parse().unwrap();
            assert_eq!((copied.reveal(), copied.url()), (join.reveal(), format!("https://{authority}")));
        }
    }

    #[test]
    fn half_a_join_string_is_refused_without_repeating_it() {
        let whole = format!("peapod://secret0123456789abc@master:7733/{}", Fingerprint::of(b"certificate"));
        assert!(whole.parse::<JoinString>().is_ok());
        for length in 0..whole.len() {
            let problem = whole[..length].parse::<JoinString>().unwrap_err();
            assert!(!problem.contains("secret0123456789abc"), "{problem}");
        }
        assert!(!format!("{:?}", whole.parse::<JoinString>().unwrap()).contains("secret0123"));
        assert!(whole.replace(":7733", ":77333").parse::<JoinString>().is_err());
    }
}
