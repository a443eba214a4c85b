//! What several operations share on the CPU: the products of a linear layer over windows, and the gradient of its weight.

pub(crate) mod products;
pub(crate) mod weight_gradient;
