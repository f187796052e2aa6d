//! Command-line arguments, and what they come to once they are checked.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use peapod_proto::DEFAULT_PORT;
use peapod_proto::job::JobArgs;
use peapod_proto::program::{LogArgs, Pages};
use peapod_proto::secure::AccessArgs;

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
130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP. The same command goes on with a job that was stopped or killed.";

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
    /// How log lines look.
    #[command(flatten)]
    pub logs: LogArgs,
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
    Check(JobArgs),
    /// Print the reference of the job file: every key with its type, default, range and meaning (Markdown)
    Reference,
    /// List a job's checkpoints, or copy an adapter out of one
    Checkpoints {
        /// What to do with them.
        #[command(subcommand)]
        command: Checkpoints,
    },
    /// The same as `checkpoints export`
    #[command(hide = true)]
    Export(ExportArgs),
    /// Completions and manual pages
    #[command(flatten)]
    Pages(Pages),
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
        /// Show it until the job ends, and then how it ended: on a terminal in one place, elsewhere anew for each change
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
    /// Where the job keeps its checkpoints, if the job file names a folder or a store for them [default: checkpoints in --state-dir]
    #[arg(long, value_name = "DIR|URL")]
    pub checkpoints: Option<String>,
    /// The job's --state-dir
    #[arg(long, env = "PEAPOD_STATE_DIR", value_name = "DIR", default_value = "peapod-state")]
    pub state_dir: PathBuf,
}

impl StoreArgs {
    /// The folder, or the store's address.
    #[must_use]
    pub fn address(&self) -> String {
        self.checkpoints.clone().unwrap_or_else(|| self.state_dir.join("checkpoints").display().to_string())
    }

    /// The folder with the job's logs, if the checkpoints are in it; those of a store that is named may be of any job.
    #[must_use]
    pub fn logs(&self) -> Option<&Path> {
        self.checkpoints.is_none().then_some(&self.state_dir)
    }
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
    /// Address of the coordinator [default: the one in --state-dir, or http://127.0.0.1:7733]
    #[arg(long, env = "PEAPOD_COORDINATOR")]
    pub coordinator: Option<String>,
    /// Its --state-dir, where it leaves its address and its join string [default: peapod-state]
    #[arg(long, env = "PEAPOD_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// How to be let in
    #[command(flatten)]
    pub access: AccessArgs,
}

/// How workers and commands are let in. Beyond this machine always by TLS and a token, unless --insecure.
#[derive(Debug, Clone, Default, Args)]
pub struct SecurityArgs {
    /// Listen beyond this machine without encryption or authentication
    #[arg(long, conflicts_with_all = ["tls", "tls_cert", "tls_client_ca", "token_file"])]
    pub insecure: bool,
    /// Ask for TLS and a token on 127.0.0.1 too
    #[arg(long)]
    pub tls: bool,
    /// Certificate chain to show (PEM) [default: one made at the first start, in --state-dir]
    #[arg(long, env = "PEAPOD_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert (PEM)
    #[arg(long, env = "PEAPOD_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Let in only clients with a certificate that one of these issued (PEM): mutual TLS
    #[arg(long, env = "PEAPOD_TLS_CLIENT_CA", value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// File with the token that clients must know [default: one made at the first start, in --state-dir]
    #[arg(long, env = "PEAPOD_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl SecurityArgs {
    /// Whether anything asks for TLS by name.
    fn asks_for_tls(&self) -> bool {
        self.tls || self.tls_cert.is_some() || self.tls_client_ca.is_some() || self.token_file.is_some()
    }
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
    /// Which job
    #[command(flatten)]
    pub job: JobArgs,
    /// Start the workers too, on this machine
    #[arg(long)]
    pub local: bool,
    /// Address to listen on [default: 127.0.0.1:7733; with --local a free port]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = address)]
    pub listen: Option<SocketAddr>,
    /// Where to serve the live page, /metrics, /healthz and /readyz, all of which anyone who reaches it can read; `off` for none
    /// [default: 127.0.0.1:7734, or a free port if that is taken]
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    pub http_addr: Option<HttpAddr>,
    /// How workers and commands are let in
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Folder for checkpoints and logs of this job
    #[arg(long, env = "PEAPOD_STATE_DIR", default_value = "peapod-state")]
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
    /// Stay after the end of the job, with page and status, until a signal: where a controller would start the coordinator again at once
    #[arg(long, conflicts_with = "local")]
    pub stay: bool,
    /// Write one line for each trained sample: step, epoch, shard, index
    #[arg(long)]
    pub sample_log: Option<PathBuf>,
}

/// Reads an address of this machine to listen on. Names are not looked up: what they stand for, on this machine or on others, decides who
/// reaches the port and whether TLS is asked for. But there is only one `localhost`.
///
/// # Errors
/// What to write instead.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port = port.parse::<u16>();
    match (text.parse(), host, &port) {
        (Ok(address), ..) => Ok(address),
        (Err(_), "localhost", Ok(port)) => Ok(SocketAddr::new(IpAddr::from([127, 0, 0, 1]), *port)),
        _ => {
            let port = port.unwrap_or(DEFAULT_PORT);
            Err(format!(
                "write an IP address of this machine and a port: 127.0.0.1:{port} for this machine alone, 0.0.0.0:{port} for other hosts too"
            ))
        }
    }
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
        if self.local && self.security.tls_client_ca.is_some() {
            return Err("--tls-client-ca and --local: the workers that --local starts have no certificates of their own".into());
        }
        Ok(())
    }

    /// Workers that are enough to train.
    #[must_use]
    pub fn min_world_size(&self) -> u32 {
        self.min_world_size.unwrap_or(self.world_size)
    }

    /// Whether clients need TLS and the token.
    #[must_use]
    pub fn is_secure(&self) -> bool {
        !self.security.insecure && (!self.listen_address().ip().is_loopback() || self.security.asks_for_tls())
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
            (&["--world-size", "2", "--insecure", "--tls"], "cannot be used with"),
            (&["--world-size", "2", "--insecure", "--token-file", "t"], "cannot be used with"),
            (&["--world-size", "2", "--tls-cert", "c.pem"], "--tls-key"),
            (&["--world-size", "2", "--local", "--tls-client-ca", "ca.pem"], "no certificates of their own"),
            (&["--world-size", "2", "--heartbeat-timeout", "soon"], "--heartbeat-timeout"),
            (&["--world-size", "2", "--stay", "--local"], "cannot be used with"),
        ] {
            let error = run(arguments).unwrap_err();
            assert!(error.contains(words), "{arguments:?}: {error}");
        }
    }

    #[test]
    fn beyond_this_machine_nobody_comes_in_without_tls_unless_told_so() {
        for (arguments, is_secure) in [
            (&["--listen", "0.0.0.0:7733"][..], true),
            (&["--listen", "[::]:7733"], true),
            (&["--listen", "10.0.0.1:7733"], true),
            (&["--listen", "0.0.0.0:7733", "--insecure"], false),
            (&[], false),
            (&["--listen", "[::1]:7733"], false),
            (&["--tls"], true),
            (&["--token-file", "token"], true),
            (&["--tls-cert", "c.pem", "--tls-key", "k.pem"], true),
        ] {
            let all: Vec<&str> = ["--world-size", "2"].iter().chain(arguments).copied().collect();
            assert_eq!(run(&all).unwrap().is_secure(), is_secure, "{arguments:?}");
        }
    }

    #[test]
    fn listening_wants_an_address_and_knows_localhost() {
        let listen =
            |text: &str| run(&["--world-size", "2", "--listen", text]).map(|args| (args.listen_address().to_string(), args.is_secure()));
        assert_eq!(listen("localhost:9"), Ok(("127.0.0.1:9".into(), false)));
        assert_eq!(listen("[::1]:9"), Ok(("[::1]:9".into(), false)));
        for (text, port) in [("master:7000", 7000), ("7000", 7000), (":7000", 7000), ("10.0.0.1", 7733), ("localhost", 7733), ("::1", 1)] {
            let error = listen(text).unwrap_err();
            let words = format!("127.0.0.1:{port} for this machine alone, 0.0.0.0:{port} for other hosts too");
            assert!(error.contains(&format!("'{text}' for '--listen <ADDRESS:PORT>'")) && error.contains(&words), "{error}");
        }
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
        let list = Cli::try_parse_from(["coordinator", "checkpoints", "list", "--json", "--state-dir", "here"]).unwrap();
        let Some(Command::Checkpoints { command: Checkpoints::List { store, json: true } }) = list.command else { panic!() };
        assert_eq!(store.address(), "here/checkpoints");
        assert!(Cli::try_parse_from(["coordinator", "status", "--watch", "--log-format", "json"]).is_ok());
    }
}
