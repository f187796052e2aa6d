//! What a coordinator tells people when it starts.

use std::io::{IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};

use peapod_proto::job::Job;
use peapod_proto::program::{counted, host_name};

use crate::config::RunArgs;
use crate::observe::Bar;
use crate::secrets::{JOIN, Secrets};

/// File in the state folder with the address of the coordinator that uses it and the id of its run, a line each, for commands on this
/// machine.
const ADDRESS: &str = "address";

/// What a coordinator has left in its state folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    /// Where it listens.
    pub url: String,
    /// Its run: after its sudden end another may listen there. None from a program of before this was said.
    pub job_id: Option<String>,
}

/// An address that is left where commands look for it, and taken away on drop: nobody listens there any more.
#[derive(Debug)]
pub struct LeftAddress(PathBuf);

impl Drop for LeftAddress {
    fn drop(&mut self) {
        // Where it stays, a command finds nobody there and says so.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Leaves the address where commands look for it.
///
/// # Errors
/// Names the file that cannot be written.
pub fn leave_address(state_dir: &Path, scheme: &str, listening: SocketAddr, job_id: &str) -> Result<LeftAddress, String> {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let path = state_dir.join(ADDRESS);
    let text = format!("{scheme}://{}\n{job_id}\n", SocketAddr::new(ip, listening.port()));
    std::fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(LeftAddress(path))
}

/// The address that a coordinator has left in its state folder.
#[must_use]
pub fn address_in(state_dir: &Path) -> Option<Left> {
    let text = std::fs::read_to_string(state_dir.join(ADDRESS)).ok()?;
    let mut lines = text.lines().map(|line| line.trim().to_owned());
    let url = lines.next().filter(|url| !url.is_empty())?;
    Some(Left { url, job_id: lines.next() })
}

/// Of the control port's address.
pub fn scheme(is_secure: bool) -> &'static str {
    if is_secure { "https" } else { "http" }
}

/// Says which job this is, and where.
pub fn announce(args: &RunArgs, job: &Job, listening: SocketAddr, num_shards: usize, secrets: Option<&Secrets>) {
    let scheme = scheme(secrets.is_some());
    let workers = match args.min_world_size() {
        min if min < args.world_size => format!("{min} to {} workers", args.world_size),
        _ => counted(args.world_size, "worker"),
    };
    let shards = counted(num_shards, "shard");
    tracing::info!("job {}: {workers}, {shards}, listening on {scheme}://{listening}", job.name);
    if args.security.insecure {
        tracing::warn!("--insecure: anyone who reaches {scheme}://{listening} can join, stop or replace this job");
    }
}

/// Says what to start on each host.
pub fn say_how_to_join(args: &RunArgs, listening: SocketAddr, secrets: Option<&Secrets>, bar: &Bar) {
    let reached = authority_for_workers(listening, &host_name());
    match secrets {
        _ if args.local => {}
        None => tracing::info!("start on each host, once a GPU:  worker --coordinator http://{reached}"),
        // To a person alone, and not as a line of the log: what is written elsewhere is collected, and this is a secret.
        Some(secrets) if secrets.is_new && std::io::stdout().is_terminal() => {
            tracing::info!("start on each host, once a GPU (whoever knows the string can join and stop the job; it is not shown again):");
            bar.aside(|| print_line(&format!("worker --join {}", secrets.join_string(reached).reveal())));
        }
        Some(secrets) if secrets.is_own_token => {
            tracing::info!("start on each host, once a GPU:  worker --coordinator https://{reached} --tls-ca FILE --token-file FILE");
        }
        Some(_) => tracing::info!(
            "start on each host, once a GPU:  worker --join STRING  (the string is in {})",
            args.state_dir.join(JOIN).display()
        ),
    }
}

/// Prints for whoever reads; a job goes on where nobody does.
pub fn print_line(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

/// What workers are to be told: "any address" is one to listen on, not to connect to.
pub fn authority_for_workers(listening: SocketAddr, host_name: &str) -> String {
    if listening.ip().is_unspecified() { format!("{host_name}:{}", listening.port()) } else { listening.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_find_the_address_in_the_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(address_in(folder.path()), None);
        for (listening, left) in
            [("0.0.0.0:7733", "http://127.0.0.1:7733"), ("[::]:1", "http://[::1]:1"), ("10.0.0.1:2", "http://10.0.0.1:2")]
        {
            let _address = leave_address(folder.path(), "http", listening.parse().unwrap(), "7").unwrap();
            assert_eq!(address_in(folder.path()), Some(Left { url: left.into(), job_id: Some("7".into()) }));
        }
        assert_eq!(address_in(folder.path()), None);
    }

    #[test]
    fn workers_are_told_an_address_they_can_reach() {
        let told = |listening: &str| authority_for_workers(listening.parse().unwrap(), "master");
        assert_eq!(told("0.0.0.0:7733"), "master:7733");
        assert_eq!(told("[::]:7733"), "master:7733");
        assert_eq!(told("10.0.0.1:7733"), "10.0.0.1:7733");
        assert_eq!(told("[::1]:7733"), "[::1]:7733");
    }
}
