//! What a UNet and a ControlNet have in common: the embeddings, the way down and the mid block.

use tch::{Kind, Tensor};

use super::attention::{CrossAttention, TransformerSpec};
use super::blocks::{DownBlock, MidBlock};
use super::config::{AdditionWidths, Level, MidBlockType, NUM_TIME_IDS, UNetConfig};
use super::embedding::{EmbeddingMlp, sinusoids};
use super::pass::Pass;
use super::{Added, TIME_EXPANSION};
use crate::config::faulty;
use crate::nn::{Conv2d, ResnetSpec};
use crate::weights::Scope;
use crate::{Error, Result};

/// The first half of a U, under the keys that UNets and ControlNets give it alike.
pub(crate) struct Trunk {
    pub(super) config: UNetConfig,
    pub(super) kind: Kind,
    time_embedding: EmbeddingMlp,
    addition: Option<AdditionEmbedding>,
    conv_in: Conv2d,
    pub(super) down: Vec<DownBlock>,
    pub(super) mid: Option<MidBlock>,
    skip_channels: Vec<i64>,
    text_width: i64,
}

/// SDXL's embedding of pooled text and time ids.
struct AdditionEmbedding {
    mlp: EmbeddingMlp,
    widths: AdditionWidths,
}

impl Trunk {
    /// Builds the first half from the tensors below `scope`; settings of the way up are not looked at.
    ///
    /// Errors: [`Error::Config`] if settings contradict each other.
    pub(crate) fn new(scope: &Scope, config: UNetConfig) -> Result<Self> {
        let levels = config.levels()?;
        let (first, last) = match levels.as_slice() {
            [first, .., last] => (first.channels, last),
            [only] => (only.channels, only),
            [] => return Err(faulty("block_out_channels", "no levels")),
        };
        let time_width = TIME_EXPANSION * first;
        let resnet = resnet_spec(&config, first);

        // 1. Embeddings and input.
        let time_embedding = EmbeddingMlp::new(scope / "time_embedding", first, time_width);
        let addition = config.addition_widths()?.map(|widths| {
            let mlp = EmbeddingMlp::new(scope / "add_embedding", widths.total, time_width);
            AdditionEmbedding { mlp, widths }
        });
        let conv_in = Conv2d::new(scope / "conv_in", config.in_channels, first, 3, 1, 1);

        // 2. Down, remembering the channels of each skip connection.
        let mut skip_channels = vec![first];
        let mut channels = first;
        let mut down = Vec::new();
        for (index, level) in levels.iter().enumerate() {
            let scope = scope / "down_blocks" / index;
            let attention = transformer_specs(&config, level, level.down.as_deref(), level.num_resnets);
            let downsample = index + 1 < levels.len();
            down.push(DownBlock::new(&scope, channels, level.channels, &resnet, &attention, downsample, &mut skip_channels));
            channels = level.channels;
        }

        // 3. Mid.
        let mid_attention = match config.mid_block_type {
            Some(MidBlockType::UNetMidBlock2DCrossAttn) => Some(transformer_spec(&config, last, config.mid_transformer_layers()?)),
            Some(MidBlockType::UNetMidBlock2D) | None => None,
        };
        let mid = config.mid_block_type.map(|_| MidBlock::new(&(scope / "mid_block"), channels, &resnet, mid_attention));
        let text_width = last.context_width;
        Ok(Self { config, kind: scope.kind(), time_embedding, addition, conv_in, down, mid, skip_channels, text_width })
    }

    /// The settings it was built from.
    pub(crate) fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// The kind of the weights.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Width of the text states it attends to.
    pub(crate) fn text_width(&self) -> i64 {
        self.text_width
    }

    /// Width of the pooled text it takes; `None` if it takes none.
    pub(crate) fn pooled_width(&self) -> Option<i64> {
        self.addition.as_ref().map(|addition| addition.widths.pooled)
    }

    /// Channels of each skip connection, in the order they are made: the input convolution's first.
    pub(crate) fn skip_channels(&self) -> &[i64] {
        &self.skip_channels
    }

    /// Embeds timesteps and, where the network takes it, what is added to them. Every residual block begins with the same SiLU of it: it
    /// is applied here, once. Shapes: `timesteps` `[B]`, to `[B, T]`.
    pub(crate) fn time(&self, timesteps: &Tensor, added: Option<&Added>) -> Tensor {
        let channels = self.config.block_out_channels[0];
        let time = self.time_embedding.forward(&sinusoids(timesteps, channels, &self.config).to_kind(self.kind));
        let time = match (&self.addition, added) {
            (Some(addition), Some(added)) => time + addition.forward(added, &self.config, self.kind),
            _ => time,
        };
        time.silu()
    }

    /// What hides the unmasked text states from cross-attention, `[B, 1, 1, L]`; `what` names the forward pass in the error.
    ///
    /// Shapes: `text` `[B, L, D]`, of the network's kind; `mask` bool `[B, L]`. Errors: [`Error::Shape`] for another mask.
    pub(crate) fn attention_bias(&self, what: &'static str, text: &Tensor, mask: Option<&Tensor>) -> Result<Option<Tensor>> {
        let Some(mask) = mask else { return Ok(None) };
        if mask.size() != text.size()[..2] || mask.kind() != Kind::Bool {
            let detail = format!("a mask of {:?} {:?} for text of {:?}", mask.kind(), mask.size(), text.size());
            return Err(Error::Shape { what, detail });
        }
        let shown = Tensor::zeros([], (self.kind, text.device()));
        Ok(Some(shown.where_scalarother(mask, f64::NEG_INFINITY).to_kind(self.kind).unsqueeze(1).unsqueeze(1)))
    }

    /// The input convolution.
    pub(crate) fn input(&self, sample: &Tensor) -> Tensor {
        self.conv_in.forward(sample)
    }

    /// Runs the way down and the mid block behind the input convolution; each block's output is kept as a feature.
    pub(crate) fn walk<'a>(&'a self, pass: &mut Pass<'a>) {
        for block in &self.down {
            block.walk(pass);
            pass.keep_feature();
        }
        if let Some(mid) = &self.mid {
            mid.walk(pass);
            pass.keep_feature();
        }
    }

    /// The layers that attend to the text.
    pub(super) fn cross_attentions(&mut self) -> impl Iterator<Item = &mut CrossAttention> {
        let down = self.down.iter_mut().flat_map(DownBlock::cross_attentions);
        down.chain(self.mid.iter_mut().flat_map(MidBlock::cross_attentions))
    }

    /// Checks the inputs of a forward pass; `what` names it in the error.
    ///
    /// Errors: [`Error::Shape`] if the shapes do not fit each other or the network, or if `added` is missing or superfluous.
    pub(crate) fn check(
        &self,
        what: &'static str,
        sample: &Tensor,
        timesteps: &Tensor,
        text: &Tensor,
        added: Option<&Added>,
    ) -> Result<()> {
        let fault = |detail: String| Err(Error::Shape { what, detail });
        let (sample, text) = (sample.size(), text.size());
        let (&[batch, channels, _, _], &[text_batch, _, text_width]) = (sample.as_slice(), text.as_slice()) else {
            return fault(format!("sample {sample:?} and text {text:?}, wanted [B, C, h, w] and [B, L, D]"));
        };
        if channels != self.config.in_channels || text_width != self.text_width {
            return fault(format!(
                "{channels} channels and text of {text_width}, wanted {} and {}",
                self.config.in_channels, self.text_width
            ));
        }
        if text_batch != batch || timesteps.size() != [batch] {
            return fault(format!("text {text:?} and timesteps {:?} for {batch} samples", timesteps.size()));
        }
        match (&self.addition, added) {
            (None, None) => Ok(()),
            (Some(addition), Some(Added { pooled, time_ids }))
                if pooled.size() == [batch, addition.widths.pooled] && time_ids.size() == [batch, NUM_TIME_IDS] =>
            {
                Ok(())
            }
            (Some(addition), Some(Added { pooled, time_ids })) => fault(format!(
                "pooled {:?} and time ids {:?}, wanted [{batch}, {}] and [{batch}, {NUM_TIME_IDS}]",
                pooled.size(),
                time_ids.size(),
                addition.widths.pooled
            )),
            (Some(_), None) => fault("this network needs pooled text and time ids".into()),
            (None, Some(_)) => fault("this network takes no pooled text and time ids".into()),
        }
    }
}

impl AdditionEmbedding {
    fn forward(&self, added: &Added, config: &UNetConfig, kind: Kind) -> Tensor {
        let ids = sinusoids(&added.time_ids.flatten(0, 1), self.widths.time_id, config);
        let ids = ids.reshape([-1, NUM_TIME_IDS * self.widths.time_id]).to_kind(kind);
        self.mlp.forward(&Tensor::cat(&[added.pooled.to_kind(kind), ids], 1))
    }
}

/// What is alike in all residual blocks of a network whose outermost level has `first` channels.
pub(super) fn resnet_spec(config: &UNetConfig, first: i64) -> ResnetSpec {
    ResnetSpec { groups: config.norm_num_groups, eps: config.norm_eps, time_width: Some(TIME_EXPANSION * first) }
}

fn transformer_spec(config: &UNetConfig, level: &Level, num_layers: usize) -> TransformerSpec {
    TransformerSpec {
        channels: level.channels,
        heads: level.heads,
        context_width: level.context_width,
        num_layers,
        groups: config.norm_num_groups,
        linear_projection: config.use_linear_projection,
    }
}

/// The transformers behind the residual blocks of a level: `layers` of each, or none anywhere.
pub(super) fn transformer_specs(
    config: &UNetConfig,
    level: &Level,
    layers: Option<&[usize]>,
    num_resnets: usize,
) -> Vec<Option<TransformerSpec>> {
    match layers {
        Some(layers) => layers.iter().map(|&num_layers| Some(transformer_spec(config, level, num_layers))).collect(),
        None => vec![None; num_resnets],
    }
}
