//! The state of a job as the page reads it.

use peapod_proto::message::ValidationLosses;
use serde_json::{Value, json};

use super::Shown;
use crate::core::{Failure, SourceView, WorkerView};
use crate::driver::Status;
use crate::history::{Counts, History, Seen};

/// Steps whose pictures are listed.
pub const MAX_PICTURE_STEPS: usize = 100;

/// Everything the page shows; of the curves what is new since `from` of `edition`.
pub fn state(shown: &Shown, status: &Status, history: &History, edition: u32, from: u64, pictures: &[String]) -> Value {
    let causes: Vec<Value> = (history.goodput.seconds(history.now).into_iter())
        .map(|(cause, seconds)| json!({ "cause": cause.as_str(), "seconds": round(seconds) }))
        .collect();
    let events: Vec<Value> = (history.events.iter())
        .map(|event| json!({ "unix_s": round(history.unix(event.at)), "level": event.level.as_str(), "text": event.text }))
        .collect();
    let checkpoints: Vec<Value> =
        history.checkpoints.iter().map(|&(step, at)| json!({ "step": step.0, "unix_s": round(history.unix(at)) })).collect();
    let pace = history.series.pace();
    let Counts { joined, lost, left, formed, aborted, rolled_back, skipped_steps, checkpoints_failed, .. } = history.counts;
    json!({
        "job": shown.job, "job_id": shown.job_id, "state": status.state, "step": status.final_step.0, "total_steps": shown.last_step,
        "generation": status.generation.0, "world_size": shown.world_size, "epoch": status.epoch,
        "feature_weight": shown.feature_weight, "heartbeat_timeout_s": shown.heartbeat_timeout.as_secs_f64(),
        "unix_s": round(history.unix(history.now)), "started_unix_s": round(history.started_unix), "known_since_step": history.known_since,
        "ended_unix_s": history.ended.map(|at| round(history.unix(at))), "elapsed_s": round(history.elapsed()), "left_s": history.left(status.final_step, shown.last_step).map(round),
        "samples_per_s": pace.map(|(samples, _)| round(samples)), "step_s": pace.map(|(_, seconds)| round(seconds)),
        "goodput": { "ratio": history.goodput_ratio(), "seconds": causes },
        "workers": workers(status, history), "sources": status.sources.iter().map(source).collect::<Vec<_>>(),
        "samples": {
            "committed": status.totals.committed, "filtered": status.totals.filtered, "bad": status.totals.bad,
            "not_finite": status.totals.not_finite,
        },
        "checkpoint_step": status.checkpoint_step.map(|step| step.0), "checkpoints": checkpoints,
        "first_failure": status.first_failure.as_ref().map(|first| failure(first, history)),
        "counts": {
            "joined": joined, "lost": lost, "left": left, "generations": formed, "aborted": aborted, "rolled_back": rolled_back,
            "skipped_steps": skipped_steps, "checkpoints_failed": checkpoints_failed,
        },
        "events": events, "pictures": pictures, "validation": validation(history), "series": history.series.columns(edition, from),
    })
}

fn failure(failure: &Failure, history: &History) -> Value {
    let at = failure.at.map(|at| round(history.unix(at)));
    json!({ "text": failure.text, "unix_s": at, "healed_step": failure.healed.map(|step| step.0) })
}

fn validation(history: &History) -> Value {
    let column = |value: fn(&ValidationLosses) -> f32| history.validations.iter().map(|(losses, _)| value(losses)).collect::<Vec<_>>();
    json!({
        "step": history.validations.iter().map(|(losses, _)| losses.step.0).collect::<Vec<_>>(),
        "task": column(|losses| losses.task), "logit": column(|losses| losses.logit), "feature": column(|losses| losses.feature),
        "total": history.validations.iter().map(|(_, total)| *total).collect::<Vec<_>>(),
    })
}

/// The living as the core sees them, the dead as they were last seen.
fn workers(status: &Status, history: &History) -> Vec<Value> {
    let living = status.workers.iter().map(|view| (view, history.seen(view)));
    let gone =
        history.workers.values().filter(|seen| seen.gone.is_some() && !status.workers.iter().any(|view| view.rank == seen.view.rank));
    let mut all: Vec<(u32, Value)> = living.map(|(view, seen)| (view.rank.0, worker(view, seen, history))).collect();
    all.extend(gone.map(|seen| (seen.view.rank.0, worker(&seen.view, Some(seen), history))));
    all.sort_by_key(|(rank, _)| *rank);
    all.into_iter().map(|(_, worker)| worker).collect()
}

fn worker(view: &WorkerView, seen: Option<&Seen>, history: &History) -> Value {
    let gone = seen.and_then(|seen| seen.gone.as_ref());
    let phase = match gone {
        Some((_, departure)) => departure.as_str(),
        None => view.phase.as_str(),
    };
    let silence = gone.map_or(view.silence, |(at, _)| view.silence + history.now.saturating_sub(*at));
    let timings = seen.and_then(|seen| seen.timings);
    // What is gone holds nothing.
    let memory = seen.filter(|_| gone.is_none()).map(|seen| seen.memory).unwrap_or_default();
    json!({
        "rank": view.rank.0, "host": view.host, "pid": view.pid, "device": view.device, "phase": phase, "step": view.step.0,
        "member": view.member && gone.is_none(), "last_seen_s": round(silence.as_secs_f64()),
        "restarts": seen.map_or(0, |seen| seen.starts.saturating_sub(1)), "why": gone.map(|(_, departure)| departure.reason()),
        "step_s": timings.map(|timings| round(timings.total())), "data_s": timings.map(|timings| round(timings.data.into())),
        "compute_s": timings.map(|timings| round(timings.compute.into())), "collective_s": timings.map(|timings| round(timings.collective.into())),
        "memory_bytes": memory.resident_bytes, "gpu_memory_used_bytes": memory.gpu.map(|gpu| gpu.used_bytes),
        "gpu_memory_bytes": memory.gpu.map(|gpu| gpu.total_bytes),
    })
}

fn source(source: &SourceView) -> Value {
    let SourceView { name, weight, epoch, num_shards, num_leased, num_done, totals, .. } = source;
    json!({
        "name": name, "weight": weight, "epoch": epoch.0, "shards": num_shards, "leased": num_leased, "done": num_done,
        "committed": totals.committed, "filtered": totals.filtered, "bad": totals.bad, "not_finite": totals.not_finite,
    })
}

/// To thousandths: no page shows more.
fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}
