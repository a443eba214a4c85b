//! The diffusion transformer: sizes (`config`), fixed positions (`embed`), arithmetic (`flops`) and main memory (`memory`) of a step,
//! one block (`block`), the whole (`dit`), what of a batch is computed at once (`parts`), and the model in
//! plain loops (`reference`).

pub mod block;
pub mod config;
pub mod dit;
pub mod embed;
pub mod flops;
pub mod memory;
pub(crate) mod parts;
pub mod reference;

pub use config::{ModelConfig, TASKS};
pub use dit::{Dit, Init};
