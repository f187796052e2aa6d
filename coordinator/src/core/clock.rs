//! What time alone brings about, and when that is.

use std::time::Duration;

use peapod_proto::message::ToWorker;

use super::{Core, Effect, JobPhase, Outcome, Timestamp};

/// How soon it is said again who is missing; later it takes an eighth of the time waited, as workers may queue for a day.
pub(super) const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);
const ANNOUNCE_AT_LEAST_EVERY: Duration = Duration::from_secs(600);

impl Core {
    /// When [`Event::Tick`] is next needed.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Timestamp> {
        if let JobPhase::Done(_) = self.phase {
            return None;
        }
        let silence = (!self.workers.is_empty()).then_some(self.next_silence);
        let job = match &self.phase {
            // A coordinator that was started again after it was asked to stop.
            JobPhase::Gathering { .. } if self.stop_requested.is_some() => Some(Duration::ZERO),
            JobPhase::Gathering { since } => {
                let at = self.next_announcement.min(*since + self.config.join_timeout);
                // Who is enough already waits for the end of a pause all the same.
                let pause = self.setbacks.pause();
                let starts_at = self.starts_at().max(pause);
                [starts_at, self.checkpoint.farewell_until, pause].into_iter().flatten().chain([at]).min()
            }
            JobPhase::Running { .. } => (!self.checkpoint.asked).then_some(self.checkpoint.next_due),
            JobPhase::Forming { deadline, .. } | JobPhase::Returning { deadline, .. } | JobPhase::Finishing { deadline, .. } => {
                Some(*deadline)
            }
            JobPhase::Stopping { .. } => self.stayers().into_iter().map(|(_, at)| at).min(),
            JobPhase::Done(_) => None,
        };
        let hangs = (!self.workers.is_empty()).then_some(self.next_look);
        [silence, job, hangs, self.setbacks.next_end()].into_iter().flatten().min()
    }

    pub(super) fn tick(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.look_for_silence(now, out);
        self.look_for_hangs(now, out);
        if self.setbacks.forgive(now) {
            self.admit(out);
        }
        let shards = self.setbacks.forgive_shards(now);
        if !shards.is_empty() {
            shards.into_iter().for_each(|(epoch, shard)| self.leases.take_up(epoch, shard));
            self.answer_lease_requests(out);
        }
        let waits = matches!(self.phase, JobPhase::Gathering { .. }) && self.stop_requested.is_none();
        if waits && self.checkpoint.farewell_until.is_some_and(|until| until <= now) {
            self.farewell_is_due(now, out);
        }
        match &self.phase {
            JobPhase::Gathering { .. } if self.stop_requested.is_some() => {
                let reason = self.stop_requested.clone().unwrap_or_default();
                self.ask_for_last_checkpoint(now, Outcome::Stopped { reason }, 1, out);
            }
            JobPhase::Gathering { since } => {
                let (since, left) = (*since, (*since + self.config.join_timeout).saturating_sub(now));
                self.try_form(now, out);
                if !matches!(self.phase, JobPhase::Gathering { .. }) {
                    return;
                }
                if left.is_zero() {
                    let waited = format!("{} for {:.0} s (--join-timeout)", self.describe_missing(), (now - since).as_secs_f64());
                    let reason = match self.first_failure() {
                        Some(first) => format!("{first}; then {waited}"),
                        None => waited,
                    };
                    self.fail(reason, out);
                } else if self.next_announcement <= now {
                    self.next_announcement = now + ((now - since) / 8).clamp(ANNOUNCE_EVERY, ANNOUNCE_AT_LEAST_EVERY);
                    out.push(Effect::Notice(self.waiting(now, left)));
                }
            }
            JobPhase::Running { members, .. } if self.checkpoint.next_due <= now && !self.checkpoint.asked => {
                self.checkpoint.asked = true;
                let message = ToWorker::TakeSnapshot { generation: self.generation };
                out.push(Effect::Send { worker: members[0], message });
            }
            JobPhase::Returning { deadline, .. } if *deadline <= now => self.wait_ended(now, out),
            JobPhase::Finishing { outcome, attempts, deadline } if *deadline <= now => {
                let (outcome, attempts) = (outcome.clone(), *attempts);
                self.last_checkpoint_is_due(now, outcome, attempts, out);
            }
            JobPhase::Forming { deadline, members } if *deadline <= now => {
                let id = members[0];
                self.did_not_answer(now, id, "did not open its end of the collective in time", out);
            }
            JobPhase::Stopping { .. } => self.look_for_stayers(now, out),
            _ => {}
        }
    }

    fn look_for_silence(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        if now < self.next_silence {
            return;
        }
        let timeout = self.config.heartbeat_timeout;
        let (silent, alive): (Vec<_>, Vec<_>) =
            self.workers.iter().map(|(&id, worker)| (worker.last_seen + timeout, id)).partition(|&(at, _)| at <= now);
        self.next_silence = alive.into_iter().map(|(at, _)| at).min().unwrap_or(now + timeout);
        for (_, id) in silent {
            let cause = format!("no sign of life for {:.1} s", timeout.as_secs_f64());
            out.push(Effect::Detach { worker: id });
            self.lose(now, id, &cause, out);
        }
    }

    /// The coordinator itself stood still: what it has not heard meanwhile is nobody's silence.
    pub(super) fn stalled(&mut self, by: Duration) {
        for worker in self.workers.values_mut() {
            worker.last_seen += by;
            worker.motion.stood_still(by);
        }
        self.pace.pause();
        self.next_look += by;
        match &mut self.phase {
            JobPhase::Forming { deadline, .. }
            | JobPhase::Stopping { deadline, .. }
            | JobPhase::Returning { deadline, .. }
            | JobPhase::Finishing { deadline, .. } => *deadline += by,
            JobPhase::Gathering { since } => *since += by,
            JobPhase::Running { .. } | JobPhase::Done(_) => {}
        }
    }
}
