//! What the loader's threads share: leases, buffers and the plan. No thread, clock or I/O in here, so that a simulation can drive it.

use std::collections::{HashSet, VecDeque};

use peapod_proto::ids::{LeaseId, SampleName};

use super::{Batch, LeasedShard, LoaderConfig, Outlook, Prepared, Share, Stats};
use crate::error::Failure;
use crate::plan::{Cuts, Pool, Pooled};
use crate::sample::{Encoded, Stored};

/// Granted leases to keep: the one that is read and the next.
const LEASES_AHEAD: usize = 2;
/// Samples to read ahead of the pool, in shares, and at least. What a worker has read nobody can ask it for: with everything that fits into
/// memory read ahead, small shards to the last of the job, the others would have nothing to train once one of them had to start again.
const SHARES_AHEAD: usize = 8;
const MIN_AHEAD: usize = 64;

/// Parts of `data.buffer_bytes`: an eighth lets the reader run ahead of the pool, a quarter is for what is planned, with its decoded
/// pictures. The pool has the rest, so that its mark depends on nothing but the job.
const STREAM_PART: u64 = 8;
const PLANNED_PART: u64 = 4;

/// Memory a buffered sample takes beside its picture and captions, roughly.
const SAMPLE_OVERHEAD: u64 = 256;

/// A sample whose picture is not decoded yet.
#[derive(Debug)]
pub struct Buffered {
    /// Its name.
    pub name: SampleName,
    /// The lease it was read under.
    pub lease: LeaseId,
    /// Its key in the tar, for reports.
    pub key: String,
    /// What it is.
    pub encoded: Encoded,
}

impl Pooled for Buffered {
    fn name(&self) -> SampleName {
        self.name
    }

    fn bucket(&self) -> usize {
        self.encoded.bucket
    }

    fn num_bytes(&self) -> u64 {
        let caption = &self.encoded.caption;
        (self.encoded.stored.num_bytes() + caption.prompt.len() + caption.english.len() + self.key.len()) as u64 + SAMPLE_OVERHEAD
    }
}

/// A picture to decode.
#[derive(Debug)]
pub struct Job {
    /// Where the result belongs.
    pub ticket: Ticket,
    /// Whose picture it is.
    pub sample: Buffered,
}

/// Names a place in the plan. A result whose place is gone is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket(u64);

/// A planned batch; shorter than it was planned if a picture failed, a lease was lost or a share ended in it.
#[derive(Debug)]
struct Planned {
    bucket: (u32, u32),
    slots: VecDeque<Slot>,
}

/// One sample's place in the plan.
#[derive(Debug)]
struct Slot {
    ticket: Ticket,
    lease: LeaseId,
    /// What it holds, or will while it is decoded.
    num_bytes: u64,
    picture: Picture,
}

#[derive(Debug)]
enum Picture {
    Encoded(Buffered),
    /// With a decoding thread.
    Decoding,
    Ready(Prepared),
    Failed,
}

/// The lease that is being read.
#[derive(Debug, Clone, Copy)]
struct Reading {
    lease: LeaseId,
    /// The index after the last sample that was taken in.
    next: u32,
    /// The rest of it was given back.
    is_cut: bool,
}

/// The loader's state, under its lock.
pub struct State {
    buckets: Vec<(u32, u32)>,
    micro_batch: usize,

    /// Granted and not yet begun.
    waiting: VecDeque<LeasedShard>,
    reading: Option<Reading>,
    /// Every lease granted and not taken away, read or not.
    held: HashSet<LeaseId>,
    /// Leases given back before they came.
    refused: HashSet<LeaseId>,
    /// A lease whose rest others wait for, until a share of it is read.
    wanted_back: Option<LeaseId>,
    outlook: Outlook,
    is_asked: bool,
    /// A share that is waited for cannot be filled.
    is_starving: bool,

    /// Read ahead of the pool, in order of reading.
    stream: VecDeque<Buffered>,
    stream_bytes: u64,
    max_stream_bytes: u64,
    pool: Pool<Buffered>,
    cuts: Cuts,
    planned: VecDeque<Planned>,
    max_planned_bytes: u64,
    max_bytes: u64,
    next_ticket: u64,

    /// Why the reader has ended, if it gave up.
    pub failure: Option<Failure>,
    /// Waits for shares break off.
    pub is_cancelled: bool,
    /// The threads end.
    pub is_stopping: bool,
}

impl State {
    /// Nothing granted, nothing read.
    pub fn new(config: &LoaderConfig) -> Self {
        let data = &config.data;
        let (max_stream_bytes, max_planned_bytes) = (data.buffer_bytes / STREAM_PART, data.buffer_bytes / PLANNED_PART);
        let pool_bytes = data.buffer_bytes - max_stream_bytes - max_planned_bytes;
        Self {
            buckets: data.buckets.iter().map(|&[width, height]| (width, height)).collect(),
            micro_batch: config.micro_batch,
            waiting: VecDeque::new(),
            reading: None,
            held: HashSet::new(),
            refused: HashSet::new(),
            wanted_back: None,
            outlook: Outlook::More,
            is_asked: false,
            is_starving: false,
            stream: VecDeque::new(),
            stream_bytes: 0,
            max_stream_bytes,
            pool: Pool::new(config.seed, data.buckets.len(), data.shuffle_buffer as usize, pool_bytes),
            cuts: Cuts::default(),
            planned: VecDeque::new(),
            max_planned_bytes,
            max_bytes: data.buffer_bytes,
            next_ticket: 0,
            failure: None,
            is_cancelled: false,
            is_stopping: false,
        }
    }

    // ---- leases ----

    /// Takes in leases, but for those it has or has given back, and what to expect after them.
    pub fn grant(&mut self, leases: Vec<LeasedShard>, outlook: Outlook) {
        for lease in leases {
            if !self.refused.contains(&lease.lease) && self.held.insert(lease.lease) {
                self.waiting.push_back(lease);
            }
        }
        self.is_asked = false;
        self.is_starving = false;
        self.outlook = outlook;
    }

    /// Forgets that leases were asked for, or that none were left.
    pub fn forget_answer(&mut self) {
        self.grant(Vec::new(), Outlook::More);
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

    /// Leaves the rest of a lease to others; the first index it leaves. None if the lease is read to its end.
    ///
    /// `for_idle`: and none if nothing else is there to be trained and not even a share of it is read yet; [`cut_wanted`](Self::cut_wanted)
    /// says it, once there is. Whoever gave up all that it has would be the idle one, and ask for it in turn: a shard whose store is slow
    /// would be handed to and fro unread.
    pub fn give_back(&mut self, lease: LeaseId, for_idle: bool) -> Option<u32> {
        if !self.held.contains(&lease) {
            // It never came, or is on its way: a coordinator that was started again believes that it did.
            self.refused.insert(lease);
            return Some(0);
        }
        if let Some(place) = self.waiting.iter().position(|waiting| waiting.lease == lease) {
            if for_idle && self.needs(lease) {
                self.wanted_back = Some(lease);
                return None;
            }
            self.waiting.remove(place);
            self.held.remove(&lease);
            // A coordinator that was started again may have sent it once more before it hears of this.
            self.refused.insert(lease);
            self.expect_rest();
            return Some(0);
        }
        let reading = self.reading.filter(|reading| reading.lease == lease && !reading.is_cut)?;
        if for_idle && self.needs(lease) {
            self.wanted_back = Some(lease);
            return None;
        }
        Some(self.cut(reading))
    }

    /// The lease whose rest was asked for too early to be [given back](Self::give_back), and the first index left, once that is known.
    pub fn cut_wanted(&mut self) -> Option<(LeaseId, u32)> {
        let reading = self.reading.filter(|reading| self.wanted_back == Some(reading.lease) && !reading.is_cut)?;
        if self.needs(reading.lease) {
            return None;
        }
        Some((reading.lease, self.cut(reading)))
    }

    /// Whether it is the only lease to read, and what is read so far makes no share.
    fn needs(&self, lease: LeaseId) -> bool {
        let reading = self.reading.iter().filter(|reading| !reading.is_cut).map(|reading| reading.lease);
        let mut unread = self.waiting.iter().map(|waiting| waiting.lease).chain(reading);
        let num_read = self.num_planned() + self.pool.len() + self.stream.len();
        unread.all(|unread| unread == lease) && num_read < self.cuts.share().max(1) && self.has_room()
    }

    /// Ends the lease that is read with what is kept of it; the first index that is not. Of what is read ahead no more is kept than makes
    /// a share.
    fn cut(&mut self, reading: Reading) -> u32 {
        self.wanted_back = None;
        self.reading = Some(Reading { is_cut: true, ..reading });
        self.expect_rest();
        // Samples of one lease are together in the stream, those of the lease that is read at its end.
        let of_others = self.stream.iter().position(|sample| sample.lease == reading.lease).unwrap_or(self.stream.len());
        let for_a_share = self.cuts.share().max(1).saturating_sub(self.num_planned() + self.pool.len());
        let kept = of_others.max(for_a_share.min(self.stream.len()));
        let from = self.stream.get(kept).map_or(reading.next, |sample| sample.name.index);
        self.stream.truncate(kept);
        self.stream_bytes = self.stream.iter().map(Pooled::num_bytes).sum();
        from
    }

    /// Others read now what this one was to read: once it has nothing to do it may be given some of it.
    fn expect_rest(&mut self) {
        if self.outlook == Outlook::Nothing {
            self.outlook = Outlook::WhenIdle;
        }
    }

    /// The next lease to read.
    pub fn begin_lease(&mut self) -> Option<LeasedShard> {
        let lease = self.waiting.pop_front()?;
        self.reading = Some(Reading { lease: lease.lease, next: 0, is_cut: false });
        Some(lease)
    }

    /// Whether the lease is still this loader's.
    pub fn is_held(&self, lease: LeaseId) -> bool {
        self.held.contains(&lease)
    }

    /// Whether the rest of the lease that is read was given back.
    pub fn is_cut(&self) -> bool {
        self.reading.is_some_and(|reading| reading.is_cut)
    }

    /// Whether the reader may go on with the lease that it reads.
    pub fn may_read(&self, lease: LeaseId) -> bool {
        !self.is_stopping && !self.is_cut() && self.is_held(lease)
    }

    /// Nothing more comes of the lease that is read.
    pub fn end_lease(&mut self) {
        let ended = self.reading.take().map(|reading| reading.lease);
        self.wanted_back = self.wanted_back.filter(|&lease| Some(lease) != ended);
    }

    /// Drops all that is of other leases, and stops reading those.
    pub fn retain_leases(&mut self, held: &[LeaseId]) {
        let held: HashSet<LeaseId> = held.iter().copied().collect();
        self.held.retain(|lease| held.contains(lease));
        let held = &self.held;
        self.waiting.retain(|lease| held.contains(&lease.lease));
        self.wanted_back = self.wanted_back.filter(|lease| held.contains(lease));
        self.stream.retain(|sample| held.contains(&sample.lease));
        self.stream_bytes = self.stream.iter().map(Pooled::num_bytes).sum();
        self.pool.retain(|sample| held.contains(&sample.lease));
        let before = self.num_planned();
        for batch in &mut self.planned {
            batch.slots.retain(|slot| held.contains(&slot.lease));
        }
        self.planned.retain(|batch| !batch.slots.is_empty());
        let planned = self.num_planned();
        if planned != before {
            self.cuts.restart(self.cuts.share(), planned);
        }
    }

    // ---- reading ----

    /// Whether the reader may go on. A single sample always fits, however large.
    pub fn has_room(&self) -> bool {
        let most = MIN_AHEAD.max(SHARES_AHEAD * self.cuts.share());
        let all_bytes = self.stream_bytes + self.pool.num_bytes() + self.planned_bytes();
        (self.stream_bytes < self.max_stream_bytes && all_bytes < self.max_bytes && self.stream.len() < most) || self.stream.is_empty()
    }

    /// Takes in a sample from the reader.
    pub fn push(&mut self, sample: Buffered) {
        self.stream_bytes += sample.num_bytes();
        if let Some(reading) = &mut self.reading {
            reading.next = sample.name.index + 1;
        }
        self.stream.push_back(sample);
        self.plan();
    }

    fn feed_pool(&mut self) -> bool {
        let Some(sample) = self.stream.pop_front() else { return false };
        self.stream_bytes -= sample.num_bytes();
        self.pool.push(sample);
        true
    }

    /// Whether all that was granted is read and nothing more will be granted.
    fn is_at_end(&self) -> bool {
        self.outlook != Outlook::More && self.reading.is_none() && self.waiting.is_empty() && self.stream.is_empty()
    }

    // ---- planning ----

    /// Plans batches as far ahead as the cuts and the memory for them allow. Stops where more samples must be read first: a batch is never
    /// drawn from a pool that is not as full as it will be. So a batch that is drawn later is drawn alike.
    pub fn plan(&mut self) {
        loop {
            while self.pool.is_filling() && self.feed_pool() {}
            let want = self.cuts.left().min(self.micro_batch);
            if want == 0 {
                return;
            }
            while self.pool.wants_more_for(want) {
                if !self.feed_pool() {
                    break;
                }
            }
            if self.pool.is_empty() || (self.pool.wants_more_for(want) && !self.is_at_end()) || self.is_enough_planned() {
                return;
            }
            let samples = self.pool.draw(want);
            self.cuts.planned(samples.len());
            self.plan_batch(samples);
        }
    }

    fn plan_batch(&mut self, samples: Vec<Buffered>) {
        let Some(bucket) = samples.first().and_then(|sample| self.buckets.get(sample.bucket())).copied() else { return };
        let slots = samples.into_iter().map(|sample| self.slot(sample.lease, bytes_to_decode(&sample, bucket), Picture::Encoded(sample)));
        let slots = slots.collect();
        self.planned.push_back(Planned { bucket, slots });
    }

    /// Whether what is planned holds all the bytes that it may. A whole share is always planned: no less is handed out.
    fn is_enough_planned(&self) -> bool {
        let num_usable = self.slots().filter(|slot| !matches!(slot.picture, Picture::Failed)).count();
        num_usable >= self.cuts.share() && self.planned_bytes() >= self.max_planned_bytes
    }

    fn planned_bytes(&self) -> u64 {
        self.slots().map(|slot| slot.num_bytes).sum()
    }

    fn slot(&mut self, lease: LeaseId, num_bytes: u64, picture: Picture) -> Slot {
        self.next_ticket += 1;
        Slot { ticket: Ticket(self.next_ticket), lease, num_bytes, picture }
    }

    fn slots(&self) -> impl Iterator<Item = &Slot> {
        self.planned.iter().flat_map(|batch| &batch.slots)
    }

    fn slots_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.planned.iter_mut().flat_map(|batch| &mut batch.slots)
    }

    fn num_planned(&self) -> usize {
        self.planned.iter().map(|batch| batch.slots.len()).sum()
    }

    // ---- decoding ----

    /// The next picture to decode, in the order in which they are needed.
    pub fn next_job(&mut self) -> Option<Job> {
        let slot = self.slots_mut().find(|slot| matches!(slot.picture, Picture::Encoded(_)))?;
        match std::mem::replace(&mut slot.picture, Picture::Decoding) {
            Picture::Encoded(sample) => Some(Job { ticket: slot.ticket, sample }),
            other => {
                slot.picture = other;
                None
            }
        }
    }

    /// Takes in a decoded picture, or `None` if it failed. Returns whether anybody still waits for it: its lease may be gone.
    pub fn decoded(&mut self, ticket: Ticket, picture: Option<Prepared>) -> bool {
        let Some(slot) = self.slots_mut().find(|slot| slot.ticket == ticket) else { return false };
        slot.num_bytes = picture.as_ref().map_or(0, Prepared::num_bytes);
        slot.picture = picture.map_or(Picture::Failed, Picture::Ready);
        // It takes less now than while it was decoded; and what failed has to be made up for.
        self.plan();
        true
    }

    // ---- shares ----

    /// The next share, if its pictures are decoded.
    pub fn take_share(&mut self, num_samples: usize) -> Option<Share> {
        if num_samples == 0 {
            return Some(Share::default());
        }
        if self.cuts.share() != num_samples {
            self.cuts.restart(num_samples, self.num_planned());
        }
        loop {
            self.plan();
            let ready = self.num_ready(num_samples)?;
            if ready == num_samples || (self.is_dry() && self.outlook == Outlook::Nothing) {
                return Some(self.hand_out(num_samples));
            }
            if self.is_dry() {
                // Others may have something left: they are asked before a share is cut short.
                self.is_starving = true;
                return None;
            }
            if self.cuts.left() > 0 {
                // Samples have to be read first.
                return None;
            }
            // So many pictures failed that nothing planned is left: plan what is missing.
            self.cuts.restart(num_samples, ready);
        }
    }

    /// The next share, if it is whole and its pictures are decoded. Asks nobody for anything.
    pub fn take_whole_share(&mut self, num_samples: usize) -> Option<Share> {
        if num_samples == 0 || self.cuts.share() != num_samples {
            return None;
        }
        self.plan();
        (self.num_ready(num_samples)? == num_samples).then(|| self.hand_out(num_samples))
    }

    /// The number of decoded samples at the front, up to `num_samples`; `None` if one of them is not decoded yet.
    fn num_ready(&self, num_samples: usize) -> Option<usize> {
        let mut ready = 0;
        for slot in self.slots() {
            match slot.picture {
                _ if ready == num_samples => break,
                Picture::Ready(_) => ready += 1,
                Picture::Failed => {}
                Picture::Encoded(_) | Picture::Decoding => return None,
            }
        }
        Some(ready)
    }

    /// Whether nothing is left to plan and nothing will come.
    fn is_dry(&self) -> bool {
        self.is_at_end() && self.pool.is_empty()
    }

    fn hand_out(&mut self, num_samples: usize) -> Share {
        let mut batches: Vec<Batch> = Vec::new();
        let (mut left, mut failed) = (num_samples, 0);
        while let Some(front) = self.planned.front_mut() {
            let bucket = front.bucket;
            while left > 0
                && let Some(slot) = front.slots.pop_front()
            {
                let Picture::Ready(sample) = slot.picture else {
                    failed += 1;
                    continue;
                };
                left -= 1;
                // A batch shortened by a failure is filled up by the next of its bucket.
                match batches.iter_mut().find(|batch| batch.bucket == bucket && batch.samples.len() < self.micro_batch) {
                    Some(batch) => batch.samples.push(sample),
                    None => batches.push(Batch { bucket, samples: vec![sample] }),
                }
            }
            if !front.slots.is_empty() {
                break;
            }
            self.planned.pop_front();
        }
        if left == 0 {
            self.cuts.handed_out(failed);
        } else {
            // Cut short: what comes later starts with a whole share.
            self.cuts.restart(num_samples, 0);
        }
        self.plan();
        Share { batches }
    }

    /// Takes back the share of a void step, without what is of leases that are gone.
    pub fn put_back(&mut self, share: Share) {
        for batch in share.batches.into_iter().rev() {
            let samples: Vec<Prepared> = batch.samples.into_iter().filter(|sample| self.held.contains(&sample.lease)).collect();
            let slots = samples.into_iter().map(|sample| self.slot(sample.lease, sample.num_bytes(), Picture::Ready(sample)));
            let slots: VecDeque<Slot> = slots.collect();
            if !slots.is_empty() {
                self.planned.push_front(Planned { bucket: batch.bucket, slots });
            }
        }
        self.cuts.restart(self.cuts.share(), self.num_planned());
    }

    /// How full the buffers are.
    pub fn stats(&self) -> Stats {
        Stats {
            buffered_samples: self.stream.len() + self.pool.len(),
            buffered_bytes: self.stream_bytes + self.pool.num_bytes(),
            planned_samples: self.num_planned(),
            planned_bytes: self.planned_bytes(),
            ready_samples: self.slots().filter(|slot| matches!(slot.picture, Picture::Ready(_))).count(),
            is_at_end: self.is_at_end(),
        }
    }
}

/// What a planned sample takes while it is decoded: what it is decoded from, and its pixels, or as many numbers as it has stored.
fn bytes_to_decode(sample: &Buffered, (width, height): (u32, u32)) -> u64 {
    let decoded = match &sample.encoded.stored {
        Stored::Picture { .. } => 3 * u64::from(width) * u64::from(height),
        Stored::Latents(bytes) => bytes.len() as u64,
    };
    sample.num_bytes() + decoded
}
