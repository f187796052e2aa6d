//! The secret that lets a client in.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use subtle::ConstantTimeEq;

/// Bytes of randomness in a token that is made here.
const RANDOM_BYTES: usize = 16;
/// Shortest token taken from a file: less could be guessed over a network.
const MIN_LENGTH: usize = 16;
/// Longest token; it travels in a header of every call.
const MAX_LENGTH: usize = 512;

/// A job's token. It is never printed: `Debug` shows none of it, and there is no `Display`.
#[derive(Clone)]
pub struct Token(Arc<str>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(hidden)")
    }
}

impl Token {
    /// Draws a token.
    ///
    /// # Errors
    /// If the system has no randomness.
    pub fn random() -> Result<Self, String> {
        let mut bytes = [0; RANDOM_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| format!("no randomness from the system: {error}"))?;
        Ok(Self(hex::encode(bytes).into()))
    }

    /// Takes a token as it was written down; white space around it does not count.
    ///
    /// # Errors
    /// What keeps the text from being a token. The text itself is not repeated.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if !(MIN_LENGTH..=MAX_LENGTH).contains(&text.len()) {
            return Err(format!("a token has {MIN_LENGTH} to {MAX_LENGTH} characters, this one has {}", text.len()));
        }
        if !text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '~' | '+' | '=')) {
            return Err("a token consists of letters, digits and - _ . ~ + =".into());
        }
        Ok(Self(text.into()))
    }

    /// Reads a token's file.
    ///
    /// # Errors
    /// One line that names the file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read the token file {}: {error}", path.display()))?;
        Self::parse(&text).map_err(|problem| format!("token file {}: {problem}", path.display()))
    }

    /// The secret itself: for files that only their owner can read, and for the wire.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether `claimed` is this token. How long it takes says nothing about where they differ.
    #[must_use]
    pub fn is(&self, claimed: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(claimed).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_known_by_all_of_its_bytes() {
        let token = Token::parse(" 0123456789abcdef\n").unwrap();
        assert!(token.is(b"0123456789abcdef"));
        for other in [&b""[..], b"0123456789abcde", b"0123456789abcdeg", b"0123456789abcdef0"] {
            assert!(!token.is(other), "{other:?}");
        }
        let drawn = [Token::random().unwrap(), Token::random().unwrap()];
        assert!(drawn[0].is(drawn[0].reveal().as_bytes()) && !drawn[0].is(drawn[1].reveal().as_bytes()));
    }

    #[test]
    fn token_shows_itself_to_nobody() {
        let token = Token::parse("0123456789abcdef").unwrap();
        assert_eq!(format!("{token:?}"), "Token(hidden)");
        for wrong in ["short-secret", "0123456789 abcdef-secret", "0123456789äbcdef-secret"] {
            let problem = Token::parse(wrong).unwrap_err();
            assert!(!problem.contains("secret"), "{problem}");
        }
    }
}
