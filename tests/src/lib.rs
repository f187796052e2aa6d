//! What the end-to-end tests and measurements share: the classifier that judges the demo's pictures, the harness that runs whole jobs,
//! and the simulation of whole clusters in virtual time.

pub mod classifier;
pub mod harness;
pub mod simulation;
