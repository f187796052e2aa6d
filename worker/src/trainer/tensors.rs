//! Decoded or cached samples as the model takes them.

use peapod_data::cached::{Array, CachedSample, Dtype, EnglishStates, StudentStates};
use peapod_data::{Batch, Content, Draws, Prepared};
use peapod_model::distill::{English, Images, MicroBatch, Prompts};
use peapod_model::text::Conditioning;
use peapod_model::vae::Moments;
use tch::{Kind, Tensor};

/// What of a sample is computed already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Ready {
    latents: bool,
    english: bool,
    prompt: bool,
}

/// A batch as the model takes it: in one piece, unless of some samples more was computed before than of others, with parallel samples
/// before native ones, so that either are one part of a tensor. Gradients and losses are sums over samples, so that the pieces say the same
/// as the whole in its own order.
///
/// # Errors
/// [`peapod_model::Error::Torch`] if cached samples of one batch differ in shape.
pub fn to_tensors(batch: &Batch, scale: i64) -> peapod_model::Result<Vec<MicroBatch>> {
    // Where English is cached native samples have none, and need none.
    let any_english = batch.samples.iter().any(|sample| cached(sample).is_some_and(|cached| cached.english.is_some()));
    let ready = |sample: &Prepared| match cached(sample) {
        Some(CachedSample { english, student, .. }) => {
            Ready { latents: true, english: any_english && (english.is_some() || sample.native), prompt: student.is_some() }
        }
        None => Ready::default(),
    };
    let mut pieces: Vec<(Ready, Vec<&Prepared>)> = Vec::new();
    for sample in &batch.samples {
        let ready = ready(sample);
        match pieces.iter_mut().find(|(piece, _)| *piece == ready) {
            Some((_, samples)) => samples.push(sample),
            None => pieces.push((ready, vec![sample])),
        }
    }
    let in_order = |(ready, mut samples): (Ready, Vec<&Prepared>)| {
        samples.sort_by_key(|sample| sample.native);
        piece(ready, &samples, batch.bucket, scale)
    };
    pieces.into_iter().map(in_order).collect()
}

fn cached(sample: &Prepared) -> Option<&CachedSample> {
    match &sample.content {
        Content::Cached(cached) => Some(cached),
        Content::Pixels(_) => None,
    }
}

/// Samples of which alike much is ready; shapes as in [`MicroBatch`].
fn piece(ready: Ready, samples: &[&Prepared], bucket: (u32, u32), scale: i64) -> peapod_model::Result<MicroBatch> {
    let (width, height) = (i64::from(bucket.0), i64::from(bucket.1));
    let count = samples.len() as i64;
    let each = || samples.iter().copied();
    let channels = samples.first().map_or(0, |sample| sample.draws.offset.len()) as i64;
    let latents = [count, channels, height / scale, width / scale];
    let floats = |part: fn(&Draws) -> &[f32]| Tensor::from_slice(&joined(each().map(|sample| part(&sample.draws))));
    let flags = |values: Vec<bool>| Tensor::from_slice(&values);
    let images = if ready.latents {
        let moment = |part: fn(&CachedSample) -> &Array| stack(each().filter_map(cached).map(|cached| tensor(part(cached))));
        Images::Moments(Moments { mean: moment(|cached| &cached.mean)?, log_variance: moment(|cached| &cached.log_variance)? })
    } else {
        // With the channels last, as the decoder and the autoencoder's convolutions have them.
        Images::Pixels(Tensor::from_slice(&joined(each().map(pixels))).view([count, height, width, 3]).permute([0, 3, 1, 2]))
    };
    let states = if ready.english { english(samples)? } else { None };
    Ok(MicroBatch {
        images,
        posterior: floats(|draws| &draws.posterior).view(latents),
        noise: floats(|draws| &draws.noise).view(latents),
        offset: floats(|draws| &draws.offset).view([count, channels]),
        timesteps: Tensor::from_slice(&each().map(|sample| i64::from(sample.draws.timestep)).collect::<Vec<_>>()).to_kind(Kind::Int64),
        drop: flags(each().map(|sample| sample.draws.drop_condition).collect()),
        native: flags(each().map(|sample| sample.native).collect()),
        prompts: if ready.prompt {
            let states = || each().filter_map(cached).filter_map(|cached| cached.student.as_ref());
            let sequence = stack(states().map(|StudentStates { sequence, .. }| tensor(sequence)))?;
            Prompts::States { sequence, mask: stack(states().map(|StudentStates { mask, .. }| tensor(mask)))?.to_kind(Kind::Bool) }
        } else {
            Prompts::Captions(each().map(|sample| sample.prompt.clone()).collect())
        },
        english: match states {
            Some(states) => English::States(states),
            None => English::Captions(each().map(|sample| sample.english.clone()).collect()),
        },
        original_size: each().map(|sample| (sample.original_size.0.into(), sample.original_size.1.into())).collect(),
        crop: each().map(|sample| (sample.crop.0.into(), sample.crop.1.into())).collect(),
        text_dropout: each().map(|sample| sample.draws.text_dropout).collect(),
    })
}

/// All slices behind each other. An iterator over their elements would take ten times as long, while a GPU waits.
fn joined<'a, T: Copy + 'a>(parts: impl Iterator<Item = &'a [T]>) -> Vec<T> {
    parts.collect::<Vec<_>>().concat()
}

fn pixels(sample: &Prepared) -> &[u8] {
    match &sample.content {
        Content::Pixels(pixels) => pixels,
        Content::Cached(_) => &[],
    }
}

/// The teacher's states, of samples that have none zeros, which nobody reads; nothing if none has any.
fn english(samples: &[&Prepared]) -> peapod_model::Result<Option<Conditioning>> {
    let states = || samples.iter().map(|sample| cached(sample).and_then(|cached| cached.english.as_ref()));
    let rows = |part: fn(&EnglishStates) -> Option<&Array>| {
        let Some(zeros) = states().flatten().find_map(part).map(|array| tensor(array).zeros_like()) else { return Ok(None) };
        let row = |states: Option<&EnglishStates>| states.and_then(part).map_or_else(|| zeros.shallow_clone(), tensor);
        stack(states().map(row)).map(Some)
    };
    let pooled = rows(|states| states.pooled.as_ref())?;
    Ok(rows(|states| Some(&states.sequence))?.map(|sequence| Conditioning { sequence, pooled, mask: None }))
}

fn stack(rows: impl Iterator<Item = Tensor>) -> peapod_model::Result<Tensor> {
    Ok(Tensor::f_stack(&rows.collect::<Vec<_>>(), 0)?)
}

/// In single precision, whatever it is stored in, so that rows of several shards fit together.
fn tensor(array: &Array) -> Tensor {
    let kind = match array.dtype {
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::U8 => Kind::Uint8,
        // The reader lets no others pass.
        _ => Kind::Float,
    };
    let shape: Vec<i64> = array.shape.iter().map(|&length| length as i64).collect();
    Tensor::from_data_size(&array.bytes, &shape, kind).to_kind(Kind::Float)
}
