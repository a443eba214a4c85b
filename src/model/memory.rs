//! How much main memory a training step takes, to tell before it is taken.

use super::config::ModelConfig;

/// Numbers of f32 that a step over `images` images keeps for its backward pass, and what that computes with; about, and without
/// weights, their gradients and moments. `checkpointed`: only the input of each block is kept.
pub fn activation_numbers(config: &ModelConfig, images: usize, checkpointed: bool) -> f64 {
    let [t, c, h, depth] = [config.tokens(), config.hidden_size, config.mlp_size(), config.depth].map(|n| n as f64);
    let pixels = (config.input_size * config.input_size) as f64;
    // qkv, attention, two outputs before their gates and two streams; before GELU; statistics; corrections.
    let block = t * (8.0 * c + h + 4.0 + config.num_heads as f64) + 2.0 * (3.0 * c + h);
    let blocks = if checkpointed { depth * t * c + block } else { depth * block };
    // The GELU again, gradients of rows and of qkv.
    let backward = t * (h + 3.0 * c);
    // Values and gradients.
    let modulation = 2.0 * (6.0 * depth + 2.0) * c;
    let ends = 2.0 * t * c + pixels * (config.in_channels + 2 * config.out_channels()) as f64;
    images as f64 * (blocks + backward + modulation + ends)
}
