//! Command-line arguments of `worker`.

use std::time::Duration;

use clap::Parser;
use peapod_proto::ids::Rank;

/// Trains with others on one device: start one for each GPU of a job.
#[derive(Debug, Clone, Parser)]
#[command(name = "worker", version)]
pub struct Args {
    /// Address of the coordinator, such as http://master:7733
    #[arg(long, env = "PEAPOD_COORDINATOR")]
    pub coordinator: String,
    /// Rank to ask for; without it, any free one
    #[arg(long, env = "PEAPOD_RANK")]
    pub rank: Option<u32>,
    /// Device to train on
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// Threads for tensor work [default: all cores]
    #[arg(long)]
    pub threads: Option<u32>,
    /// How long to look for the coordinator
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub connect_timeout: Duration,
    /// Address under which the other workers reach this one [default: the one that reaches the coordinator]
    #[arg(long)]
    pub advertise: Option<std::net::IpAddr>,
}

impl Args {
    /// Checks ranges.
    ///
    /// # Errors
    /// One line that says what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        if !self.coordinator.starts_with("http://") {
            let hint =
                if self.coordinator.starts_with("https://") { ": TLS is not built yet, use http:// on a network you trust" } else { "" };
            return Err(format!("--coordinator {} must be an address like http://master:7733{hint}", self.coordinator));
        }
        if self.device != "cpu" {
            return Err(format!("--device {}: this build trains on the CPU only; use --device cpu", self.device));
        }
        if self.threads == Some(0) {
            return Err("--threads must be at least 1".into());
        }
        Ok(())
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
        let parse = |arguments: &[&str]| Args::try_parse_from(["worker"].iter().chain(arguments)).unwrap().validate();
        assert!(parse(&["--coordinator", "http://a:1"]).is_ok());
        assert!(parse(&["--coordinator", "a:1"]).unwrap_err().contains("http://master:7733"));
        assert!(parse(&["--coordinator", "https://a:1"]).unwrap_err().contains("TLS is not built yet"));
        assert!(parse(&["--coordinator", "http://a:1", "--device", "cuda:0"]).unwrap_err().contains("--device cpu"));
    }
}
