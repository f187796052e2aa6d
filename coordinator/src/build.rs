//! What this program was built from.

use std::fmt::Write as _;
use std::sync::LazyLock;

/// Version, protocol, features, profile, compiler and, where the build knew it, the commit; some lines.
#[must_use]
pub fn facts() -> &'static str {
    static FACTS: LazyLock<String> = LazyLock::new(collect);
    &FACTS
}

fn collect() -> String {
    let mut text = String::from(peapod_proto::PROGRAM_VERSION);
    let features = [("aws", cfg!(feature = "aws")), ("azure", cfg!(feature = "azure")), ("gcp", cfg!(feature = "gcp"))];
    let built: Vec<&str> = features.into_iter().filter(|(_, is_built)| *is_built).map(|(name, _)| name).collect();
    let features = if built.is_empty() { "none".to_owned() } else { built.join(", ") };
    let rows = [
        ("protocol", peapod_proto::PROTOCOL_VERSION.to_string()),
        ("features", features),
        ("profile", env!("PEAPOD_PROFILE").to_owned()),
        ("compiler", env!("PEAPOD_RUSTC").to_owned()),
        ("commit", option_env!("PEAPOD_COMMIT").unwrap_or("not known to the build").to_owned()),
    ];
    for (name, value) in rows {
        let _ = write!(text, "\n{name:10}{value}");
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn version_says_which_protocol_it_speaks() {
        let facts = super::facts();
        assert!(facts.contains(&format!("protocol  {}", peapod_proto::PROTOCOL_VERSION)) && facts.contains("rustc"), "{facts}");
    }
}
