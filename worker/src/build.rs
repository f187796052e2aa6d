//! What the programs of this crate were built from.

use std::sync::LazyLock;

use peapod_proto::program::version;

/// Version, protocol, features and, where the build was told it, the commit; some lines.
#[must_use]
pub fn facts() -> &'static str {
    static FACTS: LazyLock<String> = LazyLock::new(|| {
        version::facts(&peapod_proto::features!(), &[("commit", option_env!("PEAPOD_COMMIT").unwrap_or(version::NO_COMMIT))])
    });
    &FACTS
}
