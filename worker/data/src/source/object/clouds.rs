//! Stores as this process's environment describes them.

use std::sync::Arc;
use std::time::Duration;

use object_store::{ClientConfigKey, ObjectStore, RetryConfig};

use super::Repeats;
use crate::source::StoreKind;
use crate::source::remote::choose_cryptography;

/// Deadlines: for a whole request longer than any takes that gets on, and for the next bytes of an answer. Readers of shards have a shorter
/// one of their own.
const CLIENT: [(ClientConfigKey, &str); 2] = [(ClientConfigKey::Timeout, "1h"), (ClientConfigKey::ReadTimeout, "60s")];

impl From<Repeats> for RetryConfig {
    fn from(repeats: Repeats) -> Self {
        match repeats {
            Repeats::Never => Self { max_retries: 0, retry_timeout: Duration::ZERO, ..Self::default() },
            Repeats::AsUsual => Self::default(),
        }
    }
}

/// A store as this process's environment describes it.
pub(super) fn build(kind: StoreKind, root: &str, repeats: Repeats) -> object_store::Result<Arc<dyn ObjectStore>> {
    choose_cryptography();
    match kind {
        #[cfg(feature = "aws")]
        StoreKind::S3 => {
            use object_store::aws::{AmazonS3Builder as Builder, AmazonS3ConfigKey::Client};
            let builder = CLIENT.into_iter().fold(Builder::from_env(), |builder, (key, value)| builder.with_config(Client(key), value));
            Ok(Arc::new(builder.with_url(root).with_retry(repeats.into()).build()?))
        }
        #[cfg(feature = "gcp")]
        StoreKind::Gcs => {
            use object_store::gcp::{GoogleCloudStorageBuilder as Builder, GoogleConfigKey::Client};
            let builder = CLIENT.into_iter().fold(Builder::from_env(), |builder, (key, value)| builder.with_config(Client(key), value));
            Ok(Arc::new(builder.with_url(root).with_retry(repeats.into()).build()?))
        }
        #[cfg(feature = "azure")]
        StoreKind::Azure => {
            use object_store::azure::{AzureConfigKey::Client, MicrosoftAzureBuilder as Builder};
            let builder = CLIENT.into_iter().fold(Builder::from_env(), |builder, (key, value)| builder.with_config(Client(key), value));
            Ok(Arc::new(builder.with_url(root).with_retry(repeats.into()).build()?))
        }
        // `Location::of` lets no address of such a store pass.
        #[cfg(not(all(feature = "aws", feature = "azure", feature = "gcp")))]
        _ => Err(object_store::Error::NotSupported { source: format!("{root}: not in this build").into() }),
    }
}
