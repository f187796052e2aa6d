//! `status`, `stop` and `drain`: talking to a running coordinator.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use peapod_proto::program::counted;
use peapod_proto::secure::{Access, AccessError, Link, failure, refusal};
use peapod_proto::v1;

use crate::announce::address_in;
use crate::config::Target;
use crate::secrets::join_string_in;

/// Between two looks of [`watch`].
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// How long a running coordinator may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Where a coordinator listens that is told nothing else.
const DEFAULT_ADDRESS: &str = "http://127.0.0.1:7733";
/// Where it keeps its state then.
const DEFAULT_STATE_DIR: &str = "peapod-state";

type Client = v1::control_client::ControlClient<Link>;

/// The coordinator that is meant.
struct Meant {
    access: Access,
    /// The run that it must be of.
    job_id: Option<String>,
}

/// Finds out which coordinator is meant and how to be let in: by the arguments, or by what it left in its state folder.
fn meant(target: &Target) -> Result<Meant> {
    let Target { coordinator, state_dir, access } = target;
    let (coordinator, mut access) = (coordinator.as_deref(), access.clone());
    let folder = state_dir.as_deref().unwrap_or(Path::new(DEFAULT_STATE_DIR));
    // Who names a folder means the coordinator that runs from it, and no other.
    let is_told = coordinator.is_some() || access.join.is_some();
    let left = if is_told { None } else { address_in(folder) };
    if !is_told && left.is_none() && state_dir.is_some() {
        anyhow::bail!("no coordinator runs from {}: there is no address in it", folder.display());
    }
    let knows_certificate = access.join.is_some() || access.tls_ca.is_some();
    if !knows_certificate && coordinator.is_none_or(|address| address.starts_with("https://")) {
        let join = join_string_in(folder).map_err(anyhow::Error::msg)?;
        access.join = join.map(Into::into);
    }
    // The join string says where, too.
    let url = left.as_ref().map_or(DEFAULT_ADDRESS, |left| &left.url);
    let url = access.join.is_none().then_some(url);
    let job_id = left.as_ref().and_then(|left| left.job_id.clone());
    Ok(Meant { access: Access::new(coordinator.or(url), &access).map_err(anyhow::Error::msg)?, job_id })
}

async fn connect(target: &Target) -> Result<Client> {
    let Meant { access, job_id } = meant(target)?;
    let endpoint = access.endpoint().map_err(anyhow::Error::msg)?.connect_timeout(TIMEOUT).timeout(TIMEOUT);
    let mut client = match access.connect(&endpoint).await {
        Ok(link) => v1::control_client::ControlClient::new(link),
        Err(AccessError::Refused(why)) => anyhow::bail!("{why}"),
        Err(AccessError::Failed(_)) => {
            anyhow::bail!("no coordinator answers at {}: is it running, and is --coordinator or --state-dir right?", access.url())
        }
    };
    if let Some(job_id) = job_id {
        let other = client.status(v1::StatusRequest {}).await.map_err(said)?.into_inner();
        if other.job_id != job_id {
            let url = access.url();
            anyhow::bail!("another job answers at {url} ({}): the coordinator that left this address there is gone", other.job_name);
        }
    }
    Ok(client)
}

fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", refusal(&status).unwrap_or_else(|| failure(&status)))
}

/// Prints what the job is doing.
///
/// # Errors
/// If no coordinator answers.
pub async fn status(target: &Target, json: bool) -> Result<String> {
    let reply = connect(target).await?.status(v1::StatusRequest {}).await.map_err(said)?.into_inner();
    Ok(if json { to_json(&reply) } else { to_table(&reply) })
}

/// Prints what the job is doing every second, over what was printed before on a terminal, until the coordinator is gone.
///
/// # Errors
/// If no coordinator answers, or `out` takes no more.
pub async fn watch(target: &Target, json: bool, out: &mut impl Write) -> Result<()> {
    let clear = if io::stdout().is_terminal() { "\x1b[H\x1b[J" } else { "" };
    loop {
        let text = status(target, json).await?;
        writeln!(out, "{clear}{text}")?;
        out.flush()?;
        tokio::time::sleep(WATCH_EVERY).await;
    }
}

/// Writes how far each shard is, of one source or of all: a line a shard, or with `json` an object a line.
///
/// # Errors
/// If no coordinator answers, no source has that name, or `out` takes no more.
pub async fn shards(target: &Target, source: Option<&str>, json: bool, out: &mut impl Write) -> Result<()> {
    let mut client = connect(target).await?;
    let sources = client.status(v1::StatusRequest {}).await.map_err(said)?.into_inner().sources;
    if let Some(name) = source
        && !sources.iter().any(|source| source.name == name)
    {
        let names: Vec<&str> = sources.iter().map(|source| source.name.as_str()).filter(|name| !name.is_empty()).collect();
        let has = if names.is_empty() { "names none of its sources".to_owned() } else { format!("has: {}", names.join(", ")) };
        anyhow::bail!("no source is named {name:?}; the job {has}");
    }
    for (index, of) in (0..).zip(&sources).filter(|(_, of)| source.is_none_or(|name| of.name == name)) {
        let mut skip = Some(0);
        // The epoch may end between two pages: the list is of the one it began with.
        let mut epoch = None;
        while let Some(from) = skip {
            let request = v1::ShardsRequest { source: index, epoch, skip: from, limit: u32::MAX };
            let page = client.shards(request).await.map_err(said)?.into_inner();
            if from == 0 && !json {
                writeln!(out, "{}", source_line(of))?;
            }
            for shard in &page.shards {
                let line = if json { shard_json(&of.name, page.epoch, shard).to_string() } else { shard_line(shard) };
                writeln!(out, "{line}")?;
            }
            (skip, epoch) = (page.next, Some(page.epoch));
        }
    }
    Ok(())
}

fn source_line(source: &v1::SourceStatus) -> String {
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

fn shard_line(shard: &v1::ShardStatus) -> String {
    let ranks = match shard.ranks.as_slice() {
        [] => String::new(),
        ranks => format!(" to rank {}", ranks.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ")),
    };
    let of = shard.num_samples.map(|num| format!(" of {num}")).unwrap_or_default();
    let counts = counts_line(shard.samples.unwrap_or_default());
    format!("{:>8}  {:24} {counts}{of}  {}", shard.shard, format!("{}{ranks}", progress(shard)), shard.url)
}

fn shard_json(source: &str, epoch: u32, shard: &v1::ShardStatus) -> serde_json::Value {
    let v1::SampleCounts { committed, filtered, bad, not_finite } = shard.samples.unwrap_or_default();
    serde_json::json!({
        "source": source, "epoch": epoch, "shard": shard.shard, "url": shard.url, "state": progress(shard), "ranks": shard.ranks,
        "num_samples": shard.num_samples, "committed": committed,
        "skipped": { "filtered": filtered, "bad": bad, "not_finite": not_finite },
    })
}

/// Ends the job with a checkpoint.
///
/// # Errors
/// If no coordinator answers.
pub async fn stop(target: &Target) -> Result<()> {
    connect(target).await?.stop(v1::StopRequest { reason: "stopped on request".into() }).await.map_err(said)?;
    Ok(())
}

/// Lets a worker leave.
///
/// # Errors
/// If no coordinator answers or no worker has that rank.
pub async fn drain(target: &Target, rank: u32) -> Result<()> {
    connect(target).await?.drain(v1::DrainRequest { rank }).await.map_err(said)?;
    Ok(())
}

fn to_json(reply: &v1::StatusReply) -> String {
    let worker = |worker: &v1::WorkerStatus| {
        serde_json::json!({
            "rank": worker.rank, "host": worker.host, "pid": worker.pid, "device": worker.device, "phase": worker.phase,
            "step": worker.step, "last_seen_ms": worker.last_seen_ms, "member": worker.member,
        })
    };
    let shards = reply.shards.unwrap_or_default();
    let validation = reply.validation.map(|losses| {
        serde_json::json!({
            "step": losses.step, "samples": losses.samples, "task": losses.task, "logit": losses.logit, "feature": losses.feature,
            "total": losses.total,
        })
    });
    let value = serde_json::json!({
        "job": reply.job_name, "job_id": reply.job_id, "state": reply.state, "generation": reply.generation, "step": reply.final_step,
        "total_steps": reply.total_steps, "epoch": shards.epoch,
        "shards": { "total": shards.total, "leased": shards.leased, "done": shards.done },
        "sources": reply.sources.iter().map(source_json).collect::<Vec<_>>(),
        "samples": { "committed": reply.samples_committed, "filtered": reply.samples_filtered, "bad": reply.samples_bad },
        "checkpoint_step": reply.checkpoint_step, "validation": validation, "first_failure": reply.first_failure,
        "first_failure_log": reply.first_failure_log, "first_failure_ago_ms": reply.first_failure_ago_ms,
        "workers": reply.workers.iter().map(worker).collect::<Vec<_>>(),
    });
    format!("{value:#}")
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

fn to_table(reply: &v1::StatusReply) -> String {
    let mut text = String::new();
    let of = if reply.total_steps > 0 { format!(" of {}", reply.total_steps) } else { String::new() };
    let _ = writeln!(text, "{}: {}, step {}{of}", reply.job_name, reply.state, reply.final_step);
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
    if let Some(v1::ValidationStatus { step, samples, task, logit, feature, total }) = &reply.validation {
        let _ = writeln!(
            text,
            "validation at step {step}: total {total:.4}, task {task:.4}, logit {logit:.4}, feature {feature:.3} ({})",
            counted(*samples, "sample")
        );
    }
    if !reply.first_failure.is_empty() {
        let ago = humantime::format_duration(std::time::Duration::from_secs(reply.first_failure_ago_ms / 1000));
        let _ = writeln!(text, "first failure, {ago} ago: {}", reply.first_failure);
        for line in &reply.first_failure_log {
            let _ = writeln!(text, "  | {line}");
        }
    }
    let _ = writeln!(text, "\n{:>4}  {:20} {:>8}  {:8} {:10} {:>8} {:>9}", "rank", "host", "pid", "device", "phase", "step", "last seen");
    for worker in &reply.workers {
        let seen = format!("{:.1} s", f64::from(worker.last_seen_ms) / 1000.0);
        let _ = writeln!(
            text,
            "{:>4}  {:20} {:>8}  {:8} {:10} {:>8} {seen:>9}",
            worker.rank, worker.host, worker.pid, worker.device, worker.phase, worker.step
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use peapod_proto::secure::AccessArgs;

    use super::*;
    use crate::announce::leave_address;

    #[test]
    fn who_names_a_state_folder_means_the_coordinator_that_runs_from_it_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let target = |coordinator: Option<&str>, state_dir: bool| Target {
            coordinator: coordinator.map(str::to_owned),
            state_dir: state_dir.then(|| folder.path().to_owned()),
            access: AccessArgs::default(),
        };
        let error = meant(&target(None, true)).err().unwrap().to_string();
        assert!(error.starts_with("no coordinator runs from ") && error.ends_with(": there is no address in it"), "{error}");
        let url = |target| meant(&target).map(|meant| (meant.access.url().to_owned(), meant.job_id)).unwrap();
        assert_eq!(url(target(Some("http://host:1"), true)), ("http://host:1".into(), None));
        let _address = leave_address(folder.path(), "http", "127.0.0.1:9".parse().unwrap(), "7").unwrap();
        assert_eq!(url(target(None, true)), ("http://127.0.0.1:9".into(), Some("7".into())));
        assert_eq!(url(target(Some("http://host:1"), true)), ("http://host:1".into(), None), "told otherwise");
    }
}
