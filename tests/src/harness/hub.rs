//! A small model hub: listings and small files on one server, large files on another, as the real one has them.
//!
//! The tests of the crate that fetches models include this file too.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::http::FileServer;

/// Files from this size on are large: the hub knows their SHA-256, and points to where they are.
const LARGE: usize = 4096;

/// A hub on ports of its own; it ends when it is dropped.
#[derive(Debug)]
pub struct HubServer {
    /// Listings and small files.
    pub hub: FileServer,
    /// Large files.
    pub store: FileServer,
}

impl HubServer {
    /// Starts a hub without models.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn start() -> Self {
        Self { hub: FileServer::start(), store: FileServer::start() }
    }

    /// What `HF_ENDPOINT` says of it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        self.hub.url("").trim_end_matches('/').to_owned()
    }

    /// Puts a commit of a model there, which `revision` stands for.
    pub fn put(&self, repository: &str, revision: &str, commit: &str, files: &[(&str, &[u8])]) {
        let listed = files.iter().map(|(name, bytes)| {
            let path = format!("{repository}/resolve/{commit}/{name}");
            let digest = hex::encode(Sha256::digest(bytes));
            let mut file = serde_json::json!({ "rfilename": name, "size": bytes.len(), "blobId": digest[..40] });
            if bytes.len() < LARGE {
                self.hub.put(&path, bytes);
            } else {
                file["lfs"] = serde_json::json!({ "sha256": digest, "size": bytes.len(), "pointerSize": 130 });
                self.store.put(&digest, bytes);
                self.hub.redirect(&path, &self.store.url(&digest));
            }
            file
        });
        let listing = serde_json::json!({ "id": repository, "sha": commit, "siblings": listed.collect::<Vec<_>>() });
        self.hub.put(&format!("api/models/{repository}/revision/{revision}"), listing.to_string().as_bytes());
    }

    /// Puts a folder there as the newest commit of a model, but for what lies in the folder `without`.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn put_folder(&self, repository: &str, commit: &str, folder: &Path, without: &str) {
        let mut files = Vec::new();
        let mut folders = vec![String::new()];
        while let Some(below) = folders.pop() {
            for entry in folder.join(&below).read_dir().unwrap_or_else(|error| panic!("{}: {error}", folder.display())).flatten() {
                let name = format!("{below}{}", entry.file_name().to_string_lossy());
                match entry.path().is_dir() {
                    true if name == without => {}
                    true => folders.push(format!("{name}/")),
                    false => files.push((name, std::fs::read(entry.path()).unwrap_or_default())),
                }
            }
        }
        let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
        self.put(repository, "main", commit, &files);
    }
}
