//! `worker check`: what a job names, compared by configurations, names and shapes. No tensor is read, so that it takes as long for seven
//! gigabytes as for seven megabytes. What it needs of the device's memory is compared with what is free, and the devices' links are timed.

mod memory;

use std::fmt::Write as _;
use std::path::Path;

use peapod_model::adapter::AdapterConfig;
use peapod_model::hub::{HubName, locate};
use peapod_model::source::{ModelSource, Part};
use peapod_model::text::StudentEncoder;
use peapod_model::weights::Survey;
use peapod_proto::job::{Job, JobArgs};
use tch::{Device, Kind};

use self::memory::Need;
use crate::device::{Choice, KernelArgs, Kernels};
use crate::shards::size;
use crate::{bandwidth, numbers, setup};

/// What to look at.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Which job
    #[command(flatten)]
    pub job: JobArgs,
    /// Device they would be loaded on: auto, cpu, cuda or cuda:N
    #[arg(long, env = "PEAPOD_DEVICE", default_value = "auto")]
    pub device: Choice,
    /// What networks would compute with
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// Leave models that are not on this machine to the workers that see them
    #[arg(long)]
    pub partial: bool,
    /// Time all-reduces of the adapter's gradient: among all GPUs of this host over NCCL, on the CPU among threads over TCP
    #[arg(long, conflicts_with = "partial")]
    pub bandwidth: bool,
    /// Threads that stand for workers in --bandwidth on the CPU
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    pub members: u32,
}

/// Checks a job's models on a device that is open, and describes them.
///
/// With `partial`, a model or student that is not here is said to be elsewhere, and what is here is checked alone.
///
/// # Errors
/// The first thing that is wrong: what loading would answer, or what would fail in the first step.
pub fn report(options: &Options, device: Device) -> Result<String, String> {
    let Options { job, partial, .. } = options;
    let job = job.read()?.job;
    let mut report = String::new();
    let mut is_here = |field: &str, name: &Path| match locate(name) {
        Ok(_) => Ok(true),
        Err(_) if *partial => {
            let or = if HubName::of(name).is_some() { ", or fetch it from the model hub by that name" } else { "" };
            let _ = writeln!(report, "{field} {} is not visible from this machine: the workers must see it{or}", name.display());
            Ok(false)
        }
        Err(error) => Err(format!("{field}.path: {error}")),
    };
    let (model_here, student_here) = (is_here("model", &job.model.path)?, is_here("student", &job.student.path)?);
    let teacher = if model_here { Some(Teacher::check(&job, &mut report)?) } else { None };
    let student = if student_here { Some(check_student(&job, &mut report)?) } else { None };
    if let (Some(teacher), Some(Student { width, num_parameters: num_student })) = (teacher, student) {
        let (hidden, depth) = (job.adapter.hidden.into(), job.adapter.depth as usize);
        let adapter = AdapterConfig::between(width, teacher.text_width, teacher.pooled_width, hidden, depth);
        let AdapterConfig { input, hidden, depth, pooled, output } = adapter;
        let output = output.map_or(String::new(), |output| format!(", to states of {output}"));
        let num_parameters = adapter.num_parameters();
        let _ = writeln!(
            report,
            "adapter: {} parameters, from states of {input} through {depth} linears of {hidden} to {pooled}{output}",
            grouped(num_parameters as u64)
        );
        // A machine that need not see the models need not hold them either.
        if !partial {
            let need = Need::of(&job, device, teacher.num_networks + num_student, teacher.num_vae, num_parameters);
            report.push_str(&need.report(device));
            report.push_str(&operators(&job, device, options.kernels.kernels)?);
        }
        if options.bandwidth {
            report.push_str(&time_links(device, options.members, num_parameters)?);
        }
    }
    Ok(report)
}

/// Sums gradients among this host's devices.
fn time_links(device: Device, num_threads: u32, num_parameters: usize) -> Result<String, String> {
    let members = bandwidth::members(device, num_threads)?;
    let measured = bandwidth::measure(&members, num_parameters).map_err(|error| format!("--bandwidth: {error}"))?;
    let who = if device.is_cuda() { "GPUs over NCCL" } else { "threads over TCP" };
    let [algorithm, bus] = [measured.algorithm(), measured.bus()].map(|bytes| bytes / 1e9);
    Ok(format!(
        "all-reduce of {} among {} {who}: {:.3} ms, {algorithm:.2} GB/s (bus {bus:.2} GB/s)\n",
        size(measured.num_bytes),
        measured.num_members,
        measured.time.as_secs_f64() * 1e3
    ))
}

/// Says for a GPU whose operators the job's networks would compute with; compiles and proves the fused ones.
///
/// # Errors
/// The job wants FP8, and this GPU has none.
fn operators(job: &Job, device: Device, wanted: Kernels) -> Result<String, String> {
    if !device.is_cuda() {
        return Ok(String::new());
    }
    let kind = setup::network_kind(job, device);
    let mut kinds = vec![kind, setup::vae_numbers(job, device).kind()];
    kinds.dedup();
    let line = |kind: Kind| {
        let whose = match peapod_kernels::of(device, kind) {
            Some(_) => "fused, compiled for this GPU and proved on it",
            None if wanted == Kernels::Plain => "libtorch's, as --kernels plain asks for",
            None => "libtorch's: the log says why",
        };
        format!("operators in {}: {whose}\n", numbers::name(kind))
    };
    let mut text: String = kinds.into_iter().map(line).collect();
    if job.train.fp8_linears {
        let kernels = peapod_kernels::of(device, kind);
        peapod_kernels::prove_fp8(device, kind, kernels.as_ref()).map_err(|error| format!("train.fp8_linears: {error}"))?;
        text.push_str("linear layers in FP8: proved on this GPU\n");
    }
    Ok(text)
}

/// What the English model asks of an adapter.
struct Teacher {
    text_width: i64,
    /// `None` if its UNet takes no pooled text.
    pooled_width: Option<i64>,
    /// Parameters of the networks that a job loads in its own numbers.
    num_networks: u64,
    /// Parameters of the autoencoder.
    num_vae: u64,
}

/// What the student gives an adapter.
struct Student {
    width: i64,
    num_parameters: u64,
}

impl Teacher {
    fn check(job: &Job, report: &mut String) -> Result<Self, String> {
        let named = |error: peapod_model::Error| format!("model.path: {error}");
        let (kind, device) = (Kind::Float, Device::Cpu);
        let model = ModelSource::open(&job.model.path, job.model.config.as_deref()).map_err(named)?.shapes_only();
        let name = job.model.path.display();
        let _ = writeln!(report, "model {name}: {}", model.architecture());
        let (mut num_networks, mut num_vae) = (0, 0);
        for &part in model.architecture().parts() {
            let survey = model.survey(part).map_err(named)?;
            let _ = writeln!(report, "  {:<16}{}", part.name(), describe(&survey));
            let num_parameters = survey.num_parameters.unsigned_abs();
            match part {
                Part::Vae => num_vae += num_parameters,
                Part::Unet => num_networks += num_parameters,
                Part::TextEncoder | Part::TextEncoder2 => num_networks += if job.loss.distill { num_parameters } else { 0 },
            }
        }
        let (unet, vae) = (model.unet(kind, device).map_err(named)?, model.vae(kind, device).map_err(named)?);
        let (inputs, outputs, latents) = (unet.config().in_channels, unet.config().out_channels, vae.config().latent_channels);
        if inputs != latents || outputs != latents {
            return Err(format!(
                "model.path: {name} cannot be distilled: a UNet from {inputs} to {outputs} channels on latents of {latents}"
            ));
        }
        let downscale = vae.downscale();
        for &[width, height] in &job.data.buckets {
            if [width, height].iter().any(|&side| i64::from(side) % downscale != 0) {
                return Err(format!("data.buckets: [{width}, {height}] must be multiples of {downscale}, which the model's VAE asks for"));
            }
        }

        let english = model.english(kind, device).map_err(named)?;
        let (tokens, width, pooled) = (english.context_length(), english.width(), english.pooled_width());
        let said = |width: Option<i64>| width.map_or("none".to_owned(), |width| width.to_string());
        for (what, got, wanted) in [("states", Some(width), Some(unet.text_width())), ("pooled text", pooled, unet.pooled_width())] {
            if got != wanted {
                let (got, wanted) = (said(got), said(wanted));
                return Err(format!("model.path: the text encoders of {name} give {what} of width {got}, its UNet takes {wanted}"));
            }
        }
        let pooled = pooled.map_or(String::new(), |pooled| format!(", pooled text of {pooled}"));
        let _ = writeln!(report, "  English prompts of {tokens} tokens: states of {width}{pooled}");
        Ok(Self { text_width: unet.text_width(), pooled_width: unet.pooled_width(), num_networks, num_vae })
    }
}

/// Checks the student.
fn check_student(job: &Job, report: &mut String) -> Result<Student, String> {
    let options = setup::student_options(job, Kind::Float, Device::Cpu);
    let student = StudentEncoder::check(&job.student.path, job.student.context_length.into(), options)
        .map_err(|error| format!("student.path: {error}"))?;
    let names: Vec<&str> = student.parts().map(|(name, _)| name).collect();
    let _ = writeln!(report, "student {}: {}", job.student.path.display(), names.join(" and "));
    for (name, survey) in student.parts() {
        let _ = writeln!(report, "  {name:<16}{}", describe(survey));
    }
    let _ = writeln!(report, "  prompts of {} tokens: states of {}", student.context_length(), student.width());
    let num_parameters = student.parts().map(|(_, survey)| survey.num_parameters.unsigned_abs()).sum();
    Ok(Student { width: student.width(), num_parameters })
}

/// `2,567,463,684 parameters, 5.1 GB of f16`.
fn describe(survey: &Survey) -> String {
    let kinds: Vec<String> =
        survey.kinds.iter().map(|&(kind, num_bytes)| format!("{} of {}", size(num_bytes), numbers::name(kind))).collect();
    format!("{} parameters, {}", grouped(survey.num_parameters.unsigned_abs()), kinds.join(" and "))
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let comma = |(index, digit): (usize, char)| {
        let first_of_three = index > 0 && (digits.len() - index).is_multiple_of(3);
        first_of_three.then_some(',').into_iter().chain([digit])
    };
    digits.chars().enumerate().flat_map(comma).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn workspace() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    /// Checks the demo's job with parts of its text replaced.
    fn check(changes: &[(&str, &str)], options: &str) -> Result<String, String> {
        tch::set_num_threads(1);
        let mut text = std::fs::read_to_string(workspace().join("tests/demo/job.toml")).unwrap();
        for (from, to) in changes {
            assert!(text.contains(from), "{from}");
            text = text.replace(from, to);
        }
        // The job's paths are relative to the workspace, tests run in the crate's folder.
        let text = text.replace("\"tests/demo", &format!("\"{}/tests/demo", workspace().display()));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, text).unwrap();
        let arguments = ["check", "--job", path.to_str().unwrap()].into_iter().chain(options.split_whitespace());
        report(&Line::try_parse_from(arguments).unwrap().options, Device::Cpu)
    }

    /// The counts are the sums of all shapes in the headers of the files.
    #[test]
    fn the_demo_is_described_with_its_counts() {
        let report = check(&[], "").unwrap();
        for words in [
            "demo/model: SDXL\n",
            "  unet            5,205,636 parameters, 10.4 MB of f16\n",
            "  vae             858,583 parameters",
            "  text_encoder    42,976 parameters",
            "  text_encoder_2  75,840 parameters",
            "  English prompts of 24 tokens: states of 80, pooled text of 48\n",
            "text_encoder_zh: BERT\n",
            "  BERT            156,416 parameters",
            "  prompts of 24 tokens: states of 64\n",
            "adapter: 98,256 parameters, from states of 64 through 3 linears of 256 to 48, to states of 80\n",
        ] {
            assert!(report.contains(words), "{words}: {report}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named_by_its_field() {
        let refuse = |from, to| check(&[(from, to)], "").unwrap_err();
        let error = refuse("context_length = 24", "context_length = 65");
        assert!(error.starts_with("student.path: ") && error.contains("64 positions, the context length is 65"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"tests/demo/shards\"");
        assert!(error.starts_with("model.path: ") && error.contains("shards/unet/config.json"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"tests/demo/model\"\nconfig = \"tests/demo\"");
        assert!(error.contains("it is for a checkpoint that is one file"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"nowhere/model\"");
        assert!(error.contains("worker fetch nowhere/model"), "{error}");
    }

    #[test]
    fn what_is_elsewhere_is_left_to_the_workers_if_that_is_asked_for() {
        let report = check(&[("path = \"tests/demo/model\"", "path = \"nowhere\"")], "--partial").unwrap();
        assert!(report.contains("model nowhere is not visible from this machine: the workers must see it"), "{report}");
        assert!(report.contains("states of 64") && !report.contains("adapter"), "{report}");
    }

    #[test]
    fn memory_is_told_with_the_device_and_left_out_where_the_models_need_not_be() {
        let report = check(&[], "").unwrap();
        assert!(report.contains("memory of a worker on cpu (") && report.contains(" GB free: fits\n"), "{report}");
        assert!(!check(&[], "--partial").unwrap().contains("memory of a worker"));
    }

    /// The demo's adapter has 98,256 parameters.
    #[test]
    fn links_are_timed_on_request() {
        let report = check(&[], "--bandwidth --members 3").unwrap();
        assert!(report.contains("all-reduce of 393.0 kB among 3 threads over TCP: ") && report.contains(" GB/s (bus "), "{report}");
        assert!(Line::try_parse_from(["check", "--bandwidth", "--members", "1"]).is_err());
    }

    #[test]
    fn numbers_and_sizes_are_written_for_people() {
        assert_eq!([0, 999, 1000, 2_567_463_684].map(grouped), ["0", "999", "1,000", "2,567,463,684"]);
        assert_eq!([2_000, 9_810_000, 5_134_927_368].map(size), ["2.0 kB", "9.8 MB", "5.13 GB"]);
    }
}
