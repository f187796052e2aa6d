//! A worker's data threads: they read leased shards in index order, some samples ahead, and hand out shares.
//!
//! Rules and order of events are those of `peapod_data::Loader`, without pictures, buckets and shuffling.

use std::collections::{BTreeSet, VecDeque};

use peapod_data::Outlook;
use peapod_proto::ids::{LeaseId, SampleName};
use peapod_proto::message::{Lease, ShardReport, SkipReason, SkippedSample};

use super::plan::Kind;

/// Granted leases to keep: the one that is read and the next.
const LEASES_AHEAD: usize = 2;
/// Shares whose pictures are decoded ahead.
const LOOKAHEAD: usize = 3;

/// A sample with a worker.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Its name.
    pub name: SampleName,
    /// What it is like.
    pub kind: Kind,
    lease: LeaseId,
    decoded: bool,
}

struct Reading {
    lease: Lease,
    next: u32,
    skipped: Vec<SkippedSample>,
}

/// The data threads' state.
pub struct Loader {
    max_buffered: usize,
    waiting: VecDeque<Lease>,
    reading: Option<Reading>,
    held: BTreeSet<LeaseId>,
    /// Given back before they came.
    refused: BTreeSet<LeaseId>,
    outlook: Outlook,
    is_starving: bool,
    is_asked: bool,
    buffer: VecDeque<Sample>,
    /// Waits for samples break off.
    pub is_cancelled: bool,
}

fn skip(index: u32, kind: Kind) -> SkippedSample {
    let (reason, rule) = if kind == Kind::Filtered { (SkipReason::Filtered, "too_small") } else { (SkipReason::Bad, "bad_picture") };
    SkippedSample { index, reason, key: format!("{index}"), detail: format!("{rule}: as planned") }
}

impl Loader {
    /// Threads that have nothing to read.
    pub fn new(max_buffered: usize) -> Self {
        Self {
            max_buffered,
            waiting: VecDeque::new(),
            reading: None,
            held: BTreeSet::new(),
            refused: BTreeSet::new(),
            outlook: Outlook::More,
            is_starving: false,
            is_asked: false,
            buffer: VecDeque::new(),
            is_cancelled: false,
        }
    }

    /// How many leases to ask for, if it is time to, and whether as one that is idle.
    pub fn ask(&mut self) -> Option<(u32, bool)> {
        let wanted = LEASES_AHEAD.saturating_sub(self.waiting.len() + usize::from(self.reading.is_some()));
        let is_time = match self.outlook {
            Outlook::More => wanted > 0,
            Outlook::WhenIdle => self.is_starving,
            Outlook::Nothing => false,
        };
        if !is_time || self.is_asked {
            return None;
        }
        self.is_asked = true;
        Some(if self.is_starving { (1, true) } else { (wanted as u32, false) })
    }

    /// Forgets what it was told about further leases.
    pub fn forget_answer(&mut self) {
        self.grant(Vec::new(), Outlook::More);
    }

    /// Takes in leases.
    pub fn grant(&mut self, leases: Vec<Lease>, outlook: Outlook) {
        for lease in leases {
            if !self.refused.contains(&lease.id) && self.held.insert(lease.id) {
                self.waiting.push_back(lease);
            }
        }
        (self.is_asked, self.is_starving, self.outlook) = (false, false, outlook);
    }

    fn expect_rest(&mut self) {
        if self.outlook == Outlook::Nothing {
            self.outlook = Outlook::WhenIdle;
        }
    }

    /// Leaves the rest of a lease to others: the first index left and what was passed over before, unless the lease is read to its end.
    pub fn give_back(&mut self, lease: LeaseId) -> Option<(u32, Option<ShardReport>)> {
        if !self.held.contains(&lease) {
            self.refused.insert(lease);
            return Some((0, None));
        }
        if let Some(place) = self.waiting.iter().position(|waiting| waiting.id == lease) {
            self.waiting.remove(place);
            self.held.remove(&lease);
            self.refused.insert(lease);
            self.expect_rest();
            return Some((0, None));
        }
        let reading = self.reading.take_if(|reading| reading.lease.id == lease)?;
        self.expect_rest();
        // What was read ahead of the shares goes too.
        let mut from = reading.next;
        while let Some(sample) = self.buffer.back().filter(|sample| sample.lease == lease && !sample.decoded) {
            from = sample.name.index;
            self.buffer.pop_back();
        }
        let skipped = reading.skipped;
        let report = ShardReport { lease, skipped, num_samples: None, truncated: String::new() };
        Some((from, Some(report)))
    }

    /// Drops whatever is of other leases.
    pub fn retain_leases(&mut self, held: &[LeaseId]) {
        self.held.retain(|lease| held.contains(lease));
        let held = &self.held;
        self.waiting.retain(|lease| held.contains(&lease.id));
        self.buffer.retain(|sample| held.contains(&sample.lease));
    }

    /// Begins the next lease; whether there is one to read.
    pub fn begin(&mut self) -> bool {
        if self.reading.is_none()
            && let Some(lease) = self.waiting.pop_front()
        {
            self.reading = Some(Reading { lease, next: 0, skipped: Vec::new() });
        }
        self.reading.is_some()
    }

    /// Whether the reader waits for room.
    pub fn is_full(&self) -> bool {
        self.buffer.len() >= self.max_buffered
    }

    /// Reads up to `num` samples of `shard`; at its end, the report, unless the lease is gone. Where the lease ends before, that end too.
    pub fn read(&mut self, num: u32, shard: impl Fn(&Lease) -> Vec<Kind>) -> (Option<ShardReport>, Option<(LeaseId, u32)>) {
        let Some(reading) = self.reading.as_mut() else { return (None, None) };
        if !self.held.contains(&reading.lease.id) {
            self.reading = None;
            return (None, None);
        }
        let kinds = shard(&reading.lease);
        let lease = &reading.lease;
        for _ in 0..num {
            if let Some(end) = lease.end.filter(|&end| reading.next >= end && (end as usize) < kinds.len()) {
                let (lease, skipped) = (lease.id, std::mem::take(&mut reading.skipped));
                self.reading = None;
                let report = ShardReport { lease, skipped, num_samples: None, truncated: String::new() };
                return (Some(report), Some((lease, end)));
            }
            let Some(&kind) = kinds.get(reading.next as usize) else {
                let report = ShardReport {
                    lease: lease.id,
                    skipped: std::mem::take(&mut reading.skipped),
                    num_samples: Some(kinds.len() as u32),
                    truncated: String::new(),
                };
                self.reading = None;
                return (Some(report), None);
            };
            if self.buffer.len() >= self.max_buffered {
                break;
            }
            let index = reading.next;
            reading.next += 1;
            match kind {
                _ if lease.done.contains(index) => {}
                Kind::Filtered | Kind::Bad => reading.skipped.push(skip(index, kind)),
                _ => {
                    let name = SampleName { epoch: lease.epoch, shard: lease.shard, index };
                    self.buffer.push_back(Sample { name, kind, lease: lease.id, decoded: false });
                }
            }
        }
        (None, None)
    }

    /// The next share if it is there, cut short only where nothing more will come; and what could not be decoded.
    pub fn take_share(&mut self, num: usize) -> (Option<Vec<Sample>>, Vec<ShardReport>) {
        let mut reports = Vec::new();
        if num == 0 {
            return (Some(Vec::new()), reports);
        }
        let mut place = 0;
        while place < self.buffer.len().min(LOOKAHEAD * num) {
            let sample = &mut self.buffer[place];
            if !std::mem::replace(&mut sample.decoded, true) && sample.kind == Kind::Undecodable {
                let skipped = vec![skip(sample.name.index, sample.kind)];
                reports.push(ShardReport { lease: sample.lease, skipped, num_samples: None, truncated: String::new() });
                self.buffer.remove(place);
            } else {
                place += 1;
            }
        }
        let is_dry = self.outlook != Outlook::More && self.reading.is_none() && self.waiting.is_empty();
        let is_at_end = is_dry && self.outlook == Outlook::Nothing;
        self.is_starving |= is_dry && !is_at_end && self.buffer.len() < num;
        let share = (self.buffer.len() >= num || is_at_end).then(|| self.buffer.drain(..num.min(self.buffer.len())).collect());
        (share, reports)
    }

    /// Takes a share of a void step back.
    pub fn put_back(&mut self, share: Vec<Sample>) {
        for sample in share.into_iter().rev().filter(|sample| self.held.contains(&sample.lease)) {
            self.buffer.push_front(sample);
        }
    }
}
