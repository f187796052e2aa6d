//! What is asked of a drawing beside its prompts.

use super::config::SolverChoice;
use crate::schedule::Scheduler;
use crate::vae::Decoding;

/// Longest side of a picture in pixels: beyond it attention alone would need terabytes.
pub const MAX_SIDE: i64 = 8192;

/// What to draw, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Height of the pictures in pixels.
    pub height: i64,
    /// Width of the pictures in pixels.
    pub width: i64,
    /// Number of solver steps from pure noise.
    pub num_steps: usize,
    /// The solver.
    pub solver: SolverChoice,
    /// How far to go beyond the unconditional prediction, in the direction of the prompt; 1 or less draws without guidance.
    pub guidance: f64,
    /// Share of the rescaled prediction whose contrast is that of the conditional one (arXiv:2305.08891, section 3.4); 0 leaves it out.
    pub guidance_rescale: f64,
    /// What the pictures should not show.
    pub negative: String,
    /// Seed of the pictures.
    pub seed: u64,
    /// Number of the first picture under this seed: picture 5 is the same whether drawn alone or sixth of ten.
    pub first_image: u64,
    /// Number of pictures drawn at a time.
    pub batch_size: usize,
    /// How latents become pictures.
    pub decoding: Decoding,
}

impl Default for SampleOptions {
    /// SDXL's customary values: 1024 x 1024, 30 steps, guidance 7.5; and the method's solver, DPM-Solver++ 2M.
    fn default() -> Self {
        Self {
            height: 1024,
            width: 1024,
            num_steps: 30,
            solver: SolverChoice::of(Scheduler::DpmSolver),
            guidance: 7.5,
            guidance_rescale: 0.0,
            negative: String::new(),
            seed: 0,
            first_image: 0,
            batch_size: 1,
            decoding: Decoding::Whole,
        }
    }
}

impl SampleOptions {
    /// The first step made where a picture is there to start from: the share `strength` of all steps is left, rounded down.
    pub fn first_step(&self, strength: f64) -> usize {
        let left = (self.num_steps as f64 * strength.clamp(0.0, 1.0)) as usize;
        self.num_steps - left.min(self.num_steps)
    }
}

/// How far a call has come; given after each solver step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Number of UNet steps done, over all batches.
    pub steps_done: usize,
    /// Number of UNet steps of the whole call.
    pub num_steps: usize,
}
