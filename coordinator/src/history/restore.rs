//! The curves of earlier runs, out of their logs.

use std::path::Path;

use peapod_proto::ids::Step;

use super::{History, Point};
use crate::logs;

/// Reads the curves up to `step` back from the logs of earlier runs in `state_dir`.
///
/// # Errors
/// Names the file.
pub fn from_logs(history: &mut History, state_dir: &Path, step: Step) -> anyhow::Result<()> {
    let mut before: Option<(u64, f64)> = None;
    logs::for_lines(&state_dir.join(logs::STEPS), |line: StepLine| {
        let seconds = line.unix_s.zip(before).and_then(|(at, (generation, before))| (generation == line.generation).then_some(at - before));
        before = line.unix_s.map(|at| (line.generation, at));
        if line.step <= step.0 && !line.skipped {
            history.restore(&Point {
                step: line.step,
                task: line.task.unwrap_or(f64::NAN),
                logit: line.logit.unwrap_or(f64::NAN),
                feature: line.feature.unwrap_or(f64::NAN),
                grad_norm: line.grad_norm.unwrap_or(f64::NAN),
                learning_rate: line.learning_rate.unwrap_or(f64::NAN),
                samples: line.samples as f64,
                seconds: seconds.filter(|&seconds| seconds > 0.0),
                data: line.data_s.unwrap_or_default(),
            });
        }
    })?;
    logs::for_validations(state_dir, |losses, total| {
        if losses.step <= step {
            history.restore_validation(losses, total);
        }
    })
}

/// What the curves need of a line of steps.jsonl; losses that are not finite are null there.
#[derive(serde::Deserialize)]
struct StepLine {
    step: u64,
    generation: u64,
    skipped: bool,
    samples: u64,
    /// Absent in the files of older versions.
    unix_s: Option<f64>,
    task: Option<f64>,
    logit: Option<f64>,
    feature: Option<f64>,
    grad_norm: Option<f64>,
    learning_rate: Option<f64>,
    data_s: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_come_back_up_to_where_the_job_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let [steps, validations] = [logs::STEPS, logs::VALIDATIONS].map(|name| folder.path().join(name));
        let line = |step: u64, generation: u64, unix_s: f64, skipped: bool| {
            format!(
                "{{\"step\":{step},\"generation\":{generation},\"unix_s\":{unix_s},\"samples\":8,\"skipped\":{skipped},\"task\":0.5}}\n"
            )
        };
        let text =
            [line(1, 1, 10.0, false), line(2, 1, 10.5, false), line(3, 1, 11.0, true), line(4, 2, 99.0, false), line(5, 2, 99.5, false)];
        std::fs::write(&steps, text.concat() + "{\"step\":6").unwrap();
        let validation = |step: u64, total: f64| {
            format!("{{\"step\":{step},\"samples\":4,\"task\":null,\"logit\":1,\"feature\":1,\"total\":{total}}}\n")
        };
        std::fs::write(&validations, [validation(2, 1.0), validation(4, 2.0), validation(4, 3.0), validation(6, 4.0)].concat()).unwrap();
        let mut history = History::default();
        from_logs(&mut history, folder.path(), Step(4)).unwrap();
        let columns = history.series.columns(0, 0);
        assert_eq!(columns.step, [1, 2, 4]);
        assert_eq!(columns.samples_per_s[1], 16.0);
        assert!(columns.samples_per_s[2].is_nan(), "the time between two generations is no step's");
        let totals: Vec<(u64, f64)> = history.validations.iter().map(|(losses, total)| (losses.step.0, *total)).collect();
        assert_eq!(totals, [(2, 1.0), (4, 3.0)], "the last word about a step counts");
        assert_eq!(history.known_since, None);
    }
}
