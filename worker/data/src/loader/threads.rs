//! The loader's threads: thin loops around [`State`].

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use fast_image_resize::Resizer;
use peapod_proto::ids::{LeaseId, SampleName};

use super::state::{Buffered, Job, State};
use super::{Content, LeasedShard, LoaderConfig, LoaderEvent, Prepared};
use crate::bucket::Bucket;
use crate::cached::{CachedSample, Stamp, TextShapes};
use crate::caption::Cleaner;
use crate::draws::SampleRng;
use crate::error::Failure;
use crate::sample::{Encoded, Rule, Rules, Skip, Stored, examine};
use crate::shard::ShardEnd;
use crate::source::{SourceOptions, Sources};
use crate::words::shown;
use crate::{Error, Result, image};

/// Skipped samples that are reported together.
const REPORT_LEN: usize = 64;

/// What all threads see.
pub struct Shared {
    state: Mutex<State>,
    /// For the trainer: a picture is decoded, or something about the leases has changed.
    pub progress: Condvar,
    /// For the reader and the decoders: there is a lease, room, or a picture to decode.
    pub work: Condvar,
    pub has_panicked: AtomicBool,
    /// Samples read and pictures decoded: who waits for a share can tell a slow source from one that is stuck.
    pub samples_read: AtomicU64,
    config: LoaderConfig,
    rules: Rules,
    sources: Sources,
    text_shapes: TextShapes,
    events: Box<dyn Fn(LoaderEvent) + Send + Sync>,
}

impl Shared {
    pub fn new(state: State, config: LoaderConfig, rules: Rules, events: Box<dyn Fn(LoaderEvent) + Send + Sync>) -> Self {
        Self {
            state: Mutex::new(state),
            progress: Condvar::new(),
            work: Condvar::new(),
            has_panicked: AtomicBool::new(false),
            samples_read: AtomicU64::new(0),
            sources: Sources::new(SourceOptions::new(&config.data)),
            text_shapes: TextShapes::default(),
            config,
            rules,
            events,
        }
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panicked with the lock held is noted in `has_panicked`.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wait<'a>(&self, condition: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        condition.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wake_all(&self) {
        self.progress.notify_all();
        self.work.notify_all();
    }

    /// Asks for leases if it is time to. With the lock held, so that the request and a grant cannot cross.
    pub fn ask(&self, state: &mut State) {
        if let Some((num, is_idle)) = state.ask() {
            (self.events)(LoaderEvent::NeedLeases { num, is_idle });
        }
    }

    /// With the lock held, so that it cannot cross the report of the lease's end.
    pub fn gave_back(&self, lease: LeaseId, from: u32) {
        (self.events)(LoaderEvent::GaveBack { lease, from });
    }

    fn report(&self, lease: LeaseId, skipped: Vec<Skip>, end: Option<ShardEnd>) {
        (self.events)(LoaderEvent::Shard { lease, skipped, end });
    }
}

/// Runs a thread's body and notes a panic, which would otherwise leave the trainer waiting for ever.
pub fn watch(shared: &Shared, body: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        let state = shared.lock();
        shared.has_panicked.store(true, Ordering::Release);
        drop(state);
        shared.wake_all();
    }
}

/// The reader: reads granted leases one after the other until the loader stops.
pub fn read_leases(shared: &Shared, cleaner: &Cleaner) {
    loop {
        let mut state = shared.lock();
        let lease = loop {
            if state.is_stopping {
                return;
            }
            match state.begin_lease() {
                Some(lease) => break lease,
                None => state = shared.wait(&shared.work, state),
            }
        };
        shared.ask(&mut state);
        drop(state);

        let id = lease.lease;
        let mut skipped = Vec::new();
        let stop = read_lease(shared, cleaner, &lease, &mut skipped);

        let mut state = shared.lock();
        let stop = match stop {
            Ok(stop) => stop,
            Err(error) => {
                // The lease stays unread: what it holds is for whoever has it next.
                state.failure = Some(error);
                drop(state);
                shared.wake_all();
                return;
            }
        };
        let is_cut = state.is_cut();
        state.end_lease();
        match stop {
            _ if !state.is_held(id) => {}
            // The samples behind the cut are another's, whatever was seen of them.
            _ if is_cut => shared.report(id, skipped, None),
            Some(Stop::End(end)) => shared.report(id, skipped, Some(end)),
            Some(Stop::Part(end)) => {
                shared.report(id, skipped, None);
                shared.gave_back(id, end);
            }
            None => {}
        }
        state.plan();
        shared.ask(&mut state);
        drop(state);
        shared.wake_all();
    }
}

/// Where reading a lease came to its end.
enum Stop {
    /// At the end of the tar.
    End(ShardEnd),
    /// Where the lease ends.
    Part(u32),
}

/// Reads one tar into the buffers; `skipped` keeps what is not reported yet. `None` if the lease was lost or given back, or the loader
/// stops.
///
/// Errors: the shard could not be had, and nothing is known to be wrong with it; or it was made for another job.
fn read_lease(shared: &Shared, cleaner: &Cleaner, lease: &LeasedShard, skipped: &mut Vec<Skip>) -> Result<Option<Stop>, Failure> {
    let is_cancelled = || !shared.lock().may_read(lease.lease);
    let check = |stamp: &[u8]| Ok(Stamp::check(&lease.url, stamp, &shared.config.recipe)?);
    let mut part_end = None;
    let end = shared.sources.read(&lease.url, &lease.done, is_cancelled, check, |raw| {
        shared.samples_read.fetch_add(1, Ordering::Relaxed);
        let (index, key) = (raw.index, raw.key.clone());
        if let Some(end) = lease.end.filter(|&end| index >= end) {
            part_end = Some(end);
            return ControlFlow::Break(());
        }
        match examine(raw, &shared.rules, cleaner) {
            Ok(encoded) => {
                let name = SampleName { epoch: lease.epoch, shard: lease.shard, index };
                buffer(shared, Buffered { name, lease: lease.lease, key, encoded })
            }
            Err(skip) => {
                skipped.push(skip);
                if skipped.len() < REPORT_LEN {
                    return ControlFlow::Continue(());
                }
                let state = shared.lock();
                if !state.may_read(lease.lease) {
                    return ControlFlow::Break(());
                }
                shared.report(lease.lease, std::mem::take(skipped), None);
                ControlFlow::Continue(())
            }
        }
    });
    match end {
        Ok(end) => Ok(part_end.map(Stop::Part).or(end.map(Stop::End))),
        Err(Error::Cancelled) => Ok(None),
        Err(Error::Store(error)) => Err(error.into()),
        Err(Error::Recipe(error)) => Err(error.into()),
        // There is no such shard, or it begins as none does.
        Err(error) => Ok(Some(Stop::End(ShardEnd { num_samples: 0, truncated: Some(shown(&error.to_string())) }))),
    }
}

/// Puts a sample into the buffers, waiting for room.
fn buffer(shared: &Shared, sample: Buffered) -> ControlFlow<()> {
    let mut state = shared.lock();
    loop {
        if !state.may_read(sample.lease) {
            return ControlFlow::Break(());
        }
        if state.has_room() {
            break;
        }
        state = shared.wait(&shared.work, state);
    }
    state.push(sample);
    if let Some((lease, from)) = state.cut_wanted() {
        shared.gave_back(lease, from);
    }
    drop(state);
    // The trainer waits for pictures only; it is woken by the decoders.
    shared.work.notify_all();
    ControlFlow::Continue(())
}

/// A decoder: decodes the pictures of planned samples until the loader stops.
pub fn decode_pictures(shared: &Shared) {
    let mut resizer = Resizer::new();
    loop {
        let mut state = shared.lock();
        let Job { ticket, sample } = loop {
            if state.is_stopping {
                return;
            }
            match state.next_job() {
                Some(job) => break job,
                None => state = shared.wait(&shared.work, state),
            }
        };
        drop(state);

        let Buffered { name, lease, key, encoded } = sample;
        let decoded = prepare(&mut resizer, name, lease, encoded, &shared.config, &shared.text_shapes);
        shared.samples_read.fetch_add(1, Ordering::Relaxed);

        let mut state = shared.lock();
        match decoded {
            Ok(prepared) => {
                state.decoded(ticket, Some(prepared));
            }
            Err(error) => {
                if state.decoded(ticket, None) {
                    let skip = Skip::new(name.index, Rule::of_picture(&error), &key, &error.to_string());
                    shared.report(lease, vec![skip], None);
                }
            }
        }
        drop(state);
        // There may be something to decode for others now, or room to read.
        shared.wake_all();
    }
}

/// Decodes, scales and crops a sample's picture, or takes what was made of it before, and draws its random numbers.
pub fn prepare(
    resizer: &mut Resizer,
    name: SampleName,
    lease: LeaseId,
    encoded: Encoded,
    config: &LoaderConfig,
    text_shapes: &TextShapes,
) -> Result<Prepared> {
    let Encoded { stored, size, bucket, caption } = encoded;
    let [width, height] = config.data.buckets.get(bucket).copied().unwrap_or_default();
    let rng = SampleRng::new(config.seed, name);
    let bucket = Bucket { width, height };
    let (content, crop) = match stored {
        Stored::Picture { jpeg, turn } => {
            let cropped = image::cut(resizer, &jpeg, turn, size, bucket, config.data.fast_shrink, &rng)?;
            (Content::Pixels(cropped.pixels), cropped.corner)
        }
        Stored::Latents(bytes) => {
            let cached = CachedSample::parse(&bytes, config.latent_shape(bucket))?;
            text_shapes.check(&cached)?;
            let crop = cached.crop;
            (Content::Cached(Box::new(cached)), crop)
        }
    };
    Ok(Prepared {
        name,
        lease,
        content,
        prompt: caption.prompt,
        english: caption.english,
        native: caption.native,
        original_size: size,
        crop,
        draws: rng.draws(&config.draw_shape(bucket)),
    })
}
