//! The logs of a job: what each final step and each validation came to, a line of JSON each, and on demand each trained sample. People and
//! scripts read them, and a coordinator that is started again has its curves from them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use peapod_proto::ids::Step;
use peapod_proto::message::{StepRecord, StepTimings, ValidationLosses};

/// The log of final steps, in a state folder.
pub const STEPS: &str = "steps.jsonl";
/// The log of validations, in a state folder.
pub const VALIDATIONS: &str = "validation.jsonl";

/// The logs of a job that runs. Steps and samples hold each final step once: what is trained again is taken out of them first.
///
/// They explain a run; the run itself does not need them. One that cannot be written ends with an error in the log lines.
#[derive(Debug, Default)]
pub struct Logs {
    /// One line of JSON a final step.
    steps: Option<BufWriter<File>>,
    /// One line a trained sample: step, epoch, shard, index.
    samples: Option<BufWriter<File>>,
    /// One line of JSON a validation.
    validations: Option<BufWriter<File>>,
}

impl Logs {
    /// Opens the logs in `state_dir` for appending, and the one of `samples` if a file is named for it.
    ///
    /// # Errors
    /// Names the file that cannot be opened.
    pub fn open(state_dir: &Path, samples: Option<&Path>, is_validated: bool) -> anyhow::Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).read(true).append(true).open(path);
            file.map(BufWriter::new).with_context(|| format!("cannot write {}", path.display()))
        };
        Ok(Self {
            steps: Some(open(&state_dir.join(STEPS))?),
            samples: samples.map(open).transpose()?,
            validations: is_validated.then(|| open(&state_dir.join(VALIDATIONS))).transpose()?,
        })
    }

    /// Takes out the lines of steps after `last`: of a coordinator that was killed before the journal had them, or that the job goes back
    /// behind.
    ///
    /// # Errors
    /// From the files.
    pub fn go_back_to(&mut self, last: Step) -> io::Result<()> {
        if let Some(steps) = &mut self.steps {
            let step = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok()?.get("step")?.as_u64();
            cut(steps, |line| step(line).is_some_and(|step| step <= last.0))?;
        }
        if let Some(samples) = &mut self.samples {
            cut(samples, |line| line.split('\t').next().and_then(|step| step.parse().ok()).is_some_and(|step: u64| step <= last.0))?;
        }
        Ok(())
    }

    /// A step is final.
    pub fn committed(&mut self, record: &StepRecord, timings: StepTimings) {
        if let Err(error) = self.write_step(record, timings) {
            self.stop(&error);
        }
    }

    fn write_step(&mut self, record: &StepRecord, timings: StepTimings) -> io::Result<()> {
        if let Some(steps) = &mut self.steps {
            let line = serde_json::json!({
                "step": record.step.0, "unix_s": (unix_now() * 1e3).round() / 1e3, "generation": record.generation.0,
                "samples": record.names.len(), "native": record.native, "skipped": record.skipped,
                "task": record.losses.task, "logit": record.losses.logit, "feature": record.losses.feature,
                "grad_norm": record.losses.grad_norm, "learning_rate": record.losses.learning_rate,
                "data_s": timings.data, "compute_s": timings.compute, "collective_s": timings.collective, "update_s": timings.update,
                "validation_s": timings.validation, "sampling_s": timings.sampling,
            });
            writeln!(steps, "{line}")?;
            steps.flush()?;
        }
        if let Some(samples) = self.samples.as_mut().filter(|_| !record.skipped) {
            for name in &record.names {
                writeln!(samples, "{}\t{}\t{}\t{}", record.step, name.epoch, name.shard, name.index)?;
            }
            samples.flush()?;
        }
        Ok(())
    }

    /// The weights of a final step were validated; `weights` says which.
    pub fn validated(&mut self, losses: &ValidationLosses, total: f64, weights: &str) {
        let ValidationLosses { step, samples, task, logit, feature } = losses;
        let line = serde_json::json!({
            "step": step.0, "samples": samples, "weights": weights, "task": task, "logit": logit, "feature": feature, "total": total,
        });
        let Some(file) = &mut self.validations else { return };
        if let Err(error) = writeln!(file, "{line}").and_then(|()| file.flush()) {
            tracing::error!("the validation log stops here: {error}");
            self.validations = None;
        }
    }

    /// Leaves the logs of steps and samples as they are.
    pub fn stop(&mut self, error: &io::Error) {
        tracing::error!("step and sample logs stop here: {error}");
        (self.steps, self.samples) = (None, None);
    }
}

/// Seconds since 1970.
pub fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// What is read at once from the end of a log.
const CUT_BYTES: u64 = 64 << 10;

/// Cuts a file off behind its last line that stays; half a line at the end does not. Read from the end: a log of weeks is long, and what
/// does not stay is short.
fn cut(file: &mut BufWriter<std::fs::File>, stays: impl Fn(&str) -> bool) -> io::Result<()> {
    file.flush()?;
    let file = file.get_mut();
    let mut start = file.seek(io::SeekFrom::End(0))?;
    // The file from `start` on, without what is cut off already.
    let mut kept: Vec<u8> = Vec::new();
    loop {
        let before = |end: usize| kept[..end].iter().rposition(|byte| *byte == b'\n').map(|at| at + 1);
        let begin = match kept.last() {
            Some(b'\n') => before(kept.len() - 1),
            _ => before(kept.len()),
        };
        let Some(begin) = begin.or((start == 0).then_some(0)) else {
            let from = start.saturating_sub(CUT_BYTES);
            let mut block = vec![0; usize::try_from(start - from).unwrap_or_default()];
            file.seek(io::SeekFrom::Start(from))?;
            file.read_exact(&mut block)?;
            block.append(&mut kept);
            (start, kept) = (from, block);
            continue;
        };
        let line = &kept[begin..];
        if line.is_empty() || (line.ends_with(b"\n") && stays(String::from_utf8_lossy(line).trim_end())) {
            break;
        }
        kept.truncate(begin);
    }
    // Opened for appending: whatever is written next goes to the end that is left.
    file.set_len(start + kept.len() as u64)
}

/// What is read of a line of validation.jsonl.
#[derive(serde::Deserialize)]
struct ValidationLine {
    step: u64,
    samples: u32,
    task: Option<f32>,
    logit: Option<f32>,
    feature: Option<f32>,
    total: Option<f64>,
}

/// Hands on each validation in the log of `state_dir`, the earliest first, with its total loss. What was not finite is NaN.
///
/// # Errors
/// Names the file.
pub fn for_validations(state_dir: &Path, mut each: impl FnMut(ValidationLosses, f64)) -> anyhow::Result<()> {
    for_lines(&state_dir.join(VALIDATIONS), |line: ValidationLine| {
        let [task, logit, feature] = [line.task, line.logit, line.feature].map(|loss| loss.unwrap_or(f32::NAN));
        let losses = ValidationLosses { step: Step(line.step), samples: line.samples, task, logit, feature };
        each(losses, line.total.unwrap_or(f64::NAN));
    })
}

/// Hands on the lines of a log that can be read, which half a line at its end cannot; a file that is not there has none.
///
/// # Errors
/// Names the file.
pub fn for_lines<T: serde::de::DeserializeOwned>(path: &Path, mut each: impl FnMut(T)) -> anyhow::Result<()> {
    let mut read = || {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut lines = BufReader::new(file);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            if let Ok(read) = serde_json::from_str(&line) {
                each(read);
            }
            line.clear();
        }
        Ok(())
    };
    read().with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_go_back_with_the_job_and_half_a_line_goes_with_them() {
        let folder = tempfile::tempdir().unwrap();
        let (steps, samples) = (folder.path().join(STEPS), folder.path().join("samples.tsv"));
        std::fs::write(&steps, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n").unwrap();
        std::fs::write(&samples, "1\t0\t0\t0\n2\t0\t0\t1\n2\t0\t0").unwrap();
        let mut logs = Logs::open(folder.path(), Some(&samples), false).unwrap();
        logs.go_back_to(Step(2)).unwrap();
        assert_eq!(std::fs::read_to_string(&samples).unwrap(), "1\t0\t0\t0\n2\t0\t0\t1\n");
        writeln!(logs.steps.as_mut().unwrap(), "{{\"step\":3}}").unwrap();
        drop(logs);
        assert_eq!(std::fs::read_to_string(&steps).unwrap(), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
    }

    #[test]
    fn validations_are_read_as_they_were_written_and_what_is_not_finite_is_null() {
        let folder = tempfile::tempdir().unwrap();
        let mut logs = Logs::open(folder.path(), None, true).unwrap();
        let losses = ValidationLosses { step: Step(8), samples: 5, task: 0.25, logit: 1.0, feature: 3.0 };
        logs.validated(&losses, 2.75, "average");
        logs.validated(&ValidationLosses { step: Step(9), task: f32::NAN, ..losses }, f64::NAN, "average");
        let text = std::fs::read_to_string(folder.path().join(VALIDATIONS)).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let first = serde_json::json!({
            "step": 8, "samples": 5, "weights": "average", "task": 0.25, "logit": 1.0, "feature": 3.0, "total": 2.75,
        });
        assert_eq!(lines[0], first);
        assert!(lines[1]["task"].is_null() && lines[1]["total"].is_null() && lines[1]["logit"] == 1.0);
        let mut read = Vec::new();
        for_validations(folder.path(), |losses, total| read.push((losses, total))).unwrap();
        assert!(read.len() == 2 && read[0] == (losses, 2.75) && read[1].0.task.is_nan() && read[1].1.is_nan(), "{read:?}");
    }

    #[test]
    fn log_is_cut_from_its_end_however_long_it_and_its_lines_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let line = |number: usize| format!("{number} {}\n", "x".repeat(number * 7919 % 200_000));
        for (num, keep) in [(0, 0), (1, 0), (1, 1), (40, 0), (40, 1), (40, 39), (40, 40)] {
            let all: Vec<String> = (0..num).map(line).collect();
            for half in ["", "17 xx"] {
                std::fs::write(&path, all.concat() + half).unwrap();
                let file = std::fs::OpenOptions::new().read(true).append(true).open(&path).unwrap();
                let number = |line: &str| line.split(' ').next().unwrap().parse::<usize>().unwrap();
                cut(&mut BufWriter::new(file), |line| number(line) < keep).unwrap();
                assert!(std::fs::read_to_string(&path).unwrap() == all[..keep].concat(), "{keep} of {num} lines, and {half:?}");
            }
        }
    }
}
