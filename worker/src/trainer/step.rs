//! One share of one step: from decoded samples to gradient and tail.

use peapod_data::{Batch, Share};
use peapod_model::adapter::Adapter;
use peapod_model::distill::{Distiller, MicroBatch};
use tch::{Kind, Tensor};

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
    let (mut task, mut logit, mut feature) = (0.0, 0.0, 0.0);
    for batch in &share.batches {
        let sums = models.accumulate_scaled(adapter, &to_tensors(batch, models.vae().downscale()), gradient, scale)?;
        task += sums.task;
        logit += sums.logit;
        feature += sums.feature;
    }
    let losses = LossTotals { task: task as f32, logit: logit as f32, feature: feature as f32 };
    let not_finite = ![task, logit, feature].iter().all(|sum: &f64| sum.is_finite());
    let native = share.batches.iter().flat_map(|batch| &batch.samples).filter(|sample| sample.native).count() as u32;
    Ok(Contribution { names: share.names().collect(), native, losses, not_finite, ..Contribution::default() })
}

/// A batch as the model takes it; shapes as in [`MicroBatch`].
pub fn to_tensors(batch: &Batch, scale: i64) -> MicroBatch {
    let (width, height) = (i64::from(batch.bucket.0), i64::from(batch.bucket.1));
    let count = batch.samples.len() as i64;
    let samples = || batch.samples.iter();
    let channels = batch.samples.first().map_or(0, |sample| sample.draws.offset.len()) as i64;
    let latents = [count, channels, height / scale, width / scale];
    let floats = |part: fn(&peapod_data::Draws) -> &[f32]| {
        Tensor::from_slice(&samples().flat_map(|sample| part(&sample.draws)).copied().collect::<Vec<f32>>())
    };
    let flags = |values: Vec<bool>| Tensor::from_slice(&values);
    let pixels: Vec<u8> = samples().flat_map(|sample| &sample.pixels).copied().collect();
    MicroBatch {
        pixels: Tensor::from_slice(&pixels).view([count, height, width, 3]).permute([0, 3, 1, 2]).contiguous(),
        posterior: floats(|draws| &draws.posterior).view(latents),
        noise: floats(|draws| &draws.noise).view(latents),
        offset: floats(|draws| &draws.offset).view([count, channels]),
        timesteps: Tensor::from_slice(&samples().map(|sample| i64::from(sample.draws.timestep)).collect::<Vec<_>>()).to_kind(Kind::Int64),
        drop: flags(samples().map(|sample| sample.draws.drop_condition).collect()),
        native: flags(samples().map(|sample| sample.native).collect()),
        captions: samples().map(|sample| sample.prompt.clone()).collect(),
        english: samples().map(|sample| sample.english.clone()).collect(),
        original_size: samples().map(|sample| (sample.original_size.0.into(), sample.original_size.1.into())).collect(),
        crop: samples().map(|sample| (sample.crop.0.into(), sample.crop.1.into())).collect(),
        text_dropout: samples().map(|sample| sample.draws.text_dropout).collect(),
    }
}
