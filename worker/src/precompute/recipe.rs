//! What decides the numbers in cached samples, of a job and its models: the shards are stamped with it, and training compares.

use std::collections::BTreeMap;

use peapod_data::cached::Recipe;
use peapod_model::Result;
use peapod_model::distill::{Distiller, encode_pixels};
use peapod_model::vae::Vae;
use peapod_proto::job::Job;
use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::numbers::name;
use crate::setup::vae_numbers;

/// Latents along one side of the picture that autoencoders are told apart by.
const PROBE_LATENTS: i64 = 8;
/// Numbers that are kept of what a model says, at most.
const PROBE_NUMBERS: i64 = 64;

/// The recipe of a job that is trained: all that a cached shard may name.
///
/// # Errors
/// The model crate's.
pub fn of_training(job: &Job, models: &Distiller) -> Result<Recipe> {
    let kind = models.unet().kind();
    let mut recipe = of_latents(job, models.vae(), models.empty_student().device())?;
    if let Some(empty) = models.empty_english() {
        add_english(&mut recipe, job, kind, empty);
    }
    add_student(&mut recipe, job, kind, models.empty_student());
    Ok(recipe)
}

/// What a job file says of it: of its models nothing, nor of numbers that depend on the device.
#[must_use]
pub fn of_job(job: &Job) -> Recipe {
    let mut recipe = Recipe::of_data(&job.data);
    set(&mut recipe.settings, "model.vae_round_fp16", job.model.vae_round_fp16);
    set(&mut recipe.settings, "loss.hybrid", job.loss.hybrid);
    set_student(&mut recipe.settings, job);
    recipe
}

/// The recipe of latents alone: which pictures, which part of them, and what the autoencoder makes of it.
///
/// # Errors
/// The model crate's.
pub fn of_latents(job: &Job, vae: &Vae, device: Device) -> Result<Recipe> {
    let _guard = no_grad_guard();
    let mut recipe = Recipe::of_data(&job.data);
    set(&mut recipe.settings, "model.vae_dtype", vae_numbers(job, device).name());
    set(&mut recipe.settings, "model.vae_round_fp16", job.model.vae_round_fp16);
    let side = PROBE_LATENTS * vae.downscale();
    // Slopes with edges between them, others in each channel.
    let picture = (Tensor::arange(3 * side * side, (Kind::Int64, device)) * 5).reshape([1, 3, side, side]).remainder(251);
    let moments = encode_pixels(vae, &picture.to_kind(Kind::Uint8), job.model.vae_round_fp16)?;
    recipe.probes.insert("model.path (autoencoder)".into(), probe(&moments.mean));
    Ok(recipe)
}

/// Adds what decides the teacher's states; `empty` are the token states of the empty prompt.
pub fn add_english(recipe: &mut Recipe, job: &Job, kind: Kind, empty: &Tensor) {
    set(&mut recipe.settings, "train.dtype", name(kind));
    // Whether native samples have states.
    set(&mut recipe.settings, "loss.hybrid", job.loss.hybrid);
    recipe.probes.insert("model.path (text encoders)".into(), probe(&empty.select(1, -1)));
}

/// Adds what decides the student's states.
pub fn add_student(recipe: &mut Recipe, job: &Job, kind: Kind, empty: &Tensor) {
    set(&mut recipe.settings, "train.dtype", name(kind));
    set_student(&mut recipe.settings, job);
    recipe.probes.insert("student.path".into(), probe(&empty.select(1, 0)));
}

fn set_student(settings: &mut BTreeMap<String, String>, job: &Job) {
    set(settings, "student.context_length", job.student.context_length);
    set(settings, "student.normalize_quotes", job.student.normalize_quotes);
    set(settings, "student.project", job.student.project);
    set(settings, "student.dropout", job.student.dropout);
}

fn set(settings: &mut BTreeMap<String, String>, field: &str, value: impl ToString) {
    settings.insert(field.to_owned(), value.to_string());
}

/// Some numbers of a tensor, spread over all of it.
fn probe(tensor: &Tensor) -> Vec<f32> {
    let flat = tensor.to_device(Device::Cpu).to_kind(Kind::Float).flatten(0, -1);
    let every = 1 + (flat.size()[0] - 1) / PROBE_NUMBERS;
    Vec::try_from(flat.slice(0, None, None, every)).unwrap_or_default()
}
