//! What the members of a generation sum up in a step: the gradient, and the tail behind it.

use std::ptr::NonNull;
use std::time::Instant;

use peapod_collective::{Collective, DeviceValues, Error, Values};
use tch::{Device, Kind, TchError, Tensor};

/// The buffer that a collective works on, and what of it is made elsewhere: on a GPU the tail, or the gradient where the collective sums on
/// the host.
pub(crate) struct Wire {
    /// f32: first the gradient, then the tail.
    buffer: Tensor,
    /// Where the gradient is computed.
    gradient: Tensor,
    /// On the host.
    tail: Tensor,
    /// A part of the buffer, and what it is a copy of.
    apart: Option<(Tensor, Tensor)>,
}

/// What is not a part of the buffer.
enum Apart {
    Nothing,
    Gradient,
    Tail,
}

impl Wire {
    /// For a gradient on `device`; all is zero. `sums_on_device` says whether the collective can sum it there.
    pub fn new(num_parameters: usize, tail_len: usize, device: Device, sums_on_device: bool) -> Self {
        let (place, apart) = match device {
            Device::Cpu => (Device::Cpu, Apart::Nothing),
            device if sums_on_device => (device, Apart::Tail),
            _ => (Device::Cpu, Apart::Gradient),
        };
        Self::assemble(num_parameters as i64, tail_len as i64, device, place, &apart)
    }

    fn assemble(num_parameters: i64, tail_len: i64, device: Device, place: Device, apart: &Apart) -> Self {
        let zeros = |length, place: Device| {
            let zeros = Tensor::zeros([length], (Kind::Float, place));
            if device.is_cuda() && place == Device::Cpu && length > 0 { pinned(zeros) } else { zeros }
        };
        let buffer = zeros(num_parameters + tail_len, place);
        let (gradient, tail) = (buffer.narrow(0, 0, num_parameters), buffer.narrow(0, num_parameters, tail_len));
        let (gradient, tail, apart) = match apart {
            Apart::Nothing => (gradient, tail, None),
            Apart::Gradient => {
                let own = zeros(num_parameters, device);
                (own.shallow_clone(), tail, Some((gradient, own)))
            }
            Apart::Tail => {
                let own = zeros(tail_len, Device::Cpu);
                (gradient, own.shallow_clone(), Some((tail, own)))
            }
        };
        Self { buffer, gradient, tail, apart }
    }

    /// f32 `[P]` on the device: what is to be summed, and after [`Wire::sum`] the sum.
    pub fn gradient(&mut self) -> &mut Tensor {
        &mut self.gradient
    }

    /// What is behind the gradient, likewise.
    pub fn tail_mut(&mut self) -> &mut [f32] {
        // SAFETY: as many f32 as the tensor holds, contiguous and on the host; the tensors that share them are used under `&mut self`
        // alone.
        unsafe { std::slice::from_raw_parts_mut(start(&self.tail), self.tail.numel()) }
    }

    /// What is behind the gradient, likewise.
    pub fn tail(&self) -> &[f32] {
        // SAFETY: as above; nothing changes the tensor while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(start(&self.tail), self.tail.numel()) }
    }

    /// Makes all of it zero.
    ///
    /// # Errors
    /// [`Error::Gpu`], of a GPU that is out of order.
    pub fn clear(&mut self) -> Result<(), Error> {
        let zero = |tensor: &mut Tensor| tensor.f_zero_().map(drop).map_err(failed("clear the memory of the gradient"));
        zero(&mut self.buffer)?;
        self.apart.as_mut().map_or(Ok(()), |(_, own)| zero(own))
    }

    /// Sums gradient and tail over all members.
    ///
    /// # Errors
    /// The collective's; [`Error::Gpu`], of a GPU that is out of order.
    pub fn sum(&mut self, collective: &mut dyn Collective, deadline: Instant) -> Result<(), Error> {
        if let Some((part, own)) = &mut self.apart {
            part.f_copy_(own).map_err(failed("copy to where the gradient is summed"))?;
        }
        let num_values = self.buffer.numel();
        if let Device::Cuda(ordinal) = self.buffer.device() {
            let stream = peapod_kernels::current_stream(ordinal)
                .map_err(|error| Error::Gpu { doing: "find out libtorch's stream", answer: error.to_string() })?;
            let (address, stream) = (self.buffer.data_ptr().addr() as u64, stream.addr() as u64);
            // SAFETY: the buffer lies on the GPU that the communicator was built on, and this thread makes no use of it until the call
            // returns.
            let values = unsafe { DeviceValues::new(address, num_values, stream) };
            collective.all_reduce_sum_in(Values::Device(values), deadline)?;
        } else {
            // SAFETY: as many f32 as the tensor holds, contiguous and on the host; `&mut self` keeps others from them.
            let values = unsafe { std::slice::from_raw_parts_mut(start(&self.buffer), num_values) };
            collective.all_reduce_sum_in(Values::Host(values), deadline)?;
        }
        if let Some((part, own)) = &mut self.apart {
            own.f_copy_(part).map_err(failed("copy from where the gradient was summed"))?;
        }
        Ok(())
    }
}

/// Where the values of a tensor on the host begin; not null for one without values, as libtorch has it.
fn start(tensor: &Tensor) -> *mut f32 {
    NonNull::new(tensor.data_ptr().cast()).unwrap_or(NonNull::dangling()).as_ptr()
}

fn failed(doing: &'static str) -> impl FnOnce(TchError) -> Error {
    move |error| Error::Gpu { doing, answer: error.to_string() }
}

/// The same on pages that a GPU copies from and to by itself. Where the system pins no more memory, copies take longer and nothing else
/// changes.
fn pinned(tensor: Tensor) -> Tensor {
    peapod_kernels::pinned(&tensor).unwrap_or_else(|error| {
        tracing::warn!("the memory that gradients are exchanged in cannot be pinned, copies from and to the GPU take longer: {error}");
        tensor
    })
}

#[cfg(test)]
mod tests {
    use peapod_collective::AbortHandle;

    use super::*;

    /// Whose sum is twice what it is given.
    struct Twice;

    impl Collective for Twice {
        fn member_index(&self) -> u32 {
            0
        }

        fn num_members(&self) -> u32 {
            2
        }

        fn all_reduce_sum_in(&mut self, values: Values<'_>, _: Instant) -> Result<(), Error> {
            let Values::Host(values) = values else { panic!("there is no device") };
            values.iter_mut().for_each(|value| *value *= 2.0);
            Ok(())
        }

        fn broadcast(&mut self, _: &mut [u8], _: u32, _: Instant) -> Result<(), Error> {
            Ok(())
        }

        fn barrier(&mut self, _: Instant) -> Result<(), Error> {
            Ok(())
        }

        fn abort_handle(&self) -> AbortHandle {
            AbortHandle::new()
        }
    }

    #[test]
    fn gradient_and_tail_are_summed_in_one_call_wherever_they_are_made() {
        for apart in [Apart::Nothing, Apart::Gradient, Apart::Tail] {
            let mut wire = Wire::assemble(3, 2, Device::Cpu, Device::Cpu, &apart);
            wire.gradient().copy_(&Tensor::from_slice(&[1.0_f32, 2.0, 3.0]));
            wire.tail_mut().copy_from_slice(&[4.0, 5.0]);
            wire.sum(&mut Twice, Instant::now()).unwrap();
            assert_eq!(wire.buffer, Tensor::from_slice(&[2.0_f32, 4.0, 6.0, 8.0, 10.0]));
            assert_eq!((wire.gradient().shallow_clone(), wire.tail()), (Tensor::from_slice(&[2.0_f32, 4.0, 6.0]), &[8.0_f32, 10.0][..]));
            wire.clear().unwrap();
            assert_eq!((wire.gradient().shallow_clone(), wire.tail()), (Tensor::zeros_like(&wire.gradient), &[0.0_f32, 0.0][..]));
            wire.sum(&mut Twice, Instant::now()).unwrap();
            assert_eq!(wire.buffer, Tensor::from_slice(&[0.0_f32; 5]));
        }
        assert!(Wire::new(3, 0, Device::Cpu, true).tail().is_empty());
    }
}
