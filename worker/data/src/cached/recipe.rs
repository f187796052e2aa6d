//! What a cached shard was made with: it trains nothing but a job that would have made the same.

use std::collections::BTreeMap;

use peapod_proto::job::DataSection;
use serde::{Deserialize, Serialize};

use crate::source::shown_url;

/// The layout described in [`cached`](super). A change that older programs would misread gets the next number.
const VERSION: u32 = 1;

/// Distance of two models' numbers, relative to their length, below which they are taken for one model's: other devices round otherwise.
const TOLERANCE: f64 = 0.02;

/// What of a setting is told at most.
const SHOWN_CHARS: usize = 60;

/// Everything that decides which numbers stand in a cached sample.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Recipe {
    /// Settings by their names in the job file.
    pub settings: BTreeMap<String, String>,
    /// Some of what each model says of something that is always the same, by the field that names the model: weights that are others say
    /// something else, wherever they lie and whatever their file is called.
    pub probes: BTreeMap<String, Vec<f32>>,
}

/// What lies at the front of a cached shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stamp {
    version: u32,
    /// The program.
    pub made_by: String,
    /// The shard it was made of.
    pub shard: String,
    /// Numbers that it is stored in.
    pub numbers: String,
    /// How it was made.
    #[serde(flatten)]
    pub recipe: Recipe,
}

/// A cached shard that does not fit the job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} was precomputed otherwise than this job would: {}; run `worker precompute` with this job into another folder, or give data.shards the pictures",
    shown_url(.url), .differences.join(", ")
)]
pub struct RecipeError {
    /// The shard.
    pub url: String,
    /// In what, in words.
    pub differences: Vec<String>,
}

impl Recipe {
    /// What a job's data section decides: which samples there are, and which part of a picture at which size is seen.
    #[must_use]
    pub fn of_data(data: &DataSection) -> Self {
        let captions = data.captions.rules();
        let settings = [
            ("data.buckets", format!("{:?}", data.buckets)),
            ("data.filter", format!("{:?}", data.filter)),
            ("data.min_pixels", data.min_pixels.to_string()),
            ("data.min_aesthetic", data.min_aesthetic.to_string()),
            ("data.max_watermark", data.max_watermark.to_string()),
            ("data.watermark_key", data.watermark_key.clone()),
            ("data.aesthetic_key", data.aesthetic_key.clone()),
            ("data.exif_rotate", data.exif_rotate.to_string()),
            ("data.strict_clean", data.strict_clean.to_string()),
            ("data.fast_shrink", data.fast_shrink.to_string()),
            ("data.captions.native_keys", format!("{:?}", captions.native_keys)),
            ("data.captions.native_by", format!("{:?}", captions.native_by)),
            ("data.captions.script", format!("{:?}", captions.script)),
            ("data.captions.parallel_key", captions.parallel_key),
            ("data.captions.english_key", captions.english_key),
            ("data.captions.keep", format!("{:?}", captions.keep)),
            ("data.captions.keep_punctuation", captions.keep_punctuation),
            ("data.captions.simplify", captions.simplify.to_string()),
        ];
        Self { settings: settings.map(|(name, value)| (name.to_owned(), value)).into(), probes: BTreeMap::new() }
    }

    /// The settings of it that `known` names too. For who has a job file and no models.
    #[must_use]
    pub fn within(mut self, known: &Self) -> Self {
        self.settings.retain(|name, _| known.settings.contains_key(name));
        self.probes.retain(|name, _| known.probes.contains_key(name));
        self
    }

    /// In what this recipe differs from `wanted`, which may say more.
    #[must_use]
    pub fn differences(&self, wanted: &Self) -> Vec<String> {
        let setting = |(name, was): (&String, &String)| match wanted.settings.get(name) {
            Some(is) if is == was => None,
            Some(is) => Some(format!("{name} was {}, is {}", shown(was), shown(is))),
            None => Some(format!("{name} was {}, which this job has no use for", shown(was))),
        };
        let probe = |(name, was): (&String, &Vec<f32>)| {
            let is_same = wanted.probes.get(name).is_some_and(|is| is_near(was, is));
            (!is_same).then(|| format!("{name} named another model"))
        };
        self.settings.iter().filter_map(setting).chain(self.probes.iter().filter_map(probe)).collect()
    }
}

/// Whether two models' numbers differ by no more than rounding.
fn is_near(was: &[f32], is: &[f32]) -> bool {
    let length = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|number| number * number).sum::<f64>().sqrt();
    let distance = length(&mut was.iter().zip(is).map(|(was, is)| f64::from(was - is)));
    // A comparison with NaN is false: what is not a number is near nothing.
    was.len() == is.len() && distance <= TOLERANCE * length(&mut is.iter().copied().map(f64::from))
}

fn shown(value: &str) -> String {
    let start: String = value.chars().take(SHOWN_CHARS).collect();
    if start.len() < value.len() { format!("`{start}...`") } else { format!("`{value}`") }
}

impl Stamp {
    /// The stamp of a shard made of `shard`, stored in `numbers`.
    #[must_use]
    pub fn new(shard: &str, numbers: &str, recipe: Recipe) -> Self {
        let made_by = format!("peapod {}", peapod_proto::PROGRAM_VERSION);
        Self { version: VERSION, made_by, shard: shard.to_owned(), numbers: numbers.to_owned(), recipe }
    }

    /// The bytes of its member.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }

    /// Reads the stamp of the shard at `url`.
    ///
    /// # Errors
    /// If it is none, or of a layout that this program does not know.
    pub fn parse(url: &str, bytes: &[u8]) -> Result<Self, RecipeError> {
        let refuse = |difference: String| RecipeError { url: url.to_owned(), differences: vec![difference] };
        let stamp: Self = serde_json::from_slice(bytes).map_err(|error| refuse(format!("its stamp cannot be read ({error})")))?;
        match stamp.version {
            VERSION => Ok(stamp),
            other => Err(refuse(format!("{} has laid it out in version {other}, this program reads {VERSION}", stamp.made_by))),
        }
    }

    /// Checks the stamp of the shard at `url` against what a job would make.
    ///
    /// # Errors
    /// Names all that differs.
    pub fn check(url: &str, bytes: &[u8], wanted: &Recipe) -> Result<(), RecipeError> {
        Self::refuse_differences(url, Self::parse(url, bytes)?.recipe.differences(wanted))
    }

    /// As [`check`](Self::check), as far as `known` goes: what a job's file alone says.
    ///
    /// # Errors
    /// Names all that differs of it.
    pub fn check_within(url: &str, bytes: &[u8], known: &Recipe) -> Result<(), RecipeError> {
        Self::refuse_differences(url, Self::parse(url, bytes)?.recipe.within(known).differences(known))
    }

    fn refuse_differences(url: &str, differences: Vec<String>) -> Result<(), RecipeError> {
        if differences.is_empty() { Ok(()) } else { Err(RecipeError { url: url.to_owned(), differences }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::data_section;

    fn recipe() -> Recipe {
        let mut recipe = Recipe::of_data(&data_section());
        recipe.settings.insert("model.vae_dtype".into(), "f32".into());
        recipe.probes.insert("model.path".into(), vec![3.0, -4.0]);
        recipe
    }

    #[test]
    fn shards_train_the_job_they_were_made_for_on_any_device() {
        let stamp = Stamp::new("a.tar", "f32", recipe());
        let mut wanted = recipe();
        wanted.settings.insert("student.dropout".into(), "false".into());
        wanted.probes.insert("model.path".into(), vec![3.05, -4.05]);
        let bytes = stamp.to_bytes().unwrap();
        assert_eq!(Stamp::check("b.tar", &bytes, &wanted), Ok(()));
        assert_eq!(Stamp::parse("b.tar", &bytes), Ok(stamp));
    }

    #[test]
    fn refusals_name_the_shard_and_all_that_differs() {
        let bytes = Stamp::new("a.tar", "f32", recipe()).to_bytes().unwrap();
        let mut data = data_section();
        (data.min_aesthetic, data.captions.keep_punctuation) = (5.5, Some("x".repeat(100)));
        let mut wanted = Recipe { probes: recipe().probes, ..Recipe::of_data(&data) };
        wanted.probes.insert("model.path".into(), vec![3.2, -4.0]);
        let error = Stamp::check("b.tar", &bytes, &wanted).unwrap_err();
        assert_eq!(error.differences.len(), 4, "{error}");
        for words in [
            "b.tar was precomputed otherwise",
            "data.min_aesthetic was `6`, is `5.5`",
            "model.vae_dtype was `f32`, which this job has no use for",
            "model.path named another model",
            "xxx...`",
            "run `worker precompute`",
        ] {
            assert!(error.to_string().contains(words), "{words}: {error}");
        }
        wanted = recipe();
        wanted.probes.insert("model.path".into(), vec![f32::NAN, -4.0]);
        assert!(Stamp::check("b.tar", &bytes, &wanted).is_err());
    }

    #[test]
    fn a_job_file_alone_refuses_what_it_can_tell() {
        let bytes = Stamp::new("a.tar", "f32", recipe()).to_bytes().unwrap();
        assert_eq!(Stamp::check_within("b.tar", &bytes, &Recipe::of_data(&data_section())), Ok(()), "of its models it knows nothing");
        let mut data = data_section();
        data.min_aesthetic = 5.5;
        let error = Stamp::check_within("b.tar", &bytes, &Recipe::of_data(&data)).unwrap_err();
        assert_eq!(error.differences, ["data.min_aesthetic was `6`, is `5.5`"]);
    }

    #[test]
    fn stamps_of_other_layouts_are_refused() {
        let later = Stamp { version: 2, ..Stamp::new("a.tar", "f32", recipe()) };
        let error = Stamp::check("b.tar", &later.to_bytes().unwrap(), &recipe()).unwrap_err().to_string();
        assert!(error.contains("in version 2, this program reads 1"), "{error}");
        assert!(Stamp::check("b.tar", b"{}", &recipe()).unwrap_err().to_string().contains("its stamp cannot be read"));
    }

    /// A rule that decides which samples are made and is not in the recipe would go unnoticed.
    #[test]
    fn every_field_of_the_data_section_is_in_the_recipe_or_decides_nothing() {
        let serde_json::Value::Object(fields) = serde_json::to_value(data_section()).unwrap() else { panic!("no object") };
        let deciding_nothing = [
            "shards",
            "sources",
            "max_bad_fraction",
            "buffer_bytes",
            "shuffle_buffer",
            "decode_threads",
            "read_timeout",
            "retries",
            "give_up_after",
            "cache_dir",
            "cache_bytes",
        ];
        let recipe = Recipe::of_data(&data_section());
        for field in fields.keys().filter(|field| !deciding_nothing.contains(&field.as_str())) {
            assert!(recipe.settings.keys().any(|name| name.starts_with(&format!("data.{field}"))), "{field}");
        }
    }
}
