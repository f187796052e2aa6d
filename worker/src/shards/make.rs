//! `worker shards make`: webdataset tars of pictures and a table of captions.
//!
//! The same table gives the same bytes. A JPEG goes in as it is; any other picture this program reads is encoded as one.

use std::io::Cursor;
use std::path::PathBuf;

use image::codecs::jpeg::JpegEncoder;
use image::{ImageReader, RgbImage};
use peapod_data::image::{MAX_PIXELS, decode};
use peapod_data::shard::MAX_MEMBER_BYTES;
use peapod_proto::program::say;

use super::table::{Fault, Faults, Row, Rows};
use super::whole::WholeTar;
use super::{progress_bar, size};

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
    /// Leave out rows that cannot be used, and those whose pictures are not there, instead of refusing the table
    #[arg(long)]
    pub skip_bad: bool,
}

/// Makes the shards. A picture that turns out to be damaged is left out: the first are named on stderr, all are counted.
///
/// Returns what was made, as lines for people.
///
/// # Errors
/// The table or the pattern is unusable, rows of the table are and are not to be left out (nothing is written then), a shard would be
/// overwritten or cannot be written, or no row was usable. Shards that were finished before stay.
pub fn run(options: &Options) -> Result<String, String> {
    if options.samples_per_shard == 0 || options.shard_bytes == Some(0) {
        return Err("--samples-per-shard and --shard-bytes must be at least 1".into());
    }
    let pattern = Pattern::parse(&options.out)?;
    pattern.refuse_existing()?;
    let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
    if !options.skip_bad {
        check(options, num_threads)?;
    }
    let mut rows = Rows::open(&options.table, &options.image_column)?;
    let mut writer = Writer::new(options, pattern);
    let bar = progress_bar(None, "rows");
    let (mut faults, mut has_captions) = (Faults::default(), false);
    loop {
        let batch = rows.take(num_threads * ROWS_A_THREAD)?;
        if batch.is_empty() {
            break;
        }
        bar.inc(batch.len() as u64);
        has_captions |= batch.iter().any(Row::has_captions);
        let panicked = || Err(Fault::new("unreadable picture", "the thread that read it panicked"));
        for (row, prepared) in batch.iter().zip(of_all(&batch, num_threads, |row| prepare(row, options.quality), panicked)) {
            match prepared {
                Ok(sample) => writer.add(row.number, &sample)?,
                Err(fault) => {
                    if let Some(named) = faults.count(row.line, &fault) {
                        bar.suspend(|| say(format_args!("worker: left out: {named}")));
                    }
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
    writer.finish(&faults)
}

/// Goes through the whole table before anything is written: shards that lack half of the pictures, as the folder was another, are found out
/// late.
fn check(options: &Options, num_threads: usize) -> Result<(), String> {
    let mut rows = Rows::open(&options.table, &options.image_column)?;
    let (mut num, mut faults) = (0, Faults::default());
    let bar = progress_bar(None, "rows looked at");
    loop {
        let batch = rows.take(num_threads * ROWS_A_THREAD)?;
        if batch.is_empty() {
            break;
        }
        num += batch.len();
        bar.inc(batch.len() as u64);
        for (row, fault) in batch.iter().zip(of_all(&batch, num_threads, Row::fault, || None)) {
            if let Some(fault) = fault {
                faults.count(row.line, &fault);
            }
        }
    }
    bar.finish_and_clear();
    if faults.num() == 0 {
        return Ok(());
    }
    Err(format!(
        "--table {}: {} of {num} rows cannot be used ({}); nothing was written. Mend them, or leave them out with --skip-bad:{}",
        options.table.display(),
        faults.num(),
        faults.by_kind(),
        faults.list()
    ))
}

/// A picture and its json as they go into the tar.
struct Sample {
    jpg: Vec<u8>,
    json: Vec<u8>,
}

/// Does something with rows on several threads; the results in the rows' order, and `panicked`'s for those of a thread that panicked.
fn of_all<T: Send>(rows: &[Row], num_threads: usize, work: impl Fn(&Row) -> T + Sync, panicked: impl Fn() -> T) -> Vec<T> {
    let part_len = rows.len().div_ceil(num_threads).max(1);
    std::thread::scope(|scope| {
        let work = |part: &[Row]| part.iter().map(&work).collect::<Vec<_>>();
        let threads: Vec<_> = rows.chunks(part_len).map(|part| (part.len(), scope.spawn(move || work(part)))).collect();
        let join = |(len, thread): (usize, std::thread::ScopedJoinHandle<'_, Vec<_>>)| {
            thread.join().unwrap_or_else(|_| (0..len).map(|_| panicked()).collect())
        };
        threads.into_iter().flat_map(join).collect()
    })
}

fn prepare(row: &Row, quality: u8) -> Result<Sample, Fault> {
    if let Some(fault) = row.fault() {
        return Err(fault);
    }
    let (path, json) = row.content.as_ref().map_err(Clone::clone)?;
    let damaged = |error: &dyn std::fmt::Display| Fault::new("unreadable picture", format!("{}: {error}", path.display()));
    let bytes = std::fs::read(path).map_err(|error| damaged(&error))?;
    let jpg = if bytes.starts_with(&[0xff, 0xd8]) {
        // Decoded to see that it is whole, as training would.
        decode(&bytes).map_err(|error| damaged(&error))?;
        bytes
    } else {
        encode(&bytes, quality).map_err(|error| damaged(&error))?
    };
    let json = serde_json::to_vec(json).map_err(|error| damaged(&error))?;
    let longest = jpg.len().max(json.len()) as u64;
    if longest > MAX_MEMBER_BYTES {
        let words = format!("{}: {longest} bytes; training reads no member of more than {MAX_MEMBER_BYTES}", path.display());
        return Err(Fault::new("too large", words));
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

    fn finish(mut self, faults: &Faults) -> Result<String, String> {
        self.close()?;
        let num_faults = faults.num();
        if self.num_shards == 0 {
            let kinds = if num_faults > 0 { format!(" ({})", faults.by_kind()) } else { String::new() };
            return Err(format!("no usable row among {num_faults}{kinds}: nothing was written"));
        }
        let Self { num_shards, num_samples, num_bytes, pattern, .. } = self;
        let kinds: String = faults.kinds().map(|(kind, num)| format!("{:11}{num:>9}  {kind}\n", "")).collect();
        Ok(format!(
            "shards     {num_shards}\nsamples    {num_samples}, {}\nleft out   {num_faults}\n{kinds}for a job  shards = [{:?}]\n",
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
        assert_eq!(Pattern::parse("{0..}.tar").unwrap().folder.to_str(), Some("."));
        assert_eq!(Pattern::parse("/{0..}.tar").unwrap().folder.to_str(), Some("/"));
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
    fn member_that_training_would_refuse_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jpg");
        let mut jpeg = encode(&png(), 95).unwrap();
        // Behind the picture's end, where decoders do not look.
        jpeg.resize(MAX_MEMBER_BYTES as usize + 1, 0);
        std::fs::write(&path, jpeg).unwrap();
        let row = Row { number: 0, line: 2, content: Ok((path, serde_json::Map::new())) };
        let Fault { kind, words } = prepare(&row, 95).err().unwrap();
        assert!(words.ends_with("67108865 bytes; training reads no member of more than 67108864"), "{kind}: {words}");
    }

    fn png() -> Vec<u8> {
        let mut png = Cursor::new(Vec::new());
        RgbImage::new(16, 8).write_to(&mut png, image::ImageFormat::Png).unwrap();
        png.into_inner()
    }
}
