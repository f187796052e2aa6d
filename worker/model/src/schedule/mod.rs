//! Schedules in plain `f64`: how noise grows with the timestep, which timesteps a sampler visits, and how the learning rate
//! moves. No tensors and no files here.

pub mod dpm;
pub mod lr;
pub mod noise;

pub use dpm::{DpmConfig, DpmStep, FinalSigma, Prediction, TimestepSpacing};
pub use lr::{Decay, LrSchedule};
pub use noise::{BetaSchedule, NoiseConfig, NoiseSchedule};
