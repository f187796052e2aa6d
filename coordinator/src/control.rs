//! `status`, `stop` and `drain`: talking to a running coordinator.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result};
use peapod_proto::v1;
use tonic::transport::{Channel, Endpoint};

/// How long a running coordinator may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

async fn connect(address: &str) -> Result<v1::control_client::ControlClient<Channel>> {
    let endpoint =
        Endpoint::from_shared(address.to_owned()).with_context(|| format!("{address} is not an address like http://host:7733"))?;
    let channel = endpoint.connect_timeout(TIMEOUT).timeout(TIMEOUT).connect().await;
    let channel =
        channel.map_err(|_| anyhow::anyhow!("no coordinator answers at {address}: is it running, and is --coordinator right?"))?;
    Ok(v1::control_client::ControlClient::new(channel))
}

fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

/// Prints what the job is doing.
///
/// # Errors
/// If no coordinator answers.
pub async fn status(address: &str, json: bool) -> Result<String> {
    let reply = connect(address).await?.status(v1::StatusRequest {}).await.map_err(said)?.into_inner();
    Ok(if json { to_json(&reply) } else { to_table(&reply) })
}

/// Ends the job with a checkpoint.
///
/// # Errors
/// If no coordinator answers.
pub async fn stop(address: &str) -> Result<()> {
    connect(address).await?.stop(v1::StopRequest { reason: "stopped on request".into() }).await.map_err(said)?;
    Ok(())
}

/// Lets a worker leave.
///
/// # Errors
/// If no coordinator answers or no worker has that rank.
pub async fn drain(address: &str, rank: u32) -> Result<()> {
    connect(address).await?.drain(v1::DrainRequest { rank }).await.map_err(said)?;
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
        "samples": { "committed": reply.samples_committed, "filtered": reply.samples_filtered, "bad": reply.samples_bad },
        "checkpoint_step": reply.checkpoint_step, "validation": validation, "first_failure": reply.first_failure,
        "workers": reply.workers.iter().map(worker).collect::<Vec<_>>(),
    });
    format!("{value:#}")
}

fn to_table(reply: &v1::StatusReply) -> String {
    let mut text = String::new();
    let of = if reply.total_steps > 0 { format!(" of {}", reply.total_steps) } else { String::new() };
    let _ = writeln!(text, "{}: {}, step {}{of}", reply.job_name, reply.state, reply.final_step);
    let shards = reply.shards.unwrap_or_default();
    let _ = writeln!(text, "epoch {}: {} of {} shards done, {} being read", shards.epoch, shards.done, shards.total, shards.leased);
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
            "validation at step {step}: total {total:.4}, task {task:.4}, logit {logit:.4}, feature {feature:.3} ({samples} samples)"
        );
    }
    if !reply.first_failure.is_empty() {
        let _ = writeln!(text, "first failure: {}", reply.first_failure);
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
