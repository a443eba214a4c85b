//! How much main memory training and sampling take, to tell before it is taken.

use super::config::ModelConfig;
use crate::routing::Routing;

/// Roughly how many f32 numbers a step over `images` images keeps for its backward pass and computes with there, not counting
/// weights, their gradients and moments. `checkpointed`: only the input of each block is kept.
pub fn activation_numbers(config: &ModelConfig, images: usize, checkpointed: bool) -> f64 {
    let [t, c, h, depth] = [config.tokens(), config.hidden_size, config.mlp_size(), config.depth].map(|n| n as f64);
    let block = block_numbers(config);
    // Random routing masks around its blocks, with two streams more.
    let stream = if config.routing == Routing::Random { 3.0 * t * c } else { t * c };
    let blocks = depth * stream + if checkpointed { block } else { depth * (block - t * c) };
    // The GELU again, gradients of rows and of qkv.
    let backward = t * (h + 3.0 * c);
    // Values and gradients.
    let modulation = 2.0 * (6.0 * depth + 2.0) * c;
    images as f64 * (blocks + backward + modulation + end_numbers(config))
}

/// Roughly how many f32 numbers a forward pass over `images` images computes with, not counting weights: no block keeps anything.
pub fn inference_numbers(config: &ModelConfig, images: usize) -> f64 {
    let modulation = (6.0 * config.depth as f64 + 2.0) * config.hidden_size as f64;
    images as f64 * (block_numbers(config) + modulation + end_numbers(config))
}

/// Of a block, an image: qkv, attention, two outputs before their gates and two streams; before GELU; statistics; corrections.
fn block_numbers(config: &ModelConfig) -> f64 {
    let [t, c, h] = [config.tokens(), config.hidden_size, config.mlp_size()].map(|n| n as f64);
    t * (8.0 * c + h + 4.0 + 2.0 * config.num_heads as f64) + 2.0 * (3.0 * c + h)
}

/// Before the first block and after the last, an image.
fn end_numbers(config: &ModelConfig) -> f64 {
    let pixels = config.input_size * config.input_size;
    (2 * config.tokens() * config.hidden_size + pixels * (config.in_channels + 2 * config.out_channels())) as f64
}
