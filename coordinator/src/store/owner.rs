//! Whose a shared store is. A state folder is locked; a store of objects knows no locks, and a coordinator that was taken for dead may
//! live.
//!
//! Who starts takes the store over, and says so in a file. Who finds another's name there before it writes or removes a checkpoint stops:
//! so the newest coordinator writes, and no other. Between that look and the manifest lie moments in which both may write. Even then each
//! checkpoint is whole, with the ledger of its weights.

use std::time::SystemTime;

use object_store::path::Path as Key;
use object_store::{ObjectStoreExt, PutPayload};
use peapod_proto::program::host_name;
use serde::{Deserialize, Serialize};

use super::{Store, StoreError};

/// Who has a store.
const OWNER: &str = "coordinator.json";

/// A coordinator with its state folder, through all its starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// What no other one has.
    pub id: String,
    /// The machine it runs on.
    pub host: String,
    /// When it was started, in UTC.
    pub since: String,
}

impl Owner {
    /// This process, under its state folder's id.
    #[must_use]
    pub fn this(id: String) -> Self {
        Self { id, host: host_name(), since: humantime::format_rfc3339_seconds(SystemTime::now()).to_string() }
    }
}

impl Store {
    /// Makes `owner` the only one who writes checkpoints here; another one that does so notices and stops.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn take_over(&mut self, owner: Owner) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec_pretty(&owner).map_err(|error| self.damaged(OWNER.into(), error))?;
        self.objects.put(&Key::from(OWNER), PutPayload::from(bytes)).await.map_err(|error| self.failed(error))?;
        self.owner = Some(owner);
        Ok(())
    }

    /// Looks whether the store is still this process's, if it ever was.
    ///
    /// # Errors
    /// [`StoreError::TakenOver`]; [`StoreError::Store`].
    pub async fn check_owner(&self) -> Result<(), StoreError> {
        let Some(ours) = &self.owner else { return Ok(()) };
        match self.read_owner().await? {
            Some(by) if by.id != ours.id => Err(StoreError::TakenOver { root: self.root.clone(), by }),
            // Somebody has cleared the store: nobody else claims it.
            Some(_) | None => Ok(()),
        }
    }

    /// Who has the store. A file that cannot be read, which only a hand can have written, names nobody.
    ///
    /// # Errors
    /// [`StoreError::Store`].
    pub async fn read_owner(&self) -> Result<Option<Owner>, StoreError> {
        match self.objects.get(&Key::from(OWNER)).await {
            Ok(found) => Ok(serde_json::from_slice(&found.bytes().await.map_err(|error| self.failed(error))?).ok()),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed(error)),
        }
    }
}
