//! The training step, and ten of them with the optimiser.

use peapod_model::adapter::Adapter;
use peapod_model::distill::{DistillConfig, Distiller, English, Images, LoadOptions, LossSums, MicroBatch, Prompts};
use peapod_model::optim::{AdamW, AdamWConfig, Ema, clip_grad_norm};
use peapod_model::source::ModelSource;
use peapod_model::text::StudentOptions;
use tch::{Kind, Tensor};

use super::{Case, Place, Result, Tensors};

/// The losses and the adapter's gradients of a training step, summed over samples.
pub fn step(case: &Case) -> Result<Tensors> {
    let (distiller, adapter) = load(case)?;
    let mut gradient = zeros(&adapter);
    let sums = distiller.accumulate(&adapter, &batch(case, None, 0..captions(case)?.len())?, &mut gradient)?;
    let losses = [("loss.task", sums.task), ("loss.logit", sums.logit), ("loss.feature", sums.feature)];
    let losses = losses.map(|(name, value)| (name.to_owned(), Tensor::from(value)));
    Ok(losses.into_iter().chain(by_parameter("gradient", &adapter, &gradient)).collect())
}

/// What some updates on the same pictures, with other noise each time, change in the parameters and their average; the losses on the way.
pub fn train(case: &Case) -> Result<Tensors> {
    let (distiller, adapter) = load(case)?;
    let config = AdamWConfig {
        beta1: case.setting("beta1")?,
        beta2: case.setting("beta2")?,
        eps: case.setting("eps")?,
        weight_decay: case.setting("weight_decay")?,
    };
    let initial = adapter.flat().copy();
    let mut optimiser = AdamW::new(config, adapter.num_parameters() as i64, case.place.device);
    let mut average = Ema::new(adapter.flat(), case.setting("ema_decay")?)?;
    let micro_batches: Vec<usize> = case.setting("micro_batches")?;
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..case.input("timesteps")?.size()[0] {
        let (mut gradient, mut sums) = (zeros(&adapter), LossSums::default());
        for length in &micro_batches {
            let samples = sums.count..sums.count + length;
            sums += distiller.accumulate(&adapter, &batch(case, Some(step), samples)?, &mut gradient)?;
        }
        let mut gradient = gradient / sums.count as f64;
        norms.push(clip_grad_norm(&mut gradient, case.setting("max_norm")?)?);
        optimiser.step(adapter.flat(), &gradient, case.setting("lr")?)?;
        average.update(adapter.flat())?;
        losses.push(Tensor::from_slice(&[sums.task, sums.logit, sums.feature]) / sums.count as f64);
    }
    let rows =
        [("losses", Tensor::stack(&losses, 0)), ("norms", Tensor::from_slice(&norms))].map(|(name, tensor)| (name.to_owned(), tensor));
    let updates = by_parameter("update", &adapter, &(adapter.flat() - &initial));
    Ok(rows.into_iter().chain(updates).chain(by_parameter("average", &adapter, &(average.flat() - &initial))).collect())
}

fn load(case: &Case) -> Result<(Distiller, Adapter)> {
    let Place { kind, device } = case.place;
    let options = LoadOptions {
        distill: case.setting::<DistillConfig>("distill")?,
        context_length: case.setting("context_length")?,
        student: StudentOptions::new(kind, device),
        vae_kind: kind,
    };
    let distiller = Distiller::load(&ModelSource::open(&case.path("model")?, None)?, &case.path("student")?, options)?;
    Ok((distiller, Adapter::load(&case.folder.join("adapter.safetensors"), device)?))
}

/// Some samples of a case; in training, with the randomness of one step. The pictures are the same in every step.
fn batch(case: &Case, step: Option<i64>, samples: std::ops::Range<usize>) -> Result<MicroBatch> {
    let narrow = |tensor: Tensor| tensor.narrow(0, samples.start as i64, samples.len() as i64);
    let drawn = |name: &str| -> Result<Tensor> {
        let tensor = case.input(name)?;
        Ok(narrow(step.map_or(tensor.shallow_clone(), |step| tensor.get(step))))
    };
    Ok(MicroBatch {
        images: Images::Pixels(narrow(case.input("pixels")?)),
        posterior: drawn("posterior")?,
        noise: drawn("noise")?,
        offset: drawn("offset")?,
        timesteps: drawn("timesteps")?,
        drop: drawn("drop")?.to_kind(Kind::Bool),
        native: drawn("native")?.to_kind(Kind::Bool),
        prompts: Prompts::Captions(captions(case)?[samples.clone()].to_vec()),
        english: English::Captions(case.setting::<Vec<String>>("english")?[samples.clone()].to_vec()),
        original_size: case.setting::<Vec<(i64, i64)>>("original_size")?[samples.clone()].to_vec(),
        crop: case.setting::<Vec<(i64, i64)>>("crop")?[samples.clone()].to_vec(),
        text_dropout: vec![0; samples.len()],
    })
}

fn captions(case: &Case) -> Result<Vec<String>> {
    case.setting("captions")
}

fn zeros(adapter: &Adapter) -> Tensor {
    adapter.flat().zeros_like()
}

/// A flat row cut into the adapter's tensors, which follow the order of the state dict (pea-method's list of keys).
fn by_parameter(prefix: &str, adapter: &Adapter, flat: &Tensor) -> Vec<(String, Tensor)> {
    let depth = adapter.config().depth;
    let projector = (0..depth).map(|index| format!("projector.{}.weight", 2 * index));
    let names = ["layernorm.weight", "layernorm.bias"].map(str::to_owned).into_iter().chain(projector);
    let names = names.chain(adapter.config().output.iter().flat_map(|_| ["fc.weight", "fc.bias"].map(str::to_owned)));
    let mut start = 0;
    let cut = names.zip(adapter.parameters()).map(|(name, parameter)| {
        let length = parameter.numel() as i64;
        let tensor = flat.narrow(0, start, length).reshape(parameter.size());
        start += length;
        (format!("{prefix}.{name}"), tensor)
    });
    cut.collect()
}
