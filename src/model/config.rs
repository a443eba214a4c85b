//! The sizes of a model.

use crate::backend::DType;
use crate::error::{Error, Result};
use crate::ops::timestep_embed::FREQUENCIES;
use crate::routing::{Routing, window_width};

/// Number of diffusion timesteps, each a task of DTR.
pub const TASKS: usize = 1000;

/// A model of more parameters is a mistake: they alone take 4 TB.
const MOST_PARAMETERS: u128 = 1 << 40;
/// The same of the fixed tables, which are made with the model: 4 GiB.
const MOST_OF_TABLE: usize = 1 << 30;

/// Everything that fixes a model's shapes and routing.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// C, a multiple of 4 and of `num_heads`.
    pub hidden_size: usize,
    /// Number of blocks.
    pub depth: usize,
    /// NH
    pub num_heads: usize,
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Side of the square images or latents, in pixels.
    pub input_size: usize,
    /// Channels of the images or latents.
    pub in_channels: usize,
    /// Number of classes, without the null class.
    pub num_classes: usize,
    /// Whether the label table has a null class (needed for classifier-free guidance).
    pub null_class: bool,
    /// Width of the MLP as a multiple of C.
    pub mlp_ratio: f64,
    /// Whether the model predicts variances too (`2 in_channels` outputs).
    pub learn_sigma: bool,
    /// How blocks use the windows.
    pub routing: Routing,
    /// Share of active channels.
    pub beta: f64,
    /// How the windows slide.
    pub alpha: f64,
    /// Seed of the masks of random routing.
    pub routing_seed: u64,
}

impl ModelConfig {
    /// Refuses sizes that the CUDA kernels do not take: products in bf16 read 8 channels at a time.
    ///
    /// # Errors
    /// Names the size that does not fit.
    pub fn check_cuda(&self, elem: DType) -> Result<()> {
        let head = self.hidden_size / self.num_heads.max(1);
        if head > 128 {
            return Err(Error::usage(format!(
                "heads of {head} channels do not fit the CUDA kernels, which take 128 at most: give more num_heads, or --device cpu"
            )));
        }
        let patch = self.patch_size * self.patch_size * self.out_channels();
        for (name, size) in [("head size", head), ("MLP size", self.mlp_size()), ("numbers of an output patch", patch)]
        {
            if elem == DType::Bf16 && size % 8 != 0 {
                return Err(Error::usage(format!(
                    "the {name} is {size}, but bf16 on CUDA needs multiples of 8: give --precision f32"
                )));
            }
        }
        Ok(())
    }

    /// A published model, `DiT-S/2` to `DiT-XL/8` (Peebles and Xie, ICCV 2023, table 1): on 32 x 32 x 4 latents of 1000 classes,
    /// without routing. `beta` and `alpha` are those of DTR, for `ModelConfig { routing: Routing::Paper, ..published }`.
    pub fn published(name: &str) -> Option<ModelConfig> {
        let (size, patch) = name.strip_prefix("DiT-")?.split_once('/')?;
        let [hidden_size, depth, num_heads] = match size {
            "S" => [384, 12, 6],
            "B" => [768, 12, 12],
            "L" => [1024, 24, 16],
            "XL" => [1152, 28, 16],
            _ => return None,
        };
        let patch_size = ["2", "4", "8"].contains(&patch).then(|| patch.parse().ok()).flatten()?;
        Some(ModelConfig {
            hidden_size,
            depth,
            num_heads,
            patch_size,
            input_size: 32,
            in_channels: 4,
            num_classes: 1000,
            null_class: true,
            mlp_ratio: 4.0,
            learn_sigma: true,
            routing: Routing::Dense,
            beta: 0.8,
            alpha: 4.0,
            routing_seed: 0,
        })
    }

    /// T
    ///
    /// # Panics
    /// When `patch_size` is 0, which [`ModelConfig::check`] refuses.
    pub fn tokens(&self) -> usize {
        (self.input_size / self.patch_size).pow(2)
    }

    /// Width of the MLP.
    pub fn mlp_size(&self) -> usize {
        (self.hidden_size as f64 * self.mlp_ratio) as usize
    }

    /// Channels of the output.
    pub fn out_channels(&self) -> usize {
        if self.learn_sigma { 2 * self.in_channels } else { self.in_channels }
    }

    /// Rows of the label table.
    pub fn label_rows(&self) -> usize {
        self.num_classes + usize::from(self.null_class)
    }

    /// Number of parameters, of any sizes that one by one are not too large.
    pub(crate) fn parameters(&self) -> u128 {
        let [c, h, depth, rows, images, outputs] =
            [self.hidden_size, self.mlp_size(), self.depth, self.label_rows(), self.in_channels, self.out_channels()]
                .map(|size| size as u128);
        let patch = (self.patch_size as u128).pow(2);
        let linear = |inputs: u128, outputs: u128| (inputs + 1) * outputs;
        let ends = linear(images * patch, c) + linear(c, outputs * patch);
        let condition = linear(FREQUENCIES as u128, c) + linear(c, c) + rows * c + linear(c, 2 * c);
        let block = linear(c, 3 * c) + linear(c, c) + linear(c, h) + linear(h, c) + linear(c, 6 * c);
        ends + condition + depth * block
    }

    /// Rows of C numbers of the fixed tables: positions, and masks of random routing.
    pub(crate) fn table_rows(&self) -> [usize; 2] {
        [self.tokens(), if self.routing == Routing::Random { self.depth * TASKS } else { 0 }]
    }

    /// Refuses sizes that no model can have, alone or together.
    ///
    /// # Errors
    /// One sentence that names the first such size and what it must be.
    pub fn check(&self) -> Result<()> {
        let positive = [
            ("hidden_size", self.hidden_size),
            ("depth", self.depth),
            ("num_heads", self.num_heads),
            ("patch_size", self.patch_size),
            ("input_size", self.input_size),
            ("in_channels", self.in_channels),
            ("num_classes", self.num_classes),
        ];
        const LIMIT: usize = 1 << 20;
        if let Some((name, value)) = positive.into_iter().find(|(_, v)| *v == 0 || *v > LIMIT) {
            return Err(Error::usage(format!("{name} is {value}, but it must be between 1 and {LIMIT}")));
        }
        let (c, heads) = (self.hidden_size, self.num_heads);
        if !c.is_multiple_of(heads) {
            return Err(Error::usage(format!(
                "num_heads {heads} does not divide hidden_size {c}: choose one that does"
            )));
        }
        if !c.is_multiple_of(4) {
            return Err(Error::usage(format!(
                "hidden_size is {c}, but the position embedding needs a multiple of 4: try {}",
                c.next_multiple_of(4)
            )));
        }
        if !self.input_size.is_multiple_of(self.patch_size) {
            return Err(Error::usage(format!(
                "patch_size {} does not divide the image size {}: choose one that does",
                self.patch_size, self.input_size
            )));
        }
        if !(self.mlp_ratio > 0.0 && self.mlp_ratio <= 64.0) {
            return Err(Error::usage(format!(
                "mlp_ratio is {}, but it must be above 0 and at most 64",
                self.mlp_ratio
            )));
        }
        if self.mlp_size() == 0 {
            return Err(Error::usage(format!(
                "mlp_ratio is {}, which makes an MLP of width 0 of hidden_size {c}: give a larger one",
                self.mlp_ratio
            )));
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return Err(Error::usage(format!("alpha is {}, but it must be a positive number", self.alpha)));
        }
        window_width(c, self.beta)?;
        let parameters = self.parameters();
        if parameters > MOST_PARAMETERS {
            return Err(Error::usage(format!(
                "hidden_size {c} and depth {} make a model of {:.1e} parameters, but it may have at most {:.1e}",
                self.depth, parameters as f64, MOST_PARAMETERS as f64
            )));
        }
        let of_images = format!("input_size (image_size) {} and patch_size {}", self.input_size, self.patch_size);
        let [positions, masks] = self.table_rows();
        for (why, what, rows) in
            [(of_images, "positions", positions), (format!("random routing and depth {}", self.depth), "masks", masks)]
        {
            if rows.saturating_mul(c) > MOST_OF_TABLE {
                return Err(Error::usage(format!(
                    "{why} make {what} of {rows} x {c} numbers, but they may have at most {MOST_OF_TABLE}"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::dit::Dit;

    fn config() -> ModelConfig {
        ModelConfig {
            hidden_size: 24,
            depth: 3,
            num_heads: 2,
            patch_size: 2,
            input_size: 8,
            in_channels: 3,
            num_classes: 7,
            null_class: true,
            mlp_ratio: 2.5,
            learn_sigma: true,
            routing: Routing::Paper,
            beta: 0.7,
            alpha: 4.0,
            routing_seed: 0,
        }
    }

    #[test]
    fn parameters_are_those_of_the_layout() {
        for config in
            [config(), ModelConfig { null_class: false, learn_sigma: false, depth: 1, patch_size: 4, ..config() }]
        {
            assert_eq!(config.parameters(), Dit::new(config.clone()).unwrap().layout.len() as u128, "{config:?}");
        }
    }

    #[test]
    fn models_that_no_machine_holds_are_refused_before_they_are_made() {
        let wide = ModelConfig { hidden_size: 1 << 20, depth: 64, ..config() };
        let fine = ModelConfig { hidden_size: 1024, input_size: 1 << 20, patch_size: 1, ..config() };
        let random =
            ModelConfig { hidden_size: 1024, depth: 1 << 16, mlp_ratio: 0.1, routing: Routing::Random, ..config() };
        for (config, what) in [
            (
                wide,
                "hidden_size 1048576 and depth 64 make a model of 1.1e15 parameters, but it may have at most 1.1e12",
            ),
            (fine, "input_size (image_size) 1048576 and patch_size 1 make positions of 1099511627776 x 1024 numbers"),
            (random, "random routing and depth 65536 make masks of 65536000 x 1024 numbers"),
        ] {
            let message = Dit::new(config).err().expect(what).to_string();
            assert!(message.contains(what), "{message}");
        }
        let largest = ModelConfig { hidden_size: 8192, depth: 256, input_size: 256, ..config() };
        largest.check().unwrap();
    }
}
