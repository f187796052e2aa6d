//! How a client of the coordinator finds it, knows it, and proves that it may come: the join string, the token, TLS.
//!
//! Workers and the control commands connect with [`Access`]; the coordinator compares a [`Token`] and hands out a [`JoinString`].

mod access;
mod join;
mod token;
mod trust;

pub use access::{Access, AccessArgs, AccessError, Bearer, Link, failure, innermost, refusal};
pub use join::{Fingerprint, JoinString, Pasted};
pub use token::Token;
pub use trust::read_certificates;

/// What a TLS port answers to one that speaks HTTP/2 without TLS, in a GOAWAY with INADEQUATE_SECURITY.
pub const NEEDS_TLS: &str = "this port speaks TLS only: connect with the join string, or with https:// and --tls-ca";

/// What the port of the live page says to those who take it for the coordinator's.
pub const PAGE_ONLY: &str =
    "this is the port of the live page; workers and commands connect to the one of --listen (7733 unless it is said)";

/// Key of the request metadata that carries the token.
pub const AUTHORIZATION: &str = "authorization";
/// What the token follows there.
pub const BEARER: &str = "Bearer ";
