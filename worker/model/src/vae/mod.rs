//! The autoencoder between images and latents (`AutoencoderKL` of diffusers).

mod blocks;
mod config;
mod tiling;

use std::path::Path;

use tch::{Device, Kind, Tensor};

use self::blocks::{Decoder, Encoder};
pub use self::config::{DownBlockType, UpBlockType, VaeConfig};
pub use self::tiling::Decoding;
use crate::nn::Conv2d;
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

/// Bounds of the log variance: beyond them its exponential is useless in half precision.
const LOG_VARIANCE_RANGE: (f64, f64) = (-30.0, 20.0);

/// A frozen autoencoder.
pub struct Vae {
    config: VaeConfig,
    encoder: Encoder,
    quant_conv: Option<Conv2d>,
    post_quant_conv: Option<Conv2d>,
    decoder: Decoder,
    kind: Kind,
}

/// The normal distribution of an image's latents, element by element; in f32 whatever the autoencoder's kind.
#[derive(Debug)]
pub struct Moments {
    /// Mean `[B, latent_channels, h, w]`.
    pub mean: Tensor,
    /// Logarithm of the variance, of the same shape, clamped to [-30, 20].
    pub log_variance: Tensor,
}

impl Moments {
    /// Draws from the distribution with given standard normal noise, f32 of the same shape.
    pub fn sample(&self, noise: &Tensor) -> Tensor {
        &self.mean + (&self.log_variance * 0.5).exp() * noise
    }
}

impl Vae {
    /// Loads a folder with `config.json` and weights.
    ///
    /// SDXL's VAE overflows in f16: load it as f32 or bf16.
    /// Errors: those of [`VaeConfig::read`], [`Weights::open`] and [`Weights::finish`].
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let config = VaeConfig::read(&folder.join("config.json"))?;
        let weights = Weights::open(folder)?;
        let vae = Self::new(&weights.root(kind, device), config)?;
        weights.finish(&[])?;
        Ok(vae)
    }

    /// Builds the autoencoder from the tensors below `scope`.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn new(scope: &Scope, config: VaeConfig) -> Result<Self> {
        let num_resnets = config.check()?;
        let pointwise = |name: &str, channels: i64| Conv2d::new(scope / name, channels, channels, 1, 1, 0);
        let latent = config.latent_channels;
        Ok(Self {
            encoder: Encoder::new(&(scope / "encoder"), &config, num_resnets),
            quant_conv: config.use_quant_conv.then(|| pointwise("quant_conv", 2 * latent)),
            post_quant_conv: config.use_post_quant_conv.then(|| pointwise("post_quant_conv", latent)),
            decoder: Decoder::new(&(scope / "decoder"), &config, num_resnets + 1),
            kind: scope.kind(),
            config,
        })
    }

    /// Number of parameters of an autoencoder with this configuration; nothing is allocated.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn count_parameters(config: &VaeConfig) -> Result<i64> {
        let nothing = Weights::none();
        Self::new(&nothing.root(Kind::Float, Device::Cpu), config.clone())?;
        Ok(nothing.num_requested())
    }

    /// The configuration.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// The kind of the weights, in which everything is computed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Factor by which latents are multiplied before a diffusion model sees them.
    pub fn scaling_factor(&self) -> f64 {
        self.config.scaling_factor
    }

    /// Pixels per latent in each direction.
    pub fn downscale(&self) -> i64 {
        1 << (self.config.block_out_channels.len() - 1)
    }

    /// Encodes images; the moments are not yet multiplied by [`Vae::scaling_factor`].
    ///
    /// Shapes: `[B, in_channels, H, W]` in [-1, 1], H and W multiples of [`Vae::downscale`]; any kind.
    /// Errors: [`Error::Shape`].
    pub fn encode(&self, images: &Tensor) -> Result<Moments> {
        let (factor, wanted) = (self.downscale(), self.config.in_channels);
        match images.size().as_slice() {
            &[_, channels, height, width] if channels == wanted && height % factor == 0 && width % factor == 0 => {}
            size => return shape_error("Vae::encode", format!("{size:?}, wanted [B, {wanted}, H, W] with H and W multiples of {factor}")),
        }
        let encoded = self.encoder.forward(&images.to_kind(self.kind));
        let moments = match &self.quant_conv {
            Some(conv) => conv.forward(&encoded),
            None => encoded,
        };
        let moments = moments.to_kind(Kind::Float);
        let latent = self.config.latent_channels;
        let (lowest, highest) = LOG_VARIANCE_RANGE;
        Ok(Moments { mean: moments.narrow(1, 0, latent), log_variance: moments.narrow(1, latent, latent).clamp(lowest, highest) })
    }

    /// Decodes latents that have been divided by [`Vae::scaling_factor`].
    ///
    /// Shapes: `[B, latent_channels, h, w]`, any kind; returns `[B, out_channels, H, W]`, about [-1, 1], not clamped.
    /// Errors: [`Error::Shape`].
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let wanted = self.config.latent_channels;
        match latents.size().as_slice() {
            &[_, channels, _, _] if channels == wanted => {}
            size => return shape_error("Vae::decode", format!("{size:?}, wanted [B, {wanted}, h, w]")),
        }
        let latents = latents.to_kind(self.kind);
        let latents = match &self.post_quant_conv {
            Some(conv) => conv.forward(&latents),
            None => latents,
        };
        Ok(self.decoder.forward(&latents))
    }
}

fn shape_error<T>(what: &'static str, detail: String) -> Result<T> {
    Err(Error::Shape { what, detail })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sdxl() -> VaeConfig {
        VaeConfig {
            block_out_channels: vec![128, 256, 512, 512],
            down_block_types: vec![DownBlockType::DownEncoderBlock2D; 4],
            up_block_types: vec![UpBlockType::UpDecoderBlock2D; 4],
            layers_per_block: 2,
            scaling_factor: 0.13025,
            ..VaeConfig::default()
        }
    }

    #[test]
    fn parameter_total_of_the_published_autoencoder() {
        assert_eq!(Vae::count_parameters(&sdxl()).unwrap(), 83_653_863);
    }

    /// What training needs of it: the published total of the encoder counts the 1x1 convolution behind it.
    #[test]
    fn parameter_total_of_the_published_encoder() {
        let (nothing, config) = (Weights::none(), sdxl());
        let root = nothing.root(Kind::Float, Device::Cpu);
        Encoder::new(&(&root / "encoder"), &config, config.check().unwrap());
        assert_eq!(nothing.num_requested(), 34_163_592);
        Conv2d::new(root / "quant_conv", 8, 8, 1, 1, 0);
        assert_eq!(nothing.num_requested(), 34_163_664);
    }

    #[test]
    fn settings_that_are_not_computed_are_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), r#"{"shift_factor": 0.1159}"#).unwrap();
        let error = VaeConfig::read(file.path()).unwrap_err();
        assert!(error.to_string().contains("shift_factor = 0.1159"), "{error}");
        assert!(Vae::count_parameters(&VaeConfig { norm_num_groups: 48, ..sdxl() }).is_err());
        assert!(Vae::count_parameters(&VaeConfig { layers_per_block: i64::MAX, ..sdxl() }).is_err());
        assert!(Vae::count_parameters(&VaeConfig { scaling_factor: f64::NAN, ..sdxl() }).is_err());
    }

    #[test]
    fn images_that_do_not_fit_are_refused() {
        let nothing = Weights::none();
        let small = VaeConfig { block_out_channels: vec![8, 8, 8, 8], norm_num_groups: 4, ..sdxl() };
        let vae = Vae::new(&nothing.root(Kind::Float, Device::Cpu), small).unwrap();
        let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
        assert_eq!(vae.encode(&zeros(&[1, 3, 16, 24])).unwrap().mean.size(), [1, 4, 2, 3]);
        assert_eq!(vae.decode(&zeros(&[1, 4, 2, 3])).unwrap().size(), [1, 3, 16, 24]);
        assert!(vae.encode(&zeros(&[1, 3, 16, 20])).is_err());
        assert!(vae.encode(&zeros(&[1, 1, 16, 16])).is_err());
        assert!(vae.decode(&zeros(&[1, 3, 2, 2])).is_err());
    }
}
