//! One share of one step: from decoded samples to gradient and tail.

use peapod_data::Share;
use peapod_model::adapter::Adapter;
use peapod_model::distill::{Distiller, LossSums, PendingSums};
use tch::Tensor;

use super::tensors::to_tensors;
use crate::tail::{Contribution, LossTotals};

/// Adds the gradient of every micro-batch of a share into `gradient`, computed at a loss scale, and sums up what the tail will say.
///
/// # Errors
/// The model crate's.
pub fn accumulate(
    models: &Distiller,
    adapter: &Adapter,
    share: &Share,
    gradient: &mut Tensor,
    scale: f64,
) -> peapod_model::Result<Contribution> {
    // A GPU works on one micro-batch while the next is put together.
    let mut sums = PendingSums::default();
    for batch in &share.batches {
        for batch in to_tensors(batch, models.vae().downscale())? {
            sums.append(models.accumulate_ahead(adapter, &batch, gradient, scale)?);
        }
    }
    let LossSums { task, logit, feature, .. } = sums.read()?;
    let losses = LossTotals { task: task as f32, logit: logit as f32, feature: feature as f32 };
    let not_finite = ![task, logit, feature].iter().all(|sum: &f64| sum.is_finite());
    let native = share.batches.iter().flat_map(|batch| &batch.samples).filter(|sample| sample.native).count() as u32;
    Ok(Contribution { names: share.names().collect(), native, losses, not_finite, ..Contribution::default() })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use peapod_data::{LeasedShard, Loader};
    use peapod_proto::ids::{Bitmap, Epoch, LeaseId, ShardId};
    use peapod_proto::job::Job;
    use tch::Device;

    use super::*;
    use crate::setup;

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
        let of = |share: &Share, gradient: &mut Tensor| accumulate(&models, &adapter, share, gradient, 1.0).unwrap();
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
    }
}
