//! Who reads which shard, and what reading it showed.

use std::collections::BTreeSet;

use peapod_data::source::shown_url;
use peapod_proto::ids::{Epoch, LeaseId, MemberIndex, Rank, ShardId, WorkerId};
use peapod_proto::message::{Lease, ShardReport, ToWorker};

use super::leases::{self, Grant};
use super::ledger::{LedgerError, Rules, ShardCounts, Totals};
use super::{Core, Effect, Fact, JobPhase, Notice};

/// Broken samples that are shown; the rest are only counted.
const BAD_SHOWN: u64 = 10;
/// Broken samples are judged as a share of at least this many, so that one bad sample at the start ends nothing.
const BAD_BASE: u64 = 100;
/// Rules that are named where samples are missing.
const RULES_NAMED: usize = 3;
/// A bound against a request for everything; workers ask for a few at a time.
const MAX_LEASES: u32 = 64;

/// A member that waits for leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeaseRequest {
    index: MemberIndex,
    num: u32,
    /// It has nothing left to train.
    is_idle: bool,
}

impl LeaseRequest {
    pub fn new(index: MemberIndex, num: u32, is_idle: bool) -> Self {
        Self { index, num: num.clamp(1, MAX_LEASES), is_idle }
    }
}

/// A source as people see it.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceView {
    /// Its name; empty if the job names none.
    pub name: String,
    /// Its weight.
    pub weight: f64,
    /// Its first epoch that is not complete.
    pub epoch: Epoch,
    /// Number of its shards.
    pub num_shards: u32,
    /// Those leased in that epoch.
    pub num_leased: u32,
    /// Those done in that epoch.
    pub num_done: u32,
    /// Samples over all its epochs.
    pub totals: Totals,
    /// Those that were skipped, by rule.
    pub rules: Rules,
}

/// How far a shard is in an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ShardState {
    /// Nobody reads it.
    Pending,
    /// Being read, or read and not all trained: by one worker, or by several with a part each.
    Leased(Vec<LeaseHolder>),
    /// Every sample is accounted for.
    Done,
}

/// Who holds a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseHolder {
    /// The worker.
    pub worker: WorkerId,
    /// Its rank; none if it is gone and the source of the next generation has not spoken yet.
    pub rank: Option<Rank>,
}

/// A shard as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardView {
    /// The shard.
    pub shard: ShardId,
    /// Where it lies.
    pub url: String,
    /// How far it is.
    pub state: ShardState,
    /// What became of its samples.
    pub counts: ShardCounts,
}

/// Some shards of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPage {
    /// The epoch of the source that they are looked at in.
    pub epoch: Epoch,
    /// The shards, in the order of the job's list.
    pub shards: Vec<ShardView>,
    /// Where the next page begins, if there is one.
    pub next: Option<u32>,
}

impl Core {
    /// Answers a request for leases, now or as soon as it can be: every request of a generation gets its answer.
    pub(super) fn grant_leases(&mut self, id: WorkerId, request: LeaseRequest, out: &mut Vec<Effect>) {
        if self.workers.get(&id).is_some_and(|worker| worker.leaving.is_some()) {
            // It finishes the step in flight with what it has.
            self.nothing_for(id, out);
            return;
        }
        if self.grant_again.remove(&id) && !self.leases.held_by(id).is_empty() {
            // Who has them takes no notice and asks again. As one answer to one request: an answer too many would be taken for that to a
            // later one.
            let leases = self.leases.held().into_iter().filter(|lease| lease.holder == id);
            let leases = leases.map(|lease| self.lease(lease.granted())).collect();
            let message = ToWorker::LeaseGrant { generation: self.generation, leases, none_left: false, ask_when_idle: false };
            out.push(Effect::Send { worker: id, message });
            return;
        }
        self.lease_requests.insert(id, request);
        self.answer_lease_requests(out);
    }

    pub(super) fn answer_lease_requests(&mut self, out: &mut Vec<Effect>) {
        if matches!(self.phase, JobPhase::Returning { .. }) {
            // Somebody who is not back yet may hold what would be given out.
            return;
        }
        // One member's first lease can be what another waits for: go round until nobody gets an answer.
        loop {
            let mut answered = None;
            for (&id, &LeaseRequest { index, num, is_idle }) in &self.lease_requests {
                match self.leases.grant(id, index, num, is_idle, &self.ledger) {
                    Grant::Now { leases, none_left, when_idle } => {
                        answered = Some((id, leases, none_left, when_idle));
                        break;
                    }
                    Grant::AskBack { holder, lease } => {
                        out.push(Effect::Send { worker: holder, message: ToWorker::GiveBack { leases: vec![lease], for_idle: true } });
                    }
                    Grant::Later => {}
                }
            }
            let Some((id, granted, none_left, ask_when_idle)) = answered else { return };
            self.lease_requests.remove(&id);
            let leases = granted.iter().map(|&granted| self.lease(granted)).collect();
            if !granted.is_empty() {
                out.push(Effect::Persist(Fact::Leases { holder: id, leases: granted }));
            }
            let message = ToWorker::LeaseGrant { generation: self.generation, leases, none_left, ask_when_idle };
            out.push(Effect::Send { worker: id, message });
        }
    }

    /// Tells one that leaves to do with what it has.
    fn nothing_for(&self, id: WorkerId, out: &mut Vec<Effect>) {
        let (generation, leases) = (self.generation, Vec::new());
        let message = ToWorker::LeaseGrant { generation, leases, none_left: true, ask_when_idle: false };
        out.push(Effect::Send { worker: id, message });
    }

    /// Where a shard lies.
    pub(super) fn url_of(&self, shard: ShardId) -> &str {
        // All shards of the ledger are in the list: a checkpoint of another list is refused before a core is made of it.
        self.config.shards.get(shard.0 as usize).map_or("", String::as_str)
    }

    /// The same as it may be shown: without the signature of an address that has one.
    pub(super) fn shown_url_of(&self, shard: ShardId) -> String {
        shown_url(self.url_of(shard)).into_owned()
    }

    /// An error of the ledger with the address that people know its shard by.
    pub(super) fn with_url(&self, error: &LedgerError) -> String {
        match self.shown_url_of(error.shard()).as_str() {
            "" => error.to_string(),
            url => format!("{error} (shard {}: {url})", error.shard()),
        }
    }

    /// A lease with all that its holder needs.
    pub(super) fn lease(&self, granted: leases::Granted) -> Lease {
        let mut done = self.ledger.done_samples(granted.epoch, granted.shard);
        // What lies before its part is another's.
        for index in 0..granted.part.from {
            done.insert(index);
        }
        Lease {
            id: granted.id,
            epoch: granted.epoch,
            shard: granted.shard,
            url: self.url_of(granted.shard).to_owned(),
            done,
            end: granted.part.end(),
        }
    }

    /// Asks a member that leaves for everything it has not begun, so that others can have it before it is gone. What it holds in its
    /// buffers follows when it has gone: some of it may be in the step in flight.
    pub(super) fn take_back_leases(&mut self, id: WorkerId, out: &mut Vec<Effect>) {
        if self.lease_requests.remove(&id).is_some() {
            self.nothing_for(id, out);
        }
        let leases = self.leases.unread_by(id);
        if !leases.is_empty() {
            out.push(Effect::Send { worker: id, message: ToWorker::GiveBack { leases, for_idle: false } });
        }
        if let Ok(index) = self.member_index(id, "leaving") {
            self.leases.set_leaving(index);
            self.answer_lease_requests(out);
        }
    }

    /// A holder reads no more of its lease and leaves what lies from `from` on to others.
    pub(super) fn gave_back(&mut self, id: WorkerId, lease: LeaseId, from: u32, out: &mut Vec<Effect>) {
        // Otherwise it ended meanwhile: its shard is done or has another reader. Who waits for its rest is to know that, too.
        if self.leases.shard_of(lease, id).is_some() {
            out.push(Effect::Persist(Fact::GaveBack { lease, from }));
            self.leases.give_back(lease, from);
        }
        self.answer_lease_requests(out);
    }

    /// The job's sources, in the order of its file.
    #[must_use]
    pub fn sources(&self) -> Vec<SourceView> {
        let view = |(index, source): (usize, &super::order::Source)| {
            let epoch = self.ledger.open_epoch_of(index);
            SourceView {
                name: source.name.clone(),
                weight: source.weight,
                epoch,
                num_shards: source.num_shards,
                num_leased: self.leases.num_leased(epoch, self.ledger.shards_of(index)),
                num_done: self.ledger.num_done_of(index, epoch),
                totals: self.ledger.totals_of(index),
                rules: self.ledger.rules_of(index),
            }
        };
        self.config.sources.iter().enumerate().map(view).collect()
    }

    /// At most `limit` shards of a source in an epoch (its first open one if none is given), from the `skip`th on. None if there is no such
    /// source.
    #[must_use]
    pub fn shards(&self, source: usize, epoch: Option<Epoch>, skip: u32, limit: u32) -> Option<ShardPage> {
        let num_shards = self.config.sources.get(source)?.num_shards;
        let epoch = epoch.unwrap_or(self.ledger.open_epoch_of(source));
        let first = self.ledger.shards_of(source).start;
        let end = skip.saturating_add(limit).min(num_shards);
        let view = |place: u32| {
            let shard = ShardId(first + place);
            let counts = self.ledger.shard_counts(epoch, shard);
            let holders = self.leases.holders_of(epoch, shard);
            let holder = |worker: WorkerId| LeaseHolder { worker, rank: self.workers.get(&worker).map(|worker| worker.rank) };
            let state = match counts.done {
                true => ShardState::Done,
                false if holders.is_empty() => ShardState::Pending,
                false => ShardState::Leased(holders.into_iter().map(holder).collect()),
            };
            ShardView { shard, url: self.shown_url_of(shard), state, counts }
        };
        Some(ShardPage { epoch, shards: (skip.min(end)..end).map(view).collect(), next: (end < num_shards).then_some(end) })
    }

    pub(super) fn shard_report(&mut self, id: WorkerId, report: ShardReport, out: &mut Vec<Effect>) {
        // A lease that ended meanwhile: its shard is done or has another reader, who will find the same.
        let Some((epoch, shard)) = self.leases.shard_of(report.lease, id) else { return self.answer_lease_requests(out) };
        let fact = Fact::Shard(report.clone());
        let url = self.shown_url_of(shard);
        let (lease, num_samples, truncated) = (report.lease, report.num_samples, report.truncated.clone());
        mark_unreadable(&mut self.unreadable, shard, &report);
        let ends = self.would_end_barren(epoch, shard);
        let result = self.record_shard(epoch, shard, &url, report, out);
        if num_samples.is_some() {
            self.leases.set_read(lease);
        }
        if self.ledger.is_done(epoch, shard) {
            self.leases.finish(epoch, shard);
        }
        if let Err(error) = result {
            let error = self.with_url(&error);
            self.note_failure(error.clone());
            return self.fail(error, out);
        }
        out.push(Effect::Persist(fact));
        let limit = self.config.max_bad_fraction;
        let (unreadable, shards) = (self.unreadable.len(), self.config.shards.len());
        if unreadable as f64 > limit * shards as f64 {
            let reason = format!(
                "{unreadable} of {shards} shards cannot be read at all, more than data.max_bad_fraction = {limit}; the last is {url}: {truncated}"
            );
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        if let Some(reason) = ends.and_then(|source| self.without_samples(source, epoch)) {
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        let bad = self.ledger.totals().bad;
        // Rarely looked at closely.
        if bad as f64 > limit * BAD_BASE as f64 {
            let read = self.ledger.num_read();
            if bad as f64 > limit * read.max(BAD_BASE) as f64 {
                let rules = self.ledger.rules();
                let most = rules.most_often_bad().map_or_else(String::new, |(rule, count)| format!(", most often {rule} ({count})"));
                let reason =
                    format!("{bad} of {read} samples are broken{most}, more than data.max_bad_fraction = {limit}; the last in {url}");
                self.note_failure(reason.clone());
                return self.fail(reason, out);
            }
        }
        self.look_at_fit(out);
        self.answer_lease_requests(out);
    }

    /// The source whose epoch has brought no sample so far, if a report on this shard can end it.
    fn would_end_barren(&self, epoch: Epoch, shard: ShardId) -> Option<usize> {
        let source = self.ledger.source_with(shard)?;
        let is_last = self.ledger.open_epoch_of(source) == epoch
            && self.ledger.num_done_of(source, epoch) + 1 == self.ledger.shards_of(source).len() as u32;
        (is_last && self.ledger.is_barren(source, epoch)).then_some(source)
    }

    /// Why the job ends: no source has had a sample that could be trained in a whole epoch, and every later one would be the same. `source`
    /// had none in `epoch`, if that is over now.
    fn without_samples(&mut self, source: usize, epoch: Epoch) -> Option<String> {
        if self.ledger.open_epoch_of(source) == epoch {
            return None;
        }
        self.barren.insert(source);
        if self.barren.len() < self.ledger.num_sources() {
            return None;
        }
        let Totals { committed, filtered, bad, .. } = self.ledger.totals();
        let rules = self.ledger.rules();
        let most: Vec<String> = rules.most_often(RULES_NAMED).iter().map(|(rule, count)| format!("{rule} {count}")).collect();
        let most = if most.is_empty() { String::new() } else { format!(", most often {}", most.join(", ")) };
        Some(format!(
            "epoch {epoch} is over and none of its samples could be trained: of the {} shards' samples {filtered} were filtered and {bad} broken so far{most}, \
             {committed} trained; see the filters in [data]",
            self.config.shards.len()
        ))
    }

    pub(super) fn record_shard(
        &mut self,
        epoch: Epoch,
        shard: ShardId,
        url: &str,
        report: ShardReport,
        out: &mut Vec<Effect>,
    ) -> Result<(), LedgerError> {
        let mut show = |shown: &mut u64, key: &str, detail: &str| {
            *shown += 1;
            if *shown <= BAD_SHOWN {
                out.push(Effect::Notice(Notice::BadData { shard: url.to_owned(), key: key.to_owned(), detail: detail.to_owned() }));
            }
        };
        let shown = &mut self.bad_shown;
        let taken = self.ledger.take_report(epoch, shard, &report, |sample| show(shown, &sample.key, &sample.detail));
        if !report.truncated.is_empty() {
            show(&mut self.bad_shown, "", &report.truncated);
        }
        taken
    }
}

/// Keeps account of the shards of which nothing could be read when they were last tried.
pub(super) fn mark_unreadable(unreadable: &mut BTreeSet<ShardId>, shard: ShardId, report: &ShardReport) {
    if report.is_unreadable() {
        unreadable.insert(shard);
    } else if report.num_samples.is_some() {
        unreadable.remove(&shard);
    }
}
