//! The numbers that networks compute in, as command lines and job files call them.

use tch::Kind;

/// Floating-point numbers to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Numbers {
    /// Single precision.
    F32,
    /// The range of single precision in half the bits.
    Bf16,
    /// Half precision.
    F16,
}

impl Numbers {
    /// What libtorch calls them.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }
}

/// Numbers that an autoencoder computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum VaeNumbers {
    /// Single precision.
    F32,
    /// Single precision, of which a GPU's convolutions may leave out half the bits of what they multiply.
    Tf32,
    /// The range of single precision in half the bits.
    Bf16,
    /// Half precision.
    F16,
}

impl VaeNumbers {
    /// What libtorch calls them.
    #[must_use]
    pub fn kind(self) -> Kind {
        match self {
            Self::F32 | Self::Tf32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
            Self::F16 => Kind::Half,
        }
    }

    /// What people call them.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// Tells libtorch whether convolutions in f32 are to be just that. It holds for the whole process, and for every network in f32.
    pub fn settle(self) {
        peapod_kernels::allow_tf32(self == Self::Tf32, false);
    }
}

impl From<Numbers> for VaeNumbers {
    fn from(numbers: Numbers) -> Self {
        match numbers {
            Numbers::F32 => Self::F32,
            Numbers::Bf16 => Self::Bf16,
            Numbers::F16 => Self::F16,
        }
    }
}

/// What people call a kind: `bf16`.
#[must_use]
pub fn name(kind: Kind) -> String {
    match kind {
        Kind::Half => "f16".into(),
        Kind::BFloat16 => "bf16".into(),
        Kind::Float => "f32".into(),
        Kind::Double => "f64".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}
