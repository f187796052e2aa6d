//! Between wire and typed messages: the one place where what comes from a wire is checked.

use std::fmt;

use crate::ids::{Bitmap, Epoch, Generation, Incarnation, LeaseId, MemberIndex, Rank, SampleName, ShardId, Step, WorkerId};
use crate::message::{
    Assignment, Continuing, FromWorker, GpuMemory, Heartbeat, Hello, Lease, Memory, Phase, ShardReport, SkipReason, SkippedSample, Stall,
    StepLosses, StepRecord, StepReport, StepTimings, StopCause, StopReason, Stopped, ToWorker, ValidationLosses,
};
use crate::v1;

/// A message that does not say what its kind must say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireError {
    /// The field, from the message down.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed message: {}: {}", self.field, self.problem)
    }
}

impl std::error::Error for WireError {}

fn missing(field: &'static str) -> WireError {
    WireError { field, problem: "missing".into() }
}

fn unknown(field: &'static str, value: i32) -> WireError {
    WireError { field, problem: format!("unknown value {value}") }
}

/// Ranks and member indices are small; a larger number is garbage and must not size anything.
const MAX_MEMBERS: u32 = 1 << 20;

fn member_count(field: &'static str, value: u32) -> Result<u32, WireError> {
    if (1..=MAX_MEMBERS).contains(&value) {
        Ok(value)
    } else {
        Err(WireError { field, problem: format!("{value} is not within 1..={MAX_MEMBERS}") })
    }
}

fn sample_name(field: &'static str, name: v1::SampleName) -> Result<SampleName, WireError> {
    if [name.epoch, name.shard, name.index].iter().any(|&part| part >= SampleName::LIMIT) {
        let problem = format!("{}/{}/{} has a part of 2^24 or more", name.epoch, name.shard, name.index);
        return Err(WireError { field, problem });
    }
    Ok(SampleName { epoch: Epoch(name.epoch), shard: ShardId(name.shard), index: name.index })
}

impl From<SampleName> for v1::SampleName {
    fn from(name: SampleName) -> Self {
        Self { epoch: name.epoch.0, shard: name.shard.0, index: name.index }
    }
}

impl From<Phase> for v1::Phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Loading => Self::Loading,
            Phase::Waiting => Self::Waiting,
            Phase::Connecting => Self::Connecting,
            Phase::Data => Self::Data,
            Phase::Compute => Self::Compute,
            Phase::Collective => Self::Collective,
            Phase::Update => Self::Update,
            Phase::Snapshot => Self::Snapshot,
            Phase::Validating => Self::Validating,
            Phase::Sampling => Self::Sampling,
            Phase::Warming => Self::Warming,
            Phase::Fetching => Self::Fetching,
        }
    }
}

fn phase(value: i32) -> Result<Phase, WireError> {
    Ok(match v1::Phase::try_from(value) {
        Ok(v1::Phase::Loading) => Phase::Loading,
        Ok(v1::Phase::Waiting) => Phase::Waiting,
        Ok(v1::Phase::Connecting) => Phase::Connecting,
        Ok(v1::Phase::Data) => Phase::Data,
        Ok(v1::Phase::Compute) => Phase::Compute,
        Ok(v1::Phase::Collective) => Phase::Collective,
        Ok(v1::Phase::Update) => Phase::Update,
        Ok(v1::Phase::Snapshot) => Phase::Snapshot,
        Ok(v1::Phase::Validating) => Phase::Validating,
        Ok(v1::Phase::Sampling) => Phase::Sampling,
        Ok(v1::Phase::Warming) => Phase::Warming,
        Ok(v1::Phase::Fetching) => Phase::Fetching,
        Ok(v1::Phase::Unspecified) | Err(_) => return Err(unknown("heartbeat.phase", value)),
    })
}

impl From<StepRecord> for v1::StepRecord {
    fn from(record: StepRecord) -> Self {
        let StepLosses { task, logit, feature, grad_norm, learning_rate } = record.losses;
        Self {
            step: record.step.0,
            generation: record.generation.0,
            names: record.names.into_iter().map(Into::into).collect(),
            native: record.native,
            skipped: record.skipped,
            losses: Some(v1::StepLosses { task, logit, feature, grad_norm, learning_rate }),
            validation: record.validation.map(Into::into),
        }
    }
}

impl TryFrom<v1::StepRecord> for StepRecord {
    type Error = WireError;

    fn try_from(wire: v1::StepRecord) -> Result<Self, WireError> {
        let losses = wire.losses.ok_or(missing("step_record.losses"))?;
        Ok(Self {
            step: Step(wire.step),
            generation: Generation(wire.generation),
            names: wire.names.into_iter().map(|name| sample_name("step_record.names", name)).collect::<Result<_, _>>()?,
            native: wire.native,
            skipped: wire.skipped,
            losses: StepLosses {
                task: losses.task,
                logit: losses.logit,
                feature: losses.feature,
                grad_norm: losses.grad_norm,
                learning_rate: losses.learning_rate,
            },
            validation: wire.validation.map(TryInto::try_into).transpose()?,
        })
    }
}

impl From<ValidationLosses> for v1::Validation {
    fn from(losses: ValidationLosses) -> Self {
        let ValidationLosses { step, samples, task, logit, feature } = losses;
        Self { step: step.0, samples, task, logit, feature }
    }
}

impl TryFrom<v1::Validation> for ValidationLosses {
    type Error = WireError;

    fn try_from(wire: v1::Validation) -> Result<Self, WireError> {
        let v1::Validation { step, samples, task, logit, feature } = wire;
        if samples == 0 {
            return Err(WireError { field: "validation.samples", problem: "is a mean over none".into() });
        }
        Ok(Self { step: Step(step), samples, task, logit, feature })
    }
}

impl From<Memory> for v1::Memory {
    fn from(memory: Memory) -> Self {
        let gpu = |GpuMemory { used_bytes, total_bytes }| v1::GpuMemory { used_bytes, total_bytes };
        Self { resident_bytes: memory.resident_bytes, gpu: memory.gpu.map(gpu) }
    }
}

impl TryFrom<v1::Memory> for Memory {
    type Error = WireError;

    fn try_from(wire: v1::Memory) -> Result<Self, WireError> {
        let gpu = |v1::GpuMemory { used_bytes, total_bytes }| {
            if used_bytes > total_bytes {
                let problem = format!("{used_bytes} is more than the {total_bytes} there are");
                return Err(WireError { field: "heartbeat.memory.gpu.used_bytes", problem });
            }
            Ok(GpuMemory { used_bytes, total_bytes })
        };
        Ok(Self { resident_bytes: wire.resident_bytes, gpu: wire.gpu.map(gpu).transpose()? })
    }
}

impl From<FromWorker> for v1::FromWorker {
    fn from(message: FromWorker) -> Self {
        use v1::from_worker::Message;
        let message = match message {
            FromWorker::Hello(hello) => Message::Hello(v1::Hello {
                protocol_version: hello.protocol_version,
                program_version: hello.program_version,
                incarnation: hello.incarnation.0,
                attempt: hello.attempt,
                requested_rank: hello.requested_rank.map(|rank| rank.0),
                host: hello.host,
                pid: hello.pid,
                device: hello.device,
            }),
            FromWorker::Ready { model_digest, num_parameters } => Message::Ready(v1::Ready { model_digest, num_parameters }),
            FromWorker::Heartbeat(beat) => Message::Heartbeat(v1::Heartbeat {
                step: beat.step.0,
                phase: v1::Phase::from(beat.phase).into(),
                generation: beat.generation.0,
                reads: beat.reads,
                memory: (beat.memory != Memory::default()).then(|| beat.memory.into()),
            }),
            FromWorker::Bootstrap { generation, bytes } => Message::Bootstrap(v1::Bootstrap { generation: generation.0, bytes }),
            FromWorker::StepReport(report) => Message::StepReport(v1::StepReport {
                generation: report.generation.0,
                step: report.step.0,
                record: report.record.map(Into::into),
                timings: Some(v1::StepTimings {
                    data: report.timings.data,
                    compute: report.timings.compute,
                    collective: report.timings.collective,
                    update: report.timings.update,
                    validation: report.timings.validation,
                    sampling: report.timings.sampling,
                }),
                snapshot: report.snapshot.is_some(),
                adapter_digest: report.snapshot.unwrap_or_default(),
            }),
            FromWorker::Stopped(stopped) => Message::Stopped(v1::Stopped {
                generation: stopped.generation.0,
                applied_step: stopped.applied.0,
                cause: match stopped.cause {
                    StopCause::Aborted => v1::StopCause::Aborted,
                    StopCause::Planned => v1::StopCause::Planned,
                    StopCause::StepsDone => v1::StopCause::StepsDone,
                    StopCause::DataDone => v1::StopCause::DataDone,
                }
                .into(),
                records: stopped.records.into_iter().map(Into::into).collect(),
                reason: stopped.reason,
                validation: stopped.validation.map(Into::into),
                trained_in: stopped.trained_in.0,
                lost_member: stopped.lost_member.map(|member| member.0),
                stalled: stopped.stalled.map(|stall| v1::Stall { waiting_for: stall.waiting_for.0, received_bytes: stall.received_bytes }),
            }),
            FromWorker::Continuing(continuing) => Message::Continuing(v1::Continuing {
                generation: continuing.generation.0,
                applied_step: continuing.applied.0,
                records: continuing.records.into_iter().map(Into::into).collect(),
            }),
            FromWorker::LeaseRequest { generation, num_leases, is_idle } => {
                Message::LeaseRequest(v1::LeaseRequest { generation: generation.0, num_leases, is_idle })
            }
            FromWorker::GaveBack { lease, from } => Message::GaveBack(v1::GaveBack { lease_id: lease.0, from }),
            FromWorker::ShardReport(report) => Message::ShardReport(v1::ShardReport {
                lease_id: report.lease.0,
                skipped: report.skipped.into_iter().map(Into::into).collect(),
                num_samples: report.num_samples,
                truncated: report.truncated,
            }),
            FromWorker::Failure { phase, message, permanent } => Message::Failure(v1::WorkerFailure { phase, message, permanent }),
            FromWorker::Leaving { reason } => Message::Leaving(v1::Leaving { reason }),
        };
        Self { message: Some(message) }
    }
}

impl From<SkippedSample> for v1::SkippedSample {
    fn from(sample: SkippedSample) -> Self {
        let reason = match sample.reason {
            SkipReason::Filtered => v1::SkipReason::Filtered,
            SkipReason::Bad => v1::SkipReason::Bad,
        };
        Self { index: sample.index, reason: reason.into(), key: sample.key, detail: sample.detail }
    }
}

impl TryFrom<v1::SkippedSample> for SkippedSample {
    type Error = WireError;

    fn try_from(wire: v1::SkippedSample) -> Result<Self, WireError> {
        if wire.index >= SampleName::LIMIT {
            return Err(WireError { field: "shard_report.skipped.index", problem: format!("{} is 2^24 or more", wire.index) });
        }
        let reason = match v1::SkipReason::try_from(wire.reason) {
            Ok(v1::SkipReason::Filtered) => SkipReason::Filtered,
            Ok(v1::SkipReason::Bad) => SkipReason::Bad,
            Ok(v1::SkipReason::Unspecified) | Err(_) => return Err(unknown("shard_report.skipped.reason", wire.reason)),
        };
        Ok(Self { index: wire.index, reason, key: wire.key, detail: wire.detail })
    }
}

impl TryFrom<v1::FromWorker> for FromWorker {
    type Error = WireError;

    fn try_from(wire: v1::FromWorker) -> Result<Self, WireError> {
        use v1::from_worker::Message;
        Ok(match wire.message.ok_or(missing("from_worker.message"))? {
            Message::Hello(hello) => {
                if hello.requested_rank.is_some_and(|rank| rank >= MAX_MEMBERS) {
                    return Err(WireError { field: "hello.requested_rank", problem: "too large".into() });
                }
                Self::Hello(Hello {
                    protocol_version: hello.protocol_version,
                    program_version: hello.program_version,
                    incarnation: Incarnation(hello.incarnation),
                    attempt: hello.attempt,
                    requested_rank: hello.requested_rank.map(Rank),
                    host: hello.host,
                    pid: hello.pid,
                    device: hello.device,
                })
            }
            Message::Ready(ready) => Self::Ready { model_digest: ready.model_digest, num_parameters: ready.num_parameters },
            Message::Heartbeat(beat) => Self::Heartbeat(Heartbeat {
                step: Step(beat.step),
                phase: phase(beat.phase)?,
                generation: Generation(beat.generation),
                reads: beat.reads,
                memory: beat.memory.map(TryInto::try_into).transpose()?.unwrap_or_default(),
            }),
            Message::Bootstrap(bootstrap) => {
                if bootstrap.bytes.is_empty() {
                    return Err(missing("bootstrap.bytes"));
                }
                Self::Bootstrap { generation: Generation(bootstrap.generation), bytes: bootstrap.bytes }
            }
            Message::StepReport(report) => {
                let timings = report.timings.unwrap_or_default();
                let record = report.record.map(StepRecord::try_from).transpose()?;
                if record.as_ref().is_some_and(|record| record.step.0 != report.step || record.generation.0 != report.generation) {
                    return Err(WireError { field: "step_report.record", problem: "is of another step or generation".into() });
                }
                Self::StepReport(StepReport {
                    generation: Generation(report.generation),
                    step: Step(report.step),
                    record,
                    timings: StepTimings {
                        data: timings.data,
                        compute: timings.compute,
                        collective: timings.collective,
                        update: timings.update,
                        validation: timings.validation,
                        sampling: timings.sampling,
                    },
                    snapshot: report.snapshot.then_some(report.adapter_digest),
                })
            }
            Message::Stopped(stopped) => Self::Stopped(Stopped {
                generation: Generation(stopped.generation),
                applied: Step(stopped.applied_step),
                cause: match v1::StopCause::try_from(stopped.cause) {
                    Ok(v1::StopCause::Aborted) => StopCause::Aborted,
                    Ok(v1::StopCause::Planned) => StopCause::Planned,
                    Ok(v1::StopCause::StepsDone) => StopCause::StepsDone,
                    Ok(v1::StopCause::DataDone) => StopCause::DataDone,
                    Ok(v1::StopCause::Unspecified) | Err(_) => return Err(unknown("stopped.cause", stopped.cause)),
                },
                records: stopped.records.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
                reason: stopped.reason,
                validation: stopped.validation.map(TryInto::try_into).transpose()?,
                trained_in: Generation(stopped.trained_in),
                lost_member: stopped.lost_member.map(MemberIndex),
                stalled: stopped
                    .stalled
                    .map(|stall| Stall { waiting_for: MemberIndex(stall.waiting_for), received_bytes: stall.received_bytes }),
            }),
            Message::Continuing(continuing) => Self::Continuing(Continuing {
                generation: Generation(continuing.generation),
                applied: Step(continuing.applied_step),
                records: continuing.records.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
            }),
            Message::LeaseRequest(request) => {
                Self::LeaseRequest { generation: Generation(request.generation), num_leases: request.num_leases, is_idle: request.is_idle }
            }
            Message::GaveBack(gave) if gave.from > SampleName::LIMIT => {
                return Err(WireError { field: "gave_back.from", problem: format!("{} is more than 2^24", gave.from) });
            }
            Message::GaveBack(gave) => Self::GaveBack { lease: LeaseId(gave.lease_id), from: gave.from },
            Message::ShardReport(report) => {
                if report.num_samples.is_some_and(|count| count >= SampleName::LIMIT) {
                    return Err(WireError { field: "shard_report.num_samples", problem: "2^24 or more samples in one shard".into() });
                }
                Self::ShardReport(ShardReport {
                    lease: LeaseId(report.lease_id),
                    skipped: report.skipped.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
                    num_samples: report.num_samples,
                    truncated: report.truncated,
                })
            }
            Message::Failure(failure) => Self::Failure { phase: failure.phase, message: failure.message, permanent: failure.permanent },
            Message::Leaving(leaving) => Self::Leaving { reason: leaving.reason },
        })
    }
}

impl From<ToWorker> for v1::ToWorker {
    fn from(message: ToWorker) -> Self {
        use v1::to_worker::Message;
        let message = match message {
            ToWorker::Welcome {
                worker,
                rank,
                world_size,
                job_id,
                job_toml,
                heartbeat_interval_ms,
                heartbeat_timeout_ms,
                join_timeout_ms,
                continues,
            } => Message::Welcome(v1::Welcome {
                worker_id: worker.0,
                rank: rank.0,
                world_size,
                job_id,
                job_toml,
                heartbeat_interval_ms,
                heartbeat_timeout_ms,
                join_timeout_ms,
                continues: continues.0,
            }),
            ToWorker::HeartbeatReply { generation, running, waiting_for } => {
                Message::HeartbeatReply(v1::HeartbeatReply { generation: generation.0, running, waiting_for })
            }
            ToWorker::MakeBootstrap { generation, num_members } => {
                Message::MakeBootstrap(v1::MakeBootstrap { generation: generation.0, num_members })
            }
            ToWorker::Assignment(assignment) => Message::Assignment(v1::Assignment {
                generation: assignment.generation.0,
                member_index: assignment.member_index.0,
                num_members: assignment.num_members,
                bootstrap: assignment.bootstrap,
                base_step: assignment.base_step.0,
                base_generation: assignment.base_generation.0,
                source_index: assignment.source_index.0,
                broadcast_state: assignment.broadcast_state,
                checkpoint_step: assignment.checkpoint_step.map(|step| step.0),
                held_leases: assignment.held_leases.into_iter().map(|lease| lease.0).collect(),
                global_batch: assignment.global_batch,
            }),
            ToWorker::Abort { generation, reason } => Message::Abort(v1::Abort { generation: generation.0, reason }),
            ToWorker::PlanChange { generation, reason } => Message::PlanChange(v1::PlanChange { generation: generation.0, reason }),
            ToWorker::GiveBack { leases, for_idle } => {
                Message::GiveBack(v1::GiveBack { lease_ids: leases.into_iter().map(|lease| lease.0).collect(), for_idle })
            }
            ToWorker::LeaseGrant { generation, leases, none_left, ask_when_idle } => Message::LeaseGrant(v1::LeaseGrant {
                generation: generation.0,
                leases: leases
                    .into_iter()
                    .map(|lease| v1::Lease {
                        lease_id: lease.id.0,
                        epoch: lease.epoch.0,
                        shard: lease.shard.0,
                        url: lease.url,
                        done: lease.done.as_bytes().to_vec(),
                        end: lease.end,
                    })
                    .collect(),
                none_left,
                ask_when_idle,
            }),
            ToWorker::Durable { generation, step } => Message::Durable(v1::Durable { generation: generation.0, step: step.0 }),
            ToWorker::TakeSnapshot { generation } => Message::TakeSnapshot(v1::TakeSnapshot { generation: generation.0 }),
            ToWorker::Stop { reason, message } => {
                let reason = match reason {
                    StopReason::Finished => v1::stop::Reason::Finished,
                    StopReason::Stopped => v1::stop::Reason::Stopped,
                    StopReason::Failed => v1::stop::Reason::Failed,
                    StopReason::Drained => v1::stop::Reason::Drained,
                    StopReason::GivenUp => v1::stop::Reason::GivenUp,
                };
                Message::Stop(v1::Stop { reason: reason.into(), message })
            }
        };
        Self { message: Some(message) }
    }
}

impl TryFrom<v1::ToWorker> for ToWorker {
    type Error = WireError;

    fn try_from(wire: v1::ToWorker) -> Result<Self, WireError> {
        use v1::to_worker::Message;
        Ok(match wire.message.ok_or(missing("to_worker.message"))? {
            Message::Welcome(welcome) => Self::Welcome {
                worker: WorkerId(welcome.worker_id),
                rank: Rank(welcome.rank),
                world_size: member_count("welcome.world_size", welcome.world_size)?,
                job_id: welcome.job_id,
                job_toml: welcome.job_toml,
                heartbeat_interval_ms: welcome.heartbeat_interval_ms.max(1),
                heartbeat_timeout_ms: welcome.heartbeat_timeout_ms.max(1),
                join_timeout_ms: welcome.join_timeout_ms,
                continues: Generation(welcome.continues),
            },
            Message::HeartbeatReply(reply) => {
                Self::HeartbeatReply { generation: Generation(reply.generation), running: reply.running, waiting_for: reply.waiting_for }
            }
            Message::MakeBootstrap(make) => Self::MakeBootstrap {
                generation: Generation(make.generation),
                num_members: member_count("make_bootstrap.num_members", make.num_members)?,
            },
            Message::Assignment(wire) => {
                let num_members = member_count("assignment.num_members", wire.num_members)?;
                if wire.member_index >= num_members || wire.source_index >= num_members {
                    return Err(WireError { field: "assignment.member_index", problem: "is not below num_members".into() });
                }
                if wire.global_batch < num_members {
                    return Err(WireError { field: "assignment.global_batch", problem: "is less than a sample for each member".into() });
                }
                Self::Assignment(Assignment {
                    generation: Generation(wire.generation),
                    member_index: MemberIndex(wire.member_index),
                    num_members,
                    bootstrap: wire.bootstrap,
                    base_step: Step(wire.base_step),
                    base_generation: Generation(wire.base_generation),
                    source_index: MemberIndex(wire.source_index),
                    broadcast_state: wire.broadcast_state,
                    checkpoint_step: wire.checkpoint_step.map(Step),
                    held_leases: wire.held_leases.into_iter().map(LeaseId).collect(),
                    global_batch: wire.global_batch,
                })
            }
            Message::Abort(abort) => Self::Abort { generation: Generation(abort.generation), reason: abort.reason },
            Message::PlanChange(plan) => Self::PlanChange { generation: Generation(plan.generation), reason: plan.reason },
            Message::GiveBack(give) => {
                Self::GiveBack { leases: give.lease_ids.into_iter().map(LeaseId).collect(), for_idle: give.for_idle }
            }
            Message::LeaseGrant(grant) => Self::LeaseGrant {
                generation: Generation(grant.generation),
                leases: grant
                    .leases
                    .into_iter()
                    .map(|lease| Lease {
                        id: LeaseId(lease.lease_id),
                        epoch: Epoch(lease.epoch),
                        shard: ShardId(lease.shard),
                        url: lease.url,
                        done: Bitmap::from_bytes(lease.done),
                        end: lease.end,
                    })
                    .collect(),
                none_left: grant.none_left,
                ask_when_idle: grant.ask_when_idle,
            },
            Message::Durable(durable) => Self::Durable { generation: Generation(durable.generation), step: Step(durable.step) },
            Message::TakeSnapshot(take) => Self::TakeSnapshot { generation: Generation(take.generation) },
            Message::Stop(stop) => Self::Stop {
                reason: match v1::stop::Reason::try_from(stop.reason) {
                    Ok(v1::stop::Reason::Finished) => StopReason::Finished,
                    Ok(v1::stop::Reason::Stopped) => StopReason::Stopped,
                    Ok(v1::stop::Reason::Failed) => StopReason::Failed,
                    Ok(v1::stop::Reason::Drained) => StopReason::Drained,
                    Ok(v1::stop::Reason::GivenUp) => StopReason::GivenUp,
                    Ok(v1::stop::Reason::Unspecified) | Err(_) => return Err(unknown("stop.reason", stop.reason)),
                },
                message: stop.message,
            },
        })
    }
}

#[cfg(test)]
mod tests;
