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
