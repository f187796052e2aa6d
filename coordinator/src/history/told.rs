//! Notices in words.

use peapod_data::sample::most_often;
use peapod_proto::program::counted;

use crate::core::Notice;

/// How much a notice matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Info,
    /// Worth a look.
    Warning,
    /// Something failed.
    Error,
}

impl Level {
    /// Its name on the page.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// A notice as the log and the page tell it.
#[must_use]
pub fn told(notice: &Notice) -> (Level, String) {
    let (info, warning, error) = (|text| (Level::Info, text), |text| (Level::Warning, text), |text| (Level::Error, text));
    match notice {
        Notice::Joined(worker) => info(format!("{worker} joined, training on {}", worker.device)),
        Notice::Ready(worker) => info(format!("{worker} is ready")),
        Notice::Waiting { text, starts_in: Some(starts_in), .. } => info(format!("{text}, for {:.0} s", starts_in.as_secs_f64().ceil())),
        Notice::Waiting { text, left, is_usual, starts_in: None } => {
            let text = format!("{text}; giving up in {:.0} s (--join-timeout)", left.as_secs_f64());
            if *is_usual { info(text) } else { warning(text) }
        }
        Notice::Formed { generation, num_members, base_step, from_checkpoint } => {
            let from = if *from_checkpoint { " (from its checkpoint)" } else { "" };
            let train = if *num_members == 1 { "trains" } else { "train" };
            info(format!("{generation}: {} {train} from step {base_step}{from}", counted(*num_members, "worker")))
        }
        Notice::TakenUp { generation, num_members, step } => {
            let workers = counted(*num_members, "worker");
            info(format!("{generation} goes on: it was trained by {workers} meanwhile, to step {step} at least"))
        }
        Notice::Lost { worker, cause } => {
            error(format!("{worker} lost at step {} in phase {}: {cause}", worker.step, worker.phase.as_str()))
        }
        Notice::SetAside { what, lasts } => {
            warning(format!("{what}: left out for {} minutes, if the others are enough", lasts.as_secs() / 60))
        }
        Notice::Explained { failure } => error(format!("first failure: {}", failure.text)),
        Notice::Left(worker) => info(format!("{worker} left as asked")),
        Notice::Aborted { generation, reason } => warning(format!("{generation} is broken up: {reason}")),
        Notice::Planned { reason } => info(format!("{reason}: the workers meet after this step")),
        Notice::CutOff { step, timeout } => {
            let seconds = timeout.as_secs_f64();
            warning(format!("every worker that holds step {step} is gone or cut off: waiting {seconds:.1} s for one to come back"))
        }
        Notice::RolledBack { from, to } => {
            let again = counted(from.0 - to.0, "step");
            error(format!("no worker that held step {from} is left: going back to step {to}, to train {again} again"))
        }
        Notice::StepSkipped { step, in_a_row } => warning(format!("step {step} is not finite and was skipped ({in_a_row} in a row)")),
        Notice::BadData { shard, key, detail } if key.is_empty() => warning(format!("shard {shard}: {detail}; the rest of it is lost")),
        Notice::BadData { shard, key, detail } => warning(format!("bad sample {key} in {shard}: {detail}")),
        Notice::MostlyFiltered { num_filtered, num_read, rules } => {
            let most = most_often(rules.iter().map(|(rule, &count)| (rule.as_str(), count)));
            warning(format!("{num_filtered} of the {num_read} samples read so far are filtered out by the job's rules, most often {most}"))
        }
        Notice::NoPairs { num_one_sided, num_native } => {
            let rule = most_often([("one_sided", *num_one_sided)]);
            warning(format!(
                "no sample so far has a pair of captions: {rule}; all {num_native} that were trained have a native one. `worker shards inspect` with this job shows the keys that they have"
            ))
        }
        Notice::Skipped(rules) => {
            let of = [(&rules.filtered, "filtered"), (&rules.bad, "broken")].into_iter().filter(|(counts, _)| !counts.is_empty());
            let parts: Vec<String> = of
                .map(|(counts, what)| {
                    let by_rule: Vec<String> = counts.iter().map(|(rule, count)| format!("{rule} {count}")).collect();
                    format!("samples {what}: {} ({})", counts.values().sum::<u64>(), by_rule.join(", "))
                })
                .collect();
            info(parts.join("; "))
        }
        Notice::Checkpoint { step } => info(format!("checkpoint of step {step} stored")),
        Notice::CheckpointFailed { step, error: why, again_in: None } => error(format!("checkpoint of step {step} not stored: {why}")),
        Notice::CheckpointFailed { step, error: why, again_in: Some(pause) } => error(format!(
            "the last checkpoint, of step {step}, is not stored: {why}; trying again in {} s: make room for it, or mend its store",
            pause.as_secs()
        )),
    }
}
