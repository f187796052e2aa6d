//! ControlNet: a copy of a UNet's first half that is shown an image, and what it adds to the UNet's skip connections.
//!
//! Source: Zhang et al. 2023 (arXiv:2302.05543), in the layout of diffusers' `ControlNetModel`.

mod config;

use std::path::Path;

use tch::{Device, Kind, Tensor};

pub use self::config::ControlNetConfig;
use crate::hub::locate;
use crate::nn::Conv2d;
use crate::unet::{Added, Condition, Pass, Trunk};
use crate::weights::{Scope, Weights};
use crate::{Error, Result};

/// A frozen ControlNet.
pub struct ControlNet {
    config: ControlNetConfig,
    trunk: Trunk,
    hint: HintNetwork,
    /// A 1x1 convolution for each skip connection. They begin as zeros, so that an untrained ControlNet changes nothing.
    down: Vec<Conv2d>,
    mid: Conv2d,
}

/// What a ControlNet adds to its UNet.
#[derive(Debug)]
pub struct ControlResiduals {
    /// One tensor for each skip connection, of its shape, in the order the UNet makes them: the input convolution's first.
    pub down: Vec<Tensor>,
    /// The same for the output of the mid block.
    pub mid: Tensor,
}

/// What a ControlNet is told beside its UNet's input.
#[derive(Debug, Clone, Copy)]
pub struct ControlOptions<'a> {
    /// `[B, conditioning_channels, H, W]` in [0, 1], where H and W are [`ControlNetConfig::downscale`] times the sample's h and w.
    pub image: &'a Tensor,
    /// What the residuals are multiplied by.
    pub scale: f64,
    /// The text states that are attended to, bool `[B, L]`, as the UNet has it; `None`: all.
    pub mask: Option<&'a Tensor>,
}

impl ControlNet {
    /// Loads a folder with `config.json` and weights.
    ///
    /// Errors: those of [`ControlNetConfig::read`], [`Weights::open`] and [`Weights::finish`].
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let config = ControlNetConfig::read(&folder.join("config.json"))?;
        let weights = Weights::open(folder)?;
        let network = Self::new(&weights.root(kind, device), config)?;
        weights.finish(&[])?;
        Ok(network)
    }

    /// As [`ControlNet::load`]; `path` may also be the name of a model on the hub (see [`locate`]).
    ///
    /// Errors: those of [`ControlNet::load`].
    pub fn open(path: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::load(&locate(path)?, kind, device)
    }

    /// Compares a ControlNet's configuration and files as [`ControlNet::open`] does, without reading a tensor: its weights are zeros
    /// without memory.
    ///
    /// Errors: those of [`ControlNet::open`].
    pub fn check(path: &Path) -> Result<Self> {
        let folder = locate(path)?;
        let config = ControlNetConfig::read(&folder.join("config.json"))?;
        let weights = Weights::open(&folder)?.shapes_only();
        let network = Self::new(&weights.root(Kind::Float, Device::Cpu), config)?;
        weights.finish(&[])?;
        Ok(network)
    }

    /// Builds the network from the tensors below `scope`.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn new(scope: &Scope, config: ControlNetConfig) -> Result<Self> {
        config.check()?;
        let trunk = Trunk::new(scope, config.unet.clone())?;
        let hint = HintNetwork::new(&(scope / "controlnet_cond_embedding"), &config);
        let pointwise = |scope: Scope, channels: i64| Conv2d::new(scope, channels, channels, 1, 1, 0);
        let down = scope / "controlnet_down_blocks";
        let down = trunk.skip_channels().iter().enumerate().map(|(index, &channels)| pointwise(&down / index, channels)).collect();
        // The last skip connection has the channels of the innermost level.
        let mid = pointwise(scope / "controlnet_mid_block", trunk.skip_channels()[trunk.skip_channels().len() - 1]);
        Ok(Self { config, trunk, hint, down, mid })
    }

    /// Number of parameters of a network with this configuration; nothing is allocated.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub fn count_parameters(config: &ControlNetConfig) -> Result<i64> {
        let nothing = Weights::none();
        Self::new(&nothing.root(Kind::Float, Device::Cpu), config.clone())?;
        Ok(nothing.num_requested())
    }

    /// The configuration.
    pub fn config(&self) -> &ControlNetConfig {
        &self.config
    }

    /// The kind of the weights, in which everything but the sinusoids is computed.
    pub fn kind(&self) -> Kind {
        self.trunk.kind()
    }

    /// Width of the text states it attends to.
    pub fn text_width(&self) -> i64 {
        self.trunk.text_width()
    }

    /// Width of the pooled text it takes; `None` if it takes none.
    pub fn pooled_width(&self) -> Option<i64> {
        self.trunk.pooled_width()
    }

    /// Computes what is to be added to a UNet's skip connections and mid block.
    ///
    /// The first four arguments are those of [`UNet::forward`](crate::unet::UNet::forward), the text included.
    /// Shapes: inputs of another kind are converted, residuals are of the network's kind.
    /// Errors: [`Error::Shape`] if the shapes do not fit each other or the network, or if `added` is missing or superfluous.
    pub fn forward(
        &self,
        sample: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        added: Option<&Added>,
        options: &ControlOptions,
    ) -> Result<ControlResiduals> {
        let (what, &ControlOptions { image, scale, mask }) = ("ControlNet::forward", options);
        self.trunk.check(what, sample, timesteps, text, added)?;
        let (size, factor) = (sample.size(), self.config.downscale());
        let wanted = [size[0], self.config.conditioning_channels, factor * size[2], factor * size[3]];
        if image.size() != wanted {
            return Err(Error::Shape { what, detail: format!("an image of {:?}, wanted {wanted:?}", image.size()) });
        }
        let kind = self.kind();
        let [sample, text, image] = [sample, text, image].map(|tensor| tensor.to_kind(kind));

        let (time, bias) = (self.trunk.time(timesteps, added), self.trunk.attention_bias(what, &text, mask)?);
        let hidden = self.trunk.input(&sample) + self.hint.forward(&image);
        let mut pass = Pass::new(Condition { time: &time, text: &text, projected: &[], bias: bias.as_ref() }, hidden);
        self.trunk.walk(&mut pass);
        let down = self.down.iter().zip(pass.skips()).map(|(conv, skip)| conv.forward(skip) * scale).collect();
        Ok(ControlResiduals { down, mid: self.mid.forward(pass.hidden()) * scale })
    }
}

/// Brings a control image to the size of the latents and the channels of the UNet's first level.
struct HintNetwork {
    /// Each is followed by a SiLU.
    convs: Vec<Conv2d>,
    conv_out: Conv2d,
}

impl HintNetwork {
    fn new(scope: &Scope, config: &ControlNetConfig) -> Self {
        let channels = &config.conditioning_embedding_out_channels;
        let mut convs = vec![Conv2d::new(scope / "conv_in", config.conditioning_channels, channels[0], 3, 1, 1)];
        for (index, pair) in channels.windows(2).enumerate() {
            let blocks = scope / "blocks";
            convs.push(Conv2d::new(&blocks / (2 * index), pair[0], pair[0], 3, 1, 1));
            convs.push(Conv2d::new(&blocks / (2 * index + 1), pair[0], pair[1], 3, 2, 1));
        }
        let last = channels[channels.len() - 1];
        Self { convs, conv_out: Conv2d::new(scope / "conv_out", last, config.unet.block_out_channels[0], 3, 1, 1) }
    }

    fn forward(&self, image: &Tensor) -> Tensor {
        let hidden = self.convs.iter().fold(image.shallow_clone(), |hidden, conv| conv.forward(&hidden).silu());
        self.conv_out.forward(&hidden)
    }
}

#[cfg(test)]
mod tests;
