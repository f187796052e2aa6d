//! The reference of the job file, written from what parses and checks it: names and their order are serde's, words, types and defaults
//! those of the types' JSON schema, ranges those that [`Checks`] held a job against.

use std::collections::BTreeMap;
use std::fmt::Write;

use schemars::schema_for;
use serde::de::{DeserializeOwned, Deserializer, Visitor, value::Error};
use serde_json::Value as Json;

use super::checks::Checks;
use super::{
    AdapterSection, CaptionsSection, CheckpointSection, DataSection, Job, LossSection, ModelSection, PicturesSection, Preset,
    SourceSection, StudentSection, TrainSection, ValidationSection,
};

const HEAD: &str = "\
# The job file, key by key

Written by `coordinator reference` from the code that reads job files; a test compares the two. `coordinator init` writes a job file with
all of this in short, `coordinator check` checks one. A key that is not listed here is an error.

Durations are written as `\"30s\"`, `\"5m\"`, `\"1h 30m\"`, sizes as `\"500MB\"`, `\"2GiB\"`, or as a number of bytes. Where a default has two values,
the second is that of `preset = \"reference\"`. Keys without a default are required, unless their words say what leaving them out means.
";

/// A job with something in every list, so that every range is looked at. It need not be valid.
const EXAMPLE: &str = r#"
    model.path = "model"
    student.path = "student"
    data.shards = ["shard.tar"]
    data.sources = [{ name = "source", shards = ["shard.tar"] }]
    train.steps = 1
"#;

/// The reference as Markdown: a table for each section, a row for each key.
#[must_use]
pub fn reference() -> String {
    let schema = schema_for!(Job).to_value();
    let reference = Reference { schema: &schema, sections: sections(), ranges: ranges(), preset: preset() };
    let mut out = HEAD.to_owned();
    reference.section(&mut out, "", &schema);
    out
}

fn ranges() -> BTreeMap<&'static str, String> {
    let mut checks = Checks::default();
    if let Ok(job) = toml::from_str::<Job>(EXAMPLE) {
        job.check(&mut checks);
    }
    checks.ranges
}

fn preset() -> toml::Table {
    Preset::Reference.defaults().and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The sections by name, with the keys of each in the order of its fields; the schema has them by the alphabet.
pub(super) fn sections() -> Vec<(&'static str, &'static [&'static str])> {
    vec![
        ("", fields::<Job>()),
        ("model", fields::<ModelSection>()),
        ("student", fields::<StudentSection>()),
        ("adapter", fields::<AdapterSection>()),
        ("data", fields::<DataSection>()),
        ("data.sources", fields::<SourceSection>()),
        ("data.captions", fields::<CaptionsSection>()),
        ("train", fields::<TrainSection>()),
        ("loss", fields::<LossSection>()),
        ("checkpoint", fields::<CheckpointSection>()),
        ("validation", fields::<ValidationSection>()),
        ("pictures", fields::<PicturesSection>()),
    ]
}

/// Asks a type's `Deserialize` for its fields.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Asks<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Asks<'_> {
        type Error = Error;

        fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.visit_unit()
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Error> {
            *self.0 = fields;
            visitor.visit_unit()
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct newtype_struct
            seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut asked = &[][..];
    // An error by design: the question is all that matters.
    let _ = T::deserialize(Asks(&mut asked));
    asked
}

struct Reference<'a> {
    schema: &'a Json,
    sections: Vec<(&'static str, &'static [&'static str])>,
    ranges: BTreeMap<&'static str, String>,
    preset: toml::Table,
}

impl<'a> Reference<'a> {
    /// Writes the table of a type's plain keys, then its sections.
    fn section(&self, out: &mut String, path: &str, section: &'a Json) {
        let is_list = path == "data.sources";
        match path {
            "" => out.push_str("\n## At the top, before all sections\n\n"),
            _ => {
                let (open, close) = if is_list { ("[[", "]]") } else { ("[", "]") };
                let _ = writeln!(out, "\n## `{open}{path}{close}`\n\n{}\n", words(section));
            }
        }
        out.push_str("| key | type | default | range | meaning |\n|---|---|---|---|---|\n");
        let mut sections = Vec::new();
        for key in self.keys(path, section) {
            let property = &section["properties"][key];
            let full = if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
            let target = self.target(property);
            let item = self.target(&target["items"]);
            if target["properties"].is_object() {
                sections.push((full, target));
            } else {
                let is_required = section["required"].as_array().is_some_and(|required| required.iter().any(|name| name == key));
                self.row(out, key, &full, property, is_required);
                if item["properties"].is_object() {
                    sections.push((full, item));
                }
            }
        }
        for (path, section) in sections {
            self.section(out, &path, section);
        }
    }

    fn row(&self, out: &mut String, key: &str, full: &str, property: &'a Json, is_required: bool) {
        let target = self.target(property);
        let default = match &property["default"] {
            _ if is_required => "required".into(),
            Json::Null => String::new(),
            default => code(default),
        };
        let preset = full.split('.').try_fold(None::<&toml::Value>, |value, part| match value {
            None => self.preset.get(part).map(Some),
            Some(value) => value.get(part).map(Some),
        });
        let default = match preset.flatten() {
            Some(value) if default.is_empty() => format!("none; `{value}`"),
            Some(value) => format!("{default}; `{value}`"),
            None => default,
        };
        let ranges = self.ranges.iter().filter_map(|(name, range)| {
            let index = name.strip_prefix(full)?;
            (index.is_empty() || index.starts_with('[')).then(|| format!("{index} {range}").trim().to_owned())
        });
        let range = ranges.collect::<Vec<_>>().join("; ");
        let mut meaning = words(property);
        for variant in target["oneOf"].as_array().into_iter().flatten() {
            let _ = write!(meaning, " {}: {}", code(&variant["const"]), words(variant));
        }
        let cells = [format!("`{key}`"), self.kind(target), default, range, meaning].map(|cell| cell.replace('|', "\\|"));
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    }

    fn keys(&self, path: &str, section: &'a Json) -> Vec<&'a str> {
        let mut keys: Vec<&str> = section["properties"].as_object().into_iter().flatten().map(|(key, _)| key.as_str()).collect();
        if let Some((_, fields)) = self.sections.iter().find(|(name, _)| *name == path) {
            keys.sort_by_key(|key| fields.iter().position(|field| field == key));
        }
        keys
    }

    /// What a reference, an optional value or both stand for.
    fn target(&self, schema: &'a Json) -> &'a Json {
        if let Some(pointer) = schema["$ref"].as_str().and_then(|reference| reference.strip_prefix('#')) {
            return self.schema.pointer(pointer).unwrap_or(schema);
        }
        match schema["anyOf"].as_array().map(Vec::as_slice) {
            Some([value, null]) if null["type"] == "null" => self.target(value),
            _ => schema,
        }
    }

    fn kind(&self, schema: &'a Json) -> String {
        let schema = self.target(schema);
        let one_of = |values: Vec<String>| format!("one of {}", values.join(", "));
        if let Some(variants) = schema["oneOf"].as_array() {
            return one_of(variants.iter().map(|variant| code(&variant["const"])).collect());
        }
        if let Some(values) = schema["enum"].as_array() {
            return one_of(values.iter().map(code).collect());
        }
        if let Some(either) = schema["anyOf"].as_array() {
            return either.iter().map(|kind| self.kind(kind)).collect::<Vec<_>>().join(", or ");
        }
        let name = schema["type"].as_str().or_else(|| schema["type"][0].as_str()).unwrap_or_default();
        match (name, schema["format"].as_str(), schema["minItems"].as_u64()) {
            ("string", Some("duration"), _) => "duration".into(),
            ("string", Some("bytes"), _) => "size".into(),
            ("string", ..) => "text".into(),
            ("integer", ..) => "whole number".into(),
            ("number", ..) => "number".into(),
            ("boolean", ..) => "`true` or `false`".into(),
            ("array", _, Some(count)) => format!("[{}]", vec![self.kind(&schema["items"]); count as usize].join(", ")),
            ("array", ..) if self.target(&schema["items"])["properties"].is_object() => "sections".into(),
            ("array", ..) => format!("list: {}", self.kind(&schema["items"])),
            _ => name.into(),
        }
    }
}

/// A description on one line.
fn words(schema: &Json) -> String {
    schema["description"].as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A value as TOML writes it. The JSON of these values is TOML too, but for the space after a comma.
fn code(value: &Json) -> String {
    format!("`{}`", value.to_string().replace(",", ", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_in_the_tree_is_that_of_the_code() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/jobs/REFERENCE.md");
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text == reference(), "run `cargo run -p peapod-coordinator -- reference > deploy/jobs/REFERENCE.md`");
    }

    #[test]
    fn every_key_has_its_words_and_every_range_its_key() {
        let text = reference();
        let mut section = String::new();
        let mut keys = Vec::new();
        for line in text.lines() {
            if let Some(title) = line.strip_prefix("## ") {
                section = title.trim_matches(['`', '[', ']']).to_owned() + ".";
                if section.starts_with("At the top") {
                    section.clear();
                }
            }
            if let Some(row) = line.strip_prefix("| `") {
                let cells: Vec<&str> = row.split(" | ").collect();
                assert!(cells.len() == 5 && cells[4].trim_end_matches(" |").len() > 5, "no words: {line}");
                assert!(!cells[1].is_empty(), "no type: {line}");
                keys.push(format!("{section}{}", cells[0].trim_matches('`')));
            }
        }
        let fields: usize = sections().iter().map(|(_, fields)| fields.len()).sum();
        // Every section but the job itself and a source is a field as well, and has no row.
        assert_eq!(keys.len(), fields - (sections().len() - 2), "{keys:?}");
        for range in ranges().keys() {
            assert!(keys.iter().any(|key| key == range.split('[').next().unwrap()), "{range} is the range of no key");
        }
        let first_of_train = keys.iter().position(|key| key == "train.steps").unwrap();
        assert_eq!(keys[first_of_train + 1], "train.epochs", "in the order of the fields");
    }

    #[test]
    fn ranges_and_presets_are_shown() {
        let text = reference();
        for row in [
            "| `hidden` | whole number | `1024` | 1 to 65536 |",
            "| `betas` | [number, number] | `[0.9, 0.999]` | [0] 0 to 0.999999; [1] 0 to 0.9999999 |",
            "| `buffer_bytes` | size | `\"256MiB\"` | at least 1MiB |",
            "| `read_timeout` | duration | `\"30s\"` | 100ms to 1h |",
            "| `time_ids_order` | one of `\"hw\"`, `\"wh\"` | `\"hw\"`; `\"wh\"` |",
            "| `weight` | number | `1.0` | 0.001 to 1000 |",
        ] {
            assert!(text.contains(row), "{row}\n{text}");
        }
    }
}
