//! Turns leases into shares: one thread reads tars, some decode, and what is trained together is decided by rules that do not know of them.
//!
//! ```text
//! granted leases -> reader -> stream -> pool (shuffle buffer) -> planned batches, decoded in place -> next_share
//!                   examines  1/8       5/8                      1/4 of buffer_bytes, at most three shares
//! ```
//!
//! - What all of them hold, decoded pictures included, stays below `buffer_bytes`, but for this: a sample always fits into the stream, and
//!   a share into the plan, however large. What a trainer has taken is no longer counted; it holds two shares, one that it trains and one
//!   that it has taken ahead. A reader and each decoder work at one sample more.
//!
//! - Nothing is lost and nothing comes twice: each index of a tar is handed out once, or reported once as skipped, or passed over because
//!   the lease says that it is done.
//! - Undisturbed, the same leases granted in the same order give the same shares, however fast disks and threads are: the pool is always
//!   filled to the same mark before a batch is drawn from it.
//! - What is left at the end of an epoch stays buffered and is trained with the samples of the next.

pub mod state;
mod threads;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use peapod_proto::ids::{Bitmap, Epoch, LeaseId, SampleName, ShardId};
use peapod_proto::job::DataSection;
use peapod_proto::message::Lease;

use crate::bucket::Bucket;
use crate::cached::{CachedSample, Recipe};
use crate::caption::Cleaner;
use crate::draws::{DrawShape, Draws};
use crate::sample::{Rules, Skip};
use crate::shard::ShardEnd;
use crate::{Error, Result};
use state::State;
use threads::Shared;
pub(crate) use threads::prepare;

/// Most decoding threads when the job leaves their number open.
const MAX_DEFAULT_THREADS: usize = 8;

/// A shard to read, by right of a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeasedShard {
    /// The lease.
    pub lease: LeaseId,
    /// The pass over the data it belongs to.
    pub epoch: Epoch,
    /// The shard.
    pub shard: ShardId,
    /// Where it lies.
    pub url: String,
    /// Samples that are already trained or skipped, or another's: they are passed over.
    pub done: Bitmap,
    /// The first sample that is another's again; none: the lease goes on to the end of the tar.
    pub end: Option<u32>,
}

impl From<Lease> for LeasedShard {
    fn from(Lease { id, epoch, shard, url, done, end }: Lease) -> Self {
        Self { lease: id, epoch, shard, url, done, end }
    }
}

/// What a loader may expect after an answer to its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlook {
    /// More leases for the asking.
    More,
    /// None is left, but the rest of what others read is there for a loader that has nothing more to hand out.
    WhenIdle,
    /// Nothing. Shares are cut short when the buffers run dry.
    Nothing,
}

impl Outlook {
    /// From what a grant says: none is left for now, and whether to ask again when idle.
    #[must_use]
    pub fn of_grant(none_left: bool, ask_when_idle: bool) -> Self {
        match (none_left, ask_when_idle) {
            (false, _) => Self::More,
            (true, true) => Self::WhenIdle,
            (true, false) => Self::Nothing,
        }
    }
}

/// What the loader needs of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderConfig {
    /// Rules and sizes of buffers.
    pub data: DataSection,
    /// The job's seed.
    pub seed: u64,
    /// Most samples in a batch.
    pub micro_batch: usize,
    /// Channels of the VAE's latents.
    pub latent_channels: usize,
    /// Pixels to a latent, along one side.
    pub vae_scale: u32,
    /// Length of the diffusion.
    pub num_timesteps: u32,
    /// Probability with which a sample is trained with the empty prompt.
    pub condition_dropout: f64,
    /// How this job would make cached shards: those that were made otherwise are refused.
    pub recipe: Recipe,
}

impl LoaderConfig {
    /// A configuration for Stable Diffusion's latents: 4 channels, 8 pixels, 1000 timesteps. It knows of no model.
    #[must_use]
    pub fn new(data: DataSection, seed: u64, micro_batch: usize, condition_dropout: f64) -> Self {
        let recipe = Recipe::of_data(&data);
        Self { data, seed, micro_batch, latent_channels: 4, vae_scale: 8, num_timesteps: 1000, condition_dropout, recipe }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let misaligned = self.data.buckets.iter().find(|side| side.iter().any(|side| side % self.vae_scale.max(1) != 0 || *side == 0));
        let problem = match misaligned {
            _ if self.micro_batch == 0 => "micro_batch must be at least 1".into(),
            _ if self.latent_channels == 0 || self.vae_scale == 0 || self.num_timesteps == 0 => {
                "latent_channels, vae_scale and num_timesteps must be at least 1".into()
            }
            _ if self.data.buckets.is_empty() => "no bucket".into(),
            Some([width, height]) => format!("bucket {width} x {height} is not a multiple of vae_scale ({})", self.vae_scale),
            None => return Ok(()),
        };
        Err(Error::Config(problem))
    }

    pub(crate) fn num_decode_threads(&self) -> usize {
        match self.data.decode_threads as usize {
            0 => (std::thread::available_parallelism().map_or(1, usize::from) / 2).clamp(1, MAX_DEFAULT_THREADS),
            given => given,
        }
    }

    /// `[channels, height, width]` of the latents of a bucket.
    fn latent_shape(&self, bucket: Bucket) -> [usize; 3] {
        [self.latent_channels, (bucket.height / self.vae_scale) as usize, (bucket.width / self.vae_scale) as usize]
    }

    fn draw_shape(&self, bucket: Bucket) -> DrawShape {
        let [latent_channels, height, width] = self.latent_shape(bucket);
        DrawShape {
            latent_channels,
            latent_area: height * width,
            num_timesteps: self.num_timesteps,
            condition_dropout: self.condition_dropout,
        }
    }
}

/// What the loader says to its supervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoaderEvent {
    /// This many more leases are wanted. Not repeated until the next grant or [`LoaderHandle::ask_again`].
    NeedLeases {
        /// How many.
        num: u32,
        /// Everything is handed out, and the share that is waited for is not full.
        is_idle: bool,
    },
    /// No more will be read of a lease, and no sample from an index on has been or will be handed out: on request, or because the lease
    /// ends there.
    GaveBack {
        /// The lease.
        lease: LeaseId,
        /// The first index that is left.
        from: u32,
    },
    /// News of a leased shard. Samples skipped while reading come in tar order; one whose picture fails to decode comes when that shows.
    Shard {
        /// The lease.
        lease: LeaseId,
        /// Samples that will not be handed out, each reported once.
        skipped: Vec<Skip>,
        /// Set when the tar was read to its end.
        end: Option<ShardEnd>,
    },
}

/// Samples that a trainer owes in one step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Share {
    /// Each of one bucket and of at most `micro_batch` samples.
    pub batches: Vec<Batch>,
}

impl Share {
    /// Samples in all batches.
    #[must_use]
    pub fn num_samples(&self) -> usize {
        self.batches.iter().map(|batch| batch.samples.len()).sum()
    }

    /// Its samples' names, in order.
    pub fn names(&self) -> impl Iterator<Item = SampleName> + '_ {
        self.batches.iter().flat_map(|batch| &batch.samples).map(|sample| sample.name)
    }
}

/// Samples that are computed at once.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Width and height of their pictures.
    pub bucket: (u32, u32),
    /// At least one.
    pub samples: Vec<Prepared>,
}

/// What a sample shows the model.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// RGB, 0..=255, `[height, width, 3]` of the bucket: a batch of them is a channels-last tensor as it stands.
    Pixels(Vec<u8>),
    /// What the frozen encoders made of it before.
    Cached(Box<CachedSample>),
}

/// A sample, ready to be trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// Its name.
    pub name: SampleName,
    /// The lease it was read under.
    pub lease: LeaseId,
    /// What it shows.
    pub content: Content,
    /// For the student.
    pub prompt: String,
    /// For the teacher.
    pub english: String,
    /// Whether it trains by the diffusion loss (`z = 1`) rather than by distillation.
    pub native: bool,
    /// Width and height of the picture as found.
    pub original_size: (u32, u32),
    /// Where the crop's corner lies in the scaled picture, `(y, x)`.
    pub crop: (u32, u32),
    /// Its random numbers.
    pub draws: Draws,
}

impl Prepared {
    /// Memory that it takes, roughly.
    #[must_use]
    pub fn num_bytes(&self) -> u64 {
        let content = match &self.content {
            Content::Pixels(pixels) => pixels.len(),
            Content::Cached(cached) => cached.num_bytes(),
        };
        let draws = size_of_val(&self.draws.noise[..]) + size_of_val(&self.draws.posterior[..]);
        (content + draws + self.prompt.len() + self.english.len()) as u64
    }
}

/// How full the buffers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Samples that wait to be planned.
    pub buffered_samples: usize,
    /// Bytes they hold.
    pub buffered_bytes: u64,
    /// Samples of planned batches.
    pub planned_samples: usize,
    /// Bytes they hold, decoded or not.
    pub planned_bytes: u64,
    /// Those among them that are decoded.
    pub ready_samples: usize,
    /// Whether every granted lease is read and the supervisor said that there are no more.
    pub is_at_end: bool,
}

/// The trainer's side of the loader. Dropping it ends its threads.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// The supervisor's side: may be used from any thread while the trainer waits in [`Loader::next_share`].
#[derive(Clone)]
pub struct LoaderHandle {
    shared: Arc<Shared>,
}

impl Loader {
    /// Starts the threads and asks for the first leases.
    ///
    /// `events` is called on the loader's threads and inside its methods: it must neither block nor call the loader. Sending on a channel
    /// is what it is for.
    ///
    /// Errors: [`Error::Config`], [`Error::Tables`], [`Error::Spawn`].
    pub fn start(config: LoaderConfig, events: impl Fn(LoaderEvent) + Send + Sync + 'static) -> Result<Self> {
        config.validate()?;
        let cleaner = Cleaner::new(config.data.captions.rules(), config.data.strict_clean)?;
        let rules = Rules::new(&config.data);
        let num_threads = config.num_decode_threads();
        let shared = Arc::new(Shared::new(State::new(&config), config, rules, Box::new(events)));
        let mut loader = Self { shared: shared.clone(), threads: Vec::with_capacity(num_threads + 1) };
        let reader = shared.clone();
        loader.spawn("data-reader".into(), move || threads::read_leases(&reader, &cleaner))?;
        for number in 0..num_threads {
            let decoder = shared.clone();
            loader.spawn(format!("data-decode-{number}"), move || threads::decode_pictures(&decoder))?;
        }
        shared.ask(&mut shared.lock());
        Ok(loader)
    }

    /// A handle for the supervisor.
    #[must_use]
    pub fn handle(&self) -> LoaderHandle {
        LoaderHandle { shared: self.shared.clone() }
    }

    /// Waits for the next share and takes it.
    ///
    /// It has `num_samples`, or fewer, possibly none, once the supervisor has said that no lease is left and everything read is handed out.
    /// Pictures of later shares of the same size are decoded meanwhile.
    ///
    /// Errors: [`Error::Cancelled`] from [`LoaderHandle::cancel`] until [`LoaderHandle::resume`], whereupon nothing is lost;
    /// [`Error::Store`] if a shard cannot be had, its store being down for `data.give_up_after`; [`Error::Recipe`] if a cached one was made
    /// for another job; [`Error::ThreadPanicked`].
    pub fn next_share(&mut self, num_samples: usize) -> Result<Share> {
        let mut state = self.shared.lock();
        loop {
            // Looked at with the lock held, so that no wake-up falls between the look and the wait.
            if self.shared.has_panicked.load(Ordering::Acquire) {
                return Err(Error::ThreadPanicked);
            }
            if state.is_cancelled {
                return Err(Error::Cancelled);
            }
            if let Some(failure) = &state.failure {
                return Err(failure.clone().into());
            }
            let share = state.take_share(num_samples);
            // Planning has moved samples on: there may be pictures to decode and room to read.
            self.shared.work.notify_all();
            self.shared.ask(&mut state);
            match share {
                Some(share) => return Ok(share),
                None => state = self.shared.wait(&self.shared.progress, state),
            }
        }
    }

    /// The share that [`next_share`](Self::next_share) would give without a wait, if it is whole and of the size of the last one.
    ///
    /// For who has time to prepare it before it is needed.
    pub fn share_ahead(&mut self, num_samples: usize) -> Option<Share> {
        let mut state = self.shared.lock();
        if state.is_cancelled || state.failure.is_some() {
            return None;
        }
        let share = state.take_whole_share(num_samples)?;
        self.shared.work.notify_all();
        self.shared.ask(&mut state);
        Some(share)
    }

    /// Takes back the share of a void step: the next call of [`next_share`](Self::next_share) gives the same batches again. Of several
    /// the last one is taken back first.
    ///
    /// Samples of leases that are no longer held are dropped.
    pub fn put_back(&mut self, share: Share) {
        self.shared.lock().put_back(share);
    }

    /// Drops every buffered, planned and decoded sample of leases other than `held`, and stops reading those.
    ///
    /// For a change of membership. What the trainer still holds may be [put back](Self::put_back) before or after.
    pub fn retain_leases(&mut self, held: &[LeaseId]) {
        self.handle().retain_leases(held);
    }

    fn spawn(&mut self, name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let shared = self.shared.clone();
        let body = move || threads::watch(&shared, body);
        self.threads.push(std::thread::Builder::new().name(name).spawn(body).map_err(Error::Spawn)?);
        Ok(())
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().is_stopping = true;
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            // A panic has been noted by `watch`.
            let _ = thread.join();
        }
    }
}

impl LoaderHandle {
    /// Samples read and pictures decoded so far: what moves while a share is waited for.
    #[must_use]
    pub fn samples_read(&self) -> u64 {
        self.shared.samples_read.load(Ordering::Relaxed)
    }

    /// Gives the loader leases to read, in this order. A lease that it already has is ignored.
    ///
    /// `none_left`: no more will come for now. Shares are then cut short when the buffers run dry, instead of waiting. A later grant takes
    /// it back.
    pub fn grant(&self, leases: Vec<LeasedShard>, none_left: bool) {
        self.answer(leases, if none_left { Outlook::Nothing } else { Outlook::More });
    }

    /// [`grant`](Self::grant) with more to say about what will follow.
    pub fn answer(&self, leases: Vec<LeasedShard>, outlook: Outlook) {
        let mut state = self.shared.lock();
        state.grant(leases, outlook);
        self.shared.ask(&mut state);
        self.shared.wake_all();
    }

    /// Reads no more of these leases, so that another can have the rest, and says from where on with [`LoaderEvent::GaveBack`]. What is
    /// in the shuffle buffer or planned stays; what was read ahead of it goes too. Nothing is said of a lease that has been read to its
    /// end.
    ///
    /// `for_idle`: another has nothing to do. If this loader would have less than a share, and nothing else to read, a share is read first.
    pub fn give_back(&self, leases: &[LeaseId], for_idle: bool) {
        let mut state = self.shared.lock();
        for &lease in leases {
            if let Some(from) = state.give_back(lease, for_idle) {
                self.shared.gave_back(lease, from);
            }
        }
        self.shared.wake_all();
    }

    /// As [`Loader::retain_leases`]. Whoever hands on leases calls it in the order in which it was told of either: a lease that is granted
    /// after the change must not be taken for one that is lost by it.
    pub fn retain_leases(&self, held: &[LeaseId]) {
        let mut state = self.shared.lock();
        state.retain_leases(held);
        self.shared.ask(&mut state);
        self.shared.wake_all();
    }

    /// Forgets that leases were asked for or that none were left, and asks anew: after a change of membership or a lost connection.
    pub fn ask_again(&self) {
        let mut state = self.shared.lock();
        state.forget_answer();
        self.shared.ask(&mut state);
    }

    /// Makes [`Loader::next_share`] return [`Error::Cancelled`] at once, now and until [`resume`](Self::resume).
    pub fn cancel(&self) {
        self.shared.lock().is_cancelled = true;
        self.shared.wake_all();
    }

    /// Ends what [`cancel`](Self::cancel) began.
    pub fn resume(&self) {
        self.shared.lock().is_cancelled = false;
    }

    /// How full the buffers are.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.lock().stats()
    }
}

#[cfg(test)]
mod tests;
