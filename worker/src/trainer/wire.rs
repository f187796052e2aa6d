//! What the members of a generation sum up in a step: the gradient, and the tail behind it.

use tch::{Device, Kind, Tensor};

/// The buffer that a collective works on. Beside a GPU its pages are pinned: the GPU then copies to and from them by itself.
pub(super) struct Wire {
    /// f32 on the host: first the gradient, then the tail.
    tensor: Tensor,
    num_parameters: usize,
}

impl Wire {
    /// For a gradient that lies on `device`. Where the system pins no more memory, copies take longer and nothing else changes.
    pub fn new(num_parameters: usize, tail_len: usize, device: Device) -> Self {
        let tensor = Tensor::zeros([(num_parameters + tail_len) as i64], (Kind::Float, Device::Cpu));
        if !device.is_cuda() {
            return Self { tensor, num_parameters };
        }
        let pinned = tensor.f_pin_memory(device);
        let tensor = pinned.unwrap_or_else(|error| {
            tracing::warn!("the memory that gradients are exchanged in cannot be pinned, copies from and to the GPU take longer: {error}");
            tensor
        });
        Self { tensor, num_parameters }
    }

    /// The gradient's part, which shares the buffer's memory.
    pub fn gradient(&self) -> Tensor {
        self.tensor.narrow(0, 0, self.num_parameters as i64)
    }

    /// Everything.
    pub fn values_mut(&mut self) -> &mut [f32] {
        // SAFETY: as many f32 as the tensor holds, contiguous and on the host; who has `&mut self` has made no use of `gradient` since.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast(), self.tensor.numel()) }
    }

    /// What is behind the gradient.
    pub fn tail_mut(&mut self) -> &mut [f32] {
        let num_parameters = self.num_parameters;
        &mut self.values_mut()[num_parameters..]
    }

    /// What is behind the gradient.
    pub fn tail(&self) -> &[f32] {
        // SAFETY: as above; nothing changes the tensor while `self` is borrowed.
        unsafe {
            std::slice::from_raw_parts(
                self.tensor.data_ptr().cast::<f32>().add(self.num_parameters),
                self.tensor.numel() - self.num_parameters,
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_and_tail_lie_behind_each_other_in_one_buffer() {
        let mut wire = Wire::new(3, 2, Device::Cpu);
        wire.gradient().copy_(&Tensor::from_slice(&[1.0_f32, 2.0, 3.0]));
        wire.tail_mut().copy_from_slice(&[4.0, 5.0]);
        assert_eq!(wire.values_mut(), [1.0, 2.0, 3.0, 4.0, 5.0]);
        wire.values_mut()[1] = 7.0;
        assert_eq!((wire.gradient(), wire.tail()), (Tensor::from_slice(&[1.0_f32, 7.0, 3.0]), &[4.0_f32, 5.0][..]));
        assert!(Wire::new(3, 0, Device::Cpu).tail().is_empty());
    }
}
