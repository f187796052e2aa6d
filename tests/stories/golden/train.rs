//! The adapter and its optimiser.

use peapod_model::adapter::Adapter;
use peapod_model::optim::{AdamW, AdamWConfig, clip_grad_norm};
use tch::{Device, Kind, Tensor};

use super::{Case, Result, Tensors};

/// An adapter's outputs, whatever layout its file has.
pub fn adapter(case: &Case) -> Result<Tensors> {
    let adapter = Adapter::load(&case.path("adapter")?, Device::Cpu)?;
    let output = adapter.forward(&case.input("states")?);
    let pooled = output.pooled.map(|pooled| ("pooled".to_owned(), pooled.detach()));
    Ok(pooled.into_iter().chain([("sequence".to_owned(), output.sequence.detach())]).collect())
}

/// Parameters and moments after some AdamW steps on clipped gradients, and the gradients' norms.
pub fn adamw(case: &Case) -> Result<Tensors> {
    let config = AdamWConfig {
        beta1: case.setting("beta1")?,
        beta2: case.setting("beta2")?,
        eps: case.setting("eps")?,
        weight_decay: case.setting("weight_decay")?,
    };
    let parameters = case.input("parameters")?;
    let mut optimiser = AdamW::new(config, parameters.numel() as i64, Device::Cpu);
    let mut norms = Vec::new();
    for (step, lr) in case.setting::<Vec<f64>>("lr")?.into_iter().enumerate() {
        let mut gradient = case.input("gradients")?.get(step as i64).copy();
        norms.push(clip_grad_norm(&mut gradient, case.setting("max_norm")?)?);
        optimiser.step(&parameters, &gradient, lr)?;
    }
    let (exp_avg, exp_avg_sq) = (optimiser.exp_avg().shallow_clone(), optimiser.exp_avg_sq().shallow_clone());
    let norms = Tensor::from_slice(&norms).to_kind(Kind::Float);
    let named = [("parameters", parameters), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("norms", norms)];
    Ok(named.map(|(name, tensor)| (name.into(), tensor)).into())
}
