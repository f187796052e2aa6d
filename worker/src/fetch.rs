//! `worker fetch`: models of the hub, brought here before anything needs them: on the machine of a cluster that has a network, say.

use std::fmt::Write as _;
use std::path::PathBuf;

use peapod_model::hub::{HubName, cache_folder};
use peapod_proto::job::JobArgs;

use crate::hub::{Hub, HubError, Log};
use crate::setup;

/// What to fetch.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Models: ORG/NAME, or ORG/NAME@REVISION
    #[arg(required_unless_present = "job", value_name = "MODEL", value_parser = parse)]
    pub models: Vec<HubName>,
    /// Fetch what this job file names
    #[arg(long)]
    pub job: Option<PathBuf>,
}

fn parse(text: &str) -> Result<HubName, String> {
    HubName::parse(text).ok_or_else(|| "a model on the hub is ORG/NAME or ORG/NAME@REVISION".into())
}

/// Fetches what the cache lacks of each; what lies on this machine as a path is left out. Returns the folders, a line each.
///
/// # Errors
/// One line: the job file cannot be read, or a model cannot be fetched.
pub fn run(options: &Options) -> Result<String, String> {
    let mut models = options.models.clone();
    if let Some(path) = &options.job {
        let job = JobArgs::from(path.clone()).read()?.job;
        for path in setup::model_paths(&job).filter(|path| !path.exists()) {
            let no_name = || format!("{}: there is no such file or folder, and it is no ORG/NAME of the hub", path.display());
            models.push(HubName::of(path).ok_or_else(no_name)?);
        }
    }
    let (hub, mut folders) = (Hub::from_environment(), String::new());
    for name in &models {
        let cache = cache_folder().ok_or_else(|| HubError::NoCache { name: name.clone() }.to_string())?;
        let folder = hub.fetch(name, &cache, &Log).map_err(|error| error.to_string())?;
        let _ = writeln!(folders, "{}", folder.display());
    }
    Ok(folders)
}
