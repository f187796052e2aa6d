//! The coordinator of a Peapod job: it assigns ranks and shards, decides which steps are final, and keeps the checkpoints.
//!
//! [`core`] holds the rules as a pure value; [`driver`] owns it and does what it says; [`service`] speaks gRPC; [`store`]
//! keeps checkpoints. The coordinator knows nothing of tensors.

pub mod core;
