//! One share of one step: from decoded samples to gradient and tail.

use peapod_collective::AbortHandle;
use peapod_data::Share;
use peapod_model::adapter::Adapter;
use peapod_model::distill::{LossSums, PendingSums};
use tch::Tensor;

use super::ahead::{Preparation, Prepared};
use crate::tail::{Contribution, LossTotals};

/// A pass through the models, forth and back.
pub struct Pass<'a> {
    /// The models, and how batches are made ready for them.
    pub preparation: Preparation<'a>,
    /// What is trained.
    pub adapter: &'a Adapter,
    /// What the loss is multiplied with on the way back.
    pub scale: f64,
    /// Parts in which each micro-batch is computed, where memory is short.
    pub parts: usize,
    /// Looked at before each micro-batch: the others do not wait for a step that is void.
    pub abort: &'a AbortHandle,
}

impl Pass<'_> {
    /// Adds the gradient of every micro-batch of a share into `gradient` and sums up what the tail will say; nothing if it is broken off.
    ///
    /// `first` is the first batch, if it is prepared already. `meanwhile` is called when a GPU has all its work and nobody has
    /// waited for it.
    ///
    /// # Errors
    /// The model crate's.
    pub fn accumulate(
        &self,
        share: &Share,
        first: Option<Prepared>,
        gradient: &mut Tensor,
        meanwhile: impl FnOnce(),
    ) -> peapod_model::Result<Option<Contribution>> {
        // A GPU works on one micro-batch while the next is put together.
        let (mut sums, mut prepared) = (PendingSums::default(), first);
        for (index, batch) in share.batches.iter().enumerate() {
            let tensors = match prepared.take() {
                Some(prepared) => prepared,
                None => self.preparation.prepare(batch)?,
            };
            for batch in tensors.take()?.iter().flat_map(|batch| batch.split(self.parts)) {
                if self.abort.reason().is_some() {
                    return Ok(None);
                }
                sums.append(self.preparation.models.accumulate_ahead(self.adapter, &batch, gradient, self.scale)?);
            }
            prepared = share.batches.get(index + 1).map(|next| self.preparation.prepare(next)).transpose()?;
        }
        meanwhile();
        let LossSums { task, logit, feature, .. } = sums.read()?;
        let losses = LossTotals { task: task as f32, logit: logit as f32, feature: feature as f32 };
        let not_finite = ![task, logit, feature].iter().all(|sum: &f64| sum.is_finite());
        let native = share.batches.iter().flat_map(|batch| &batch.samples).filter(|sample| sample.native).count() as u32;
        Ok(Some(Contribution { names: share.names().collect(), native, losses, not_finite, ..Contribution::default() }))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::path::Path;

    use super::super::ahead::{Ahead, Encoding};
    use super::*;
    use crate::setup;
    use peapod_data::{LeasedShard, Loader};
    use peapod_proto::ids::{Bitmap, Epoch, LeaseId, ShardId};
    use peapod_proto::job::Job;
    use tch::Device;

    #[test]
    fn share_says_what_its_micro_batches_say_together() {
        tch::set_num_threads(1);
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let text = std::fs::read_to_string(root.join("tests/demo/job.toml")).unwrap();
        let job = Job::parse(&text.replace("\"tests/demo", &format!("\"{}/tests/demo", root.display()))).unwrap();
        let models = setup::load_models(&job, Device::Cpu).unwrap();
        let mut config = setup::loader_config(&job, &models).unwrap();
        config.micro_batch = 3;
        let mut loader = Loader::start(config, |_| {}).unwrap();
        let (url, done) = (root.join("tests/demo/shards/00000.tar").display().to_string(), Bitmap::default());
        loader.handle().grant(vec![LeasedShard { lease: LeaseId(1), epoch: Epoch(0), shard: ShardId(0), url, done, end: None }], true);
        let share = loader.next_share(8).unwrap();
        assert!(share.batches.len() >= 3 && share.num_samples() == 8);

        let adapter = Adapter::fresh(setup::adapter_config(&job, &models), 1, Device::Cpu).unwrap();
        let abort = AbortHandle::new();
        let encoding = Cell::new(Encoding::InStep);
        let preparation = Preparation { models: &models, device: Device::Cpu, encoding: &encoding };
        let pass = Pass { preparation, adapter: &adapter, scale: 1.0, parts: 1, abort: &abort };
        let of = |share: &Share, gradient: &mut Tensor| pass.accumulate(share, None, gradient, || {}).unwrap().unwrap();
        let (mut whole, mut parts) = (adapter.flat().zeros_like(), adapter.flat().zeros_like());
        let together = of(&share, &mut whole);
        let alone: Vec<Contribution> = share.batches.iter().map(|batch| of(&Share { batches: vec![batch.clone()] }, &mut parts)).collect();
        assert_eq!(together.names, share.names().collect::<Vec<_>>());
        assert_eq!(together.native, alone.iter().map(|part| part.native).sum::<u32>());
        let losses = |part: &Contribution| [part.losses.task, part.losses.logit, part.losses.feature];
        for loss in 0..3 {
            let sum: f32 = alone.iter().map(|part| losses(part)[loss]).sum();
            assert!(sum > 0.0 && (losses(&together)[loss] / sum - 1.0).abs() < 1e-5, "{together:?}, apart {alone:?}");
        }
        let distance = (&whole - &parts).norm().double_value(&[]) / parts.norm().double_value(&[]);
        assert!(distance < 1e-5, "{distance}");

        // What was put together ahead stands for the first of them, and for nothing else.
        let mut ahead = Ahead::from(share.clone());
        ahead.prepare(&preparation);
        let (share, first) = ahead.into_parts();
        assert!(first.is_some());
        let (mut gradient, mut is_called) = (adapter.flat().zeros_like(), false);
        let prepared = pass.accumulate(&share, first, &mut gradient, || is_called = true).unwrap().unwrap();
        assert_eq!((&prepared, &gradient), (&together, &whole));
        assert!(is_called);

        // Encoded before their step, they teach the same.
        encoding.set(Encoding::Ahead(None));
        let _ = gradient.zero_();
        let encoded = pass.accumulate(&share, None, &mut gradient, || {}).unwrap().unwrap();
        assert_eq!(encoded.names, together.names);
        let distance = (&whole - &gradient).norm().double_value(&[]) / whole.norm().double_value(&[]);
        assert!(distance < 1e-5, "{distance}");
        encoding.set(Encoding::InStep);

        // Where memory is short the same comes out in parts.
        let halves = Pass { parts: 2, ..pass };
        let _ = gradient.zero_();
        let in_parts = halves.accumulate(&share, None, &mut gradient, || {}).unwrap().unwrap();
        assert_eq!(in_parts.names, together.names);
        let distance = (&whole - &gradient).norm().double_value(&[]) / whole.norm().double_value(&[]);
        assert!(distance < 1e-5, "{distance}");

        abort.abort("rank 1 died");
        let broken_off = halves.accumulate(&share, None, &mut gradient, || panic!("no step will follow")).unwrap();
        assert_eq!(broken_off, None);
    }
}
