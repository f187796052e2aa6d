//! Members that come back to their generation: after the coordinator was away, or after all who hold the newest weights were cut off at
//! once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use peapod_proto::ids::{Incarnation, MemberIndex, Rank, Step, WorkerId};
use peapod_proto::message::{Continuing, StepReport, StopCause, Stopped, ToWorker};

use super::durable::Member;
use super::{Core, CoreError, Effect, Fact, JobPhase, Notice, Progress, Timestamp, worker_mut};

/// Workers look for their coordinator several times in this time.
const SHORTEST_RETURN: Duration = Duration::from_secs(2);

/// What a member says that comes back to a coordinator which was started again.
#[derive(Debug, Clone)]
pub(super) enum Returned {
    /// Its generation is over for it.
    Stopped(Stopped),
    /// It trains on.
    Continuing(Continuing),
}

impl Core {
    /// Nobody is left who holds the newest weights. A worker that was only cut off comes back at once with all it holds: before anything is
    /// trained again, it is waited for: any holder that was lost, or any member of a generation that was still running. Says whether there
    /// is anything to wait for.
    pub(super) fn wait_for_return(&mut self, now: Timestamp, out: &mut Vec<Effect>) -> bool {
        let newest = self.truth.step.max(self.progress.final_step());
        let is_running = matches!(self.phase, JobPhase::Running { .. } | JobPhase::Stopping { .. });
        let is_away = |member: &Member| {
            let is_meant = is_running || self.cut_off.contains(&member.worker);
            is_meant && !self.workers.contains_key(&member.worker) && !self.gone.contains(&member.worker)
        };
        if newest <= self.checkpoint_step().unwrap_or(Step(0)) || !self.last_members.iter().any(is_away) {
            return false;
        }
        // What the others hold is older, and known.
        let (away, others) = std::mem::take(&mut self.last_members).into_iter().partition(is_away);
        self.last_members = away;
        let others: Vec<Member> = others;
        out.extend(others.into_iter().map(|member| Effect::Persist(Fact::Replaced(member.worker))));
        self.truth.holders.clear();
        self.lease_requests.clear();
        self.grant_again = self.last_members.iter().map(|member| member.worker).collect();
        self.progress = Progress::start(self.progress.final_step(), self.last_members.len() as u32);
        let timeout = self.return_timeout();
        out.push(Effect::Notice(Notice::CutOff { step: newest, timeout }));
        self.phase = JobPhase::Returning { since: now, deadline: now + timeout, said: BTreeMap::new() };
        true
    }

    /// How long members have to come back, from the start or from when the first is back.
    pub(super) fn return_timeout(&self) -> Duration {
        self.config.heartbeat_timeout.max(SHORTEST_RETURN)
    }

    /// The journalled member that a process is, while members are waited for.
    pub(super) fn awaited(&self, incarnation: Incarnation) -> Option<Member> {
        let JobPhase::Returning { .. } = self.phase else { return None };
        self.last_members.iter().find(|member| member.incarnation == incarnation).cloned()
    }

    /// Ranks that are kept for members that may still come back.
    pub(super) fn reserved_ranks(&self, now: Timestamp) -> BTreeSet<Rank> {
        let JobPhase::Returning { since, .. } = self.phase else { return BTreeSet::new() };
        if now >= since + self.return_timeout() {
            return BTreeSet::new();
        }
        self.last_members.iter().filter(|member| !self.workers.contains_key(&member.worker)).map(|member| member.rank).collect()
    }

    /// The awaited member that a newcomer of this rank stands in for.
    pub(super) fn absent_member(&self, rank: Rank) -> Option<WorkerId> {
        let JobPhase::Returning { .. } = self.phase else { return None };
        let absent = |member: &&Member| member.rank == rank && !self.workers.contains_key(&member.worker);
        self.last_members.iter().find(absent).map(|member| member.worker)
    }

    fn num_returned(&self) -> usize {
        self.last_members.iter().filter(|member| self.workers.contains_key(&member.worker)).count()
    }

    /// A member is back; what it holds is what it says next.
    pub(super) fn has_returned(&mut self, now: Timestamp) {
        let returned = self.num_returned();
        let (timeout, reply_timeout) = (self.return_timeout(), self.reply_timeout());
        let num_members = self.last_members.len();
        if let JobPhase::Returning { deadline, .. } = &mut self.phase {
            if returned == num_members {
                *deadline = (*deadline).max(now + reply_timeout);
            } else if returned == 1 {
                // Where one comes late, the others do: they were cut off together.
                *deadline = (*deadline).max(now + timeout);
            }
        }
    }

    /// A member has trained on without a coordinator.
    pub(super) fn continuing(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        continuing: Continuing,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        self.fence(continuing.generation)?;
        let (known, beyond) = (self.progress.final_step(), continuing.applied.0.saturating_sub(self.progress.final_step().0));
        if beyond > continuing.records.len() as u64 {
            let why = format!(
                "it holds step {}, {known} is final, and it names the samples of {} steps",
                continuing.applied,
                continuing.records.len()
            );
            return Err(CoreError::Unexpected { what: "continuing", worker: id, why });
        }
        let is_member = self.last_members.iter().any(|member| member.worker == id);
        let JobPhase::Returning { said, .. } = &mut self.phase else {
            // The wait for the others was over before it spoke: they leave their generation, and so must it.
            let message = ToWorker::Abort { generation: self.generation, reason: "it is over".into() };
            out.push(Effect::Send { worker: id, message });
            return Ok(());
        };
        if !is_member {
            return Err(CoreError::Unexpected { what: "continuing", worker: id, why: "it is not a member".into() });
        }
        worker_mut(&mut self.workers, id, |worker| worker.step = continuing.applied);
        said.insert(id, Returned::Continuing(continuing));
        self.end_wait_if_all_spoke(now, out);
        Ok(())
    }

    /// One more step of a member that goes on, while others are waited for.
    pub(super) fn trained_on(&mut self, id: WorkerId, report: StepReport) {
        let JobPhase::Returning { said, .. } = &mut self.phase else { return };
        let Some(Returned::Continuing(continuing)) = said.get_mut(&id) else { return };
        if report.step == continuing.applied.next() {
            continuing.applied = report.step;
            continuing.records.extend(report.record);
        }
    }

    /// Nobody is waited for any more who could say something else than what is known.
    ///
    /// Who is away may live, so the others wait for it; unless their own collective broke at its place: then it is gone, or as good as.
    pub(super) fn end_wait_if_all_spoke(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Returning { said, .. } = &self.phase else { return };
        let is_whole = self.last_members.len() == self.num_formed;
        let lost: BTreeSet<MemberIndex> = said
            .values()
            .filter_map(|said| match said {
                // Without those that were replaced, the others are no longer in their places.
                Returned::Stopped(stopped) if is_whole && stopped.generation == self.generation => stopped.lost_member,
                _ => None,
            })
            .collect();
        let is_silent = |(index, member): (usize, &Member)| {
            let is_gone = !self.workers.contains_key(&member.worker) && lost.contains(&MemberIndex(index as u32));
            !said.contains_key(&member.worker) && !is_gone
        };
        if !said.is_empty() && !self.last_members.iter().enumerate().any(is_silent) {
            self.end_wait(now, out);
        }
    }

    /// The wait for members is over for those who are not back, unless nobody is and nobody could train without them.
    pub(super) fn wait_ended(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Returning { since, .. } = self.phase else { return };
        let ready = self.workers.values().filter(|worker| worker.is_ready()).count();
        if self.num_returned() > 0 || ready >= self.config.min_world_size as usize || self.stop_requested.is_some() {
            return self.end_wait(now, out);
        }
        let left = (since + self.config.join_timeout).saturating_sub(now);
        if left.is_zero() {
            let reason = format!("no worker came back within {:.0} s (--join-timeout)", self.config.join_timeout.as_secs_f64());
            return self.fail(reason, out);
        }
        if let JobPhase::Returning { deadline, .. } = &mut self.phase {
            *deadline = now + self.config.heartbeat_timeout.min(left);
        }
        out.push(Effect::Notice(self.waiting(now, left)));
    }

    /// Where all members train on, the job goes on with them; else those who are back say what they hold, as after any end of a generation.
    fn end_wait(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Returning { said, .. } = &mut self.phase else { return };
        let mut said = std::mem::take(said);
        said.retain(|id, _| self.workers.contains_key(id));
        let members: Vec<WorkerId> = self.last_members.iter().map(|member| member.worker).collect();
        let continuing = |id: &WorkerId| matches!(said.get(id), Some(Returned::Continuing(_)));
        if !members.is_empty() && members.len() == self.num_formed && members.iter().all(continuing) {
            return self.take_up(now, members, said, out);
        }
        let members: Vec<WorkerId> = members.into_iter().filter(|id| self.workers.contains_key(id)).collect();
        let is_whole = members.len() == self.num_formed;
        let is_orderly = |said: &Returned| match said {
            Returned::Stopped(Stopped { generation, cause, reason, .. }) => {
                *generation == self.generation && *cause != StopCause::Aborted && reason.is_empty()
            }
            Returned::Continuing(_) => true,
        };
        // Some have come to the generation's end in order and the others are on their way to it; or it is broken.
        let aborted = !(is_whole && said.len() == members.len() && said.values().all(is_orderly));
        if aborted {
            for &worker in members.iter().filter(|id| !matches!(said.get(id), Some(Returned::Stopped(_)))) {
                let message = ToWorker::Abort { generation: self.generation, reason: "not all members came back".into() };
                out.push(Effect::Send { worker, message });
            }
        }
        let stopped = said.iter().filter_map(|(&id, said)| match said {
            Returned::Stopped(stopped) => Some((id, stopped.clone())),
            Returned::Continuing(_) => None,
        });
        let (stopped, deadline) = (stopped.collect(), now + self.reply_timeout());
        self.phase = JobPhase::Stopping { members, stopped, deadline, aborted };
        self.settle_if_all_stopped(now, out);
    }

    /// The last generation is the current one still: what its members did meanwhile is news, and nothing else has happened.
    fn take_up(&mut self, now: Timestamp, members: Vec<WorkerId>, said: BTreeMap<WorkerId, Returned>, out: &mut Vec<Effect>) {
        for (index, id) in members.iter().enumerate() {
            if let Some(Returned::Continuing(continuing)) = said.get(id) {
                self.progress.catch_up(MemberIndex(index as u32), continuing.applied, continuing.records.clone());
            }
        }
        let stop = self.stop_requested.clone();
        self.begin(now, members, out);
        self.advance(now, out);
        for worker in self.workers.values_mut() {
            worker.tell_durable = true;
        }
        let (generation, num_members) = (self.generation, self.last_members.len() as u32);
        out.push(Effect::Notice(Notice::TakenUp { generation, num_members, step: self.progress.final_step() }));
        // Who was asked to leave meanwhile takes nothing more, and the others are to meet.
        let leavers: Vec<_> = self.workers.iter().filter_map(|(&id, worker)| Some((id, worker.leaving.clone()?))).collect();
        for (id, reason) in leavers {
            self.leaving(now, id, &reason, out);
        }
        self.answer_lease_requests(out);
        if let Some(reason) = stop {
            self.plan(&reason, out);
        }
    }

    /// What a worker holds, as far as it is on the line of weights that goes on: of the last generation, or its start.
    pub(super) fn on_the_line(&self, stopped: Stopped) -> Stopped {
        let is_base = (stopped.applied, stopped.trained_in) == (self.truth.step, self.truth.generation);
        if stopped.trained_in == self.generation || is_base {
            // That an older generation had no data left says nothing of what was given out in this one.
            let cause = if stopped.generation == self.generation { stopped.cause } else { StopCause::Aborted };
            Stopped { generation: self.generation, cause, ..stopped }
        } else {
            Stopped { reason: stopped.reason, ..Stopped::empty_handed(self.generation) }
        }
    }

    /// Why a newcomer has to wait for a rank.
    pub(super) fn not_yet(&self) -> CoreError {
        CoreError::NotYet(self.last_members.iter().filter(|member| !self.workers.contains_key(&member.worker)).count())
    }
}
