//! Fetching models from the model hub into the cache that the Python libraries share.
//!
//! ```text
//! listing of a commit -> files to load -> blobs/DIGEST (resumed, compared with the digest) -> snapshots/COMMIT/ (links, whole at once) -> refs/REVISION
//! ```
//!
//! A model that is named by the job and is not on this machine is fetched as it is first loaded; the workers of a host, and of all hosts that
//! share a cache, let one of them do so. What is interrupted goes on where it was.

use std::cell::Cell;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use peapod_data::source::Stream;
use peapod_data::{SourceOptions, Sources};
use peapod_model::hub::{HubName, cache_folder, files_to_load, home_folder};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::shards::size;

/// The hub that is asked unless `$HF_ENDPOINT` names another.
const ENDPOINT: &str = "https://huggingface.co";
/// Bytes asked for at once; three such pieces are held.
const CHUNK_BYTES: u64 = 32 << 20;
/// Bytes written and hashed at once.
const BUFFER_BYTES: usize = 1 << 20;
/// How long a hub that fails is asked again.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// How often it is told how far a fetch is.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// How often another's fetch is looked at.
const LOCK_POLL: Duration = Duration::from_millis(500);
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

/// Why a model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// It is neither here nor there.
    #[error("{name}: there is no such file or folder, and {endpoint} has no model of this name{revision}")]
    Missing {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// The revision in words, if one was given.
        revision: String,
    },
    /// It is there, but not for everybody; hubs also say so of what they do not have.
    #[error(
        "{name}: there is no such file or folder, and {endpoint} denies access to a model of this name ({reason}): if it is private or gated, \
         accept its terms on {endpoint}/{repository} and set HF_TOKEN to a token of that account"
    )]
    Denied {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// What it said.
        reason: String,
        /// `ORG/NAME`.
        repository: String,
    },
    /// The hub does not answer, or not as a hub.
    #[error(
        "{name}: there is no such file or folder, and it could not be fetched: {reason}; where the hub can be reached, `worker fetch {name}` \
         puts it into the cache, which HF_HOME moves"
    )]
    Unreachable {
        /// As it was given.
        name: HubName,
        /// What happened last.
        reason: String,
    },
    /// The repository holds no model.
    #[error("{name}: none of the {num_files} files that {endpoint} has of it is one that is loaded")]
    NoModel {
        /// As it was given.
        name: HubName,
        /// The hub that was asked.
        endpoint: String,
        /// How many files there are.
        num_files: usize,
    },
    /// What came is not what was listed.
    #[error("{name}: {file} arrived damaged twice: its SHA-256 is {found}, the hub lists {expected}; is there a proxy between?")]
    Damaged {
        /// As it was given.
        name: HubName,
        /// The file in the repository.
        file: String,
        /// Of what arrived.
        found: String,
        /// What the hub says.
        expected: String,
    },
    /// The cache cannot hold it.
    #[error("{name}: its files take {needed}, {free} are free in the cache {cache}: make room, or set HF_HOME to a folder elsewhere")]
    NoSpace {
        /// As it was given.
        name: HubName,
        /// What is still to be fetched.
        needed: String,
        /// What is free.
        free: String,
        /// The folder.
        cache: String,
    },
    /// The cache cannot be written.
    #[error("{path}: {source}; HF_HOME says where models are kept")]
    Cache {
        /// File or folder.
        path: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Nothing says where the cache is.
    #[error("{name}: neither HF_HOME nor HOME says where the hub's cache is")]
    NoCache {
        /// As it was given.
        name: HubName,
    },
}

impl HubError {
    /// Whether another machine, or a later time, would see the same.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Denied { .. } | Self::NoModel { .. })
    }
}

/// Fetches those of `models` that are neither here nor in the cache, unless `$HF_HUB_OFFLINE` forbids it. Paths that exist, and what can be no
/// hub's name, are left alone.
///
/// # Errors
/// [`HubError`] for the first that cannot be fetched.
pub fn bring<'a>(models: impl IntoIterator<Item = &'a Path>, watch: &dyn Watch) -> Result<(), HubError> {
    let hub = Hub::from_environment();
    for model in models {
        if hub.is_offline || model.exists() {
            continue;
        }
        let Some(name) = HubName::of(model) else { continue };
        let cache = cache_folder().ok_or_else(|| HubError::NoCache { name: name.clone() })?;
        if name.snapshot(&cache).is_none() {
            let _lock = lock(&name, &cache, watch)?;
            // Another may have fetched it meanwhile.
            if name.snapshot(&cache).is_none() {
                hub.complete(&name, &cache, watch)?;
            }
        }
    }
    Ok(())
}

/// A hub, by the means to ask it.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    /// For a first question: a path of a job file that is mistyped looks like a model's name, and need not wait long for its error.
    asking: Sources,
    fetching: Sources,
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
            asking: with_token(SourceOptions { immutable: true, ..SourceOptions::impatient() }),
            fetching: with_token(SourceOptions { give_up_after: GIVE_UP_AFTER, ..options }),
            is_offline,
        }
    }

    /// Fetches what a model lacks in the cache; returns the folder of its files.
    ///
    /// # Errors
    /// [`HubError`]. What has come by then is kept.
    pub fn fetch(&self, name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<PathBuf, HubError> {
        let _lock = lock(name, cache, watch)?;
        self.complete(name, cache, watch)
    }

    /// As [`Hub::fetch`], by whoever holds the lock.
    fn complete(&self, name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<PathBuf, HubError> {
        let folder = name.folder(cache);
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
            create_folder(&folder.join("blobs"))?;
            check_space(name, &folder, missing.iter().map(|file| file.missing_bytes(&folder)).sum())?;
            watch.say(&format!(
                "fetching {name} from {} into {}: {} files, {}",
                self.endpoint,
                cache.display(),
                missing.len(),
                size(transfer.total)
            ));
        }
        // A folder that is there may be another program's: it is filled. One that is not appears when it is whole.
        let filled = if snapshot.is_dir() { snapshot.clone() } else { folder.join("snapshots").join(format!(".{}.part", listing.sha)) };
        for file in &missing {
            let blob = self.fetch_file(&folder, &listing.sha, file, &transfer)?;
            link(&blob, &filled.join(&file.rfilename), &file.rfilename)?;
        }
        if filled != snapshot {
            std::fs::rename(&filled, &snapshot).map_err(|error| failed(&snapshot, error))?;
        }
        if name.revision() != listing.sha {
            write_whole(&folder.join("refs").join(name.revision()), listing.sha.as_bytes())?;
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
        let blob = file.blob(folder);
        if blob.exists() {
            transfer.count(file.size());
            return Ok(blob);
        }
        let part = part_of(&blob);
        let url = format!("{}/{}/resolve/{commit}/{}", self.endpoint, name.repository(), escaped(&file.rfilename));
        let mut is_second = false;
        loop {
            let mut incoming = Incoming::open(&part, file.size)?;
            transfer.count(incoming.len);
            if file.size.is_none_or(|size| incoming.len < size) {
                let mut stream = self.open(&self.fetching, name, &url, incoming.len)?;
                let halt = stream.halt();
                let mut buffer = vec![0; BUFFER_BYTES];
                loop {
                    match stream.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(len) => {
                            incoming.write(&buffer[..len])?;
                            transfer.count(len as u64);
                        }
                        Err(error) => {
                            halt.check().map_err(|error| self.error(name, error))?;
                            return Err(HubError::Unreachable { name: name.clone(), reason: format!("read {url}: {error}") });
                        }
                    }
                }
            }
            let (len, found) = incoming.finish()?;
            let is_whole = file.size.is_none_or(|size| size == len);
            match file.lfs.as_ref().map(|lfs| &lfs.sha256) {
                Some(expected) if *expected != found => {
                    // A part that an earlier run left may be the cause.
                    std::fs::remove_file(&part).map_err(|error| failed(&part, error))?;
                    if is_second {
                        let (name, file, expected) = (name.clone(), file.rfilename.clone(), expected.clone());
                        return Err(HubError::Damaged { name, file, found, expected });
                    }
                    transfer.watch.say(&format!("{}: {} arrived damaged, it is fetched anew", name, file.rfilename));
                    is_second = true;
                }
                _ if !is_whole => {
                    std::fs::remove_file(&part).map_err(|error| failed(&part, error))?;
                    let reason = format!("{url} has {len} bytes, the hub lists {}", file.size());
                    return Err(HubError::Unreachable { name: name.clone(), reason });
                }
                _ => {
                    std::fs::rename(&part, &blob).map_err(|error| failed(&blob, error))?;
                    return Ok(blob);
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
                let revision = if is_plain { String::new() } else { format!(", or not the revision {}", name.revision()) };
                HubError::Missing { name, endpoint, revision }
            }
            peapod_data::Error::Store(error) if error.denied => {
                HubError::Denied { repository: name.repository().into(), name, endpoint, reason: error.reason }
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
    fn blob(&self, folder: &Path) -> PathBuf {
        let digest = self.lfs.as_ref().map(|lfs| &lfs.sha256).or(self.blob_id.as_ref());
        let digest = digest.filter(|digest| digest.len() >= 40 && digest.bytes().all(|byte| byte.is_ascii_hexdigit()));
        // What the hub does not name is named by its path.
        let name = digest.cloned().unwrap_or_else(|| self.rfilename.replace('/', "--"));
        folder.join("blobs").join(name)
    }

    /// What of it is still to come.
    fn missing_bytes(&self, folder: &Path) -> u64 {
        let blob = self.blob(folder);
        let here = [&blob, &part_of(&blob)].into_iter().find_map(|path| Some(path.metadata().ok()?.len()));
        self.size().saturating_sub(here.unwrap_or(0))
    }
}

/// A file while it comes.
struct Incoming<'a> {
    path: &'a Path,
    file: File,
    hasher: Sha256,
    len: u64,
}

impl<'a> Incoming<'a> {
    /// Goes on behind what is there already of a file of this size.
    fn open(path: &'a Path, size: Option<u64>) -> Result<Self, HubError> {
        let failed = |error| failed(path, error);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        let (mut hasher, mut len) = (Sha256::new(), 0);
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                read => {
                    hasher.update(&buffer[..read]);
                    len += read as u64;
                }
            }
        }
        if size.is_none_or(|size| len > size) && len > 0 {
            file.set_len(0).map_err(failed)?;
            (hasher, len) = (Sha256::new(), 0);
        }
        Ok(Self { path, file, hasher, len })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(|error| failed(self.path, error))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Its length and SHA-256, once it is on the disk.
    fn finish(self) -> Result<(u64, String), HubError> {
        self.file.sync_all().map_err(|error| failed(self.path, error))?;
        Ok((self.len, hex::encode(self.hasher.finalize())))
    }
}

/// How far a fetch is.
struct Transfer<'a> {
    name: &'a HubName,
    watch: &'a dyn Watch,
    total: u64,
    started: Instant,
    here: Cell<u64>,
    told: Cell<Instant>,
}

impl<'a> Transfer<'a> {
    fn begin(name: &'a HubName, watch: &'a dyn Watch, total: u64) -> Self {
        let now = Instant::now();
        Self { name, watch, total, started: now, here: Cell::new(0), told: Cell::new(now) }
    }

    fn count(&self, num_bytes: u64) {
        self.here.set(self.here.get() + num_bytes);
        self.watch.moved(num_bytes);
        if self.told.get().elapsed() >= TELL_EVERY {
            self.told.set(Instant::now());
            let rate = self.here.get() as f64 / self.started.elapsed().as_secs_f64();
            let line = format!("{}: {} of {} are here, {}/s", self.name, size(self.here.get()), size(self.total), size(rate as u64));
            self.watch.say(&line);
        }
    }
}

/// Waits until no other process fetches the model into the cache. The system gives the lock back however the process ends.
fn lock(name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<File, HubError> {
    let folder = name.folder(&cache.join(".locks"));
    create_folder(&folder)?;
    let path = folder.join("peapod.lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(|error| failed(&path, error))?;
    let blobs = name.folder(cache).join("blobs");
    let mut last = None;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                let now = num_bytes_in(&blobs);
                match last.replace(now) {
                    None => watch.say(&format!("another process fetches {name}: waiting for it")),
                    Some(before) if before != now => watch.moved(now.saturating_sub(before)),
                    Some(_) => {}
                }
                std::thread::sleep(LOCK_POLL);
            }
            Err(TryLockError::Error(error)) => return Err(failed(&path, error)),
        }
    }
}

/// Bytes of all files in a folder.
fn num_bytes_in(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten();
    files.filter_map(|file| Some(file.ok()?.metadata().ok()?.len())).sum()
}

/// Compares what is to come with what is free.
fn check_space(name: &HubName, folder: &Path, needed: u64) -> Result<(), HubError> {
    // A file system that does not say is found out when it is full.
    let Ok(found) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if needed <= free {
        return Ok(());
    }
    Err(HubError::NoSpace { name: name.clone(), needed: size(needed), free: size(free), cache: folder.display().to_string() })
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

/// Where a blob lies until it is whole.
fn part_of(blob: &Path) -> PathBuf {
    let mut name = blob.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    blob.with_file_name(name)
}

/// Makes `path`, which is the place of `file` in its snapshot, stand for a blob.
fn link(blob: &Path, path: &Path, file: &str) -> Result<(), HubError> {
    if let Some(parent) = path.parent() {
        create_folder(parent)?;
    }
    // From snapshots/COMMIT/ to blobs/, so that the cache can be moved.
    let up = "../".repeat(2 + file.matches('/').count());
    let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
    let temporary = path.with_extension("link");
    let _ = std::fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&target, &temporary).map_err(|error| failed(&temporary, error))?;
    std::fs::rename(&temporary, path).map_err(|error| failed(path, error))
}

/// Writes a file that is there as a whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    if let Some(parent) = path.parent() {
        create_folder(parent)?;
    }
    let temporary = part_of(path);
    std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path)).map_err(|error| failed(path, error))
}

fn create_folder(path: &Path) -> Result<(), HubError> {
    std::fs::create_dir_all(path).map_err(|error| failed(path, error))
}

fn failed(path: &Path, source: io::Error) -> HubError {
    HubError::Cache { path: path.display().to_string(), source }
}

#[cfg(test)]
mod tests;
