//! Prompts, a frozen diffusion model and a solver give pictures: from noise, from a picture, below a mask, along an outline.

mod config;
mod denoise;
mod latents;
mod options;
mod pipeline;
mod prompter;
mod solver;
mod task;

pub use config::{SchedulerConfig, SolverChoice};
pub use denoise::Texts;
pub use latents::{Noise, initial_latents};
pub use options::{MAX_SIDE, Progress, SampleOptions};
pub use pipeline::{Drawn, Pipeline, PipelineOptions, Sampler};
pub use prompter::Prompter;
pub use solver::Solver;
pub use task::{Control, Inpaint, StartImage, Task};
