//! What a worker says of its memory.

use peapod_collective::nccl;
use peapod_proto::message::{GpuMemory, Memory};
use tch::Device;

use crate::draw::memory::held_bytes;

/// Asks the system what this process holds and, once libtorch has opened the device, the driver what of a GPU is taken. The driver may keep
/// who asks waiting.
#[must_use]
pub fn look(device: Device, is_open: bool) -> Memory {
    let gpu = match device {
        // Asked before that, the driver would open the GPU for this question alone.
        Device::Cuda(ordinal) if is_open => nccl::memory(ordinal).ok(),
        _ => None,
    };
    let gpu = gpu.map(|(free, total)| GpuMemory { used_bytes: total.saturating_sub(free), total_bytes: total });
    Memory { resident_bytes: held_bytes(), gpu }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_without_a_gpu_knows_what_its_process_holds() {
        let Memory { resident_bytes, gpu } = look(Device::Cpu, true);
        assert!(resident_bytes.is_some_and(|bytes| bytes > 1 << 20) && gpu.is_none(), "{resident_bytes:?}");
    }
}
