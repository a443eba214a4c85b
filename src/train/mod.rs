//! Training: configuration, checkpoints, metrics, and the loop that ties them together.

mod batches;
pub mod checkpoint;
pub mod config;
pub mod device;
mod events;
pub mod learner;
pub mod metrics;
pub mod optimizer;
mod pass;
pub mod plan;
pub mod plot;
pub mod progress;
pub mod resume;
pub mod run_dir;
pub mod samples;
pub mod setup;
pub(crate) mod state;
pub mod timing;
pub mod trainer;
pub mod weights;

pub use config::TrainConfig;
pub use run_dir::RunDir;
