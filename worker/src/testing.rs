//! What several tests of this crate need.

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../tests/src/harness/http.rs"]
pub mod http;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../../tests/src/harness/hub.rs"]
pub mod hub;
