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
