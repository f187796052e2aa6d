//! Errors of the job file, in words that say where and what to do.

use std::fmt;

/// What is wrong with a job file: one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    /// The lines.
    pub problems: Vec<String>,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problems.join("\n"))
    }
}

impl std::error::Error for JobError {}

impl JobError {
    /// An error of a key's value, by the key's full name.
    pub(super) fn of_key(text: &str, error: &serde_path_to_error::Error<toml::de::Error>) -> Self {
        let (Self { problems }, path) = (Self::from_toml(text, error.inner()), error.path().to_string());
        // An unknown key is in the message, and "." is the file itself.
        let is_named = path == "." || error.inner().message().starts_with("unknown field");
        let with_path = |problem: String| match problem.split_once(": ").filter(|(place, _)| place.starts_with("line ")) {
            Some((place, rest)) => format!("{place}: {path}: {rest}"),
            None => format!("{path}: {problem}"),
        };
        Self { problems: if is_named { problems } else { problems.into_iter().map(with_path).collect() } }
    }

    pub(super) fn from_toml(text: &str, error: &toml::de::Error) -> Self {
        let place = error.span().map_or_else(String::new, |span| {
            let before = &text[..span.start.min(text.len())];
            format!("line {}: ", before.matches('\n').count() + 1)
        });
        Self { problems: vec![format!("{place}{}", suggest(error.message()))] }
    }
}

/// Shortens serde's "unknown field `x`, expected one of `a`, `b`" to the nearest of the known names.
fn suggest(message: &str) -> String {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let Some((unknown, known)) = names.split_first().filter(|_| message.starts_with("unknown ")) else {
        return message.trim().replace('\n', " ");
    };
    let what = if message.starts_with("unknown variant") { "value" } else { "key" };
    let nearest = known.iter().max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    match nearest {
        Some(nearest) if strsim::jaro_winkler(unknown, nearest) > 0.7 => format!("unknown {what} `{unknown}`, did you mean `{nearest}`?"),
        _ => format!("unknown {what} `{unknown}`; known here: {}", known.join(", ")),
    }
}
