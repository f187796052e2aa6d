//! The cache of the Python libraries, as one of several that write to it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use peapod_model::hub::HubName;
use sha2::{Digest, Sha256};

use super::{BUFFER_BYTES, HubError, Watch};
use crate::shards::size;

/// How often another's fetch is looked at.
const LOCK_POLL: Duration = Duration::from_millis(500);

/// Waits until no other process fetches the model into the cache. The system gives the lock back however the process ends.
pub(super) fn lock(name: &HubName, cache: &Path, watch: &dyn Watch) -> Result<File, HubError> {
    let folder = name.folder(&cache.join(".locks"));
    let path = folder.join("peapod.lock");
    let failed = |error| CacheError::new(&path, error).of(name);
    create_folder(&folder).map_err(|failed| failed.of(name))?;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
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
            // A file system without locks: two may fetch the same, which is found out when a file has come.
            Err(TryLockError::Error(error)) if NO_LOCKS.iter().any(|code| error.raw_os_error() == Some(*code)) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
    }
}

/// What file systems answer that have no locks.
const NO_LOCKS: [i32; 3] = [libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOLCK];

/// Bytes of all files in a folder.
fn num_bytes_in(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten();
    files.filter_map(|file| Some(file.ok()?.metadata().ok()?.len())).sum()
}

/// Compares what is to come with what is free.
pub(super) fn check_space(name: &HubName, folder: &Path, needed: u64) -> Result<(), HubError> {
    // A file system that does not say is found out when it is full.
    let Ok(found) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if needed <= free {
        return Ok(());
    }
    Err(HubError::NoSpace { name: name.clone(), needed: size(needed), free: size(free), cache: folder.display().to_string() })
}

/// A file while it comes.
pub(super) struct Incoming<'a> {
    path: &'a Path,
    file: File,
    hasher: Sha256,
    pub(super) len: u64,
}

impl<'a> Incoming<'a> {
    /// Goes on behind what is there already of a file of this size.
    pub(super) fn open(path: &'a Path, size: Option<u64>) -> Result<Self, CacheError> {
        let failed = |error| CacheError::new(path, error);
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

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), CacheError> {
        self.file.write_all(bytes).map_err(|error| CacheError::new(self.path, error))?;
        self.hasher.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// What came, once it is on the disk.
    pub(super) fn finish(self) -> Result<Received, CacheError> {
        let failed = |error| CacheError::new(self.path, error);
        self.file.sync_all().map_err(failed)?;
        let is_alone = self.file.metadata().map_err(failed)?.len() == self.len;
        Ok(Received { len: self.len, sha256: hex::encode(self.hasher.finalize()), is_alone })
    }
}

pub(super) struct Received {
    pub(super) len: u64,
    pub(super) sha256: String,
    /// Whether nobody else has written to the file.
    pub(super) is_alone: bool,
}

/// Where a blob lies until it is whole.
pub(super) fn part_of(blob: &Path) -> PathBuf {
    let mut name = blob.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    blob.with_file_name(name)
}

/// Makes the files of a snapshot stand for their blobs. A snapshot that is not there yet appears when it is whole.
pub(super) fn place(blobs: &[(PathBuf, &str)], snapshot: &Path) -> Result<(), CacheError> {
    let link_all = |folder: &Path| blobs.iter().try_for_each(|(blob, file)| link(blob, &folder.join(file), file));
    if snapshot.is_dir() {
        return link_all(snapshot);
    }
    let mut name = std::ffi::OsString::from(".");
    name.push(snapshot.file_name().unwrap_or_default());
    let filled = part_of(&snapshot.with_file_name(name));
    link_all(&filled)?;
    match std::fs::rename(&filled, snapshot) {
        Ok(()) => Ok(()),
        // Another program has made it meanwhile.
        Err(_) if snapshot.is_dir() => {
            link_all(snapshot)?;
            std::fs::remove_dir_all(&filled).map_err(|error| CacheError::new(&filled, error))
        }
        Err(error) => Err(CacheError::new(snapshot, error)),
    }
}

/// Makes `path`, which is the place of `file` in its snapshot, stand for a blob. What is there already stays.
fn link(blob: &Path, path: &Path, file: &str) -> Result<(), CacheError> {
    if path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_folder(parent)?;
    }
    // From snapshots/COMMIT/ to blobs/, so that the cache can be moved.
    let up = "../".repeat(2 + file.matches('/').count());
    let target = Path::new(&up).join("blobs").join(blob.file_name().unwrap_or_default());
    let temporary = part_of(path);
    let _ = std::fs::remove_file(&temporary);
    std::os::unix::fs::symlink(&target, &temporary).map_err(|error| CacheError::new(&temporary, error))?;
    std::fs::rename(&temporary, path).map_err(|error| CacheError::new(path, error))
}

/// The names of all files below a folder, as a repository lists them.
pub(super) fn files_below(folder: &Path) -> Vec<String> {
    let (mut files, mut folders) = (Vec::new(), vec![String::new()]);
    while let Some(below) = folders.pop() {
        for entry in std::fs::read_dir(folder.join(&below)).into_iter().flatten().flatten() {
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            match entry.path() {
                path if path.is_dir() => folders.push(format!("{name}/")),
                // A link whose blob is gone leads nowhere.
                path if path.exists() => files.push(name),
                _ => {}
            }
        }
    }
    files
}

/// Writes a file that is there as a whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), CacheError> {
    if let Some(parent) = path.parent() {
        create_folder(parent)?;
    }
    let temporary = part_of(path);
    let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    written.map_err(|error| CacheError::new(path, error))
}

pub(super) fn create_folder(path: &Path) -> Result<(), CacheError> {
    std::fs::create_dir_all(path).map_err(|error| CacheError::new(path, error))
}

/// What the system said of a path in the cache.
#[derive(Debug)]
pub(super) struct CacheError {
    path: PathBuf,
    source: io::Error,
}

impl CacheError {
    pub(super) fn new(path: &Path, source: io::Error) -> Self {
        Self { path: path.to_owned(), source }
    }

    /// The same, with the model that was to come there.
    pub(super) fn of(self, name: &HubName) -> HubError {
        HubError::Cache { name: name.clone(), path: self.path, source: self.source }
    }
}
