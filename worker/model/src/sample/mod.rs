//! Text to image: prompts, a frozen diffusion model and DPM-Solver++ give pictures.

mod config;
mod latents;
mod pipeline;
mod prompter;
mod solver;

pub use config::SchedulerConfig;
pub use latents::initial_latents;
pub use pipeline::{Pipeline, PipelineOptions, Progress, SampleOptions, Sampler};
pub use prompter::Prompter;
pub use solver::DpmSolver;
