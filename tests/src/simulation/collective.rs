//! Collectives between workers: whoever completes one holds everybody's part; each member completes or fails by itself.

use std::collections::BTreeMap;
use std::rc::Rc;

use peapod_proto::ids::Generation;

use super::queue::ms;
use super::trainer::Wake;
use super::weights::TrainState;
use super::{Event, ProcessId, World};

/// A group by its place among all of a simulation: what its bootstrap says.
pub type GroupId = usize;

/// One member's part in a collective.
#[derive(Clone)]
pub enum Part {
    /// In a broadcast: the state, from the source.
    Broadcast(Option<TrainState>),
    /// In a sum.
    Sum(Vec<f32>),
}

/// How a member leaves its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// After its last collective, or with an error: its links are shut.
    Shut,
    /// Its process died.
    Died,
    /// Its host is gone, and nothing shows it.
    Vanished,
}

/// The communicator of one generation.
pub struct Group {
    generation: Generation,
    num_members: u32,
    members: BTreeMap<u32, ProcessId>,
    /// Who waits in which collective.
    waiting: BTreeMap<u32, (u64, u64)>,
    /// Who has left, after how many collectives; whether that shows.
    left: BTreeMap<u32, (u64, bool)>,
    operations: BTreeMap<u64, BTreeMap<u32, Part>>,
}

/// Waiting for all members to be there counts as the collective before the first.
const FORMING: u64 = 0;

impl World {
    pub(super) fn open_group(&mut self, generation: Generation, num_members: u32) -> GroupId {
        let (members, waiting, left, operations) = Default::default();
        self.groups.push(Group { generation, num_members, members, waiting, left, operations });
        self.groups.len() - 1
    }

    /// A member comes to the group; it wakes when all are there, or fails.
    pub(super) fn join_group(&mut self, id: GroupId, generation: Generation, index: u32, process: ProcessId, token: u64) {
        let group = &mut self.groups[id];
        if group.generation != generation || group.members.insert(index, process).is_some() {
            return self.fail(format!("two workers are member {index} of the group of {generation}"));
        }
        group.waiting.insert(index, (FORMING, token));
        if group.left.values().any(|&(_, shows)| shows) {
            self.fail_member(id, index);
        }
        let group = &self.groups[id];
        if group.members.len() as u32 == group.num_members && group.left.is_empty() {
            self.complete(id, FORMING, |_| Wake::Connected);
        }
    }

    /// A member enters its next collective, `number` (from 1).
    pub(super) fn enter(&mut self, id: GroupId, index: u32, number: u64, part: Part, token: u64) {
        let group = &mut self.groups[id];
        group.waiting.insert(index, (number, token));
        let parts = group.operations.entry(number).or_default();
        parts.insert(index, part);
        if parts.len() as u32 == group.num_members && group.left.is_empty() {
            let parts = group.operations.remove(&number).unwrap_or_default();
            let result = result(parts);
            return self.complete(id, number, |_| result.clone());
        }
        if group.left.values().any(|&(completed, shows)| shows && completed <= number) {
            self.fail_member(id, index);
        }
    }

    /// Everybody is in: each completes in its own time, unless the network plays one of its tricks.
    fn complete(&mut self, id: GroupId, number: u64, wake: impl Fn(u32) -> Wake) {
        let waiting: Vec<(u32, u64)> =
            self.groups[id].waiting.iter().filter(|(_, (at, _))| *at == number).map(|(&index, &(_, token))| (index, token)).collect();
        let glitch = std::mem::take(&mut self.glitch);
        if glitch {
            let generation = self.groups[id].generation;
            self.say(|| format!("collective {number} of {generation} fails on some"));
        }
        for (index, token) in waiting {
            let process = self.groups[id].members[&index];
            if glitch && self.random.one_in(2) {
                self.fail_member(id, index);
                continue;
            }
            let usual = self.random.between((ms(0), ms(8)));
            let at = self.now + if self.random.one_in(10) { usual + self.latency() } else { usual };
            self.queue.push(at, Event::Trainer { process, token, wake: wake(index) });
        }
    }

    /// A member's collective fails soon, if it does not complete before that.
    fn fail_member(&mut self, id: GroupId, index: u32) {
        let group = &self.groups[id];
        let Some(&(_, token)) = group.waiting.get(&index) else { return };
        let process = group.members[&index];
        let at = self.now + self.random.between((ms(0), ms(15)));
        self.queue.push(at, Event::Trainer { process, token, wake: Wake::Broken("a peer's connection broke".into()) });
    }

    /// A member is done with the collective it waited in.
    pub(super) fn completed(&mut self, id: GroupId, index: u32) {
        self.groups[id].waiting.remove(&index);
    }

    /// A member leaves after it has completed `completed` collectives, the forming among them.
    pub(super) fn leave_group(&mut self, id: GroupId, index: u32, completed: u64, how: Leave) {
        let group = &mut self.groups[id];
        group.waiting.remove(&index);
        if group.left.insert(index, (completed, how != Leave::Vanished)).is_some() || how == Leave::Vanished {
            return;
        }
        // Who waits for it in a collective that it has not completed fails. What a process that died had sent may be lost with it.
        let concerned = |number: u64| number >= completed || how == Leave::Died;
        let others: Vec<u32> = group.waiting.iter().filter(|(_, (number, _))| concerned(*number)).map(|(&other, _)| other).collect();
        for other in others {
            self.fail_member(id, other);
        }
    }
}

/// What a collective comes to for its members.
fn result(parts: BTreeMap<u32, Part>) -> Wake {
    let mut sum: Vec<f32> = Vec::new();
    let mut state = None;
    for part in parts.into_values() {
        match part {
            Part::Broadcast(from_source) => state = state.or(from_source),
            Part::Sum(values) if sum.is_empty() => sum = values,
            Part::Sum(values) => sum.iter_mut().zip(values).for_each(|(total, value)| *total += value),
        }
    }
    match state {
        Some(state) => Wake::Received(state),
        None => Wake::Summed(Rc::new(sum)),
    }
}
