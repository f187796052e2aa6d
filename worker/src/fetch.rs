//! `worker fetch`: models of the hub, brought here before anything needs them: on the machine of a cluster that has a network, say.

use std::fmt::Write as _;

use peapod_model::hub::{HubName, absent, cache_folder};
use peapod_proto::job::OptionalJobArgs;

use crate::hub::{Hub, HubError, Log};
use crate::setup;

/// What to fetch.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Models: ORG/NAME, or ORG/NAME@REVISION
    #[arg(required_unless_present = "job", value_name = "MODEL", value_parser = parse)]
    pub models: Vec<HubName>,
    /// A job whose models to fetch
    #[command(flatten)]
    pub job: OptionalJobArgs,
}

/// Why models are not there.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The job file cannot be read, or names what is nowhere.
    #[error("{0}")]
    Job(String),
    /// A model cannot be fetched.
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl From<String> for FetchError {
    fn from(problem: String) -> Self {
        Self::Job(problem)
    }
}

impl FetchError {
    /// Whether another try would end in the same way.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Job(_)) || matches!(self, Self::Hub(error) if error.is_permanent())
    }
}

fn parse(text: &str) -> Result<HubName, String> {
    HubName::parse(text).ok_or_else(|| "a model on the hub is ORG/NAME or ORG/NAME@REVISION".into())
}

/// Fetches what the cache lacks of each; what lies on this machine as a path is left out. Returns the folders, a line each.
///
/// # Errors
/// [`FetchError`].
pub fn run(options: &Options) -> Result<String, FetchError> {
    let mut models = options.models.clone();
    if let Some(job) = options.job.job() {
        let job = job.read()?.job;
        for path in setup::model_paths(&job).filter(|path| !path.exists()) {
            let no_name = || format!("{}: {}, and it is no ORG/NAME of the hub", path.display(), absent(path));
            models.push(HubName::of(path).ok_or_else(no_name)?);
        }
    }
    let (hub, mut folders) = (Hub::from_environment(), String::new());
    for name in &models {
        let cache = cache_folder().ok_or_else(|| HubError::NoCache { name: name.clone() })?;
        let folder = hub.fetch(name, &cache, &Log)?;
        let _ = writeln!(folders, "{}", folder.display());
    }
    Ok(folders)
}
