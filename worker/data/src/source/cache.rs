//! Whole shards kept on a local disk, as their stores gave them.
//!
//! ```text
//! FOLDER/lock                                       held while files are made, removed or counted
//! FOLDER/ADDRESS-VERSION-SIZE-CRC.shard             whole; its time of change is that of its last use
//! FOLDER/ADDRESS-VERSION-SIZE-PROCESS-NUMBER.part   being filled, and locked as long as its owner lives
//! ```
//!
//! Processes share a folder without knowing of each other. Whatever one of them leaves behind when it is killed is removed by the next, and
//! a shard is checked against its name before it is used, so no file has to be trusted. A cache that fails is no reason to stop: shards are
//! then read from their stores.

use std::collections::HashMap;
use std::fs::{DirEntry, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::address::{shown_url, unsigned};
use super::remote::Identity;
use crate::{Error, Result};

/// So much of a shard is read on behind the end of its tar, which readers leave alone, to have it whole.
const MAX_REST: u64 = 1 << 20;

const READ_BYTES: usize = 1 << 20;

/// A folder of shards.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    max_bytes: u64,
    /// Which version of a shard its store last had when this process asked, by address.
    known: Mutex<HashMap<String, String>>,
}

/// A shard that is in the cache, and under which name.
pub type Found = Option<(File, PathBuf)>;

impl Cache {
    pub fn new(folder: PathBuf, max_bytes: u64) -> Self {
        Self { folder, max_bytes, known: Mutex::default() }
    }

    /// This version of a shard; it is the one that is [`known`](Self::known) from now on.
    ///
    /// Errors: [`Error::Cancelled`].
    pub fn get(&self, url: &str, identity: &Identity, is_cancelled: &dyn Fn() -> bool) -> Result<Found> {
        let Some(key) = key_of(url, identity) else { return Ok(None) };
        self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(address_of(url), key.clone());
        self.newest(&key, is_cancelled)
    }

    /// The version of a shard that its store had when it was last asked. One that an earlier job has left may be of yesterday.
    ///
    /// Errors: [`Error::Cancelled`].
    pub fn known(&self, url: &str, is_cancelled: &dyn Fn() -> bool) -> Result<Found> {
        let key = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&address_of(url)).cloned();
        key.map_or(Ok(None), |key| self.newest(&key, is_cancelled))
    }

    /// The file used last among those of a version.
    fn newest(&self, key: &str, is_cancelled: &dyn Fn() -> bool) -> Result<Found> {
        let start = format!("{key}-");
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return Ok(None) };
        let mut found: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.starts_with(&start) && name.ends_with(".shard")))
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        found.sort_unstable();
        for (_, path) in found.into_iter().rev() {
            if let Some(file) = open_checked(&path, is_cancelled)? {
                return Ok(Some((file, path)));
            }
        }
        Ok(None)
    }

    /// Makes room for a shard that is about to be read. `None` if it is not to be kept.
    pub fn begin(&self, url: &str, identity: &Identity) -> Option<Filling> {
        let (key, size) = (key_of(url, identity)?, identity.size?);
        if size > self.max_bytes {
            return None;
        }
        match self.make_room(size).and_then(|lock| lock.map(|lock| self.create(key, size, &lock)).transpose()) {
            Ok(filling) => filling,
            Err(error) => {
                tracing::warn!("cache {}: {error}; {} is not kept", self.folder.display(), shown_url(url));
                None
            }
        }
    }

    /// Removes what is left over and what was used longest ago. `None` if others are filling the cache.
    fn make_room(&self, size: u64) -> io::Result<Option<File>> {
        std::fs::create_dir_all(&self.folder)?;
        let lock = lock(&self.folder)?;
        let (mut used, mut whole) = (size, Vec::new());
        for entry in std::fs::read_dir(&self.folder)?.flatten() {
            match Kept::of(&entry) {
                Some(Kept::Whole { size, last_use }) => {
                    used += size;
                    whole.push((last_use, size, entry.path()));
                }
                Some(Kept::Filling { size }) => used += size,
                Some(Kept::Abandoned) => remove(&entry.path())?,
                None => {}
            }
        }
        whole.sort_unstable();
        for (_, size, path) in whole {
            if used <= self.max_bytes {
                break;
            }
            // One who reads it keeps what is open.
            remove(&path)?;
            used -= size;
        }
        Ok((used <= self.max_bytes).then_some(lock))
    }

    /// With the folder locked, so that nobody takes the new file for an abandoned one.
    fn create(&self, key: String, size: u64, _lock: &File) -> io::Result<Filling> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = self.folder.join(format!("{key}-{size}-{}-{number}.part", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        file.lock()?;
        Ok(Filling { folder: self.folder.clone(), path, key, size, len: 0, file, checksum: crc32fast::Hasher::new() })
    }
}

/// A file of the cache.
enum Kept {
    Whole { size: u64, last_use: SystemTime },
    Filling { size: u64 },
    Abandoned,
}

impl Kept {
    /// `None` if it is not the cache's, or gone.
    fn of(entry: &DirEntry) -> Option<Self> {
        let name = entry.file_name();
        let name = name.to_str()?;
        if name.ends_with(".shard") {
            let metadata = entry.metadata().ok()?;
            return Some(Self::Whole { size: metadata.len(), last_use: metadata.modified().ok()? });
        }
        let size = name.strip_suffix(".part")?.split('-').nth(2)?.parse().ok()?;
        // Its owner's lock ends with its owner, however that ends.
        let is_alive = File::open(entry.path()).ok()?.try_lock_shared().is_err();
        Some(if is_alive { Self::Filling { size } } else { Self::Abandoned })
    }
}

fn lock(folder: &Path) -> io::Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(folder.join("lock"))?;
    file.lock()?;
    Ok(file)
}

/// Removes a file that another may be removing too.
fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A list that is signed anew names the same shards.
fn address_of(url: &str) -> String {
    hex::encode(&Sha256::digest(unsigned(url).as_bytes())[..12])
}

/// Names a version of a shard; `None` if its store does not tell versions apart.
fn key_of(url: &str, identity: &Identity) -> Option<String> {
    let version = identity.etag.as_ref().or(identity.modified.as_ref())?;
    Some(format!("{}-{}", address_of(url), hex::encode(&Sha256::digest(version)[..8])))
}

/// Opens a shard if it is what its name says; removes it if not.
///
/// It is read to its end for that, before its first byte is used: samples that were trained cannot be taken back. What is read here is in
/// the system's memory afterwards.
///
/// Errors: [`Error::Cancelled`].
fn open_checked(path: &Path, is_cancelled: &dyn Fn() -> bool) -> Result<Option<File>> {
    let mut parts = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default().split('-').skip(2);
    let (size, checksum) = (parts.next().and_then(|size| size.parse::<u64>().ok()), parts.next().map(str::to_owned));
    let open = || -> io::Result<Option<File>> {
        let mut file = File::open(path)?;
        if Some(file.metadata()?.len()) != size {
            return Ok(None);
        }
        let (mut hasher, mut buf) = (crc32fast::Hasher::new(), vec![0; READ_BYTES]);
        loop {
            match file.read(&mut buf)? {
                0 => break,
                _ if is_cancelled() => return Err(io::Error::other("cancelled")),
                len => hasher.update(&buf[..len]),
            }
        }
        if checksum != Some(format!("{:08x}", hasher.finalize())) {
            return Ok(None);
        }
        file.rewind()?;
        // Not being able to note the use costs an early eviction at worst.
        let _ = file.set_modified(SystemTime::now());
        Ok(Some(file))
    };
    match open() {
        Ok(Some(file)) => Ok(Some(file)),
        Ok(None) => {
            tracing::warn!("cache file {} is damaged; its shard is fetched again", path.display());
            let _ = std::fs::remove_file(path);
            Ok(None)
        }
        Err(_) if is_cancelled() => Err(Error::Cancelled),
        Err(_) => Ok(None),
    }
}

/// A shard on its way into the cache. Dropped before it is whole, it leaves nothing.
#[derive(Debug)]
pub struct Filling {
    folder: PathBuf,
    path: PathBuf,
    key: String,
    size: u64,
    len: u64,
    file: File,
    checksum: crc32fast::Hasher,
}

impl Filling {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.checksum.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn rest(&self) -> u64 {
        self.size.saturating_sub(self.len)
    }

    /// Gives the whole file its name.
    fn finish(self) -> io::Result<()> {
        let _lock = lock(&self.folder)?;
        // The time of a write is rounded down, further than two uses may be apart.
        self.file.set_modified(SystemTime::now())?;
        let name = format!("{}-{}-{:08x}.shard", self.key, self.size, self.checksum.clone().finalize());
        std::fs::rename(&self.path, self.folder.join(name))
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        // After `finish` there is none.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Reads on, and keeps what it reads.
pub struct Tee<R: Read> {
    inner: R,
    filling: Option<Filling>,
}

impl<R: Read> Tee<R> {
    pub fn new(inner: R, filling: Filling) -> Self {
        Self { inner, filling: Some(filling) }
    }

    fn keep(&mut self, bytes: &[u8]) {
        let Some(mut filling) = self.filling.take() else { return };
        let written = filling.write(bytes);
        let kept = match written {
            Ok(()) if filling.rest() > 0 => {
                self.filling = Some(filling);
                return;
            }
            // A store that sends more than it announced is not to be remembered.
            Ok(()) if filling.len > filling.size => return,
            Ok(()) => filling.finish(),
            Err(error) => Err(error),
        };
        if let Err(error) = kept {
            tracing::warn!("cache: {error}; a shard is not kept");
        }
    }
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buf)?;
        self.keep(&buf[..len]);
        Ok(len)
    }
}

impl<R: Read> Drop for Tee<R> {
    fn drop(&mut self) {
        if self.filling.as_ref().is_some_and(|filling| filling.rest() <= MAX_REST) {
            let mut buf = vec![0; READ_BYTES];
            while self.filling.is_some() && self.read(&mut buf).is_ok_and(|len| len > 0) {}
        }
    }
}
