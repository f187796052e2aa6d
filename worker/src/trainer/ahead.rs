//! Batches that are made ready before their step: put together, on their way to the device, and where that is asked for encoded.

use std::cell::Cell;

use peapod_data::{Batch, Share};
use peapod_kernels::SideStream;
use peapod_model::distill::{Distiller, MicroBatch};
use tch::Device;

use super::guarded;
use super::tensors::to_tensors;

/// When the frozen encoders do their part for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// In its step.
    InStep,
    /// Before: on a stream of their own beside the step before, if there is one.
    Ahead(Option<SideStream>),
}

/// How batches are made ready.
#[derive(Clone, Copy)]
pub struct Preparation<'a> {
    /// The models they are for.
    pub models: &'a Distiller,
    /// Where those are.
    pub device: Device,
    /// Changes to [`Encoding::InStep`] where memory does not suffice for more.
    pub encoding: &'a Cell<Encoding>,
}

/// A batch that is ready, or will be when the device comes to it.
pub struct Prepared {
    batches: Vec<MicroBatch>,
    made_on: Option<SideStream>,
}

impl Preparation<'_> {
    /// Puts a batch together and gives the device what it has to do for it. What cannot be sent or encoded yet is left to the step, which
    /// says why.
    ///
    /// # Errors
    /// As [`to_tensors`].
    pub fn prepare(&self, batch: &Batch) -> peapod_model::Result<Prepared> {
        let mut batches = to_tensors(batch, self.models.vae().downscale())?;
        let send = |batches: &mut Vec<MicroBatch>| batches.iter_mut().all(|batch| batch.send_ahead(self.device).is_ok());
        let Encoding::Ahead(side) = self.encoding.get() else {
            send(&mut batches);
            return Ok(Prepared { batches, made_on: None });
        };
        let mut encode = || {
            guarded(|| {
                send(&mut batches);
                batches.iter_mut().try_for_each(|batch| self.models.encode_ahead(batch))
            })
        };
        let encoded = match side {
            None => encode(),
            Some(side) => side.run(encode).unwrap_or_else(|error| Err(error.to_string())),
        };
        let problem = encoded.map(|done| done.err().map(|error| error.to_string())).unwrap_or_else(Some);
        if let Some(problem) = problem {
            let first = problem.lines().next().unwrap_or_default();
            tracing::warn!("pictures and captions are encoded in their own step from here on, as doing it ahead failed: {first}");
            self.encoding.set(Encoding::InStep);
        }
        Ok(Prepared { batches, made_on: side })
    }
}

impl Prepared {
    /// The batches: their step comes behind what is still being made of them.
    ///
    /// # Errors
    /// [`peapod_model::Error::Torch`] if the device does not do that.
    pub fn take(self) -> peapod_model::Result<Vec<MicroBatch>> {
        if let Some(side) = self.made_on {
            let tensors: Vec<_> = self.batches.iter().flat_map(MicroBatch::tensors).collect();
            side.join(&tensors)?;
        }
        Ok(self.batches)
    }
}

/// A share before its step, with its first batch made ready, if there was time.
pub struct Ahead {
    /// The share.
    pub share: Share,
    first: Option<Prepared>,
}

impl From<Share> for Ahead {
    fn from(share: Share) -> Self {
        Self { share, first: None }
    }
}

impl Ahead {
    /// Makes the first batch ready. What fails is left to the step, which says why.
    pub fn prepare(&mut self, preparation: &Preparation<'_>) {
        self.first = self.share.batches.first().and_then(|batch| preparation.prepare(batch).ok());
    }

    /// The share, and what was made ready of it.
    pub fn into_parts(self) -> (Share, Option<Prepared>) {
        (self.share, self.first)
    }
}
