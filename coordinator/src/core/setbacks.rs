//! What keeps failing is left out for a while, where the job can do without it.
//!
//! A host on which workers die again and again, or one of two workers whose connection keeps breaking though both live, would end every
//! generation that it is part of, and so would a shard that kills its readers. And a job of which no generation gets as far as one step is
//! told to its user instead of going round for ever.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use peapod_proto::ids::{Epoch, Generation, MemberIndex, Rank, ShardId, WorkerId};
use peapod_proto::message::Stopped;

use super::membership::WorkerState;
use super::{Core, Effect, JobPhase, Notice, Timestamp};

/// Failures are counted over this time.
const WINDOW: Duration = Duration::from_secs(600);
/// So many of them are a habit.
const HABIT: usize = 3;
/// What has the habit is left out for this long.
const ASIDE: Duration = Duration::from_secs(600);
/// So many generations in a row may break before their first step is done: with the pauses, it takes a minute at least.
const MAX_BARREN: u32 = 20;
/// From so many on there is a pause before the next one, twice as long each time: what breaks them at once may be over soon, a firewall
/// that is loaded anew say.
const FREE_BARREN: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What has failed lately, and what is left out because of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Setbacks {
    /// Hosts of which members died; once a generation, or one power cut would look like a habit.
    deaths: VecDeque<(Timestamp, Generation, String)>,
    /// Members that lost each other, both alive.
    broken: VecDeque<(Timestamp, WorkerId, WorkerId)>,
    hosts: BTreeMap<String, Timestamp>,
    workers: BTreeMap<WorkerId, Timestamp>,
    /// Shards that were held at the last death, at how many in a row, and when.
    held: BTreeMap<(Epoch, ShardId), (usize, Timestamp)>,
    shards: BTreeMap<(Epoch, ShardId), Timestamp>,
    /// Generations that broke since a step was final, and until when no other begins because of it.
    barren: u32,
    pause: Option<Timestamp>,
    /// Ranks whose last worker could not load what the job needs.
    unloaded: BTreeSet<Rank>,
}

impl Setbacks {
    /// A member died; says whether its host is to be left out from now on. It is not where no worker is on another one: the job would stay
    /// small for it and gain nothing.
    fn died(&mut self, now: Timestamp, generation: Generation, host: &str, has_others: bool) -> bool {
        self.deaths.retain(|(at, ..)| *at + WINDOW > now);
        if self.hosts.contains_key(host) || self.deaths.iter().any(|(_, of, on)| *of == generation && on == host) {
            return false;
        }
        self.deaths.push_back((now, generation, host.to_owned()));
        if self.deaths.iter().filter(|(_, _, on)| on == host).count() < HABIT || !has_others {
            return false;
        }
        self.deaths.retain(|(_, _, on)| on != host);
        self.hosts.insert(host.to_owned(), now + ASIDE);
        true
    }

    /// A member died that held these shards; gives those that are to be left for later from now on.
    fn died_holding(&mut self, now: Timestamp, held: &BTreeSet<(Epoch, ShardId)>) -> Vec<(Epoch, ShardId)> {
        self.held.retain(|shard, (_, at)| held.contains(shard) && *at + WINDOW > now);
        for &shard in held {
            let (times, at) = self.held.entry(shard).or_default();
            (*times, *at) = (*times + 1, now);
        }
        let habit: Vec<_> = self.held.iter().filter(|(_, (times, _))| *times >= HABIT).map(|(&shard, _)| shard).collect();
        self.held.retain(|_, (times, _)| *times < HABIT);
        self.shards.extend(habit.iter().map(|&shard| (shard, now + ASIDE)));
        habit
    }

    /// A host is of no use whoever comes from it; says whether that is new.
    fn is_bad(&mut self, now: Timestamp, host: &str) -> bool {
        self.hosts.insert(host.to_owned(), now + ASIDE).is_none()
    }

    /// Two members lost each other; says which of them is to be left out from now on: who lost others more often, or came later.
    fn broke(&mut self, now: Timestamp, one: WorkerId, other: WorkerId) -> Option<WorkerId> {
        self.broken.retain(|(at, ..)| *at + WINDOW > now);
        let pair = (one.min(other), one.max(other));
        self.broken.push_back((now, pair.0, pair.1));
        if self.broken.iter().filter(|(_, a, b)| (*a, *b) == pair).count() < HABIT {
            return None;
        }
        let num_lost = |id: WorkerId| self.broken.iter().filter(|(_, a, b)| *a == id || *b == id).count();
        let worse = if num_lost(pair.0) > num_lost(pair.1) { pair.0 } else { pair.1 };
        self.broken.retain(|(_, a, b)| *a != worse && *b != worse);
        self.workers.insert(worse, now + ASIDE);
        Some(worse)
    }

    /// Whether a worker is left out while others are enough.
    pub fn is_aside(&self, id: WorkerId, host: &str) -> bool {
        self.workers.contains_key(&id) || self.hosts.contains_key(host)
    }

    /// When something is next given another chance.
    pub fn next_end(&self) -> Option<Timestamp> {
        self.hosts.values().chain(self.workers.values()).chain(self.shards.values()).min().copied()
    }

    /// Gives another chance to whatever has been left out long enough; says whether there was any.
    pub fn forgive(&mut self, now: Timestamp) -> bool {
        let before = self.hosts.len() + self.workers.len();
        self.hosts.retain(|_, until| *until > now);
        self.workers.retain(|_, until| *until > now);
        self.hosts.len() + self.workers.len() < before
    }

    /// The shards that have been left for later long enough.
    pub fn forgive_shards(&mut self, now: Timestamp) -> Vec<(Epoch, ShardId)> {
        let forgiven = self.shards.iter().filter(|(_, until)| **until <= now).map(|(&shard, _)| shard).collect();
        self.shards.retain(|_, until| *until > now);
        forgiven
    }

    /// The worker of a rank cannot be one, for a reason that no other start cures where it is.
    pub fn could_not_load(&mut self, rank: Rank) {
        self.unloaded.insert(rank);
    }

    /// The worker of a rank is well.
    pub fn loaded(&mut self, rank: Rank) {
        self.unloaded.remove(&rank);
    }

    /// A step is final.
    pub fn progressed(&mut self) {
        (self.barren, self.pause) = (0, None);
    }

    /// A generation broke before its first step, or after it; says whether that was one too many.
    fn broke_barren(&mut self, now: Timestamp) -> bool {
        self.barren += 1;
        let times = self.barren.checked_sub(FREE_BARREN);
        self.pause = times.map(|times| now + (FIRST_PAUSE * 2_u32.saturating_pow(times)).min(LONGEST_PAUSE));
        self.barren >= MAX_BARREN
    }

    /// Until when no generation begins.
    pub fn pause(&self) -> Option<Timestamp> {
        self.pause
    }

    /// After how many generations that bore nothing there is a pause now.
    pub fn pausing_after(&self) -> Option<u32> {
        self.pause.map(|_| self.barren)
    }

    /// Whether no generation may begin yet; a pause that is over is forgotten.
    pub fn is_pausing(&mut self, now: Timestamp) -> bool {
        self.pause = self.pause.filter(|&until| now < until);
        self.pause.is_some()
    }
}

impl Core {
    /// A member of the current generation is lost.
    pub(super) fn note_death(&mut self, now: Timestamp, id: WorkerId, host: &str, out: &mut Vec<Effect>) {
        let has_others = self.workers.values().any(|worker| worker.host != host);
        if self.setbacks.died(now, self.generation, host, has_others) {
            let what = format!("host {host}: its workers died in {HABIT} generations within {} minutes", WINDOW.as_secs() / 60);
            out.push(Effect::Notice(Notice::SetAside { what, lasts: ASIDE }));
        }
        let held: BTreeSet<_> = self.leases.held_by(id).into_iter().filter_map(|lease| self.leases.shard_of(lease, id)).collect();
        for (epoch, shard) in self.setbacks.died_holding(now, &held) {
            self.leases.set_aside(epoch, shard);
            let url = self.shown_url_of(shard);
            let what = format!("shard {url} of epoch {epoch}: {HABIT} workers in a row died while they held it");
            out.push(Effect::Notice(Notice::SetAside { what, lasts: ASIDE }));
        }
    }

    /// Whether the job does without a worker that has failed in a way that no other start cures.
    ///
    /// A member's failure is the job's: what it met in training awaits the others too. Who has never trained is no part of a job that has
    /// members; before there are any, it is left out while the others are enough. If all share what it failed of, the job ends with the one
    /// that leaves too few.
    pub(super) fn can_do_without(&self, id: WorkerId) -> bool {
        if self.last_members.iter().any(|member| member.worker == id) || self.truth.holders.contains(&id) {
            return false;
        }
        let others = self.workers.iter().filter(|(other, worker)| **other != id && worker.leaving.is_none()).count();
        !self.last_members.is_empty() || others >= self.config.min_world_size as usize
    }

    /// Whether a job that has not begun goes on waiting without a worker that could not load: its folder or its GPU may be wrong, and
    /// another one may come in its place. Where every rank has failed so, it is the job's own fault.
    pub(super) fn can_wait_for_another(&self, id: WorkerId) -> bool {
        let waits = matches!(self.phase, JobPhase::Gathering { .. }) && self.last_members.is_empty() && !self.config.workers_are_alike;
        let Some(worker) = self.workers.get(&id).filter(|worker| waits && worker.state == WorkerState::Loading) else { return false };
        let mut unloaded = self.setbacks.unloaded.clone();
        unloaded.insert(worker.rank);
        unloaded.len() < self.config.world_size as usize
    }

    /// A worker that the job does without has failed for good: whoever is started on its host would too, unless others there are well.
    pub(super) fn note_bad_host(&mut self, now: Timestamp, id: WorkerId, failure: &str, out: &mut Vec<Effect>) {
        let Some(host) = self.workers.get(&id).map(|worker| worker.host.clone()) else { return };
        let is_well = |(other, worker): (&WorkerId, &super::Worker)| *other != id && worker.host == host && worker.is_ready();
        if !self.workers.iter().any(is_well) && self.setbacks.is_bad(now, &host) {
            out.push(Effect::Notice(Notice::SetAside { what: format!("host {host}: {failure}"), lasts: ASIDE }));
        }
    }

    /// Which two members lost each other, by what those say that are left: `members` in the order of their index.
    ///
    /// A member that fails closes its connections, so a loss travels round and most of them name a neighbour that is well. Two that name
    /// each other are believed; one alone is not, as whoever is told of an abort first closes its connections before its neighbour is told.
    /// Where nothing failed and everybody waited, who has received least is behind the broken link.
    pub(super) fn broken_link(&self, members: &[WorkerId], stopped: &BTreeMap<WorkerId, Stopped>) -> Option<(WorkerId, WorkerId)> {
        // Some may have died meanwhile; indices are those of the generation as it was formed.
        let at = |index: MemberIndex| self.last_members.get(index.0 as usize).map(|member| member.worker).filter(|id| members.contains(id));
        let lost = |id: &WorkerId| at(stopped.get(id)?.lost_member?);
        let mutual = members.iter().find_map(|&id| lost(&id).filter(|other| lost(other) == Some(id)).map(|other| (id, other)));
        if mutual.is_some() || self.hung != Some(self.generation) {
            return mutual;
        }
        let stalls = stopped.iter().filter_map(|(&id, said)| Some((id, said.stalled?)));
        let (id, stall) = stalls.min_by_key(|(_, stall)| stall.received_bytes)?;
        Some((id, at(stall.waiting_for)?)).filter(|(one, other)| one != other)
    }

    /// Two members lost each other.
    pub(super) fn note_broken(&mut self, now: Timestamp, one: WorkerId, other: WorkerId, out: &mut Vec<Effect>) {
        let name = |id: WorkerId| self.workers.get(&id).map(super::Worker::name);
        let (Some(a), Some(b)) = (name(one), name(other)) else { return };
        if let Some(worse) = self.setbacks.broke(now, one, other) {
            let (aside, from) = if worse == one { (a, b) } else { (b, a) };
            let minutes = WINDOW.as_secs() / 60;
            let what = format!("{aside}: its connection with {from} broke {HABIT} times within {minutes} minutes though both live");
            out.push(Effect::Notice(Notice::SetAside { what, lasts: ASIDE }));
        }
    }

    /// A generation broke; says why the job ends if too many did so without a step in between.
    pub(super) fn note_breakage(&mut self, now: Timestamp) -> Option<String> {
        let is_enough = self.setbacks.broke_barren(now);
        let first = self.first_failure().unwrap_or("see the log").to_owned();
        is_enough.then(|| format!("{MAX_BARREN} generations in a row broke before their first step was done; the first failure: {first}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn minutes(minutes: u64) -> Timestamp {
        Duration::from_secs(60 * minutes)
    }

    #[test]
    fn host_has_a_habit_by_deaths_of_its_own_in_three_generations_within_ten_minutes() {
        let mut setbacks = Setbacks::default();
        assert!(!setbacks.died(minutes(0), Generation(1), "a", true));
        // Another death of that generation is the same power cut, that of another host is not.
        assert!(!setbacks.died(minutes(1), Generation(1), "a", true) && !setbacks.died(minutes(1), Generation(1), "b", true));
        assert!(!setbacks.died(minutes(2), Generation(2), "a", true) && !setbacks.died(minutes(2), Generation(2), "b", true));
        // The first is forgotten when ten minutes are over, to the second.
        assert!(!setbacks.died(minutes(10), Generation(3), "a", true));
        assert!(setbacks.died(minutes(11) - SECOND, Generation(3), "b", true));
        assert_eq!((setbacks.is_aside(WorkerId(1), "b"), setbacks.is_aside(WorkerId(1), "a")), (true, false));
        assert!(setbacks.died(minutes(12) - SECOND, Generation(4), "a", true));
    }

    #[test]
    fn what_is_left_out_gets_another_chance_after_ten_minutes_to_the_second() {
        let mut setbacks = Setbacks::default();
        assert!(setbacks.is_bad(minutes(1), "a") && !setbacks.is_bad(minutes(2), "a"));
        assert_eq!(setbacks.next_end(), Some(minutes(12)));
        assert!(!setbacks.forgive(minutes(12) - SECOND) && setbacks.is_aside(WorkerId(1), "a"));
        assert!(setbacks.forgive(minutes(12)) && !setbacks.forgive(minutes(12)) && !setbacks.is_aside(WorkerId(1), "a"));
        assert_eq!(setbacks.next_end(), None);
    }

    #[test]
    fn generations_that_bear_nothing_are_made_ever_more_slowly_until_a_step_is_done() {
        let mut setbacks = Setbacks::default();
        let mut now = minutes(0);
        let mut pauses = Vec::new();
        while !setbacks.broke_barren(now) {
            let pause = setbacks.pause().map_or(Duration::ZERO, |until| until - now);
            pauses.push(pause.as_millis());
            now += pause;
        }
        assert_eq!(pauses[..9], [0, 0, 100, 200, 400, 800, 1600, 3200, 5000]);
        assert!(pauses.len() == 19 && now >= minutes(1), "{pauses:?}");
        setbacks.progressed();
        assert!(!setbacks.broke_barren(now) && setbacks.pause().is_none());
    }

    #[test]
    fn shard_has_a_habit_by_the_last_three_deaths_in_a_row() {
        let mut setbacks = Setbacks::default();
        let [one, other] = [0, 1].map(|shard| (Epoch(0), ShardId(shard)));
        let mut died = |minute, held: &[_]| setbacks.died_holding(minutes(minute), &held.iter().copied().collect());
        assert!(died(0, &[one, other]).is_empty() && died(1, &[one]).is_empty());
        // The other's row was broken by the second death, and begins again.
        assert_eq!(died(2, &[one, other]), [one]);
        assert!(died(3, &[other]).is_empty());
        assert_eq!(died(4, &[other]), [other]);
        // A row that began too long ago is none: its last death is ten minutes away.
        assert!(died(20, &[one]).is_empty() && died(21, &[one]).is_empty() && died(31, &[one]).is_empty());
        assert!(setbacks.forgive_shards(minutes(12) - SECOND).is_empty());
        assert_eq!(setbacks.forgive_shards(minutes(12)), [one]);
        assert_eq!(setbacks.forgive_shards(minutes(14)), [other]);
        assert!(setbacks.forgive_shards(minutes(60)).is_empty());
    }

    #[test]
    fn of_two_that_lose_each_other_the_one_that_lost_more_is_left_out_and_its_losses_are_forgotten() {
        let mut setbacks = Setbacks::default();
        let [a, b, c] = [1, 2, 3].map(WorkerId);
        assert_eq!(setbacks.broke(minutes(0), a, c), None);
        assert_eq!((setbacks.broke(minutes(1), a, b), setbacks.broke(minutes(2), b, a)), (None, None));
        assert_eq!(setbacks.broke(minutes(3), a, b), Some(a), "it lost another one, too");
        assert!(setbacks.broken.is_empty(), "{:?}", setbacks.broken);
        assert_eq!((setbacks.broke(minutes(4), b, c), setbacks.broke(minutes(5), b, c)), (None, None));
        assert_eq!(setbacks.broke(minutes(6), b, c), Some(c), "who came later, where both have lost as many");
    }
}
