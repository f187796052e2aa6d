//! Schedules in plain `f64`: how noise grows with the timestep, which timesteps a sampler visits, and how the learning rate
//! moves. No tensors and no files here.

mod ddim;
pub mod dpm;
mod euler;
mod lcm;
pub mod lr;
pub mod noise;
mod sigmas;
mod solver;

pub use dpm::{DpmConfig, FinalSigma, Prediction, TimestepSpacing};
pub use lr::{Decay, LrSchedule};
pub use noise::{BetaSchedule, NoiseConfig, NoiseSchedule};
pub use solver::{ImpossiblePlan, Plan, Scheduler, SolverConfig, SolverStep};
