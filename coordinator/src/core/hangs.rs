//! Members that live and do not get on.
//!
//! How long a step may take is learnt from the job's own steps. In a data-parallel step everybody ends up in the all-reduce, and before the
//! first one in meeting the others, waiting for whoever is not there yet: that one is the culprit, and is given up as if it had died. Where
//! all are there and none gets on, it is the network between them, and the generation is left.

use std::collections::VecDeque;
use std::time::Duration;

use peapod_proto::ids::{Step, WorkerId};
use peapod_proto::message::{Heartbeat, Phase, StepTimings, StopReason, ToWorker};

use super::membership::{Worker, WorkerState};
use super::{Core, Effect, JobPhase, Timestamp};

/// Steps that are remembered.
const REMEMBERED: usize = 100;
/// A step may take this many times what the slowest of them took.
const PATIENCE: u32 = 5;
/// Before so many steps are known, of the job and of a worker, nothing can be said about how long one takes.
const LEARNT: usize = 3;
/// What a worker announces may take this long: loading, the first step of a picture size, validation, pictures.
const ANNOUNCED: Duration = Duration::from_secs(600);
/// Whoever is meeting the others may take this long to break that off: NCCL hears of nothing while it explores a host. As the workers have
/// it.
const BREAKING_OFF: Duration = Duration::from_secs(30);
/// A job that is to stop waits for samples for so long.
const WITHOUT_SAMPLES: Duration = Duration::from_secs(10);
/// Meeting the other members and receiving the state from one of them may take this long.
const CONNECTING: Duration = Duration::from_secs(120);
/// The first all-reduce of a generation may take this long: a backend may open its connections in it.
const FIRST_COLLECTIVE: Duration = Duration::from_secs(30);

/// How long the job's steps take.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    last: Option<Timestamp>,
    steps: VecDeque<Duration>,
}

impl Pace {
    /// Nothing is known about how long the next step takes: a generation begins.
    pub fn pause(&mut self) {
        self.last = None;
    }

    /// A step is final. One with a validation or pictures in it says nothing about others.
    pub fn step(&mut self, now: Timestamp, timings: StepTimings) {
        let before = self.last.replace(now);
        let Some(took) = before.map(|before| now.saturating_sub(before)).filter(|_| timings.validation + timings.sampling == 0.0) else {
            return;
        };
        if self.steps.len() == REMEMBERED {
            self.steps.pop_front();
        }
        self.steps.push_back(took);
    }

    /// How long a step may take, once that is known.
    fn limit(&self, heartbeat_timeout: Duration) -> Option<Duration> {
        let slowest = self.steps.iter().max()?;
        (self.steps.len() >= LEARNT).then(|| heartbeat_timeout.max(PATIENCE * *slowest))
    }
}

/// What a worker was last seen doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Motion {
    /// Since when it does what it does.
    since: Timestamp,
    /// Since when it is in its phase of its step, whatever it reads there.
    phase_since: Timestamp,
    reads: u64,
    /// Steps it has reported in its life.
    num_steps: usize,
}

impl Motion {
    pub fn new(now: Timestamp) -> Self {
        Self { since: now, phase_since: now, reads: 0, num_steps: 0 }
    }

    /// Nobody looked for so long.
    pub fn stood_still(&mut self, by: Duration) {
        self.since += by;
        self.phase_since += by;
    }

    /// It begins something else.
    pub fn begins(&mut self, now: Timestamp) {
        (self.since, self.phase_since) = (now, now);
    }
}

impl Worker {
    /// Takes in a sign of life; returns whether it says that something has come which the worker fetches.
    pub fn beat(&mut self, now: Timestamp, beat: &Heartbeat) -> bool {
        let fetched = beat.phase == Phase::Fetching && self.motion.reads != beat.reads;
        if (self.step, self.phase, self.motion.reads) != (beat.step, beat.phase, beat.reads) {
            self.motion.since = now;
        }
        if (self.step, self.phase) != (beat.step, beat.phase) {
            self.motion.phase_since = now;
        }
        (self.step, self.phase, self.motion.reads) = (beat.step, beat.phase, beat.reads);
        fetched
    }

    /// It has applied a step.
    pub fn stepped(&mut self, now: Timestamp, step: Step) {
        self.step = step;
        self.motion.begins(now);
        self.motion.num_steps = self.motion.num_steps.saturating_add(1);
    }
}

/// Whether a worker in this phase computes: it hears of a change of plans only when that is done.
fn is_at_work(phase: Phase) -> bool {
    match phase {
        Phase::Compute | Phase::Update | Phase::Warming | Phase::Validating | Phase::Sampling | Phase::Snapshot => true,
        Phase::Fetching | Phase::Loading | Phase::Waiting | Phase::Connecting | Phase::Data | Phase::Collective => false,
    }
}

impl Core {
    /// How long a worker may stay in what it is doing.
    fn patience(&self, worker: &Worker) -> Duration {
        let learnt = (worker.motion.num_steps >= LEARNT).then(|| self.pace.limit(self.config.heartbeat_timeout)).flatten();
        let step = learnt.unwrap_or(ANNOUNCED);
        match worker.phase {
            Phase::Fetching | Phase::Loading => ANNOUNCED.max(self.config.join_timeout),
            Phase::Validating | Phase::Sampling | Phase::Warming => ANNOUNCED.max(step),
            Phase::Connecting => CONNECTING.max(step),
            Phase::Collective if self.progress.final_step() == self.truth.step => FIRST_COLLECTIVE.max(step),
            Phase::Data => self.config.data_patience.max(step),
            Phase::Waiting | Phase::Compute | Phase::Collective | Phase::Update | Phase::Snapshot => step,
        }
    }

    /// When a member is overdue that lives and was to leave its collective by `deadline`. Whoever waits in it, or for samples, leaves at
    /// once; what is under way on a GPU ends by itself, and may take as long as it may at any time.
    fn leaves_by(&self, worker: &Worker, deadline: Timestamp) -> Timestamp {
        let Motion { since, phase_since, .. } = worker.motion;
        if is_at_work(worker.phase) {
            return deadline.max(since + self.patience(worker));
        }
        if worker.phase == Phase::Connecting {
            return deadline.max(since + BREAKING_OFF);
        }
        // Of one that was at work until now: it has not had the time yet that it has for leaving.
        deadline.max(phase_since + self.config.heartbeat_timeout)
    }

    /// Gives those up that were to leave their collective and have not.
    pub(super) fn look_for_stayers(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        for (id, _) in self.stayers().into_iter().filter(|(_, at)| *at <= now) {
            self.did_not_answer(now, id, "did not leave its collective in time", out);
        }
    }

    /// Members that have not left the generation that ends, and when each is overdue.
    pub(super) fn stayers(&self) -> Vec<(WorkerId, Timestamp)> {
        let JobPhase::Stopping { members, stopped, deadline, .. } = &self.phase else { return Vec::new() };
        let stays = members.iter().filter(|member| !stopped.contains_key(member));
        stays.filter_map(|id| Some((*id, self.leaves_by(self.workers.get(id)?, *deadline)))).collect()
    }

    /// Looks for those that do not get on. Called twice a heartbeat timeout.
    pub(super) fn look_for_hangs(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        if now < self.next_look {
            return;
        }
        self.next_look = now + self.config.heartbeat_timeout / 2;
        let overdue = |worker: &Worker| worker.motion.since + self.patience(worker) <= now;
        let stuck_loading = self.workers.iter().filter(|(_, worker)| worker.state == WorkerState::Loading && overdue(worker));
        let mut stuck: Vec<WorkerId> = stuck_loading.map(|(&id, _)| id).collect();
        if let JobPhase::Running { members, .. } = &self.phase {
            let waits = |worker: &Worker| members.len() > 1 && matches!(worker.phase, Phase::Connecting | Phase::Collective);
            // Who waits for shards waits for others, too.
            let is_culprit = |id: &WorkerId, worker: &Worker| {
                overdue(worker) && !waits(worker) && !(worker.phase == Phase::Data && self.lease_requests.contains_key(id))
            };
            let known = || members.iter().filter_map(|id| Some((id, self.workers.get(id)?)));
            stuck.extend(known().filter(|(id, worker)| is_culprit(id, worker)).map(|(&id, _)| id));
            let all_wait = known().all(|(_, worker)| waits(worker) && overdue(worker));
            if all_wait {
                let since = known().map(|(_, worker)| worker.motion.since).max().unwrap_or(now);
                let what = match known().all(|(_, worker)| worker.phase == Phase::Collective) {
                    true => format!("in the all-reduce of step {}", self.progress.final_step().next()),
                    false => format!("opening their connections for {}", self.generation),
                };
                let reason = format!(
                    "all {} members are {what} and none has got on for {:.1} s: the network between them hangs",
                    members.len(),
                    (now - since).as_secs_f64()
                );
                self.note_failure(reason.clone());
                self.hung = Some(self.generation);
                self.abort(now, &reason, out);
            }
        }
        for id in stuck {
            self.give_up(now, id, out);
        }
        self.stop_without_samples(now, out);
    }

    /// A job that is to stop meets after the step in flight; where that has no samples and gets none, there is no such step, and nothing is
    /// lost without it.
    fn stop_without_samples(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let (JobPhase::Running { members, planned: true }, Some(reason)) = (&self.phase, &self.stop_requested) else { return };
        let mut known = members.iter().filter_map(|member| self.workers.get(member));
        let waits =
            |worker: &Worker| matches!(worker.phase, Phase::Data | Phase::Collective) && worker.motion.phase_since + WITHOUT_SAMPLES <= now;
        let has_none = members.iter().filter_map(|member| self.workers.get(member)).any(|worker| worker.phase == Phase::Data);
        if has_none && known.all(waits) {
            let reason = format!("{reason}, and there are no samples for a step to end with");
            self.abort(now, &reason, out);
        }
    }

    /// A worker that lives and does not get on is as good as dead.
    fn give_up(&mut self, now: Timestamp, id: WorkerId, out: &mut Vec<Effect>) {
        let Some(worker) = self.workers.get(&id) else { return };
        let (stuck_for, limit) = (now.saturating_sub(worker.motion.since), self.patience(worker));
        let waiting = self.members().iter().filter(|member| self.workers.get(member).is_some_and(|other| other.phase == Phase::Collective));
        let others = match waiting.count() {
            0 => String::new(),
            1 => format!("; another waits for it in the all-reduce of step {}", Step(worker.step.0.saturating_add(1))),
            n => format!("; {n} others wait for it in the all-reduce of step {}", Step(worker.step.0.saturating_add(1))),
        };
        let cause = format!(
            "it lives but has not got on in phase {} for {:.1} s ({:.1} s allowed){others}",
            worker.phase.as_str(),
            stuck_for.as_secs_f64(),
            limit.as_secs_f64(),
        );
        self.dismiss(now, id, &cause, out);
    }

    /// A worker that lives has not done in time what it was told to. It may not have heard of it, or be in the middle of a long step: it
    /// comes back by itself. But not time and again.
    pub(super) fn did_not_answer(&mut self, now: Timestamp, id: WorkerId, cause: &str, out: &mut Vec<Effect>) {
        let Some(incarnation) = self.workers.get(&id).map(|worker| worker.incarnation) else { return };
        if self.mute.insert(incarnation) {
            out.push(Effect::Detach { worker: id });
            self.lose(now, id, cause, out);
        } else {
            self.dismiss(now, id, cause, out);
        }
    }

    /// Sends a worker away for good: its process may be alive and would come back to do no better.
    pub(super) fn dismiss(&mut self, now: Timestamp, id: WorkerId, cause: &str, out: &mut Vec<Effect>) {
        out.push(Effect::Send { worker: id, message: ToWorker::Stop { reason: StopReason::GivenUp, message: cause.to_owned() } });
        out.push(Effect::Detach { worker: id });
        self.gone.insert(id);
        self.lose(now, id, cause, out);
    }
}
