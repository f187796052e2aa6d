//! A generation's steps, what is done of the weights between them, and what is left to do after the last.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use peapod_collective::{AbortHandle, Collective};
use peapod_model::optim::clip_grad_norm;
use peapod_model::panics::is_out_of_memory;
use peapod_proto::ids::{Generation, MemberIndex, Step};
use peapod_proto::message::{Assignment, Phase, StepLosses, StepRecord, StepReport, StepTimings, StopCause};
use tch::Tensor;

use super::ahead::{Ahead, Preparation, Prepared};
use super::copying::Copying;
use super::ended::Ended;
use super::rounds::{Drawn, Due, Unfinished, means};
use super::state::TrainState;
use super::step::Pass;
use super::wire::Wire;
use super::{Output, Trainer, guarded};
use crate::lifecycle::TrainerEvent;
use crate::loss_scale::LossScale;
use crate::tail::{Contribution, Outcome, TailLayout, ValidationTotals, share_of};

/// A collective that takes longer than this is stuck for a reason that nobody else noticed.
pub const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(600);
/// As much longer it may take for each validation or set of pictures before it: a member with less to do waits in it for the others.
const ROUND_TIMEOUT: Duration = Duration::from_secs(600);
/// Pictures on their way hold up the end of a generation for this long at most: less than the others are waited for.
const LAST_PICTURES_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks at whether the wait for them is broken off.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A member's place in a generation.
#[derive(Clone, Copy)]
struct Place<'a> {
    assignment: &'a Assignment,
    abort: &'a AbortHandle,
    layout: TailLayout,
}

impl Place<'_> {
    /// Samples that this member trains in a step.
    fn owed(&self) -> usize {
        share_of(self.assignment.global_batch, self.assignment.member_index, self.assignment.num_members) as usize
    }
}

/// What was done of the weights between two steps.
#[derive(Default)]
struct Round {
    due: Due,
    validation: ValidationTotals,
    validating: Duration,
    sampling: Duration,
}

impl Round {
    /// Until when the all-reduce after it may take.
    fn deadline(&self) -> Instant {
        Instant::now() + COLLECTIVE_TIMEOUT + ROUND_TIMEOUT * self.due.count()
    }
}

/// Waits until nobody can send any more, for a while or until the generation is aborted.
fn wait_for_the_other_end(pending: &Receiver<()>, abort: &AbortHandle) {
    let deadline = Instant::now() + LAST_PICTURES_TIMEOUT;
    while pending.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) && abort.reason().is_none() {
        if Instant::now() >= deadline {
            tracing::warn!("the last pictures are still being sent and are not waited for");
            return;
        }
    }
}

impl Trainer {
    /// Steps until the generation ends.
    pub(super) fn steps(&mut self, assignment: &Assignment, abort: &AbortHandle, mut collective: Box<dyn Collective>) -> Ended {
        let layout = TailLayout::new(assignment.num_members, assignment.global_batch);
        let place = Place { assignment, abort, layout };
        let num_parameters = self.state.as_ref().map_or(0, |state| state.adapter.num_parameters());
        let mut wire = Wire::new(num_parameters, layout.len(), self.context.device, collective.sums_on_device());
        self.progress.begin(assignment, place.owed());
        loop {
            match self.step(place, collective.as_mut(), &mut wire) {
                Ok(None) => {}
                Ok(Some(cause)) => return Ended::Orderly(cause, self.finish(place, collective.as_mut(), &mut wire, cause)),
                Err(ended) => return ended,
            }
        }
    }

    /// One step; says when it was the generation's last.
    fn step(&mut self, place: Place<'_>, collective: &mut dyn Collective, wire: &mut Wire) -> Result<Option<StopCause>, Ended> {
        let Place { assignment, layout, .. } = place;
        let generation = assignment.generation;
        let before = self.state.as_ref().map_or(Step(0), |state| state.step);

        // 0. What is due of the weights as they are. The data threads read on meanwhile.
        let round = self.round(place, self.rounds.due(before))?;
        let step = before.next();
        let clock = Instant::now();

        // 1. Samples.
        self.context.control.enter(Phase::Data);
        self.context.faults.in_data(step, place.abort);
        let (share, first) = self.next_share(place)?.into_parts();
        let data = clock.elapsed();

        // 2. Gradient of this share. From here until the sum has arrived, the share is in flight.
        self.in_flight = Some((step, share));
        let mut contribution = self.compute(place, step, first, wire)?;
        contribution.change = self.context.control.change_is_asked(generation);
        contribution.validation = round.validation;
        layout.write(wire.tail_mut(), step, assignment.member_index, &contribution);
        let compute = clock.elapsed();

        // 3. The sum over all members.
        self.context.control.enter(Phase::Collective);
        let reduced = wire.sum(collective, round.deadline());
        reduced.map_err(|error| Ended::within(collective, error))?;
        let outcome = layout.read(wire.tail(), step).map_err(|error| Ended::broken(error.to_string()))?;
        self.in_flight = None;
        let reduced = clock.elapsed();
        let validation = means(before, &outcome.validation);
        if outcome.names.is_empty() {
            self.last_validation = validation;
            return Ok(Some(StopCause::DataDone));
        }

        // 4. The update, only now that the sum is known to be whole.
        self.finish_copy()?;
        self.context.control.enter(Phase::Update);
        let state = self.state.as_mut().ok_or_else(Ended::no_state)?;
        let learning_rate = self.schedule.rate(state.step.0);
        let updated = update(state, wire.gradient(), &outcome, learning_rate, self.context.job.train.max_grad_norm);
        let (grad_norm, skipped) = updated.map_err(|error| Ended::Failed { phase: "update", message: error.to_string() })?;
        state.step = step;
        state.generation = generation;
        self.context.control.set_step(step);
        let done = clock.elapsed();
        tracing::debug!("applied step {step} in {generation}, of {} members", assignment.num_members);

        let record = StepRecord { validation, ..record(step, generation, &outcome, grad_norm, learning_rate, skipped) };
        self.progress.applied(&record);
        let timings = StepTimings {
            data: data.as_secs_f32(),
            compute: (compute - data).as_secs_f32(),
            collective: (reduced - compute).as_secs_f32(),
            update: (done - reduced).as_secs_f32(),
            validation: round.validating.as_secs_f32(),
            sampling: round.sampling.as_secs_f32(),
        };
        self.report(assignment.member_index, record, timings)?;
        if self.context.job.last_step() == Some(step.0) {
            return Ok(Some(StopCause::StepsDone));
        }
        Ok(outcome.change.then_some(StopCause::Planned))
    }

    /// The gradient of the share in flight, in the wire, and what the tail will say of it.
    fn compute(&mut self, place: Place<'_>, step: Step, mut first: Option<Prepared>, wire: &mut Wire) -> Result<Contribution, Ended> {
        self.enter_compute();
        self.context.faults.in_compute(step);
        loop {
            match self.pass(place, step, first.take(), wire) {
                Ok(Some(contribution)) => return Ok(contribution),
                Ok(None) => return Err(Ended::broken(place.abort.reason().unwrap_or("aborted").to_owned())),
                Err(problem) if is_out_of_memory(&problem) && self.parts < self.context.job.train.micro_batch as usize => {
                    self.parts *= 2;
                    tracing::warn!(
                        "out of memory: micro-batches of {} are computed in {} parts from here on, with the same result; a smaller \
                         train.micro_batch or train.gradient_checkpointing = true saves this step's repetition ({})",
                        self.context.job.train.micro_batch,
                        self.parts,
                        problem.lines().next().unwrap_or_default()
                    );
                    peapod_kernels::release_unused_memory(self.context.device);
                    // Other shapes take long the first time.
                    self.context.control.enter(Phase::Warming);
                }
                Err(message) => return Err(Ended::Failed { phase: "compute", message }),
            }
        }
    }

    /// Says what comes: the first pass over pictures of a size, or so many of them, may take long.
    fn enter_compute(&mut self) {
        let on_gpu = self.context.device.is_cuda();
        let mut is_new = false;
        for batch in self.in_flight.iter().flat_map(|(_, share)| &share.batches) {
            // The teacher sees only those that are not native. It matters on GPUs alone, which choose their algorithms by it.
            let num_taught = batch.samples.iter().filter(|sample| on_gpu && !sample.native).count();
            is_new |= self.sizes_seen.insert((batch.bucket, batch.samples.len(), num_taught));
        }
        self.context.control.enter(if is_new { Phase::Warming } else { Phase::Compute });
    }

    /// One pass over the share in flight; nothing if it is broken off. The next share is taken meanwhile.
    ///
    /// # Errors
    /// The models', or a panic's message.
    fn pass(&mut self, place: Place<'_>, step: Step, first: Option<Prepared>, wire: &mut Wire) -> Result<Option<Contribution>, String> {
        let (Some(state), Some((_, share))) = (&self.state, &self.in_flight) else { return Err("no state".into()) };
        let (models, loader, ahead, faults) = (&self.models, &mut self.loader, &mut self.ahead, &self.context.faults);
        let (device, scale) = (self.context.device, state.loss_scale.as_ref().map_or(1.0, LossScale::factor));
        let preparation = Preparation { models, device, encoding: &self.encoding };
        let pass = Pass { preparation, adapter: &state.adapter, scale, parts: self.parts, abort: place.abort };
        // A GPU would wait for the next step's first batch after the update, were it put together only then.
        let meanwhile = || {
            if ahead.is_none()
                && let Some(share) = loader.share_ahead(place.owed())
            {
                ahead.insert(share.into()).prepare(&preparation);
            }
        };
        guarded(|| {
            let gradient = wire.gradient();
            let _ = gradient.f_zero_()?;
            faults.in_pass(step);
            pass.accumulate(share, first, gradient, meanwhile)
        })?
        .map_err(|error| error.to_string())
    }

    /// The share of a step: the one that was taken ahead in this generation, or else the loader's next.
    fn next_share(&mut self, place: Place<'_>) -> Result<Ahead, Ended> {
        let broken = || Ended::broken("aborted while waiting for samples".into());
        match self.ahead.take_if(|_| place.abort.reason().is_none()) {
            Some(ahead) => Ok(ahead),
            None if self.ahead.is_some() => Err(broken()),
            None => self.loader.next_share(place.owed()).map(Ahead::from).map_err(|error| match error {
                peapod_data::Error::Cancelled => broken(),
                error @ peapod_data::Error::Recipe(_) => Ended::Unfit { phase: "data", message: error.to_string() },
                error => Ended::Failed { phase: "data", message: error.to_string() },
            }),
        }
    }

    /// Does what is due of the weights between two steps.
    fn round(&mut self, place: Place<'_>, due: Due) -> Result<Round, Ended> {
        let mut round = Round { due, ..Round::default() };
        if due == Due::default() {
            return Ok(round);
        }
        let Place { assignment, abort, .. } = place;
        let state = self.state.as_ref().ok_or_else(Ended::no_state)?;
        let go_on = || abort.reason().is_none();
        let broken_off = || Ended::broken(abort.reason().unwrap_or("aborted").to_owned());
        let average = state.average().map_err(|error| Ended::Failed { phase: "validating", message: error.to_string() })?;
        let (models, adapter) = (&self.models, average.as_ref().unwrap_or(&state.adapter));
        if due.validation {
            self.context.control.enter(Phase::Validating);
            let clock = Instant::now();
            let failed = |message| Ended::Failed { phase: "validating", message };
            match guarded(|| self.rounds.validate(models, adapter, assignment, go_on)) {
                Ok(Ok(totals)) => round.validation = totals,
                Ok(Err(Unfinished::BrokenOff)) => return Err(broken_off()),
                Ok(Err(Unfinished::Failed(error))) => return Err(failed(error.to_string())),
                Err(panic) => return Err(failed(panic)),
            }
            round.validating = clock.elapsed();
        }
        if due.pictures {
            self.context.control.enter(Phase::Sampling);
            let clock = Instant::now();
            let (sent, pending) = channel();
            let keep = |index, png| {
                let drawn = Drawn { generation: assignment.generation, step: state.step, index, png, sent: sent.clone() };
                (self.context.output)(Output::Picture(Box::new(drawn)));
            };
            let message = match guarded(|| self.rounds.draw(models, adapter, state.step, assignment, go_on, keep)) {
                Ok(Ok(())) => None,
                Ok(Err(Unfinished::BrokenOff)) => return Err(broken_off()),
                Ok(Err(Unfinished::Failed(error))) => Some(error.to_string()),
                Err(panic) => Some(panic),
            };
            // Training needs no picture: the next time may go better.
            if let Some(message) = message {
                let first = message.lines().next().unwrap_or_default();
                tracing::warn!("pictures of step {} are not drawn: {first}", state.step);
            }
            round.sampling = clock.elapsed();
            self.pending = Some(pending);
        }
        Ok(round)
    }

    /// What is left to do after a generation's last step; returns what went wrong in it.
    ///
    /// The weights are final whatever happens here: nothing of it may look like a step that failed.
    fn finish(&mut self, place: Place<'_>, collective: &mut dyn Collective, wire: &mut Wire, cause: StopCause) -> String {
        let step = self.state.as_ref().map_or(Step(0), |state| state.step);
        // The number of the exchange is one that no all-reduce of this generation has had.
        let (due, number) = match cause {
            StopCause::StepsDone => (self.rounds.due_at_the_end(), step.next()),
            // The all-reduce that found no sample left has carried what was due anyway.
            StopCause::DataDone => (self.rounds.due_at_the_end().without(self.rounds.due(step)), step.next().next()),
            StopCause::Planned | StopCause::Aborted => (Due::default(), step),
        };
        let round = self.round(place, due);
        if let Some(pending) = self.pending.take() {
            wait_for_the_other_end(&pending, place.abort);
        }
        if due == Due::default() {
            return String::new();
        }
        match round.and_then(|round| self.last_exchange(place, collective, wire, number, &round)) {
            Ok(totals) => {
                self.last_validation = means(step, &totals).or(self.last_validation.take());
                String::new()
            }
            Err(Ended::Broken { reason, .. }) => reason,
            Err(Ended::Failed { phase, message }) => format!("{phase}: {message}"),
            Err(Ended::Unfit { message, .. }) => message,
            Err(Ended::Orderly(..)) => String::new(),
        }
    }

    /// An all-reduce that carries no sample and no gradient, only what the members found out about the last weights. It also keeps them
    /// together until the slowest has drawn its pictures.
    fn last_exchange(
        &self,
        place: Place<'_>,
        collective: &mut dyn Collective,
        wire: &mut Wire,
        number: Step,
        round: &Round,
    ) -> Result<ValidationTotals, Ended> {
        self.context.control.enter(Phase::Collective);
        wire.clear().map_err(Ended::by)?;
        let contribution = Contribution { validation: round.validation, ..Contribution::default() };
        place.layout.write(wire.tail_mut(), number, place.assignment.member_index, &contribution);
        wire.sum(collective, round.deadline()).map_err(Ended::by)?;
        let outcome = place.layout.read(wire.tail(), number).map_err(|error| Ended::broken(error.to_string()))?;
        Ok(outcome.validation)
    }

    /// Tells the coordinator of an applied step; where a checkpoint is due, from the thread that copies the weights.
    fn report(&mut self, member: MemberIndex, record: StepRecord, timings: StepTimings) -> Result<(), Ended> {
        let (step, generation, began) = (record.step, record.generation, Instant::now());
        let scheduled = step.0.is_multiple_of(self.context.job.checkpoint.every_steps);
        let asked = self.context.control.take_snapshot_request(generation);
        let report = StepReport { generation, step, record: Some(record), timings, snapshot: None };
        if !scheduled && !asked {
            self.event(TrainerEvent::Step(report));
            return Ok(());
        }
        let state = self.state.as_ref().ok_or_else(Ended::no_state)?;
        let failed = |message: String| Ended::Failed { phase: "snapshot", message };
        let view = state.view(generation).map_err(|error| failed(error.to_string()))?;
        let copying = Copying::start(view, report, member == MemberIndex(0), self.context.output.clone(), began);
        self.copying = Some(copying.map_err(failed)?);
        Ok(())
    }

    pub(super) fn finish_copy(&mut self) -> Result<(), Ended> {
        let Some(copying) = self.copying.take() else { return Ok(()) };
        self.context.control.enter(Phase::Snapshot);
        copying.finish().map_err(|message| Ended::Failed { phase: "snapshot", message })
    }
}

/// Applies the mean gradient; a step that is not finite leaves the weights as they are, on all ranks alike.
fn update(
    state: &mut TrainState,
    gradient: &mut Tensor,
    outcome: &Outcome,
    learning_rate: f64,
    max_grad_norm: f64,
) -> peapod_model::Result<(f64, bool)> {
    let _ = gradient.f_div_scalar_(outcome.names.len() as f64)?;
    let limit = if max_grad_norm > 0.0 { max_grad_norm } else { f64::INFINITY };
    let norm = clip_grad_norm(gradient, limit)?;
    if let Some(scale) = &mut state.loss_scale {
        scale.update(!outcome.not_finite && norm.is_finite());
    }
    if outcome.not_finite || !norm.is_finite() {
        return Ok((norm, true));
    }
    state.optimizer.step(state.adapter.flat(), gradient, learning_rate)?;
    if let Some(ema) = &mut state.ema {
        ema.update(state.adapter.flat())?;
    }
    Ok((norm, false))
}

fn record(step: Step, generation: Generation, outcome: &Outcome, grad_norm: f64, learning_rate: f64, skipped: bool) -> StepRecord {
    let count = outcome.names.len() as f32;
    StepRecord {
        step,
        generation,
        names: outcome.names.clone(),
        native: outcome.native,
        skipped,
        losses: StepLosses {
            task: outcome.losses.task / count,
            logit: outcome.losses.logit / count,
            feature: outcome.losses.feature / count,
            grad_norm: grad_norm as f32,
            learning_rate: learning_rate as f32,
        },
        validation: None,
    }
}
