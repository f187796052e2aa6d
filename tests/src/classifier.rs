//! The judge of the demo's pictures: a very small convolutional network that names what a picture shows.
//!
//! `tests/classifier/train.py` trains it on fresh renders (four minutes, one thread) and writes the weights read here. It exists to
//! answer one question: does an adapter, asked in Chinese, draw the colour and shape that [`prompts`] asked for?

use safetensors::{Dtype, SafeTensors};
use tch::{Device, Kind, Tensor};

/// The classifier's weights as `tests/classifier/train.py` saved them (fp16).
const WEIGHTS: &[u8] = include_bytes!("../classifier/weights.safetensors");

/// The stride of each convolution, `STRIDES` in train.py.
const STRIDES: [i64; 4] = [2, 2, 2, 1];

/// The shorter side, in pixels, of the pictures the network was trained on.
const SIDE: i64 = 64;

/// Why the classifier could not be loaded or asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The weight file is no safetensors file, or lacks a tensor.
    #[error("classifier/weights.safetensors: {0}")]
    Weights(#[from] safetensors::SafeTensorError),
    /// A tensor has an unexpected type.
    #[error("classifier/weights.safetensors: {name} is {dtype:?}, expected F16")]
    Dtype {
        /// Its key.
        name: String,
        /// Its type in the file.
        dtype: Dtype,
    },
    /// The weights were trained for other classes than this file lists.
    #[error("classifier/weights.safetensors: trained for {what} `{got}`, expected `{expected}`: run classifier/train.py again")]
    Classes {
        /// `colour`, `shape`, `background` or `size`.
        what: &'static str,
        /// The classes in the file's metadata.
        got: String,
        /// The classes here.
        expected: String,
    },
    /// A picture's bytes do not match its size.
    #[error("a picture of {width}x{height} needs {} bytes of RGB, not {got}", width * height * 3)]
    Picture {
        /// Width in pixels.
        width: usize,
        /// Height in pixels.
        height: usize,
        /// How many bytes there are.
        got: usize,
    },
    /// libtorch refused.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

/// Declares one of the four things a picture varies in: an enum with its classes' English and Chinese words.
macro_rules! classes {
    ($(#[$doc:meta])* $name:ident, $what:literal: $($class:ident = $en:literal $zh:literal),+) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            $(#[doc = $en] $class),+
        }

        impl $name {
            /// All classes, in the order of the network's logits.
            pub const ALL: &'static [Self] = &[$(Self::$class),+];
            const WHAT: &'static str = $what;

            /// The English word, as shapes.py's captions have it.
            pub fn en(self) -> &'static str {
                match self { $(Self::$class => $en),+ }
            }

            /// The Chinese word, as shapes.py's captions have it.
            pub fn zh(self) -> &'static str {
                match self { $(Self::$class => $zh),+ }
            }

            /// What the weight file's metadata must say: the English words, in order.
            fn listed() -> (&'static str, String) {
                (Self::WHAT, Self::ALL.iter().map(|class| class.en()).collect::<Vec<_>>().join(" "))
            }
        }
    };
}

classes!(
    /// The colour of the shape.
    Colour, "colour": Red = "red" "红色", Green = "green" "绿色", Blue = "blue" "蓝色", Yellow = "yellow" "黄色",
    Purple = "purple" "紫色", Orange = "orange" "橙色", Pink = "pink" "粉色", Brown = "brown" "棕色"
);
classes!(
    /// What is drawn.
    Shape, "shape": Circle = "circle" "圆形", Square = "square" "正方形", Triangle = "triangle" "三角形", Star = "star" "五角星",
    Heart = "heart" "心形"
);
classes!(
    /// The colour behind the shape.
    Background, "background": White = "white" "白色", Black = "black" "黑色", Gray = "gray" "灰色"
);
classes!(
    /// How much of the picture the shape takes.
    Size, "size": Big = "big" "大", Small = "small" "小"
);

/// A picture of 8-bit RGB, row by row from the top.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

/// What the classifier sees in a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The colour of the shape.
    pub colour: Colour,
    /// What is drawn.
    pub shape: Shape,
    /// The colour behind it.
    pub background: Background,
    /// How big it is.
    pub size: Size,
}

/// A request for one picture, in both languages.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// In Chinese: what the adapter is asked.
    pub zh: String,
    /// In English: what the teacher is asked.
    pub en: String,
    /// What a right picture shows.
    pub wanted: Verdict,
}

impl Prompt {
    /// Whether `seen` has the colour and the shape that were asked for.
    pub fn met_by(&self, seen: &Verdict) -> bool {
        seen.colour == self.wanted.colour && seen.shape == self.wanted.shape
    }
}

/// The 100 prompts every demo run is judged by: all colours with all shapes at least twice, no (colour, shape, background) twice, both
/// sizes, and both wordings of shapes.py. `prompts` in train.py makes the same ones.
pub fn prompts() -> Vec<Prompt> {
    let prompt = |i: usize| {
        let (colour, shape, background, turn) = (i % 8, i / 8 % 5, i % 3, i / 40);
        let wanted = Verdict {
            colour: Colour::ALL[colour],
            shape: Shape::ALL[shape],
            background: Background::ALL[background],
            size: Size::ALL[(colour + shape + turn) % 2],
        };
        let Verdict { colour: c, shape: h, background: b, size: s } = wanted;
        let (en, zh) = if (colour + background + turn).is_multiple_of(2) {
            (
                format!("a {} {} {} on a {} background", s.en(), c.en(), h.en(), b.en()),
                format!("{}背景上的{}{}{}", b.zh(), s.zh(), c.zh(), h.zh()),
            )
        } else {
            (format!("{} {} {}, {} background", s.en(), c.en(), h.en(), b.en()), format!("{}{}{}，{}背景", s.zh(), c.zh(), h.zh(), b.zh()))
        };
        Prompt { zh, en, wanted }
    };
    (0..100).map(prompt).collect()
}

/// The network, on the CPU.
///
/// Four convolutions with ReLU (batch normalisation is folded into them), mean and maximum over the picture, one linear layer whose
/// 18 outputs are the logits of [`Colour`], [`Shape`], [`Background`] and [`Size`], in this order.
#[derive(Debug)]
pub struct Classifier {
    convs: Vec<Linear>,
    head: Linear,
}

#[derive(Debug)]
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Classifier {
    /// Loads the committed weights.
    ///
    /// Errors: [`Error::Weights`], [`Error::Dtype`] or [`Error::Classes`] if the file does not fit this module.
    pub fn load() -> Result<Self, Error> {
        let (_, metadata) = SafeTensors::read_metadata(WEIGHTS)?;
        for (what, expected) in [Colour::listed(), Shape::listed(), Background::listed(), Size::listed()] {
            let got = metadata.metadata().as_ref().and_then(|map| map.get(what)).cloned().unwrap_or_default();
            if got != expected {
                return Err(Error::Classes { what, got, expected });
            }
        }
        let file = SafeTensors::deserialize(WEIGHTS)?;
        let linear = |name: &str| -> Result<Linear, Error> {
            Ok(Linear { weight: read_f16(&file, &format!("{name}.weight"))?, bias: read_f16(&file, &format!("{name}.bias"))? })
        };
        Ok(Self { convs: (0..STRIDES.len()).map(|i| linear(&format!("convs.{i}"))).collect::<Result<_, _>>()?, head: linear("head")? })
    }

    /// Names what each picture shows. Pictures of any size are reduced or enlarged to a shorter side of 64 pixels first.
    ///
    /// Errors: [`Error::Picture`] if a picture's bytes do not match its size.
    pub fn classify(&self, pictures: &[Picture]) -> Result<Vec<Verdict>, Error> {
        let _no_grad = tch::no_grad_guard();
        pictures.iter().map(|picture| self.verdict(&self.logits(&prepare(picture)?)?)).collect()
    }

    /// `[1, 3, H, W]` in -1..1 -> `[18]`.
    fn logits(&self, picture: &Tensor) -> Result<Tensor, Error> {
        let mut x = picture.shallow_clone();
        for (conv, stride) in self.convs.iter().zip(STRIDES) {
            x = x.f_conv2d(&conv.weight, Some(&conv.bias), [stride, stride], [1, 1], [1, 1], 1)?.f_relu()?;
        }
        let pooled = Tensor::f_cat(&[x.f_mean_dim([2, 3].as_slice(), false, Kind::Float)?, x.f_amax([2, 3].as_slice(), false)?], 1)?;
        Ok(pooled.f_linear(&self.head.weight, Some(&self.head.bias))?.f_squeeze_dim(0)?)
    }

    fn verdict(&self, logits: &Tensor) -> Result<Verdict, Error> {
        let mut start = 0;
        let mut largest_of_next = |count: usize| -> Result<usize, Error> {
            let part = logits.f_narrow(0, start, count as i64)?;
            start += count as i64;
            Ok(i64::try_from(part.f_argmax(0, false)?)? as usize)
        };
        Ok(Verdict {
            colour: Colour::ALL[largest_of_next(Colour::ALL.len())?],
            shape: Shape::ALL[largest_of_next(Shape::ALL.len())?],
            background: Background::ALL[largest_of_next(Background::ALL.len())?],
            size: Size::ALL[largest_of_next(Size::ALL.len())?],
        })
    }
}

/// Reads one fp16 tensor as fp32.
fn read_f16(file: &SafeTensors<'_>, name: &str) -> Result<Tensor, Error> {
    let view = file.tensor(name)?;
    if view.dtype() != Dtype::F16 {
        return Err(Error::Dtype { name: name.into(), dtype: view.dtype() });
    }
    let shape: Vec<i64> = view.shape().iter().map(|&n| n as i64).collect();
    Ok(Tensor::f_from_data_size(view.data(), &shape, Kind::Half)?.f_to_kind(Kind::Float)?)
}

/// A picture as the network wants it: `[1, 3, H, W]` in -1..1, its shorter side 64 pixels.
fn prepare(picture: &Picture) -> Result<Tensor, Error> {
    let &Picture { width, height, ref rgb } = picture;
    if rgb.len() != width * height * 3 || rgb.is_empty() {
        return Err(Error::Picture { width, height, got: rgb.len() });
    }
    let (w, h) = (width as i64, height as i64);
    let pixels = Tensor::f_from_data_size(rgb, &[1, h, w, 3], Kind::Uint8)?.f_to_device(Device::Cpu)?;
    let pixels = pixels.f_permute([0, 3, 1, 2])?.f_to_kind(Kind::Float)?.f_div_scalar(127.5)?.f_sub_scalar(1.0)?;
    let short = w.min(h);
    if short == SIDE {
        return Ok(pixels);
    }
    // With antialiasing: pictures in the shards are stored two to four times larger than they were drawn.
    Ok(pixels.f_internal_upsample_bilinear2d_aa([h * SIDE / short, w * SIDE / short], false, None, None)?)
}
