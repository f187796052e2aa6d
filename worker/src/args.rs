//! Command-line arguments of `worker`.

use std::time::Duration;

use clap::{Parser, Subcommand};
use peapod_collective::tcp::Ports;
use peapod_proto::ids::Rank;
use peapod_proto::program::{LogArgs, Pages};
use peapod_proto::secure::{Access, AccessArgs};

use crate::device::{Choice, KernelArgs};
use crate::precompute;
use crate::shards::{inspect, make};
use crate::{bench, check, fetch, loss_error, vae_error};

/// Trains with others on one device: start one for each GPU of a job.
#[derive(Debug, Clone, Parser)]
#[command(name = "worker", version, long_version = crate::build::facts(), args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What else to do than to train.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to train.
    #[command(flatten)]
    pub run: Args,
    /// How log lines look.
    #[command(flatten)]
    pub logs: LogArgs,
}

/// Everything but training.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Compare a job's models by configurations and shapes, load nothing
    Check(check::Options),
    /// Fetch models from the model hub into this machine's cache
    Fetch(fetch::Options),
    /// Look into shards, or make them
    #[command(subcommand)]
    Shards(Shards),
    /// Make shards that hold what a job's frozen encoders say of its pictures, so that training need not
    Precompute(precompute::Options),
    /// Time a training step by its stages, on batches made beforehand
    Bench(bench::Options),
    /// Compare what an autoencoder makes of your own pictures in fewer bits
    VaeError(vae_error::Options),
    /// Compare a job's losses and gradient on its own samples with networks in fewer bits
    LossError(loss_error::Options),
    /// Completions and manual pages
    #[command(flatten)]
    Pages(Pages),
}

/// What to do with shards.
#[derive(Debug, Clone, Subcommand)]
pub enum Shards {
    /// Count samples, sizes, buckets, captions and what is broken in them, as a job would see them
    Inspect(inspect::Options),
    /// Make webdataset shards of pictures and a table of captions
    Make(make::Options),
}

/// How to train.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Address of the coordinator, such as http://master:7733; with --join, in place of the one in the string
    #[arg(long, env = "PEAPOD_COORDINATOR")]
    pub coordinator: Option<String>,
    /// How to be let in
    #[command(flatten)]
    pub access: AccessArgs,
    /// Rank to ask for; without it, any free one
    #[arg(long, env = "PEAPOD_RANK")]
    pub rank: Option<u32>,
    /// Device to train on: cpu, cuda:N, cuda (the GPU of PEAPOD_LOCAL_RANK, LOCAL_RANK or SLURM_LOCALID, else the first that no other
    /// worker has), or auto (that GPU if this machine has any)
    #[arg(long, env = "PEAPOD_DEVICE", default_value = "auto")]
    pub device: Choice,
    /// What networks compute with
    #[command(flatten)]
    pub kernels: KernelArgs,
    /// On a GPU, encodes the next pictures and captions on a second stream, beside the step before theirs; takes more of its memory
    #[arg(long, env = "PEAPOD_ENCODE_AHEAD")]
    pub encode_ahead: bool,
    /// Lets two workers of a job train on the same GPU
    #[arg(long, env = "PEAPOD_ALLOW_SHARED_GPU")]
    pub allow_shared_gpu: bool,
    /// Threads for tensor work on the CPU: they share the samples of a micro-batch if there are enough [default: all cores]
    #[arg(long)]
    pub threads: Option<u32>,
    /// How long to look for the coordinator, which may start later than this worker [default: 10m; for one that was lost, its
    /// --join-timeout]
    #[arg(long, value_parser = humantime::parse_duration)]
    pub connect_timeout: Option<Duration>,
    /// Leaves models, generations and steps out of the log: whoever started this worker tells of them, as `coordinator --local` does
    #[arg(long)]
    pub quiet: bool,
    /// Address under which the other workers reach this one [default: the one that reaches the coordinator]
    #[arg(long, env = "PEAPOD_ADVERTISE")]
    pub advertise: Option<std::net::IpAddr>,
    /// Ports on which the other workers call this one, such as 7800-7807: the first free one is taken, so that a host needs as many as it
    /// has workers. NCCL chooses its own [default: any]
    #[arg(long, env = "PEAPOD_PORTS", value_name = "A-B")]
    pub ports: Option<Ports>,
}

/// How long a coordinator may take to appear: as long as one waits for its workers by default (--join-timeout), whoever starts first.
const FIRST_PATIENCE: Duration = Duration::from_secs(600);
/// How long one that was lost may be away at the least.
const SHORTEST_PATIENCE: Duration = Duration::from_secs(60);

impl Args {
    /// Checks ranges, and reads what it takes to be let in.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn validate(&self) -> Result<Access, String> {
        if self.coordinator.is_none() && self.access.join.is_none() {
            return Err("give --join STRING, as the coordinator printed it, or --coordinator http://HOST:7733".into());
        }
        let access = Access::new(self.coordinator.as_deref(), &self.access)?;
        if self.threads == Some(0) {
            return Err("--threads must be at least 1".into());
        }
        Ok(access)
    }

    /// How long to look for the coordinator; `lost` is the join timeout of one that was found before.
    #[must_use]
    pub fn patience(&self, lost: Option<Duration>) -> Duration {
        self.connect_timeout.unwrap_or_else(|| lost.map_or(FIRST_PATIENCE, |join_timeout| join_timeout.max(SHORTEST_PATIENCE)))
    }

    /// The rank to ask for.
    #[must_use]
    pub fn requested_rank(&self) -> Option<Rank> {
        self.rank.map(Rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let parse = |arguments: &[&str]| Cli::try_parse_from(["worker"].iter().chain(arguments)).unwrap().run.validate();
        assert!(parse(&["--coordinator", "http://a:1"]).is_ok());
        assert!(parse(&["--coordinator", "a:1"]).unwrap_err().contains("http://master:7733"));
        assert!(parse(&["--coordinator", "https://a:1"]).unwrap_err().contains("needs --join STRING"));
        let refused = Cli::try_parse_from(["worker", "--coordinator", "http://a:1", "--device", "gpu"]).unwrap_err().to_string();
        assert!(refused.contains("cuda:N"), "{refused}");
    }

    #[test]
    fn coordinator_is_awaited_as_long_as_it_waits_itself() {
        let patience = |arguments: &[&str], lost| {
            let all = ["worker", "--coordinator", "http://a:1"].iter().chain(arguments);
            Cli::try_parse_from(all).unwrap().run.patience(lost).as_secs()
        };
        let minutes = |minutes: u64| Some(Duration::from_secs(60 * minutes));
        assert_eq!((patience(&[], None), patience(&[], minutes(30)), patience(&[], Some(Duration::from_secs(2)))), (600, 1800, 60));
        assert_eq!(patience(&["--connect-timeout", "5s"], minutes(30)), 5);
    }

    /// What a host knows of its own network is set where the host is set up, not in the command that is the same on all.
    #[test]
    fn where_others_reach_a_worker_can_be_set_by_its_host() {
        use clap::CommandFactory;
        let command = Cli::command();
        let variable = |id: &str| command.get_arguments().find(|argument| argument.get_id() == id).and_then(|argument| argument.get_env());
        assert_eq!(variable("advertise"), Some("PEAPOD_ADVERTISE".as_ref()));
        assert_eq!(variable("ports"), Some("PEAPOD_PORTS".as_ref()));
        let parse = |ports: &str| Cli::try_parse_from(["worker", "--coordinator", "http://a:1", "--ports", ports]);
        assert_eq!(parse("7800-7807").unwrap().run.ports, "7800-7807".parse().ok());
        let refused = parse("7807-7800").unwrap_err().to_string();
        assert!(refused.contains("is no range of ports, such as 7800-7807"), "{refused}");
    }

    #[test]
    fn operators_are_chosen_by_name() {
        use crate::device::{Attention, Kernels};
        let parse = |arguments: &[&str]| Cli::try_parse_from(["worker", "--coordinator", "http://a:1"].iter().chain(arguments));
        let KernelArgs { kernels, attention, cudnn_benchmark } = parse(&[]).unwrap().run.kernels;
        assert_eq!((kernels, attention, cudnn_benchmark), (Kernels::Fused, None, false));
        let KernelArgs { kernels, attention, cudnn_benchmark } =
            parse(&["--kernels", "plain", "--attention", "cudnn", "--cudnn-benchmark"]).unwrap().run.kernels;
        assert_eq!((kernels, attention, cudnn_benchmark), (Kernels::Plain, Some(Attention::Cudnn), true));
        let refused = parse(&["--kernels", "mine"]).unwrap_err().to_string();
        assert!(refused.contains("--kernels <fused|plain>"), "{refused}");
    }

    #[test]
    fn training_needs_an_address_and_a_check_does_not() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let parse = |arguments: &[&str]| Cli::try_parse_from(["worker"].iter().chain(arguments));
        let check = parse(&["check", "--job", "a.toml"]).unwrap();
        assert!(
            matches!(check.command, Some(Command::Check(check::Options { job, partial: false, .. })) if job.job.as_os_str() == "a.toml")
        );
        assert!(parse(&[]).unwrap().run.validate().unwrap_err().starts_with("give --join STRING"));
        assert!(parse(&["--coordinator", "http://a:1", "check"]).is_err());
    }
}
