//! `worker loss-error`: what fewer bits in the frozen networks cost a job's losses and its gradient, on samples of its own. Random weights
//! or samples would prove nothing, nor does an adapter that knows nothing yet: `--adapter` gives one that does.

use std::fmt::Write as _;
use std::path::PathBuf;

use peapod_data::{LeasedShard, Loader};
use peapod_model::adapter::Adapter;
use peapod_model::distill::{Distiller, LossSums, MicroBatch};
use peapod_proto::ids::{Bitmap, Epoch, LeaseId, ShardId};
use peapod_proto::job::{Dtype, Job, JobArgs, VaeDtype};
use serde::Serialize;
use tch::{Device, Tensor};

use crate::device::{self, ComputeArgs};
use crate::draw::adapter_file;
use crate::hub;
use crate::loss_scale::LossScale;
use crate::numbers::VaeNumbers;
use crate::setup;
use crate::trainer::guarded;
use crate::trainer::tensors::to_tensors;

/// What fewer bits cost a job.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Which job
    #[command(flatten)]
    pub job: JobArgs,
    /// Adapter whose gradient is looked at, of the job's shape: a file or a folder, as `sample` takes them [default: the one that the job
    /// begins with]
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Micro-batches, of the first samples of the job's shards
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    pub batches: u32,
    /// Samples of a micro-batch [default: the job's]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub micro_batch: Option<u32>,
    /// Where to compute
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// Prints JSON
    #[arg(long)]
    pub json: bool,
}

/// What was compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Report {
    job: String,
    device: String,
    num_samples: usize,
    num_batches: usize,
    vae_dtype: &'static str,
    /// Of a sample, in f32.
    losses: Losses,
    /// How far the gradients of two micro-batches are apart, over the root of two, beside the size of one: what the choice of samples
    /// leaves to chance. Medians, here and below: single samples near a steep place of a network have gradients a hundred times as large.
    spread: f64,
    numbers: Vec<Comparison>,
}

/// Means over samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Losses {
    task: f64,
    logit: f64,
    feature: f64,
}

/// Losses and gradients beside those in f32 on the same device, of the same samples with the same noise.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Comparison {
    dtype: &'static str,
    fp8_linears: bool,
    /// Why there is nothing to compare.
    problem: Option<String>,
    /// `loss / loss in f32 - 1`, of each loss; none where that is zero.
    task: Option<f64>,
    logit: Option<f64>,
    feature: Option<f64>,
    /// Size of the error of a micro-batch's gradient beside that of the gradient.
    gradient_error: Option<f64>,
    /// Cosine of the angle between both gradients.
    cosine: Option<f64>,
    /// Size of the error beside the distance of two micro-batches' gradients, over the root of two.
    share_of_spread: Option<f64>,
}

/// Numbers that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbers {
    dtype: Dtype,
    name: &'static str,
    fp8_linears: bool,
}

const EXACT: Numbers = Numbers { dtype: Dtype::F32, name: "f32", fp8_linears: false };

/// What a kind of number makes of all batches.
struct Outcome {
    losses: LossSums,
    /// Of each micro-batch, f32 `[P]` on the CPU, of the mean over its samples.
    gradients: Vec<Tensor>,
}

/// Compares on a device that is open.
///
/// # Errors
/// One line: the job, a model, a shard or the adapter cannot be read, or does not fit.
pub fn run(options: &Options, device: Device) -> Result<String, String> {
    options.compute.settle_threads();
    let mut job = options.job.read()?.job;
    if let Some(samples) = options.micro_batch {
        job.train.micro_batch = samples;
    }

    hub::bring(setup::model_paths(&job), &hub::Log).map_err(|error| error.to_string())?;

    // 1. Samples, as the job's own models ask for them: cached ones are bound to its numbers.
    let models = setup::load_models(&job, device).map_err(|error| error.to_string())?;
    let config = setup::adapter_config(&job, &models);
    let adapter = match &options.adapter {
        None => Adapter::fresh(config, job.seed, device).map_err(|error| error.to_string())?,
        Some(path) => {
            let file = adapter_file(path).map_err(|error| format!("--adapter: {error}"))?;
            let adapter = Adapter::load(&file, device).map_err(|error| format!("--adapter: {error}"))?;
            if *adapter.config() != config {
                return Err(format!("--adapter {}: it is {:?}, the job's is {config:?}", file.display(), adapter.config()));
            }
            adapter
        }
    };
    let batches = read(&job, &models, options.batches as usize)?;
    drop(models);

    // 2. The measure, and what is compared with it. TF32 is a switch for the whole process: networks in f32 would have it too.
    if setup::vae_numbers(&job, device) == VaeNumbers::Tf32 {
        job.model.vae_dtype = VaeDtype::F32;
    }
    let compute = |numbers| attempt(|| compute(&job, numbers, device, &adapter, &batches));
    let exact = compute(EXACT)?;
    let kinds = [(Dtype::F32, "f32"), (Dtype::Bf16, "bf16"), (Dtype::F16, "f16")];
    let all = kinds.into_iter().flat_map(|(dtype, name)| [false, true].map(|fp8_linears| Numbers { dtype, name, fp8_linears }));
    // Processors have no f16 worth the wait.
    let all = all.filter(|numbers| *numbers != EXACT && (device.is_cuda() || numbers.dtype != Dtype::F16));
    let sizes = median(exact.gradients.iter().map(norm).collect());
    let Some(spread) = median(distances(&exact.gradients)).zip(sizes).map(|(distance, size)| distance / size) else {
        return Err("the gradient in f32 is not finite: there is nothing to compare with".into());
    };
    let num_samples = exact.losses.count;
    let mean = |sum: f64| sum / num_samples as f64;
    let report = Report {
        job: options.job.job.display().to_string(),
        device: device::name(device),
        num_samples,
        num_batches: batches.len(),
        vae_dtype: setup::vae_numbers(&job, device).name(),
        losses: Losses { task: mean(exact.losses.task), logit: mean(exact.losses.logit), feature: mean(exact.losses.feature) },
        spread,
        numbers: all.map(|numbers| compare(numbers, compute(numbers), &exact)).collect(),
    };
    if options.json {
        return serde_json::to_string_pretty(&report).map(|text| text + "\n").map_err(|error| error.to_string());
    }
    Ok(report.to_text())
}

/// The first micro-batches of the job's shards, as training would get them. More than asked for where some of a batch's samples are cached.
fn read(job: &Job, models: &Distiller, num_batches: usize) -> Result<Vec<MicroBatch>, String> {
    let config = setup::loader_config(job, models).map_err(|error| error.to_string())?;
    let (micro_batch, shards) = (config.micro_batch, setup::shards(job)?.0);
    let mut loader = Loader::start(config, |_| {}).map_err(|error| error.to_string())?;
    let lease = |(place, url)| LeasedShard {
        lease: LeaseId(place as u64 + 1),
        epoch: Epoch(0),
        shard: ShardId(place as u32),
        url,
        done: Bitmap::default(),
        end: None,
    };
    // All of them: the loader reads no further than it has room.
    loader.handle().grant(shards.into_iter().enumerate().map(lease).collect(), true);
    let mut batches = Vec::new();
    while batches.len() < num_batches {
        let share = loader.next_share(micro_batch).map_err(|error| error.to_string())?;
        if share.batches.is_empty() {
            break;
        }
        for batch in &share.batches {
            batches.extend(to_tensors(batch, models.vae().downscale()).map_err(|error| error.to_string())?);
        }
    }
    if batches.len() < 2 {
        return Err(format!("data.shards hold {} micro-batch(es) of {micro_batch}: at least two are compared", batches.len()));
    }
    Ok(batches)
}

/// What comes of a computation, or one line that says why nothing did: memory that is short is a panic of libtorch's.
fn attempt<T>(body: impl FnOnce() -> peapod_model::Result<T>) -> Result<T, String> {
    match guarded(body) {
        Ok(made) => made.map_err(|error| error.to_string()),
        Err(panic) => Err(panic.lines().next().unwrap_or_default().to_owned()),
    }
}

fn compute(job: &Job, numbers: Numbers, device: Device, adapter: &Adapter, batches: &[MicroBatch]) -> peapod_model::Result<Outcome> {
    let mut job = job.clone();
    (job.train.dtype, job.train.fp8_linears) = (numbers.dtype, numbers.fp8_linears);
    let models = setup::load_models(&job, device)?;
    let mut scale = if numbers.dtype == Dtype::F16 { LossScale::default().factor() } else { 1.0 };
    let mut outcome = Outcome { losses: LossSums::default(), gradients: Vec::new() };
    for batch in batches {
        let (losses, gradient) = differentiate(&models, adapter, batch, &mut scale)?;
        outcome.losses += losses;
        outcome.gradients.push((gradient / batch.len() as f64).to_device(Device::Cpu));
    }
    Ok(outcome)
}

/// The losses of a batch and their gradient. Where that overflows, training would skip steps until the scale is small enough: the batch is
/// computed again with half of it, as long as there is a half.
fn differentiate(models: &Distiller, adapter: &Adapter, batch: &MicroBatch, scale: &mut f64) -> peapod_model::Result<(LossSums, Tensor)> {
    loop {
        let mut gradient = adapter.flat().zeros_like();
        let losses = models.accumulate_scaled(adapter, batch, &mut gradient, *scale)?;
        if *scale <= 1.0 || gradient.isfinite().all().int64_value(&[]) == 1 {
            return Ok((losses, gradient));
        }
        *scale /= 2.0;
    }
}

/// Distances of neighbours' gradients over the root of two, which is as far as each is from their common mean.
fn distances(gradients: &[Tensor]) -> Vec<f64> {
    gradients.iter().zip(gradients.iter().skip(1)).map(|(one, next)| norm(&(one - next)) / 2.0_f64.sqrt()).collect()
}

/// The middle one; of an even number the upper of the two. `None` of nothing and of what is not all finite.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.iter().all(|value| value.is_finite()).then(|| values.get(values.len() / 2).copied())?
}

fn compare(numbers: Numbers, outcome: Result<Outcome, String>, exact: &Outcome) -> Comparison {
    let Numbers { name: dtype, fp8_linears, .. } = numbers;
    let nothing = Comparison {
        dtype,
        fp8_linears,
        problem: None,
        task: None,
        logit: None,
        feature: None,
        gradient_error: None,
        cosine: None,
        share_of_spread: None,
    };
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(problem) => return Comparison { problem: Some(problem), ..nothing },
    };
    let relative = |loss: f64, exact: f64| (exact != 0.0).then(|| loss / exact - 1.0);
    let pairs = || outcome.gradients.iter().zip(&exact.gradients);
    let errors: Vec<f64> = pairs().map(|(gradient, exact)| norm(&(gradient - exact))).collect();
    let relative_errors = errors.iter().zip(&exact.gradients).map(|(error, exact)| error / norm(exact)).collect();
    let cosines = pairs().map(|(gradient, exact)| gradient.dot(exact).double_value(&[]) / norm(gradient) / norm(exact)).collect();
    let Some(gradient_error) = median(relative_errors) else {
        return Comparison { problem: Some("the gradient is not finite".into()), ..nothing };
    };
    let share_of_spread = median(errors).zip(median(distances(&exact.gradients))).map(|(error, distance)| error / distance);
    Comparison {
        task: relative(outcome.losses.task, exact.losses.task),
        logit: relative(outcome.losses.logit, exact.losses.logit),
        feature: relative(outcome.losses.feature, exact.losses.feature),
        gradient_error: Some(gradient_error),
        cosine: median(cosines),
        share_of_spread,
        ..nothing
    }
}

fn norm(tensor: &Tensor) -> f64 {
    tensor.norm().double_value(&[])
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = String::new();
        let Self { job, device, num_samples, num_batches, vae_dtype, losses, spread, numbers } = self;
        let _ = writeln!(
            text,
            "{job} on {device}: {num_samples} samples in {num_batches} micro-batches, autoencoder in {vae_dtype}; networks beside those in f32,\n\
             whose losses are task {:.4}, logit {:.4}, feature {:.4}, and whose gradients differ from one micro-batch to the next by {:.1} %",
            losses.task,
            losses.logit,
            losses.feature,
            100.0 * spread
        );
        let _ = writeln!(
            text,
            "  {:<12}{:>10}{:>10}{:>10}{:>12}{:>10}{:>20}",
            "", "task", "logit", "feature", "gradient", "cosine", "beside chance"
        );
        for row in numbers {
            let name = if row.fp8_linears { format!("{} + FP8", row.dtype) } else { row.dtype.to_owned() };
            if let Some(problem) = &row.problem {
                let _ = writeln!(text, "  {name:<12}  {problem}");
                continue;
            }
            let percent = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{:.digits$} %", 100.0 * value));
            let [task, logit, feature] = [row.task, row.logit, row.feature].map(|value| percent(value, 2));
            let (gradient, share) = (percent(row.gradient_error, 2), percent(row.share_of_spread, 1));
            let cosine = row.cosine.map_or("-".into(), |cosine| format!("{cosine:.4}"));
            let _ = writeln!(text, "  {name:<12}{task:>10}{logit:>10}{feature:>10}{gradient:>12}{cosine:>10}{share:>20}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// The demo's job, with its paths made whole.
    fn job(folder: &Path, changes: &[(&str, &str)]) -> PathBuf {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
        let text = std::fs::read_to_string(format!("{root}/tests/demo/job.toml")).unwrap();
        let text = changes.iter().fold(text, |text, (from, to)| {
            assert!(text.contains(from), "{from}");
            text.replace(from, to)
        });
        let path = folder.join("job.toml");
        std::fs::write(&path, text.replace("\"tests/demo/", &format!("\"{root}/tests/demo/"))).unwrap();
        path
    }

    fn run_on(job: &Path, arguments: &str) -> Result<String, String> {
        let line = ["loss-error", "--threads", "1", "--job", job.to_str().unwrap()];
        run(&Line::try_parse_from(line.into_iter().chain(arguments.split_whitespace())).unwrap().options, Device::Cpu)
    }

    #[test]
    fn memory_that_is_short_is_one_line() {
        let refused = attempt(|| -> peapod_model::Result<()> { panic!("CUDA out of memory\nwhere it happened") });
        assert_eq!(refused, Err("CUDA out of memory".to_owned()));
        assert_eq!(attempt(|| Ok(3)), Ok(3));
    }

    #[test]
    fn fewer_bits_cost_more_and_samples_differ_more_than_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path(), &[]);
        let arguments = "--batches 4 --micro-batch 8";
        let report: serde_json::Value = serde_json::from_str(&run_on(&job, &format!("{arguments} --json")).unwrap()).unwrap();
        assert_eq!((&report["num_samples"], &report["num_batches"], &report["vae_dtype"]), (&32.into(), &4.into(), &"f32".into()));
        let names: Vec<_> =
            report["numbers"].as_array().unwrap().iter().map(|row| (row["dtype"].clone(), row["fp8_linears"].clone())).collect();
        assert_eq!(names, [("f32".into(), true.into()), ("bf16".into(), false.into()), ("bf16".into(), true.into())]);
        let column = |row: usize, key: &str| report["numbers"][row][key].as_f64().unwrap();
        for row in 0..3 {
            assert!(column(row, "gradient_error") > 1e-4 && column(row, "gradient_error") < 1.0, "{report}");
            assert!(column(row, "share_of_spread") < 1.0 && column(row, "task").abs() < 0.1, "{report}");
            assert!(column(row, "cosine") > 0.9 && column(row, "cosine") < 1.0, "{report}");
        }
        // Three bits behind the point for the transformers' eight, and both for the last row.
        assert!(column(0, "gradient_error") > column(1, "gradient_error"), "{report}");
        assert!(column(2, "gradient_error") > column(1, "gradient_error"), "{report}");
        let adapter = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/adapter.safetensors");
        let text = run_on(&job, &format!("--batches 2 --micro-batch 2 --adapter {adapter}")).unwrap();
        assert!(text.contains("4 samples in 2 micro-batches") && text.contains("  bf16 + FP8 "), "{text}");
    }

    #[test]
    fn what_cannot_be_compared_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = job(folder.path(), &[("{00000..00005}", "00000"), ("[[64, 64], [96, 64], [64, 96]]", "[[64, 64]]")]);
        let short = run_on(&path, "--batches 2 --micro-batch 4096").unwrap_err();
        assert!(short.contains("micro-batch(es) of 4096: at least two are compared"), "{short}");
        let missing = run_on(&path, "--adapter nowhere.safetensors").unwrap_err();
        assert!(missing.starts_with("--adapter: ") && missing.contains("nowhere.safetensors"), "{missing}");
        let path = job(folder.path(), &[("hidden = ", "hidden = 1")]);
        let adapter = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/adapter.safetensors");
        let other = run_on(&path, &format!("--adapter {adapter}")).unwrap_err();
        assert!(other.contains("the job's is AdapterConfig"), "{other}");
        // Of a checkpoint the moving average is meant, as by `sample`.
        std::fs::write(folder.path().join("adapter.safetensors"), b"not looked at").unwrap();
        std::fs::copy(adapter, folder.path().join("adapter_ema.safetensors")).unwrap();
        let other = run_on(&path, &format!("--adapter {}", folder.path().display())).unwrap_err();
        assert!(other.contains("adapter_ema.safetensors: it is AdapterConfig"), "{other}");
        assert!(run_on(Path::new("nowhere.toml"), "").unwrap_err().starts_with("cannot read job file nowhere.toml"));
    }

    #[test]
    fn gradients_that_are_not_finite_are_told() {
        let outcome = |values: &[[f32; 2]]| Outcome {
            losses: LossSums { count: 2, task: 0.0, logit: 2.0, feature: 4.0 },
            gradients: values.iter().map(|values| Tensor::from_slice(values)).collect(),
        };
        let exact = outcome(&[[3.0, 4.0], [5.0, 4.0]]);
        assert!((distances(&exact.gradients)[0] - 2.0_f64.sqrt()).abs() < 1e-9 && distances(&exact.gradients).len() == 1);
        let row = compare(EXACT, Ok(outcome(&[[3.0, 4.0], [5.0, 3.5]])), &exact);
        assert_eq!((row.task, row.logit), (None, Some(0.0)));
        assert!((row.gradient_error.unwrap() - 0.5 / 41.0_f64.sqrt()).abs() < 1e-6, "{row:?}");
        assert!((row.share_of_spread.unwrap() - 0.5 / 2.0_f64.sqrt()).abs() < 1e-6, "{row:?}");
        // Of two, the upper: that of the gradients that are alike.
        assert!((row.cosine.unwrap() - 1.0).abs() < 1e-6, "{row:?}");
        let row = compare(EXACT, Ok(outcome(&[[3.0, f32::NAN], [5.0, 4.0]])), &exact);
        assert_eq!(row.problem.as_deref(), Some("the gradient is not finite"));
    }
}
