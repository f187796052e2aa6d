//! The coordinator of a Peapod job: it assigns ranks and shards, decides which steps are final, and keeps the checkpoints.
//!
//! [`core`] holds the rules as a pure value; [`driver`] owns it and does what it says; [`service`] speaks gRPC; [`store`]
//! keeps checkpoints, [`gallery`] pictures; [`history`] what happened, which [`web`] shows; [`gate`] lets clients in, by the [`secrets`];
//! [`run`](mod@run) puts them together. The coordinator knows nothing of tensors.

mod announce;
pub mod build;
pub mod check;
pub mod checkpoints;
pub mod config;
pub mod control;
pub mod core;
pub mod driver;

pub mod gallery;
pub mod gate;
pub mod history;
pub mod journal;
pub mod limits;
pub mod local;
pub mod logs;
mod losses;
pub mod observe;
mod oom;
mod open_files;
pub mod run;
pub mod secrets;
pub mod service;
pub mod shard_list;
pub mod shutdown;
pub mod store;
pub mod tensorboard;
pub mod web;
