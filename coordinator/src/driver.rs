//! The one task that owns the core: commands in, effects out, asleep until the next deadline.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use peapod_proto::ids::{Epoch, Generation, Rank, Step, WorkerId};
use peapod_proto::message::{FromWorker, Hello, StopReason, ToWorker, ValidationLosses};
use tokio::sync::{mpsc, oneshot};

use crate::core::ledger::{Ledger, Totals};
use crate::core::{Core, CoreError, Effect, Event, Failure, Outcome, ShardPage, SourceView, StreamId, Timestamp, WorkerView};
use crate::history::History;
use crate::journal::{Journal, JournalError};
use crate::observe::{Observer, Summary};

/// Messages that may wait for one worker before it counts as stuck.
pub const OUTBOUND_CAPACITY: usize = 1024;
/// Times in a heartbeat timeout that the driver looks at the clock at least: only so does it know for how long it stood still.
const LOOKS: u32 = 12;
/// Commands that are caught up with at most before a look at the clock: there must be one, however much is said.
const MAX_CAUGHT_UP: usize = 4096;
/// Frozen ledgers that wait for their parts; older ones are of uploads that never came.
const MAX_FROZEN: usize = 4;

/// Where what belongs into the checkpoint of a step goes, or why there is none.
pub type RecordsReply = oneshot::Sender<Result<Records, String>>;

/// What the coordinator itself knows about a step and adds to its checkpoint.
#[derive(Debug, Clone)]
pub struct Records {
    /// What its weights were trained on.
    pub ledger: Arc<Ledger>,
    /// The newest losses on the validation samples that are known by now, of this step or an earlier one.
    pub validation: Option<ValidationLosses>,
}

/// What the shell asks of the driver. Every reply is sent, or dropped when the job is over.
#[derive(Debug)]
pub enum Command {
    /// A worker opened a stream; messages for it go to `outbound`.
    Hello {
        /// What it said.
        hello: Hello,
        /// Its end of the stream.
        outbound: mpsc::Sender<ToWorker>,
        /// Its id and its stream's, or why it is refused.
        reply: oneshot::Sender<Result<(WorkerId, StreamId), CoreError>>,
    },
    /// Something happened that needs no answer.
    Tell(Event),
    /// The parts of a checkpoint are stored: give what belongs to them once its step is final.
    RecordsOf {
        /// Its step.
        step: Step,
        /// Its generation.
        generation: Generation,
        /// The records, or why there are none.
        reply: RecordsReply,
    },
    /// A checkpoint is whole in the store. The weights may have gone back while its manifest was written: then it must not stay.
    Stored {
        /// Its step.
        step: Step,
        /// Its generation.
        generation: Generation,
        /// Whether it stays.
        reply: oneshot::Sender<bool>,
    },
    /// Whether the driver is well.
    Ping {
        /// The answer.
        reply: oneshot::Sender<()>,
    },
    /// What the job is doing.
    Status {
        /// The answer.
        reply: oneshot::Sender<Status>,
    },
    /// What the job is doing, and what has happened to it.
    Look {
        /// The answer.
        reply: oneshot::Sender<Box<Look>>,
    },
    /// How the run ends, and what it looked like then: answered once it has ended.
    Ended {
        /// The answer.
        reply: EndReply,
    },
    /// A picture was drawn for a prompt, and kept.
    Drawn {
        /// The step whose weights drew it.
        step: Step,
        /// Place of its prompt in the job file.
        index: u32,
        /// The picture.
        png: bytes::Bytes,
    },
    /// Another one, as part of a piece of work.
    Within {
        /// The work.
        span: tracing::Span,
        /// The command.
        command: Box<Command>,
    },
    /// The coordinator goes, the job stays: workers keep what they hold and look for another one.
    GoAway,
    /// This coordinator has lost the job to another one, or its workers out of reach: it fails without a word to them, so that they look
    /// for whoever goes on with the job.
    Yield {
        /// Why.
        reason: String,
    },
    /// How far the shards of a source are.
    Shards {
        /// Place of the source in the job.
        source: usize,
        /// Its epoch; its first open one if none.
        epoch: Option<Epoch>,
        /// Shards to pass over.
        skip: u32,
        /// Shards to give at most.
        limit: u32,
        /// The answer; none if there is no such source.
        reply: oneshot::Sender<Option<ShardPage>>,
    },
    /// Let a worker leave.
    Drain {
        /// Its rank.
        rank: Rank,
        /// Whether there is such a worker.
        reply: oneshot::Sender<Result<(), CoreError>>,
    },
}

impl Command {
    /// As part of the work that is under way where this is called.
    #[must_use]
    pub fn within_current(self) -> Self {
        let span = tracing::Span::current();
        if span.is_none() { self } else { Self::Within { span, command: Box::new(self) } }
    }
}

/// What a driver woke up for.
enum Turn {
    Command(Option<Command>),
    Flush,
    Tick,
}

/// How a driver ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// With the job.
    Over(Outcome),
    /// As asked by [`Command::GoAway`]; the journal is whole.
    Away,
}

/// What the job is doing, and what has happened to it.
pub type Look = (Status, History);

/// Where word of a run's end goes.
pub type EndReply = oneshot::Sender<Box<(Look, Ending)>>;

/// A picture of the job.
#[derive(Debug, Clone)]
pub struct Status {
    /// In a few words.
    pub state: String,
    /// Current generation.
    pub generation: Generation,
    /// Last final step.
    pub final_step: Step,
    /// Workers by rank.
    pub workers: Vec<WorkerView>,
    /// First epoch that is not complete.
    pub epoch: u32,
    /// Shards of it that are done.
    pub shards_done: u32,
    /// Shards of it that are leased.
    pub shards_leased: u32,
    /// Samples over all epochs.
    pub totals: Totals,
    /// The same by source.
    pub sources: Vec<SourceView>,
    /// Newest whole checkpoint.
    pub checkpoint_step: Option<Step>,
    /// Newest losses on the validation samples.
    pub validation: Option<ValidationLosses>,
    /// First failure, if any, also if the job has got over it.
    pub first_failure: Option<Failure>,
    /// How long ago it was.
    pub first_failure_ago: Option<Duration>,
}

/// Owns the core and the ends of all streams.
pub struct Driver {
    core: Core,
    commands: mpsc::Receiver<Command>,
    started: Instant,
    next_stream: u64,
    /// Streams whose hello has not been answered yet.
    arriving: HashMap<StreamId, mpsc::Sender<ToWorker>>,
    streams: HashMap<WorkerId, (StreamId, mpsc::Sender<ToWorker>)>,
    frozen: BTreeMap<(Step, Generation), Arc<Ledger>>,
    waiters: Vec<(Step, Generation, RecordsReply)>,
    /// Of which the ledger was dropped because too many waited; the core is to know.
    evicted: Vec<(Step, Generation)>,
    journal: Box<dyn Journal>,
    observer: Observer,
    /// Who waits for the end.
    watchers: Vec<EndReply>,
    ending: Option<Ending>,
}

impl Driver {
    /// A driver for `core`, fed by `commands`.
    #[must_use]
    pub fn new(core: Core, commands: mpsc::Receiver<Command>, journal: Box<dyn Journal>, observer: Observer) -> Self {
        Self {
            core,
            commands,
            started: Instant::now(),
            next_stream: 1,
            arriving: HashMap::new(),
            streams: HashMap::new(),
            frozen: BTreeMap::new(),
            waiters: Vec::new(),
            evicted: Vec::new(),
            journal,
            observer,
            watchers: Vec::new(),
            ending: None,
        }
    }

    /// Runs until the job is over, or the coordinator is to go.
    pub async fn run(mut self) -> (Ending, Self) {
        let was_over = self.core.outcome().is_some();
        let ending = self.run_to_its_end().await;
        if !was_over {
            self.observer.ended();
        }
        self.ending = Some(ending.clone());
        for watcher in std::mem::take(&mut self.watchers) {
            self.tell_the_end(watcher);
        }
        (ending, self)
    }

    /// Answers who waits for the end: now, if it is there.
    fn tell_the_end(&mut self, watcher: EndReply) {
        match &self.ending {
            // Who has gone meanwhile does not read it.
            Some(ending) => drop(watcher.send(Box::new((self.look(), ending.clone())))),
            None => {
                self.watchers.retain(|watcher| !watcher.is_closed());
                self.watchers.push(watcher);
            }
        }
    }

    fn look(&self) -> Look {
        (self.status(), self.observer.history())
    }

    async fn run_to_its_end(&mut self) -> Ending {
        if let Some(outcome) = self.core.outcome() {
            // Of a run before this one.
            return Ending::Over(outcome.clone());
        }
        let mut woke = self.now();
        loop {
            let flush_at = self.journal.flush_at();
            let look_every = self.core.heartbeat_timeout() / LOOKS;
            let sleep = self.core.next_deadline().map_or(look_every, |at| at.saturating_sub(self.now()).min(look_every));
            let turn = tokio::select! {
                command = self.commands.recv() => Turn::Command(command),
                () = sleep_until(flush_at) => Turn::Flush,
                () = tokio::time::sleep(sleep) => Turn::Tick,
            };
            // Late by more than two heartbeats: it was this process that stood still (a stopped process, a suspended machine, a disk that
            // did not answer), and what was said meanwhile is still to be read. Otherwise every worker would be silent at once.
            let before = std::mem::replace(&mut woke, self.now());
            let late = (woke - before).saturating_sub(sleep);
            if late > self.core.heartbeat_timeout() / 3 {
                tracing::warn!("the coordinator stood still for {:.1} s: nobody's silence meanwhile counts", late.as_secs_f64());
                if let Some(outcome) = self.tell(Event::Stalled { by: late }) {
                    return Ending::Over(outcome);
                }
            }
            let ending = match turn {
                Turn::Command(Some(command)) => self.carry_out(command),
                Turn::Command(None) => Some(Ending::Over(Outcome::Failed { reason: "the coordinator's services ended".into() })),
                Turn::Flush => None,
                Turn::Tick => self.tick(),
            };
            // A step's commit may wait for others, but not for long.
            let is_due = self.journal.flush_at().is_some_and(|at| at <= Instant::now());
            let flushed = if is_due { self.journal.flush() } else { Ok(()) };
            if let Some(ending) = ending.or_else(|| flushed.err().map(|error| Ending::Over(not_written(&error)))) {
                return ending;
            }
        }
    }

    /// Carries a command out; how the run ends, if it does now.
    fn carry_out(&mut self, command: Command) -> Option<Ending> {
        if matches!(command, Command::GoAway) {
            return Some(match self.journal.flush() {
                Ok(()) => Ending::Away,
                Err(error) => Ending::Over(not_written(&error)),
            });
        }
        self.handle(command).map(Ending::Over)
    }

    /// Looks at the clock, after all that has been said: where many ask for leases at once, the disk makes what they said wait, and a sign
    /// of life that waits is no silence.
    fn tick(&mut self) -> Option<Ending> {
        for _ in 0..MAX_CAUGHT_UP {
            let Ok(command) = self.commands.try_recv() else { break };
            let ending = self.carry_out(command);
            if ending.is_some() {
                return ending;
            }
        }
        self.tell(Event::Tick).map(Ending::Over)
    }

    /// Answers who asks about a job that is over, for as long as anybody can ask. Workers that come now are told that none is needed.
    pub async fn answer(&mut self) {
        // Those that are still connected have read why they are to leave.
        self.streams.clear();
        while let Some(command) = self.commands.recv().await {
            self.handle(command);
        }
    }

    /// Ends the display: what the job came to, if a step became final.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        self.observer.finish()
    }

    fn now(&self) -> Timestamp {
        self.started.elapsed()
    }

    fn handle(&mut self, command: Command) -> Option<Outcome> {
        match command {
            Command::Hello { hello, outbound, reply } => {
                let stream = StreamId(self.next_stream);
                self.next_stream += 1;
                self.arriving.insert(stream, outbound);
                let result = self.event(Event::Hello { stream, hello });
                self.arriving.remove(&stream);
                let attached = self.streams.iter().find(|(_, (attached, _))| *attached == stream).map(|(&worker, _)| worker);
                let (answer, outcome) = match (result, attached) {
                    (Ok(outcome), Some(worker)) => (Ok((worker, stream)), outcome),
                    (Ok(outcome), None) => (Err(CoreError::StaleStream), outcome),
                    (Err(error), _) => (Err(error), None),
                };
                match reply.send(answer) {
                    // Its caller is gone already, and nobody else would notice: the same worker would be refused until its ghost is silent
                    // enough.
                    Err(Ok((worker, stream))) if outcome.is_none() => {
                        self.tell(Event::Closed { worker, stream, cause: "its connection ended before it was let in".into() })
                    }
                    _ => outcome,
                }
            }
            Command::Within { span, command } => span.in_scope(|| self.handle(*command)),
            Command::Tell(event) => self.tell(event),
            // Taken before it gets here.
            Command::GoAway => None,
            Command::Yield { reason } => Some(Outcome::Failed { reason }),
            Command::RecordsOf { step, generation, reply } => {
                match self.frozen.get(&(step, generation)) {
                    Some(ledger) => {
                        // No checkpoint may know more than the journal.
                        if let Err(error) = self.journal.flush() {
                            return Some(not_written(&error));
                        }
                        drop(reply.send(Ok(self.records_of(step, ledger))));
                    }
                    None if generation != self.core.generation() => {
                        drop(reply.send(Err(format!("{generation} is over and step {step} is not on its line"))))
                    }
                    None if step <= self.core.final_step() => drop(reply.send(Err(not_awaited(step)))),
                    None => {
                        // Some may have given up meanwhile.
                        self.waiters.retain(|(_, _, reply)| !reply.is_closed());
                        self.waiters.push((step, generation, reply));
                    }
                }
                None
            }
            Command::Stored { step, generation, reply } => {
                let stays = self.core.awaits_checkpoint(step, generation);
                let outcome = self.tell(Event::CheckpointStored { step, generation });
                let _ = reply.send(stays);
                outcome
            }
            Command::Ping { reply } => {
                let _ = reply.send(());
                None
            }
            Command::Status { reply } => {
                let _ = reply.send(self.status());
                None
            }
            Command::Look { reply } => {
                let _ = reply.send(Box::new(self.look()));
                None
            }
            Command::Ended { reply } => {
                self.tell_the_end(reply);
                None
            }
            Command::Drawn { step, index, png } => {
                self.observer.drawn(step, index, &png);
                None
            }
            Command::Shards { source, epoch, skip, limit, reply } => {
                let _ = reply.send(self.core.shards(source, epoch, skip, limit));
                None
            }
            Command::Drain { rank, reply } => {
                let (answer, outcome) = match self.event(Event::Drain { rank }) {
                    Ok(outcome) => (Ok(()), outcome),
                    Err(error) => (Err(error), None),
                };
                let _ = reply.send(answer);
                outcome
            }
        }
    }

    /// Hands an event on, after the shell's own part in it.
    fn tell(&mut self, event: Event) -> Option<Outcome> {
        let speaker = match &event {
            Event::Message { worker, .. } => Some(*worker),
            Event::Closed { worker, stream, .. } => {
                if self.streams.get(worker).is_some_and(|(current, _)| current == stream) {
                    self.streams.remove(worker);
                }
                None
            }
            Event::CheckpointStored { step, generation } | Event::CheckpointFailed { step, generation, .. } => {
                self.frozen.remove(&(*step, *generation));
                if matches!(event, Event::CheckpointStored { .. }) && self.core.awaits_checkpoint(*step, *generation) {
                    self.frozen.retain(|(frozen, _), _| frozen > step);
                }
                None
            }
            _ => None,
        };
        let timed = match &event {
            Event::Message { worker, message: FromWorker::StepReport(report), .. } => Some((*worker, report.timings)),
            _ => None,
        };
        let holds = match &event {
            Event::Message { worker, message: FromWorker::Heartbeat(beat), .. } => Some((*worker, beat.memory)),
            _ => None,
        };
        match (self.event(event), speaker) {
            (Ok(outcome), _) => {
                if let Some((worker, timings)) = timed {
                    self.observer.timed(worker, timings);
                }
                if let Some((worker, memory)) = holds {
                    self.observer.holds(worker, memory);
                }
                outcome
            }
            (Err(error), Some(worker)) => self.refuse(worker, &error),
            (Err(error), None) => {
                tracing::warn!("{error}");
                None
            }
        }
    }

    /// A message the rules refuse: late ones are normal, others show a broken worker.
    fn refuse(&mut self, worker: WorkerId, error: &CoreError) -> Option<Outcome> {
        match error {
            CoreError::StaleGeneration { .. } | CoreError::StaleStream => tracing::debug!("{worker}: {error}"),
            CoreError::ModelsDiffer { .. } => {
                tracing::error!("{error}");
                self.send(worker, ToWorker::Stop { reason: StopReason::Failed, message: error.to_string() });
                self.streams.remove(&worker);
            }
            _ => tracing::warn!("{error}"),
        }
        None
    }

    /// Applies an event and carries out its effects in order.
    fn event(&mut self, event: Event) -> Result<Option<Outcome>, CoreError> {
        let effects = self.core.step(self.now(), event)?;
        let mut outcome = None;
        for effect in effects {
            match effect {
                Effect::Attach { worker, stream } => {
                    if let Some(outbound) = self.arriving.remove(&stream) {
                        self.streams.insert(worker, (stream, outbound));
                    }
                }
                Effect::Send { worker, message } => {
                    // The workers forget the names of steps at this word.
                    if matches!(message, ToWorker::Durable { .. })
                        && let Err(error) = self.journal.flush()
                    {
                        return Ok(Some(not_written(&error)));
                    }
                    self.send(worker, message);
                }
                Effect::Detach { worker } => drop(self.streams.remove(&worker)),
                Effect::Persist(fact) => {
                    if let Err(error) = self.journal.append(&fact) {
                        return Ok(Some(not_written(&error)));
                    }
                }
                Effect::Committed { record, timings } => {
                    // A step that is final without a word of its copy, as the report of it was lost.
                    self.refuse_waiters(|step, generation| generation == record.generation && step <= record.step, not_awaited);
                    self.observer.committed(&record, timings);
                }
                Effect::Validated(losses) => self.observer.validated(&losses),
                Effect::Freeze { step, generation, ledger } => {
                    if let Err(error) = self.journal.flush() {
                        return Ok(Some(not_written(&error)));
                    }
                    self.freeze(step, generation, &ledger);
                }
                Effect::Void { generation, after } => self.void(generation, after),
                Effect::Notice(notice) => self.observer.notice(&notice),
                Effect::Finish(reached) => outcome = Some(reached),
            }
        }
        while let Some((step, generation)) = self.evicted.pop() {
            let error = format!("{MAX_FROZEN} later ones are on their way");
            outcome = outcome.or(self.event(Event::CheckpointFailed { step, generation, error })?);
        }
        self.observer.activity(self.core.activity());
        if self.journal.is_long()
            && let Err(error) = self.journal.compact(&self.core.durable())
        {
            return Ok(Some(not_written(&error)));
        }
        Ok(outcome)
    }

    fn send(&mut self, worker: WorkerId, message: ToWorker) {
        let Some((_, outbound)) = self.streams.get(&worker) else { return };
        // A worker that does not read is as good as gone; its stream's end says so to the core.
        if let Err(error) = outbound.try_send(message) {
            tracing::debug!("{worker} takes no messages: {error}");
            self.streams.remove(&worker);
        }
    }

    fn freeze(&mut self, step: Step, generation: Generation, ledger: &Arc<Ledger>) {
        self.frozen.insert((step, generation), ledger.clone());
        while self.frozen.len() > MAX_FROZEN {
            self.evicted.extend(self.frozen.pop_first().map(|(key, _)| key));
        }
        let records = self.records_of(step, ledger);
        for (_, _, reply) in self.waiters.extract_if(.., |(s, g, _)| (*s, *g) == (step, generation)) {
            let _ = reply.send(Ok(records.clone()));
        }
    }

    fn records_of(&self, step: Step, ledger: &Arc<Ledger>) -> Records {
        Records { ledger: ledger.clone(), validation: self.core.validation().filter(|losses| losses.step <= step) }
    }

    fn void(&mut self, generation: Generation, after: Step) {
        self.frozen.retain(|&(step, frozen), _| frozen != generation || step <= after);
        let is_void = |step: Step, waiting: Generation| waiting == generation && step > after;
        self.refuse_waiters(is_void, |step| format!("step {step} of {generation} is void: the job goes on from step {after}"));
    }

    /// Answers those who wait for records that will never be.
    fn refuse_waiters(&mut self, of: impl Fn(Step, Generation) -> bool, why: impl Fn(Step) -> String) {
        let frozen = &self.frozen;
        let is_refused = |step: Step, generation: Generation| of(step, generation) && !frozen.contains_key(&(step, generation));
        for (step, _, reply) in self.waiters.extract_if(.., |(step, generation, _)| is_refused(*step, *generation)) {
            let _ = reply.send(Err(why(step)));
        }
    }

    fn status(&self) -> Status {
        let ledger = self.core.ledger();
        let epoch = ledger.first_open_epoch();
        Status {
            state: self.core.state(),
            generation: self.core.generation(),
            final_step: self.core.final_step(),
            workers: self.core.workers(self.now()),
            epoch: epoch.0,
            shards_done: ledger.num_done(epoch),
            shards_leased: self.core.num_leased(),
            totals: ledger.totals(),
            sources: self.core.sources(),
            checkpoint_step: self.core.checkpoint_step(),
            validation: self.core.validation(),
            first_failure: self.core.failure().cloned(),
            first_failure_ago: self.core.failure().and_then(|first| Some(self.now().saturating_sub(first.at?))),
        }
    }
}

fn not_awaited(step: Step) -> String {
    format!("no copy of step {step} is awaited")
}

fn not_written(error: &JournalError) -> Outcome {
    Outcome::Failed { reason: error.to_string() }
}

/// Sleeps until then, or for ever.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
