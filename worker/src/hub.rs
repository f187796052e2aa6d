//! Fetching models from the model hub into the cache that the Python libraries share.
//!
//! ```text
//! listing of a commit -> files to load -> blobs/DIGEST (resumed, compared with the digest) -> snapshots/COMMIT/ (links, whole at once) -> refs/REVISION
//! ```
//!
//! A model that is named by the job and is not on this machine is fetched as it is first loaded; the workers of a host, and of all hosts
//! that share a cache, let one of them do so. What is interrupted goes on where it was.

mod cache;
mod error;

use std::cell::Cell;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use peapod_data::source::Stream;
use peapod_data::{SourceOptions, Sources};
use peapod_model::hub::{HubName, cache_folder, files_to_load, home_folder, is_whole};
use serde::Deserialize;

use self::cache::{CacheError, Incoming, Received, check_space, create_folder, files_below, lock, part_of, place, write_whole};
pub use self::error::HubError;
use crate::shards::size;

/// The hub that is asked unless `$HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";
/// Bytes asked for at once; three such pieces are held.
const CHUNK_BYTES: u64 = 32 << 20;
/// Bytes written and hashed at once.
const BUFFER_BYTES: usize = 1 << 20;
/// How long a hub that fails while files come is asked again: it counts requests in windows of five minutes.
const GIVE_UP_AFTER: Duration = Duration::from_secs(360);
/// How long it is asked for a model at all. A path that is mistyped looks like a model's name, and need not wait long for its error.
const ASK_FOR: Duration = Duration::from_secs(10);
/// What a hub answers who asks without a token for what it does not have.
const NO_SUCH_REPOSITORY: &str = "(RepoNotFound)";
/// How often it is told how far a fetch is.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Largest listing of a repository.
const MAX_LISTING: u64 = 64 << 20;

/// Who is told of a fetch.
pub trait Watch {
    /// A line for people.
    fn say(&self, line: &str);
    /// So many more bytes are here.
    fn moved(&self, _num_bytes: u64) {}
}

/// Tells the log.
#[derive(Debug, Clone, Copy)]
pub struct Log;

impl Watch for Log {
    fn say(&self, line: &str) {
        tracing::info!("{line}");
    }
}

/// Fetches those of `models` that are neither here nor in the cache, unless `$HF_HUB_OFFLINE` forbids it. Paths that exist, and what can be
/// no hub's name, are left alone.
///
/// # Errors
/// [`HubError`] for the first that cannot be fetched.
pub fn bring<'a>(models: impl IntoIterator<Item = &'a Path>, watch: &dyn Watch) -> Result<(), HubError> {
    let hub = Hub::from_environment();
    for model in models.into_iter().filter(|model| !model.exists()) {
        let Some(name) = HubName::of(model) else { continue };
        let cache = cache_folder().ok_or_else(|| HubError::NoCache { name: name.clone() })?;
        hub.bring(&name, &cache, watch)?;
    }
    Ok(())
}

/// A hub, by the means to ask it.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    asking: Sources,
    fetching: Sources,
    has_token: bool,
    is_offline: bool,
}

impl Hub {
    /// As the Python libraries find theirs: `$HF_ENDPOINT`, `$HF_TOKEN` or the token that was stored at a login, `$HF_HUB_OFFLINE`.
    #[must_use]
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).ok().map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let is_set = |name: &str| variable(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()));
        let stored = || {
            let file = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home_folder()?.join("token")))?;
            Some(std::fs::read_to_string(file).ok()?.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(stored);
        Self::new(&endpoint, token, is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"))
    }

    fn new(endpoint: &str, token: Option<String>, is_offline: bool) -> Self {
        let with_token = |options| token.iter().fold(Sources::new(options), Sources::with_token);
        let options = SourceOptions { chunk_bytes: CHUNK_BYTES, immutable: true, ..SourceOptions::default() };
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            asking: with_token(SourceOptions { give_up_after: ASK_FOR, ..SourceOptions::impatient() }),
            fetching: with_token(SourceOptions { give_up_after: GIVE_UP_AFTER, ..options }),
            has_token: token.is_some(),
            is_offline,
        }
    }

    /// Fetches a model if the cache does not have it as a whole. Where a part of it is there and the hub does not answer, that has to do.
    ///
    /// # Errors
    /// [`HubError`].
    pub fn bring(&self, name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<(), HubError> {
        let has_whole = || name.snapshot(cache).is_some_and(|snapshot| is_whole(&files_below(&snapshot)));
        if self.is_offline || has_whole() {
            return Ok(());
        }
        let fetched = lock(name, cache, watch).and_then(|_lock| {
            // Another may have fetched it meanwhile.
            if has_whole() { Ok(()) } else { self.complete(name, cache, watch).map(drop) }
        });
        match fetched {
            Err(error) if name.snapshot(cache).is_some() => {
                watch.say(&format!("{error}; going on with what the cache has of it"));
                Ok(())
            }
            fetched => fetched,
        }
    }

    /// Fetches what a model lacks in the cache; returns the folder of its files.
    ///
    /// # Errors
    /// [`HubError`]. What has come by then is kept.
    pub fn fetch(&self, name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<PathBuf, HubError> {
        if self.is_offline {
            return name.snapshot(cache).ok_or_else(|| HubError::Offline { name: name.clone() });
        }
        let _lock = lock(name, cache, watch)?;
        self.complete(name, cache, watch)
    }

    /// As [`Hub::fetch`], by whoever holds the lock.
    fn complete(&self, name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<PathBuf, HubError> {
        let folder = name.folder(cache);
        let failed = |failed: CacheError| failed.of(name);
        watch.say(&format!("asking {} for {name}", self.endpoint));
        let listing = self.list(name)?;
        let names: Vec<&str> = listing.siblings.iter().map(|file| file.rfilename.as_str()).filter(|name| is_plain(name)).collect();
        let wanted = files_to_load(&names);
        if wanted.is_empty() {
            return Err(HubError::NoModel { name: name.clone(), endpoint: self.endpoint.clone(), num_files: names.len() });
        }
        let snapshot = folder.join("snapshots").join(&listing.sha);
        let missing: Vec<&Listed> = listing
            .siblings
            .iter()
            .filter(|file| wanted.contains(&file.rfilename.as_str()) && !snapshot.join(&file.rfilename).exists())
            .collect();
        let transfer = Transfer::begin(name, watch, missing.iter().map(|file| file.size()).sum());
        if !missing.is_empty() {
            create_folder(&folder.join("blobs")).map_err(failed)?;
            check_space(name, &folder, missing.iter().map(|file| file.missing_bytes(&folder, &listing.sha)).sum())?;
            watch.say(&format!(
                "fetching {name} from {} into {}: {} files, {}",
                self.endpoint,
                cache.display(),
                missing.len(),
                size(transfer.total)
            ));
        }
        let mut blobs = Vec::new();
        for file in &missing {
            blobs.push((self.fetch_file(&folder, &listing.sha, file, &transfer)?, file.rfilename.as_str()));
        }
        place(&blobs, &snapshot).map_err(failed)?;
        if name.revision() != listing.sha {
            write_whole(&folder.join("refs").join(name.revision()), listing.sha.as_bytes()).map_err(failed)?;
        }
        if !missing.is_empty() {
            watch.say(&format!("fetched {name} in {:.0} s", transfer.started.elapsed().as_secs_f64()));
        }
        Ok(snapshot)
    }

    /// What a repository holds.
    fn list(&self, name: &HubName) -> Result<Listing, HubError> {
        let (endpoint, repository) = (&self.endpoint, name.repository());
        let url = format!("{endpoint}/api/models/{repository}/revision/{}?blobs=true", name.revision().replace('/', "%2F"));
        let mut text = Vec::new();
        let stream = self.open(&self.asking, name, &url, 0)?;
        let halt = stream.halt();
        let read = stream.take(MAX_LISTING).read_to_end(&mut text);
        halt.check().map_err(|error| self.error(name, error))?;
        let unreachable = |reason: String| HubError::Unreachable { name: name.clone(), reason };
        read.map_err(|error| unreachable(format!("read {url}: {error}")))?;
        let listing: Listing = serde_json::from_slice(&text)
            .map_err(|error| unreachable(format!("{url} answers as no hub does ({error}): does HF_ENDPOINT name one?")))?;
        if listing.sha.is_empty() || !listing.sha.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(unreachable(format!("{url} names no commit")));
        }
        Ok(listing)
    }

    /// Fetches a file, unless the cache has what it holds; returns where that lies.
    fn fetch_file(&self, folder: &Path, commit: &str, file: &Listed, transfer: &Transfer) -> Result<PathBuf, HubError> {
        let name = transfer.name;
        let failed = |failed: CacheError| failed.of(name);
        let blob = file.blob(folder, commit);
        if blob.exists() {
            transfer.found(file.size());
            return Ok(blob);
        }
        let part = part_of(&blob);
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, name.repository(), escaped(&file.rfilename));
        let mut is_second = false;
        loop {
            let mut incoming = Incoming::open(&part, file.size).map_err(failed)?;
            transfer.found(incoming.len);
            if file.size.is_none_or(|size| incoming.len < size) {
                self.receive(&url, &mut incoming, transfer)?;
            }
            let Received { len, sha256, is_alone } = incoming.finish().map_err(failed)?;
            let is_whole = is_alone && file.size.is_none_or(|size| size == len);
            let expected = file.lfs.as_ref().map(|lfs| &lfs.sha256);
            if is_whole && expected.is_none_or(|expected| *expected == sha256) {
                std::fs::rename(&part, &blob).map_err(|error| failed(CacheError::new(&blob, error)))?;
                return Ok(blob);
            }
            // A part that an earlier run left may be the cause, or a process on another host whose lock this one does not see.
            std::fs::remove_file(&part).map_err(|error| failed(CacheError::new(&part, error)))?;
            transfer.lost(len);
            if is_second {
                let (name, file) = (name.clone(), file.rfilename.clone());
                return Err(match expected {
                    Some(expected) if is_alone => HubError::Damaged { name, file, found: sha256, expected: expected.clone() },
                    _ => HubError::Unreachable { name, reason: format!("{url}: {len} bytes came, the hub lists another number") },
                });
            }
            transfer.watch.say(&format!("{name}: {} arrived damaged, it is fetched anew", file.rfilename));
            is_second = true;
        }
    }

    /// Appends what a file lacks.
    fn receive(&self, url: &str, incoming: &mut Incoming, transfer: &Transfer) -> Result<(), HubError> {
        let name = transfer.name;
        let unreachable = |reason: String| HubError::Unreachable { name: name.clone(), reason };
        let mut stream = match self.open(&self.fetching, name, url, incoming.len) {
            Err(HubError::Missing { .. }) => return Err(unreachable(format!("{url} is listed and is not there"))),
            opened => opened?,
        };
        let halt = stream.halt();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(len) => {
                    incoming.write(&buffer[..len]).map_err(|failed| failed.of(name))?;
                    transfer.came(len as u64);
                }
                Err(error) => {
                    halt.check().map_err(|error| self.error(name, error))?;
                    return Err(unreachable(format!("read {url}: {error}")));
                }
            }
        }
    }

    fn open(&self, sources: &Sources, name: &HubName, url: &str, start: u64) -> Result<Stream<'static>, HubError> {
        sources.open_as_it_is(url, start, || false).map_err(|error| self.error(name, error))
    }

    fn error(&self, name: &HubName, error: peapod_data::Error) -> HubError {
        let (name, endpoint) = (name.clone(), self.endpoint.clone());
        match error {
            peapod_data::Error::Open { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                // A name without a revision is `main`, which every repository has.
                let is_plain = name.to_string() == name.repository();
                let but = if is_plain { String::new() } else { format!(", or not the revision {}", name.revision()) };
                HubError::Missing { name, endpoint, but }
            }
            peapod_data::Error::Store(error) if error.denied && error.reason.contains(NO_SUCH_REPOSITORY) => {
                let but = if self.has_token { "" } else { " that it shows to everybody; HF_TOKEN opens private ones" };
                HubError::Missing { name, endpoint, but: but.into() }
            }
            peapod_data::Error::Store(error) if error.denied => {
                let asked = if self.has_token { "asked with the token of this machine" } else { "asked without a token" };
                HubError::Denied { name, endpoint, reason: error.reason, asked }
            }
            error => HubError::Unreachable { name, reason: error.to_string() },
        }
    }
}

/// A commit and its files, of what a hub says of a model.
#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Listed>,
}

/// A file. Mirrors may say no more of it than its name.
#[derive(Debug, Deserialize)]
struct Listed {
    rfilename: String,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default, rename = "blobId")]
    blob_id: Option<String>,
    #[serde(default)]
    lfs: Option<LargeFile>,
}

#[derive(Debug, Deserialize)]
struct LargeFile {
    sha256: String,
}

impl Listed {
    fn size(&self) -> u64 {
        self.size.unwrap_or(0)
    }

    /// Where its bytes lie, named as the Python libraries do: by the SHA-256 of a large file, by git's name of a small one.
    fn blob(&self, folder: &Path, commit: &str) -> PathBuf {
        let digest = self.lfs.as_ref().map(|lfs| &lfs.sha256).or(self.blob_id.as_ref());
        let digest = digest.filter(|digest| digest.len() >= 40 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        // What the hub does not name is named by its path in this commit, and shared with no other.
        let name = digest.cloned().unwrap_or_else(|| format!("{commit}--{}", self.rfilename.replace('/', "--")));
        folder.join("blobs").join(name)
    }

    /// What of it is still to come.
    fn missing_bytes(&self, folder: &Path, commit: &str) -> u64 {
        let blob = self.blob(folder, commit);
        let here = [&blob, &part_of(&blob)].into_iter().find_map(|path| Some(path.metadata().ok()?.len()));
        self.size().saturating_sub(here.unwrap_or(0))
    }
}

/// How far a fetch is.
struct Transfer<'a> {
    name: &'a HubName,
    watch: &'a dyn Watch,
    total: u64,
    started: Instant,
    /// Bytes that are here, and those of them that this process has fetched.
    here: Cell<u64>,
    fetched: Cell<u64>,
    told: Cell<Instant>,
}

impl<'a> Transfer<'a> {
    fn begin(name: &'a HubName, watch: &'a dyn Watch, total: u64) -> Self {
        let now = Instant::now();
        Self { name, watch, total, started: now, here: Cell::new(0), fetched: Cell::new(0), told: Cell::new(now) }
    }

    /// So many bytes were here already.
    fn found(&self, num_bytes: u64) {
        self.here.set(self.here.get() + num_bytes);
        self.watch.moved(num_bytes);
    }

    /// So many bytes have to be fetched once more.
    fn lost(&self, num_bytes: u64) {
        self.here.set(self.here.get().saturating_sub(num_bytes));
    }

    fn came(&self, num_bytes: u64) {
        self.found(num_bytes);
        self.fetched.set(self.fetched.get() + num_bytes);
        if self.told.get().elapsed() >= TELL_EVERY {
            self.told.set(Instant::now());
            let rate = self.fetched.get() as f64 / self.started.elapsed().as_secs_f64();
            let line = format!("{}: {} of {} are here, {}/s", self.name, size(self.here.get()), size(self.total), size(rate as u64));
            self.watch.say(&line);
        }
    }
}

/// Whether a repository's file may lie below a folder of that name: no part leads out of it.
fn is_plain(file: &str) -> bool {
    file.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', '\0']))
}

/// A path as it stands in an address.
fn escaped(file: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    file.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

#[cfg(test)]
mod tests;
