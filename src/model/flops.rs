//! How much arithmetic a pass takes, and how much of it the windows save.

use super::config::ModelConfig;
use crate::ops::timestep_embed::FREQUENCIES;
use crate::routing::{Routing, Window};

/// Floating-point operations of the products of a forward pass; a backward pass takes twice as many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    /// Of the dense model: what masking and computing everything takes.
    pub dense: f64,
    /// Of the channels inside the windows, with the correction for those outside.
    pub done: f64,
}

/// Counts one forward pass over a batch with these windows (one a sample).
pub fn forward_flops(config: &ModelConfig, windows: &[Window]) -> Flops {
    let full = Window::all(config.hidden_size);
    let dense = sample_flops(config, full);
    let routed = |window: &Window| match config.routing {
        Routing::Dense | Routing::Random => dense,
        Routing::Paper | Routing::Sublayer => sample_flops(config, *window),
    };
    Flops { dense: dense * windows.len() as f64, done: windows.iter().map(routed).sum() }
}

fn sample_flops(config: &ModelConfig, window: Window) -> f64 {
    let [t, c, h] = [config.tokens(), config.hidden_size, config.mlp_size()].map(|n| n as f64);
    let active = window.width as f64;
    let written = if config.routing == Routing::Sublayer { active } else { c };
    // Two vectors u and v for the channels that a layer with n outputs leaves out.
    let correction = |n: f64, read: f64| 4.0 * n * (c - read);
    let qkv = 2.0 * t * active * 3.0 * c + correction(3.0 * c, active);
    let attention = 4.0 * t * t * c;
    let proj = 2.0 * t * c * written;
    let mlp = 2.0 * t * written * h * 2.0 + correction(h, written);
    let modulation = 2.0 * c * 6.0 * c;
    let patch = (config.patch_size * config.patch_size) as f64;
    let ends = 2.0 * t * c * patch * (config.in_channels + config.out_channels()) as f64;
    let condition = 2.0 * c * (FREQUENCIES as f64 + c) + 2.0 * c * 2.0 * c;
    config.depth as f64 * (qkv + attention + proj + mlp + modulation) + ends + condition
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(routing: Routing) -> ModelConfig {
        ModelConfig { routing, ..ModelConfig::published("DiT-XL/2").unwrap() }
    }

    #[test]
    fn the_published_count_of_xl_2_is_met() {
        // Peebles and Xie, table 4: 118.6 Gflops, counting a multiplication and an addition as one.
        let flops = forward_flops(&config(Routing::Dense), &[Window::all(1152)]);
        assert!((flops.dense / 2e9 - 118.6).abs() < 0.2, "{}", flops.dense / 2e9);
        assert_eq!(flops.dense, flops.done);
    }

    /// 231 channels are left out of a product with 3456 outputs in each block: of 256 tokens, but for two vectors.
    #[test]
    fn channels_outside_of_a_window_cost_their_correction() {
        let flops = forward_flops(&config(Routing::Paper), &[Window { start: 5, width: 921 }]);
        assert_eq!(flops.dense - flops.done, 28.0 * (2.0 * 256.0 - 2.0 * 2.0) * 231.0 * 3456.0);
    }

    #[test]
    fn windows_save_what_the_paper_block_and_the_sublayer_block_can() {
        let window = Window { start: 5, width: 921 };
        let saved = |routing| {
            let flops = forward_flops(&config(routing), &[window; 3]);
            1.0 - flops.done / flops.dense
        };
        assert!((0.04..0.055).contains(&saved(Routing::Paper)), "{}", saved(Routing::Paper));
        assert!((0.17..0.2).contains(&saved(Routing::Sublayer)), "{}", saved(Routing::Sublayer));
        assert_eq!(saved(Routing::Random), 0.0);
    }
}
