//! How what a coordinator says of its job is shown.

use std::fmt::Write as _;
use std::time::{Duration, UNIX_EPOCH};

use peapod_proto::program::{counted, rate};
use peapod_proto::v1;

/// The end of the year 9999, in time since 1970: later moments have no date in four digits.
const LAST_DATE: Duration = Duration::from_secs(253_402_300_800);

pub(super) fn source_line(source: &v1::SourceStatus) -> String {
    let (shards, samples) = (source.shards.unwrap_or_default(), source.samples.unwrap_or_default());
    let name = if source.name.is_empty() { String::new() } else { format!("{} (weight {}), ", source.name, source.weight) };
    let pending = shards.total.saturating_sub(shards.done + shards.leased);
    format!(
        "{name}epoch {}: {pending} shards pending, {} leased, {} done; samples so far: {}",
        shards.epoch,
        shards.leased,
        shards.done,
        counts_line(samples)
    ) + &rules_lines(source)
}

/// By which rules samples were skipped; a line each for the filtered and the bad ones.
fn rules_lines(source: &v1::SourceStatus) -> String {
    let mut text = String::new();
    for (what, rules) in [("filtered", &source.filtered_by), ("bad", &source.bad_by)] {
        if !rules.is_empty() {
            let rules: Vec<String> = rules.iter().map(|rule| format!("{} {}", rule.samples, rule.rule)).collect();
            let _ = write!(text, "\n    {what}: {}", rules.join(", "));
        }
    }
    text
}

fn counts_line(samples: v1::SampleCounts) -> String {
    let v1::SampleCounts { committed, filtered, bad, not_finite } = samples;
    let mut text = format!("{committed} trained");
    for (count, why) in [(filtered, "filtered"), (bad, "bad"), (not_finite, "not finite")] {
        if count > 0 {
            let _ = write!(text, ", {count} {why}");
        }
    }
    text
}

fn progress(shard: &v1::ShardStatus) -> &'static str {
    match shard.progress() {
        v1::ShardProgress::Leased => "leased",
        v1::ShardProgress::Done => "done",
        v1::ShardProgress::Pending | v1::ShardProgress::Unspecified => "pending",
    }
}

pub(super) fn shard_line(shard: &v1::ShardStatus) -> String {
    let ranks = match shard.ranks.as_slice() {
        [] => String::new(),
        ranks => format!(" to rank {}", ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ")),
    };
    let of = shard.num_samples.map(|num| format!(" of {num}")).unwrap_or_default();
    let counts = counts_line(shard.samples.unwrap_or_default());
    format!("{:>8}  {:24} {counts}{of}  {}", shard.shard, format!("{}{ranks}", progress(shard)), shard.url)
}

pub(super) fn shard_json(source: &str, epoch: u32, shard: &v1::ShardStatus) -> serde_json::Value {
    let v1::SampleCounts { committed, filtered, bad, not_finite } = shard.samples.unwrap_or_default();
    serde_json::json!({
        "source": source, "epoch": epoch, "shard": shard.shard, "url": shard.url, "state": progress(shard), "ranks": shard.ranks,
        "num_samples": shard.num_samples, "committed": committed,
        "skipped": { "filtered": filtered, "bad": bad, "not_finite": not_finite },
    })
}

/// A status for machines.
pub(super) fn json(reply: &v1::StatusReply) -> serde_json::Value {
    let worker = |worker: &v1::WorkerStatus| {
        let (times, memory) = (worker.times.as_ref(), worker.memory.unwrap_or_default());
        serde_json::json!({
            "rank": worker.rank, "host": worker.host, "pid": worker.pid, "device": worker.device, "phase": worker.phase,
            "step": worker.step, "last_seen_ms": worker.last_seen_ms, "member": worker.member, "restarts": worker.restarts,
            "step_s": times.map(|times| times.step_s), "data_s": times.map(|times| times.data_s),
            "compute_s": times.map(|times| times.compute_s), "collective_s": times.map(|times| times.collective_s),
            "memory_bytes": memory.resident_bytes, "gpu_memory_used_bytes": memory.gpu.map(|gpu| gpu.used_bytes),
            "gpu_memory_bytes": memory.gpu.map(|gpu| gpu.total_bytes),
        })
    };
    let shards = reply.shards.unwrap_or_default();
    let newest = reply.newest.map(|newest| {
        serde_json::json!({
            "step": newest.step, "task": newest.task, "logit": newest.logit, "feature": newest.feature, "total": newest.total,
            "grad_norm": newest.grad_norm, "learning_rate": newest.learning_rate,
        })
    });
    let validation = reply.validation.map(|losses| {
        serde_json::json!({
            "step": losses.step, "samples": losses.samples, "task": losses.task, "logit": losses.logit, "feature": losses.feature,
            "total": losses.total,
        })
    });
    let goodput = reply.goodput.as_ref().map(|goodput| {
        let seconds: serde_json::Map<String, serde_json::Value> =
            goodput.seconds.iter().map(|one| (one.cause.clone(), one.seconds.into())).collect();
        serde_json::json!({ "ratio": goodput.ratio, "seconds": seconds })
    });
    serde_json::json!({
        "job": reply.job_name, "job_id": reply.job_id, "state": reply.state, "generation": reply.generation, "step": reply.final_step,
        "total_steps": reply.total_steps, "epoch": shards.epoch, "world_size": reply.world_size,
        "page": (!reply.page.is_empty()).then_some(&reply.page), "unix_s": reply.unix_s, "started_unix_s": reply.started_unix_s, "ended_unix_s": reply.ended_unix_s,
        "newest": newest, "samples_per_s": reply.samples_per_s, "step_s": reply.step_s, "left_s": reply.left_s, "goodput": goodput,
        "shards": { "total": shards.total, "leased": shards.leased, "done": shards.done },
        "sources": reply.sources.iter().map(source_json).collect::<Vec<_>>(),
        "samples": { "committed": reply.samples_committed, "filtered": reply.samples_filtered, "bad": reply.samples_bad },
        "checkpoint_step": reply.checkpoint_step, "validation": validation, "first_failure": reply.first_failure,
        "first_failure_log": reply.first_failure_log, "first_failure_ago_ms": reply.first_failure_ago_ms,
        "first_failure_healed_step": reply.first_failure_healed_step,
        "workers": reply.workers.iter().map(worker).collect::<Vec<_>>(),
    })
}

fn source_json(source: &v1::SourceStatus) -> serde_json::Value {
    let v1::ShardCounts { epoch, total, leased, done } = source.shards.unwrap_or_default();
    let v1::SampleCounts { committed, filtered, bad, not_finite } = source.samples.unwrap_or_default();
    let by = |rules: &[v1::RuleCount]| {
        rules.iter().map(|rule| (rule.rule.clone(), rule.samples.into())).collect::<serde_json::Map<String, serde_json::Value>>()
    };
    serde_json::json!({
        "name": source.name, "weight": source.weight, "epoch": epoch, "shards": { "total": total, "leased": leased, "done": done },
        "samples": { "committed": committed, "filtered": filtered, "bad": bad, "not_finite": not_finite },
        "filtered_by": by(&source.filtered_by), "bad_by": by(&source.bad_by),
    })
}

/// A status for people.
pub(super) fn table(reply: &v1::StatusReply) -> String {
    let mut text = String::new();
    let of = if reply.total_steps > 0 { format!(" of {}", reply.total_steps) } else { String::new() };
    let _ = writeln!(text, "{}: {}, step {}{of}", reply.job_name, reply.state, reply.final_step);
    if !reply.page.is_empty() {
        let _ = writeln!(text, "page and metrics: {}", reply.page);
    }
    text += &time_line(reply);
    text += &pace_line(reply);
    if let Some(v1::StepStatus { step, task, logit, feature, total, learning_rate, .. }) = &reply.newest {
        let _ = writeln!(
            text,
            "losses at step {step}: total {total:.4}, task {task:.4}, logit {logit:.4}, feature {feature:.3}; learning rate {learning_rate:.2e}"
        );
    }
    if let Some(v1::ValidationStatus { step, samples, task, logit, feature, total }) = &reply.validation {
        let _ = writeln!(
            text,
            "validation at step {step}: total {total:.4}, task {task:.4}, logit {logit:.4}, feature {feature:.3} ({})",
            counted(*samples, "sample")
        );
    }
    let shards = reply.shards.unwrap_or_default();
    let _ = writeln!(text, "epoch {}: {} of {} shards done, {} being read", shards.epoch, shards.done, shards.total, shards.leased);
    if reply.sources.len() > 1 {
        for source in &reply.sources {
            let _ = writeln!(text, "  {}", source_line(source));
        }
    }
    let (committed, filtered, bad) = (reply.samples_committed, reply.samples_filtered, reply.samples_bad);
    let _ = writeln!(text, "samples: {committed} trained, {filtered} filtered, {bad} bad");
    match reply.checkpoint_step {
        Some(step) => writeln!(text, "newest checkpoint: step {step}"),
        None => writeln!(text, "no checkpoint yet"),
    }
    .ok();
    text += &failure_lines(reply);
    text.push('\n');
    text += &workers_table(&reply.workers);
    // Names and reasons are from other machines: on a terminal they are to move nothing.
    text.replace(|symbol: char| symbol.is_control() && symbol != '\n', "\u{fffd}")
}

/// How fast the job is, as far as that is known.
fn pace_line(reply: &v1::StatusReply) -> String {
    let mut parts = Vec::new();
    if let Some((samples, seconds)) = reply.samples_per_s.zip(reply.step_s) {
        parts.push(format!("{} samples/s", rate(samples)));
        parts.push(format!("{} a step", seconds_of(seconds)));
    }
    if let Some(goodput) = &reply.goodput {
        parts.push(format!("goodput {:.1} %", 100.0 * goodput.ratio));
    }
    if parts.is_empty() { String::new() } else { format!("pace: {}\n", parts.join(", ")) }
}

/// Since when the job runs under this coordinator, and until when.
fn time_line(reply: &v1::StatusReply) -> String {
    let v1::StatusReply { started_unix_s: started, unix_s: now, ended_unix_s: ended, left_s: left, .. } = *reply;
    let until = match (ended, left.filter(|left| *left > 0.0)) {
        (Some(ended), _) => format!(", ended {}", moment(ended)),
        (None, Some(left)) => format!(", {} left, until {}", span(left), moment(now + left)),
        (None, None) => String::new(),
    };
    format!("time: {} since {}{until}\n", span(ended.unwrap_or(now) - started), moment(started))
}

/// The first failure. Where the job has got over it, that is said first.
fn failure_lines(reply: &v1::StatusReply) -> String {
    if reply.first_failure.is_empty() {
        return String::new();
    }
    let ago = span(Duration::from_millis(reply.first_failure_ago_ms).as_secs_f64());
    let mut text = match reply.first_failure_healed_step {
        Some(step) => format!("healed at step {step}, a failure {ago} ago: {}\n", reply.first_failure),
        None => format!("first failure, {ago} ago: {}\n", reply.first_failure),
    };
    for line in &reply.first_failure_log {
        let _ = writeln!(text, "  | {line}");
    }
    text
}

fn workers_table(workers: &[v1::WorkerStatus]) -> String {
    let has_gpus = workers.iter().any(|worker| worker.memory.is_some_and(|memory| memory.gpu.is_some()));
    let mut text = format!(
        "{:>4}  {:20} {:>8}  {:8} {:10} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "rank", "host", "pid", "device", "phase", "step", "step time", "data wait", "exchange", "memory"
    );
    if has_gpus {
        let _ = write!(text, " {:>16}", "GPU memory");
    }
    let _ = writeln!(text, " {:>9}", "last seen");
    for worker in workers {
        let time = |of: fn(&v1::WorkerTimes) -> f64| worker.times.as_ref().map_or_else(unknown, |times| seconds_of(of(times)));
        let memory = worker.memory.unwrap_or_default();
        let _ = write!(
            text,
            "{:>4}  {:20} {:>8}  {:8} {:10} {:>8} {:>9} {:>9} {:>9} {:>9}",
            worker.rank,
            worker.host,
            worker.pid,
            worker.device,
            worker.phase,
            worker.step,
            time(|times| times.step_s),
            time(|times| times.data_s),
            time(|times| times.collective_s),
            memory.resident_bytes.map_or_else(unknown, gigabytes),
        );
        if has_gpus {
            let gpu = memory.gpu.map_or_else(unknown, |gpu| format!("{} of {}", gigabytes(gpu.used_bytes), gigabytes(gpu.total_bytes)));
            let _ = write!(text, " {gpu:>16}");
        }
        let _ = writeln!(text, " {:>9}", format!("{:.1} s", f64::from(worker.last_seen_ms) / 1000.0));
    }
    text
}

fn unknown() -> String {
    "-".into()
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.2} GB", bytes as f64 / 1e9)
}

/// Seconds, with as many digits as matter.
fn seconds_of(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.2} s") } else { format!("{seconds:.0} s") }
}

/// A moment, of seconds since 1970, to the second.
pub(super) fn moment(unix_s: f64) -> String {
    let at = Duration::try_from_secs_f64(unix_s).ok().and_then(|since| UNIX_EPOCH.checked_add(since));
    at.filter(|at| *at < UNIX_EPOCH + LAST_DATE).map_or_else(unknown, |at| humantime::format_rfc3339_seconds(at).to_string())
}

/// A time in its two largest units.
fn span(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply() -> v1::StatusReply {
        v1::StatusReply {
            job_name: "job".into(),
            state: "training".into(),
            final_step: 7,
            total_steps: 100,
            page: "http://host:7734/".into(),
            started_unix_s: 1_000_000_000.0,
            unix_s: 1_000_003_700.0,
            samples_per_s: Some(12.34),
            step_s: Some(1.25),
            left_s: Some(120.0),
            goodput: Some(v1::GoodputStatus { ratio: 0.875, seconds: vec![v1::CauseSeconds { cause: "data".into(), seconds: 2.5 }] }),
            newest: Some(v1::StepStatus { step: 7, total: 0.5, learning_rate: 1e-4, ..v1::StepStatus::default() }),
            workers: vec![v1::WorkerStatus {
                device: "cuda:0".into(),
                times: Some(v1::WorkerTimes { step_s: 1.5, ..v1::WorkerTimes::default() }),
                memory: Some(v1::Memory {
                    resident_bytes: Some(2_500_000_000),
                    gpu: Some(v1::GpuMemory { used_bytes: 61_000_000_000, total_bytes: 150_000_000_000 }),
                }),
                ..v1::WorkerStatus::default()
            }],
            ..v1::StatusReply::default()
        }
    }

    #[track_caller]
    fn assert_has(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }

    #[test]
    fn people_see_pace_losses_times_and_memory() {
        assert_has(
            &table(&reply()),
            &[
                "job: training, step 7 of 100\npage and metrics: http://host:7734/\n",
                "time: 1 h 1 min since 2001-09-09T01:46:40Z, 2 min 0 s left, until 2001-09-09T02:50:20Z\n",
                "pace: 12 samples/s, 1.25 s a step, goodput 87.5 %\n",
                "losses at step 7: total 0.5000, ",
                "; learning rate 1.00e-4\n",
                " 1.50 s ",
                "2.50 GB 61.00 GB of 150.00 GB",
            ],
        );
        let ended = v1::StatusReply { ended_unix_s: Some(1_000_000_060.0), ..reply() };
        assert_has(&table(&ended), &["time: 1 min 0 s since 2001-09-09T01:46:40Z, ended 2001-09-09T01:47:40Z\n"]);
    }

    #[test]
    fn what_is_not_known_yet_is_left_out() {
        let text = table(&v1::StatusReply { workers: vec![v1::WorkerStatus::default()], ..v1::StatusReply::default() });
        assert!(!["pace:", "losses", "failure", "GPU", "left", "page"].iter().any(|word| text.contains(word)), "{text}");
        let value = json(&v1::StatusReply::default());
        assert!(["page", "newest", "left_s", "goodput", "ended_unix_s"].iter().all(|key| value[key].is_null()), "{value}");
    }

    #[test]
    fn failure_that_healed_is_told_as_past() {
        let (first_failure, first_failure_log) = ("rank 1 lost".to_owned(), vec!["out of memory".to_owned()]);
        let failed = v1::StatusReply { first_failure, first_failure_log, first_failure_ago_ms: 90_000, ..reply() };
        assert_has(&table(&failed), &["first failure, 1 min 30 s ago: rank 1 lost\n  | out of memory\n"]);
        let healed = v1::StatusReply { first_failure_healed_step: Some(8), ..failed };
        assert_has(&table(&healed), &["healed at step 8, a failure 1 min 30 s ago: rank 1 lost\n"]);
        assert_eq!(json(&healed)["first_failure_healed_step"], 8);
    }

    #[test]
    fn words_of_other_machines_move_no_terminal() {
        let text = table(&v1::StatusReply { state: "\x1b[2Jgone\r".into(), ..v1::StatusReply::default() });
        assert!(text.starts_with(": \u{fffd}[2Jgone\u{fffd}, step 0\n"), "{text}");
    }

    #[test]
    fn spans_have_two_units_and_moments_a_date() {
        let spans = [(0.4, "0 s"), (60.0, "1 min 0 s"), (7260.0, "2 h 1 min"), (90_000.0, "1 d 1 h"), (-1.0, "0 s"), (f64::NAN, "0 s")];
        for (seconds, told) in spans {
            assert_eq!(span(seconds), told);
        }
        assert_eq!(moment(0.0), "1970-01-01T00:00:00Z");
        for no_date in [-1.0, f64::NAN, 1e12, 1e300] {
            assert_eq!(moment(no_date), "-");
        }
    }
}
