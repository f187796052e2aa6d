//! What the end-to-end tests and measurements share: the classifier that judges the demo's pictures, and the harness that runs whole jobs.

pub mod classifier;
pub mod harness;
