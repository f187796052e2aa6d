//! A worker's data threads in virtual time: the real [`State`] of the loader, read from and decoded for without threads and pictures.

use peapod_data::caption::Caption;
use peapod_data::loader::state::{Buffered, State};
use peapod_data::sample::{Encoded, Stored};
use peapod_data::{Content, Draws, LeasedShard, LoaderConfig, Outlook, Prepared, Share};
use peapod_proto::ids::{LeaseId, SampleName};
use peapod_proto::message::{Lease, ShardReport, SkipReason, SkippedSample};

use super::plan::Kind;

/// Two buckets, so that some samples wait for others of their shape. How large they are does not matter.
const DATA: &str = "shards = []\nbuckets = [[8, 16], [16, 8]]";
/// Most samples in a batch.
const MICRO_BATCH: usize = 3;
/// Bytes that a sample counts for, at the least: what makes a limit in bytes one in samples.
const SAMPLE_BYTES: u64 = 256;

/// The lease that is read.
struct Reading {
    lease: LeasedShard,
    next: u32,
    skipped: Vec<SkippedSample>,
}

/// Where reading a lease came to its end.
enum Stop {
    /// At the end of the tar, of this length.
    End(u32),
    /// Where the lease ends.
    Part(u32),
    /// The lease is gone, or the rest of it.
    Lost,
}

/// The data threads.
pub struct Loader {
    state: State,
    reading: Option<Reading>,
}

/// What reading has to say.
#[derive(Default)]
pub struct News {
    /// What became of samples that are not handed out, and the end of the shard.
    pub report: Option<ShardReport>,
    /// A lease of which no more will be read, and the first index that is left.
    pub gave_back: Option<(LeaseId, u32)>,
}

/// What a sample is like.
pub fn kind(shards: &[Vec<Kind>], name: SampleName) -> Kind {
    shards[name.shard.0 as usize][name.index as usize]
}

fn skip(index: u32, kind: Kind) -> SkippedSample {
    let (reason, rule) = if kind == Kind::Filtered { (SkipReason::Filtered, "too_small") } else { (SkipReason::Bad, "bad_picture") };
    SkippedSample { index, reason, key: format!("{index}"), detail: format!("{rule}: as planned") }
}

impl Loader {
    /// Threads that have nothing to read, and room for so many samples before they are planned.
    ///
    /// # Panics
    /// If the constants above are no section of a job file.
    #[allow(clippy::expect_used, reason = "it is a test's, and a panic is how a test fails")]
    pub fn new(max_buffered: usize) -> Self {
        let mut data: peapod_proto::job::DataSection = toml::from_str(DATA).expect("a section");
        // The state keeps an eighth for what is read ahead.
        data.buffer_bytes = 8 * max_buffered as u64 * SAMPLE_BYTES;
        data.shuffle_buffer = max_buffered as u32;
        Self { state: State::new(&LoaderConfig::new(data, 0, MICRO_BATCH, 0.0)), reading: None }
    }

    /// How many leases to ask for, if it is time to, and whether as one that is idle.
    pub fn ask(&mut self) -> Option<(u32, bool)> {
        self.state.ask()
    }

    /// Forgets what it was told about further leases.
    pub fn forget_answer(&mut self) {
        self.state.forget_answer();
    }

    /// Takes in leases.
    pub fn grant(&mut self, leases: Vec<Lease>, outlook: Outlook) {
        self.state.grant(leases.into_iter().map(Into::into).collect(), outlook);
    }

    /// Leaves the rest of a lease to others: the first index left, unless the lease is read to its end or must be read on a while.
    pub fn give_back(&mut self, lease: LeaseId, for_idle: bool) -> Option<u32> {
        self.state.give_back(lease, for_idle)
    }

    /// Drops whatever is of other leases.
    pub fn retain_leases(&mut self, held: &[LeaseId]) {
        self.state.retain_leases(held);
    }

    /// Takes a share of a void step back.
    pub fn put_back(&mut self, share: Share) {
        self.state.put_back(share);
    }

    /// Waits for samples break off, or no longer.
    pub fn set_cancelled(&mut self, is_cancelled: bool) {
        self.state.is_cancelled = is_cancelled;
    }

    /// Whether waits for samples break off.
    pub fn is_cancelled(&self) -> bool {
        self.state.is_cancelled
    }

    /// Begins the next lease if none is read; whether the reader has something to do.
    pub fn wants_to_read(&mut self) -> bool {
        if self.reading.is_none() {
            self.reading = self.state.begin_lease().map(|lease| Reading { lease, next: 0, skipped: Vec::new() });
        }
        self.reading.as_ref().is_some_and(|reading| self.state.has_room() || self.is_lost(reading.lease.lease))
    }

    fn is_lost(&self, lease: LeaseId) -> bool {
        self.state.is_cut() || !self.state.is_held(lease)
    }

    /// Reads on, up to `num` samples.
    pub fn read(&mut self, num: u32, shards: &[Vec<Kind>]) -> News {
        let Some(mut reading) = self.reading.take() else { return News::default() };
        let Some(stop) = (0..num).find_map(|_| self.read_one(&mut reading, shards)) else {
            self.reading = Some(reading);
            return News { report: None, gave_back: self.state.cut_wanted() };
        };
        let Reading { lease: LeasedShard { lease: id, .. }, skipped, .. } = reading;
        let (is_held, is_cut) = (self.state.is_held(id), self.state.is_cut());
        self.state.end_lease();
        self.state.plan();
        let report = |num_samples| Some(ShardReport { lease: id, skipped, num_samples, truncated: String::new() });
        match stop {
            _ if !is_held => News::default(),
            // The samples behind the cut are another's, whatever was seen of them.
            Stop::End(num_samples) if !is_cut => News { report: report(Some(num_samples)), gave_back: None },
            Stop::Part(end) if !is_cut => News { report: report(None), gave_back: Some((id, end)) },
            _ => News { report: report(None), gave_back: None },
        }
    }

    /// Reads one sample, if there is room for it.
    fn read_one(&mut self, reading: &mut Reading, shards: &[Vec<Kind>]) -> Option<Stop> {
        let Reading { lease, next, skipped } = reading;
        if self.is_lost(lease.lease) {
            return Some(Stop::Lost);
        }
        let index = *next;
        let Some(&kind) = shards[lease.shard.0 as usize].get(index as usize) else { return Some(Stop::End(index)) };
        if !lease.done.contains(index) {
            if let Some(end) = lease.end.filter(|&end| index >= end) {
                return Some(Stop::Part(end));
            }
            match kind {
                Kind::Filtered | Kind::Bad => skipped.push(skip(index, kind)),
                Kind::Good | Kind::Undecodable | Kind::NotFinite if self.state.has_room() => {
                    let name = SampleName { epoch: lease.epoch, shard: lease.shard, index };
                    let caption = Caption { prompt: String::new(), english: String::new(), native: false };
                    let encoded = Encoded { stored: Stored::Latents(Vec::new()), size: (8, 8), bucket: index as usize % 2, caption };
                    self.state.push(Buffered { name, lease: lease.lease, key: String::new(), encoded });
                }
                _ => return None,
            }
        }
        *next += 1;
        None
    }

    /// The next share if it is there, cut short only where nothing more will come; and what could not be decoded.
    pub fn take_share(&mut self, num: usize, shards: &[Vec<Kind>]) -> (Option<Share>, Vec<ShardReport>) {
        let mut reports = Vec::new();
        loop {
            let share = self.state.take_share(num);
            if !self.decode(shards, &mut reports) || share.is_some() {
                return (share, reports);
            }
        }
    }

    /// Decodes all that is planned; whether there was something.
    fn decode(&mut self, shards: &[Vec<Kind>], reports: &mut Vec<ShardReport>) -> bool {
        let mut is_more = false;
        while let Some(job) = self.state.next_job() {
            is_more = true;
            let Buffered { name, lease, encoded, .. } = job.sample;
            let kind = kind(shards, name);
            let prepared = (kind != Kind::Undecodable).then(|| Prepared {
                name,
                lease,
                content: Content::Pixels(Vec::new()),
                prompt: encoded.caption.prompt,
                english: encoded.caption.english,
                native: encoded.caption.native,
                original_size: encoded.size,
                crop: (0, 0),
                draws: Draws::default(),
            });
            let is_broken = prepared.is_none();
            if self.state.decoded(job.ticket, prepared) && is_broken {
                let skipped = vec![skip(name.index, kind)];
                reports.push(ShardReport { lease, skipped, num_samples: None, truncated: String::new() });
            }
        }
        is_more
    }
}
