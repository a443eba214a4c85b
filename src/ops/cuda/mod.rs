//! What several operations share on a CUDA device: tiles of the products, shares of a weight's gradient, layers of few rows, and the
//! count of the work that tiles make of windows.

pub(crate) mod rows;
pub(crate) mod shares;
pub(crate) mod tile;
pub mod work;
