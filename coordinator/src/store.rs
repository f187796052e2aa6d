//! Checkpoints in an object store: parts first, the manifest last and create-only, so that half a checkpoint is none.

mod owner;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, pin_mut};
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};
use peapod_data::source::one_line;
use peapod_proto::ids::{Generation, Step};
use peapod_proto::message::ValidationLosses;
use serde::{Deserialize, Serialize};

pub use owner::Owner;

use crate::core::ledger::Ledger;
use crate::shard_list::ShardList;

/// What keeps a checkpoint from being written or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store itself failed.
    #[error("checkpoint store {root}: {}", one_line(.error))]
    Store {
        /// The store.
        root: String,
        /// What it said.
        error: object_store::Error,
    },
    /// A stored file is not what the manifest says.
    #[error("checkpoint {name} in {root} is damaged: {reason}")]
    Damaged {
        /// The store.
        root: String,
        /// The checkpoint.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The store's address cannot be used.
    #[error("checkpoint store {0}")]
    Address(peapod_data::Error),
    /// Another coordinator has taken the store over.
    #[error("checkpoint store {root}: the coordinator on {} has it since {}; two must not write there, and this is the older one", .by.host, .by.since)]
    TakenOver {
        /// The store.
        root: String,
        /// Who has it now.
        by: Owner,
    },
    /// The folder cannot be used.
    #[error("checkpoint store {root}: {source}")]
    Folder {
        /// The folder.
        root: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// File name.
    pub name: String,
    /// Size.
    pub num_bytes: u64,
    /// SHA-256, hexadecimal.
    pub sha256: String,
}

/// What makes a checkpoint whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this file's layout.
    pub format: u32,
    /// The step its weights are of.
    pub step: Step,
    /// The generation that trained it.
    pub generation: Generation,
    /// The job file it was trained with.
    pub job: String,
    /// The shards that its ledger's numbers stand for; none in a checkpoint of before they were kept.
    #[serde(default)]
    pub shards: Vec<ShardList>,
    /// The newest losses on the validation samples that were known when it was stored; their step says whether they are of its weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<Validation>,
    /// Its files.
    pub parts: Vec<Part>,
}

/// Losses on the validation samples, as a manifest keeps them. What is not finite is null.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// The step whose weights they are of.
    pub step: Step,
    /// Number of samples.
    pub samples: u32,
    /// Diffusion loss.
    pub task: Option<f32>,
    /// Distance of the predictions.
    pub logit: Option<f32>,
    /// Distance of the features, unweighted.
    pub feature: Option<f32>,
}

impl From<ValidationLosses> for Validation {
    fn from(losses: ValidationLosses) -> Self {
        let ValidationLosses { step, samples, task, logit, feature } = losses;
        let [task, logit, feature] = [task, logit, feature].map(|loss| Some(loss).filter(|loss| loss.is_finite()));
        Self { step, samples, task, logit, feature }
    }
}

impl From<Validation> for ValidationLosses {
    fn from(kept: Validation) -> Self {
        let Validation { step, samples, task, logit, feature } = kept;
        let [task, logit, feature] = [task, logit, feature].map(|loss| loss.unwrap_or(f32::NAN));
        Self { step, samples, task, logit, feature }
    }
}

impl Manifest {
    /// Layout this program writes and reads.
    pub const FORMAT: u32 = 2;

    fn name(&self) -> String {
        name(self.step, self.generation)
    }
}

const MANIFEST: &str = "manifest.json";
/// What of a file is sent to a store at once.
const CHUNK_BYTES: usize = 8 << 20;
/// The file that the coordinator itself adds to a checkpoint.
pub const LEDGER: &str = "ledger.json";

fn name(step: Step, generation: Generation) -> String {
    format!("step-{:09}-{generation}", step.0)
}

/// The step and generation that a folder is named after; none if it is not a checkpoint's.
fn key_of(folder: &Key) -> Option<(Step, Generation)> {
    let (step, generation) = folder.as_ref().strip_prefix("step-")?.split_once("-g")?;
    let key = (Step(step.parse().ok()?), Generation(generation.parse().ok()?));
    (name(key.0, key.1) == folder.as_ref()).then_some(key)
}

/// A store of checkpoints.
#[derive(Debug, Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    /// Where it is on this machine, if it is.
    folder: Option<PathBuf>,
    root: String,
    /// Who writes there as far as this process knows: nobody else is looked out for in a store that is not owned.
    owner: Option<Owner>,
}

impl Store {
    /// A store at an address: a local folder, or a folder in a store of objects (`s3://bucket/folder`), whose credentials come from the
    /// environment.
    ///
    /// # Errors
    /// [`StoreError::Folder`] if the folder cannot be made or used; [`StoreError::Address`] if this build or the environment cannot reach
    /// the store. Whether it lets anybody in is only known when it is used.
    pub fn at(address: &str) -> Result<Self, StoreError> {
        match address.strip_prefix("file://") {
            Some(folder) => Self::local(Path::new(folder)),
            None if address.contains("://") => {
                let (objects, path) = peapod_data::source::folder_at(address).map_err(StoreError::Address)?;
                Ok(Self::of(Arc::new(PrefixStore::new(objects, path)), address.trim_end_matches('/')))
            }
            None => Self::local(Path::new(address)),
        }
    }

    fn of(objects: Arc<dyn ObjectStore>, root: &str) -> Self {
        Self { objects, folder: None, root: root.to_owned(), owner: None }
    }

    /// A store in a local folder, which is made if it is not there.
    ///
    /// # Errors
    /// [`StoreError::Folder`] if the folder cannot be made or used.
    pub fn local(folder: &Path) -> Result<Self, StoreError> {
        let root = folder.display().to_string();
        let with_root = |source| StoreError::Folder { root: root.clone(), source };
        std::fs::create_dir_all(folder).map_err(with_root)?;
        let folder = folder.canonicalize().map_err(with_root)?;
        let objects = object_store::local::LocalFileSystem::new_with_prefix(&folder)
            .map_err(|error| StoreError::Store { root: root.clone(), error })?
            .with_fsync(true);
        let root = folder.display().to_string();
        Ok(Self { objects: Arc::new(objects), folder: Some(folder), root, owner: None })
    }

    /// Where it is, for people.
    #[must_use]
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Where a checkpoint lies, for people.
    #[must_use]
    pub fn location(&self, step: Step, generation: Generation) -> String {
        format!("{}/{}", self.root, name(step, generation))
    }

    fn failed(&self, error: object_store::Error) -> StoreError {
        StoreError::Store { root: self.root.clone(), error }
    }

    fn damaged(&self, name: String, reason: impl std::fmt::Display) -> StoreError {
        StoreError::Damaged { root: self.root.clone(), name, reason: reason.to_string() }
    }

    /// Starts to write one file of a checkpoint.
    ///
    /// # Errors
    /// [`StoreError::Store`]; [`StoreError::TakenOver`].
    pub async fn begin_part(&self, step: Step, generation: Generation, part: &str) -> Result<PartWriter, StoreError> {
        self.check_owner().await?;
        let key = Key::from(format!("{}/{part}", name(step, generation)));
        let upload = self.objects.put_multipart(&key).await.map_err(|error| self.failed(error))?;
        Ok(PartWriter { writer: Some(WriteMultipart::new_with_chunk_size(upload, CHUNK_BYTES)), root: self.root.clone() })
    }

    /// Makes a checkpoint whole, once all its parts are there: adds the ledger, then the manifest.
    ///
    /// # Errors
    /// [`StoreError::Store`], also when a manifest of this step and generation exists already; [`StoreError::TakenOver`].
    pub async fn seal(&self, mut manifest: Manifest, ledger: &Ledger) -> Result<(), StoreError> {
        self.check_owner().await?;
        let name = manifest.name();
        let bytes = serde_json::to_vec(ledger).map_err(|error| self.damaged(name.clone(), error))?;
        manifest.parts.push(Part { name: LEDGER.into(), num_bytes: bytes.len() as u64, sha256: hex::encode(sha256(&bytes)) });
        self.objects.put(&Key::from(format!("{name}/{LEDGER}")), PutPayload::from(bytes)).await.map_err(|error| self.failed(error))?;
        let bytes = serde_json::to_vec_pretty(&manifest).map_err(|error| self.damaged(name.clone(), error))?;
        let key = Key::from(format!("{name}/{MANIFEST}"));
        self.objects.put_opts(&key, PutPayload::from(bytes), PutMode::Create.into()).await.map_err(|error| self.failed(error))?;
        Ok(())
    }

    /// Whether there is a whole checkpoint of this step and generation.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn is_whole(&self, step: Step, generation: Generation) -> Result<bool, StoreError> {
        match self.objects.head(&Key::from(format!("{}/{MANIFEST}", name(step, generation)))).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// The folders of checkpoints, whole or not, oldest first.
    async fn folders(&self) -> Result<Vec<(Step, Generation)>, StoreError> {
        let folders = self.objects.list_with_delimiter(None).await.map_err(|error| self.failed(error))?.common_prefixes;
        let mut keys: Vec<_> = folders.iter().filter_map(key_of).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    /// The manifest in a checkpoint's folder. Without one it is of a writer that died, and does not count.
    async fn manifest(&self, step: Step, generation: Generation) -> Result<Option<Manifest>, StoreError> {
        let name = name(step, generation);
        let bytes = match self.objects.get(&Key::from(format!("{name}/{MANIFEST}"))).await {
            Ok(found) => found.bytes().await.map_err(|error| self.failed(error))?,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.failed(error)),
        };
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| self.damaged(name.clone(), format!("{MANIFEST}: {error}")))?;
        if manifest.format != Manifest::FORMAT {
            return Err(self.damaged(name, format!("its format is {}, this program reads {}", manifest.format, Manifest::FORMAT)));
        }
        if (manifest.step, manifest.generation) != (step, generation) {
            return Err(self.damaged(name, format!("its {MANIFEST} is of {}", manifest.name())));
        }
        Ok(Some(manifest))
    }

    /// All whole checkpoints, oldest first. A damaged one is passed over with a warning: it is no reason not to see the others.
    ///
    /// # Errors
    /// [`StoreError::Store`] if the store cannot be read.
    pub async fn list(&self) -> Result<Vec<Manifest>, StoreError> {
        let mut manifests = Vec::new();
        for (step, generation) in self.folders().await? {
            match self.manifest(step, generation).await {
                Ok(manifest) => manifests.extend(manifest),
                Err(damaged @ StoreError::Damaged { .. }) => tracing::warn!("{damaged}"),
                Err(error) => return Err(error),
            }
        }
        Ok(manifests)
    }

    /// The newest whole checkpoint with its ledger, every byte of it checked. Others are not looked at.
    ///
    /// # Errors
    /// [`StoreError`] if the newest one is damaged: going on from an older one would lose steps without a word.
    pub async fn newest(&self) -> Result<Option<(Manifest, Ledger)>, StoreError> {
        let Some(manifest) = self.newest_manifest().await? else { return Ok(None) };
        for part in &manifest.parts {
            self.check(&manifest, part).await?;
        }
        let bytes = self.read(&manifest, LEDGER).await?;
        let ledger = serde_json::from_slice(&bytes).map_err(|error| self.damaged(manifest.name(), format!("{LEDGER}: {error}")))?;
        Ok(Some((manifest, ledger)))
    }

    /// The manifest of the newest whole checkpoint.
    ///
    /// # Errors
    /// [`StoreError`] if it cannot be read.
    pub async fn newest_manifest(&self) -> Result<Option<Manifest>, StoreError> {
        for (step, generation) in self.folders().await?.into_iter().rev() {
            if let Some(manifest) = self.manifest(step, generation).await? {
                return Ok(Some(manifest));
            }
        }
        Ok(None)
    }

    /// Holds one file of a checkpoint against its manifest.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn check(&self, manifest: &Manifest, part: &Part) -> Result<(), StoreError> {
        use sha2::Digest;
        let key = Key::from(format!("{}/{}", manifest.name(), part.name));
        let found = self.objects.head(&key).await.map_err(|error| match error {
            object_store::Error::NotFound { .. } => self.damaged(manifest.name(), format!("{} is missing", part.name)),
            error => self.failed(error),
        })?;
        if found.size != part.num_bytes {
            let reason = format!("{} has {} bytes, the manifest says {}", part.name, found.size, part.num_bytes);
            return Err(self.damaged(manifest.name(), reason));
        }
        let stream = self.stream(manifest, &part.name).await?;
        pin_mut!(stream);
        let mut hasher = sha2::Sha256::new();
        while let Some(bytes) = stream.next().await {
            hasher.update(&bytes?);
        }
        if hex::encode(hasher.finalize()) == part.sha256 { Ok(()) } else { Err(self.not_its_bytes(manifest, &part.name)) }
    }

    fn not_its_bytes(&self, manifest: &Manifest, part: &str) -> StoreError {
        self.damaged(manifest.name(), format!("{part} does not have the manifest's SHA-256"))
    }

    /// The checkpoint of `step` that was made last.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn find(&self, step: Step) -> Result<Option<Manifest>, StoreError> {
        for (_, generation) in self.folders().await?.into_iter().rev().filter(|&(found, _)| found == step) {
            match self.manifest(step, generation).await {
                Ok(None) => {}
                Err(damaged @ StoreError::Damaged { .. }) => tracing::warn!("{damaged}"),
                found => return found,
            }
        }
        Ok(None)
    }

    /// One file of a checkpoint, if it is what the manifest says.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn read(&self, manifest: &Manifest, part: &str) -> Result<bytes::Bytes, StoreError> {
        let key = Key::from(format!("{}/{part}", manifest.name()));
        let found = self.objects.get(&key).await.map_err(|error| self.failed(error))?;
        let bytes = found.bytes().await.map_err(|error| self.failed(error))?;
        let expected = manifest.parts.iter().find(|known| known.name == part).map(|part| part.sha256.clone());
        if expected.as_deref() != Some(hex::encode(sha256(&bytes)).as_str()) {
            return Err(self.not_its_bytes(manifest, part));
        }
        Ok(bytes)
    }

    /// Streams one file of a checkpoint.
    ///
    /// # Errors
    /// [`StoreError`] from the call or from the stream.
    pub async fn stream(
        &self,
        manifest: &Manifest,
        part: &str,
    ) -> Result<impl futures::Stream<Item = Result<bytes::Bytes, StoreError>> + Send + use<>, StoreError> {
        let key = Key::from(format!("{}/{part}", manifest.name()));
        let found = self.objects.get(&key).await.map_err(|error| self.failed(error))?;
        let root = self.root.clone();
        Ok(found.into_stream().map_err(move |error| StoreError::Store { root: root.clone(), error }))
    }

    /// Deletes all but the newest `keep` whole checkpoints, and what writers that failed left behind before the newest.
    ///
    /// # Errors
    /// [`StoreError::Store`]; [`StoreError::TakenOver`].
    pub async fn retain(&self, keep: u32) -> Result<(), StoreError> {
        self.check_owner().await?;
        let folders = self.folders().await?;
        let mut whole = Vec::new();
        for &(step, generation) in &folders {
            if self.is_whole(step, generation).await? {
                whole.push((step, generation));
            }
        }
        let num_kept = whole.len().min(keep as usize);
        let kept = whole.split_off(whole.len() - num_kept);
        let Some(newest) = kept.last() else { return Ok(()) };
        // Whoever still writes an older one is told that it is not wanted.
        for &(step, generation) in folders.iter().filter(|folder| *folder < newest && !kept.contains(folder)) {
            self.delete(&Key::from(name(step, generation))).await?;
        }
        Ok(())
    }

    /// Takes a checkpoint away, whole or not.
    ///
    /// # Errors
    /// [`StoreError::Store`]; [`StoreError::TakenOver`].
    pub async fn remove(&self, step: Step, generation: Generation) -> Result<(), StoreError> {
        self.check_owner().await?;
        self.delete(&Key::from(name(step, generation))).await
    }

    async fn delete(&self, folder: &Key) -> Result<(), StoreError> {
        // The manifest first: whatever happens next, no reader takes a checkpoint that has begun to vanish.
        match self.objects.delete(&folder.clone().join(MANIFEST)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => return Err(self.failed(error)),
        }
        let mut objects = self.objects.list(Some(folder));
        while let Some(object) = objects.next().await {
            let object = object.map_err(|error| self.failed(error))?;
            self.objects.delete(&object.location).await.map_err(|error| self.failed(error))?;
        }
        // The store knows no folders: what is left of this one is empty, unless somebody has put something of his own into it.
        if let Some(root) = &self.folder {
            let _ = tokio::fs::remove_dir(root.join(folder.as_ref())).await;
        }
        Ok(())
    }
}

/// Writes one file. Dropped before [`PartWriter::finish`], it leaves no file.
pub struct PartWriter {
    /// None once it is finished.
    writer: Option<WriteMultipart>,
    root: String,
}

impl Drop for PartWriter {
    fn drop(&mut self) {
        // Stores keep, and charge for, the pieces of an upload that is neither finished nor given up.
        if let (Some(writer), Ok(runtime)) = (self.writer.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn(writer.abort());
        }
    }
}

impl PartWriter {
    /// Adds bytes; waits when the store is behind.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn write(&mut self, bytes: bytes::Bytes) -> Result<(), StoreError> {
        if let Some(writer) = &mut self.writer {
            writer.wait_for_capacity(2).await.map_err(|error| StoreError::Store { root: self.root.clone(), error })?;
            writer.put(bytes);
        }
        Ok(())
    }

    /// Makes the file appear.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn finish(mut self) -> Result<(), StoreError> {
        let Some(writer) = self.writer.take() else { return Ok(()) };
        writer.finish().await.map(drop).map_err(|error| StoreError::Store { root: self.root.clone(), error })
    }
}

/// SHA-256 of `bytes`.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}

#[cfg(test)]
mod tests;
