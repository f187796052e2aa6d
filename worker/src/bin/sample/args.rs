//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use peapod_model::schedule::{Scheduler, TimestepSpacing};
use peapod_worker::device::{Choice, KernelArgs};
use peapod_worker::numbers::{Numbers, VaeNumbers};

/// Draws pictures from prompts.
///
/// With --adapter, prompts are in the adapter's language. Without it they are in English and go through the model's own encoders. With
/// --compare, both are drawn side by side from the same noise.
#[derive(Debug, Parser)]
#[command(name = "sample", version, long_version = peapod_worker::build::facts())]
pub struct Args {
    /// The model: a folder as diffusers saves it, a checkpoint that is one file, or ORG/NAME on the model hub
    #[arg(long, value_name = "MODEL", help_heading = "Models")]
    pub model: PathBuf,

    /// For a checkpoint that is one file: a folder whose configurations are taken instead of the published ones
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    pub model_config: Option<PathBuf>,

    /// The adapter (.safetensors, pytorch_model.bin), or a folder of checkpoints: the newest, and of a checkpoint the moving average if the
    /// job keeps one; without it prompts are English. With --compare it may be given again
    #[arg(long = "adapter", value_name = "PATH", help_heading = "Models")]
    pub adapters: Vec<PathBuf>,

    /// The adapter's text encoder: a folder, or ORG/NAME on the model hub [default: MODEL/text_encoder_zh, else what the adapter names]
    #[arg(long, value_name = "ENCODER", requires = "adapters", help_heading = "Models")]
    pub student: Option<PathBuf>,

    /// Tokens of a prompt, as in training [default: what the adapter says]
    #[arg(long, value_name = "N", requires = "adapters", value_parser = clap::value_parser!(i64).range(3..=512), help_heading = "Models")]
    pub context_length: Option<i64>,

    /// A LoRA to merge into the model, with its strength [default strength: 1]; may be given again
    #[arg(long = "lora", value_name = "FILE[:SCALE]", help_heading = "Models")]
    pub loras: Vec<ScaledFile>,

    /// What UNet, ControlNet and text encoders compute in [default: bf16 on a GPU, f32 on a CPU]
    #[arg(long, value_name = "KIND", help_heading = "Models")]
    pub dtype: Option<Numbers>,

    /// What the autoencoder computes in [default: f32 where its configuration asks for it, else as --dtype]
    #[arg(long, value_name = "KIND", help_heading = "Models")]
    pub vae_dtype: Option<VaeNumbers>,

    /// Device to draw on: cpu, cuda:N, cuda (the first GPU), or auto (that GPU if it can be used)
    #[arg(long, env = "PEAPOD_DEVICE", default_value = "auto", value_name = "DEVICE", help_heading = "Models")]
    pub device: Choice,

    /// What networks compute with
    #[command(flatten, next_help_heading = "Models")]
    pub kernels: KernelArgs,

    /// CPU threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Models")]
    pub threads: Option<u16>,

    /// What to draw; may be given again for more pictures
    #[arg(short, long = "prompt", value_name = "TEXT", help_heading = "Prompts")]
    pub prompts: Vec<String>,

    /// Prompts from a file (- for standard input), one a line; the English may stand beside it, behind a tab
    #[arg(long = "prompts", value_name = "FILE", help_heading = "Prompts")]
    pub prompts_file: Option<PathBuf>,

    /// The English of each --prompt, in the same order
    #[arg(long = "teacher-prompt", value_name = "TEXT", help_heading = "Prompts")]
    pub teacher_prompts: Vec<String>,

    /// What the pictures should not show, in the prompts' language; with --compare the teacher leaves nothing out
    #[arg(long, value_name = "TEXT", default_value = "", help_heading = "Prompts")]
    pub negative: String,

    /// Steps of the solver
    #[arg(long, value_name = "N", default_value_t = 30, allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Sampling")]
    pub steps: u32,

    /// The solver: dpm++ (DPM-Solver++ 2M), euler, euler-a (ancestral), ddim, lcm [default: the model's own; dpm++ for one not among these]
    #[arg(long, value_name = "NAME", help_heading = "Sampling")]
    pub scheduler: Option<Scheduler>,

    /// How timesteps are spread [default: as the model's configuration says]
    #[arg(long, value_name = "NAME", help_heading = "Sampling")]
    pub spacing: Option<Spacing>,

    /// Noise levels after Karras et al., for dpm++ and euler [default: as the model's configuration says]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Sampling")]
    pub karras: Option<bool>,

    /// How strongly pictures follow their prompt; 1 or less switches guidance off (Turbo, LCM)
    #[arg(long, value_name = "X", default_value_t = 7.5, allow_negative_numbers = true, help_heading = "Sampling")]
    pub guidance: f64,

    /// Share of the guided prediction whose contrast is brought back to that of the unguided one, 0 to 1
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true, help_heading = "Sampling")]
    pub guidance_rescale: f64,

    /// Width in pixels [default: that of --init-image or --control-image, else the model's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true, help_heading = "Sampling")]
    pub width: Option<i64>,

    /// Height in pixels [default: likewise]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true, help_heading = "Sampling")]
    pub height: Option<i64>,

    /// The pictures' seed; picture N of a seed is the same whatever else is drawn
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Sampling")]
    pub seed: u64,

    /// Pictures drawn at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Sampling")]
    pub batch: u16,

    /// Noise to begin with instead of the seed's: safetensors with `initial` [N, C, h, w], a row a picture
    #[arg(long, value_name = "FILE", help_heading = "Sampling")]
    pub latents: Option<PathBuf>,

    /// The picture to start from
    #[arg(long, value_name = "FILE", help_heading = "Pictures as input")]
    pub init_image: Option<PathBuf>,

    /// Share of the steps that are made from --init-image, 0 to 1 [default: 0.8; with --mask 1, or 0.9999 for an inpainting SDXL]
    #[arg(long, value_name = "X", requires = "init_image", allow_negative_numbers = true, help_heading = "Pictures as input")]
    pub strength: Option<f64>,

    /// What of --init-image is drawn anew: white; of the same size
    #[arg(long, value_name = "FILE", requires = "init_image", help_heading = "Pictures as input")]
    pub mask: Option<PathBuf>,

    /// A ControlNet: a folder, or ORG/NAME on the model hub
    #[arg(long, value_name = "DIR", requires = "control_image", help_heading = "Pictures as input")]
    pub controlnet: Option<PathBuf>,

    /// What the ControlNet is shown
    #[arg(long, value_name = "FILE", requires = "controlnet", help_heading = "Pictures as input")]
    pub control_image: Option<PathBuf>,

    /// Shows the ControlNet outlines of --control-image, found with these two thresholds [default: 100,200]
    #[arg(long, value_name = "LOW,HIGH", requires = "control_image", num_args = 0..=1, require_equals = true, default_missing_value = "100,200", help_heading = "Pictures as input")]
    pub canny: Option<Thresholds>,

    /// How strongly the ControlNet acts
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true, help_heading = "Pictures as input")]
    pub control_scale: f64,

    /// Draw every prompt in one sheet: in English with the teacher, and with each adapter; and say how alike they are
    #[arg(long, requires = "adapters", help_heading = "Output")]
    pub compare: bool,

    /// A CLIP (folder with both halves, as transformers saves it): --compare also says how well pictures show what the English says
    #[arg(long, value_name = "DIR", requires = "compare", help_heading = "Output")]
    pub clip: Option<PathBuf>,

    /// One sheet of all pictures instead of numbered files
    #[arg(long, visible_alias = "image-grid", help_heading = "Output")]
    pub grid: bool,

    /// The line above a sheet [default: what is compared]
    #[arg(long, value_name = "TEXT", help_heading = "Output")]
    pub title: Option<String>,

    /// A font (.ttf, .otf, .ttc) for captions that the built-in one lacks characters for
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub font: Option<PathBuf>,

    /// How latents are decoded [default: as the memory that is free allows]
    #[arg(long, value_name = "HOW", default_value = "auto", help_heading = "Output")]
    pub decode: Decode,

    /// Write the latents too: safetensors with `initial` (the noise) and `final` (clean)
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub latents_out: Option<PathBuf>,

    /// Where to write; several pictures become out-000.png, out-001.png, ...
    #[arg(short, long, value_name = "PNG", help_heading = "Output")]
    pub out: PathBuf,
}

/// A file and how strongly it acts.
#[derive(Debug, Clone, PartialEq)]
pub struct ScaledFile {
    pub path: PathBuf,
    pub scale: f64,
}

impl FromStr for ScaledFile {
    type Err = String;

    /// The scale stands behind the last colon; what is no number there belongs to the name.
    fn from_str(text: &str) -> Result<Self, String> {
        let scaled = text.rsplit_once(':').and_then(|(path, scale)| Some((path, scale.parse::<f64>().ok()?)));
        let (path, scale) = scaled.unwrap_or((text, 1.0));
        if path.is_empty() || !scale.is_finite() {
            return Err("wanted FILE or FILE:SCALE".into());
        }
        Ok(Self { path: path.into(), scale })
    }
}

/// The two thresholds of an outline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds(pub u16, pub u16);

impl FromStr for Thresholds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once(',').and_then(|(low, high)| Some((low.trim().parse().ok()?, high.trim().parse().ok()?)));
        match numbers {
            Some((low, high)) if low <= high => Ok(Self(low, high)),
            _ => Err("wanted LOW,HIGH: two whole numbers, the smaller first".into()),
        }
    }
}

/// How timesteps are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

impl From<Spacing> for TimestepSpacing {
    fn from(spacing: Spacing) -> Self {
        match spacing {
            Spacing::Leading => Self::Leading,
            Spacing::Trailing => Self::Trailing,
            Spacing::Linspace => Self::Linspace,
        }
    }
}

/// How much is decoded at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Decode {
    /// As the memory that is free allows.
    Auto,
    /// The whole batch.
    Whole,
    /// One picture after the other.
    Each,
    /// Overlapping tiles of 64 latents a side.
    Tiles,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn files_may_carry_their_strength() {
        let parse = |text: &str| text.parse::<ScaledFile>().map(|file| (file.path.display().to_string(), file.scale));
        assert_eq!(parse("a/b.safetensors"), Ok(("a/b.safetensors".into(), 1.0)));
        assert_eq!(parse("a.safetensors:0.5"), Ok(("a.safetensors".into(), 0.5)));
        assert_eq!(parse("org:x/a.safetensors:-1"), Ok(("org:x/a.safetensors".into(), -1.0)));
        assert_eq!(parse("odd:name"), Ok(("odd:name".into(), 1.0)));
        assert!(parse(":2").is_err() && parse("a:nan").is_err());
        assert_eq!("50, 150".parse(), Ok(Thresholds(50, 150)));
        assert!("200,100".parse::<Thresholds>().is_err() && "7".parse::<Thresholds>().is_err());
    }
}
