//! Who trains next, and how they come together.

use std::collections::BTreeMap;
use std::time::Duration;

use peapod_proto::ids::{Generation, MemberIndex, Rank, WorkerId};
use peapod_proto::message::{Assignment, Phase, ToWorker};

use super::clock::ANNOUNCE_EVERY;
use super::durable::Member;
use super::membership::{Worker, WorkerState};
use super::{Config, Core, CoreError, Effect, Fact, JobPhase, Notice, Outcome, Progress, Timestamp, worker_mut};

/// An elastic world that starts waits this many heartbeat timeouts for more workers after the last one.
const QUIET_HEARTBEAT_TIMEOUTS: u32 = 10;

impl Core {
    /// Who would train now: those that are ready, up to the world size, by rank. Who trained last goes first, for it has a rank to keep,
    /// its models warm and perhaps the newest weights (those who do come first: the world may be smaller now); a spare stands in for who is
    /// missing. Who is set aside is left out if the others are enough.
    fn candidates(&self) -> Vec<WorkerId> {
        let mut ready: Vec<(bool, bool, Rank, WorkerId)> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.is_ready())
            .map(|(&id, worker)| {
                let (is_last, holds) = (self.last_members.iter().any(|member| member.worker == id), self.truth.holders.contains(&id));
                (!is_last, !holds, worker.rank, id)
            })
            .collect();
        ready.sort_unstable();
        let is_aside = |id: &WorkerId| self.workers.get(id).is_some_and(|worker| self.setbacks.is_aside(*id, &worker.host));
        if ready.iter().filter(|(.., id)| !is_aside(id)).count() >= self.config.min_world_size as usize {
            ready.retain(|(.., id)| !is_aside(id));
        }
        ready.truncate(self.config.world_size as usize);
        ready.sort_unstable_by_key(|&(.., rank, _)| rank);
        ready.into_iter().map(|(.., id)| id).collect()
    }

    /// Since when an elastic world that nobody has trained in yet waits for more workers: since the last one came or finished loading. A
    /// world that has been torn goes on with whom it has.
    fn quiet_since(&self) -> Option<Timestamp> {
        let starts = self.truth.holders.is_empty();
        (starts && self.config.min_world_size < self.config.world_size).then_some(self.last_arrival)
    }

    /// When fewer workers than the world size start, if nobody comes: none while that cannot be.
    pub(super) fn starts_at(&self) -> Option<Timestamp> {
        // A model that is still to come may take an hour: who fetches it is let in later.
        let loads = |worker: &Worker| worker.state == WorkerState::Loading && worker.phase != Phase::Fetching;
        let is_loading = self.workers.values().any(loads);
        let since = self.quiet_since().filter(|_| !is_loading)?;
        let ready = self.workers.values().filter(|worker| worker.is_ready()).count();
        (ready >= self.config.min_world_size as usize).then(|| since + QUIET_HEARTBEAT_TIMEOUTS * self.config.heartbeat_timeout)
    }

    /// Starts the next generation if enough are there.
    pub(super) fn try_form(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        let JobPhase::Gathering { since } = self.phase else { return };
        if self.setbacks.is_pausing(now) {
            return;
        }
        let members = self.candidates();
        let is_whole = members.len() >= self.config.world_size as usize;
        let is_patient = now < since + self.config.join_timeout;
        let waits = is_patient && self.quiet_since().is_some() && self.starts_at().is_none_or(|at| now < at);
        if members.len() < self.config.min_world_size as usize || (waits && !is_whole) {
            return;
        }
        // Who holds the newest weights may be about to leave, and only stays until they are stored.
        let holders = &self.truth.holders;
        if !holders.is_empty() && !members.iter().any(|member| holders.contains(member)) {
            return;
        }
        if self.config.last_step.is_some_and(|last| self.truth.step >= last) {
            // Its last step came back from the store.
            return self.ask_for_last_checkpoint(now, Outcome::Finished, 1, out);
        }
        self.release_leases_outside(&members, out);
        self.generation = self.generation.next();
        let message = ToWorker::MakeBootstrap { generation: self.generation, num_members: members.len() as u32 };
        let member = |id: &WorkerId| {
            let worker = self.workers.get(id)?;
            Some(Member { worker: *id, incarnation: worker.incarnation, rank: worker.rank })
        };
        self.last_members = members.iter().filter_map(member).collect();
        self.gone.clear();
        self.num_formed = self.last_members.len();
        let journalled = self.last_members.clone();
        out.push(Effect::Persist(Fact::Generation { generation: self.generation, members: journalled, base_step: self.truth.step }));
        out.push(Effect::Send { worker: members[0], message });
        self.phase = JobPhase::Forming { deadline: now + self.reply_timeout(), members };
    }

    /// Lets those in who have become ready while a smaller world trains: by a planned change, so that nothing is dropped.
    pub(super) fn admit(&mut self, out: &mut Vec<Effect>) {
        let JobPhase::Running { members, planned: false } = &self.phase else { return };
        let places = (self.config.world_size as usize).saturating_sub(members.len());
        let may_join =
            |id: &WorkerId, worker: &Worker| worker.is_ready() && !self.setbacks.is_aside(*id, &worker.host) && !members.contains(id);
        let newcomers = self.workers.iter().filter(|(id, worker)| may_join(id, worker)).take(places);
        let names: Vec<Rank> = newcomers.map(|(_, worker)| worker.rank).collect();
        if !names.is_empty() {
            let verb = if names.len() == 1 { "joins" } else { "join" };
            self.plan(&format!("{} {verb}", ranks(&names)), out);
        }
    }

    pub(super) fn bootstrap(
        &mut self,
        now: Timestamp,
        id: WorkerId,
        generation: Generation,
        bytes: Vec<u8>,
        out: &mut Vec<Effect>,
    ) -> Result<(), CoreError> {
        self.fence(generation)?;
        let JobPhase::Forming { members, .. } = &self.phase else {
            return Err(CoreError::Unexpected { what: "bootstrap", worker: id, why: format!("the job is {}", self.state()) });
        };
        if members[0] != id {
            return Err(CoreError::Unexpected { what: "bootstrap", worker: id, why: "it is not member 0".into() });
        }
        let members = members.clone();
        let holders = &self.truth.holders;
        let source = members.iter().position(|member| holders.contains(member));
        let broadcast_state = source.is_none() || members.iter().any(|member| !holders.contains(member));
        let checkpoint_step = source.is_none().then(|| self.checkpoint_step()).flatten();
        for (index, &member) in members.iter().enumerate() {
            let assignment = Assignment {
                generation,
                member_index: MemberIndex(index as u32),
                num_members: members.len() as u32,
                bootstrap: bytes.clone(),
                base_step: self.truth.step,
                base_generation: self.truth.generation,
                source_index: MemberIndex(source.unwrap_or(0) as u32),
                broadcast_state,
                checkpoint_step,
                held_leases: self.leases.held_by(member),
                global_batch: self.global_batch(members.len() as u32),
            };
            out.push(Effect::Send { worker: member, message: ToWorker::Assignment(assignment) });
        }
        out.push(Effect::Notice(Notice::Formed {
            generation,
            num_members: members.len() as u32,
            base_step: self.truth.step,
            from_checkpoint: checkpoint_step.is_some(),
        }));
        self.lease_requests.clear();
        self.progress = Progress::start(self.truth.step, members.len() as u32);
        self.begin(now, members, out);
        Ok(())
    }

    /// The members of the current generation train from here on.
    pub(super) fn begin(&mut self, now: Timestamp, members: Vec<WorkerId>, out: &mut Vec<Effect>) {
        self.leases.deal_among(members.len() as u32);
        self.leases.seat(&members);
        self.checkpoint.asked = false;
        self.checkpoint.next_due = self.checkpoint.next_due.max(now);
        self.pace.pause();
        for member in &members {
            worker_mut(&mut self.workers, *member, |worker| worker.motion.begins(now));
        }
        self.phase = JobPhase::Running { members, planned: false };
        self.admit(out);
    }

    pub(super) fn gather(&mut self, now: Timestamp, out: &mut Vec<Effect>) {
        self.phase = JobPhase::Gathering { since: now };
        self.checkpoint.farewell_until = None;
        self.next_announcement = now + ANNOUNCE_EVERY;
        if self.candidates().len() < self.config.min_world_size as usize {
            out.push(Effect::Notice(self.waiting(now, self.config.join_timeout)));
        }
    }

    /// How long a worker that lives may take to answer: its trainer may be in the middle of something.
    pub(super) fn reply_timeout(&self) -> Duration {
        self.config.heartbeat_timeout.max(Duration::from_secs(10))
    }

    /// Who is missing, in words; nothing while the job trains.
    pub(super) fn waiting_for(&self) -> &str {
        match &self.phase {
            JobPhase::Gathering { .. } | JobPhase::Returning { .. } => &self.waiting_for,
            _ => "",
        }
    }

    /// That the job waits, for `left` at most.
    pub(super) fn waiting(&self, now: Timestamp, left: Duration) -> Notice {
        let is_there = |worker: &&Worker| worker.leaving.is_none();
        let is_usual = self.workers.values().filter(is_there).count() >= self.config.world_size as usize;
        let starts_in = self.starts_at().map(|at| at.saturating_sub(now)).filter(|starts_in| *starts_in < left);
        Notice::Waiting { text: self.describe_missing(), left, is_usual, starts_in }
    }

    /// The words of [`Core::waiting_for`]: they are found once an event, as every heartbeat asks for them.
    pub(super) fn describe_missing(&self) -> String {
        let Config { world_size, min_world_size, .. } = self.config;
        let phase = |worker: &Worker| (worker.state == WorkerState::Loading).then_some(worker.phase);
        let staying = self.workers.values().filter(|worker| worker.leaving.is_none());
        let present: BTreeMap<Rank, Option<Phase>> = staying.map(|worker| (worker.rank, phase(worker))).collect();
        let (fetching, loading): (Vec<_>, Vec<_>) =
            present.iter().filter_map(|(&rank, phase)| Some((rank, (*phase)?))).partition(|(_, phase)| *phase == Phase::Fetching);
        let mut parts = Vec::new();
        let num_ready = present.values().filter(|phase| phase.is_none()).count();
        if min_world_size < world_size {
            if num_ready >= min_world_size as usize {
                parts
                    .push(format!("{num_ready} of {world_size} workers are ready, {min_world_size} are enough: waiting a little for more"));
            } else {
                parts.push(format!("waiting for workers: {num_ready} of at least {min_world_size} are ready"));
            }
        } else if present.len() < world_size as usize {
            // Spares stand in for as many of the missing ranks as there are of them.
            let missing: Vec<Rank> = (0..world_size).map(Rank).filter(|rank| !present.contains_key(rank)).collect();
            parts.push(format!("waiting for {}", ranks(&missing)));
        }
        for (who, what) in [(fetching, "fetching"), (loading, "loading")].into_iter().filter(|(who, _)| !who.is_empty()) {
            let who: Vec<Rank> = who.into_iter().map(|(rank, _)| rank).collect();
            parts.push(format!("{} {what} models", ranks(&who)));
        }
        if let Some(last) = self.last_to_leave().and_then(|id| self.workers.get(&id)) {
            parts.push(format!("rank {} stores step {} before it leaves", last.rank, self.truth.step));
        }
        if let Some(times) = self.setbacks.pausing_after() {
            parts.push(format!("a pause, as {times} generations in a row broke before their first step was done"));
        }
        parts.join(", ")
    }
}

/// "rank 3", "ranks 0, 2-5".
fn ranks(ranks: &[Rank]) -> String {
    let mut spans: Vec<(u32, u32)> = Vec::new();
    for &Rank(rank) in ranks {
        match spans.last_mut() {
            Some((_, end)) if *end + 1 == rank => *end = rank,
            _ => spans.push((rank, rank)),
        }
    }
    let text: Vec<String> = spans.iter().map(|&(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") }).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, text.join(", "))
}
