//! What `--version` says.

use std::fmt::Write as _;

use crate::{PROGRAM_VERSION, PROTOCOL_VERSION};

/// Version, protocol, those of `features` that are built in, and what else is known of the build; some lines.
#[must_use]
pub fn facts(features: &[(&str, bool)], more: &[(&str, &str)]) -> String {
    let built: Vec<&str> = features.iter().filter(|(_, is_built)| *is_built).map(|(name, _)| *name).collect();
    let (protocol, built) = (PROTOCOL_VERSION.to_string(), if built.is_empty() { "none".to_owned() } else { built.join(", ") });
    let rows = [("protocol", protocol.as_str()), ("features", &built)];
    let mut text = String::from(PROGRAM_VERSION);
    for (name, value) in rows.iter().chain(more) {
        let _ = write!(text, "\n{name:10}{value}");
    }
    text
}

/// The features that a program may be built with, and whether the crate that asks here is.
#[macro_export]
macro_rules! features {
    () => {
        [
            ("aws", cfg!(feature = "aws")),
            ("azure", cfg!(feature = "azure")),
            ("gcp", cfg!(feature = "gcp")),
            ("otlp", cfg!(feature = "otlp")),
        ]
    };
}

/// What stands for the commit that a build was not told.
pub const NO_COMMIT: &str = "not known to the build";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_says_what_it_was_built_with() {
        let text = facts(&[("aws", true), ("azure", false), ("otlp", true)], &[("commit", NO_COMMIT)]);
        let lines: Vec<&str> = text.lines().collect();
        let protocol = format!("protocol  {PROTOCOL_VERSION}");
        assert_eq!(lines, [PROGRAM_VERSION, &protocol, "features  aws, otlp", "commit    not known to the build"]);
        assert!(facts(&[("aws", false)], &[]).ends_with("features  none"));
    }
}
