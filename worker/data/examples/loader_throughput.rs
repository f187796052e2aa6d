//! Measures the data path: a job's shards through the loader, or one shard's pictures through the decoder alone.
//!
//! usage: loader_throughput TAR[,TAR...] NUM_SAMPLES DECODE_THREADS [BUCKET ...]       (buckets as 640x640; by default the method's nine)

use std::error::Error;
use std::ops::ControlFlow;
use std::time::Instant;

use fast_image_resize::Resizer;
use peapod_data::bucket::{Bucket, nearest};
use peapod_data::draws::SampleRng;
use peapod_data::image::{Cropped, Rgb};
use peapod_data::{LeasedShard, Loader, LoaderConfig, LoaderEvent, expand_shards, image, shard, source};
use peapod_proto::ids::{Bitmap, Epoch, LeaseId, SampleName, ShardId};
use peapod_proto::job::DataSection;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [shards, num_samples, decode_threads, buckets @ ..] = arguments.as_slice() else {
        return Err("usage: loader_throughput TAR[,TAR...] NUM_SAMPLES DECODE_THREADS [BUCKET ...]".into());
    };
    let shards = expand_shards(&shards.split(',').map(str::to_owned).collect::<Vec<_>>())?;
    let mut data: DataSection = serde_json::from_str(r#"{"shards": []}"#)?;
    data.decode_threads = decode_threads.parse()?;
    if !buckets.is_empty() {
        data.buckets = buckets.iter().map(|text| bucket(text)).collect::<Result<_, _>>()?;
    }
    decode_alone(&shards, &data)?;
    whole_loader(shards, num_samples.parse()?, data)
}

fn bucket(text: &str) -> Result<[u32; 2], Box<dyn Error>> {
    let (width, height) = text.split_once('x').ok_or("a bucket looks like 640x640")?;
    Ok([width.parse()?, height.parse()?])
}

/// Decode, resize and crop on this thread, from memory: from whole pictures and, where that is done, from shrunk ones.
fn decode_alone(shards: &[String], data: &DataSection) -> Result<(), Box<dyn Error>> {
    let mut jpegs = Vec::new();
    for url in shards {
        shard::read_shard(source::open(url)?, &Bitmap::default(), |found| {
            if let shard::Found::Sample(sample) = found {
                jpegs.extend(sample.jpg);
            }
            ControlFlow::Continue(())
        });
    }
    let buckets: Vec<Bucket> = data.buckets.iter().map(|&[width, height]| Bucket { width, height }).collect();
    let mut resizer = Resizer::new();
    let (mut whole, mut shrunk) = (Times::default(), Times::default());
    let (mut pixels, mut difference, mut largest) = (0_u64, 0.0, 0.0_f64);
    for (index, jpeg) in jpegs.iter().enumerate() {
        let size = image::size(jpeg)?;
        let bucket = buckets[nearest(&buckets, size).unwrap_or_default()];
        let rng = SampleRng::new(0, SampleName { epoch: Epoch(0), shard: ShardId(0), index: index as u32 });
        let wanted = whole
            .time(|| Ok((image::decode(jpeg)?, 1)), |picture, by| image::cover_shrunk(&mut resizer, picture, size, by, bucket, &rng))?;
        pixels += u64::from(size.0) * u64::from(size.1);
        let (decode, resize) = (shrunk.decode, shrunk.resize);
        let mut divisor = 1;
        let crop = shrunk.time(
            || image::decode_shrunk(jpeg, size, bucket),
            |picture, by| {
                divisor = by;
                image::cover_shrunk(&mut resizer, picture, size, by, bucket, &rng)
            },
        )?;
        if divisor == 1 {
            // The same work once more.
            shrunk = Times { decode, resize, num: shrunk.num - 1 };
            continue;
        }
        let sum: u64 = crop.pixels.iter().zip(&wanted.pixels).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        let mean = sum as f64 / crop.pixels.len() as f64;
        (difference, largest) = (difference + mean, largest.max(mean));
    }
    println!("one thread, {} pictures of {:.0} kpixels: {whole}", jpegs.len(), pixels as f64 / jpegs.len() as f64 / 1e3);
    if shrunk.num > 0 {
        let mean = difference / f64::from(shrunk.num);
        println!("{} of them shrunk while decoding: {shrunk}; {mean:.2} grey levels off on average, {largest:.2} at most", shrunk.num);
    }
    Ok(())
}

/// Seconds spent on some pictures.
#[derive(Default)]
struct Times {
    decode: f64,
    resize: f64,
    num: u32,
}

impl Times {
    /// Times one picture.
    fn time(
        &mut self,
        decode: impl FnOnce() -> peapod_data::Result<(Rgb, u32)>,
        resize: impl FnOnce(&Rgb, u32) -> peapod_data::Result<Cropped>,
    ) -> peapod_data::Result<Cropped> {
        let begin = Instant::now();
        let (picture, by) = decode()?;
        let decoded = Instant::now();
        let crop = resize(&picture, by)?;
        self.decode += (decoded - begin).as_secs_f64();
        self.resize += decoded.elapsed().as_secs_f64();
        self.num += 1;
        Ok(crop)
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let num = f64::from(self.num);
        let (decode, resize) = (self.decode / num * 1e3, self.resize / num * 1e3);
        write!(out, "decode {decode:.2} ms, resize and crop {resize:.2} ms, {:.0} a second", 1e3 / (decode + resize))
    }
}

/// Everything, random numbers included, with shards leased over and over.
fn whole_loader(shards: Vec<String>, num_samples: usize, data: DataSection) -> Result<(), Box<dyn Error>> {
    let (sender, events) = std::sync::mpsc::channel();
    let mut loader = Loader::start(LoaderConfig::new(data, 0, 10, 0.1), move |event| drop(sender.send(event)))?;
    let handle = loader.handle();
    let supervisor = std::thread::spawn(move || {
        let mut next = 0_usize;
        for event in events {
            let LoaderEvent::NeedLeases { num, .. } = event else { continue };
            let leases = (next..next + num as usize).map(|number| {
                let (epoch, shard) = (number / shards.len(), number % shards.len());
                let url = shards[shard].clone();
                LeasedShard {
                    lease: LeaseId(number as u64),
                    epoch: Epoch(epoch as u32),
                    shard: ShardId(shard as u32),
                    url,
                    done: Bitmap::default(),
                    end: None,
                }
            });
            handle.grant(leases.collect(), false);
            next += num as usize;
        }
    });
    loader.next_share(20)?;
    let begin = Instant::now();
    let mut num = 0;
    while num < num_samples {
        num += loader.next_share(20)?.num_samples();
    }
    println!("loader: {:.0} samples/s", num as f64 / begin.elapsed().as_secs_f64());
    drop(loader);
    // The supervisor's handle holds the channel's sender: it ends with the process.
    drop(supervisor);
    Ok(())
}
