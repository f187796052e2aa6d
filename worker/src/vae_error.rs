//! `worker vae-error`: what an autoencoder loses in fewer bits, on the user's own pictures. Random weights or pictures would prove nothing:
//! it is the activations of the real ones that overflow.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use fast_image_resize::Resizer;
use peapod_data::bucket::Bucket;
use peapod_data::draws::SampleRng;
use peapod_data::image::{cover, decode};
use peapod_model::source::ModelSource;
use peapod_proto::ids::{Epoch, SampleName, ShardId};
use serde::Serialize;
use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::device::{self, ComputeArgs};
use crate::hub;
use crate::numbers::VaeNumbers;

/// What an autoencoder loses in fewer bits.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Model whose autoencoder is looked at: a diffusers folder, one file, or a name in the hub's cache
    #[arg(long)]
    pub model: PathBuf,
    /// Folder with pictures, JPEG or PNG, of the kind that will be trained on
    #[arg(long)]
    pub images: PathBuf,
    /// Most pictures to encode, the first by their names
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: u32,
    /// Width and height that pictures are scaled and cut to [default: the model's own]
    #[arg(long, num_args = 2, value_names = ["WIDTH", "HEIGHT"])]
    pub size: Vec<u32>,
    /// Where to compute what is compared with the CPU's f32
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Prints JSON
    #[arg(long)]
    pub json: bool,
}

/// What was compared. Latents are those that a UNet sees, about 1 in size.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Report {
    model: String,
    num_pictures: usize,
    size: [u32; 2],
    device: String,
    /// Root of the mean square of the latents in f32.
    latent_rms: f64,
    /// Root of the mean variance that the autoencoder itself gives its latents: what training adds to them at random.
    posterior_std: f64,
    numbers: Vec<Comparison>,
}

/// One kind's latents beside those in f32 on the CPU, drawn with the same noise; of the pictures whose latents are finite.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Comparison {
    dtype: &'static str,
    /// Pictures with a latent that is infinite or NaN.
    num_not_finite: usize,
    error_rms: Option<f64>,
    largest_error: Option<f64>,
    /// `error_rms / latent_rms`.
    relative_error: Option<f64>,
    /// `error_rms / posterior_std`.
    share_of_posterior: Option<f64>,
}

/// A picture's latents with the deviation of their distribution, in f32 on the CPU.
struct Encoded {
    latents: Tensor,
    deviation: Tensor,
}

/// Compares on a device that is open.
///
/// # Errors
/// One line: the model cannot be loaded, there are no pictures, or one cannot be read.
pub fn run(options: &Options, device: Device) -> Result<String, String> {
    options.compute.settle_threads();
    let failed = |error: peapod_model::Error| format!("--model: {error}");
    hub::bring([options.model.as_path()], &hub::Log).map_err(|error| format!("--model: {error}"))?;
    let model = ModelSource::open(&options.model, None).map_err(failed)?;
    let downscale = 1_u32 << (model.vae_config().block_out_channels.len() - 1);
    let size = match options.size[..] {
        [width, height] => [width, height],
        _ => [u32::try_from(model.sample_size()).unwrap_or(1) * downscale; 2],
    };
    if size.iter().any(|side| *side == 0 || side % downscale != 0) {
        return Err(format!("--size {} {} must be multiples of {downscale}", size[0], size[1]));
    }
    let pictures = read_pictures(&options.images, options.count as usize, size)?;

    let exact = encode(&model, &pictures, VaeNumbers::F32, Device::Cpu).map_err(failed)?;
    // The CPU's f32 is the measure, and nothing to compare with itself.
    let all = [VaeNumbers::F32, VaeNumbers::Tf32, VaeNumbers::Bf16, VaeNumbers::F16];
    let all = all.into_iter().filter(|numbers| device.is_cuda() || numbers.kind() != Kind::Float);
    let latent_rms = rms(exact.iter().map(|encoded| &encoded.latents)).unwrap_or(f64::NAN);
    let posterior_std = rms(exact.iter().map(|encoded| &encoded.deviation)).unwrap_or(f64::NAN);
    let compare = |dtype, encoded: Vec<Encoded>| compare(dtype, &exact, &encoded, latent_rms, posterior_std);
    let numbers = all.map(|numbers| encode(&model, &pictures, numbers, device).map(|encoded| compare(numbers.name(), encoded)));
    let report = Report {
        model: options.model.display().to_string(),
        num_pictures: pictures.len(),
        size,
        device: device::name(device),
        latent_rms,
        posterior_std,
        numbers: numbers.collect::<peapod_model::Result<_>>().map_err(failed)?,
    };
    if options.json {
        return serde_json::to_string_pretty(&report).map(|text| text + "\n").map_err(|error| error.to_string());
    }
    Ok(report.to_text())
}

/// The first pictures of a folder as uint8 `[1, 3, H, W]`, each cut as training might cut it.
fn read_pictures(folder: &Path, count: usize, [width, height]: [u32; 2]) -> Result<Vec<Tensor>, String> {
    let named = |path: &Path, error: &dyn std::fmt::Display| format!("--images: {}: {error}", path.display());
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>).map_err(|error| named(folder, &error))?;
    let is_picture = |path: &PathBuf| {
        let end = path.extension().unwrap_or_default();
        ["jpg", "jpeg", "png"].iter().any(|known| end.eq_ignore_ascii_case(known))
    };
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).filter(is_picture).collect();
    if paths.is_empty() {
        return Err(named(folder, &"there is no picture in this folder: no file .jpg, .jpeg or .png"));
    }
    paths.sort();
    paths.truncate(count);
    let mut resizer = Resizer::new();
    let read = |(index, path): (usize, &PathBuf)| {
        let bytes = std::fs::read(path).map_err(|error| named(path, &error))?;
        let cut = SampleRng::new(0, SampleName { epoch: Epoch(0), shard: ShardId(0), index: index as u32 });
        let picture = decode(&bytes).and_then(|picture| cover(&mut resizer, &picture, Bucket { width, height }, &cut));
        let pixels = Tensor::from_slice(&picture.map_err(|error| named(path, &error))?.pixels);
        Ok(pixels.view([1, height.into(), width.into(), 3]).permute([0, 3, 1, 2]))
    };
    paths.iter().enumerate().map(read).collect()
}

/// Encodes pictures one by one, as training does: with noise, which is the same whatever the kind.
fn encode(model: &ModelSource, pictures: &[Tensor], numbers: VaeNumbers, device: Device) -> peapod_model::Result<Vec<Encoded>> {
    let _guard = no_grad_guard();
    numbers.settle();
    let vae = model.vae(numbers.kind(), device)?;
    tch::manual_seed(0);
    let encode = |picture: &Tensor| {
        let moments = vae.encode(&(picture.to_device(device).to_kind(Kind::Float) / 127.5 - 1.0))?;
        let noise = Tensor::randn(moments.mean.size(), (Kind::Float, Device::Cpu));
        let scaled = |tensor: Tensor| (tensor * vae.scaling_factor()).to_device(Device::Cpu);
        let latents = scaled(moments.sample(&noise.to_device(device)));
        Ok(Encoded { latents, deviation: scaled((moments.log_variance * 0.5).exp()) })
    };
    pictures.iter().map(encode).collect()
}

fn compare(dtype: &'static str, exact: &[Encoded], encoded: &[Encoded], latent_rms: f64, posterior_std: f64) -> Comparison {
    let errors = exact.iter().zip(encoded).map(|(exact, encoded)| &encoded.latents - &exact.latents);
    let finite: Vec<Tensor> = errors.filter(|error| error.isfinite().all().int64_value(&[]) == 1).collect();
    let error_rms = rms(finite.iter());
    Comparison {
        dtype,
        num_not_finite: exact.len() - finite.len(),
        error_rms,
        largest_error: finite.iter().map(|error| error.abs().max().double_value(&[])).reduce(f64::max),
        relative_error: error_rms.map(|error| error / latent_rms),
        share_of_posterior: error_rms.map(|error| error / posterior_std),
    }
}

/// The root of the mean square over all elements; `None` of nothing.
fn rms<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Option<f64> {
    let (sum, count) =
        tensors.fold((0.0, 0), |(sum, count), tensor| (sum + tensor.square().sum(Kind::Double).double_value(&[]), count + tensor.numel()));
    (count > 0).then(|| (sum / count as f64).sqrt())
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = String::new();
        let Self { model, num_pictures, size: [width, height], device, latent_rms, posterior_std, numbers } = self;
        let _ = writeln!(
            text,
            "autoencoder of {model} on {device}: latents of {num_pictures} picture(s) of {width}x{height} beside those in f32 on the CPU,\n\
             whose root mean square is {latent_rms:.3}, of which {posterior_std:.4} is what the autoencoder itself leaves to chance"
        );
        let _ = writeln!(text, "  {:<6}{:>12}{:>12}{:>12}{:>22}", "", "error (RMS)", "relative", "largest", "beside what is chance");
        for Comparison { dtype, num_not_finite, error_rms, largest_error, relative_error, share_of_posterior } in numbers {
            let columns = [error_rms, relative_error, largest_error, share_of_posterior].map(|value| value.unwrap_or(f64::NAN));
            let [error, relative, largest, share] = columns;
            let _ = write!(text, "  {dtype:<6}{error:>12.5}{:>10.3} %{largest:>12.4}{:>20.1} %", 100.0 * relative, 100.0 * share);
            let _ = match num_not_finite {
                0 => writeln!(text),
                some => writeln!(text, "  not finite in {some} of {num_pictures} picture(s)"),
            };
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::picture::Picture;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn run_on(folder: &Path, arguments: &str) -> Result<String, String> {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model");
        let line = ["vae-error", "--model", demo, "--threads", "1", "--images", folder.to_str().unwrap()];
        run(&Line::try_parse_from(line.into_iter().chain(arguments.split_whitespace())).unwrap().options, Device::Cpu)
    }

    /// Pictures of a disc on a plain ground, as the demo's are.
    fn with_pictures(count: u32) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for index in 0..count {
            let disc = |at: u32| if (at % 80).abs_diff(40).pow(2) + (at / 80).abs_diff(35).pow(2) < 400 { [200, 40, 30] } else { [240; 3] };
            let rgb = (0..80 * 70).flat_map(|at| disc(at + 3 * index)).collect();
            Picture::new(80, 70, rgb).unwrap().write_png(&folder.path().join(format!("{index}.png")), &[]).unwrap();
        }
        folder
    }

    #[test]
    fn fewer_bits_lose_more() {
        let folder = with_pictures(3);
        std::fs::write(folder.path().join("captions.csv"), "no picture").unwrap();
        let report: serde_json::Value = serde_json::from_str(&run_on(folder.path(), "--json").unwrap()).unwrap();
        assert_eq!((&report["num_pictures"], &report["size"], &report["device"]), (&3.into(), &serde_json::json!([64, 64]), &"cpu".into()));
        let (latents, posterior) = (report["latent_rms"].as_f64().unwrap(), report["posterior_std"].as_f64().unwrap());
        assert!(latents > 0.1 && latents < 10.0 && posterior > 0.0 && posterior < latents, "{report}");
        let column = |row: usize, key: &str| report["numbers"][row][key].as_f64().unwrap();
        assert_eq!([&report["numbers"][0]["dtype"], &report["numbers"][1]["dtype"]], ["bf16", "f16"]);
        // bf16 keeps 8 bits of a number, f16 11.
        assert!(column(0, "relative_error") < 0.1 && column(0, "relative_error") > 2.0 * column(1, "relative_error"), "{report}");
        for row in [0, 1] {
            assert!(column(row, "largest_error") >= column(row, "error_rms") && column(row, "num_not_finite") == 0.0, "{report}");
            assert!((column(row, "error_rms") / posterior / column(row, "share_of_posterior") - 1.0).abs() < 1e-9);
        }
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&run_on(folder.path(), "--json").unwrap()).unwrap(),
            report,
            "nothing is chance"
        );
        let text = run_on(folder.path(), "--count 2 --size 96 64").unwrap();
        assert!(text.contains("latents of 2 picture(s) of 96x64") && text.contains("  f16 ") && !text.contains("  tf32 "), "{text}");
    }

    /// An infinite latent spoils no mean: it is counted.
    #[test]
    fn latents_that_overflow_are_counted() {
        let encoded = |values: [f32; 2]| Encoded { latents: Tensor::from_slice(&values), deviation: Tensor::from_slice(&[0.5_f32, 0.5]) };
        let exact = [encoded([1.0, 2.0]), encoded([3.0, 4.0])];
        let compared = compare("f16", &exact, &[encoded([1.0, f32::INFINITY]), encoded([3.0, 4.5])], 2.0, 0.5);
        assert_eq!((compared.num_not_finite, compared.largest_error), (1, Some(0.5)));
        assert!((compared.error_rms.unwrap() - 0.125_f64.sqrt()).abs() < 1e-9, "{compared:?}");
        let none = compare("f16", &exact[..1], &[encoded([f32::NAN, 1.0])], 2.0, 0.5);
        assert_eq!((none.num_not_finite, none.error_rms), (1, None));
    }

    #[test]
    fn what_cannot_be_encoded_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |arguments: &str| run_on(folder.path(), arguments).unwrap_err();
        assert!(refused("").contains("no picture in this folder"));
        assert!(refused("--size 60 64").contains("multiples of 8"));
        std::fs::write(folder.path().join("broken.JPG"), [0xff, 0xd8, 0xff, 0xe0]).unwrap();
        assert!(refused("").contains("broken.JPG: "), "{}", refused(""));
        let error = run_on(&folder.path().join("nowhere"), "").unwrap_err();
        assert!(error.starts_with("--images: ") && error.contains("nowhere"), "{error}");
    }
}
