//! The solver and the whole road from prompt to picture.

use peapod_model::adapter::Adapter;
use peapod_model::sample::{DpmSolver, Pipeline, PipelineOptions, Prompter, SampleOptions, SchedulerConfig};
use peapod_model::source::ModelSource;
use peapod_model::text::{StudentEncoder, StudentOptions};
use tch::{Device, Kind, Tensor};

use super::{Case, Result, Tensors};

/// The timesteps a solver visits and where given network outputs take a sample.
pub fn solver(case: &Case) -> Result<Tensors> {
    let config = SchedulerConfig::load(&case.folder)?;
    let outputs = case.input("outputs")?;
    let num_steps = case.setting("num_steps")?;
    let mut solver = DpmSolver::new(&config, num_steps)?;
    let (mut timesteps, mut samples) = (Vec::new(), vec![case.input("sample")?]);
    while let Some(timestep) = solver.timestep() {
        let output = outputs.get(timesteps.len() as i64);
        samples.push(solver.step(&samples[timesteps.len()], &output)?);
        timesteps.push(timestep);
    }
    Ok([("timesteps".to_owned(), Tensor::from_slice(&timesteps)), ("samples".to_owned(), Tensor::stack(&samples[1..], 0))].into())
}

/// Final latents and pictures, from given latents, along both roads.
pub fn pictures(case: &Case) -> Result<Tensors> {
    let model = ModelSource::open(&case.path("model")?, None)?;
    let pipeline = Pipeline::load(&model, PipelineOptions { device: Device::Cpu, unet_kind: Kind::Float, vae_kind: Kind::Float })?;
    let english = model.english(Kind::Float, Device::Cpu)?;
    let options = StudentOptions { normalize_quotes: false, ..StudentOptions::new(Kind::Float, Device::Cpu) };
    let encoder = StudentEncoder::load(&case.path("student")?, case.setting("context_length")?, options)?;
    let adapter = Adapter::load(&case.path("adapter")?, Device::Cpu)?;
    let roads = [
        ("english", Prompter::English(&english), "english"),
        ("student", Prompter::Student { encoder: &encoder, adapter: &adapter, mask_pads: false }, "captions"),
    ];

    let (guidance, latents) = (case.setting("guidance")?, case.input("latents")?);
    let options = SampleOptions {
        height: case.setting("height")?,
        width: case.setting("width")?,
        num_steps: case.setting("num_steps")?,
        guidance,
        guidance_rescale: case.setting("guidance_rescale")?,
        ..SampleOptions::default()
    };
    let sampler = pipeline.sampler();
    let mut outputs = Tensors::new();
    for (name, prompter, prompts) in roads {
        let positive = prompter.encode(&case.setting::<Vec<String>>(prompts)?)?;
        let negative = if guidance > 1.0 { Some(prompter.encode(&[""])?) } else { None };
        let latents = sampler.denoise(&latents, &positive, negative.as_ref(), &options, || ())?;
        outputs.insert(format!("{name}.pictures"), sampler.decode(&latents)?);
        outputs.insert(format!("{name}.latents"), latents);
    }
    Ok(outputs)
}
