//! Schedules of the learning rate and of the noise.

use peapod_model::sample::SchedulerConfig;
use peapod_model::schedule::{Decay, LrSchedule, NoiseSchedule, dpm};
use tch::Tensor;

use super::{Case, Result, Tensors};

/// The learning rates of some steps.
pub fn learning_rate(case: &Case) -> Result<Tensors> {
    let end_lr = || case.setting("end_lr");
    let decay = match case.setting::<String>("decay")?.as_str() {
        "constant" => Decay::Constant,
        "cosine" => Decay::Cosine { end_lr: end_lr()? },
        "polynomial" => Decay::Polynomial { power: case.setting("power")?, end_lr: end_lr()? },
        other => return Err(format!("decay = {other:?} is not known").into()),
    };
    let (lr, warmup_steps, total_steps) = (case.setting("lr")?, case.setting("warmup_steps")?, case.setting("total_steps")?);
    let schedule = LrSchedule { lr, warmup_steps, total_steps, decay };
    let rates: Vec<f64> = Vec::<i64>::try_from(case.input("steps")?)?.into_iter().map(|step| schedule.rate(step as u64)).collect();
    Ok([("rates".to_owned(), Tensor::from_slice(&rates))].into())
}

/// The signal left at every timestep, and the timesteps a sampler visits.
pub fn noise(case: &Case) -> Result<Tensors> {
    let config = SchedulerConfig::load(&case.folder)?;
    let schedule = NoiseSchedule::new(&config.noise);
    let visited = |count: usize| {
        let timesteps = dpm::timesteps(&schedule, &config.solver.dpm(), count).into_iter().map(|timestep| timestep as i64);
        (format!("timesteps.{count}"), Tensor::from_slice(&timesteps.collect::<Vec<i64>>()))
    };
    let timesteps = case.setting::<Vec<usize>>("num_steps")?.into_iter().map(visited);
    Ok(timesteps.chain([("alphas_cumprod".to_owned(), Tensor::from_slice(schedule.alphas_cumprod()))]).collect())
}
