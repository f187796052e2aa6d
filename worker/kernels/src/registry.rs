//! Which kernels there are for a device and a kind of number.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tch::{Device, Kind};

use crate::launch::Kernels;
use crate::{gpu, proof};

/// How networks that are built from now on compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With fused operators where there are some.
    Fused,
    /// With libtorch's alone.
    Plain,
}

static IS_PLAIN: AtomicBool = AtomicBool::new(false);
/// What was made, and what could not be.
static MADE: Mutex<Vec<Made>> = Mutex::new(Vec::new());

/// What became of the kernels of a kind on a GPU.
struct Made {
    ordinal: usize,
    kind: Kind,
    kernels: Option<Kernels>,
}

/// Says how networks that are built from now on compute.
pub fn set_mode(mode: Mode) {
    IS_PLAIN.store(mode == Mode::Plain, Ordering::Relaxed);
}

/// The kernels of a device for one kind of number, compiled and proved when they are first asked for. `None` where libtorch's operators are
/// to be used: on the CPU, in other kinds than f32, f16 and bf16, and with a warning where the kernels cannot be made or compute something
/// else.
#[must_use]
pub fn of(device: Device, kind: Kind) -> Option<Kernels> {
    #[cfg(any(test, feature = "emulator"))]
    if let Some(emulated) = crate::emulator::asked_for(device, kind) {
        return Some(emulated);
    }
    let Device::Cuda(ordinal) = device else { return None };
    if IS_PLAIN.load(Ordering::Relaxed) || name(kind).is_none() {
        return None;
    }
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(made) = made.iter().find(|made| (made.ordinal, made.kind) == (ordinal, kind)) {
        return made.kernels.clone();
    }
    let kernels = make(ordinal, kind);
    made.push(Made { ordinal, kind, kernels: kernels.clone() });
    kernels
}

fn make(ordinal: usize, kind: Kind) -> Option<Kernels> {
    let began = Instant::now();
    let proved = gpu::open(ordinal, kind).and_then(|kernels| proof::prove(&kernels, Device::Cuda(ordinal)).map(|()| kernels));
    let numbers = name(kind).unwrap_or_default();
    match proved {
        Ok(kernels) => {
            tracing::info!("fused operators in {numbers} compiled and proved on cuda:{ordinal} in {:.1} s", began.elapsed().as_secs_f64());
            Some(kernels)
        }
        Err(error) => {
            tracing::warn!(
                "no fused operators in {numbers} on cuda:{ordinal}, libtorch's are used, which take longer (--kernels plain tries no others): {error}"
            );
            None
        }
    }
}

/// What people call the kinds that there are kernels for.
pub(crate) fn name(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Float => Some("f32"),
        Kind::Half => Some("f16"),
        Kind::BFloat16 => Some("bf16"),
        _ => None,
    }
}

/// What cuda/kernels.cu calls a kind.
pub(crate) fn number(kind: Kind) -> u32 {
    match kind {
        Kind::Half => 1,
        Kind::BFloat16 => 2,
        _ => 0,
    }
}
