//! The solver, the whole road from prompt to picture, and all ways of drawing.

use peapod_model::adapter::Adapter;
use peapod_model::controlnet::ControlNet;
use peapod_model::lora::Lora;
use peapod_model::sample::{
    Control, Inpaint, Pipeline, PipelineOptions, Prompter, SampleOptions, Sampler, SchedulerConfig, Solver, SolverChoice, StartImage, Task,
    Texts,
};
use peapod_model::schedule::{Scheduler, TimestepSpacing};
use peapod_model::source::ModelSource;
use peapod_model::text::{ClipScorer, Conditioning, StudentEncoder, StudentOptions};
use peapod_model::vae::{Decoding, Vae};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::{Case, Result, Tensors};

/// The timesteps a solver visits and where given network outputs take a sample.
pub fn solver(case: &Case) -> Result<Tensors> {
    let config = SchedulerConfig::load(&case.folder)?;
    let outputs = case.input("outputs")?;
    let num_steps = case.setting("num_steps")?;
    let mut solver = Solver::new(config.plan(SolverChoice::of(Scheduler::DpmSolver), num_steps)?);
    let (mut timesteps, mut samples) = (Vec::new(), vec![case.input("sample")?]);
    while let Some(timestep) = solver.timestep() {
        let output = outputs.get(timesteps.len() as i64);
        samples.push(solver.step(&samples[timesteps.len()], &output, || unreachable!("no noise is added"))?);
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
        let texts = Texts { positive: &positive, negative: negative.as_ref() };
        let latents = sampler.denoise(&latents, texts, &options, &Task::default(), &mut || unreachable!("no noise is added"))?;
        outputs.insert(format!("{name}.pictures"), sampler.decode(&latents)?);
        outputs.insert(format!("{name}.latents"), latents);
    }
    Ok(outputs)
}

/// One way of drawing, as a table of case.toml has it.
#[derive(Deserialize)]
struct Way {
    scheduler: String,
    steps: usize,
    guidance: f64,
    task: String,
    schedule: String,
    rescale: f64,
    strength: f64,
    loras: Vec<String>,
    spacing: Option<String>,
    karras: Option<bool>,
}

/// Final latents of every way that the case names, from given noise, with given text states.
pub fn draw(case: &Case) -> Result<Tensors> {
    let ways = case.settings.iter().filter(|(_, value)| value.is_table());
    ways.map(|(name, way)| {
        Ok((format!("{name}.latents"), draw_one(case, way.clone().try_into()?).map_err(|error| format!("{name}: {error}"))?))
    })
    .collect()
}

fn draw_one(case: &Case, way: Way) -> Result<Tensor> {
    let loras = way.loras.iter().map(|lora| {
        let (name, scale) = lora.split_once(':').ok_or("no scale")?;
        Ok(Lora::open(&case.folder.join(name), scale.parse()?)?)
    });
    let model = ModelSource::open(&case.folder, None)?.with_loras(&loras.collect::<Result<Vec<_>>>()?)?;
    let pipeline = Pipeline::load(&model, PipelineOptions { device: Device::Cpu, unet_kind: Kind::Float, vae_kind: Kind::Float })?;
    let scheduler =
        if way.schedule == "plain" { model.scheduler().clone() } else { SchedulerConfig::load(&case.folder.join(&way.schedule))? };
    let sampler = Sampler { scheduler: &scheduler, ..pipeline.sampler() };

    let pooled = |name: &str| case.inputs.get(name).map(Tensor::shallow_clone);
    let positive = Conditioning { sequence: case.input("text")?, pooled: pooled("pooled"), mask: None };
    let negative = Conditioning { sequence: case.input("negative")?, pooled: pooled("negative_pooled"), mask: None };
    let options = SampleOptions {
        height: case.setting("height")?,
        width: case.setting("width")?,
        num_steps: way.steps,
        solver: SolverChoice {
            scheduler: Some(way.scheduler.parse()?),
            spacing: way.spacing.as_deref().map(|name| TimestepSpacing::named(name).ok_or(name)).transpose()?,
            karras: way.karras,
        },
        guidance: way.guidance,
        guidance_rescale: way.rescale,
        ..SampleOptions::default()
    };

    let pixels = case.input("image")? * 2.0 - 1.0;
    let network =
        if way.task == "control" { Some(ControlNet::load(&case.folder.join("controlnet"), Kind::Float, Device::Cpu)?) } else { None };
    let starts = matches!(way.task.as_str(), "image" | "inpaint");
    let task = Task {
        noise: None,
        image: if starts { Some(StartImage::encode(sampler.vae, &pixels, way.strength)?) } else { None },
        inpaint: if way.task == "inpaint" { Some(Inpaint::encode(sampler.vae, &pixels, &case.input("mask")?)?) } else { None },
        control: match &network {
            Some(network) => Some(Control { network, image: case.input("control")?, scale: case.setting("control_scale")? }),
            None => None,
        },
    };
    let texts = Texts { positive: &positive, negative: (way.guidance > 1.0).then_some(&negative) };
    let noise = case.input("noise")?;
    let mut drawn = 0..;
    Ok(sampler.denoise(&case.input("latents")?, texts, &options, &task, &mut || Ok(noise.get(drawn.next().unwrap_or(0))))?)
}

/// A picture decoded tile by tile.
pub fn vae_tiled(case: &Case) -> Result<Tensors> {
    let vae = Vae::load(&case.path("model")?, Kind::Float, Device::Cpu)?;
    let latents = case.input("latents")?;
    Ok([("decoded".to_owned(), vae.decode_by(&latents, Decoding::Tiled(case.setting("tile")?))?)].into())
}

/// What a CLIP makes of pictures and texts, and how well they fit.
pub fn clip_score(case: &Case) -> Result<Tensors> {
    let scorer = ClipScorer::load(&case.path("clip")?, Kind::Float, Device::Cpu)?;
    let images = scorer.images(&case.input("pictures")?)?;
    let texts = scorer.texts(&case.setting::<Vec<String>>("prompts")?)?;
    let scores = ClipScorer::scores(&images, &texts)?;
    Ok([("images".to_owned(), images), ("texts".to_owned(), texts), ("scores".to_owned(), scores)].into())
}
