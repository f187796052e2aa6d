//! Models by their name on the model hub, in the cache that the Python libraries keep. Nothing is fetched here.
//!
//! ```text
//! CACHE/models--ORG--NAME/refs/main              the commit that a branch or tag stood for when it was fetched
//! CACHE/models--ORG--NAME/snapshots/COMMIT/..    the files of a commit, as links
//! CACHE/models--ORG--NAME/blobs/DIGEST           what they hold
//! ```

mod files;

use std::fmt;
use std::path::{Path, PathBuf};

pub use self::files::{files_to_load, is_whole};
use crate::{Error, Result};

/// What is used when no revision is given.
const DEFAULT_REVISION: &str = "main";

/// Finds a model: a path that exists, or a hub name `ORG/NAME[@REVISION]` whose files are in the local cache.
///
/// The revision is a branch, a tag or a whole commit; without one it is `main`. The cache is where [`cache_folder`] says.
/// Errors: [`Error::Invalid`] if it is neither; for a name that is not in the cache it says which command fetches it.
pub fn locate(model: impl AsRef<Path>) -> Result<PathBuf> {
    let path = model.as_ref();
    if path.exists() {
        return Ok(path.to_path_buf());
    }
    let absent = |but: &str| Error::Invalid { path: path.into(), reason: format!("{}, and {but}", absent(path)) };
    let name = HubName::of(path).ok_or_else(|| absent("it is no ORG/NAME of the hub"))?;
    let cache = cache_folder().ok_or_else(|| absent("neither HF_HOME nor HOME says where the hub's cache is"))?;
    name.snapshot(&cache).ok_or_else(|| absent(&format!("it is not in the hub's cache either; fetch it with: worker fetch {name}")))
}

/// Says that nothing is found at a path; of a relative one also where it was looked for.
#[must_use]
pub fn absent(path: &Path) -> String {
    let folder = if path.is_relative() { format!(" in {}", current_folder()) } else { String::new() };
    format!("there is no such file or folder{folder}")
}

/// The folder that relative paths start from, in words.
#[must_use]
pub fn current_folder() -> String {
    std::env::current_dir().map_or_else(|_| "the folder that this program runs in".into(), |folder| folder.display().to_string())
}

/// Where the Python libraries keep what they know: `$HF_HOME`, `$XDG_CACHE_HOME/huggingface`, `~/.cache/huggingface`. `None` if not even
/// the home is known.
#[must_use]
pub fn home_folder() -> Option<PathBuf> {
    home_by(variable)
}

/// Where the Python libraries keep models: `$HF_HUB_CACHE`, else `hub` in [`home_folder`].
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    cache_by(variable)
}

/// The commit that a folder is the snapshot of, if it lies in a cache.
#[must_use]
pub fn commit_of(folder: &Path) -> Option<String> {
    let is_snapshot = folder.parent()?.file_name()? == "snapshots" && folder.parent()?.parent()?.join("blobs").is_dir();
    is_snapshot.then(|| folder.file_name()?.to_str().map(str::to_owned)).flatten()
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn home_by(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let below = |name: &str, rest: &str| variable(name).map(|folder| folder.join(rest));
    variable("HF_HOME").or_else(|| below("XDG_CACHE_HOME", "huggingface")).or_else(|| below("HOME", ".cache/huggingface"))
}

fn cache_by(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let named = variable("HF_HUB_CACHE").or_else(|| variable("HUGGINGFACE_HUB_CACHE"));
    named.or_else(|| Some(home_by(variable)?.join("hub")))
}

/// A model's name on the hub and which of its states is meant: `ORG/NAME[@REVISION]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    repository: Box<str>,
    revision: Box<str>,
}

impl HubName {
    /// The hub's name that a path of a job file may be; whether there is such a file is not asked.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        path.to_str().and_then(Self::parse)
    }

    /// Reads a name; `None` for what cannot be one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (organisation, name) = repository.split_once('/')?;
        // Branches may have slashes (`refs/pr/1`); no part may lead out of the cache.
        let is_part = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !part.is_empty() && !part.starts_with('.') && !part.contains("..") && part.bytes().all(plain)
        };
        let is_name = [organisation, name].into_iter().chain(revision.split('/')).all(is_part);
        is_name.then(|| Self { repository: repository.into(), revision: revision.into() })
    }

    /// `ORG/NAME`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// A branch, a tag or a commit.
    #[must_use]
    pub fn revision(&self) -> &str {
        &self.revision
    }

    /// The folder of all that a cache has of the model.
    #[must_use]
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.repository.replace('/', "--")))
    }

    /// The folder of the revision's files, if the cache has it.
    #[must_use]
    pub fn snapshot(&self, cache: &Path) -> Option<PathBuf> {
        let folder = self.folder(cache);
        // A branch or a tag is a file with a commit; anything else may be a commit itself.
        let commit = std::fs::read_to_string(folder.join("refs").join(&*self.revision)).unwrap_or_else(|_| self.revision.to_string());
        let commit = commit.trim();
        let snapshot = folder.join("snapshots").join(commit);
        // What the file holds must not lead out of the cache either.
        (!commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_alphanumeric()) && snapshot.is_dir()).then_some(snapshot)
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if *self.revision == *DEFAULT_REVISION { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name =
            |text: &str| HubName::parse(text).map(|name| (name.repository().to_owned(), name.revision().to_owned(), name.to_string()));
        let whole = |repository: &str, revision: &str, text: &str| Some((repository.into(), revision.into(), text.into()));
        assert_eq!(name("org/a-model.v1"), whole("org/a-model.v1", "main", "org/a-model.v1"));
        assert_eq!(name("org/model@main"), whole("org/model", "main", "org/model"));
        assert_eq!(name("org/model@refs/pr/1"), whole("org/model", "refs/pr/1", "org/model@refs/pr/1"));
        for text in ["model", "/org/model", "a/b/c", "../model", "org/..", "org/model@", "org/model@../../x", "org/mo del", "./model", ""] {
            assert_eq!(name(text), None, "{text}");
        }
    }

    #[test]
    fn the_first_variable_that_is_set_says_where_the_cache_is() {
        let all = [("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/d")];
        let expected = ["/a", "/b/hub", "/c/huggingface/hub", "/d/.cache/huggingface/hub"];
        for (first, expected) in expected.into_iter().enumerate() {
            let set = |wanted: &str| all[first..].iter().find(|(name, _)| *name == wanted).map(|(_, value)| PathBuf::from(value));
            assert_eq!(cache_by(set), Some(PathBuf::from(expected)));
        }
        assert_eq!(cache_by(|_| None), None);
    }

    #[test]
    fn revisions_lead_to_snapshots() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--org--model");
        let snapshot = folder.join("snapshots").join("0123abcd");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(folder.join("refs/pr")).unwrap();
        std::fs::write(folder.join("refs/main"), "0123abcd").unwrap();
        std::fs::write(folder.join("refs/pr/1"), "0123abcd\n").unwrap();
        std::fs::write(folder.join("refs/wrong"), "../../..").unwrap();
        std::fs::write(folder.join("refs/empty"), "\n").unwrap();
        assert_eq!(commit_of(&snapshot), None, "a folder of that name");
        std::fs::create_dir(folder.join("blobs")).unwrap();
        assert_eq!(commit_of(&snapshot).as_deref(), Some("0123abcd"));
        let find = |name| HubName::parse(name).unwrap().snapshot(cache.path());
        for name in ["org/model", "org/model@main", "org/model@pr/1", "org/model@0123abcd"] {
            assert_eq!(find(name), Some(snapshot.clone()));
        }
        for name in ["org/other", "org/model@v2", "org/model@wrong", "org/model@empty"] {
            assert_eq!(find(name), None, "{name}");
        }
    }

    #[test]
    fn a_path_that_exists_is_taken_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(locate(folder.path()).unwrap(), folder.path());
        let error = locate("/no/such/folder").unwrap_err().to_string();
        assert!(error.ends_with("there is no such file or folder, and it is no ORG/NAME of the hub"), "{error}");
        let error = locate("no-such/model@v2").unwrap_err().to_string();
        let here = std::env::current_dir().unwrap();
        assert!(error.contains(&format!("there is no such file or folder in {}, and it is not in", here.display())), "{error}");
        assert!(error.ends_with("fetch it with: worker fetch no-such/model@v2"), "{error}");
    }
}
