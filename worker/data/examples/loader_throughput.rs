//! Measures the data path: a job's shards through the loader, or one shard's pictures through the decoder alone.
//!
//! usage: loader_throughput TAR[,TAR...] NUM_SAMPLES DECODE_THREADS [BUCKET ...]       (buckets as 640x640; by default the method's nine)

use std::error::Error;
use std::ops::ControlFlow;
use std::time::Instant;

use fast_image_resize::Resizer;
use peapod_data::bucket::{Bucket, nearest};
use peapod_data::draws::SampleRng;
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

/// Decode, resize and crop on this thread, from memory.
fn decode_alone(shards: &[String], data: &DataSection) -> Result<(), Box<dyn Error>> {
    let mut jpegs = Vec::new();
    for url in shards {
        shard::read_shard(source::open(url)?, &Bitmap::default(), |sample| {
            jpegs.extend(sample.jpg);
            ControlFlow::Continue(())
        });
    }
    let buckets: Vec<Bucket> = data.buckets.iter().map(|&[width, height]| Bucket { width, height }).collect();
    let mut resizer = Resizer::new();
    let (mut decode, mut resize, mut pixels) = (0.0, 0.0, 0_u64);
    for (index, jpeg) in jpegs.iter().enumerate() {
        let begin = Instant::now();
        let picture = image::decode(jpeg)?;
        decode += begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let bucket = buckets[nearest(&buckets, (picture.width, picture.height)).unwrap_or_default()];
        let name = SampleName { epoch: Epoch(0), shard: ShardId(0), index: index as u32 };
        image::cover(&mut resizer, &picture, bucket, &SampleRng::new(0, name))?;
        resize += begin.elapsed().as_secs_f64();
        pixels += u64::from(picture.width) * u64::from(picture.height);
    }
    let num = jpegs.len() as f64;
    println!(
        "one thread, {num} pictures of {:.0} kpixels: decode {:.2} ms, resize and crop {:.2} ms, {:.0} samples/s",
        pixels as f64 / num / 1e3,
        decode / num * 1e3,
        resize / num * 1e3,
        num / (decode + resize)
    );
    Ok(())
}

/// Everything, random numbers included, with shards leased over and over.
fn whole_loader(shards: Vec<String>, num_samples: usize, data: DataSection) -> Result<(), Box<dyn Error>> {
    let (sender, events) = std::sync::mpsc::channel();
    let mut loader = Loader::start(LoaderConfig::new(data, 0, 10, 0.1), move |event| drop(sender.send(event)))?;
    let handle = loader.handle();
    let supervisor = std::thread::spawn(move || {
        let mut next = 0_usize;
        for event in events {
            let LoaderEvent::NeedLeases { num } = event else { continue };
            let leases = (next..next + num as usize).map(|number| {
                let (epoch, shard) = (number / shards.len(), number % shards.len());
                let url = shards[shard].clone();
                LeasedShard {
                    lease: LeaseId(number as u64),
                    epoch: Epoch(epoch as u32),
                    shard: ShardId(shard as u32),
                    url,
                    done: Bitmap::default(),
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
