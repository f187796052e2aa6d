//! Who may read which shard.
//!
//! Shards are dealt in the order of [`Order`], round by member index, so that an undisturbed world of fixed size always sees the same
//! batches. Positions count on over the epochs: uneven rounds even out in the next.
//!
//! A lease is on a whole shard, or on a part of it: an idle member is given the rest of a shard that another has begun. Its reader is asked
//! first, and answers with the first index that it has not handed on; what lies below stays its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use peapod_proto::ids::{Epoch, LeaseId, MemberIndex, ShardId, WorkerId};
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;
use super::order::{Order, Position, Source};

/// Indices of a shard, from one to before another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The first.
    pub from: u32,
    /// The first that is not in it; [`Part::OPEN`] if it goes on to the shard's end.
    pub to: u32,
}

impl Part {
    /// Where a part ends that goes on to the shard's end, which nobody may know yet.
    pub const OPEN: u32 = u32::MAX;
    /// The whole shard.
    pub const WHOLE: Self = Self { from: 0, to: Self::OPEN };

    /// What is left of it for who reads no more than what lies below `from`, and what others may have.
    #[must_use]
    pub fn split(self, from: u32) -> (Self, Self) {
        let at = from.clamp(self.from, self.to);
        (Self { from: self.from, to: at }, Self { from: at, to: self.to })
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.from >= self.to
    }

    /// Whether an index can be in both.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }

    /// Where it ends, if before the shard does.
    #[must_use]
    pub fn end(self) -> Option<u32> {
        (self.to != Self::OPEN).then_some(self.to)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    holder: WorkerId,
    position: Position,
    part: Part,
    /// Its holder will read no more of it.
    read: bool,
    /// Its holder was asked to give back the rest.
    asked: bool,
    /// How many times an idle member was given it, or what it was cut from.
    num_passed: u8,
}

/// Times a part is passed on to an idle member. More than once, because who is asked keeps what it has in its buffers, perhaps a share, and
/// is the idle one itself before the other has read the rest. Not without end: each new reader of a part reads past what lies before it.
const MAX_PASSES: u8 = 4;

impl Held {
    fn can_be_asked(&self) -> bool {
        !self.read && !self.asked && self.num_passed < MAX_PASSES
    }
}

/// A lease as the core knows it; the shell adds the shard's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// Its id.
    pub id: LeaseId,
    /// The pass.
    pub epoch: Epoch,
    /// The shard.
    pub shard: ShardId,
    /// Which samples of it.
    pub part: Part,
}

/// A lease as it is written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldLease {
    /// Its id.
    pub id: LeaseId,
    /// Who reads.
    pub holder: WorkerId,
    /// The pass.
    pub epoch: Epoch,
    /// The shard.
    pub shard: ShardId,
    /// Which samples of it.
    pub part: Part,
    /// Its holder will read no more of it.
    pub read: bool,
}

impl HeldLease {
    /// As it was granted, less what was given back since.
    #[must_use]
    pub fn granted(self) -> Granted {
        let Self { id, epoch, shard, part, .. } = self;
        Granted { id, epoch, shard, part }
    }
}

/// What a member that asks for leases gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grant {
    /// These; with `none_left`, nothing will follow.
    Now {
        /// The leases, perhaps fewer than asked for.
        leases: Vec<Granted>,
        /// Whether every shard of the job is given out.
        none_left: bool,
        /// With it: whether the rest of what another reads is there for whoever is idle.
        when_idle: bool,
    },
    /// Nothing yet: what is left is dealt to others, or one of them was asked to give back the rest of a shard.
    Later,
    /// Nothing yet: first this lease's holder is to give back what it has not begun.
    AskBack {
        /// Whom to ask.
        holder: WorkerId,
        /// For what.
        lease: LeaseId,
    },
}

/// All leases of a job.
#[derive(Debug, Clone)]
pub struct Leases {
    order: Order,
    next_id: u64,
    held: BTreeMap<LeaseId, Held>,
    by_shard: BTreeSet<(Epoch, ShardId, LeaseId)>,
    by_holder: BTreeMap<WorkerId, Holding>,
    /// What was given back, or jumped over when the membership changed: whoever asks first gets it. To each first index of a part its end,
    /// and how many times it was passed on.
    returned: BTreeMap<(Position, u32), (u32, u8)>,
    /// The same of shards that are left for later: nobody gets them while there is anything else.
    later: BTreeMap<(Position, u32), (u32, u8)>,
    aside: BTreeSet<Position>,
    /// Positions below are held, done, or in `returned`, unless they are still ahead of their member below.
    base: Position,
    /// For each member, how many rounds from `base` it was dealt.
    rounds: Vec<u64>,
    /// Members that take nothing more: their first is for whoever has time.
    leaving: BTreeSet<usize>,
    /// The members, as far as they are known: what they brought along keeps them busy as their first would.
    members: Vec<WorkerId>,
}

#[derive(Debug, Clone, Default)]
struct Holding {
    /// In the order of granting, which is that of reading.
    leases: VecDeque<LeaseId>,
    num_unread: usize,
}

impl Leases {
    /// Leases over the shards of `sources` for `epochs` passes over each (without end if none), from where `ledger` has the first that is
    /// open.
    #[must_use]
    pub fn new(seed: u64, sources: &[Source], epochs: Option<u32>, ledger: &Ledger) -> Self {
        let order = Order::new(seed, sources, epochs);
        Self {
            base: start(&order, ledger),
            order,
            next_id: 1,
            held: BTreeMap::new(),
            by_shard: BTreeSet::new(),
            by_holder: BTreeMap::new(),
            returned: BTreeMap::new(),
            later: BTreeMap::new(),
            aside: BTreeSet::new(),
            rounds: Vec::new(),
            leaving: BTreeSet::new(),
            members: Vec::new(),
        }
    }

    /// Deals anew among `num_members`, from where the furthest member of the last membership was.
    pub fn deal_among(&mut self, num_members: u32) {
        let members = self.rounds.len() as u64;
        let next = |index: usize, rounds: u64| self.base + index as u64 + rounds * members;
        let frontier =
            self.rounds.iter().enumerate().filter(|&(_, &rounds)| rounds > 0).map(|(index, &rounds)| next(index, rounds - 1) + 1).max();
        if let Some(frontier) = frontier {
            let jumped =
                self.rounds.iter().enumerate().flat_map(|(index, &rounds)| (next(index, rounds)..frontier).step_by(members as usize));
            for position in jumped.collect::<Vec<_>>() {
                self.give_up(position, Part::WHOLE, 0);
            }
            self.base = frontier;
        }
        self.rounds = vec![0; num_members as usize];
        self.leaving.clear();
        // Whoever was to get the rest of a shard asks anew.
        for held in self.held.values_mut() {
            held.asked = false;
        }
    }

    /// Forgets every lease and deal, and starts again at the first epoch the ledger has open.
    pub fn restart(&mut self, ledger: &Ledger) {
        self.held.clear();
        self.by_shard.clear();
        self.by_holder.clear();
        self.returned.clear();
        self.later.clear();
        self.aside.clear();
        self.base = start(&self.order, ledger);
        self.rounds = vec![0; self.rounds.len()];
        self.leaving.clear();
    }

    /// The id that the next lease will have.
    #[must_use]
    pub fn next_id(&self) -> LeaseId {
        LeaseId(self.next_id)
    }

    /// Every lease, by epoch and shard.
    #[must_use]
    pub fn held(&self) -> Vec<HeldLease> {
        let lease = |&(epoch, shard, id): &(Epoch, ShardId, LeaseId)| {
            let held = self.held.get(&id)?;
            Some(HeldLease { id, holder: held.holder, epoch, shard, part: held.part, read: held.read })
        };
        self.by_shard.iter().filter_map(lease).collect()
    }

    /// Takes over what was held before a restart; ids go on from `next_id`. Everything else is dealt from the first open epoch on, where
    /// what is held or done is passed over. Takes time in the number of shards for each lease.
    pub fn restore(&mut self, held: impl IntoIterator<Item = HeldLease>, next_id: LeaseId) {
        self.next_id = next_id.0;
        let mut held: Vec<HeldLease> = held.into_iter().collect();
        held.sort_unstable_by_key(|lease| lease.id);
        for lease in held {
            let HeldLease { holder, part, read, .. } = lease;
            let Some(position) = self.order.position_of(lease.epoch, lease.shard) else { continue };
            self.hold(lease.granted(), Held { holder, position, part, read, asked: false, num_passed: 0 });
        }
    }

    /// Gives the member up to `num` shards that are not done: what was given back first, then its own deal, and what was set aside once
    /// there is nothing else.
    ///
    /// Once its own deal is exhausted, which happens in the last epoch only, and it has read all it holds, it takes over one shard
    /// of another member's deal, never that member's first: reading ahead must not leave anybody without work. If it `is_idle`, with
    /// nothing left to train, it takes over the rest of a shard that another reads: the last lease of whoever has most to read.
    pub fn grant(&mut self, holder: WorkerId, member: MemberIndex, num: u32, is_idle: bool, ledger: &Ledger) -> Grant {
        let mut leases = Vec::new();
        while leases.len() < num as usize {
            let returned = self.returned.pop_first().map(|((position, from), (to, num_passed))| (position, Part { from, to }, num_passed));
            let next = returned.or_else(|| Some((self.deal(member.0 as usize)?, Part::WHOLE, 0)));
            let Some((position, part, num_passed)) = next else { break };
            leases.extend(self.lease(holder, position, part, num_passed, ledger));
        }
        let has_read = self.by_holder.get(&holder).is_none_or(|holding| holding.num_unread == 0);
        while leases.is_empty() && has_read {
            let Some(position) = self.take_over() else { break };
            leases.extend(self.lease(holder, position, Part::WHOLE, 0, ledger));
        }
        while leases.is_empty() && has_read && !self.any_left_now() {
            let Some(((position, from), (to, num_passed))) = self.later.pop_first() else { break };
            leases.extend(self.lease(holder, position, Part { from, to }, num_passed, ledger));
        }
        let left = self.any_left();
        if leases.is_empty() && left {
            return Grant::Later;
        }
        if leases.is_empty() && is_idle {
            if self.held.values().any(|held| held.asked && !held.read) {
                return Grant::Later;
            }
            if let Some((holder, lease)) = self.rest_to_take(holder) {
                return Grant::AskBack { holder, lease };
            }
        }
        let none_left = !left && leases.len() < num as usize;
        let when_idle = none_left && !is_idle && self.held.values().any(|held| held.holder != holder && held.can_be_asked());
        Grant::Now { leases, none_left, when_idle }
    }

    /// A lease on what of a part is neither done nor being read.
    fn lease(&mut self, holder: WorkerId, position: Position, part: Part, num_passed: u8, ledger: &Ledger) -> Option<Granted> {
        let (epoch, shard) = self.order.place(position);
        if ledger.is_done(epoch, shard) {
            return None;
        }
        let mut free = self.free_parts(epoch, shard, part).into_iter();
        let first = free.next()?;
        for other in free {
            self.give_up(position, other, num_passed);
        }
        let granted = Granted { id: LeaseId(self.next_id), epoch, shard, part: first };
        self.next_id += 1;
        self.hold(granted, Held { holder, position, part: first, read: false, asked: false, num_passed });
        Some(granted)
    }

    fn hold(&mut self, granted: Granted, held: Held) {
        self.by_shard.insert((granted.epoch, granted.shard, granted.id));
        let holding = self.by_holder.entry(held.holder).or_default();
        holding.leases.push_back(granted.id);
        holding.num_unread += usize::from(!held.read);
        self.held.insert(granted.id, held);
    }

    /// What of `part` nobody holds.
    fn free_parts(&self, epoch: Epoch, shard: ShardId, part: Part) -> Vec<Part> {
        let mut held: Vec<Part> = self.leases_on(epoch, shard).filter_map(|id| Some(self.held.get(&id)?.part)).collect();
        held.sort_unstable_by_key(|part| part.from);
        let mut free = Vec::new();
        let mut from = part.from;
        for taken in held.into_iter().chain([Part { from: part.to, to: part.to }]) {
            let to = taken.from.min(part.to);
            if from < to {
                free.push(Part { from, to });
            }
            from = from.max(taken.to);
        }
        free
    }

    fn leases_on(&self, epoch: Epoch, shard: ShardId) -> impl Iterator<Item = LeaseId> + '_ {
        self.by_shard.range((epoch, shard, LeaseId(0))..=(epoch, shard, LeaseId(u64::MAX))).map(|&(_, _, id)| id)
    }

    /// Puts a part back among what anybody may have, together with what lies beside it.
    fn give_up(&mut self, position: Position, mut part: Part, mut num_passed: u8) {
        let parts = if self.aside.contains(&position) { &mut self.later } else { &mut self.returned };
        let of_shard = parts.range((position, 0)..=(position, Part::OPEN));
        let beside = of_shard.filter(|&(&(_, from), &(to, _))| from <= part.to && part.from <= to).map(|(&key, _)| key);
        for key in beside.collect::<Vec<_>>() {
            if let Some((to, times)) = parts.remove(&key) {
                part = Part { from: part.from.min(key.1), to: part.to.max(to) };
                num_passed = num_passed.max(times);
            }
        }
        parts.insert((position, part.from), (part.to, num_passed));
    }

    /// Whom an idle member asks for what: the last lease of whoever has most to read.
    fn rest_to_take(&mut self, idle: WorkerId) -> Option<(WorkerId, LeaseId)> {
        let mut holders: Vec<(&WorkerId, &Holding)> = self.by_holder.iter().filter(|&(&holder, _)| holder != idle).collect();
        holders.sort_by_key(|(_, holding)| std::cmp::Reverse(holding.num_unread));
        let can_be_asked = |id: &LeaseId| self.held.get(id).is_some_and(Held::can_be_asked);
        let found =
            holders.into_iter().find_map(|(&holder, holding)| Some((holder, *holding.leases.iter().rev().find(|id| can_be_asked(id))?)));
        if let Some(held) = found.and_then(|(_, id)| self.held.get_mut(&id)) {
            held.asked = true;
        }
        found
    }

    /// Notes that a lease's holder will read no more of it.
    pub fn set_read(&mut self, id: LeaseId) {
        let Some(held) = self.held.get_mut(&id) else { return };
        if !std::mem::replace(&mut held.read, true)
            && let Some(holding) = self.by_holder.get_mut(&held.holder)
        {
            holding.num_unread -= 1;
        }
    }

    /// Takes back what a lease's holder has not begun: everything from index `from` on. It keeps what lies below.
    pub fn give_back(&mut self, id: LeaseId, from: u32) {
        self.set_read(id);
        let Some(held) = self.held.get_mut(&id) else { return };
        let Held { position, part, asked, num_passed, .. } = *held;
        let (kept, rest) = part.split(from);
        held.part = kept;
        if kept.is_empty() {
            self.end(id);
        }
        if !rest.is_empty() {
            self.give_up(position, rest, num_passed + u8::from(asked));
        }
    }

    /// What is given back of a shard from now on is left for later, until it is [taken up](Self::take_up).
    pub fn set_aside(&mut self, epoch: Epoch, shard: ShardId) {
        self.aside.extend(self.order.position_of(epoch, shard));
    }

    /// A shard that was left for later is as good as any other.
    pub fn take_up(&mut self, epoch: Epoch, shard: ShardId) {
        let Some(position) = self.order.position_of(epoch, shard).filter(|position| self.aside.remove(position)) else { return };
        let parts: Vec<_> = self.later.range((position, 0)..=(position, Part::OPEN)).map(|(&key, &part)| (key, part)).collect();
        self.later.retain(|&(of, _), _| of != position);
        self.returned.extend(parts);
    }

    /// Ends the leases on a shard that is done.
    pub fn finish(&mut self, epoch: Epoch, shard: ShardId) {
        for id in self.leases_on(epoch, shard).collect::<Vec<_>>() {
            self.end(id);
        }
    }

    /// Takes back everything `holder` has. Its shards go to whoever asks next.
    pub fn release(&mut self, holder: WorkerId) {
        for id in self.held_by(holder) {
            if let Some(held) = self.end(id) {
                self.give_up(held.position, held.part, 0);
            }
        }
    }

    fn end(&mut self, id: LeaseId) -> Option<Held> {
        let held = self.held.remove(&id)?;
        let (epoch, shard) = self.order.place(held.position);
        self.by_shard.remove(&(epoch, shard, id));
        if let Some(holding) = self.by_holder.get_mut(&held.holder) {
            // Ids ascend.
            if let Ok(at) = holding.leases.binary_search(&id) {
                holding.leases.remove(at);
            }
            holding.num_unread -= usize::from(!held.read);
            if holding.leases.is_empty() {
                self.by_holder.remove(&held.holder);
            }
        }
        Some(held)
    }

    /// The shard of a lease that `holder` has.
    #[must_use]
    pub fn shard_of(&mut self, id: LeaseId, holder: WorkerId) -> Option<(Epoch, ShardId)> {
        let held = *self.held.get(&id)?;
        (held.holder == holder).then(|| self.order.place(held.position))
    }

    /// Everybody who holds a lease.
    #[must_use]
    pub fn holders(&self) -> BTreeSet<WorkerId> {
        self.by_holder.keys().copied().collect()
    }

    /// Leases that `holder` has.
    #[must_use]
    pub fn held_by(&self, holder: WorkerId) -> Vec<LeaseId> {
        self.by_holder.get(&holder).map(|holding| holding.leases.iter().copied().collect()).unwrap_or_default()
    }

    /// Leases of which `holder` still reads.
    #[must_use]
    pub fn unread_by(&self, holder: WorkerId) -> Vec<LeaseId> {
        self.held_by(holder).into_iter().filter(|id| self.held.get(id).is_some_and(|held| !held.read)).collect()
    }

    /// Who reads a shard: one worker, or several with a part each, in the order of granting.
    #[must_use]
    pub fn holders_of(&self, epoch: Epoch, shard: ShardId) -> Vec<WorkerId> {
        self.leases_on(epoch, shard).filter_map(|id| Some(self.held.get(&id)?.holder)).collect()
    }

    /// Number of shards of `epoch` among `shards` that are leased now.
    #[must_use]
    pub fn num_leased(&self, epoch: Epoch, shards: std::ops::Range<u32>) -> u32 {
        let leases = self.by_shard.range((epoch, ShardId(shards.start), LeaseId(0))..(epoch, ShardId(shards.end), LeaseId(0)));
        let mut last = None;
        leases.filter(|&&(_, shard, _)| last.replace(shard) != Some(shard)).count() as u32
    }

    /// Next position in a member's deal.
    fn next_of(&self, member: usize) -> Option<Position> {
        let rounds = *self.rounds.get(member)?;
        let position = self.base + member as u64 + rounds * self.rounds.len() as u64;
        (position < self.order.end()).then_some(position)
    }

    fn deal(&mut self, member: usize) -> Option<Position> {
        let position = self.next_of(member)?;
        self.rounds[member] += 1;
        Some(position)
    }

    /// Notes that a member takes nothing more of its deal.
    pub fn set_leaving(&mut self, member: MemberIndex) {
        self.leaving.insert(member.0 as usize);
    }

    /// Says who the members are that are dealt to, by index.
    pub fn seat(&mut self, members: &[WorkerId]) {
        self.members = members.to_vec();
    }

    /// The lowest position left in the deal of a member that leaves, has its first, or has something else to read: such a one may not ask
    /// for its first before the member that waits here has given its share.
    fn take_over(&mut self) -> Option<Position> {
        let reads = |member: usize| {
            let holding = self.members.get(member).and_then(|id| self.by_holder.get(id));
            holding.is_some_and(|holding| holding.num_unread > 0)
        };
        let is_busy = |&member: &usize| self.rounds[member] > 0 || self.leaving.contains(&member) || reads(member);
        let others = (0..self.rounds.len()).filter(is_busy);
        let (_, member) = others.filter_map(|member| Some((self.next_of(member)?, member))).min()?;
        self.deal(member)
    }

    /// Whether something is still to be given out, or may be, as long as nothing is dealt.
    #[must_use]
    pub fn any_left(&self) -> bool {
        self.any_left_now() || !self.later.is_empty()
    }

    /// The same but for shards that are left for later.
    fn any_left_now(&self) -> bool {
        let undealt = self.rounds.is_empty() && self.base < self.order.end();
        undealt || !self.returned.is_empty() || (0..self.rounds.len()).any(|member| self.next_of(member).is_some())
    }
}

/// The first position of an epoch that is open.
fn start(order: &Order, ledger: &Ledger) -> Position {
    (0..ledger.num_sources()).map(|source| order.start_of(source, ledger.open_epoch_of(source))).min().unwrap_or_default()
}

#[cfg(test)]
mod tests;
