//! The coordinator's process: what `coordinator::driver`, `service` and `run` do around the real [`Core`], in their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use peapod_coordinator::core::ledger::Ledger;
use peapod_coordinator::core::order::Source;
use peapod_coordinator::core::{Config, Core, CoreError, Effect, Event as CoreEvent, Notice, Outcome, StreamId};
use peapod_proto::ids::{Generation, Step, WorkerId};
use peapod_proto::message::{Hello, ToWorker};

use super::network::{Down, SOON, StreamKey, Up};
use super::queue::{Time, ms};
use super::uploads::Stage;
use super::{Event, ProcessId, World};

/// Frozen ledgers that wait for their parts.
const MAX_FROZEN: usize = 4;
/// Events at one moment after which something goes round in circles.
const MANY: u32 = 20_000;

/// What becomes of a hello.
#[derive(Debug)]
pub enum Answer {
    /// A stream.
    Welcome(StreamKey),
    /// No: the worker's exit code, and why.
    Refused {
        /// Its code.
        code: u8,
        /// Why.
        why: String,
    },
    /// Nobody answers, or not now.
    Later,
}

/// A coordinator process.
pub struct Coordinator {
    /// Which start it is.
    pub term: u64,
    /// The rules.
    pub core: Core,
    started: Time,
    next_stream: u64,
    streams: BTreeMap<WorkerId, StreamKey>,
    /// Ledgers of steps that were copied for a checkpoint.
    pub frozen: BTreeMap<(Step, Generation), Arc<Ledger>>,
    /// Uploads that wait for theirs.
    pub waiters: Vec<(Step, Generation, usize)>,
    /// It dies after so many more effects.
    pub crash_after: Option<u32>,
    /// It is stopped until then, and takes its messages as much later.
    pub paused_until: (Time, Duration),
    tick_at: Option<Time>,
    flush_at: Option<Time>,
    ticks_now: (Time, u32),
}

impl World {
    /// The number of this start, if it still runs.
    pub(super) fn term(&self) -> Option<u64> {
        self.coordinator.as_ref().map(|coordinator| coordinator.term)
    }

    // ---- start and end ----

    pub(super) fn start_coordinator(&mut self) {
        if self.coordinator.is_some() || self.outcome.is_some() {
            return;
        }
        if self.journal.on_disk.as_ref().is_some_and(|(_, _, state)| state.outcome().is_some()) {
            // It may have died just after it had written that the job is over.
            self.operator_resumes();
        }
        let world_size = self.operator.world_size;
        let resume = self.store.newest();
        if let Some((resume, stored)) = &resume
            && let Err(problem) = self.checks.agrees(&stored.weights, &resume.ledger)
        {
            return self.fail(format!("the checkpoint of step {}, from which the job goes on, is not whole: {problem}", resume.step));
        }
        let resume = resume.map(|(resume, _)| resume);
        let last_generation = self.journal.on_disk.as_ref().map_or(Generation::NONE, |(_, _, state)| state.generation());
        let found = self.journal.on_disk.clone().filter(|(_, _, state)| state.outcome().is_none());
        let found = found.filter(|(_, before, state)| {
            *before == world_size && resume.as_ref().is_none_or(|resume| resume.generation <= state.generation())
        });
        if self.plan.last_step.is_some_and(|last| resume.as_ref().is_some_and(|resume| resume.step >= last)) {
            self.say(|| "the job is finished already".into());
            self.outcome = Some(Outcome::Finished);
            return;
        }
        let job_id = found.as_ref().map_or_else(|| format!("job {}", self.terms + 1), |(job_id, _, _)| job_id.clone());
        let config = self.config(world_size, job_id.clone());
        let core = match found {
            Some((_, _, state)) => Core::restore(config, resume, state),
            None => Core::new(config, resume).after(last_generation),
        };
        self.terms += 1;
        let term = self.terms;
        self.say(|| format!("coordinator starts, term {term}, {job_id}, step {}", core.final_step()));
        self.checks.go_back_to(core.final_step());
        self.journal.begin(job_id, world_size, core.durable());
        self.coordinator = Some(Coordinator {
            term,
            core,
            started: self.now,
            next_stream: 1,
            streams: BTreeMap::new(),
            frozen: BTreeMap::new(),
            waiters: Vec::new(),
            crash_after: None,
            paused_until: (Time::ZERO, Duration::ZERO),
            tick_at: None,
            flush_at: None,
            ticks_now: (Time::ZERO, 0),
        });
        self.operator_stops();
        self.set_alarms();
    }

    fn config(&self, world_size: u32, job_id: String) -> Config {
        Config {
            world_size,
            min_world_size: self.plan.min_world_size.min(world_size),
            heartbeat_timeout: self.plan.heartbeat_timeout,
            join_timeout: self.plan.join_timeout,
            data_patience: Duration::from_secs(60),
            job_id,
            job_toml: String::new(),
            seed: 1,
            shards: (0..self.plan.shards.len()).map(|shard| format!("{shard}.tar")).collect(),
            sources: Arc::new([Source::unnamed(self.plan.shards.len() as u32)]),
            epochs: self.plan.epochs,
            last_step: self.plan.last_step,
            workers_are_alike: false,
            global_batch: self.plan.global_batch,
            scale_batch: self.plan.scale_batch,
            checkpoint_every: self.plan.checkpoint_every,
            max_bad_fraction: 1.0,
            max_skipped_steps: 1000,
        }
    }

    /// The process dies with what is not on disk.
    pub(super) fn crash(&mut self) {
        let Some(coordinator) = self.coordinator.take() else { return };
        self.say(|| "coordinator dies".into());
        self.journal.lose_pending();
        self.end_streams(coordinator.term);
        self.coordinator_comes_back(self.restart_after);
    }

    /// SIGTERM: it goes, the job stays.
    pub(super) fn go_away(&mut self) {
        let Some(coordinator) = self.coordinator.take() else { return };
        self.say(|| "coordinator goes away".into());
        let written = self.journal.agrees(&coordinator.core.durable()).and_then(|()| self.journal.flush());
        if let Err(problem) = written {
            return self.fail(problem);
        }
        self.end_streams(coordinator.term);
    }

    fn end_streams(&mut self, term: u64) {
        let of_it: Vec<StreamKey> = (0..self.streams.len()).filter(|&stream| self.streams[stream].term == term).collect();
        of_it.into_iter().for_each(|stream| self.break_stream(stream, SOON));
    }

    /// The driver has come to its end: what was said arrives, then the streams end.
    fn over(&mut self, outcome: Outcome) {
        let Some(coordinator) = self.coordinator.take() else { return };
        self.say(|| format!("coordinator ends: {outcome:?}"));
        if let Err(problem) = self.journal.flush() {
            return self.fail(problem);
        }
        let of_it: Vec<StreamKey> = (0..self.streams.len()).filter(|&stream| self.streams[stream].term == coordinator.term).collect();
        of_it.into_iter().for_each(|stream| self.send_down(stream, Down::End("it closed the connection")));
        self.operator_sees_outcome(outcome, coordinator.core.first_failure().map(str::to_owned));
    }

    // ---- the driver's loop ----

    /// Wakes the driver for its next deadline and its next flush.
    pub(super) fn set_alarms(&mut self) {
        let flush_at = self.journal.flush_at();
        let Some(coordinator) = &mut self.coordinator else { return };
        let term = coordinator.term;
        if let Some(deadline) = coordinator.core.next_deadline() {
            let at = (coordinator.started + deadline).max(self.now);
            if coordinator.tick_at.is_none_or(|set| at < set) {
                coordinator.tick_at = Some(at);
                self.queue.push(at, Event::Tick { term, at });
            }
        }
        if let Some(at) = flush_at.filter(|_| coordinator.flush_at.is_none()) {
            coordinator.flush_at = Some(at);
            self.queue.push(at, Event::Flush { term });
        }
    }

    pub(super) fn tick(&mut self, term: u64, at: Time) {
        let Some(coordinator) = self.coordinator.as_mut().filter(|coordinator| coordinator.term == term && coordinator.tick_at == Some(at))
        else {
            return;
        };
        coordinator.tick_at = None;
        if coordinator.ticks_now.0 != self.now {
            coordinator.ticks_now = (self.now, 0);
        }
        coordinator.ticks_now.1 += 1;
        if coordinator.ticks_now.1 > MANY {
            return self.fail("the coordinator's deadline does not pass".into());
        }
        if coordinator.core.next_deadline().is_some_and(|deadline| coordinator.started + deadline <= self.now) {
            self.tell(CoreEvent::Tick);
        }
        self.set_alarms();
    }

    /// The driver sees that it stood still, before it looks at anything else.
    pub(super) fn thaw(&mut self, term: u64, stood_still: Duration) {
        if self.term() == Some(term) && stood_still > self.plan.heartbeat_timeout / 3 {
            self.tell(CoreEvent::Stalled { by: stood_still });
        }
    }

    pub(super) fn flush(&mut self, term: u64) {
        if self.term() == Some(term) {
            if let Some(coordinator) = &mut self.coordinator {
                coordinator.flush_at = None;
            }
            if let Err(problem) = self.journal.flush() {
                self.fail(problem);
            }
        }
    }

    pub(super) fn answer_hello(&mut self, process: ProcessId, hello: Hello) -> Answer {
        let Some(coordinator) = &mut self.coordinator else { return Answer::Later };
        let (term, id) = (coordinator.term, StreamId(coordinator.next_stream));
        coordinator.next_stream += 1;
        let stream = self.open_stream(process, term, id);
        self.arriving = Some(stream);
        self.send_down(stream, Down::Joined);
        let result = self.core_event(CoreEvent::Hello { stream: id, hello });
        self.arriving = None;
        let attached = self.streams[stream].worker.is_some();
        let refuse = |code: u8, error: CoreError| Answer::Refused { code, why: error.to_string() };
        match result {
            Ok(()) if attached => return Answer::Welcome(stream),
            Ok(()) => {}
            Err(error @ (CoreError::NoSuchRank { .. } | CoreError::RankTaken { .. } | CoreError::NoRankLeft)) => {
                return refuse(2, error);
            }
            Err(error @ CoreError::Over(_)) => return refuse(0, error),
            Err(error @ (CoreError::Version { .. } | CoreError::ModelsDiffer { .. } | CoreError::Ending(_))) => return refuse(1, error),
            Err(error) => self.say(|| format!("p{process} may not join now: {error}")),
        }
        Answer::Later
    }

    pub(super) fn up_arrives(&mut self, stream: StreamKey, up: Up) {
        if self.term() != Some(self.streams[stream].term) {
            return;
        }
        let Some(worker) = self.streams[stream].worker else { return };
        let id = self.streams[stream].id;
        match up {
            Up::Message(message) => {
                self.say(|| format!("{worker} -> {message:?}"));
                self.tell(CoreEvent::Message { worker, stream: id, message });
            }
            Up::End(cause) => {
                self.say(|| format!("{worker}: {cause}"));
                if let Some(coordinator) = &mut self.coordinator
                    && coordinator.streams.get(&worker) == Some(&stream)
                {
                    coordinator.streams.remove(&worker);
                }
                self.tell(CoreEvent::Closed { worker, stream: id, cause: cause.into() });
            }
        }
    }

    /// Hands an event to the core, with the shell's own part in it.
    pub(super) fn tell(&mut self, event: CoreEvent) {
        if let CoreEvent::CheckpointStored { step, generation } | CoreEvent::CheckpointFailed { step, generation, .. } = &event
            && let Some(coordinator) = &mut self.coordinator
        {
            coordinator.frozen.remove(&(*step, *generation));
        }
        if let Err(error) = self.core_event(event) {
            self.say(|| format!("refused: {error}"));
        }
        self.set_alarms();
    }

    fn core_event(&mut self, event: CoreEvent) -> Result<(), CoreError> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        let effects = coordinator.core.step(self.now - coordinator.started, event)?;
        let mut outcome = None;
        for effect in effects {
            if self.dies_here() {
                self.crash();
                return Ok(());
            }
            if let Effect::Finish(reached) = effect {
                outcome = Some(reached);
            } else if let Err(problem) = self.carry_out(effect) {
                self.fail(problem);
                return Ok(());
            }
        }
        if self.journal.is_long()
            && let Some(state) = self.coordinator.as_ref().map(|coordinator| coordinator.core.durable())
            && let Err(problem) = self.journal.compact(&state)
        {
            self.fail(problem);
        }
        if let Some(outcome) = outcome {
            self.over(outcome);
        }
        Ok(())
    }

    /// Whether a kill that was planned comes now, between two effects.
    fn dies_here(&mut self) -> bool {
        let Some(left) = self.coordinator.as_mut().and_then(|coordinator| coordinator.crash_after.as_mut()) else { return false };
        *left = left.saturating_sub(1);
        *left == 0
    }

    fn carry_out(&mut self, effect: Effect) -> Result<(), String> {
        let Some(coordinator) = &mut self.coordinator else { return Ok(()) };
        match effect {
            Effect::Attach { worker, stream } => {
                if let Some(arriving) = self.arriving.filter(|&arriving| self.streams[arriving].id == stream) {
                    let before = coordinator.streams.insert(worker, arriving);
                    self.streams[arriving].worker = Some(worker);
                    if let Some(before) = before {
                        self.send_down(before, Down::End("it closed the connection"));
                    }
                }
            }
            Effect::Send { worker, message } => {
                // The workers forget the names of steps at this word.
                if matches!(message, ToWorker::Durable { .. }) {
                    self.journal.flush()?;
                }
                self.assigns(worker, &message);
                let Some(coordinator) = &self.coordinator else { return Ok(()) };
                if let Some(&stream) = coordinator.streams.get(&worker) {
                    self.sends(&message)?;
                    self.say(|| format!("{worker} <- {message:?}"));
                    self.send_down(stream, Down::Message(message));
                }
            }
            Effect::Detach { worker } => {
                if let Some(stream) = coordinator.streams.remove(&worker) {
                    self.send_down(stream, Down::End("it closed the connection"));
                }
            }
            Effect::Persist(fact) => {
                self.say(|| format!("on disk: {fact:?}"));
                self.journal.append(self.now, fact)?;
            }
            Effect::Committed { record, .. } => {
                self.checks.committed(&record)?;
                self.say(|| format!("step {} of {} is final: {:?}", record.step, record.generation, record.names));
                self.step_is_final(record.step);
            }
            Effect::Validated(_) => {}
            Effect::Freeze { step, generation, ledger } => {
                self.journal.flush()?;
                coordinator.frozen.insert((step, generation), ledger);
                while coordinator.frozen.len() > MAX_FROZEN {
                    coordinator.frozen.pop_first();
                }
                let waiting: Vec<usize> = coordinator
                    .waiters
                    .extract_if(.., |(at, of, _)| (*at, *of) == (step, generation))
                    .map(|(_, _, upload)| upload)
                    .collect();
                waiting.into_iter().for_each(|upload| self.records_of(upload));
            }
            Effect::Void { generation, after } => {
                coordinator.frozen.retain(|&(step, frozen), _| frozen != generation || step <= after);
                let void: Vec<usize> = coordinator
                    .waiters
                    .extract_if(.., |(step, waiting, _)| *waiting == generation && *step > after)
                    .map(|(_, _, upload)| upload)
                    .collect();
                void.into_iter().for_each(|upload| self.upload_goes_on(upload, Stage::Report { stored: false }, (ms(0), ms(2))));
            }
            Effect::Notice(notice) => {
                self.say(|| format!("says {notice:?}"));
                match notice {
                    Notice::Formed { .. } => self.formed()?,
                    Notice::RolledBack { from, to } => self.rolled_back(from, to)?,
                    _ => {}
                }
            }
            Effect::Finish(_) => {}
        }
        Ok(())
    }
}
