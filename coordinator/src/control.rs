//! `status`, `stop` and `drain`: talking to a running coordinator.

mod last_run;
mod shown;
mod watch;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use peapod_proto::secure::{Access, AccessError, Link, failure, refusal};
use peapod_proto::v1;

use self::last_run::LastRun;
pub use self::watch::watch;
use crate::announce::address_in;
use crate::config::Target;
use crate::secrets::join_string_in;

/// How long a running coordinator may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Where a coordinator listens that is told nothing else.
const DEFAULT_ADDRESS: &str = "http://127.0.0.1:7733";
/// Where it keeps its state then.
const DEFAULT_STATE_DIR: &str = "peapod-state";

type Client = v1::control_client::ControlClient<Link>;

/// The coordinator that is meant.
struct Meant {
    access: Access,
    /// The run that it must be of.
    job_id: Option<String>,
    /// Where it keeps its state, if it is known by that.
    folder: Option<PathBuf>,
}

/// Finds out which coordinator is meant and how to be let in: by the arguments, or by what it left in its state folder.
fn meant(target: &Target) -> Result<Meant> {
    let Target { coordinator, state_dir, access } = target;
    let (coordinator, mut access) = (coordinator.as_deref(), access.clone());
    let folder = state_dir.as_deref().unwrap_or(Path::new(DEFAULT_STATE_DIR));
    // Who names a folder means the coordinator that runs from it, and no other.
    let is_told = coordinator.is_some() || access.join.is_some();
    let left = if is_told { None } else { address_in(folder) };
    if !is_told && left.is_none() && state_dir.is_some() {
        let why = LastRun::of(folder).map_or_else(|| "there is no address in it".into(), |last| last.to_string());
        anyhow::bail!("no coordinator runs from {}: {why}", folder.display());
    }
    let knows_certificate = access.join.is_some() || access.tls_ca.is_some();
    if !knows_certificate && coordinator.is_none_or(|address| address.starts_with("https://")) {
        let join = join_string_in(folder).map_err(anyhow::Error::msg)?;
        access.join = join.map(Into::into);
    }
    // The join string says where, too.
    let url = left.as_ref().map_or(DEFAULT_ADDRESS, |left| &left.url);
    let url = access.join.is_none().then_some(url);
    let job_id = left.as_ref().and_then(|left| left.job_id.clone());
    let folder = (!is_told).then(|| folder.to_owned());
    Ok(Meant { access: Access::new(coordinator.or(url), &access).map_err(anyhow::Error::msg)?, job_id, folder })
}

async fn connect(target: &Target) -> Result<Client> {
    let Meant { access, job_id, folder } = meant(target)?;
    let last_run = || folder.as_deref().and_then(LastRun::of);
    let endpoint = access.endpoint().map_err(anyhow::Error::msg)?.connect_timeout(TIMEOUT).timeout(TIMEOUT);
    let mut client = match access.connect(&endpoint).await {
        Ok(link) => v1::control_client::ControlClient::new(link),
        Err(AccessError::Refused(why)) => anyhow::bail!("{why}"),
        Err(AccessError::Failed(_)) => {
            let why =
                last_run().map_or_else(|| "is it running, and is --coordinator or --state-dir right?".into(), |last| last.to_string());
            anyhow::bail!("no coordinator answers at {}: {why}", access.url());
        }
    };
    if let Some(job_id) = job_id {
        let other = client.status(v1::StatusRequest {}).await.map_err(said)?.into_inner();
        if other.job_id != job_id {
            let (url, name) = (access.url(), other.job_name);
            let why = last_run().map_or_else(String::new, |last| format!("; {last}"));
            anyhow::bail!("another job answers at {url} ({name}): the coordinator that left this address there is gone{why}");
        }
    }
    Ok(client)
}

fn said(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", refusal(&status).unwrap_or_else(|| failure(&status)))
}

/// Prints what the job is doing.
///
/// # Errors
/// If no coordinator answers.
pub async fn status(target: &Target, json: bool) -> Result<String> {
    let reply = connect(target).await?.status(v1::StatusRequest {}).await.map_err(said)?.into_inner();
    Ok(if json { format!("{:#}", shown::json(&reply)) } else { shown::table(&reply) })
}

/// Writes how far each shard is, of one source or of all: a line a shard, or with `json` an object a line.
///
/// # Errors
/// If no coordinator answers, no source has that name, or `out` takes no more.
pub async fn shards(target: &Target, source: Option<&str>, json: bool, out: &mut impl Write) -> Result<()> {
    let mut client = connect(target).await?;
    let sources = client.status(v1::StatusRequest {}).await.map_err(said)?.into_inner().sources;
    if let Some(name) = source
        && !sources.iter().any(|source| source.name == name)
    {
        let names: Vec<&str> = sources.iter().map(|source| source.name.as_str()).filter(|name| !name.is_empty()).collect();
        let has = if names.is_empty() { "names none of its sources".to_owned() } else { format!("has: {}", names.join(", ")) };
        anyhow::bail!("no source is named {name:?}; the job {has}");
    }
    for (index, of) in (0..).zip(&sources).filter(|(_, of)| source.is_none_or(|name| of.name == name)) {
        let mut skip = Some(0);
        // The epoch may end between two pages: the list is of the one it began with.
        let mut epoch = None;
        while let Some(from) = skip {
            let request = v1::ShardsRequest { source: index, epoch, skip: from, limit: u32::MAX };
            let page = client.shards(request).await.map_err(said)?.into_inner();
            if from == 0 && !json {
                writeln!(out, "{}", shown::source_line(of))?;
            }
            for shard in &page.shards {
                let line = if json { shown::shard_json(&of.name, page.epoch, shard).to_string() } else { shown::shard_line(shard) };
                writeln!(out, "{line}")?;
            }
            (skip, epoch) = (page.next, Some(page.epoch));
        }
    }
    Ok(())
}

/// Ends the job with a checkpoint.
///
/// # Errors
/// If no coordinator answers.
pub async fn stop(target: &Target) -> Result<()> {
    connect(target).await?.stop(v1::StopRequest { reason: "stopped on request".into() }).await.map_err(said)?;
    Ok(())
}

/// Lets a worker leave.
///
/// # Errors
/// If no coordinator answers or no worker has that rank.
pub async fn drain(target: &Target, rank: u32) -> Result<()> {
    connect(target).await?.drain(v1::DrainRequest { rank }).await.map_err(said)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use peapod_proto::secure::AccessArgs;

    use super::*;
    use crate::announce::leave_address;

    #[test]
    fn who_names_a_state_folder_means_the_coordinator_that_runs_from_it_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let target = |coordinator: Option<&str>, state_dir: bool| Target {
            coordinator: coordinator.map(str::to_owned),
            state_dir: state_dir.then(|| folder.path().to_owned()),
            access: AccessArgs::default(),
        };
        let error = meant(&target(None, true)).err().unwrap().to_string();
        assert!(error.starts_with("no coordinator runs from ") && error.ends_with(": there is no address in it"), "{error}");
        let url = |target| meant(&target).map(|meant| (meant.access.url().to_owned(), meant.job_id)).unwrap();
        assert_eq!(url(target(Some("http://host:1"), true)), ("http://host:1".into(), None));
        let _address = leave_address(folder.path(), "http", "127.0.0.1:9".parse().unwrap(), "7").unwrap();
        assert_eq!(url(target(None, true)), ("http://127.0.0.1:9".into(), Some("7".into())));
        assert_eq!(url(target(Some("http://host:1"), true)), ("http://host:1".into(), None), "told otherwise");
    }
}
