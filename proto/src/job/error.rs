//! Errors of the job file, in words that say where and what to do.

use std::fmt;
use std::ops::Range;

use toml::de::{DeTable, DeValue};

use super::elsewhere;

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
        let note = if path == "data.captions.language" { OTHER_LANGUAGE } else { "" };
        let with_path = |problem: String| match problem.split_once(": ").filter(|(place, _)| place.starts_with("line ")) {
            Some((place, rest)) => format!("{place}: {path}: {rest}{note}"),
            None => format!("{path}: {problem}{note}"),
        };
        Self { problems: if is_named { problems } else { problems.into_iter().map(with_path).collect() } }
    }

    /// Puts the line of the key that a problem begins with before it, where the text has that key.
    pub(super) fn with_lines(self, text: &str) -> Self {
        let place = |problem: &str| span_of(text, key_of(problem)).map_or_else(String::new, |span| place(text, &span));
        Self { problems: self.problems.into_iter().map(|problem| place(&problem) + &problem).collect() }
    }

    pub(super) fn from_toml(text: &str, error: &toml::de::Error) -> Self {
        let place = error.span().map_or_else(String::new, |span| place(text, &span));
        let message = error.message();
        let message = suggest(message).or_else(|| in_words(message)).unwrap_or_else(|| message.trim().replace('\n', " "));
        Self { problems: vec![format!("{place}{message}")] }
    }
}

/// The key that a problem begins with: `train.betas` of "train.betas[0] (2) must be within 0..=0.999999".
fn key_of(problem: &str) -> &str {
    let end = problem.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_' && letter != '.');
    &problem[..end.unwrap_or(problem.len())]
}

/// Where a key stands in a job file, if it does.
fn span_of(text: &str, key: &str) -> Option<Range<usize>> {
    let job = DeTable::parse(text).ok()?;
    let mut table = job.get_ref();
    let mut names = key.split('.').peekable();
    while let Some(name) = names.next() {
        let (key, value) = table.get_key_value(name)?;
        match (value.get_ref(), names.peek()) {
            (_, None) => return Some(key.span()),
            (DeValue::Table(section), Some(_)) => table = section,
            _ => return None,
        }
    }
    None
}

fn place(text: &str, span: &Range<usize>) -> String {
    let before = &text.as_bytes()[..span.start.min(text.len())];
    format!("line {}: ", before.iter().filter(|&&byte| byte == b'\n').count() + 1)
}

/// The language sets what each of these can set by itself.
const OTHER_LANGUAGE: &str = "; for another language leave it out and set `script` (or `native_by = \"key\"`), `keep` and `parallel_key`";

/// Shortens serde's "unknown field `x`, expected one of `a`, `b`" to the nearest of the known names, or to the name that it has elsewhere.
fn suggest(message: &str) -> Option<String> {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let (unknown, known) = names.split_first().filter(|_| message.starts_with("unknown "))?;
    let is_value = message.starts_with("unknown variant");
    let what = if is_value { "value" } else { "key" };
    // A name that means something else than the one it looks like: `max_steps` is not a slip of `max_skipped_steps`.
    if let Some(place) = elsewhere::place_of(unknown).filter(|_| !is_value) {
        return Some(format!("unknown {what} `{unknown}`, did you mean {place}?"));
    }
    let nearest = known.iter().max_by(|a, b| strsim::jaro_winkler(unknown, a).total_cmp(&strsim::jaro_winkler(unknown, b)));
    Some(match nearest {
        Some(nearest) if strsim::jaro_winkler(unknown, nearest) > 0.7 => format!("unknown {what} `{unknown}`, did you mean `{nearest}`?"),
        _ => format!("unknown {what} `{unknown}`; known here: {}", known.join(", ")),
    })
}

/// Says serde's "invalid type: string \"x\", expected u64" in the words of who writes a job file.
fn in_words(message: &str) -> Option<String> {
    let (got, expected) = message.trim().strip_prefix("invalid ")?.split_once(", expected ")?;
    let (what, got) = got.split_once(": ").unwrap_or(("length", got));
    let number = |kind: &str| got.strip_prefix(kind)?.strip_prefix(" `")?.strip_suffix('`');
    let shown = match got {
        "sequence" => "a list",
        "map" => "a section",
        _ if what == "length" => got.strip_prefix("length ").unwrap_or(got),
        _ => got.strip_prefix("string ").or_else(|| ["integer", "floating point", "boolean"].into_iter().find_map(number)).unwrap_or(got),
    };
    // What a text says; and of lists and sections it is not told what they hold.
    let quoted = got.strip_prefix("string ").unwrap_or_default().trim_matches('"');
    let is_collection = matches!(got, "sequence" | "map");
    let needed = match expected {
        "a duration" => "a time with its unit is needed, such as \"30s\"".into(),
        "a size" => "a size is needed, such as \"500MB\" or \"2GiB\"".into(),
        "u32" if what == "value" => format!("a whole number from 0 to {} is needed", u32::MAX),
        "u64" if what == "value" => "a whole number from 0 on is needed".into(),
        "u32" | "u64" => match whole(number("floating point").unwrap_or(quoted)) {
            Some(whole) => format!("a whole number is needed: {whole}"),
            None => "a whole number is needed, such as 1000".into(),
        },
        "f32" | "f64" if quoted.parse::<f64>().is_ok() => format!("a number is needed: {quoted}"),
        "f32" | "f64" => "a number is needed, such as 0.5".into(),
        "a boolean" => "true or false is needed".into(),
        "a string" | "path string" if is_collection => "a text is needed, in quotes".into(),
        "a string" | "path string" => format!("a text is needed, such as \"{shown}\""),
        "a sequence" if got.starts_with("string ") => format!("a list is needed, such as [{shown}]"),
        "a sequence" => "a list is needed, in [ ]".into(),
        _ => match (expected.strip_prefix("an array of length "), expected.starts_with("struct ")) {
            (Some(length), _) => format!("a list of {length} is needed"),
            (None, true) => "a section is needed, with keys of its own".into(),
            (None, false) => return None,
        },
    };
    Some(format!("{needed}, not {shown}"))
}

/// The whole number that is written with an exponent, a point, or underscores within quotes.
fn whole(text: &str) -> Option<u64> {
    let digits = text.replace('_', "");
    // Two to the 53rd: up to there each whole number is an f64 of its own.
    let of_float = |number: f64| (number.fract() == 0.0 && (0.0..=2_f64.powi(53)).contains(&number)).then_some(number as u64);
    digits.parse().ok().or_else(|| of_float(digits.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::super::Job;

    /// What is said last of a job file with one line more in a section, which may lack what else it needs.
    fn said(section: &str, line: &str) -> String {
        let models = "model.path = \"m\"\nstudent.path = \"s\"\n";
        let given = |name: &str, text: &str| if section == name { String::new() } else { text.to_owned() };
        let text = format!(
            "{models}{}{}{}{line}\n",
            given("data", "data.shards = [\"a.tar\"]\n"),
            given("train", "train.steps = 10\n"),
            if section.is_empty() { String::new() } else { format!("[{section}]\n") },
        );
        let problem = Job::parse(&text).unwrap_err().problems.pop().unwrap();
        let place = format!("line {}: ", text.matches('\n').count());
        problem.strip_prefix(&place).unwrap_or_else(|| panic!("not at {place}{problem}")).to_owned()
    }

    #[test]
    fn values_of_the_wrong_kind_are_told_with_one_of_the_right() {
        for (section, line, wanted) in [
            ("train", "steps = 1e3", "train.steps: a whole number is needed: 1000, not 1000.0"),
            ("train", "steps = \"1_000\"", "train.steps: a whole number is needed: 1000, not \"1_000\""),
            ("train", "steps = \"2e6\"", "train.steps: a whole number is needed: 2000000, not \"2e6\""),
            ("train", "steps = 0.5", "train.steps: a whole number is needed, such as 1000, not 0.5"),
            ("train", "steps = -5", "train.steps: a whole number from 0 on is needed, not -5"),
            ("train", "micro_batch = \"many\"", "train.micro_batch: a whole number is needed, such as 1000, not \"many\""),
            ("train", "micro_batch = 5000000000", "train.micro_batch: a whole number from 0 to 4294967295 is needed, not 5000000000"),
            ("train", "learning_rate = \"low\"", "train.learning_rate: a number is needed, such as 0.5, not \"low\""),
            ("train", "learning_rate = \"1e-4\"", "train.learning_rate: a number is needed: 1e-4, not \"1e-4\""),
            ("train", "learning_rate = [1e-4]", "train.learning_rate: a number is needed, such as 0.5, not a list"),
            ("train", "scale_batch = 1", "train.scale_batch: true or false is needed, not 1"),
            ("train", "betas = [0.9]", "train.betas: a list of 2 is needed, not 1"),
            ("train", "dtype = 16", "train.dtype: "),
            ("data", "shards = \"nope\"", "data.shards: a list is needed, such as [\"nope\"], not \"nope\""),
            ("data", "shards = 3", "data.shards: a list is needed, in [ ], not 3"),
            ("data", "shards = [3]", "data.shards[0]: a text is needed, such as \"3\", not 3"),
            ("data", "cache_dir = 3", "data.cache_dir: a text is needed, such as \"3\", not 3"),
            ("data", "cache_dir = [\"a\"]", "data.cache_dir: a text is needed, in quotes, not a list"),
            ("data", "watermark_key = [\"a\"]", "data.watermark_key: a text is needed, in quotes, not a list"),
            ("data", "read_timeout = 90", "data.read_timeout: a time with its unit is needed, such as \"30s\", not 90"),
            ("data", "read_timeout = \"90\"", "data.read_timeout: `90` is not a duration like \"5m\": time unit needed"),
            ("data", "buffer_bytes = \"500M\"", "data.buffer_bytes: a size is needed, such as \"500MB\" or \"2GiB\", not \"500M\""),
            ("data", "buffer_bytes = -1", "data.buffer_bytes: a size is needed, such as \"500MB\" or \"2GiB\", not -1"),
            ("data", "captions = 3", "data.captions: a section is needed, with keys of its own, not 3"),
            ("", "name = 3", "name: a text is needed, such as \"3\", not 3"),
            // What is of the right kind and out of its range.
            ("data", "buffer_bytes = \"64 KiB\"", "data.buffer_bytes (64KiB) must be at least 1MiB"),
            ("train", "micro_batch = 0", "train.micro_batch (0) must be within 1..=4096"),
            ("train", "betas = [0.9, 2]", "train.betas[1] (2) must be within "),
            ("", "name = \" \"", "name is empty: "),
        ] {
            let said = said(section, line);
            assert!(said.starts_with(wanted) && !said.contains("invalid type"), "{line}: {said}");
        }
    }

    #[test]
    fn names_of_other_trainers_and_sections_lead_to_their_own_here() {
        for (section, line, wanted) in [
            ("train", "max_steps = 5", "unknown key `max_steps`, did you mean `train.steps`?"),
            ("train", "precision = \"bf16\"", "unknown key `precision`, did you mean `train.dtype`?"),
            ("train", "batch_size = 5", "unknown key `batch_size`, did you mean `train.global_batch` (of all"),
            ("train", "every_steps = 5", "did you mean `checkpoint.every_steps` or `validation.every_steps` or `pictures.every_steps`?"),
            ("train", "seed = 5", "did you mean `seed` or `pictures.seed`?"),
            ("", "learning_rate = 5", "unknown key `learning_rate`, did you mean `train.learning_rate`?"),
            ("train", "lerning_rate = 5", "unknown key `lerning_rate`, did you mean `learning_rate`?"),
            (
                "data.captions",
                "language = \"th\"",
                "data.captions.language: unknown value `th`; known here: zh, ja, ko, ru, it; for another language",
            ),
        ] {
            let said = said(section, line);
            assert!(said.contains(wanted), "{line}: {said}");
        }
    }
}
