//! Who may read which shard.
//!
//! Shards are dealt in the order of a permutation drawn from (seed, epoch), round by member index, so that an undisturbed
//! world of fixed size always sees the same batches. Positions count on over the epochs: uneven rounds even out in the next.

use std::collections::{BTreeMap, BTreeSet};

use peapod_proto::ids::{Epoch, LeaseId, MemberIndex, SampleName, ShardId, WorkerId};
use serde::{Deserialize, Serialize};

use super::ledger::Ledger;

/// Place of a shard in the order of all epochs: `epoch * num_shards + place in the epoch`.
type Position = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    holder: WorkerId,
    position: Position,
    /// Its holder has reached the end of the tar.
    read: bool,
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
    /// Its holder has reached the end of the tar.
    pub read: bool,
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
    },
    /// Nothing yet: what is left is dealt to others, and this member still reads its own.
    Later,
}

/// All leases of a job.
#[derive(Debug, Clone)]
pub struct Leases {
    seed: u64,
    num_shards: u32,
    /// Positions at or past this one do not exist; none for a job that is given in steps.
    end: Option<Position>,
    next_id: u64,
    held: BTreeMap<LeaseId, Held>,
    by_shard: BTreeMap<(Epoch, ShardId), LeaseId>,
    /// Positions given back, or jumped over when the membership changed: whoever asks first gets them.
    returned: BTreeSet<Position>,
    /// Positions below are held, done, or in `returned`, unless they are still ahead of their member below.
    base: Position,
    /// For each member, how many rounds from `base` it was dealt.
    rounds: Vec<u64>,
    /// Orders of the epochs in use.
    orders: BTreeMap<Epoch, Vec<ShardId>>,
}

impl Leases {
    /// Leases over `num_shards` shards for `epochs` passes (without end if none), starting in epoch `first`.
    #[must_use]
    pub fn new(seed: u64, num_shards: u32, epochs: Option<u32>, first: Epoch) -> Self {
        let end = epochs.map(|epochs| u64::from(epochs) * u64::from(num_shards));
        Self {
            seed,
            num_shards,
            end: Some(end.unwrap_or(u64::MAX).min(u64::from(SampleName::LIMIT) * u64::from(num_shards))),
            next_id: 1,
            held: BTreeMap::new(),
            by_shard: BTreeMap::new(),
            returned: BTreeSet::new(),
            base: u64::from(first.0) * u64::from(num_shards),
            rounds: Vec::new(),
            orders: BTreeMap::new(),
        }
    }

    /// Deals anew among `num_members`, from where the furthest member of the last membership was.
    pub fn deal_among(&mut self, num_members: u32) {
        let members = self.rounds.len() as u64;
        let next = |index: usize, rounds: u64| self.base + index as u64 + rounds * members;
        let frontier =
            self.rounds.iter().enumerate().filter(|&(_, &rounds)| rounds > 0).map(|(index, &rounds)| next(index, rounds - 1) + 1).max();
        if let Some(frontier) = frontier {
            for (index, &rounds) in self.rounds.iter().enumerate() {
                let mut position = next(index, rounds);
                while position < frontier {
                    self.returned.insert(position);
                    position += members;
                }
            }
            self.base = frontier;
        }
        self.rounds = vec![0; num_members as usize];
    }

    /// Forgets every lease and deal, and starts again at the first epoch the ledger has open.
    pub fn restart(&mut self, ledger: &Ledger) {
        let fresh = Self::new(self.seed, self.num_shards, None, ledger.first_open_epoch());
        *self = Self { end: self.end, next_id: self.next_id, rounds: vec![0; self.rounds.len()], ..fresh };
    }

    /// The id that the next lease will have.
    #[must_use]
    pub fn next_id(&self) -> LeaseId {
        LeaseId(self.next_id)
    }

    /// Every lease, by epoch and shard.
    #[must_use]
    pub fn held(&self) -> Vec<HeldLease> {
        let lease = |(&(epoch, shard), id): (&(Epoch, ShardId), &LeaseId)| {
            let held = self.held.get(id)?;
            Some(HeldLease { id: *id, holder: held.holder, epoch, shard, read: held.read })
        };
        self.by_shard.iter().filter_map(lease).collect()
    }

    /// Takes over what was held before a restart; ids go on from `next_id`. Everything else is dealt from the first open epoch on, where what is
    /// held or done is passed over.
    pub fn restore(&mut self, held: impl IntoIterator<Item = HeldLease>, next_id: LeaseId) {
        self.next_id = next_id.0;
        let mut places: BTreeMap<Epoch, Vec<u32>> = BTreeMap::new();
        for HeldLease { id, holder, epoch, shard, read } in held {
            let places = places.entry(epoch).or_insert_with(|| {
                let mut places = vec![0; self.num_shards as usize];
                for (place, shard) in order(self.seed, epoch, self.num_shards).into_iter().enumerate() {
                    places[shard.0 as usize] = place as u32;
                }
                places
            });
            let Some(&place) = places.get(shard.0 as usize) else { continue };
            let position = u64::from(epoch.0) * u64::from(self.num_shards) + u64::from(place);
            self.held.insert(id, Held { holder, position, read });
            self.by_shard.insert((epoch, shard), id);
        }
    }

    /// Gives the member up to `num` shards that are not done: what was given back first, then its own deal.
    ///
    /// Once its own deal is exhausted, which happens in the last epoch only, and it has read all it holds, it takes over one shard
    /// of another member's deal, never that member's first: reading ahead must not leave anybody without work.
    pub fn grant(&mut self, holder: WorkerId, member: MemberIndex, num: u32, ledger: &Ledger) -> Grant {
        let mut leases = Vec::new();
        while leases.len() < num as usize {
            let Some(position) = self.returned.pop_first().or_else(|| self.deal(member.0 as usize)) else { break };
            leases.extend(self.lease(holder, position, ledger));
        }
        let idle = self.held.values().all(|held| held.holder != holder || held.read);
        while leases.is_empty() && idle {
            let Some(position) = self.take_over() else { break };
            leases.extend(self.lease(holder, position, ledger));
        }
        let left = self.any_left();
        if leases.is_empty() && left { Grant::Later } else { Grant::Now { none_left: !left && leases.len() < num as usize, leases } }
    }

    /// A lease on the shard at a position, unless it is done or being read.
    fn lease(&mut self, holder: WorkerId, position: Position, ledger: &Ledger) -> Option<Granted> {
        let (epoch, shard) = self.place(position);
        if ledger.is_done(epoch, shard) || self.by_shard.contains_key(&(epoch, shard)) {
            return None;
        }
        let id = LeaseId(self.next_id);
        self.next_id += 1;
        self.held.insert(id, Held { holder, position, read: false });
        self.by_shard.insert((epoch, shard), id);
        Some(Granted { id, epoch, shard })
    }

    /// Notes that a lease's holder has reached the end of the tar.
    pub fn set_read(&mut self, id: LeaseId) {
        if let Some(held) = self.held.get_mut(&id) {
            held.read = true;
        }
    }

    /// Ends the lease on a shard that is done.
    pub fn finish(&mut self, epoch: Epoch, shard: ShardId) {
        if let Some(id) = self.by_shard.remove(&(epoch, shard)) {
            self.held.remove(&id);
        }
    }

    /// Takes back everything `holder` has. Its shards go to whoever asks next.
    pub fn release(&mut self, holder: WorkerId) {
        let ids: Vec<LeaseId> = self.held.iter().filter(|(_, held)| held.holder == holder).map(|(&id, _)| id).collect();
        for id in ids {
            if let Some(held) = self.held.remove(&id) {
                let place = self.place(held.position);
                self.by_shard.remove(&place);
                self.returned.insert(held.position);
            }
        }
    }

    /// The shard of a lease that `holder` has.
    #[must_use]
    pub fn shard_of(&mut self, id: LeaseId, holder: WorkerId) -> Option<(Epoch, ShardId)> {
        let held = *self.held.get(&id)?;
        (held.holder == holder).then(|| self.place(held.position))
    }

    /// Everybody who holds a lease.
    #[must_use]
    pub fn holders(&self) -> BTreeSet<WorkerId> {
        self.held.values().map(|held| held.holder).collect()
    }

    /// Leases that `holder` has.
    #[must_use]
    pub fn held_by(&self, holder: WorkerId) -> Vec<LeaseId> {
        self.held.iter().filter(|(_, held)| held.holder == holder).map(|(&id, _)| id).collect()
    }

    /// Who reads a shard.
    #[must_use]
    pub fn holder_of(&self, epoch: Epoch, shard: ShardId) -> Option<WorkerId> {
        Some(self.held.get(self.by_shard.get(&(epoch, shard))?)?.holder)
    }

    /// Number of shards of `epoch` that are leased now.
    #[must_use]
    pub fn num_leased(&self, epoch: Epoch) -> u32 {
        let shards = (epoch, ShardId(0))..=(epoch, ShardId(u32::MAX));
        self.by_shard.range(shards).count() as u32
    }

    /// Next position in a member's deal.
    fn next_of(&self, member: usize) -> Option<Position> {
        let rounds = *self.rounds.get(member)?;
        let position = self.base + member as u64 + rounds * self.rounds.len() as u64;
        self.end.is_none_or(|end| position < end).then_some(position)
    }

    fn deal(&mut self, member: usize) -> Option<Position> {
        let position = self.next_of(member)?;
        self.rounds[member] += 1;
        Some(position)
    }

    /// The lowest position left in the deal of a member that has its first.
    fn take_over(&mut self) -> Option<Position> {
        let others = (0..self.rounds.len()).filter(|&member| self.rounds[member] > 0);
        let (_, member) = others.filter_map(|member| Some((self.next_of(member)?, member))).min()?;
        self.deal(member)
    }

    fn any_left(&self) -> bool {
        !self.returned.is_empty() || (0..self.rounds.len()).any(|member| self.next_of(member).is_some())
    }

    fn place(&mut self, position: Position) -> (Epoch, ShardId) {
        let epoch = Epoch((position / u64::from(self.num_shards)) as u32);
        let place = (position % u64::from(self.num_shards)) as usize;
        if !self.orders.contains_key(&epoch) {
            // Three epochs at once are the most that a run needs: one ending, one running, one read ahead.
            while self.orders.len() >= 3 {
                self.orders.pop_first();
            }
            self.orders.insert(epoch, order(self.seed, epoch, self.num_shards));
        }
        (epoch, self.orders[&epoch][place])
    }
}

/// The shards of an epoch in the order they are dealt: a Fisher-Yates shuffle driven by SplitMix64 over (seed, epoch).
///
/// Fixed here rather than taken from a library: a resumed job must find the order it was started with.
fn order(seed: u64, epoch: Epoch, num_shards: u32) -> Vec<ShardId> {
    let mut state = seed ^ u64::from(epoch.0).wrapping_mul(0xd1b5_4a32_d192_ed03);
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut shards: Vec<ShardId> = (0..num_shards).map(ShardId).collect();
    for last in (1..shards.len()).rev() {
        let pick = ((u128::from(next()) * (last as u128 + 1)) >> 64) as usize;
        shards.swap(last, pick);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use peapod_proto::ids::Step;

    fn take(leases: &mut Leases, member: u32, num: u32, ledger: &Ledger) -> Vec<Granted> {
        match leases.grant(WorkerId(member.into()), MemberIndex(member), num, ledger) {
            Grant::Now { leases, .. } => leases,
            Grant::Later => Vec::new(),
        }
    }

    fn drain(leases: &mut Leases, members: u32, ledger: &Ledger) -> Vec<Vec<(u32, u32)>> {
        let mut taken = vec![Vec::new(); members as usize];
        loop {
            let mut any = false;
            for member in 0..members {
                for lease in take(leases, member, 1, ledger) {
                    leases.set_read(lease.id);
                    taken[member as usize].push((lease.epoch.0, lease.shard.0));
                    any = true;
                }
            }
            if !any {
                return taken;
            }
        }
    }

    #[test]
    fn each_epoch_is_a_permutation_and_epochs_differ() {
        let mut first: Vec<_> = order(7, Epoch(0), 100);
        assert_ne!(first, order(7, Epoch(1), 100));
        assert_ne!(first, order(8, Epoch(0), 100));
        first.sort();
        assert_eq!(first, (0..100).map(ShardId).collect::<Vec<_>>());
    }

    #[test]
    fn every_shard_of_every_epoch_is_granted_once() {
        for members in 1..5 {
            let ledger = Ledger::new(7);
            let mut leases = Leases::new(1, 7, Some(3), Epoch(0));
            leases.deal_among(members);
            let mut all: Vec<_> = drain(&mut leases, members, &ledger).concat();
            all.sort_unstable();
            let expected: Vec<_> = (0..3).flat_map(|epoch| (0..7).map(move |shard| (epoch, shard))).collect();
            assert_eq!(all, expected, "{members} members");
        }
    }

    #[test]
    fn deal_does_not_depend_on_who_asks_first() {
        let ledger = Ledger::new(6);
        let ask = |order: [u32; 4]| {
            let mut leases = Leases::new(3, 6, None, Epoch(0));
            leases.deal_among(2);
            let mut got: Vec<_> = order.iter().map(|&m| (m, take(&mut leases, m, 1, &ledger)[0].shard)).collect();
            got.sort();
            got
        };
        assert_eq!(ask([0, 0, 1, 1]), ask([1, 1, 0, 0]));
        assert_eq!(ask([0, 1, 0, 1]), ask([1, 0, 0, 1]));
    }

    #[test]
    fn idle_member_takes_over_what_others_have_left_but_never_their_first() {
        let ledger = Ledger::new(4);
        let mut leases = Leases::new(1, 4, Some(1), Epoch(0));
        leases.deal_among(2);
        let own = take(&mut leases, 0, 3, &ledger);
        assert_eq!(own.len(), 2, "its own deal, nothing of the other's");
        assert_eq!(leases.grant(WorkerId(0), MemberIndex(0), 1, &ledger), Grant::Later, "it still reads");
        own.iter().for_each(|lease| leases.set_read(lease.id));
        assert_eq!(leases.grant(WorkerId(0), MemberIndex(0), 1, &ledger), Grant::Later, "the other has not had its first");
        assert_eq!(take(&mut leases, 1, 1, &ledger).len(), 1);
        let over = leases.grant(WorkerId(0), MemberIndex(0), 2, &ledger);
        assert!(matches!(over, Grant::Now { leases, none_left: true } if leases.len() == 1));
        assert_eq!(leases.grant(WorkerId(1), MemberIndex(1), 1, &ledger), Grant::Now { leases: vec![], none_left: true });
    }

    #[test]
    fn a_dead_holders_shards_go_to_the_next_who_asks() {
        let ledger = Ledger::new(4);
        let mut leases = Leases::new(1, 4, Some(1), Epoch(0));
        leases.deal_among(2);
        let lost = take(&mut leases, 1, 2, &ledger);
        leases.release(WorkerId(1));
        assert_eq!(leases.shard_of(lost[0].id, WorkerId(1)), None);
        leases.deal_among(1);
        let all = take(&mut leases, 0, 10, &ledger);
        assert_eq!(all.len(), 4);
        assert!(all.iter().all(|lease| lost.iter().all(|old| old.id != lease.id)), "lease ids are never reused");
    }

    #[test]
    fn change_of_size_loses_and_doubles_nothing() {
        let ledger = Ledger::new(11);
        let mut leases = Leases::new(5, 11, Some(2), Epoch(0));
        let mut all = Vec::new();
        leases.deal_among(3);
        // Uneven progress: member 2 is far ahead when the world shrinks, then grows.
        all.extend(take(&mut leases, 2, 3, &ledger));
        all.extend(take(&mut leases, 0, 1, &ledger));
        leases.deal_among(1);
        all.extend(take(&mut leases, 0, 2, &ledger));
        leases.deal_among(4);
        for member in [3, 1, 0, 2, 1] {
            all.extend(take(&mut leases, member, 5, &ledger));
            all.iter().for_each(|lease| leases.set_read(lease.id));
        }
        let mut places: Vec<_> = all.iter().map(|lease| (lease.epoch, lease.shard)).collect();
        places.sort();
        places.dedup();
        assert_eq!((places.len(), all.len()), (22, 22));
    }

    #[test]
    fn shards_done_before_a_resume_are_not_granted() {
        let mut ledger = Ledger::new(3);
        ledger.set_size(Epoch(0), ShardId(1), 1).unwrap();
        ledger.commit(SampleName { epoch: Epoch(0), shard: ShardId(1), index: 0 }, Step(1)).unwrap();
        let mut leases = Leases::new(1, 3, Some(1), ledger.first_open_epoch());
        leases.deal_among(2);
        let mut shards: Vec<_> = drain(&mut leases, 2, &ledger).concat();
        shards.sort_unstable();
        assert_eq!(shards, [(0, 0), (0, 2)]);
    }

    #[test]
    fn finished_lease_is_nobodys() {
        let ledger = Ledger::new(2);
        let mut leases = Leases::new(1, 2, Some(1), Epoch(0));
        leases.deal_among(1);
        let lease = take(&mut leases, 0, 1, &ledger)[0];
        assert_eq!(leases.holder_of(lease.epoch, lease.shard), Some(WorkerId(0)));
        leases.finish(lease.epoch, lease.shard);
        assert_eq!((leases.holder_of(lease.epoch, lease.shard), leases.held_by(WorkerId(0)).len()), (None, 0));
    }
}
