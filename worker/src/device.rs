//! From `--device` to a device that can be used, or to what is missing.
//!
//! The program needs libtorch's CPU part alone. Where a GPU is to be used, libtorch_cuda.so is opened before the first call of libtorch, which
//! looks for its CUDA part once and remembers a "no".

use std::fmt;
use std::str::FromStr;

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
    /// A GPU where one can be used, else the processor.
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
    #[arg(long, default_value = "auto")]
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

/// Opens what was chosen. Must come before the first call of libtorch. With `share_gpus`, local ranks beyond the last GPU begin again at the
/// first one.
///
/// # Errors
/// One line that says what is missing and what to do.
pub fn open(choice: Choice, share_gpus: bool) -> Result<Device, String> {
    let ordinal = match choice {
        Choice::Cpu => return Ok(Device::Cpu),
        Choice::Cuda(ordinal) => ordinal,
        Choice::Auto => None,
    };
    let local_rank = local_rank(|name| std::env::var(name).ok())?;
    let opened = Driver::probe()
        .map_err(|error| error.to_string())
        .and_then(|driver| pick(ordinal, local_rank, driver.num_devices, share_gpus))
        .and_then(open_cuda);
    match (opened, choice) {
        (Ok(ordinal), _) => Ok(Device::Cuda(ordinal)),
        (Err(problem), Choice::Auto) => {
            tracing::debug!("training on the CPU: {problem}");
            Ok(Device::Cpu)
        }
        (Err(problem), _) => Err(format!("--device {choice}: {problem}; or use --device cpu")),
    }
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

/// Which GPU: the one asked for, or that of the local rank.
fn pick(ordinal: Option<usize>, local_rank: Option<usize>, num_devices: usize, share_gpus: bool) -> Result<usize, String> {
    let wanted = ordinal.or(local_rank).unwrap_or(0);
    let picked = if ordinal.is_none() && share_gpus { wanted % num_devices } else { wanted };
    if picked < num_devices {
        return Ok(picked);
    }
    let last = num_devices - 1;
    Err(match ordinal {
        Some(_) => format!("there is no such device: the driver shows {num_devices}, from cuda:0 to cuda:{last}"),
        None => format!("local rank {wanted} on a host with {num_devices} GPU(s): start fewer workers here, or add --allow-shared-gpu"),
    })
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
        assert_eq!(pick(None, None, 2, false), Ok(0));
        assert_eq!(pick(None, Some(1), 2, false), Ok(1));
        assert_eq!(pick(Some(0), Some(1), 2, false), Ok(0), "what is asked for stands");
        assert!(pick(None, Some(2), 2, false).unwrap_err().contains("local rank 2 on a host with 2 GPU(s)"));
        assert_eq!(pick(None, Some(3), 2, true), Ok(1));
        assert!(pick(Some(2), None, 2, true).unwrap_err().contains("from cuda:0 to cuda:1"));
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
        if Driver::probe().is_ok() {
            return;
        }
        assert_eq!(open(Choice::Auto, false), Ok(Device::Cpu));
        let problem = open(Choice::Cuda(Some(0)), false).unwrap_err();
        assert!(
            problem.starts_with("--device cuda:0: cannot use the NVIDIA driver: ") && problem.ends_with("use --device cpu"),
            "{problem}"
        );
    }
}
