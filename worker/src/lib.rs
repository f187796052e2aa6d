//! The worker: trains an adapter with others, or draws with one.
//!
//! [`lifecycle`] holds the rules of a worker's life, [`trainer`] the thread that owns the tensors, [`client`] the calls to the
//! coordinator, [`outbox`] the checkpoints that wait for theirs; [`supervisor`] joins them. [`device`] opens the device, [`bench`] times a
//! step on it, [`vae_error`] and [`loss_error`] look at what fewer bits lose there, [`check`] at a job's models without loading them,
//! [`bandwidth`] at a host's links, [`shards`] into its data; [`hub`] and [`fetch`] fetch models that are not here; [`precompute`] makes
//! shards that hold what the frozen encoders say of pictures. [`draw`], [`grid`], [`picture`] and [`score`] serve the program `sample`.
//! [`build`] says what `--version` does, [`faults`] makes a worker fail on purpose.

pub mod args;
pub mod bandwidth;
pub mod bench;
pub mod build;
pub mod check;
pub mod client;
pub mod device;
pub mod draw;
pub mod faults;
pub mod fetch;
pub mod grid;
pub mod hub;
pub mod lifecycle;
pub mod loss_error;
pub mod loss_scale;
pub mod numbers;
pub mod outbox;
pub mod picture;
pub mod precompute;
pub mod score;
pub mod setup;
pub mod shards;
pub mod supervisor;
pub mod tail;
#[cfg(test)]
mod testing;
pub mod trainer;
pub mod vae_error;
