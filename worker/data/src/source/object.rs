//! Objects in S3, Google Cloud Storage and Azure.

#[cfg(any(feature = "aws", feature = "azure", feature = "gcp"))]
mod clouds;

use std::collections::HashMap;
use std::error::Error as _;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt};

use super::pieces::within;
use super::remote::{Answer, Failure, Identity};
use super::{Location, StoreKind};
use crate::Result;
use crate::error::StoreError;

/// The stores in use, each with its connections and credentials, by the part of the address that names it.
#[derive(Debug, Default)]
pub struct Stores(Mutex<HashMap<String, Arc<dyn ObjectStore>>>);

/// An object, or a folder of them.
#[derive(Debug, Clone)]
pub struct Stored {
    /// `s3://bucket`, `az://container`.
    root: String,
    store: Arc<dyn ObjectStore>,
    path: Path,
}

impl Stores {
    /// The object of an address whose store is of `kind`.
    ///
    /// Errors: [`crate::Error::Store`] if the environment does not say how the store is reached.
    pub fn object(&self, kind: StoreKind, url: &str) -> Result<Stored> {
        let (root, path) = split(url)?;
        let mut stores = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match stores.get(root) {
            Some(store) => store.clone(),
            None => {
                let store = build(kind, root, Repeats::Never).map_err(|error| StoreError::new(url, one_line(&error)))?;
                stores.insert(root.into(), store.clone());
                store
            }
        };
        Ok(Stored { root: root.into(), store, path })
    }
}

/// What a store does about a request that fails.
#[derive(Debug, Clone, Copy)]
enum Repeats {
    /// Nothing: retries and deadlines are those of the reader above it.
    Never,
    /// It asks again for a while, as its library does by default.
    AsUsual,
}

/// The store and the folder in it that an address names, for what is kept there besides shards. A request that fails is repeated, by the
/// store's own means.
///
/// Errors: [`crate::Error::NoSupport`]; [`crate::Error::Store`] if the environment does not say how the store is reached.
pub fn folder_at(url: &str) -> Result<(Arc<dyn ObjectStore>, Path)> {
    let Location::Store(kind) = Location::of(url)? else {
        return Err(StoreError::new(url, "nothing can be written there: a store is s3://, gs:// or az://").into());
    };
    let (root, path) = split(url)?;
    let store = build(kind, root, Repeats::AsUsual).map_err(|error| StoreError::new(url, one_line(&error)))?;
    Ok((store, path))
}

/// The part of an address that names the store, and the object in it. Its name is taken as it is written.
fn split(url: &str) -> Result<(&str, Path)> {
    let authority = url.find("://").map_or(0, |at| at + 3);
    let (root, path) = match url[authority..].find('/') {
        Some(slash) => url.split_at(authority + slash),
        None => (url, ""),
    };
    Ok((root, Path::parse(path).map_err(|error| StoreError::new(url, error.to_string()))?))
}

#[cfg(any(feature = "aws", feature = "azure", feature = "gcp"))]
use clouds::build;

/// [`Location::of`] lets no address of a store pass in a build without any.
#[cfg(not(any(feature = "aws", feature = "azure", feature = "gcp")))]
fn build(kind: StoreKind, root: &str, repeats: Repeats) -> object_store::Result<Arc<dyn ObjectStore>> {
    Err(object_store::Error::NotSupported { source: format!("{root}: {kind:?} ({repeats:?}) is not in this build").into() })
}

impl Stored {
    /// Asks for the bytes in `range`, of the version `identity`, as far as it is known.
    pub async fn get(&self, range: Option<Range<u64>>, identity: &Identity) -> Result<Answer, Failure> {
        // An empty object has no range to ask for, and its size is not known before.
        if identity.size.is_none() {
            let found = self.identify().await?;
            if found.size == Some(0) {
                return Ok(Answer { identity: found, start: 0, end: Some(0), is_part: true, body: futures::stream::empty().boxed() });
            }
        }
        let options = GetOptions { range: range.map(Into::into), if_match: identity.etag.clone(), ..GetOptions::default() };
        let answer = self.store.get_opts(&self.path, options).await.map_err(|error| failure_of(&error))?;
        let (identity, range) = (identity_of(&answer.meta), answer.range.clone());
        let body = answer.into_stream().map_err(|error| failure_of(&error)).boxed();
        Ok(Answer { identity, start: range.start, end: Some(range.end), is_part: true, body })
    }

    /// Asks which version is there and how large it is.
    pub async fn identify(&self) -> Result<Identity, Failure> {
        self.store.head(&self.path).await.map(|meta| identity_of(&meta)).map_err(|error| failure_of(&error))
    }

    /// The addresses of all objects in this folder and those below; each page of the list has `limit` to come.
    pub async fn list(&self, limit: Duration) -> Result<Vec<String>, Failure> {
        let mut objects = self.store.list(Some(&self.path));
        let mut urls = Vec::new();
        while let Some(meta) = within(limit, async { objects.try_next().await.map_err(|error| failure_of(&error)) }).await? {
            urls.push(format!("{}/{}", self.root, meta.location));
        }
        Ok(urls)
    }
}

fn identity_of(meta: &ObjectMeta) -> Identity {
    Identity { size: Some(meta.size), etag: meta.e_tag.clone(), modified: Some(meta.last_modified.to_rfc3339()) }
}

fn failure_of(error: &object_store::Error) -> Failure {
    use object_store::Error;
    match error {
        Error::NotFound { .. } => Failure::Missing("there is no such object".into()),
        Error::Precondition { .. } => Failure::Changed,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            Failure::Denied(format!("{}; credentials come from the environment", one_line(error)))
        }
        Error::InvalidPath { .. } | Error::NotSupported { .. } | Error::NotImplemented { .. } | Error::UnknownConfigurationKey { .. } => {
            Failure::Lasting(one_line(error))
        }
        _ => Failure::Passing(one_line(error)),
    }
}

/// What a store said, in one line: of an answer in XML its code and message.
#[must_use]
pub fn one_line(error: &object_store::Error) -> String {
    let text = error.to_string();
    let mut last = error.source();
    while let Some(source) = last.and_then(|error| error.source()) {
        last = Some(source);
    }
    // The errors between repeat each other.
    let text = match last.map(ToString::to_string) {
        Some(source) if !text.contains(&source) => format!("{text}: {source}"),
        _ => text,
    };
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(inside, _)| inside.trim())
    };
    match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => text.split_whitespace().collect::<Vec<_>>().join(" "),
    }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    fn stored(store: &Arc<dyn ObjectStore>, path: &str) -> Stored {
        Stored { root: "s3://bucket".into(), store: store.clone(), path: Path::parse(path).unwrap() }
    }

    async fn bytes_of(answer: Answer) -> Vec<u8> {
        answer.body.try_fold(Vec::new(), |all, piece| async move { Ok([all, piece.to_vec()].concat()) }).await.unwrap()
    }

    #[tokio::test]
    async fn objects_are_read_in_parts_of_one_version_and_listed() {
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        let object = stored(&store, "data/0.tar");
        assert!(matches!(object.get(Some(0..10), &Identity::default()).await, Err(Failure::Missing(_))));
        store.put(&object.path, "0123456789".into()).await.unwrap();
        // More than there is.
        let answer = object.get(Some(0..100), &Identity::default()).await.unwrap();
        let identity = answer.identity.clone();
        assert_eq!((identity.size, answer.start, answer.is_part), (Some(10), 0, true));
        assert_eq!(bytes_of(answer).await, b"0123456789");
        let answer = object.get(Some(4..6), &identity).await.unwrap();
        assert_eq!((answer.start, bytes_of(answer).await), (4, b"45".to_vec()));
        store.put(&object.path, "another".into()).await.unwrap();
        assert!(matches!(object.get(Some(4..6), &identity).await, Err(Failure::Changed)));
        store.put(&Path::parse("data/empty.tar").unwrap(), "".into()).await.unwrap();
        let answer = stored(&store, "data/empty.tar").get(Some(0..10), &Identity::default()).await.unwrap();
        assert!(answer.is_part && answer.identity.size == Some(0) && bytes_of(answer).await.is_empty());
        let mut all = stored(&store, "data").list(Duration::from_secs(10)).await.unwrap();
        all.sort();
        assert_eq!(all, ["s3://bucket/data/0.tar", "s3://bucket/data/empty.tar"]);
    }

    #[test]
    fn one_store_serves_all_its_objects() {
        let stores = Stores::default();
        let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
        stores.0.lock().unwrap().insert("s3://bucket".into(), store.clone());
        let object = stores.object(StoreKind::S3, "s3://bucket/a folder/50%.tar").unwrap();
        assert_eq!((object.root.as_str(), object.path.as_ref()), ("s3://bucket", "a folder/50%.tar"));
        assert!(Arc::ptr_eq(&object.store, &store));
        assert_eq!(stores.object(StoreKind::S3, "s3://bucket").unwrap().path.as_ref(), "");
    }
}
