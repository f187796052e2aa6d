//! `worker bench`: the time of a training step by its stages, on batches made beforehand. No data is read and nothing is sent: what is
//! measured is what the models cost on this device.

mod published;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use peapod_collective::nccl;
use peapod_kernels::SideStream;
use peapod_model::adapter::Adapter;
use peapod_model::distill::{DistillConfig, Distiller, English, Images, LoadOptions, MicroBatch, Prompts, Stage};
use peapod_model::optim::{AdamW, AdamWConfig};
use peapod_model::source::{ModelSource, Part};
use peapod_model::text::{StudentEncoder, StudentOptions};
use tch::{Device, Kind, Tensor};

pub use self::published::Published;
use self::report::Report;
use crate::device::{self, Choice, KernelArgs};
use crate::hub;
use crate::numbers::{Numbers, VaeNumbers, name};

/// A training step's time.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// English model: a diffusers folder, one file, or a name in the hub's cache
    #[arg(long, default_value = "tests/demo/model")]
    pub model: PathBuf,
    /// Text encoder of the new language
    #[arg(long, default_value = "tests/demo/model/text_encoder_zh")]
    pub student: PathBuf,
    /// In place of both, networks of the published sizes with random weights, made on the device: no file is needed
    #[arg(long, value_enum, value_name = "MODEL", conflicts_with_all = ["model", "student"])]
    pub published: Option<Published>,
    /// Tokens of a prompt of the student [default: 24; of a published model 52 (sdxl) or 77 (sd15)]
    #[arg(long)]
    pub context_length: Option<u32>,
    /// Width of the adapter's hidden layers
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub hidden: u32,
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, env = "PEAPOD_DEVICE", default_value = "auto")]
    pub device: Choice,
    /// What networks compute with
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// Numbers of UNet and text encoders [default: bf16 on GPUs, f32 on the CPU]
    #[arg(long, value_enum)]
    pub dtype: Option<Numbers>,
    /// Numbers of the autoencoder [default: bf16 on GPUs, f32 on the CPU]
    #[arg(long, value_enum)]
    pub vae_dtype: Option<VaeNumbers>,
    /// Samples in a step
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Samples among them with a native caption, which the teacher does not see
    #[arg(long, default_value_t = 0)]
    pub native: u32,
    /// Latents and states of the text are there before the clock starts, as in shards of `worker precompute`
    #[arg(long)]
    pub precomputed: bool,
    /// On a GPU, latents and states of the next step are computed on a second stream, as `worker --encode-ahead` trains
    #[arg(long, conflicts_with = "precomputed")]
    pub encode_ahead: bool,
    /// Width and height of the pictures [default: the model's own; of a published model 640 640 (sdxl) or 512 512 (sd15)]
    #[arg(long, num_args = 2, value_names = ["WIDTH", "HEIGHT"])]
    pub size: Vec<i64>,
    /// Steps that are timed
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// Steps before the clock starts
    #[arg(long, default_value_t = 2)]
    pub warmup: u32,
    /// Threads for tensor work on the CPU
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: u32,
    /// Computes the student's activations again in the backward pass
    #[arg(long)]
    pub gradient_checkpointing: bool,
    /// Multiplies in the UNet's transformers with FP8 numbers
    #[arg(long)]
    pub fp8_linears: bool,
    /// How long the device multiplies matrices to find its peak; 0s: not at all
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    pub peak_time: Duration,
    /// Prints JSON
    #[arg(long)]
    pub json: bool,
}

/// Tokens of a prompt of the demo's student.
const DEMO_CONTEXT_LENGTH: u32 = 24;

/// The places of the stages in a row of times; the update comes last.
const NUM_PARTS: usize = 6;

/// Runs the benchmark on a device that is open.
///
/// # Errors
/// One line: what cannot be loaded or does not fit.
pub fn run(options: &Options, device: Device) -> Result<String, String> {
    tch::set_num_threads(options.threads.cast_signed());
    if options.native > options.batch {
        return Err(format!("--native {} must be at most --batch {}", options.native, options.batch));
    }
    let default = if device.is_cuda() { Numbers::Bf16 } else { Numbers::F32 };
    let (kind, vae_numbers) = (options.dtype.unwrap_or(default).kind(), options.vae_dtype.unwrap_or(default.into()));
    if options.encode_ahead && !device.is_cuda() {
        return Err("--encode-ahead needs a GPU, which has streams".into());
    }
    vae_numbers.settle();
    if options.published.is_none() {
        hub::bring([&options.model, &options.student].map(PathBuf::as_path), &hub::Log).map_err(|error| error.to_string())?;
    }
    let (models, num_parameters) = load(options, device, kind, vae_numbers.kind()).map_err(|error| error.to_string())?;
    let size = match (&options.size[..], options.published) {
        (&[width, height], _) => [width, height],
        (_, Some(published)) => published.size(),
        _ => [models.native_side(); 2],
    };
    let scale = models.vae().downscale();
    if size.iter().any(|side| *side <= 0 || side % scale != 0) {
        return Err(format!("--size {} {} must be multiples of {scale}", size[0], size[1]));
    }
    let measured = measure(options, &models, device, kind, size).map_err(|error| error.to_string())?;
    let native = f64::from(options.native) / f64::from(options.batch);
    let tflop_per_sample = published::operations(num_parameters, size, native, options.precomputed);
    let report = summarise(options, device, kind, vae_numbers, size, tflop_per_sample, &measured);
    if options.json {
        return serde_json::to_string_pretty(&report).map(|text| text + "\n").map_err(|error| error.to_string());
    }
    Ok(report.to_text())
}

/// The models, and the number of parameters of the UNet.
fn load(options: &Options, device: Device, kind: Kind, vae_kind: Kind) -> peapod_model::Result<(Distiller, i64)> {
    // Drawn weights are the same in every run.
    tch::manual_seed(0);
    let model = match options.published {
        Some(published) => ModelSource::random(published.architecture())?,
        None => ModelSource::open(&options.model, None)?,
    };
    let context_length = options.context_length.unwrap_or(options.published.map_or(DEMO_CONTEXT_LENGTH, Published::context_length)).into();
    let Options { gradient_checkpointing, fp8_linears, .. } = *options;
    let distill = DistillConfig { gradient_checkpointing, fp8_linears, ..DistillConfig::default() };
    let load = LoadOptions { distill, context_length, student: StudentOptions::new(kind, device), vae_kind };
    let num_parameters = model.survey(Part::Unet)?.num_parameters;
    let models = match options.published {
        Some(_) => Distiller::with_student(&model, StudentEncoder::random(context_length, load.student)?, load)?,
        None => Distiller::load(&model, &options.student, load)?,
    };
    Ok((models, num_parameters))
}

/// A batch of noise.
fn synthetic(options: &Options, models: &Distiller, [width, height]: [i64; 2], device: Device) -> MicroBatch {
    let count = i64::from(options.batch);
    let (channels, scale) = (models.vae().config().latent_channels, models.vae().downscale());
    let noise = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device));
    let latents = [count, channels, height / scale, width / scale];
    let numbers = 0..options.batch;
    MicroBatch {
        images: Images::Pixels(Tensor::randint(256, [count, 3, height, width], (Kind::Uint8, device))),
        posterior: noise(&latents),
        noise: noise(&latents),
        offset: noise(&[count, channels]),
        // As training has them, on the host, where they are looked at before they are used.
        timesteps: Tensor::randint(models.num_timesteps(), [count], (Kind::Int64, Device::Cpu)),
        // One in ten, as the method drops them: the empty prompt is part of the step.
        drop: Tensor::from_slice(&numbers.clone().map(|index| index % 10 == 0).collect::<Vec<bool>>()),
        native: Tensor::from_slice(&numbers.clone().map(|index| index < options.native).collect::<Vec<bool>>()),
        prompts: Prompts::Captions(numbers.clone().map(|index| format!("{index}个红色的圆形在白色背景上")).collect()),
        english: English::Captions(numbers.clone().map(|index| format!("{index} red circles on a white background")).collect()),
        original_size: vec![(width, height); options.batch as usize],
        crop: vec![(0, 0); options.batch as usize],
        text_dropout: numbers.map(u64::from).collect(),
    }
}

/// What the clock said.
struct Measured {
    /// Seconds of a step.
    step: f64,
    /// One row of seconds for each step whose stages were timed.
    rows: Vec<[f64; NUM_PARTS]>,
    /// Whether the last gradient was finite.
    is_finite: bool,
}

/// What a step needs and changes.
struct Run<'a> {
    models: &'a Distiller,
    batch: MicroBatch,
    adapter: Adapter,
    optimizer: AdamW,
    gradient: Tensor,
    loss_scale: f64,
    device: Device,
    /// Where batches are encoded, if not in their step; and the one of the next step.
    side: Option<SideStream>,
    encoded: Option<MicroBatch>,
}

impl Run<'_> {
    /// A step, whose stages are told as they end. Nothing waits for a GPU.
    fn step(&mut self, observe: &mut dyn FnMut(Stage)) -> peapod_model::Result<()> {
        let _ = self.gradient.zero_();
        let encoded = match (self.side, self.encoded.take()) {
            (Some(side), None) => Some(self.encode_on(side)?),
            (_, encoded) => encoded,
        };
        if let (Some(side), Some(encoded)) = (self.side, &encoded) {
            side.join(&encoded.tensors())?;
        }
        let batch = encoded.as_ref().unwrap_or(&self.batch);
        self.models.accumulate_observed(&self.adapter, batch, &mut self.gradient, self.loss_scale, observe)?;
        if let Some(side) = self.side {
            self.encoded = Some(self.encode_on(side)?);
            observe(Stage::Encode);
        }
        self.optimizer.step(self.adapter.flat(), &self.gradient, 1e-5)
    }

    /// The batch as a step takes it that was encoded before.
    fn encode_on(&self, side: SideStream) -> peapod_model::Result<MicroBatch> {
        let mut batches = self.batch.split(1);
        side.run(|| batches.iter_mut().try_for_each(|batch| self.models.encode_ahead(batch)))??;
        Ok(batches.remove(0))
    }

    /// Seconds of so many steps, one behind the other as in training: a GPU has the next one before it is done with one.
    fn steps(&mut self, num: u32) -> peapod_model::Result<f64> {
        synchronise(self.device);
        let clock = Instant::now();
        for _ in 0..num {
            self.step(&mut |_| {})?;
        }
        synchronise(self.device);
        Ok(clock.elapsed().as_secs_f64())
    }

    /// Seconds of the stages of a step. A GPU is waited for after each, and has nothing to do meanwhile.
    fn stages(&mut self) -> peapod_model::Result<[f64; NUM_PARTS]> {
        let device = self.device;
        synchronise(device);
        let (mut row, mut last) = ([0.0; NUM_PARTS], Instant::now());
        let mut lap = |part: usize| {
            synchronise(device);
            let now = Instant::now();
            row[part] += now.duration_since(last).as_secs_f64();
            last = now;
        };
        self.step(&mut |stage| lap(stage as usize))?;
        lap(NUM_PARTS - 1);
        Ok(row)
    }
}

fn measure(options: &Options, models: &Distiller, device: Device, kind: Kind, size: [i64; 2]) -> peapod_model::Result<Measured> {
    let mut batch = synthetic(options, models, size, device);
    if options.precomputed {
        models.encode_ahead(&mut batch)?;
    }
    let side = match device {
        Device::Cuda(ordinal) if options.encode_ahead => Some(SideStream::open(ordinal)?),
        _ => None,
    };
    let adapter = Adapter::fresh(models.adapter_config(options.hidden.into(), 3), 0, device)?;
    let optimizer = AdamW::new(AdamWConfig::default(), adapter.num_parameters() as i64, device);
    let (gradient, loss_scale) = (adapter.flat().zeros_like(), if kind == Kind::Half { 65_536.0 } else { 1.0 });
    let mut run = Run { models, batch, adapter, optimizer, gradient, loss_scale, device, side, encoded: None };
    run.steps(options.warmup)?;
    // The clock that tells stages apart holds a GPU up: a step is timed without it. On the CPU one pass says both.
    let undisturbed = if device.is_cuda() { Some(run.steps(options.steps)?) } else { None };
    let rows = (0..options.steps).map(|_| run.stages()).collect::<peapod_model::Result<Vec<_>>>()?;
    let seconds = undisturbed.unwrap_or_else(|| rows.iter().flatten().sum());
    let is_finite = run.gradient.isfinite().all().int64_value(&[]) == 1;
    Ok(Measured { step: seconds / f64::from(options.steps), rows, is_finite })
}

/// Waits for everything a GPU was given.
fn synchronise(device: Device) {
    if let Device::Cuda(ordinal) = device {
        tch::Cuda::synchronize(ordinal as i64);
    }
}

fn summarise(
    options: &Options,
    device: Device,
    kind: Kind,
    vae_numbers: VaeNumbers,
    size: [i64; 2],
    tflop_per_sample: Option<f64>,
    Measured { step, rows, is_finite }: &Measured,
) -> Report {
    let mean = |part: usize| rows.iter().map(|row| row[part]).sum::<f64>() / rows.len() as f64 * 1e3;
    let (steps, step_ms) = (rows.iter().map(|row| row.iter().sum::<f64>() * 1e3), step * 1e3);
    let samples_per_second = f64::from(options.batch) / step_ms * 1e3;
    let peak_tflops = (!options.peak_time.is_zero()).then(|| peak(device, kind, options.peak_time));
    let tflops = tflop_per_sample.map(|tflop| tflop * samples_per_second);
    Report {
        model: match options.published {
            Some(published) => format!("{} of random weights", published.architecture()),
            None => options.model.display().to_string(),
        },
        device: device::name(device),
        dtype: name(kind),
        fp8_linears: options.fp8_linears,
        vae_dtype: vae_numbers.name().into(),
        fused: device.is_cuda().then(|| [kind, vae_numbers.kind()].map(|kind| peapod_kernels::of(device, kind).is_some())),
        batch: options.batch,
        native: options.native,
        precomputed: options.precomputed,
        encoded_ahead: options.encode_ahead,
        size,
        threads: options.threads,
        steps: options.steps,
        encode_ms: mean(Stage::Encode as usize),
        teacher_ms: mean(Stage::Teacher as usize),
        text_ms: mean(Stage::Text as usize),
        student_ms: mean(Stage::Student as usize),
        backward_ms: mean(Stage::Backward as usize),
        update_ms: mean(NUM_PARTS - 1),
        step_ms,
        slowest_step_ms: steps.fold(0.0, f64::max),
        samples_per_second,
        tflop_per_sample,
        tflops,
        peak_tflops,
        share_of_peak: tflops.zip(peak_tflops).map(|(tflops, peak)| tflops / peak),
        memory_bytes: memory(device),
        is_finite: *is_finite,
    }
}

/// Operations a second of square products: large ones on a GPU, small ones on the CPU.
fn peak(device: Device, kind: Kind, time: Duration) -> f64 {
    let side: i64 = if device.is_cuda() { 8192 } else { 1024 };
    let [left, right] = [0, 1].map(|_| Tensor::randn([side, side], (Kind::Float, device)).to_kind(kind));
    let _ = left.matmul(&right);
    synchronise(device);
    let (clock, mut num_products) = (Instant::now(), 0);
    while clock.elapsed() < time {
        // A queue of a few keeps a GPU busy and the clock honest.
        for _ in 0..4 {
            let _ = left.matmul(&right);
        }
        num_products += 4;
        synchronise(device);
    }
    2.0 * (side as f64).powi(3) * f64::from(num_products) / clock.elapsed().as_secs_f64() / 1e12
}

fn memory(device: Device) -> Option<u64> {
    if let Device::Cuda(ordinal) = device {
        return nccl::memory(ordinal).ok().map(|(free, total)| total - free);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    peak.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &str) -> Options {
        let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/model");
        let student = format!("{demo}/text_encoder_zh");
        let line = ["bench", "--model", demo, "--student", &student].into_iter().chain(arguments.split_whitespace());
        Line::try_parse_from(line).unwrap().options
    }

    #[test]
    fn the_demo_is_timed_by_its_stages() {
        let options = options("--batch 2 --native 1 --size 64 64 --steps 2 --warmup 0 --peak-time 0s --json");
        let report: serde_json::Value = serde_json::from_str(&run(&options, Device::Cpu).unwrap()).unwrap();
        let number = |key: &str| report[key].as_f64().unwrap();
        let stages = ["encode_ms", "teacher_ms", "text_ms", "student_ms", "backward_ms", "update_ms"].map(number);
        assert!(stages.iter().all(|&time| time > 0.0), "{report}");
        assert!((stages.iter().sum::<f64>() / number("step_ms") - 1.0).abs() < 1e-6, "{report}");
        assert!((number("samples_per_second") * number("step_ms") / 2000.0 - 1.0).abs() < 1e-6, "{report}");
        assert!(number("memory_bytes") > 1e7 && report["tflops"].is_null() && report["is_finite"] == true, "{report}");
    }

    #[test]
    fn what_is_precomputed_is_what_the_step_would_compute() {
        let options = options("--batch 3 --native 1 --size 64 64");
        let (models, _) = load(&options, Device::Cpu, Kind::Float, Kind::Float).unwrap();
        let adapter = Adapter::fresh(models.adapter_config(32, 3), 0, Device::Cpu).unwrap();
        let gradient = |batch: &MicroBatch| {
            let mut gradient = adapter.flat().zeros_like();
            models.accumulate(&adapter, batch, &mut gradient).unwrap();
            gradient
        };
        let mut batch = synthetic(&options, &models, [64; 2], Device::Cpu);
        let computed = gradient(&batch);
        models.encode_ahead(&mut batch).unwrap();
        assert!(matches!(batch.images, Images::Moments(_)) && matches!(batch.english, English::States(_)));
        assert!(matches!(batch.prompts, Prompts::States { .. }));
        let difference = (gradient(&batch) - &computed).norm().double_value(&[]) / computed.norm().double_value(&[]);
        assert!(difference < 1e-5, "{difference}");
    }

    #[test]
    fn published_models_come_without_files() {
        let parse = |line: &str| Line::try_parse_from(["bench"].into_iter().chain(line.split_whitespace()));
        assert_eq!(parse("--published sd15").unwrap().options.published, Some(Published::Sd15));
        assert!(parse("--published sdxl --model models/sdxl").err().unwrap().to_string().contains("cannot be used with"));
    }

    #[test]
    fn arguments_that_do_not_fit_are_refused() {
        let refused = |arguments| run(&options(arguments), Device::Cpu).unwrap_err();
        assert!(refused("--batch 2 --native 3").contains("--native 3"));
        assert!(refused("--size 65 64").contains("multiples of"));
        assert!(refused("--encode-ahead").contains("needs a GPU"));
    }
}
