//! The gRPC services: decode, send a command, await its reply, encode.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use peapod_proto::ids::{Epoch, Generation, Rank, Step, WorkerId};
use peapod_proto::message::{FromWorker, StepTimings, ToWorker, ValidationLosses};
use peapod_proto::trace::Trace;
use peapod_proto::{JOB_IS_OVER, RETRY_FOR_MS, v1, work_span};
use sha2::Digest;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::core::ledger::{Ledger, Totals};
use crate::core::{CoreError, Event, Outcome, ShardState, ShardView, SourceView, StreamId, WorkerView};
use crate::driver::{self, Command, Ending, Look, OUTBOUND_CAPACITY};
use crate::gallery::{Gallery, GalleryError};
use crate::history::History;
use crate::shard_list::ShardList;
use crate::store::{Manifest, Part, Store, StoreError};

/// Why a worker is lost whose connection was closed at its end.
const CLOSED: &str = "its process closed the connection";
/// How long a peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Files in one checkpoint.
const MAX_PARTS: usize = 16;
/// Size of one file of a checkpoint: far above any adapter, far below a disk.
const MAX_PART_BYTES: u64 = 8 << 30;
/// Shards in one page: with addresses of usual length a reply stays far below the 4 MiB that a client takes.
const MAX_SHARDS_SHOWN: u32 = 1000;
/// Between two messages to who watches.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Bytes in one message of a download.
const DOWNLOAD_CHUNK: usize = 1 << 20;

/// Serves all four services.
#[derive(Debug, Clone)]
pub struct Service {
    commands: mpsc::Sender<Command>,
    store: Store,
    gallery: Gallery,
    facts: Arc<JobFacts>,
}

/// What the services say about the job besides its state.
#[derive(Debug)]
pub struct JobFacts {
    /// Names this run.
    pub job_id: String,
    /// Name in the job file.
    pub name: String,
    /// The job file.
    pub toml: String,
    /// The shards it is trained on.
    pub shards: Vec<ShardList>,
    /// Last step, if the job is given in steps.
    pub last_step: Option<u64>,
    /// Number of shards.
    pub num_shards: u32,
    /// Members of a whole world.
    pub world_size: u32,
    /// Where the live page is, if there is one.
    pub page: Option<String>,
    /// Checkpoints to keep.
    pub keep: u32,
    /// Weight of the feature loss.
    pub feature_weight: f64,
}

impl From<CoreError> for Status {
    fn from(error: CoreError) -> Self {
        let message = error.to_string();
        match error {
            CoreError::NoSuchRank { .. } => Self::invalid_argument(message),
            CoreError::RankTaken { retry_for, .. } => {
                let mut metadata = tonic::metadata::MetadataMap::new();
                metadata.insert(RETRY_FOR_MS, (retry_for.as_millis() as u64).into());
                Self::with_metadata(tonic::Code::AlreadyExists, message, metadata)
            }
            CoreError::Over(_) => {
                let mut metadata = tonic::metadata::MetadataMap::new();
                metadata.insert(JOB_IS_OVER, 1.into());
                Self::with_metadata(tonic::Code::FailedPrecondition, message, metadata)
            }
            CoreError::NoRankLeft => Self::already_exists(message),
            CoreError::Version { .. } | CoreError::ModelsDiffer { .. } | CoreError::Ending(_) | CoreError::Unexpected { .. } => {
                Self::failed_precondition(message)
            }
            CoreError::StaleStream | CoreError::StaleGeneration { .. } => Self::aborted(message),
            CoreError::NotYet(_) => Self::unavailable(message),
            CoreError::NobodyHasRank(_) => Self::not_found(message),
            CoreError::CannotBeSpared { .. } => Self::failed_precondition(message),
        }
    }
}

fn over() -> Status {
    Status::unavailable("the coordinator is stopping")
}

impl Service {
    /// Services that talk to the driver through `commands`.
    #[must_use]
    pub fn new(commands: mpsc::Sender<Command>, store: Store, gallery: Gallery, facts: JobFacts) -> Self {
        Self { commands, store, gallery, facts: Arc::new(facts) }
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply).within_current()).await.map_err(|_| over())?;
        answer.await.map_err(|_| over())
    }
}

/// A stream of messages to one worker.
type Outbound = std::pin::Pin<Box<dyn Stream<Item = Result<v1::ToWorker, Status>> + Send>>;

#[tonic::async_trait]
impl v1::membership_server::Membership for Service {
    type JoinStream = Outbound;

    async fn join(&self, request: Request<Streaming<v1::FromWorker>>) -> Result<Response<Outbound>, Status> {
        let trace = Trace::follow(work_span!("session", host = Empty, pid = Empty), request.metadata());
        let span = trace.span().clone();
        self.welcome(request.into_inner(), trace).instrument(span).await
    }
}

impl Service {
    async fn welcome(&self, mut inbound: Streaming<v1::FromWorker>, trace: Trace) -> Result<Response<Outbound>, Status> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded(format!("no hello within {} s", HELLO_TIMEOUT.as_secs())))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before its hello"))?;
        let FromWorker::Hello(hello) = FromWorker::try_from(first).map_err(|error| Status::invalid_argument(error.to_string()))? else {
            return Err(Status::invalid_argument("the first message of a stream is a hello"));
        };
        trace.span().record("host", &hello.host).record("pid", hello.pid);
        let (outbound, messages) = mpsc::channel::<ToWorker>(OUTBOUND_CAPACITY);
        let (worker, stream) = self.ask(|reply| Command::Hello { hello, outbound, reply }).await??;
        let span = trace.span().clone();
        tokio::spawn(read_worker(inbound, self.commands.clone(), worker, stream, trace).instrument(span));
        let messages = ReceiverStream::new(messages).map(|message| Ok(v1::ToWorker::from(message)));
        Ok(Response::new(Box::pin(messages)))
    }
}

/// Hands on what a worker says until its stream ends; the end is its death notice.
async fn read_worker(
    mut inbound: Streaming<v1::FromWorker>,
    commands: mpsc::Sender<Command>,
    worker: WorkerId,
    stream: StreamId,
    session: Trace,
) {
    let cause = loop {
        let message = match inbound.message().await {
            Ok(Some(message)) => message,
            Ok(None) => break CLOSED.to_owned(),
            Err(status) => break transport_cause(&status),
        };
        let message = match FromWorker::try_from(message) {
            Ok(message) => message,
            Err(error) => break error.to_string(),
        };
        let part = match &message {
            FromWorker::LeaseRequest { num_leases, .. } => {
                session.child(work_span!(parent: session.span(), "lease request", num = *num_leases)).span().clone()
            }
            _ => session.span().clone(),
        };
        let command = part.in_scope(|| Command::Tell(Event::Message { worker, stream, message }).within_current());
        drop(part);
        if commands.send(command).await.is_err() {
            return;
        }
    };
    // The driver may be gone: then the job is over and nobody needs to know.
    let _ = commands.send(Command::Tell(Event::Closed { worker, stream, cause }).within_current()).await;
}

/// The transport's reason without its layers of wrapping.
fn transport_cause(status: &Status) -> String {
    let mut source: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    let mut cause = status.message().to_owned();
    while let Some(error) = source {
        cause = error.to_string();
        source = error.source();
    }
    // TLS has its own word for a process that is gone without a goodbye.
    if cause.contains("close_notify") {
        return CLOSED.into();
    }
    if cause.is_empty() || cause.contains("connection error") || cause.contains("broken pipe") || cause.contains("reset") {
        return "its connection broke (the process died or its network did)".into();
    }
    cause
}

type Downloads = std::pin::Pin<Box<dyn Stream<Item = Result<v1::DownloadMessage, Status>> + Send>>;

#[tonic::async_trait]
impl v1::checkpoints_server::Checkpoints for Service {
    async fn upload(&self, request: Request<Streaming<v1::UploadMessage>>) -> Result<Response<v1::UploadReceipt>, Status> {
        let trace = Trace::follow(work_span!("upload", step = Empty), request.metadata());
        let upload = self.clone().take_upload(request.into_inner()).instrument(trace.span().clone());
        // Of its own: a worker that hangs up ends this call, and must not keep the driver from hearing what became of the checkpoint.
        tokio::spawn(upload).await.map_err(|error| Status::internal(format!("the upload: {error}")))?
    }

    type DownloadStream = Downloads;

    async fn download(&self, request: Request<v1::DownloadRequest>) -> Result<Response<Downloads>, Status> {
        let step = Step(request.get_ref().step);
        let trace = Trace::follow(work_span!("download", step = step.0), request.metadata());
        let manifest = self.store.find(step).await.map_err(store_failed)?;
        let manifest = manifest.ok_or_else(|| Status::not_found(format!("there is no checkpoint of step {step}")))?;
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(send_checkpoint(self.store.clone(), manifest, sender).instrument(trace.span().clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Service {
    async fn take_upload(self, mut messages: Streaming<v1::UploadMessage>) -> Result<Response<v1::UploadReceipt>, Status> {
        let header = match messages.message().await?.and_then(|message| message.message) {
            Some(v1::upload_message::Message::Header(header)) => header,
            _ => return Err(Status::invalid_argument("an upload begins with its header")),
        };
        let header = Header::try_from(header)?;
        let (step, generation) = (header.step, header.generation);
        Span::current().record("step", step.0);
        let received = match self.is_whole_here(step, generation).await {
            Ok(true) => return self.is_there(step, generation).await,
            Ok(false) => self.receive(&header, &mut messages).await,
            Err(error) => Err(store_failed(error)),
        };
        let complete = match received {
            Ok(sealing) => self.complete(sealing).await,
            Err(status) => Err(status),
        };
        match complete {
            Ok(()) => Ok(Response::new(v1::UploadReceipt { location: self.store.location(step, generation) })),
            Err(status) => {
                if let Err(taken_over @ StoreError::TakenOver { .. }) = self.store.check_owner().await {
                    let _ = self.commands.send(Command::Yield { reason: taken_over.to_string() }).await;
                }
                let event = Event::CheckpointFailed { step, generation, error: status.message().to_owned() };
                let _ = self.commands.send(Command::Tell(event).within_current()).await;
                Err(status)
            }
        }
    }

    /// Whether a checkpoint is whole in the store, and was written by this coordinator: another one's steps have the same names.
    async fn is_whole_here(&self, step: Step, generation: Generation) -> Result<bool, StoreError> {
        self.store.check_owner().await?;
        self.store.is_whole(step, generation).await
    }

    /// Writes the manifest of what was received, and what follows from that.
    async fn complete(&self, Sealing { manifest, ledger }: Sealing) -> Result<(), Status> {
        let (step, generation) = (manifest.step, manifest.generation);
        self.store.seal(manifest, &ledger).await.map_err(store_failed)?;
        if !self.ask(|reply| Command::Stored { step, generation, reply }).await? {
            self.store.remove(step, generation).await.map_err(store_failed)?;
            return Err(Status::aborted(format!(
                "step {step} of {generation} is not on the line of weights that goes on, or older than what is stored"
            )));
        }
        if let Err(error) = self.store.retain(self.facts.keep).await {
            tracing::warn!("old checkpoints stay: {error}");
        }
        Ok(())
    }

    /// Answers an upload of what is whole in the store: nothing of it is written again. Where it is still awaited, its sender was cut off
    /// after the manifest was written and before that was said.
    async fn is_there(&self, step: Step, generation: Generation) -> Result<Response<v1::UploadReceipt>, Status> {
        if self.ask(|reply| Command::Stored { step, generation, reply }).await? {
            return Ok(Response::new(v1::UploadReceipt { location: self.store.location(step, generation) }));
        }
        Err(Status::already_exists(format!("the checkpoint of step {step} of {generation} is stored already")))
    }
}

/// What makes a checkpoint of the parts that are there.
struct Sealing {
    manifest: Manifest,
    ledger: Arc<Ledger>,
}

/// A checked upload header.
struct Header {
    step: Step,
    generation: Generation,
    parts: Vec<Part>,
}

impl TryFrom<v1::CheckpointHeader> for Header {
    type Error = Status;

    fn try_from(wire: v1::CheckpointHeader) -> Result<Self, Status> {
        if wire.parts.is_empty() || wire.parts.len() > MAX_PARTS {
            return Err(Status::invalid_argument(format!("a checkpoint has 1 to {MAX_PARTS} parts, not {}", wire.parts.len())));
        }
        let part = |part: v1::CheckpointPart| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            if part.name.is_empty() || part.name.starts_with('.') || part.name.len() > 100 || !part.name.chars().all(plain) {
                return Err(Status::invalid_argument(format!("{:?} is no name for a part", part.name)));
            }
            if part.num_bytes > MAX_PART_BYTES || part.sha256.len() != 32 {
                return Err(Status::invalid_argument(format!(
                    "part {}: {} bytes or its digest cannot be right",
                    part.name, part.num_bytes
                )));
            }
            Ok(Part { name: part.name, num_bytes: part.num_bytes, sha256: hex::encode(&part.sha256) })
        };
        let parts = wire.parts.into_iter().map(part).collect::<Result<_, _>>()?;
        Ok(Self { step: Step(wire.step), generation: Generation(wire.generation), parts })
    }
}

fn store_failed(error: StoreError) -> Status {
    match error {
        // It would be no better another time.
        StoreError::Damaged { .. } => Status::data_loss(error.to_string()),
        _ => Status::internal(error.to_string()),
    }
}

impl Service {
    /// Writes the parts as they come, and gives what makes them a checkpoint once its step is known to be final.
    async fn receive(&self, header: &Header, messages: &mut Streaming<v1::UploadMessage>) -> Result<Sealing, Status> {
        let (step, generation) = (header.step, header.generation);
        let mut rest = bytes::Bytes::new();
        for part in &header.parts {
            let mut writer = self.store.begin_part(step, generation, &part.name).await.map_err(store_failed)?;
            let mut hasher = sha2::Sha256::new();
            let mut left = part.num_bytes;
            while left > 0 {
                if rest.is_empty() {
                    rest = match messages.message().await?.and_then(|message| message.message) {
                        Some(v1::upload_message::Message::Chunk(chunk)) => chunk.into(),
                        Some(v1::upload_message::Message::Header(_)) => return Err(Status::invalid_argument("a second header")),
                        None => return Err(Status::aborted(format!("the upload ended {left} bytes before the end of {}", part.name))),
                    };
                }
                let now = rest.split_to(rest.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
                left -= now.len() as u64;
                hasher.update(&now);
                writer.write(now).await.map_err(store_failed)?;
            }
            if hex::encode(hasher.finalize()) != part.sha256 {
                return Err(Status::data_loss(format!("{} does not have its SHA-256", part.name)));
            }
            // Two may send the same at once.
            if self.store.is_whole(step, generation).await.map_err(store_failed)? {
                return Err(Status::already_exists(format!("the checkpoint of step {step} of {generation} is stored already")));
            }
            writer.finish().await.map_err(store_failed)?;
        }
        let records = self.ask(|reply| Command::RecordsOf { step, generation, reply }).await?.map_err(Status::aborted)?;
        let manifest = Manifest {
            format: Manifest::FORMAT,
            step,
            generation,
            job: self.facts.toml.clone(),
            shards: self.facts.shards.clone(),
            validation: records.validation.map(Into::into),
            parts: header.parts.clone(),
        };
        Ok(Sealing { manifest, ledger: records.ledger })
    }
}

async fn send_checkpoint(store: Store, manifest: Manifest, sender: mpsc::Sender<Result<v1::DownloadMessage, Status>>) {
    use v1::download_message::Message;
    let send = async |message| sender.send(Ok(v1::DownloadMessage { message: Some(message) })).await.is_ok();
    let digest = |part: &Part| (0..32).filter_map(|at| u8::from_str_radix(part.sha256.get(at * 2..at * 2 + 2)?, 16).ok()).collect();
    let parts = manifest.parts.iter();
    let header = v1::CheckpointHeader {
        generation: manifest.generation.0,
        step: manifest.step.0,
        parts: parts.map(|part| v1::CheckpointPart { name: part.name.clone(), num_bytes: part.num_bytes, sha256: digest(part) }).collect(),
    };
    if !send(Message::Header(header)).await {
        return;
    }
    for part in &manifest.parts {
        let result = async {
            let mut stream = store.stream(&manifest, &part.name).await?;
            while let Some(bytes) = stream.next().await {
                let bytes = bytes?;
                for chunk in bytes.chunks(DOWNLOAD_CHUNK) {
                    if !send(Message::Chunk(chunk.to_vec())).await {
                        return Ok(false);
                    }
                }
            }
            Ok::<bool, StoreError>(true)
        };
        match result.await {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => return drop(sender.send(Err(store_failed(error))).await),
        }
    }
}

impl From<GalleryError> for Status {
    fn from(error: GalleryError) -> Self {
        let message = error.to_string();
        match error {
            GalleryError::NoSuchPrompt { .. } | GalleryError::NotPng | GalleryError::TooLarge { .. } => Self::invalid_argument(message),
            GalleryError::Older { .. } => Self::aborted(message),
            GalleryError::Store { .. } => Self::internal(message),
        }
    }
}

#[tonic::async_trait]
impl v1::pictures_server::Pictures for Service {
    async fn keep(&self, request: Request<v1::KeepPicture>) -> Result<Response<v1::PictureKept>, Status> {
        let trace =
            Trace::follow(work_span!("picture", step = request.get_ref().step, index = request.get_ref().index), request.metadata());
        let v1::KeepPicture { generation, step, index, png } = request.into_inner();
        let png = bytes::Bytes::from(png);
        let kept = self.gallery.keep(Step(step), Generation(generation), index, png.clone()).instrument(trace.span().clone());
        let location = kept.await?;
        self.commands.send(Command::Drawn { step: Step(step), index, png }).await.map_err(|_| over())?;
        Ok(Response::new(v1::PictureKept { location }))
    }
}

fn sample_counts(totals: Totals) -> v1::SampleCounts {
    let Totals { committed, filtered, bad, not_finite } = totals;
    v1::SampleCounts { committed, filtered, bad, not_finite }
}

fn source_status(source: SourceView) -> v1::SourceStatus {
    let SourceView { name, weight, epoch, num_shards, num_leased, num_done, totals, rules } = source;
    let by = |counts: BTreeMap<String, u64>| counts.into_iter().map(|(rule, samples)| v1::RuleCount { rule, samples }).collect();
    let shards = v1::ShardCounts { epoch: epoch.0, total: num_shards, leased: num_leased, done: num_done };
    v1::SourceStatus {
        name,
        weight,
        shards: Some(shards),
        samples: Some(sample_counts(totals)),
        filtered_by: by(rules.filtered),
        bad_by: by(rules.bad),
    }
}

fn shard_status(shard: ShardView) -> v1::ShardStatus {
    let (progress, ranks) = match shard.state {
        ShardState::Pending => (v1::ShardProgress::Pending, Vec::new()),
        ShardState::Leased(holders) => (v1::ShardProgress::Leased, holders.into_iter().filter_map(|holder| Some(holder.rank?.0)).collect()),
        ShardState::Done => (v1::ShardProgress::Done, Vec::new()),
    };
    v1::ShardStatus {
        shard: shard.shard.0,
        url: shard.url,
        progress: progress.into(),
        ranks,
        num_samples: shard.counts.num_samples,
        samples: Some(sample_counts(shard.counts.counts)),
    }
}

fn worker_status(worker: WorkerView, history: &History) -> v1::WorkerStatus {
    let seen = history.seen(&worker);
    let times = |timings: StepTimings| v1::WorkerTimes {
        step_s: timings.total(),
        data_s: timings.data.into(),
        compute_s: timings.compute.into(),
        collective_s: timings.collective.into(),
    };
    v1::WorkerStatus {
        worker_id: worker.id.0,
        rank: worker.rank.0,
        phase: worker.phase.as_str().into(),
        step: worker.step.0,
        last_seen_ms: worker.silence.as_millis() as u32,
        member: worker.member,
        times: seen.and_then(|seen| seen.timings).map(times),
        memory: seen.map(|seen| seen.memory.into()),
        restarts: seen.map_or(0, |seen| seen.starts.saturating_sub(1)),
        host: worker.host,
        pid: worker.pid,
        device: worker.device,
    }
}

fn job_end(ending: Ending) -> v1::JobEnd {
    use v1::job_end::Outcome as Wire;
    let (outcome, reason) = match ending {
        Ending::Over(Outcome::Finished) => (Wire::Finished, String::new()),
        Ending::Over(Outcome::Stopped { reason }) => (Wire::Stopped, reason),
        Ending::Over(Outcome::Failed { reason }) => (Wire::Failed, reason),
        Ending::Away => (Wire::Away, String::new()),
    };
    v1::JobEnd { outcome: outcome.into(), reason }
}

impl JobFacts {
    fn status(&self, (status, history): Look) -> v1::StatusReply {
        let driver::Status { state, generation, final_step, workers, epoch, shards_done, shards_leased, totals, .. } = status;
        let validation = |losses: ValidationLosses| v1::ValidationStatus {
            step: losses.step.0,
            samples: losses.samples,
            task: losses.task,
            logit: losses.logit,
            feature: losses.feature,
            total: losses.total(self.feature_weight) as f32,
        };
        let newest = history.newest.map(|(step, losses, _)| v1::StepStatus {
            step: step.0,
            task: losses.task,
            logit: losses.logit,
            feature: losses.feature,
            total: losses.total(self.feature_weight),
            grad_norm: losses.grad_norm,
            learning_rate: losses.learning_rate,
        });
        let seconds = history.goodput.seconds(history.now).into_iter();
        let pace = history.series.pace();
        let failure = status.first_failure;
        v1::StatusReply {
            job_id: self.job_id.clone(),
            job_name: self.name.clone(),
            state,
            generation: generation.0,
            final_step: final_step.0,
            total_steps: self.last_step.unwrap_or_default(),
            workers: workers.into_iter().map(|worker| worker_status(worker, &history)).collect(),
            shards: Some(v1::ShardCounts { epoch, total: self.num_shards, leased: shards_leased, done: shards_done }),
            samples_committed: totals.committed,
            samples_filtered: totals.filtered,
            samples_bad: totals.bad,
            checkpoint_step: status.checkpoint_step.map(|step| step.0),
            first_failure: failure.as_ref().map(|failure| failure.text.clone()).unwrap_or_default(),
            first_failure_healed_step: failure.as_ref().and_then(|failure| failure.healed).map(|step| step.0),
            first_failure_log: failure.map(|failure| failure.log).unwrap_or_default(),
            first_failure_ago_ms: status.first_failure_ago.map(|ago| ago.as_millis() as u64).unwrap_or_default(),
            validation: status.validation.map(validation),
            sources: status.sources.into_iter().map(source_status).collect(),
            page: self.page.clone().unwrap_or_default(),
            world_size: self.world_size,
            started_unix_s: history.started_unix,
            unix_s: history.unix(history.now),
            ended_unix_s: history.ended.map(|at| history.unix(at)),
            newest,
            samples_per_s: pace.map(|(samples, _)| samples),
            step_s: pace.map(|(_, seconds)| seconds),
            left_s: history.left(final_step, self.last_step),
            goodput: Some(v1::GoodputStatus {
                ratio: history.goodput_ratio(),
                seconds: seconds.map(|(cause, seconds)| v1::CauseSeconds { cause: cause.as_str().into(), seconds }).collect(),
            }),
        }
    }
}

type Watched = std::pin::Pin<Box<dyn Stream<Item = Result<v1::WatchReply, Status>> + Send>>;

impl Service {
    /// Tells who watches what the job is doing, every second, and at last how it ended. Without that word the coordinator broke.
    async fn tell_until_the_end(self, ended: oneshot::Receiver<Box<(Look, Ending)>>, sender: mpsc::Sender<Result<v1::WatchReply, Status>>) {
        let mut every = tokio::time::interval(WATCH_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(ended);
        loop {
            let reply = tokio::select! {
                biased;
                end = &mut ended => {
                    if let Ok(end) = end {
                        let (look, ending) = *end;
                        let last = v1::WatchReply { status: Some(self.facts.status(look)), end: Some(job_end(ending)) };
                        // Who has gone meanwhile does not read it.
                        let _ = sender.send(Ok(last)).await;
                    }
                    return;
                }
                () = sender.closed() => return,
                _ = every.tick() => match self.ask(|reply| Command::Look { reply }).await {
                    Ok(look) => v1::WatchReply { status: Some(self.facts.status(*look)), end: None },
                    // The end is on its way.
                    Err(_) => continue,
                },
            };
            if sender.send(Ok(reply)).await.is_err() {
                return;
            }
        }
    }
}

#[tonic::async_trait]
impl v1::control_server::Control for Service {
    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let look = self.ask(|reply| Command::Look { reply }).await?;
        Ok(Response::new(self.facts.status(*look)))
    }

    type WatchStream = Watched;

    async fn watch(&self, _request: Request<v1::WatchRequest>) -> Result<Response<Watched>, Status> {
        let (reply, ended) = oneshot::channel();
        self.commands.send(Command::Ended { reply }).await.map_err(|_| over())?;
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(self.clone().tell_until_the_end(ended, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn shards(&self, request: Request<v1::ShardsRequest>) -> Result<Response<v1::ShardsReply>, Status> {
        let v1::ShardsRequest { source, epoch, skip, limit } = request.into_inner();
        let (source, epoch, limit) = (source as usize, epoch.map(Epoch), limit.clamp(1, MAX_SHARDS_SHOWN));
        let page = self.ask(|reply| Command::Shards { source, epoch, skip, limit, reply }).await?;
        let page = page.ok_or_else(|| Status::not_found(format!("the job has no source {source}")))?;
        let shards = page.shards.into_iter().map(shard_status).collect();
        Ok(Response::new(v1::ShardsReply { epoch: page.epoch.0, shards, next: page.next }))
    }

    async fn stop(&self, request: Request<v1::StopRequest>) -> Result<Response<v1::StopReply>, Status> {
        let reason = request.into_inner().reason;
        let reason = if reason.is_empty() { "stopped on request".to_owned() } else { reason };
        self.commands.send(Command::Tell(Event::Stop { reason })).await.map_err(|_| over())?;
        Ok(Response::new(v1::StopReply {}))
    }

    async fn drain(&self, request: Request<v1::DrainRequest>) -> Result<Response<v1::DrainReply>, Status> {
        let rank = Rank(request.into_inner().rank);
        self.ask(|reply| Command::Drain { rank, reply }).await??;
        Ok(Response::new(v1::DrainReply {}))
    }
}
