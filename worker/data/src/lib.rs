//! From leased shards to the batches a trainer computes: no torch. Network and clock are in [`source`] alone.
//!
//! ```text
//! lease -> source -> shard (tar) -> sample (filter, caption, header) -> plan (shuffle, buckets) -> image (decode, resize, crop) -> Share
//! ```
//!
//! A shard that `worker precompute` has made holds what the frozen encoders said of its samples instead of pictures ([`cached`]); from the
//! shuffle buffer on they are alike.
//!
//! Which samples make up which batch is chosen from headers alone, by a pure rule (plan.rs); pictures are decoded afterwards, on other
//! threads. All randomness of one sample is a function of the job's seed and the sample's name ([`draws`]).

pub mod bucket;
pub mod cached;
pub mod caption;
pub mod draws;
mod error;
pub mod format;
pub mod fuzzing;
pub mod image;
pub mod loader;
mod plan;
pub mod sample;
pub mod shard;
pub mod source;
pub mod validation;
mod words;

pub use draws::Draws;
pub use error::{Error, Result, StoreError};
pub use loader::{Batch, Content, LeasedShard, Loader, LoaderConfig, LoaderEvent, LoaderHandle, Outlook, Prepared, Share};
pub use sample::{Reason, Rule, Skip};
pub use shard::ShardEnd;
pub use source::{Seen, SourceOptions, Sources, expand_shards};
pub use validation::ValidationSet;

#[cfg(test)]
mod testing;
