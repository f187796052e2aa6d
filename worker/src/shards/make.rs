//! `worker shards make`: webdataset tars of pictures and a table of captions.
//!
//! The same table gives the same bytes. A JPEG goes in as it is; any other picture this program reads is encoded as one.

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor};
use std::path::{Path, PathBuf};

use image::codecs::jpeg::JpegEncoder;
use image::{ImageReader, RgbImage};
use peapod_data::image::{MAX_PIXELS, decode};
use peapod_data::shard::MAX_MEMBER_BYTES;
use peapod_proto::program::say;
use serde_json::{Map, Value};

use super::whole::WholeTar;
use super::{progress_bar, size};

/// Columns whose text is a number in a sample's json.
const SCORES: [&str; 2] = ["watermark", "aesthetic_score"];

/// Pictures that each thread prepares before all that were read are written.
const ROWS_A_THREAD: usize = 16;

/// What to make of what.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Table with a row for each sample: .csv or .tsv with a header, or .jsonl; its columns become the keys of the samples' json
    #[arg(long)]
    pub table: PathBuf,
    /// Column with the picture's path, relative to the table's folder
    #[arg(long, default_value = "image")]
    pub image_column: String,
    /// Where to write, with the first shard's number in braces: 'DIR/{00000..}.tar'
    #[arg(long)]
    pub out: String,
    /// Samples in a shard
    #[arg(long, default_value_t = 1000)]
    pub samples_per_shard: u32,
    /// Begin a new shard before one grows larger than this many bytes
    #[arg(long)]
    pub shard_bytes: Option<u64>,
    /// JPEG quality of pictures that are not JPEGs already
    #[arg(long, default_value_t = 95, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub quality: u8,
}

/// Makes the shards. Rows that cannot be used are named on stderr and left out.
///
/// Returns what was made, as lines for people.
///
/// # Errors
/// One line: the table or the pattern is unusable, a shard would be overwritten or cannot be written, or no row was usable. Shards that were
/// finished before stay.
pub fn run(options: &Options) -> Result<String, String> {
    if options.samples_per_shard == 0 || options.shard_bytes == Some(0) {
        return Err("--samples-per-shard and --shard-bytes must be at least 1".into());
    }
    let pattern = Pattern::parse(&options.out)?;
    pattern.refuse_existing()?;
    let mut rows = Rows::open(&options.table, &options.image_column)?;
    let mut writer = Writer::new(options, pattern);
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let bar = progress_bar(None, "rows");
    let (mut num_skipped, mut has_captions) = (0_u64, false);
    loop {
        let batch: Vec<Row> = rows.by_ref().take(num_threads * ROWS_A_THREAD).collect();
        if batch.is_empty() {
            break;
        }
        bar.inc(batch.len() as u64);
        has_captions |= batch.iter().any(Row::has_captions);
        for (row, prepared) in batch.iter().zip(prepare_all(&batch, num_threads, options.quality)) {
            match prepared {
                Ok(sample) => writer.add(row.number, &sample)?,
                Err(problem) => {
                    num_skipped += 1;
                    bar.suspend(|| say(format_args!("worker: row {} is left out: {problem}", row.number)));
                }
            }
        }
    }
    bar.finish_and_clear();
    if !has_captions {
        say(
            "worker: no row has a column caption_…: a job reads caption_zh and caption_en, or what its [data.captions] names (parallel_key, english_key)",
        );
    }
    writer.finish(num_skipped)
}

/// A picture and its json as they go into the tar.
struct Sample {
    jpg: Vec<u8>,
    json: Vec<u8>,
}

/// Prepares rows on several threads; the results in the rows' order.
fn prepare_all(rows: &[Row], num_threads: usize, quality: u8) -> Vec<Result<Sample, String>> {
    let part_len = rows.len().div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        let prepare = |part: &[Row]| part.iter().map(|row| prepare(row, quality)).collect::<Vec<_>>();
        let threads: Vec<_> = rows.chunks(part_len).map(|part| (part.len(), scope.spawn(move || prepare(part)))).collect();
        let join = |(len, thread): (usize, std::thread::ScopedJoinHandle<'_, Vec<_>>)| {
            thread.join().unwrap_or_else(|_| (0..len).map(|_| Err("the thread that read it panicked".to_owned())).collect())
        };
        threads.into_iter().flat_map(join).collect()
    })
}

fn prepare(row: &Row, quality: u8) -> Result<Sample, String> {
    let (path, json) = row.content.as_ref().map_err(Clone::clone)?;
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let bytes = std::fs::read(path).map_err(|error| named(&error))?;
    let jpg = if bytes.starts_with(&[0xff, 0xd8]) {
        // Decoded to see that it is whole, as training would.
        decode(&bytes).map_err(|error| named(&error))?;
        bytes
    } else {
        encode(&bytes, quality).map_err(|error| named(&error))?
    };
    let json = serde_json::to_vec(json).map_err(|error| named(&error))?;
    let longest = jpg.len().max(json.len()) as u64;
    if longest > MAX_MEMBER_BYTES {
        return Err(named(&format!("{longest} bytes; training reads no member of more than {MAX_MEMBER_BYTES}")));
    }
    Ok(Sample { jpg, json })
}

/// Encodes a picture of another format as JPEG; what is transparent becomes white.
fn encode(bytes: &[u8], quality: u8) -> Result<Vec<u8>, String> {
    let reader = || ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let (width, height) = reader().map_err(|error| error.to_string())?.into_dimensions().map_err(|error| error.to_string())?;
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(format!("{width} x {height} is more than {MAX_PIXELS} pixels"));
    }
    let picture = reader().map_err(|error| error.to_string())?.decode().map_err(|error| error.to_string())?.into_rgba8();
    let over_white = |channel: u8, alpha: u8| {
        let alpha = u32::from(alpha);
        ((u32::from(channel) * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let picture = RgbImage::from_fn(width, height, |x, y| {
        let [red, green, blue, alpha] = picture.get_pixel(x, y).0;
        image::Rgb([red, green, blue].map(|channel| over_white(channel, alpha)))
    });
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, quality).encode_image(&picture).map_err(|error| error.to_string())?;
    Ok(jpeg)
}

/// A row of the table: its number, counted from 0 without the header, and the picture's path and json, or why it has none.
struct Row {
    number: u64,
    content: Result<(PathBuf, Map<String, Value>), String>,
}

impl Row {
    /// Whether it has a caption under one of the keys that jobs read by default, in whichever language.
    fn has_captions(&self) -> bool {
        self.content.as_ref().is_ok_and(|(_, json)| json.keys().any(|key| key.starts_with("caption_")))
    }
}

/// The rows of a table, one after the other.
struct Rows {
    folder: PathBuf,
    image_column: String,
    number: u64,
    records: Box<dyn Iterator<Item = Result<Map<String, Value>, String>>>,
}

impl Rows {
    fn open(table: &Path, image_column: &str) -> Result<Self, String> {
        let named = |error: &dyn std::fmt::Display| format!("--table {}: {error}", table.display());
        let file = || File::open(table).map(BufReader::new).map_err(|error| named(&error));
        let extension = table.extension().and_then(|extension| extension.to_str()).unwrap_or_default().to_ascii_lowercase();
        let records: Box<dyn Iterator<Item = _>> = match extension.as_str() {
            "csv" | "tsv" => {
                let delimiter = if extension == "csv" { b',' } else { b'\t' };
                let mut reader = csv::ReaderBuilder::new().delimiter(delimiter).from_reader(file()?);
                let header = reader.headers().map_err(|error| named(&error))?.clone();
                if !header.iter().any(|name| name == image_column) {
                    let columns: Vec<&str> = header.iter().collect();
                    return Err(named(&format!(
                        "no column `{image_column}` among {}; name the pictures' column with --image-column",
                        columns.join(", ")
                    )));
                }
                Box::new(reader.into_records().map(move |record| {
                    let record = record.map_err(|error| error.to_string())?;
                    // An empty cell is no value.
                    let filled = header.iter().zip(&record).filter(|(_, cell)| !cell.is_empty());
                    filled.map(|(name, cell)| Ok((name.to_owned(), value(name, cell)?))).collect()
                }))
            }
            "jsonl" => Box::new(file()?.lines().map(|line| {
                let line = line.map_err(|error| error.to_string())?;
                serde_json::from_str(&line).map_err(|error| error.to_string())
            })),
            _ => return Err(named(&"a table ends in .csv, .tsv or .jsonl")),
        };
        let folder = table.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self { folder, image_column: image_column.to_owned(), number: 0, records })
    }

    fn content(&self, record: Result<Map<String, Value>, String>) -> Result<(PathBuf, Map<String, Value>), String> {
        let mut json = record?;
        match json.remove(&self.image_column) {
            Some(Value::String(path)) => Ok((self.folder.join(path), json)),
            _ => Err(format!("no path under `{}`", self.image_column)),
        }
    }
}

impl Iterator for Rows {
    type Item = Row;

    fn next(&mut self) -> Option<Row> {
        let record = self.records.next()?;
        let row = Row { number: self.number, content: self.content(record) };
        self.number += 1;
        Some(row)
    }
}

/// A cell's value in json.
fn value(name: &str, cell: &str) -> Result<Value, String> {
    if SCORES.contains(&name) {
        let number = cell.trim().parse().ok().and_then(serde_json::Number::from_f64);
        return number.map(Value::Number).ok_or_else(|| format!("{name} `{cell}` is no number"));
    }
    Ok(Value::String(cell.to_owned()))
}

/// `DIR/{00000..}.tar`: names of shards, counted from the number in the braces.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern {
    folder: PathBuf,
    before: String,
    after: String,
    first: u64,
    /// Digits of a number.
    width: usize,
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, String> {
        let refuse = |what: &str| format!("--out '{text}' {what}: write it like 'DIR/{{00000..}}.tar'");
        if text.contains("://") {
            return Err(format!("--out '{text}' must be a local folder: what is in it can be copied to a store afterwards"));
        }
        let (before, rest) = text.split_once('{').ok_or_else(|| refuse("has no number in braces"))?;
        let (number, after) = rest.split_once("..}").ok_or_else(|| refuse("has no `..}` behind its number"))?;
        let first = number.parse().ok().filter(|_| number.len() <= 9 && number.bytes().all(|byte| byte.is_ascii_digit()));
        let first = first.ok_or_else(|| refuse("has no number of 1 to 9 digits in its braces"))?;
        if !after.ends_with(".tar") || after.contains(['{', '}', '/']) {
            return Err(refuse("must end in .tar, with one number and no folder behind it"));
        }
        let (folder, before) =
            before.rsplit_once('/').map_or((".", before), |(folder, name)| (if folder.is_empty() { "/" } else { folder }, name));
        Ok(Self { folder: folder.into(), before: before.into(), after: after.into(), first, width: number.len() })
    }

    fn name(&self, place: u64) -> String {
        format!("{}{:0width$}{}", self.before, self.first + place, self.after, width = self.width)
    }

    /// Refuses a folder in which a file has a name that a shard may get.
    fn refuse_existing(&self) -> Result<(), String> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return Ok(()) };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix(&self.before)?.strip_suffix(&self.after));
            if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
                return Err(format!("{} exists; nothing is overwritten: remove it or choose another --out", entry.path().display()));
            }
        }
        Ok(())
    }

    /// The list of the first `num` shards, as a job's `data.shards` takes it.
    fn list(&self, num: u64) -> String {
        let (first, last) = (self.first, self.first + num.saturating_sub(1));
        let range = format!("{}{{{first:0width$}..{last:0width$}}}{}", self.before, self.after, width = self.width);
        self.folder.join(range).display().to_string()
    }
}

/// Writes samples into shards.
struct Writer {
    pattern: Pattern,
    samples_per_shard: u32,
    max_bytes: u64,
    current: Option<Shard>,
    num_shards: u64,
    num_samples: u64,
    num_bytes: u64,
}

/// A shard that is being written.
struct Shard {
    tar: WholeTar,
    num_samples: u32,
}

impl Writer {
    fn new(options: &Options, pattern: Pattern) -> Self {
        let (samples_per_shard, max_bytes) = (options.samples_per_shard, options.shard_bytes.unwrap_or(u64::MAX));
        Self { pattern, samples_per_shard, max_bytes, current: None, num_shards: 0, num_samples: 0, num_bytes: 0 }
    }

    fn add(&mut self, number: u64, sample: &Sample) -> Result<(), String> {
        let num_bytes = (sample.jpg.len() + sample.json.len()) as u64;
        let is_full = |shard: &Shard| shard.num_samples >= self.samples_per_shard || shard.tar.num_bytes() + num_bytes > self.max_bytes;
        if self.current.as_ref().is_some_and(is_full) {
            self.close()?;
        }
        let mut shard = match self.current.take() {
            Some(shard) => shard,
            None => Shard { tar: WholeTar::begin(self.pattern.folder.join(self.pattern.name(self.num_shards)))?, num_samples: 0 },
        };
        for (extension, bytes) in [("jpg", &sample.jpg), ("json", &sample.json)] {
            shard.tar.append(&format!("{number:09}.{extension}"), bytes)?;
        }
        shard.num_samples += 1;
        (self.num_samples, self.num_bytes) = (self.num_samples + 1, self.num_bytes + num_bytes);
        self.current = Some(shard);
        Ok(())
    }

    fn close(&mut self) -> Result<(), String> {
        let Some(shard) = self.current.take() else { return Ok(()) };
        shard.tar.finish()?;
        self.num_shards += 1;
        Ok(())
    }

    fn finish(mut self, num_skipped: u64) -> Result<String, String> {
        self.close()?;
        if self.num_shards == 0 {
            return Err(format!("no usable row among {num_skipped}: nothing was written"));
        }
        let Self { num_shards, num_samples, num_bytes, pattern, .. } = self;
        Ok(format!(
            "shards     {num_shards}\nsamples    {num_samples}, {}\nleft out   {num_skipped}\nfor a job  shards = [{:?}]\n",
            size(num_bytes),
            pattern.list(num_shards)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_count_on_from_the_number_in_the_braces() {
        let pattern = Pattern::parse("out/a-{00098..}.tar").unwrap();
        assert_eq!([0, 2].map(|place| pattern.name(place)), ["a-00098.tar", "a-00100.tar"]);
        assert_eq!(pattern.list(3), "out/a-{00098..00100}.tar");
        assert_eq!(Pattern::parse("{0..}.tar").unwrap().folder, Path::new("."));
        assert_eq!(Pattern::parse("/{0..}.tar").unwrap().folder, Path::new("/"));
        for wrong in ["out.tar", "{0..9}.tar", "{x..}.tar", "{..}.tar", "{0..}.zip", "{0..}/a.tar", "{0..}{0..}.tar", "{0000000000..}.tar"]
        {
            assert!(Pattern::parse(wrong).unwrap_err().contains("'DIR/{00000..}.tar'"), "{wrong}");
        }
    }

    #[test]
    fn transparent_pixels_become_white() {
        let mut png = Cursor::new(Vec::new());
        let picture = image::RgbaImage::from_fn(16, 8, |x, _| image::Rgba([200, 0, 0, if x < 8 { 0 } else { 255 }]));
        picture.write_to(&mut png, image::ImageFormat::Png).unwrap();
        let picture = decode(&encode(png.get_ref(), 95).unwrap()).unwrap();
        assert_eq!((picture.width, picture.height), (16, 8));
        let pixel = |x: usize| [0, 1, 2].map(|channel| picture.bytes[3 * x + channel]);
        assert!(pixel(0).iter().all(|&channel| channel > 245), "{:?}", pixel(0));
        assert!(pixel(15)[0].abs_diff(200) < 10 && pixel(15)[1] < 10, "{:?}", pixel(15));
    }

    #[test]
    fn captions_under_other_keys_are_noticed() {
        let row = |json: &str| Row { number: 0, content: Ok((PathBuf::new(), serde_json::from_str(json).unwrap())) };
        assert!(row(r#"{"caption_ori_it": "un gatto"}"#).has_captions());
        assert!(!row(r#"{"caption": "a cat", "url": "x"}"#).has_captions());
        assert!(!Row { number: 0, content: Err("no path".into()) }.has_captions());
    }

    #[test]
    fn member_that_training_would_refuse_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        let mut jpeg = encode(&png(), 95).unwrap();
        // Behind the picture's end, where decoders do not look.
        jpeg.resize(MAX_MEMBER_BYTES as usize + 1, 0);
        std::fs::write(&path, jpeg).unwrap();
        let problem = prepare(&Row { number: 0, content: Ok((path, Map::new())) }, 95).err().unwrap();
        assert!(problem.ends_with("67108865 bytes; training reads no member of more than 67108864"), "{problem}");
    }

    fn png() -> Vec<u8> {
        let mut png = Cursor::new(Vec::new());
        RgbImage::new(16, 8).write_to(&mut png, image::ImageFormat::Png).unwrap();
        png.into_inner()
    }

    #[test]
    fn scores_are_numbers_and_everything_else_is_text() {
        assert_eq!(value("watermark", " 0.25").unwrap(), 0.25);
        assert_eq!(value("caption_zh", "12").unwrap(), "12");
        assert!(value("aesthetic_score", "good").unwrap_err().contains("`good` is no number"));
    }
}
