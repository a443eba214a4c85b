//! Training: configuration, checkpoints, metrics, and the loop that ties them together.

pub mod config;
pub mod optimizer;

pub use config::TrainConfig;
