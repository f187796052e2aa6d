//! From `--device` to a device that can be used, or to what is missing.
//!
//! The program needs libtorch's CPU part alone. Where a GPU is to be used, libtorch_cuda.so is opened before the first call of libtorch,
//! which looks for its CUDA part once and remembers a "no".

mod claim;
pub mod nccl_settings;
pub mod usage;

use std::fmt;
use std::str::FromStr;

use claim::{Claim, Claims};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use peapod_collective::nccl::{self, Driver};
use peapod_kernels::Mode;
use tch::Device;

/// libtorch's CUDA part, in the folder of the CPU part.
const CUDA_LIBRARY: &str = "libtorch_cuda.so";
/// Who starts several workers on a host says here which of them this is.
const LOCAL_RANKS: [&str; 3] = ["PEAPOD_LOCAL_RANK", "LOCAL_RANK", "SLURM_LOCALID"];

/// What `--device` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// A GPU where there is one, else the processor.
    Auto,
    /// The processor.
    Cpu,
    /// A GPU; without a number the one of this worker's local rank.
    Cuda(Option<usize>),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(None)),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(Some(ordinal))),
            _ => Err("give auto, cpu, cuda (the GPU of this worker's local rank) or cuda:N".into()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(ordinal)) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What networks compute with on a GPU.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct KernelArgs {
    /// Operators on a GPU: fused where this program has kernels of its own, or libtorch's alone
    #[arg(long, env = "PEAPOD_KERNELS", value_enum, default_value_t = Kernels::Fused, hide_possible_values = true, value_name = "fused|plain")]
    pub kernels: Kernels,
    /// Attention on a GPU: the implementation that is tried first [default: libtorch's choice]
    #[arg(long, env = "PEAPOD_ATTENTION", value_enum, value_name = "flash|cudnn|efficient", hide_possible_values = true)]
    pub attention: Option<Attention>,
    /// On a GPU, lets cuDNN try all its algorithms for each new shape of a convolution: minutes at the start for some per cent later
    #[arg(long, env = "PEAPOD_CUDNN_BENCHMARK")]
    pub cudnn_benchmark: bool,
}

/// Where a subcommand computes, and with how much of it.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct ComputeArgs {
    /// Device: auto, cpu, cuda or cuda:N
    #[arg(long, env = "PEAPOD_DEVICE", default_value = "auto")]
    pub device: Choice,
    /// What networks compute with
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// Threads for pictures, and for tensor work on the CPU [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub threads: Option<u32>,
}

impl ComputeArgs {
    /// Has libtorch share its work on the CPU among the threads; returns how many they are.
    pub fn settle_threads(&self) -> usize {
        let threads = self.threads.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), |threads| threads as usize);
        tch::set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX));
        threads
    }
}

/// Whose attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attention {
    /// FlashAttention.
    Flash,
    /// That of cuDNN.
    Cudnn,
    /// The memory-efficient one.
    Efficient,
}

/// Whose operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kernels {
    /// This program's where it has some, else libtorch's.
    Fused,
    /// libtorch's.
    Plain,
}

impl KernelArgs {
    /// Says what networks that are loaded from here on compute with. The device is open: libtorch is asked.
    pub fn settle(self, device: Device) {
        peapod_kernels::set_mode(match self.kernels {
            Kernels::Fused => Mode::Fused,
            Kernels::Plain => Mode::Plain,
        });
        if let Some(attention) = self.attention {
            let attention = match attention {
                Attention::Flash => peapod_kernels::Attention::Flash,
                Attention::Cudnn => peapod_kernels::Attention::Cudnn,
                Attention::Efficient => peapod_kernels::Attention::Efficient,
            };
            if let Err(error) = peapod_kernels::prefer_attention(attention, device) {
                tracing::warn!("--attention has no effect: {error}");
            }
        }
        if device.is_cuda() {
            tch::Cuda::cudnn_set_benchmark(self.cudnn_benchmark);
        }
    }
}

/// Whether a GPU is this process's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Any: nothing is said of who else uses it.
    Ignored,
    /// No other worker of this host may have it, and of several the first free one is taken.
    Refused,
    /// Workers may share one. Local ranks beyond the last GPU begin again at the first one.
    Allowed,
}

/// Opens what was chosen. Must come before the first call of libtorch.
///
/// # Errors
/// One line that says what is missing and what to do.
pub fn open(choice: Choice, sharing: Sharing) -> Result<Device, String> {
    let ordinal = match choice {
        Choice::Cpu => return Ok(Device::Cpu),
        Choice::Auto if Driver::is_absent() => {
            tracing::debug!("no GPU: working on the CPU");
            return Ok(Device::Cpu);
        }
        Choice::Cuda(ordinal) => ordinal,
        Choice::Auto => None,
    };
    let local_rank = local_rank(|name| std::env::var(name).ok())?;
    let opened = Driver::probe()
        .map_err(|error| error.to_string())
        .and_then(|driver| pick(ordinal, local_rank, driver.num_devices, sharing))
        .and_then(|picked| claim(picked, sharing))
        .and_then(open_cuda);
    // A GPU that cannot be used is no reason to train for weeks on the processor.
    opened.map(Device::Cuda).map_err(|problem| format!("--device {choice}: {problem}; or use --device cpu"))
}

/// How a device is called on the command line and in reports.
#[must_use]
pub fn name(device: Device) -> String {
    match device {
        Device::Cuda(ordinal) => format!("cuda:{ordinal}"),
        Device::Cpu => "cpu".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// A device with its maker's name, such as `cuda:0 (NVIDIA H200)`, as far as the system tells it.
#[must_use]
pub fn full_name(device: Device) -> String {
    let made = match device {
        Device::Cuda(ordinal) => nccl::device_name(ordinal).ok(),
        _ => cpu_name(),
    };
    let name = name(device);
    made.map_or_else(|| name.clone(), |made| format!("{name} ({made})"))
}

/// What the first core calls itself.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let (_, name) = text.lines().find(|line| line.starts_with("model name"))?.split_once(':')?;
    Some(name.trim().to_owned())
}

fn local_rank(variable: impl Fn(&str) -> Option<String>) -> Result<Option<usize>, String> {
    let Some((name, value)) = LOCAL_RANKS.into_iter().find_map(|name| Some((name, variable(name)?))) else { return Ok(None) };
    value.parse().map(Some).map_err(|_| format!("{name}={value} is not a number: it says which of a host's workers this is"))
}

/// Which GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Picked {
    /// This one.
    This(usize),
    /// Any of so many.
    AnyOf(usize),
}

/// Which GPU: the one asked for, or that of the local rank, or any.
fn pick(ordinal: Option<usize>, local_rank: Option<usize>, num_devices: usize, sharing: Sharing) -> Result<Picked, String> {
    let last = num_devices.saturating_sub(1);
    match (ordinal, local_rank) {
        (Some(ordinal), _) if ordinal >= num_devices => {
            Err(format!("there is no such device: the driver shows {num_devices}, from cuda:0 to cuda:{last}"))
        }
        (Some(ordinal), _) => Ok(Picked::This(ordinal)),
        // Who gives each worker a GPU of its own, and shows it no other, counts workers all the same.
        (None, Some(_)) if num_devices == 1 => Ok(Picked::This(0)),
        (None, Some(rank)) if rank < num_devices => Ok(Picked::This(rank)),
        (None, Some(rank)) if sharing == Sharing::Allowed => Ok(Picked::This(rank % num_devices)),
        (None, Some(rank)) => {
            Err(format!("local rank {rank} on a host with {num_devices} GPU(s): start fewer workers here, or add --allow-shared-gpu"))
        }
        (None, None) if sharing == Sharing::Ignored => Ok(Picked::This(0)),
        (None, None) => Ok(Picked::AnyOf(num_devices)),
    }
}

/// Claims a GPU until the process ends.
fn claim(picked: Picked, sharing: Sharing) -> Result<usize, String> {
    let (claims, uuid_of) = (Claims::default(), |ordinal| nccl::uuid(ordinal).map_err(|error| error.to_string()));
    let claimed: Option<(usize, Claim)> = match picked {
        Picked::This(ordinal) if sharing == Sharing::Ignored => return Ok(ordinal),
        Picked::This(ordinal) => claims.take(uuid_of(ordinal)?).map(|claim| (ordinal, claim)),
        Picked::AnyOf(num_devices) => claims.take_first(num_devices, uuid_of)?,
    };
    match (claimed, picked) {
        (Some((ordinal, claim)), _) => {
            // Until the process ends.
            std::mem::forget(claim);
            Ok(ordinal)
        }
        (None, Picked::This(ordinal)) if sharing == Sharing::Allowed => Ok(ordinal),
        (None, Picked::AnyOf(num_devices)) if sharing == Sharing::Allowed => Ok(std::process::id() as usize % num_devices),
        (None, Picked::This(ordinal)) => Err(format!(
            "another worker on this host has the GPU cuda:{ordinal}: give each a --device cuda:N of its own, or start all workers with \
             --allow-shared-gpu"
        )),
        (None, Picked::AnyOf(num_devices)) => Err(format!(
            "other workers on this host have its {num_devices} GPU(s): start fewer workers here, or all of them with --allow-shared-gpu"
        )),
    }
}

/// Opens libtorch's CUDA part and asks it for the GPU.
fn open_cuda(ordinal: usize) -> Result<usize, String> {
    // SAFETY: the library is libtorch's own; its initialisers register it with the part that is loaded already.
    let library = unsafe { Library::open(Some(CUDA_LIBRARY), RTLD_NOW | RTLD_GLOBAL) }.map_err(|error| {
        format!(
            "this libtorch has no CUDA part ({error}): it was set up on a machine without an NVIDIA driver; remove .libtorch and run \
             `make setup` here"
        )
    })?;
    // It registers functions that libtorch calls until the process ends.
    std::mem::forget(library);
    if !tch::Cuda::is_available() {
        return Err("libtorch finds no GPU that it can use, though the driver shows one: see nvidia-smi".into());
    }
    // cuDNN compiles some of its attentions, and dies where it does not find the compiler by its name; whoever needs none goes on.
    if let Err(error) = peapod_kernels::open_compiler() {
        tracing::warn!("{error}; cuDNN needs it for attention");
    }
    Ok(ordinal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_as_they_are_written() {
        for (text, choice) in
            [("auto", Choice::Auto), ("cpu", Choice::Cpu), ("cuda", Choice::Cuda(None)), ("cuda:3", Choice::Cuda(Some(3)))]
        {
            assert_eq!(text.parse(), Ok(choice));
            assert_eq!(choice.to_string(), text);
        }
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", ""] {
            assert!(text.parse::<Choice>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn each_worker_of_a_host_gets_a_gpu_of_its_own() {
        use Picked::{AnyOf, This};
        use Sharing::{Allowed, Ignored, Refused};
        assert_eq!(pick(None, None, 2, Refused), Ok(AnyOf(2)));
        assert_eq!(pick(None, None, 2, Ignored), Ok(This(0)), "what is no worker takes none away");
        assert_eq!(pick(None, Some(1), 2, Refused), Ok(This(1)));
        assert_eq!(pick(Some(0), Some(1), 2, Refused), Ok(This(0)), "what is asked for stands");
        assert_eq!(pick(None, Some(3), 1, Refused), Ok(This(0)), "the only one that it is shown");
        assert!(pick(None, Some(2), 2, Refused).unwrap_err().contains("local rank 2 on a host with 2 GPU(s)"));
        assert_eq!(pick(None, Some(3), 2, Allowed), Ok(This(1)));
        assert!(pick(Some(2), None, 2, Allowed).unwrap_err().contains("from cuda:0 to cuda:1"));
    }

    #[test]
    fn local_rank_is_what_the_starter_says() {
        let with = |set: &'static [(&str, &str)]| {
            local_rank(move |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(with(&[]), Ok(None));
        assert_eq!(with(&[("SLURM_LOCALID", "3")]), Ok(Some(3)));
        assert_eq!(with(&[("SLURM_LOCALID", "3"), ("PEAPOD_LOCAL_RANK", "1")]), Ok(Some(1)));
        assert!(with(&[("LOCAL_RANK", "one")]).unwrap_err().contains("LOCAL_RANK=one"));
    }

    #[test]
    fn without_a_gpu_auto_is_the_cpu_and_cuda_says_what_is_missing() {
        // Where there is a GPU, tests/gpu/run.sh looks at the other side.
        if !Driver::is_absent() {
            eprintln!("not tested: this machine has a GPU");
            return;
        }
        assert_eq!(open(Choice::Auto, Sharing::Refused), Ok(Device::Cpu));
        let problem = open(Choice::Cuda(Some(0)), Sharing::Refused).unwrap_err();
        assert!(
            problem.starts_with("--device cuda:0: cannot use the NVIDIA driver: ") && problem.ends_with("use --device cpu"),
            "{problem}"
        );
    }
}
