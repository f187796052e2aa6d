//! Copies to a GPU that nobody waits for.

use tch::{Device, Tensor};

use crate::Result;

/// A tensor on a device.
///
/// A GPU copies it behind the work that it has already, while this thread goes on to launch more: a copy that is waited for would let the
/// GPU run dry each time. Where the system pins no memory it is waited for.
///
/// Errors: [`crate::Error::Torch`].
pub(crate) fn send(tensor: &Tensor, device: Device) -> Result<Tensor> {
    if !device.is_cuda() || tensor.device() != Device::Cpu {
        return Ok(tensor.f_to_device(device)?);
    }
    match peapod_kernels::pinned(tensor) {
        // libtorch keeps the pages from others until they are read.
        Ok(pinned) => Ok(pinned.f_to_device_(device, tensor.kind(), true, false)?),
        Err(_) => Ok(tensor.f_to_device(device)?),
    }
}
