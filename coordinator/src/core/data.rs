//! Who reads which shard, and what reading it showed.

use peapod_proto::ids::{Epoch, MemberIndex, SampleName, ShardId, WorkerId};
use peapod_proto::message::{Lease, ShardReport, SkipReason, ToWorker};

use super::leases::{self, Grant};
use super::ledger::{LedgerError, Totals};
use super::{Core, Effect, Fact, JobPhase, Notice};

/// Broken samples that are shown; the rest are only counted.
const BAD_SHOWN: u64 = 10;
/// Broken samples are judged as a share of at least this many, so that one bad sample at the start ends nothing.
const BAD_BASE: u64 = 100;

impl Core {
    /// Answers a request for leases, now or as soon as it can be: every request of a generation gets its answer.
    pub(super) fn grant_leases(&mut self, id: WorkerId, index: MemberIndex, num: u32, out: &mut Vec<Effect>) {
        // A bound against a request for everything; workers ask for a few at a time.
        self.lease_requests.insert(id, (index, num.clamp(1, 64)));
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
            for (&id, &(index, num)) in &self.lease_requests {
                if let Grant::Now { leases, none_left } = self.leases.grant(id, index, num, &self.ledger) {
                    answered = Some((id, leases, none_left));
                    break;
                }
            }
            let Some((id, granted, none_left)) = answered else { return };
            self.lease_requests.remove(&id);
            let leases = granted.iter().map(|&granted| self.lease(granted)).collect();
            if !granted.is_empty() {
                out.push(Effect::Persist(Fact::Leases { holder: id, leases: granted }));
            }
            out.push(Effect::Send { worker: id, message: ToWorker::LeaseGrant { generation: self.generation, leases, none_left } });
        }
    }

    /// A lease with all that its holder needs.
    pub(super) fn lease(&self, granted: leases::Granted) -> Lease {
        Lease {
            id: granted.id,
            epoch: granted.epoch,
            shard: granted.shard,
            url: self.config.shards[granted.shard.0 as usize].clone(),
            done: self.ledger.done_samples(granted.epoch, granted.shard),
        }
    }

    pub(super) fn shard_report(&mut self, id: WorkerId, report: ShardReport, out: &mut Vec<Effect>) {
        // A lease that ended meanwhile: its shard is done or has another reader, who will find the same.
        let Some((epoch, shard)) = self.leases.shard_of(report.lease, id) else { return };
        let fact = Fact::Shard(report.clone());
        let url = self.config.shards[shard.0 as usize].clone();
        let (lease, num_samples, truncated) = (report.lease, report.num_samples, report.truncated.clone());
        if !truncated.is_empty() && num_samples == Some(0) {
            self.unreadable.insert(shard);
        }
        let result = self.record_shard(epoch, shard, &url, report, out);
        if num_samples.is_some() {
            self.leases.set_read(lease);
        }
        if self.ledger.is_done(epoch, shard) {
            self.leases.finish(epoch, shard);
        }
        if let Err(error) = result {
            let error = error.to_string().replacen(&format!("shard {shard} "), &format!("shard {url} "), 1);
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
        let Totals { committed, filtered, bad, not_finite } = self.ledger.totals();
        let seen = (committed + filtered + bad + not_finite).max(BAD_BASE);
        if bad as f64 > limit * seen as f64 {
            let most =
                self.ledger.rules().most_often_bad().map_or_else(String::new, |(rule, count)| format!(", most often {rule} ({count})"));
            let reason =
                format!("{bad} of the first {seen} samples are broken{most}, more than data.max_bad_fraction = {limit}; the last in {url}");
            self.note_failure(reason.clone());
            return self.fail(reason, out);
        }
        self.answer_lease_requests(out);
    }

    pub(super) fn record_shard(
        &mut self,
        epoch: Epoch,
        shard: ShardId,
        url: &str,
        report: ShardReport,
        out: &mut Vec<Effect>,
    ) -> Result<(), LedgerError> {
        let mut show = |shown: &mut u64, key: String, detail: String| {
            *shown += 1;
            if *shown <= BAD_SHOWN {
                out.push(Effect::Notice(Notice::BadData { shard: url.to_owned(), key, detail }));
            }
        };
        for sample in report.skipped {
            let name = SampleName { epoch, shard, index: sample.index };
            if self.ledger.skip_data(name, &sample)? && sample.reason == SkipReason::Bad {
                show(&mut self.bad_shown, sample.key, sample.detail);
            }
        }
        if !report.truncated.is_empty() {
            show(&mut self.bad_shown, String::new(), report.truncated);
        }
        if let Some(num) = report.num_samples {
            self.ledger.set_size(epoch, shard, num)?;
        }
        Ok(())
    }
}
