//! What a worker needs of its device's memory, as far as shapes tell.

use std::fmt::Write as _;

use peapod_collective::nccl;
use peapod_proto::job::Job;
use tch::{Device, Kind};

use crate::draw::memory::available_bytes;
use crate::numbers;
use crate::shards::size;
use crate::{device, setup};

/// Bytes that stay taken through a whole job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Need {
    /// UNet, English encoders and student, and the name of their numbers.
    networks: (u64, String),
    /// The autoencoder, and the name of its numbers.
    vae: (u64, String),
    /// Weights of the adapter, their gradient, two moments and, if the job keeps one, the moving average.
    adapter: u64,
}

impl Need {
    /// Of a job, from the numbers of parameters.
    pub(super) fn of(job: &Job, device: Device, num_networks: u64, num_vae: u64, num_adapter: usize) -> Self {
        let weights = |num_parameters: u64, kind: Kind, name| (num_parameters * kind.elt_size_in_bytes() as u64, name);
        let (kind, vae_numbers) = (setup::network_kind(job, device), setup::vae_numbers(job, device));
        let num_copies = 4 + u64::from(job.train.ema_decay > 0.0);
        Self {
            networks: weights(num_networks, kind, numbers::name(kind)),
            vae: weights(num_vae, vae_numbers.kind(), vae_numbers.name().to_owned()),
            adapter: num_copies * (num_adapter * size_of::<f32>()) as u64,
        }
    }

    fn num_bytes(&self) -> u64 {
        self.networks.0 + self.vae.0 + self.adapter
    }

    /// Says whether it fits on the device as it is now.
    pub(super) fn report(&self, device: Device) -> String {
        let free = match device {
            Device::Cuda(ordinal) => nccl::memory(ordinal).ok().map(|(free, _)| free),
            _ => available_bytes(),
        };
        self.compare(&device::full_name(device), free)
    }

    fn compare(&self, device: &str, free: Option<u64>) -> String {
        let Self { networks: (networks, numbers), vae: (vae, vae_numbers), adapter } = self;
        let mut text = String::new();
        let _ = writeln!(
            text,
            "memory of a worker on {device}: networks {} in {numbers}, autoencoder {} in {vae_numbers}, adapter with gradient and optimiser {}",
            size(*networks),
            size(*vae),
            size(*adapter)
        );
        let total = size(self.num_bytes());
        let _ = match free {
            Some(free) if free > self.num_bytes() => writeln!(text, "  {total} in all, {} free: fits", size(free)),
            Some(free) => writeln!(text, "  {total} in all, {} free: does not fit", size(free)),
            None => writeln!(text, "  {total} in all; the system does not say what is free"),
        };
        let _ = writeln!(text, "  activations come on top, more with train.micro_batch and the pictures' size: `worker bench` shows them");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A million parameters of networks, half a million of autoencoder, a hundred thousand of adapter.
    fn need(train: &str) -> Need {
        let demo = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/demo/job.toml")).unwrap();
        assert!(demo.contains("[train]\n"));
        let job = Job::parse(&demo.replace("[train]\n", &format!("[train]\n{train}\n"))).unwrap();
        Need::of(&job, Device::Cpu, 1_000_000, 500_000, 100_000)
    }

    #[test]
    fn the_jobs_numbers_and_its_moving_average_count() {
        assert_eq!(need("").num_bytes(), 4_000_000 + 2_000_000 + 1_600_000);
        assert_eq!(need("dtype = \"bf16\"").num_bytes(), 2_000_000 + 2_000_000 + 1_600_000);
        assert_eq!(need("ema_decay = 0.99").num_bytes(), 4_000_000 + 2_000_000 + 2_000_000);
    }

    #[test]
    fn what_does_not_fit_is_said_beside_what_is_free() {
        let need = need("");
        let text = need.compare("cuda:0 (NVIDIA H200)", Some(8_000_000));
        for words in ["on cuda:0 (NVIDIA H200): networks 4.0 MB in f32, autoencoder 2.0 MB in f32", "7.6 MB in all, 8.0 MB free: fits"] {
            assert!(text.contains(words), "{text}");
        }
        assert!(need.compare("cpu", Some(7_000_000)).contains("7.6 MB in all, 7.0 MB free: does not fit\n"));
        assert!(need.compare("cpu", None).contains("does not say what is free"));
    }
}
