//! DPM-Solver++ 2M on tensors.

use tch::Tensor;

use crate::Result;
use crate::schedule::{DpmStep, NoiseSchedule, dpm};
use crate::{Error, sample::SchedulerConfig};

/// A solver on its way from noise to data.
#[derive(Debug)]
pub struct DpmSolver {
    plan: Vec<DpmStep>,
    index: usize,
    previous_data: Option<Tensor>,
}

impl DpmSolver {
    /// Plans `num_steps` steps.
    ///
    /// Errors: [`Error::Unsupported`] unless there is at least one step and fewer than the model has timesteps.
    pub fn new(config: &SchedulerConfig, num_steps: usize) -> Result<Self> {
        let schedule = NoiseSchedule::new(&config.noise);
        if num_steps == 0 || num_steps >= schedule.len() {
            let hint = format!("between 1 and {} are possible with this model", schedule.len().saturating_sub(1));
            return Err(Error::Unsupported { what: format!("sampling in {num_steps} steps"), hint });
        }
        Ok(Self { plan: dpm::plan(&schedule, &config.solver, num_steps), index: 0, previous_data: None })
    }

    /// Returns the timestep to ask the network about; `None` when the sample is finished.
    pub fn timestep(&self) -> Option<i64> {
        self.plan.get(self.index).map(|step| step.timestep)
    }

    /// Applies the network's `output` at the current timestep to `sample`. A finished sample is returned as it is.
    ///
    /// Shapes: `sample` and `output` the same, `f32`.
    pub fn step(&mut self, sample: &Tensor, output: &Tensor) -> Result<Tensor> {
        let Some(step) = self.plan.get(self.index) else { return Ok(sample.shallow_clone()) };
        let data = sample.f_mul_scalar(step.data_from_sample)?.f_add(&output.f_mul_scalar(step.data_from_output)?)?;
        let target = match &self.previous_data {
            Some(previous) if step.correction != 0.0 => data.f_add(&data.f_sub(previous)?.f_mul_scalar(step.correction)?)?,
            _ => data.shallow_clone(),
        };
        let next = sample.f_mul_scalar(step.sample_scale)?.f_add(&target.f_mul_scalar(step.target_scale)?)?;
        self.previous_data = Some(data);
        self.index += 1;
        Ok(next)
    }
}
