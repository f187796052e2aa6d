//! The models of PEA distillation and what is computed with them: SDXL's UNet, VAE, ControlNet and text encoders, the student text
//! encoder, the adapter, LoRA, the training losses, schedules and samplers.
//!
//! Knows tensors, not ranks: nothing here opens a socket or reads a clock.

pub mod adapter;
mod config;
pub mod controlnet;
pub mod distill;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod hub;
pub mod lora;
pub mod nn;
pub mod optim;
pub mod panics;
pub mod sample;
pub mod schedule;
pub mod source;
pub mod text;
mod transfer;
pub mod unet;
pub mod vae;
pub mod weights;

pub use config::PerLevel;
pub use error::{Error, Result};
