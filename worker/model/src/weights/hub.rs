//! Models by their name on the model hub, found in the cache that the Python libraries keep. Nothing is downloaded.
//!
//! ```text
//! CACHE/models--ORG--NAME/refs/main              the commit that a branch or tag stood for when it was fetched
//! CACHE/models--ORG--NAME/snapshots/COMMIT/..    the files of a commit
//! ```

use std::path::{Path, PathBuf};

use super::invalid;
use crate::Result;

/// What is used when no revision is given.
const DEFAULT_REVISION: &str = "main";

/// Finds a model: a path that exists, or a hub name `ORG/NAME[@REVISION]` whose files are in the local cache.
///
/// The revision is a branch, a tag or a whole commit; without one it is `main`. The cache is looked for where the Python libraries keep
/// it: `$HF_HUB_CACHE`, `$HF_HOME/hub`, `$XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub`.
/// Errors: [`crate::Error::Invalid`] if it is neither; for a name that is not in the cache it says which command fetches it.
pub fn locate(model: impl AsRef<Path>) -> Result<PathBuf> {
    let path = model.as_ref();
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let name = path
        .to_str()
        .and_then(HubName::parse)
        .ok_or_else(|| invalid(path, "there is no such file or folder, and it is no ORG/NAME of the hub".into()))?;
    let cache = cache_folder(|variable| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from));
    let cache = cache.ok_or_else(|| invalid(path, "no such folder, and neither HF_HOME nor HOME says where the hub's cache is".into()))?;
    name.snapshot(&cache)
}

/// Where the Python libraries keep their cache.
fn cache_folder(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let below = |name: &str, rest: &str| variable(name).map(|folder| folder.join(rest));
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| below("HF_HOME", "hub"))
        .or_else(|| below("XDG_CACHE_HOME", "huggingface/hub"))
        .or_else(|| below("HOME", ".cache/huggingface/hub"))
}

/// A model's name on the hub and which of its states is meant.
#[derive(Debug, PartialEq)]
struct HubName<'a> {
    repository: &'a str,
    revision: &'a str,
}

impl<'a> HubName<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (organisation, name) = repository.split_once('/')?;
        // Branches may have slashes (`refs/pr/1`); no part may lead out of the cache.
        let is_part = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.bytes().all(plain)
        };
        ([organisation, name].into_iter().chain(revision.split('/')).all(is_part)).then_some(Self { repository, revision })
    }

    /// The folder of the revision's files.
    fn snapshot(&self, cache: &Path) -> Result<PathBuf> {
        let Self { repository, revision } = self;
        let folder = cache.join(format!("models--{}", repository.replace('/', "--")));
        // A branch or a tag is a file with a commit; anything else may be a commit itself.
        let commit = std::fs::read_to_string(folder.join("refs").join(revision)).unwrap_or_else(|_| (*revision).to_owned());
        let commit = commit.trim();
        let snapshot = folder.join("snapshots").join(commit);
        // What the file holds must not lead out of the cache either.
        if !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric()) && snapshot.is_dir() {
            return Ok(snapshot);
        }
        let option = if *revision == DEFAULT_REVISION { String::new() } else { format!(" --revision {revision}") };
        Err(invalid(&folder, format!("{repository} ({revision}) is not in the cache; fetch it with: hf download {repository}{option}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = |repository, revision| Some(HubName { repository, revision });
        assert_eq!(HubName::parse("org/a-model.v1"), name("org/a-model.v1", "main"));
        assert_eq!(HubName::parse("org/model@refs/pr/1"), name("org/model", "refs/pr/1"));
        for text in ["model", "/org/model", "a/b/c", "../model", "org/..", "org/model@", "org/model@../../x", "org/mo del", "./model", ""] {
            assert_eq!(HubName::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_first_variable_that_is_set_says_where_the_cache_is() {
        let all = [("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/d")];
        let expected = ["/a", "/b/hub", "/c/huggingface/hub", "/d/.cache/huggingface/hub"];
        for (first, expected) in expected.into_iter().enumerate() {
            let set = |wanted: &str| all[first..].iter().find(|(name, _)| *name == wanted).map(|(_, value)| PathBuf::from(value));
            assert_eq!(cache_folder(set), Some(PathBuf::from(expected)));
        }
        assert_eq!(cache_folder(|_| None), None);
    }

    #[test]
    fn revisions_lead_to_snapshots_and_absent_ones_to_the_command_that_fetches_them() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--model");
        let snapshot = folder.join("snapshots").join("0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("refs/pr")).unwrap();
        std::fs::write(folder.join("refs/main"), "0123abcd").unwrap();
        std::fs::write(folder.join("refs/pr/1"), "0123abcd\n").unwrap();
        std::fs::write(folder.join("refs/wrong"), "../../..").unwrap();
        let find = |name| HubName::parse(name).unwrap().snapshot(cache.path());
        for name in ["org/model", "org/model@main", "org/model@pr/1", "org/model@0123abcd"] {
            assert_eq!(find(name).unwrap(), snapshot);
        }
        for (name, command) in [
            ("org/other", "hf download org/other"),
            ("org/model@v2", "hf download org/model --revision v2"),
            ("org/model@wrong", "--revision wrong"),
        ] {
            let error = find(name).unwrap_err().to_string();
            assert!(error.ends_with(command), "{error}");
        }
    }

    #[test]
    fn a_path_that_exists_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(locate(folder.path()).unwrap(), folder.path());
        assert!(locate("/no/such/folder").unwrap_err().to_string().contains("no ORG/NAME"));
    }
}
