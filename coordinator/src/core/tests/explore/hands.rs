//! The workers of a small world: a few lines for each thing that they hear.

use super::*;

/// A worker process.
#[derive(Debug, Clone)]
pub(super) struct Hand {
    pub incarnation: u64,
    pub attempt: u32,
    pub rank: Option<Rank>,
    pub id: Option<WorkerId>,
    pub alive: bool,
    /// The coordinator took it for dead, and it holds what nobody asks for any more.
    pub is_cut: bool,
    pub stream: Option<StreamId>,
    pub up: VecDeque<FromWorker>,
    pub down: VecDeque<ToWorker>,
    pub training: Option<Assignment>,
    pub last: Stopped,
    /// A step each, with its generation and its samples.
    pub weights: Vec<(Generation, Vec<SampleName>)>,
    pub trained_in: Generation,
    pub records: Vec<StepRecord>,
    pub held: Vec<LeaseId>,
    pub samples: VecDeque<(LeaseId, SampleName)>,
    pub read: Vec<ShardReport>,
    pub asked: bool,
    pub none_left: bool,
    pub share: Option<(Step, Vec<(LeaseId, SampleName)>)>,
}

impl Moment {
    pub(super) fn join(&mut self, job: Job) -> Result<(), Violation> {
        let incarnation = 1000 + self.hands.len() as u64;
        self.hands.push(Hand {
            incarnation,
            attempt: 0,
            rank: None,
            id: None,
            alive: true,
            is_cut: false,
            stream: None,
            up: VecDeque::new(),
            down: VecDeque::new(),
            training: None,
            last: Stopped::empty_handed(Generation::NONE),
            weights: Vec::new(),
            trained_in: Generation::NONE,
            records: Vec::new(),
            held: Vec::new(),
            samples: VecDeque::new(),
            read: Vec::new(),
            asked: false,
            none_left: false,
            share: None,
        });
        self.hello(job, self.hands.len() - 1)
    }

    /// A worker says hello, on its first stream or on another one.
    pub(super) fn hello(&mut self, job: Job, place: usize) -> Result<(), Violation> {
        self.streams += 1;
        let stream = StreamId(self.streams);
        let hand = &mut self.hands[place];
        hand.stream = Some(stream);
        let before = hand.id;
        let again = before.is_some();
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: Incarnation(hand.incarnation),
            attempt: hand.attempt,
            requested_rank: hand.rank,
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
        };
        hand.attempt += 1;
        match self.tell(job, Event::Hello { stream, hello }, None)? {
            Ok(()) => {}
            Err(CoreError::RankTaken { .. } | CoreError::Ending(_) | CoreError::Over(_)) => {
                self.streams -= 1;
                let hand = &mut self.hands[place];
                (hand.alive, hand.stream) = (false, None);
                return Ok(());
            }
            // It tries again later, as if it had not tried.
            Err(_) => {
                self.streams -= 1;
                let hand = &mut self.hands[place];
                (hand.stream, hand.attempt) = (None, hand.attempt - 1);
                return Ok(());
            }
        }
        let hand = &mut self.hands[place];
        // It has come back too late: the job has gone on without it.
        hand.is_cut |= again && hand.id != before;
        hand.rank = hand.id.and_then(|id| self.core.workers.get(&id)).map(|worker| worker.rank);
        if again {
            hand.up.extend(hand.read.iter().cloned().map(FromWorker::ShardReport));
            let welcome = hand.down.iter().rev().find_map(|message| match message {
                ToWorker::Welcome { continues, .. } => Some(*continues),
                _ => None,
            });
            match hand.training.take() {
                Some(assignment) if welcome == Some(assignment.generation) => {
                    let (generation, applied) = (assignment.generation, Step(hand.weights.len() as u64));
                    (hand.training, hand.asked) = (Some(assignment), false);
                    hand.up.push_back(FromWorker::Ready { model_digest: vec![7], num_parameters: 10 });
                    hand.up.push_back(FromWorker::Continuing(Continuing { generation, applied, records: hand.records.clone() }));
                    return Ok(());
                }
                Some(assignment) => self.stop(place, &assignment, StopCause::Aborted, "the coordinator is back"),
                None => {
                    let last = hand.last.clone();
                    hand.up.push_back(FromWorker::Stopped(last));
                }
            }
        }
        self.hands[place].up.push_back(FromWorker::Ready { model_digest: vec![7], num_parameters: 10 });
        Ok(())
    }

    pub(super) fn stop(&mut self, place: usize, assignment: &Assignment, cause: StopCause, reason: &str) {
        let hand = &mut self.hands[place];
        let stopped = Stopped {
            generation: assignment.generation,
            applied: Step(hand.weights.len() as u64),
            cause,
            records: hand.records.clone(),
            reason: reason.into(),
            validation: None,
            trained_in: hand.trained_in,
            lost_member: None,
            stalled: None,
        };
        hand.training = None;
        hand.last = stopped.clone();
        if hand.stream.is_some() {
            hand.up.push_back(FromWorker::Stopped(stopped));
        }
    }

    fn begin(&mut self, place: usize, assignment: Assignment) {
        let base = assignment.base_step;
        let member = |index: u32| self.core.last_members.get(index as usize).and_then(|member| self.hand_of(member.worker));
        let from_source = member(assignment.source_index.0).map(|source| self.hands[source].weights.clone()).unwrap_or_default();
        let hand = &mut self.hands[place];
        if let Some((step, share)) = hand.share.take()
            && step > base
        {
            share.into_iter().rev().for_each(|sample| hand.samples.push_front(sample));
        }
        hand.held.retain(|lease| assignment.held_leases.contains(lease));
        hand.read.retain(|report| assignment.held_leases.contains(&report.lease));
        let held = &hand.held;
        hand.samples.retain(|(lease, _)| held.contains(lease));
        (hand.asked, hand.none_left, hand.is_cut) = (false, false, false);
        hand.records.clear();
        if (Step(hand.weights.len() as u64), hand.trained_in) != (base, assignment.base_generation) || base == Step(0) {
            hand.weights = if base == Step(0) { Vec::new() } else { from_source };
            hand.trained_in = assignment.base_generation;
        }
        hand.training = Some(assignment);
    }

    /// Everything that nothing interesting can come before.
    pub(super) fn settle(&mut self, job: Job) -> Result<(), Violation> {
        loop {
            let mut moved = false;
            for place in 0..self.hands.len() {
                if !self.hands[place].alive {
                    continue;
                }
                while let Some(message) = self.hands[place].up.front()
                    && !matches!(message, FromWorker::StepReport(_) | FromWorker::Stopped(_))
                {
                    self.deliver(job, place, None)?;
                    moved = true;
                }
                while let Some(message) = self.hands[place].down.front()
                    && !matches!(message, ToWorker::Abort { .. } | ToWorker::TakeSnapshot { .. })
                {
                    self.hear(job, place, false)?;
                    moved = true;
                }
                moved |= self.give(place);
            }
            if !moved {
                return Ok(());
            }
        }
    }

    pub(super) fn deliver(&mut self, job: Job, place: usize, dies: Option<usize>) -> Result<(), Violation> {
        let hand = &mut self.hands[place];
        let (Some(message), Some(worker), Some(stream)) = (hand.up.pop_front(), hand.id, hand.stream) else { return Ok(()) };
        let forged = match (&message, job.broken) {
            (FromWorker::StepReport(report), Broken::FirstReport) if report.record.is_some() => Some(report.clone()),
            _ => None,
        };
        let _ = self.tell(job, Event::Message { worker, stream, message }, dies)?;
        if let Some(report) = forged {
            let others: Vec<(WorkerId, StreamId)> = self
                .core
                .members()
                .iter()
                .filter(|&&id| id != worker)
                .filter_map(|&id| Some((id, self.core.workers.get(&id)?.stream)))
                .collect();
            for (worker, stream) in others {
                let message = FromWorker::StepReport(StepReport { record: None, ..report.clone() });
                let _ = self.tell(job, Event::Message { worker, stream, message }, None)?;
            }
        }
        Ok(())
    }

    /// A worker hears the oldest message to it.
    pub(super) fn hear(&mut self, job: Job, place: usize, withdraws: bool) -> Result<(), Violation> {
        let Some(message) = self.hands[place].down.pop_front() else { return Ok(()) };
        match message {
            ToWorker::MakeBootstrap { generation, .. } => {
                self.hands[place].up.push_back(FromWorker::Bootstrap { generation, bytes: vec![1] });
            }
            ToWorker::Assignment(assignment) => self.begin(place, assignment),
            ToWorker::Abort { generation, reason } => {
                if let Some(assignment) = self.hands[place].training.clone().filter(|assignment| assignment.generation <= generation) {
                    if withdraws {
                        self.withdraw(place);
                    }
                    self.stop(place, &assignment, StopCause::Aborted, &reason);
                }
            }
            ToWorker::LeaseGrant { leases, none_left, .. } => {
                let hand = &mut self.hands[place];
                (hand.asked, hand.none_left) = (false, none_left);
                for lease in leases {
                    if hand.held.contains(&lease.id) {
                        continue;
                    }
                    hand.held.push(lease.id);
                    let free = (0..job.samples).filter(|&index| !lease.done.contains(index));
                    hand.samples.extend(free.map(|index| (lease.id, SampleName { epoch: lease.epoch, shard: lease.shard, index })));
                    let report = ShardReport { lease: lease.id, skipped: vec![], num_samples: Some(job.samples), truncated: String::new() };
                    hand.read.push(report.clone());
                    hand.up.push_back(FromWorker::ShardReport(report));
                }
            }
            ToWorker::Durable { generation, step } => {
                let hand = &mut self.hands[place];
                if hand.training.as_ref().is_some_and(|assignment| assignment.generation == generation) {
                    hand.records.retain(|record| record.step > step);
                }
            }
            ToWorker::TakeSnapshot { generation } => {
                let weights = self.hands[place].weights.clone();
                let step = Step(weights.len() as u64);
                let Some((frozen_at, frozen_in, ledger)) = self.frozen.clone() else { return Err("a copy without a ledger".into()) };
                if (step, generation) != (frozen_at, frozen_in) {
                    return Err(format!("a copy of step {step} for the ledger of step {frozen_at} of {frozen_in}"));
                }
                agrees(&weights, &ledger).map_err(|problem| format!("in the last checkpoint: {problem}"))?;
                let _ = self.tell(job, Event::CheckpointStored { step, generation }, None)?;
            }
            ToWorker::Stop { .. } => self.hands[place].alive = false,
            // What it holds is read to the end: nothing is left to give back.
            ToWorker::Welcome { .. } | ToWorker::HeartbeatReply { .. } | ToWorker::PlanChange { .. } | ToWorker::GiveBack { .. } => {}
        }
        Ok(())
    }

    /// A worker takes back what it has not quite given.
    pub(super) fn withdraw(&mut self, place: usize) {
        let hand = &self.hands[place];
        let (Some(assignment), Some((step, _))) = (&hand.training, &hand.share) else { return };
        if let Some(sum) = self.sums.get_mut(&(assignment.generation, *step)) {
            sum.remove(&assignment.member_index.0);
        }
    }

    /// A worker gives its share to the next step as soon as it has one; it reads ahead, so that it asks for shards as soon as it can.
    fn give(&mut self, place: usize) -> bool {
        let hand = &mut self.hands[place];
        let Some(assignment) = hand.training.clone() else { return false };
        if !hand.asked && !hand.none_left && hand.stream.is_some() {
            hand.asked = true;
            hand.up.push_back(FromWorker::LeaseRequest { generation: assignment.generation, num_leases: 1, is_idle: false });
            return true;
        }
        if hand.share.is_some() || (hand.samples.is_empty() && !hand.none_left) {
            return false;
        }
        let share: Vec<_> = hand.samples.pop_front().into_iter().collect();
        let step = Step(hand.weights.len() as u64 + 1);
        let names = share.iter().map(|&(_, name)| name).collect();
        hand.share = Some((step, share));
        self.sums.entry((assignment.generation, step)).or_default().insert(assignment.member_index.0, names);
        true
    }

    /// The samples of the step that a worker is in, if everybody has given its share.
    pub(super) fn sum(&self, place: usize) -> Option<(Assignment, Step, Vec<SampleName>)> {
        let hand = &self.hands[place];
        let (assignment, (step, _)) = (hand.training.clone().filter(|_| hand.alive)?, hand.share.as_ref()?);
        let sum = self.sums.get(&(assignment.generation, *step)).filter(|sum| sum.len() as u32 == assignment.num_members)?;
        Some((assignment, *step, sum.values().flatten().copied().collect()))
    }

    /// Whether some member has finished the step that a worker is in: then everybody has given its share.
    pub(super) fn is_finished_by_another(&self, place: usize) -> bool {
        let (Some(assignment), Some((step, _))) = (&self.hands[place].training, &self.hands[place].share) else { return false };
        let made_it =
            |hand: &Hand| hand.weights.get(step.0 as usize - 1).is_some_and(|(generation, _)| *generation == assignment.generation);
        // Also where the sum was empty and nothing was applied.
        let is_empty = self.sum(place).is_some_and(|(_, _, names)| names.is_empty());
        is_empty || self.hands.iter().any(made_it)
    }

    pub(super) fn finish(&mut self, place: usize) {
        let Some((assignment, step, names)) = self.sum(place) else { return };
        let hand = &mut self.hands[place];
        hand.share = None;
        if names.is_empty() {
            return self.stop(place, &assignment, StopCause::DataDone, "");
        }
        let generation = assignment.generation;
        hand.weights.push((generation, names.clone()));
        hand.trained_in = generation;
        let record = StepRecord { step, generation, names, native: 0, skipped: false, losses: StepLosses::default(), validation: None };
        hand.records.push(record.clone());
        if hand.stream.is_some() {
            let record = (assignment.member_index == MemberIndex(0)).then_some(record);
            hand.up.push_back(FromWorker::StepReport(StepReport {
                generation,
                step,
                record,
                timings: StepTimings::default(),
                snapshot: None,
            }));
        }
    }
}
