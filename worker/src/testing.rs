//! What several tests of this crate need.

// Other tests use the rest of both.
#[allow(dead_code)]
#[path = "../../tests/src/harness/http.rs"]
pub mod http;
#[allow(dead_code)]
#[path = "../../tests/src/harness/hub.rs"]
pub mod hub;
