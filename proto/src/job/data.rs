//! The section of the job file about samples: where they come from and which are kept.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::captions::CaptionsSection;
use super::checks::{Bytes, Checks};
use super::{bytes, duration, yes};

/// Which samples that carry a watermark score are trained. Samples without one always are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// By size; those without a key of a native caption by aesthetic score and watermark too. The published trainer of SDXL.
    #[default]
    Sdxl,
    /// By aesthetic score and watermark, whatever their size and captions. The published trainer of SD1.5.
    Sd15,
    /// All of them.
    None,
}

/// Where samples come from and which are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// webdataset tars of jpg + json, plain, gzip or zstd: paths and addresses (http, https, s3, gs, az), with `{00000..00123}` ranges and
    /// wildcards, several joined by `::`; `@FILE` for a file of them. Give this or `sources`.
    #[serde(default)]
    pub shards: Vec<String>,
    /// Several sets of such tars, mixed by weight. Give this or `shards`.
    #[serde(default)]
    pub sources: Vec<SourceSection>,
    /// Aspect buckets as [width, height] in pixels.
    #[serde(default = "DataSection::default_buckets")]
    pub buckets: Vec<[u32; 2]>,
    /// Which samples that carry a watermark score are trained.
    #[serde(default)]
    pub filter: Filter,
    /// Smallest width x height, in pixels, of a sample that carries a watermark score.
    #[serde(default = "DataSection::default_min_pixels")]
    pub min_pixels: u64,
    /// Lowest aesthetic score of a sample that carries a watermark score and no native caption.
    #[serde(default = "DataSection::default_min_aesthetic")]
    pub min_aesthetic: f64,
    /// Highest watermark score of such a sample.
    #[serde(default = "DataSection::default_max_watermark")]
    pub max_watermark: f64,
    /// Key of the watermark score in a sample's json.
    #[serde(default = "DataSection::default_watermark_key")]
    pub watermark_key: String,
    /// Key of the aesthetic score.
    #[serde(default = "DataSection::default_aesthetic_key")]
    pub aesthetic_key: String,
    /// Turns pictures as their EXIF data says. The published trainer does not.
    #[serde(default)]
    pub exif_rotate: bool,
    /// Drops prompts of which cleaning leaves no character of the language, and takes samples in which no caption is found for broken,
    /// instead of training them empty.
    #[serde(default = "yes")]
    pub strict_clean: bool,
    /// Share of broken samples above which the job stops. Filtered samples do not count.
    #[serde(default = "DataSection::default_max_bad_fraction")]
    pub max_bad_fraction: f64,
    /// What a worker's loader may hold, decoded pictures included; one share always fits.
    #[serde(default = "DataSection::default_buffer_bytes", with = "bytes")]
    #[schemars(schema_with = "bytes::schema")]
    pub buffer_bytes: u64,
    /// Samples a worker gathers before it draws among them, so that a batch is not one region of one tar.
    #[serde(default = "DataSection::default_shuffle_buffer")]
    pub shuffle_buffer: u32,
    /// Threads that decode pictures in each worker; 0: one for every two cores, at most 8.
    #[serde(default)]
    pub decode_threads: u32,
    /// Longest wait for a store's answer, and for the next bytes of one, before it is asked again.
    #[serde(default = "DataSection::default_read_timeout", with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub read_timeout: Duration,
    /// Failures of a store in a row that are no news.
    #[serde(default = "DataSection::default_retries")]
    pub retries: u32,
    /// How long a store may go on failing before a worker gives up. Training waits meanwhile.
    #[serde(default = "DataSection::default_give_up_after", with = "duration")]
    #[schemars(schema_with = "duration::schema")]
    pub give_up_after: Duration,
    /// A folder on each host that keeps shards read over a network; workers of one host share it. By default none are kept.
    #[serde(default)]
    pub cache_dir: Option<PathBuf>,
    /// Largest size of that folder; what was used longest ago goes first.
    #[serde(default = "DataSection::default_cache_bytes", with = "bytes")]
    #[schemars(schema_with = "bytes::schema")]
    pub cache_bytes: u64,
    /// Which captions count and how they are cleaned.
    #[serde(default)]
    pub captions: CaptionsSection,
    /// Decodes pictures of at least four times their bucket's width and height at a half, a quarter or an eighth of their size, never below
    /// twice the bucket's, before they are scaled: faster, and 0.2 grey levels away from the whole picture on average.
    #[serde(default = "yes")]
    pub fast_shrink: bool,
}

/// A set of shards in a mixture.
///
/// Shards are drawn from the sources in proportion to their weights, evenly spread. With `train.steps` each source starts over whenever it
/// has been read, for as long as the job lasts; with `train.epochs` each is passed over that many times, and the weights say only how fast.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSection {
    /// What `coordinator status` calls it.
    pub name: String,
    /// As `data.shards`.
    pub shards: Vec<String>,
    /// Shards drawn from it for one of a source of weight 1. Shards are counted, not samples: for weights of samples, cut shards to one
    /// size.
    #[serde(default = "SourceSection::default_weight")]
    pub weight: f64,
}

impl SourceSection {
    fn default_weight() -> f64 {
        1.0
    }

    fn check(&self, checks: &mut Checks) {
        let name = &self.name;
        if name.is_empty() {
            checks.problem("data.sources: a source has an empty name");
        }
        if self.shards.is_empty() {
            checks.problem(format!("data.sources: {name:?} has no shards: name at least one tar"));
        }
        let problem = (!(1e-3..=1e3).contains(&self.weight))
            .then(|| format!("data.sources: {name:?} has weight {}; it must be within 0.001..=1000", self.weight));
        checks.rule("data.sources.weight", "0.001 to 1000", problem);
    }
}

impl DataSection {
    fn default_buckets() -> Vec<[u32; 2]> {
        vec![[448, 896], [448, 832], [512, 768], [576, 704], [640, 640], [704, 576], [768, 512], [832, 448], [896, 448]]
    }
    fn default_min_pixels() -> u64 {
        640 * 640
    }
    fn default_min_aesthetic() -> f64 {
        6.0
    }
    fn default_max_watermark() -> f64 {
        0.5
    }
    fn default_watermark_key() -> String {
        "watermark".into()
    }
    fn default_aesthetic_key() -> String {
        "aesthetic_score".into()
    }
    fn default_max_bad_fraction() -> f64 {
        0.05
    }
    fn default_buffer_bytes() -> u64 {
        256 << 20
    }
    fn default_shuffle_buffer() -> u32 {
        1000
    }
    fn default_read_timeout() -> Duration {
        Duration::from_secs(30)
    }
    fn default_retries() -> u32 {
        5
    }
    fn default_give_up_after() -> Duration {
        Duration::from_secs(600)
    }
    fn default_cache_bytes() -> u64 {
        100 << 30
    }

    pub(super) fn check(&self, checks: &mut Checks) {
        match (self.shards.is_empty(), self.sources.is_empty()) {
            (true, true) => checks.problem("data.shards is empty: name at least one tar, such as \"/data/{00000..00099}.tar\""),
            (false, false) => checks.problem("give exactly one of data.shards or [[data.sources]]"),
            _ => {}
        }
        for (index, source) in self.sources.iter().enumerate() {
            source.check(checks);
            if self.sources[..index].iter().any(|other| other.name == source.name) {
                checks.problem(format!("data.sources: two are named {:?}", source.name));
            }
        }
        if self.buckets.is_empty() {
            checks.problem("data.buckets is empty: leave the key out for the nine of the method");
        }
        checks.sizes("data.buckets", &self.buckets);
        checks.within("data.max_bad_fraction", self.max_bad_fraction, 0.0..=1.0);
        if !self.min_aesthetic.is_finite() || !self.max_watermark.is_finite() {
            checks.problem("data.min_aesthetic and data.max_watermark must be finite numbers");
        }
        checks.at_least("data.buffer_bytes", Bytes(self.buffer_bytes), Bytes(1 << 20), "");
        checks.at_least("data.shuffle_buffer", self.shuffle_buffer, 1, " (1: tar order)");
        for (field, key) in [("watermark_key", &self.watermark_key), ("aesthetic_key", &self.aesthetic_key)] {
            if key.is_empty() {
                checks.problem(format!("data.{field} is empty: name a key of the samples' json, or leave it out"));
            }
        }
        self.captions.check(checks);
        checks.within("data.decode_threads", self.decode_threads, 0..=256);
        checks.within("data.read_timeout", self.read_timeout, Duration::from_millis(100)..=Duration::from_secs(3600));
        checks.within("data.retries", self.retries, 0..=1000);
        checks.within("data.give_up_after", self.give_up_after, Duration::ZERO..=Duration::from_secs(7 * 24 * 3600));
        checks.at_least("data.cache_bytes", Bytes(self.cache_bytes), Bytes(1 << 20), "");
    }
}
