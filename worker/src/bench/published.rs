//! Models whose sizes are known without a file, and what a sample costs in them.

use peapod_model::source::Architecture;

/// Models whose sizes this program knows, each with Chinese-CLIP's text encoder as the student.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Published {
    /// SDXL base.
    Sdxl,
    /// Stable Diffusion 1.5.
    Sd15,
}

impl Published {
    pub(super) fn architecture(self) -> Architecture {
        match self {
            Self::Sdxl => Architecture::Sdxl,
            Self::Sd15 => Architecture::Sd15,
        }
    }

    /// Tokens of a prompt of the student, as the method was trained.
    pub(super) fn context_length(self) -> u32 {
        match self {
            Self::Sdxl => 52,
            Self::Sd15 => 77,
        }
    }

    /// The size of pictures whose operations are counted.
    pub(super) fn size(self) -> [i64; 2] {
        match self {
            Self::Sdxl => [640; 2],
            Self::Sd15 => [512; 2],
        }
    }
}

/// What a sample of a published model costs, in 10^12 operations.
struct Cost {
    /// Parameters of the UNet, by which it is known.
    num_parameters: i64,
    /// Width and height of the picture.
    size: [i64; 2],
    /// With a teacher and without, the empty prompt's states kept.
    whole: [f64; 2],
    /// Of that, in the UNet: what is left when latents and text are there already.
    unet: [f64; 2],
}

/// Source: the method's table of training step costs.
const COSTS: [Cost; 2] = [
    Cost { num_parameters: 2_567_463_684, size: [640, 640], whole: [9.48, 6.91], unet: [7.56, 7.56 - 2.494] },
    Cost { num_parameters: 859_520_964, size: [512, 512], whole: [3.77, 3.77 - 0.803], unet: [0.803 + 0.803 + 0.929, 0.803 + 0.929] },
];

/// 10^12 operations of a sample, `native` of which have no teacher, where the method has counted them.
pub(super) fn operations(num_parameters: i64, size: [i64; 2], native: f64, precomputed: bool) -> Option<f64> {
    let cost = COSTS.iter().find(|cost| cost.num_parameters == num_parameters && cost.size == size)?;
    let [taught, untaught] = if precomputed { cost.unet } else { cost.whole };
    Some(native * untaught + (1.0 - native) * taught)
}

#[cfg(test)]
mod tests {
    use peapod_model::source::{ModelSource, Part};

    use super::*;

    #[test]
    fn operations_are_told_where_they_were_counted_and_weighed_by_native_samples() {
        let sdxl = |native, precomputed| operations(2_567_463_684, [640; 2], native, precomputed);
        assert_eq!(sdxl(0.0, false), Some(9.48));
        assert_eq!(sdxl(0.5, false), Some((9.48 + 6.91) / 2.0));
        assert_eq!(sdxl(0.0, true), Some(7.56));
        assert_eq!(sdxl(1.0, true), Some(7.56 - 2.494));
        assert_eq!(operations(2_567_463_684, [512; 2], 0.0, false), None);
        assert_eq!(operations(5_205_636, [640; 2], 0.0, false), None);
    }

    #[test]
    fn published_models_come_in_the_sizes_that_are_counted() {
        for (published, cost) in [Published::Sdxl, Published::Sd15].into_iter().zip(COSTS) {
            let num_parameters = ModelSource::random(published.architecture()).unwrap().survey(Part::Unet).unwrap().num_parameters;
            assert_eq!((num_parameters, published.size()), (cost.num_parameters, cost.size));
        }
    }
}
