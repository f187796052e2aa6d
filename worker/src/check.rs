//! `worker check`: what a job names, compared by configurations, names and shapes. No tensor is read, so that it takes as long for seven
//! gigabytes as for seven megabytes.

use std::fmt::Write as _;
use std::path::Path;

use peapod_model::adapter::AdapterConfig;
use peapod_model::source::ModelSource;
use peapod_model::text::StudentEncoder;
use peapod_model::weights::{Survey, locate};
use peapod_proto::job::Job;
use tch::{Device, Kind};

use crate::setup;

/// Checks a job's models and describes them.
///
/// With `partial`, a model or student that is not here is said to be elsewhere, and what is here is checked alone.
///
/// # Errors
/// The first thing that is wrong: what loading would answer, or what would fail in the first step.
pub fn report(path: &Path, partial: bool) -> Result<String, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("cannot read job file {}: {error}", path.display()))?;
    let job = Job::parse(&text).map_err(|error| {
        let lines = error.problems.iter().map(|problem| format!("{}: {problem}", path.display()));
        lines.collect::<Vec<_>>().join("\n")
    })?;
    let mut report = String::new();
    let mut is_here = |field: &str, name: &Path| match locate(name) {
        Ok(_) => Ok(true),
        Err(_) if partial => {
            let _ = writeln!(report, "{field} {} is not visible from this machine: the workers must see it", name.display());
            Ok(false)
        }
        Err(error) => Err(format!("{field}.path: {error}")),
    };
    let (model_here, student_here) = (is_here("model", &job.model.path)?, is_here("student", &job.student.path)?);
    let teacher = if model_here { Some(Teacher::check(&job, &mut report)?) } else { None };
    let student = if student_here { Some(check_student(&job, &mut report)?) } else { None };
    if let (Some(teacher), Some(width)) = (teacher, student) {
        let (hidden, depth) = (job.adapter.hidden.into(), job.adapter.depth as usize);
        let adapter = AdapterConfig::between(width, teacher.text_width, teacher.pooled_width, hidden, depth);
        let AdapterConfig { input, hidden, depth, pooled, output } = adapter;
        let output = output.map_or(String::new(), |output| format!(", to states of {output}"));
        let num_parameters = grouped(adapter.num_parameters() as u64);
        let _ = writeln!(
            report,
            "adapter: {num_parameters} parameters, from states of {input} through {depth} linears of {hidden} to {pooled}{output}"
        );
    }
    Ok(report)
}

/// What the English model asks of an adapter.
struct Teacher {
    text_width: i64,
    /// `None` if its UNet takes no pooled text.
    pooled_width: Option<i64>,
}

impl Teacher {
    fn check(job: &Job, report: &mut String) -> Result<Self, String> {
        let named = |error: peapod_model::Error| format!("model.path: {error}");
        let (kind, device) = (Kind::Float, Device::Cpu);
        let model = ModelSource::open(&job.model.path, job.model.config.as_deref()).map_err(named)?.shapes_only();
        let name = job.model.path.display();
        let _ = writeln!(report, "model {name}: {}", model.architecture());
        for &part in model.architecture().parts() {
            let _ = writeln!(report, "  {:<16}{}", part.name(), describe(&model.survey(part).map_err(named)?));
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
        Ok(Self { text_width: unet.text_width(), pooled_width: unet.pooled_width() })
    }
}

/// Checks the student and returns the width of its states.
fn check_student(job: &Job, report: &mut String) -> Result<i64, String> {
    let options = setup::student_options(job, Kind::Float, Device::Cpu);
    let student = StudentEncoder::check(&job.student.path, job.student.context_length.into(), options)
        .map_err(|error| format!("student.path: {error}"))?;
    let names: Vec<&str> = student.parts().map(|(name, _)| name).collect();
    let _ = writeln!(report, "student {}: {}", job.student.path.display(), names.join(" and "));
    for (name, survey) in student.parts() {
        let _ = writeln!(report, "  {name:<16}{}", describe(survey));
    }
    let _ = writeln!(report, "  prompts of {} tokens: states of {}", student.context_length(), student.width());
    Ok(student.width())
}

/// `2,567,463,684 parameters, 5.1 GB of f16`.
fn describe(survey: &Survey) -> String {
    let kinds: Vec<String> = survey.kinds.iter().map(|&(kind, num_bytes)| format!("{} of {}", size(num_bytes), kind_name(kind))).collect();
    format!("{} parameters, {}", grouped(survey.num_parameters.unsigned_abs()), kinds.join(" and "))
}

fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Half => "f16".into(),
        Kind::BFloat16 => "bf16".into(),
        Kind::Float => "f32".into(),
        Kind::Double => "f64".into(),
        other => format!("{other:?}").to_lowercase(),
    }
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

fn size(num_bytes: u64) -> String {
    match num_bytes {
        0..1_000_000 => format!("{:.1} kB", num_bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", num_bytes as f64 / 1e6),
        _ => format!("{:.2} GB", num_bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn workspace() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    /// Checks the demo's job with parts of its text replaced.
    fn check(changes: &[(&str, &str)], partial: bool) -> Result<String, String> {
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
        report(&path, partial)
    }

    /// The counts are the sums of all shapes in the headers of the files.
    #[test]
    fn the_demo_is_described_with_its_counts() {
        let report = check(&[], false).unwrap();
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
        let refuse = |from, to| check(&[(from, to)], false).unwrap_err();
        let error = refuse("context_length = 24", "context_length = 65");
        assert!(error.starts_with("student.path: ") && error.contains("64 positions, the context length is 65"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"tests/demo/shards\"");
        assert!(error.starts_with("model.path: ") && error.contains("shards/unet/config.json"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"tests/demo/model\"\nconfig = \"tests/demo\"");
        assert!(error.contains("it is for a checkpoint that is one file"), "{error}");
        let error = refuse("path = \"tests/demo/model\"", "path = \"nowhere/model\"");
        assert!(error.contains("hf download nowhere/model"), "{error}");
    }

    #[test]
    fn what_is_elsewhere_is_left_to_the_workers_if_that_is_asked_for() {
        let report = check(&[("path = \"tests/demo/model\"", "path = \"nowhere\"")], true).unwrap();
        assert!(report.contains("model nowhere is not visible from this machine: the workers must see it"), "{report}");
        assert!(report.contains("states of 64") && !report.contains("adapter"), "{report}");
    }

    #[test]
    fn numbers_and_sizes_are_written_for_people() {
        assert_eq!([0, 999, 1000, 2_567_463_684].map(grouped), ["0", "999", "1,000", "2,567,463,684"]);
        assert_eq!([2_000, 9_810_000, 5_134_927_368].map(size), ["2.0 kB", "9.8 MB", "5.13 GB"]);
    }
}
