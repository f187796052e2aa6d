//! The adapter: the small network that turns another language's text states into what an English diffusion model listens to.
//!
//! ```text
//! p        = linear(GELU(.. linear(GELU(linear(LayerNorm(x)))) ..))       no biases
//! pooled   = mean over the tokens of p, padding included
//! sequence = linear(GELU(p)), with bias
//! ```
//!
//! All parameters are views into one flat `f32` buffer, in the order of the state dict, so that the optimiser, the all-reduce and a
//! hand-over of state each work on a single tensor.

mod file;
pub(crate) mod flat;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor, no_grad_guard};

pub use self::file::{ADAPTER_FILE, PYTORCH_FILE, metadata};
use crate::{Error, Result};

/// Added to the variance by the layer norm, as PyTorch does by default.
const LAYER_NORM_EPS: f64 = 1e-5;

/// The widths of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterConfig {
    /// Width of the text states it reads.
    pub input: i64,
    /// Width between the projector's linears.
    pub hidden: i64,
    /// Number of linears in the projector; 3 in the published trainer.
    pub depth: usize,
    /// Width of the projector's output: SDXL's pooled embedding (1280), or SD1.5's cross-attention width (768).
    pub pooled: i64,
    /// Width of the final linear's output: SDXL's cross-attention width (2048); `None` for SD1.5, which has no such linear.
    pub output: Option<i64>,
}

impl AdapterConfig {
    /// Number of parameters of an adapter that is made fresh with these widths.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        entries(self, Layout::Projector).iter().map(Entry::num_elements).sum()
    }
}

impl AdapterConfig {
    /// The adapter from student states of width `input` to a UNet that attends to states of `text_width` and takes pooled text of
    /// `pooled_width`, if it takes any.
    pub fn between(input: i64, text_width: i64, pooled_width: Option<i64>, hidden: i64, depth: usize) -> Self {
        match pooled_width {
            Some(pooled) => Self { input, hidden, depth, pooled, output: Some(text_width) },
            // Without pooled text the projector's own output is what the UNet attends to.
            None => Self { input, hidden, depth, pooled: text_width, output: None },
        }
    }
}

/// Which names and biases the layers have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// `projector.{0,2,..}` without biases, then `fc`.
    Projector,
    /// `fc1`, `fc2`, `fc3` with biases: what the first published checkpoints hold.
    Legacy,
}

/// What an adapter computes.
#[derive(Debug)]
pub struct AdapterOutput {
    /// `[B, pooled]`, in place of the English encoder's pooled embedding; `None` for SD1.5.
    pub pooled: Option<Tensor>,
    /// `[B, L, output]`, in place of the English encoders' token states.
    pub sequence: Tensor,
}

/// The adapter with its parameters.
#[derive(Debug)]
pub struct Adapter {
    config: AdapterConfig,
    layout: Layout,
    flat: Tensor,
    parameters: Vec<Tensor>,
}

impl Adapter {
    /// Draws a new adapter: weights and biases uniform within `1 / sqrt(inputs)` of zero, the layer norm at identity.
    ///
    /// The numbers come from a counter-based generator on the host, one stream a tensor: every machine draws the same adapter.
    /// Errors: [`Error::Unsupported`] if a width or the depth is not positive.
    pub fn fresh(config: AdapterConfig, seed: u64, device: Device) -> Result<Self> {
        let widths = [config.input, config.hidden, config.pooled, config.output.unwrap_or(1), config.depth as i64];
        if widths.iter().any(|&width| width < 1) {
            return Err(Error::Unsupported { what: format!("{config:?}"), hint: "every width and the depth must be at least 1".into() });
        }
        let mut elements = Vec::new();
        for (stream, entry) in entries(&config, Layout::Projector).iter().enumerate() {
            let num = entry.num_elements();
            match entry.init {
                Init::Constant(value) => elements.resize(elements.len() + num, value),
                Init::Uniform { inputs } => {
                    let mut rng = ChaCha8Rng::seed_from_u64(seed);
                    rng.set_stream(stream as u64);
                    let bound = (inputs as f64).sqrt().recip();
                    elements.extend((0..num).map(|_| uniform(&mut rng, bound)));
                }
            }
        }
        Self::from_elements(config, Layout::Projector, &elements, device)
    }

    /// Returns an adapter of the same shape with other parameters, copied from `flat` `[P]`: an average, say.
    ///
    /// Errors: [`Error::Shape`] if the length differs.
    pub fn with_parameters(&self, flat: &Tensor) -> Result<Self> {
        self.copied_to(self.flat.device(), flat)
    }

    /// As [`Adapter::with_parameters`], on another device.
    ///
    /// Errors: [`Error::Shape`] if the length differs.
    pub fn copied_to(&self, device: Device, flat: &Tensor) -> Result<Self> {
        flat::check_length("adapter parameters", flat, self.num_parameters())?;
        Self::from_flat(self.config, self.layout, flat::copy(&flat.f_detach()?.f_to_device(device)?.f_to_kind(Kind::Float)?)?)
    }

    /// Returns the same adapter under another name, for another thread: what changes one changes the other.
    ///
    /// Errors: from libtorch.
    pub fn alias(&self) -> Result<Self> {
        Self::from_flat(self.config, self.layout, self.flat.shallow_clone())
    }

    /// Overwrites the parameters in place with `flat` `[P]`.
    ///
    /// Errors: [`Error::Shape`] if the length differs.
    pub fn set_parameters(&mut self, flat: &Tensor) -> Result<()> {
        flat::check_length("adapter parameters", flat, self.num_parameters())?;
        let _guard = no_grad_guard();
        Ok(self.flat.f_copy_(flat)?)
    }

    /// Computes in `f32` whatever the kind of `x`, on the adapter's device.
    ///
    /// Shapes: `x` `[B, L, input]`; see [`AdapterOutput`]. Padding tokens are treated like any other.
    pub fn forward(&self, x: &Tensor) -> AdapterOutput {
        self.forward_masked(x, None)
    }

    /// As [`Adapter::forward`], with a mean over the tokens that `mask` (bool `[B, L]`) marks, of which each row has one at least.
    pub fn forward_masked(&self, x: &Tensor, mask: Option<&Tensor>) -> AdapterOutput {
        let (norm, layers) = self.parameters.split_at(2);
        let mut layers = self.layers(layers).into_iter();
        // The projector alternates linears and GELUs; the last linear of all follows the pooling.
        let mut states = x.to_kind(Kind::Float).layer_norm([self.config.input], Some(&norm[0]), Some(&norm[1]), LAYER_NORM_EPS, true);
        for (index, (weight, bias)) in layers.by_ref().take(self.config.depth).enumerate() {
            let input = if index == 0 { states } else { states.gelu("none") };
            states = input.linear(weight, bias);
        }
        match layers.next() {
            None => AdapterOutput { pooled: None, sequence: states },
            Some((weight, bias)) => {
                let pooled = match mask {
                    None => states.mean_dim(1, false, Kind::Float),
                    Some(mask) => {
                        let counted = mask.to_kind(Kind::Float).unsqueeze(-1);
                        (&states * &counted).sum_dim_intlist(1, false, Kind::Float) / counted.sum_dim_intlist(1, false, Kind::Float)
                    }
                };
                AdapterOutput { pooled: Some(pooled), sequence: states.gelu("none").linear(weight, bias) }
            }
        }
    }

    /// Returns the trainable leaves, in the order of the state dict; each is a view into [`Adapter::flat`].
    pub fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// Returns all parameters as one row `[P]`, `f32`, outside the gradient graph. Writing to it changes the adapter.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Returns the widths.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// Returns the number of parameters.
    pub fn num_parameters(&self) -> usize {
        self.flat.numel()
    }

    fn from_elements(config: AdapterConfig, layout: Layout, elements: &[f32], device: Device) -> Result<Self> {
        Self::from_flat(config, layout, Tensor::f_from_slice(elements)?.f_to_device(device)?)
    }

    /// Cuts `flat` into parameters; its length is that of the layout.
    fn from_flat(config: AdapterConfig, layout: Layout, flat: Tensor) -> Result<Self> {
        let mut offset = 0;
        let mut parameters = Vec::new();
        for entry in entries(&config, layout) {
            let length = entry.num_elements() as i64;
            let view = flat.f_narrow(0, offset, length)?.f_view(entry.shape.as_slice())?;
            // A detached view shares its storage with the buffer but is a leaf of the graph.
            parameters.push(view.f_detach()?.f_set_requires_grad(true)?);
            offset += length;
        }
        Ok(Self { config, layout, flat, parameters })
    }

    /// Pairs weights with biases, where the layout has them.
    fn layers<'a>(&self, parameters: &'a [Tensor]) -> Vec<(&'a Tensor, Option<&'a Tensor>)> {
        match self.layout {
            Layout::Legacy => parameters.chunks_exact(2).map(|pair| (&pair[0], Some(&pair[1]))).collect(),
            Layout::Projector => {
                let (projector, last) = parameters.split_at(self.config.depth);
                let with_bias = last.chunks_exact(2).map(|pair| (&pair[0], Some(&pair[1])));
                projector.iter().map(|weight| (weight, None)).chain(with_bias).collect()
            }
        }
    }
}

/// How a parameter starts.
#[derive(Debug, Clone, Copy)]
enum Init {
    Constant(f32),
    Uniform { inputs: i64 },
}

/// One parameter of the state dict.
#[derive(Debug)]
struct Entry {
    name: String,
    shape: Vec<i64>,
    init: Init,
}

impl Entry {
    fn num_elements(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// Lists the state dict of an adapter, in order.
fn entries(config: &AdapterConfig, layout: Layout) -> Vec<Entry> {
    let norm = |name: &str, value| Entry { name: name.into(), shape: vec![config.input], init: Init::Constant(value) };
    let mut entries = vec![norm("layernorm.weight", 1.0), norm("layernorm.bias", 0.0)];
    let mut linear = |name: String, inputs: i64, outputs: i64, bias: bool| {
        let init = Init::Uniform { inputs };
        entries.push(Entry { name: format!("{name}.weight"), shape: vec![outputs, inputs], init });
        if bias {
            entries.push(Entry { name: format!("{name}.bias"), shape: vec![outputs], init });
        }
    };
    let legacy = layout == Layout::Legacy;
    for index in 0..config.depth {
        let inputs = if index == 0 { config.input } else { config.hidden };
        let outputs = if index + 1 == config.depth { config.pooled } else { config.hidden };
        let name = if legacy { format!("fc{}", index + 1) } else { format!("projector.{}", 2 * index) };
        linear(name, inputs, outputs, legacy);
    }
    if let Some(output) = config.output {
        linear(if legacy { "fc3" } else { "fc" }.into(), config.pooled, output, true);
    }
    entries
}

/// Draws from the 2^24 evenly spaced values of `[-bound, bound)`. The mapping is our own: a library's may change with its version.
fn uniform(rng: &mut ChaCha8Rng, bound: f64) -> f32 {
    let unit = f64::from(rng.next_u32() >> 8) / f64::from(1 << 24);
    ((2.0 * unit - 1.0) * bound) as f32
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use safetensors::{Dtype, tensor::TensorView};

    use super::file::ADAPTER;
    use super::flat::FlatFile;
    use super::*;

    const SMALL: AdapterConfig = AdapterConfig { input: 6, hidden: 5, depth: 3, pooled: 4, output: Some(7) };

    fn values(tensor: &Tensor) -> Vec<f32> {
        Vec::try_from(tensor.detach().flatten(0, -1)).unwrap()
    }

    fn keys(bytes: &[u8]) -> Vec<(String, Vec<i64>)> {
        FlatFile::parse(ADAPTER, bytes).unwrap().shapes().into_iter().collect()
    }

    #[test]
    fn every_published_variant_has_its_parameter_count() {
        let sdxl = |input, hidden| AdapterConfig { input, hidden, depth: 3, pooled: 1280, output: Some(2048) };
        let count = |config: AdapterConfig, layout| entries(&config, layout).iter().map(Entry::num_elements).sum::<usize>();
        assert_eq!(count(sdxl(1024, 1024), Layout::Projector), 6_033_408);
        assert_eq!(count(sdxl(1024, 2048), Layout::Projector), 11_538_432);
        assert_eq!(count(sdxl(2048, 2048), Layout::Projector), 13_637_632);
        assert_eq!(count(sdxl(768, 2048), Layout::Projector), 11_013_632);
        assert_eq!(count(AdapterConfig { depth: 4, ..sdxl(1024, 2048) }, Layout::Projector), 15_732_736);
        assert_eq!(count(AdapterConfig { depth: 2, ..sdxl(1024, 1024) }, Layout::Legacy), 4_987_136);
        let sd15 = |hidden, depth| AdapterConfig { input: 1024, hidden, depth, pooled: 768, output: None };
        assert_eq!(count(sd15(2048, 3), Layout::Projector), 7_866_368);
        assert_eq!(count(sd15(3072, 5), Layout::Projector), 33_818_624);
    }

    #[test]
    fn a_fresh_adapter_depends_on_the_seed_alone_and_stays_within_its_bounds() {
        let draw = |seed| Adapter::fresh(SMALL, seed, Device::Cpu).unwrap();
        assert_eq!(values(draw(1).flat()), values(draw(1).flat()));
        assert_ne!(values(draw(1).flat()), values(draw(2).flat()));
        let adapter = draw(3);
        assert_eq!(values(&adapter.parameters()[0]), [1.0; 6]);
        assert_eq!(values(&adapter.parameters()[1]), [0.0; 6]);
        for (parameter, inputs) in adapter.parameters()[2..].iter().zip([6f32, 5.0, 5.0, 4.0, 4.0]) {
            let bound = inputs.sqrt().recip();
            let widest = values(parameter).into_iter().map(f32::abs).fold(0.0, f32::max);
            assert!(widest <= bound && widest > 0.5 * bound, "{widest} of {bound}");
        }
        let flat = AdapterConfig { depth: 0, ..SMALL };
        assert!(matches!(Adapter::fresh(flat, 0, Device::Cpu), Err(Error::Unsupported { .. })));
    }

    /// The first numbers drawn from seed 0: a change would make workers of different builds start apart.
    #[test]
    fn the_initial_draw_is_pinned() {
        let adapter = Adapter::fresh(SMALL, 0, Device::Cpu).unwrap();
        assert_eq!(values(&adapter.parameters()[2])[..3], PINNED);
    }

    const PINNED: [f32; 3] = [-0.34004778, -0.13699155, -0.3147378];

    #[test]
    fn parameters_are_leaves_that_share_the_flat_buffer() {
        let mut adapter = Adapter::fresh(SMALL, 0, Device::Cpu).unwrap();
        assert!(adapter.parameters().iter().all(Tensor::requires_grad) && !adapter.flat().requires_grad());
        let output = adapter.forward(&Tensor::ones([2, 3, 6], (Kind::Float, Device::Cpu)));
        assert_eq!(output.sequence.size(), [2, 3, 7]);
        assert_eq!(output.pooled.as_ref().map(Tensor::size), Some(vec![2, 4]));
        (output.sequence.sum(Kind::Float) + output.pooled.unwrap().sum(Kind::Float)).backward();
        assert!(adapter.parameters().iter().all(|parameter| parameter.grad().defined()));

        let mut flat = adapter.flat().shallow_clone();
        let _ = flat.fill_(0.25);
        assert_eq!(adapter.parameters()[6].detach().double_value(&[0]), 0.25);
        let other = adapter.with_parameters(&(adapter.flat() * 2.0)).unwrap();
        assert_eq!(adapter.flat().double_value(&[0]), 0.25);
        adapter.set_parameters(other.flat()).unwrap();
        assert_eq!(adapter.parameters()[0].detach().double_value(&[0]), 0.5);
        assert!(matches!(adapter.set_parameters(&flat.narrow(0, 0, 3)), Err(Error::Shape { .. })));
    }

    #[test]
    fn saving_keeps_names_shapes_values_and_metadata() {
        let adapter = Adapter::fresh(SMALL, 5, Device::Cpu).unwrap();
        let metadata_in = BTreeMap::from([("step".to_owned(), "7".to_owned()), ("encoder".to_owned(), "bert".to_owned())]);
        let bytes = adapter.to_safetensors(&metadata_in).unwrap();
        let shape = |name: &str, shape: &[i64]| (name.to_owned(), shape.to_vec());
        let expected = [
            shape("fc.bias", &[7]),
            shape("fc.weight", &[7, 4]),
            shape("layernorm.bias", &[6]),
            shape("layernorm.weight", &[6]),
            shape("projector.0.weight", &[5, 6]),
            shape("projector.2.weight", &[5, 5]),
            shape("projector.4.weight", &[4, 5]),
        ];
        assert_eq!(keys(&bytes), expected);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        assert_eq!(metadata(file.path()).unwrap(), metadata_in);
        let loaded = Adapter::load(file.path(), Device::Cpu).unwrap();
        assert_eq!((loaded.config(), values(loaded.flat())), (&SMALL, values(adapter.flat())));
    }

    #[test]
    fn depth_and_missing_fc_are_read_off_the_keys() {
        for config in [
            AdapterConfig { depth: 5, output: None, ..SMALL },
            AdapterConfig { depth: 4, ..SMALL },
            AdapterConfig { depth: 1, hidden: 4, ..SMALL },
        ] {
            let adapter = Adapter::fresh(config, 0, Device::Cpu).unwrap();
            let loaded = Adapter::from_safetensors(&adapter.to_safetensors(&BTreeMap::new()).unwrap(), Device::Cpu).unwrap();
            assert_eq!(loaded.config(), &config);
            let output = loaded.forward(&Tensor::ones([1, 2, 6], (Kind::Float, Device::Cpu)));
            assert_eq!(output.pooled.is_some(), config.output.is_some());
            assert_eq!(output.sequence.size(), [1, 2, config.output.unwrap_or(config.pooled)]);
        }
    }

    #[test]
    fn the_legacy_layout_is_read_with_its_biases() {
        let config = AdapterConfig { depth: 2, ..SMALL };
        let num: usize = entries(&config, Layout::Legacy).iter().map(Entry::num_elements).sum();
        let elements: Vec<f32> = (0..num).map(|index| (index as f32 * 0.37).sin()).collect();
        let legacy = Adapter::from_elements(config, Layout::Legacy, &elements, Device::Cpu).unwrap();
        let bytes = legacy.to_safetensors(&BTreeMap::new()).unwrap();
        assert!(keys(&bytes).contains(&("fc2.bias".to_owned(), vec![4])));
        let loaded = Adapter::from_safetensors(&bytes, Device::Cpu).unwrap();
        assert_eq!((loaded.layout, loaded.config, values(&loaded.flat)), (Layout::Legacy, config, elements));

        let x = Tensor::arange(12, (Kind::Float, Device::Cpu)).view([1, 2, 6]).sin();
        let p = &loaded.parameters;
        let by_hand =
            x.layer_norm([6], Some(&p[0]), Some(&p[1]), 1e-5, true).linear(&p[2], Some(&p[3])).gelu("none").linear(&p[4], Some(&p[5]));
        let output = loaded.forward(&x);
        assert_eq!(values(&output.pooled.unwrap()), values(&by_hand.mean_dim(1, false, Kind::Float)));
        assert_eq!(values(&output.sequence), values(&by_hand.gelu("none").linear(&p[6], Some(&p[7]))));
    }

    #[test]
    fn half_precision_files_are_widened() {
        let adapter = Adapter::fresh(SMALL, 5, Device::Cpu).unwrap();
        for (dtype, kind) in [(Dtype::F16, Kind::Half), (Dtype::BF16, Kind::BFloat16)] {
            let halves: Vec<_> = entries(&SMALL, Layout::Projector)
                .into_iter()
                .zip(adapter.parameters())
                .map(|(entry, parameter)| {
                    let half = parameter.detach().to_kind(kind);
                    let mut bytes = vec![0; half.numel() * 2];
                    half.copy_data_u8(&mut bytes, half.numel());
                    (entry.name, entry.shape.iter().map(|&length| length as usize).collect::<Vec<_>>(), bytes)
                })
                .collect();
            let views = halves.iter().map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
            let loaded = Adapter::from_safetensors(&safetensors::serialize(views, None).unwrap(), Device::Cpu).unwrap();
            assert_eq!(loaded.flat().kind(), Kind::Float);
            assert_eq!(values(loaded.flat()), values(&adapter.flat().to_kind(kind).to_kind(Kind::Float)));
        }
    }

    #[test]
    fn what_is_no_adapter_is_refused_with_the_reason() {
        let save = |tensors: &[(&str, &[i64])]| {
            let tensors: Vec<_> =
                tensors.iter().map(|(name, shape)| (name.to_string(), Tensor::zeros(*shape, (Kind::Float, Device::Cpu)))).collect();
            flat::serialize(&tensors, &BTreeMap::new()).unwrap()
        };
        let refuse = |bytes: &[u8]| Adapter::from_safetensors(bytes, Device::Cpu).unwrap_err().to_string();
        assert!(refuse(b"nonsense").contains("not a whole safetensors file"));
        assert!(refuse(&save(&[("unet.weight", &[2])])).contains("no usable layernorm.weight among its keys (unet.weight)"));
        assert!(refuse(&save(&[("layernorm.weight", &[2])])).contains("no usable projector.0.weight"));
        let lopsided = save(&[("layernorm.weight", &[2]), ("projector.0.weight", &[3, 5]), ("bias", &[1])]);
        let text = refuse(&lopsided);
        for part in ["missing layernorm.bias [2]", "projector.0.weight is [3, 5], wanted [3, 2]", "unknown bias"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn metadata_of_something_else_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for content in [&b""[..], &[0xff; 64], b"\x04\0\0\0\0\0\0\0[1, "] {
            std::fs::write(file.path(), content).unwrap();
            assert!(matches!(metadata(file.path()), Err(Error::Invalid { .. })));
        }
    }
}
