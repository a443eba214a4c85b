//! What several operations share on the CPU: the products of a linear layer over windows, and the gradient of its weight; linear layers of
//! few rows.

pub(crate) mod products;
pub(crate) mod rows;
pub(crate) mod weight_gradient;
