//! What this program was built from.

use std::sync::LazyLock;

use peapod_proto::program::version;

/// Version, protocol, features, profile, compiler and, where the build knew it, the commit; some lines.
#[must_use]
pub fn facts() -> &'static str {
    static FACTS: LazyLock<String> = LazyLock::new(|| {
        let commit = option_env!("PEAPOD_COMMIT").unwrap_or(version::NO_COMMIT);
        version::facts(
            &peapod_proto::features!(),
            &[("profile", env!("PEAPOD_PROFILE")), ("compiler", env!("PEAPOD_RUSTC")), ("commit", commit)],
        )
    });
    &FACTS
}

#[cfg(test)]
mod tests {
    #[test]
    fn version_says_which_protocol_it_speaks() {
        let facts = super::facts();
        assert!(facts.contains(&format!("protocol  {}", peapod_proto::PROTOCOL_VERSION)) && facts.contains("rustc"), "{facts}");
    }
}
