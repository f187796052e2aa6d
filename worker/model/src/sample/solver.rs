//! A solver's steps on tensors.

use tch::Tensor;

use crate::Result;
use crate::schedule::{Plan, SolverStep};

/// A solver on its way from noise to data.
#[derive(Debug)]
pub struct Solver {
    plan: Plan,
    first: usize,
    index: usize,
    previous_data: Option<Tensor>,
}

impl Solver {
    /// Follows a plan from its first step.
    pub fn new(plan: Plan) -> Self {
        Self::from(plan, 0)
    }

    /// Follows a plan from step `first`: the sample that it begins with is made by [`Solver::noised`].
    pub fn from(plan: Plan, first: usize) -> Self {
        Self { plan, first, index: first, previous_data: None }
    }

    /// Returns the timestep to ask the network about; `None` when the sample is finished.
    pub fn timestep(&self) -> Option<f64> {
        self.current().map(|step| step.timestep)
    }

    /// Number of steps left.
    pub fn num_left(&self) -> usize {
        self.plan.steps.len().saturating_sub(self.index)
    }

    /// Turns standard normal noise into the sample that the whole way begins with.
    pub fn initial(&self, noise: &Tensor) -> Result<Tensor> {
        Ok(noise.f_mul_scalar(self.plan.initial_scale)?)
    }

    /// Returns a sample of `data` as noisy as the current step expects it; the data itself when the sample is finished.
    pub fn noised(&self, data: &Tensor, noise: &Tensor) -> Result<Tensor> {
        let Some(SolverStep { noised: [signal, share], .. }) = self.current() else { return Ok(data.shallow_clone()) };
        Ok(data.f_mul_scalar(*signal)?.f_add(&noise.f_mul_scalar(*share)?)?)
    }

    /// Returns what the network is to see of a sample.
    pub fn input(&self, sample: &Tensor) -> Result<Tensor> {
        Ok(match self.current() {
            Some(step) if step.input_scale != 1.0 => sample.f_mul_scalar(step.input_scale)?,
            _ => sample.shallow_clone(),
        })
    }

    /// Applies the network's `output` at the current timestep to `sample`. A finished sample is returned as it is.
    ///
    /// Where the step adds fresh noise, `noise` is asked for it: standard normal, of the sample's shape.
    /// Shapes: `sample` and `output` the same, `f32`. Errors: those of `noise`.
    pub fn step(&mut self, sample: &Tensor, output: &Tensor, noise: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let Some(step) = self.current() else { return Ok(sample.shallow_clone()) };
        let data = sample.f_mul_scalar(step.data_from_sample)?.f_add(&output.f_mul_scalar(step.data_from_output)?)?;
        let target = match &self.previous_data {
            Some(previous) if step.correction != 0.0 && self.index > self.first => {
                data.f_add(&data.f_sub(previous)?.f_mul_scalar(step.correction)?)?
            }
            _ => data.shallow_clone(),
        };
        let mut next = sample.f_mul_scalar(step.sample_scale)?.f_add(&target.f_mul_scalar(step.target_scale)?)?;
        if step.noise_scale != 0.0 {
            next = next.f_add(&noise()?.f_mul_scalar(step.noise_scale)?)?;
        }
        self.previous_data = Some(data);
        self.index += 1;
        Ok(next)
    }

    fn current(&self) -> Option<&SolverStep> {
        self.plan.steps.get(self.index)
    }
}
