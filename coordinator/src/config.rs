//! Command-line arguments, and what they come to once they are checked.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use peapod_proto::DEFAULT_PORT;

use crate::web::HttpAddr;

/// What somebody who has no time reads.
const AFTER_HELP: &str = "\
Examples:
  coordinator --world-size 2 --local                  one machine, one command; reads ./job.toml
  coordinator --world-size 8 --listen 0.0.0.0:7733    workers on other hosts join it: the log says how
  coordinator status --watch                          what it does, again every second
  coordinator stop                                    end the job with a checkpoint
  coordinator checkpoints export DIR                  the newest adapter

Exit codes: 0 finished, 1 failed (the last line says which rank, host, phase and why), 2 bad arguments or job file,
130 and 143 stopped by Ctrl-C and SIGTERM. The same command goes on with a job that was stopped or killed.";

/// Coordinates the workers of a Peapod job: distils an English SDXL into another language on many GPUs.
#[derive(Debug, Parser)]
#[command(name = "coordinator", version, long_version = crate::build::facts(), after_help = AFTER_HELP)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    /// What else to do than to run a job.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// How to run a job.
    #[command(flatten)]
    pub run: RunArgs,
    /// Log lines for people, or JSON, one object a line
    #[arg(
        long,
        global = true,
        env = "PEAPOD_LOG_FORMAT",
        value_enum,
        default_value_t,
        hide_possible_values = true,
        value_name = "pretty|json"
    )]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// For machines.
    Json,
}

/// Everything but running a job.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a job file with every field explained
    Init {
        /// Write the demo's job instead
        #[arg(long)]
        demo: bool,
        /// File to write; it must not exist
        #[arg(default_value = "job.toml")]
        path: PathBuf,
    },
    /// Check a job file, its shard list and its models' shapes, start nothing
    Check {
        /// Job file
        #[arg(long, default_value = "job.toml")]
        job: PathBuf,
    },
    /// List a job's checkpoints, or copy an adapter out of one
    Checkpoints {
        /// What to do with them.
        #[command(subcommand)]
        command: Checkpoints,
    },
    /// The same as `checkpoints export`
    #[command(hide = true)]
    Export(ExportArgs),
    /// Print completions for a shell, to be sourced: `source <(coordinator completions bash)`
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// Show what a running job is doing
    Status {
        /// Which coordinator
        #[command(flatten)]
        target: Target,
        /// Show each shard too: who reads it, what became of its samples
        #[arg(long)]
        shards: bool,
        /// With --shards: of this source only
        #[arg(long, value_name = "NAME", requires = "shards")]
        source: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Show it again every second, until Ctrl-C
        #[arg(long, conflicts_with = "shards")]
        watch: bool,
    },
    /// End a running job with a checkpoint
    Stop {
        /// Which coordinator
        #[command(flatten)]
        target: Target,
    },
    /// Let one worker finish its step and leave
    Drain {
        /// Its rank
        rank: u32,
        /// Which coordinator
        #[command(flatten)]
        target: Target,
    },
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum Checkpoints {
    /// List the whole ones, oldest first
    List {
        /// Where they are
        #[command(flatten)]
        store: StoreArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Copy an adapter, as the published Python scripts load it: DIR/proj_0_STEP/pytorch_model.bin
    Export(ExportArgs),
}

/// Where a job keeps its checkpoints.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Where the job keeps its checkpoints
    #[arg(long, value_name = "DIR", default_value = "peapod-state/checkpoints")]
    pub checkpoints: PathBuf,
}

/// Which adapter goes where.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Where it is
    #[command(flatten)]
    pub store: StoreArgs,
    /// Step of the checkpoint [default: the newest]
    #[arg(long)]
    pub step: Option<u64>,
    /// Folder to write to
    #[arg(value_name = "DIR")]
    pub out: PathBuf,
}

/// A running coordinator.
#[derive(Debug, Args)]
pub struct Target {
    /// Address of the coordinator
    #[arg(long, env = "PEAPOD_COORDINATOR", default_value = "http://127.0.0.1:7733")]
    pub coordinator: String,
}

/// How to run a job.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Number of workers, one a GPU
    #[arg(long, required = true, default_value_t = 0, hide_default_value = true)]
    pub world_size: u32,
    /// Workers that are enough to train: the world grows and shrinks between this and --world-size [default: --world-size]
    #[arg(long)]
    pub min_world_size: Option<u32>,
    /// Job file
    #[arg(long, default_value = "job.toml")]
    pub job: PathBuf,
    /// Start the workers too, on this machine
    #[arg(long)]
    pub local: bool,
    /// Address to listen on [default: 127.0.0.1:7733; with --local a free port]
    #[arg(long)]
    pub listen: Option<SocketAddr>,
    /// Listen beyond this machine without encryption or authentication
    #[arg(long)]
    pub insecure: bool,
    /// Where to serve the live page, /metrics, /healthz and /readyz, all of which anyone who reaches it can read; `off` for none
    /// [default: 127.0.0.1:7734, or a free port if that is taken]
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    pub http_addr: Option<HttpAddr>,
    /// Folder for checkpoints and logs of this job
    #[arg(long, default_value = "peapod-state")]
    pub state_dir: PathBuf,
    /// Silence after which a worker is dead
    #[arg(long, default_value = "3s", value_parser = humantime::parse_duration)]
    pub heartbeat_timeout: Duration,
    /// How long to wait for missing workers
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    pub join_timeout: Duration,
    /// With --local: how often dead workers are started again between two checkpoints
    #[arg(long, default_value_t = 3)]
    pub max_restarts: u32,
    /// Write one line for each trained sample: step, epoch, shard, index
    #[arg(long)]
    pub sample_log: Option<PathBuf>,
}

/// Most workers a job can have.
const MAX_WORLD_SIZE: u32 = 65_536;

impl RunArgs {
    /// Checks ranges and relations.
    ///
    /// # Errors
    /// One line that names the relation that does not hold.
    pub fn validate(&self) -> Result<(), String> {
        if !(1..=MAX_WORLD_SIZE).contains(&self.world_size) {
            return Err(format!("--world-size {} must be within 1..={MAX_WORLD_SIZE}", self.world_size));
        }
        if let Some(min) = self.min_world_size.filter(|min| !(1..=self.world_size).contains(min)) {
            return Err(format!("--min-world-size {min} must be within 1..={} (--world-size)", self.world_size));
        }
        if self.heartbeat_timeout < Duration::from_millis(100) {
            return Err(format!("--heartbeat-timeout {} must be at least 100ms", humantime::format_duration(self.heartbeat_timeout)));
        }
        if self.join_timeout < self.heartbeat_timeout {
            return Err(format!(
                "--join-timeout {} must be at least --heartbeat-timeout {}",
                humantime::format_duration(self.join_timeout),
                humantime::format_duration(self.heartbeat_timeout)
            ));
        }
        let ip = self.listen_address().ip();
        if !ip.is_loopback() && !self.insecure {
            return Err(format!(
                "--listen {ip} is reachable from other machines, and TLS is not built yet: listen on 127.0.0.1, or add --insecure on a network you trust"
            ));
        }
        Ok(())
    }

    /// Workers that are enough to train.
    #[must_use]
    pub fn min_world_size(&self) -> u32 {
        self.min_world_size.unwrap_or(self.world_size)
    }

    /// Where to listen.
    #[must_use]
    pub fn listen_address(&self) -> SocketAddr {
        let port = if self.local { 0 } else { DEFAULT_PORT };
        self.listen.unwrap_or_else(|| SocketAddr::new(IpAddr::from([127, 0, 0, 1]), port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Result<RunArgs, String> {
        let all = ["coordinator"].iter().chain(arguments);
        let cli = Cli::try_parse_from(all).map_err(|error| error.to_string())?;
        cli.run.validate().map(|()| cli.run)
    }

    #[test]
    fn arguments_form_a_valid_command() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn refusals_name_the_relation() {
        for (arguments, words) in [
            (&["--world-size", "0"][..], "within 1..=65536"),
            (&[], "--world-size"),
            (&["--world-size", "2", "--min-world-size", "3"], "--min-world-size 3 must be within 1..=2 (--world-size)"),
            (&["--world-size", "2", "--min-world-size", "0"], "within 1..=2"),
            (&["--world-size", "2", "--heartbeat-timeout", "10ms"], "at least 100ms"),
            (&["--world-size", "2", "--join-timeout", "1s"], "at least --heartbeat-timeout"),
            (&["--world-size", "2", "--listen", "0.0.0.0:7733"], "--insecure"),
            (&["--world-size", "2", "--heartbeat-timeout", "soon"], "--heartbeat-timeout"),
        ] {
            let error = run(arguments).unwrap_err();
            assert!(error.contains(words), "{arguments:?}: {error}");
        }
        assert!(run(&["--world-size", "2", "--listen", "0.0.0.0:7733", "--insecure"]).is_ok());
    }

    #[test]
    fn local_world_takes_a_free_port() {
        assert_eq!(run(&["--world-size", "2", "--local"]).unwrap().listen_address().port(), 0);
        assert_eq!(run(&["--world-size", "2"]).unwrap().listen_address().port(), DEFAULT_PORT);
    }

    #[test]
    fn subcommands_need_no_world() {
        assert!(Cli::try_parse_from(["coordinator", "status"]).is_ok());
        assert!(Cli::try_parse_from(["coordinator", "drain", "3"]).is_ok());
        assert!(Cli::try_parse_from(["coordinator", "checkpoints", "list", "--json"]).is_ok());
        assert!(Cli::try_parse_from(["coordinator", "status", "--watch", "--log-format", "json"]).is_ok());
    }
}
