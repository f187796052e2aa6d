//! One test binary, a module a story: linking torch once is what keeps `make test` short.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "in a test program helpers may panic too, and not only the functions that clippy.toml excepts"
)]

mod after_the_end;
mod bad_data;
mod bad_input;
mod classifier;
mod demo;
mod drawing;
mod faults;
mod golden;
mod hangs;
mod hub;
mod leases;
mod logs;
mod manifests;
mod membership;
mod method;
mod models;
mod observability;
mod output;
mod precompute;
mod readme;
mod restart;
mod resume;
mod rounds;
mod security;
mod shards;
mod simulation;
mod slurm;
mod soak;
mod sources;
mod training;
mod whole_node;
