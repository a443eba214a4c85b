//! The diffusion transformer (Peebles and Xie, ICCV 2023, adaLN-Zero) with Denoising Task Routing.

use super::block::{Block, Route};
use super::config::{ModelConfig, TASKS};
use super::embed::position_embedding;
use crate::autograd::{Tape, Var};
use crate::backend::cpu::aligned::AlignedVec;
use crate::choice::choice;
use crate::error::{Error, Result};
use crate::ops::PerSample;
use crate::ops::channel_mask::{Keep, channel_mask};
use crate::ops::label_embed::label_embed;
use crate::ops::ln_linear::{Activation, ln_linear};
use crate::ops::modulation::modulation;
use crate::ops::patch_embed::patch_embed;
use crate::ops::timestep_embed::{FREQUENCIES, timestep_embed};
use crate::ops::unpatchify::unpatchify;
use crate::params::{Layout, Linear, Param};
use crate::rng::{Philox, Stream};
use crate::routing::{Routing, Window, random_masks, windows};
use std::sync::atomic::{AtomicU64, Ordering};

/// Models made so far.
static MADE: AtomicU64 = AtomicU64::new(0);

/// A model: where its parameters lie and how they are used. It holds no weights.
pub struct Dit {
    /// Its sizes.
    pub config: ModelConfig,
    /// Names, shapes and places of its parameters.
    pub layout: Layout,
    /// Keep only the blocks' inputs for backward, and compute what is inside of each block again there.
    pub checkpoint_activations: bool,
    number: u64,             // no two models have the same
    positions: Vec<f32>,     // [T, C]
    windows: Vec<Window>,    // TASKS
    masks: Vec<Vec<f32>>,    // depth x [TASKS, C], random routing only
    x_embedder: Linear,      // [C, IC p p]
    t_embedder: [Linear; 2], // [C, 256], [C, C]
    y_embedder: Param,       // [classes (+ 1), C]
    modulation: Linear,      // [6 C depth + 2 C, C]
    blocks: Vec<Block>,
    final_layer: Linear, // [p p OC, C]
}

/// How weights start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// As the published models: timestep network and label table normal with deviation 0.02.
    Published,
    /// For small models and short runs: timestep network Xavier-uniform, label table normal with deviation 0.5, so that
    /// the condition is heard from the first steps on.
    Small,
}

choice!(Init: Published = "published", Small = "small");

/// Activations of a forward pass, for comparisons with other implementations.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Sinusoidal timestep embedding `[B, 256]`.
    pub t_freq: Var,
    /// Timestep embedding `[B, C]`.
    pub t_emb: Var,
    /// Condition `[B, C]`.
    pub condition: Var,
    /// Embedded patches with positions `[B, T, C]`.
    pub x_embed: Var,
    /// Output of each block `[B, T, C]`.
    pub blocks: Vec<Var>,
    /// The model's output `[B, OC, H, W]`.
    pub out: Var,
}

impl Dit {
    /// A model of these sizes.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn new(config: ModelConfig) -> Result<Self> {
        config.check()?;
        let (c, p) = (config.hidden_size, config.patch_size);
        let mut layout = Layout::default();
        let weight = layout.push("x_embedder.proj.weight", &[c, config.in_channels, p, p]);
        let bias = layout.push("x_embedder.proj.bias", &[c]);
        let x_embedder = Linear { weight, bias, inputs: config.in_channels * p * p, outputs: c };
        let t_embedder =
            [layout.push_linear("t_embedder.mlp.0", c, FREQUENCIES), layout.push_linear("t_embedder.mlp.2", c, c)];
        let y_embedder = layout.push("y_embedder.embedding_table.weight", &[config.label_rows(), c]);
        let modulation = push_modulation(&mut layout, config.depth, c);
        let blocks = (0..config.depth)
            .map(|index| Block::new(&mut layout, index, c, config.mlp_size(), config.num_heads))
            .collect();
        let final_layer = layout.push_linear("final_layer.linear", p * p * config.out_channels(), c);
        let windows = match config.routing {
            Routing::Dense | Routing::Random => vec![Window::all(c); TASKS],
            Routing::Paper | Routing::Sublayer => windows(TASKS, c, config.alpha, config.beta)?,
        };
        let masks = match config.routing {
            Routing::Random => (0..config.depth)
                .map(|block| random_masks(TASKS, c, config.beta, config.routing_seed, block))
                .collect::<Result<_>>()?,
            _ => Vec::new(),
        };
        let positions = position_embedding(config.input_size / p, c);
        Ok(Dit {
            config,
            layout,
            checkpoint_activations: false,
            number: MADE.fetch_add(1, Ordering::Relaxed),
            positions,
            windows,
            masks,
            x_embedder,
            t_embedder,
            y_embedder,
            modulation,
            blocks,
            final_layer,
        })
    }

    /// A number that no other model of this process has.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The fixed positions, `[T, C]`: `pos_embed` of the official state_dict.
    pub fn positions(&self) -> &[f32] {
        &self.positions
    }

    /// The window of every task.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// The masks of random routing, one `[TASKS, C]` a block; none in the others.
    pub(super) fn masks(&self) -> &[Vec<f32>] {
        &self.masks
    }

    /// Replaces the masks of random routing by those of another implementation: one `[TASKS, C]` of 0 and 1 a block.
    ///
    /// # Errors
    /// When routing is not random or the sizes do not fit.
    pub fn set_masks(&mut self, masks: Vec<Vec<f32>>) -> Result<()> {
        let len = TASKS * self.config.hidden_size;
        if self.config.routing != Routing::Random
            || masks.len() != self.config.depth
            || masks.iter().any(|m| m.len() != len)
        {
            return Err(Error::usage(format!(
                "random routing needs {} masks of {len}, one a block",
                self.config.depth
            )));
        }
        self.masks = masks;
        Ok(())
    }

    /// Initial weights, in the layout's order.
    pub fn init(&self, seed: u64, init: Init) -> AlignedVec {
        let rng = Philox::new(seed, Stream::Init);
        let mut weights = AlignedVec::zeros(self.layout.len());
        for (index, entry) in self.layout.entries().iter().enumerate() {
            let out = &mut weights[entry.param.range()];
            let name = entry.name.as_str();
            let zero = name.ends_with(".bias") || name.contains("adaLN_modulation") || name.starts_with("final_layer");
            let deviation = match (init, name.split('.').next()) {
                (Init::Published, Some("t_embedder" | "y_embedder")) => Some(0.02),
                (Init::Small, Some("y_embedder")) => Some(0.5),
                _ => None,
            };
            if zero {
                continue;
            } else if let Some(deviation) = deviation {
                rng.normal(out, index as u64, 0);
                out.iter_mut().for_each(|w| *w *= deviation);
            } else {
                // Xavier-uniform over the layer as a matrix.
                let rows = entry.shape[0];
                let fan = (rows + out.len() / rows) as f32;
                rng.symmetric(out, (6.0 / fan).sqrt(), index as u64, 0);
            }
        }
        weights
    }

    /// The model's output `[B, OC, H, W]` for noisy images `x` `[B, IC, H, W]` at timesteps `t` with labels `y`
    /// (`num_classes` is the null class).
    ///
    /// # Errors
    /// When shapes do not fit, the tape has too few weights, or a timestep or label is out of range.
    pub fn forward(&self, tape: &mut Tape, x: Var, t: &[u32], y: &[u32]) -> Result<Var> {
        Ok(self.run(tape, x, t, y, |_| {})?.out)
    }

    /// [`Dit::forward`] with the activations on its way; on an inference tape all but `out` are gone afterwards.
    ///
    /// # Errors
    /// As [`Dit::forward`].
    pub fn forward_traced(&self, tape: &mut Tape, x: Var, t: &[u32], y: &[u32]) -> Result<Trace> {
        let mut blocks = Vec::new();
        let trace = self.run(tape, x, t, y, |out| blocks.push(out))?;
        Ok(Trace { blocks, ..trace })
    }

    fn run(&self, tape: &mut Tape, x: Var, t: &[u32], y: &[u32], mut each_block: impl FnMut(Var)) -> Result<Trace> {
        let (config, c) = (&self.config, self.config.hidden_size);
        let (side, batch) = (config.input_size, t.len());
        let expected = [batch, config.in_channels, side, side];
        if tape.shape(x) != expected || y.len() != batch {
            let what = format!("images are {:?} with {} labels, expected {expected:?}", tape.shape(x), y.len());
            return Err(Error::Shape { operation: "DiT", what });
        }
        if let Some(t) = t.iter().find(|&&t| t as usize >= TASKS) {
            return Err(Error::Shape { operation: "DiT", what: format!("timestep {t} is outside 0..{TASKS}") });
        }
        let rows = config.label_rows();
        if let Some(label) = y.iter().find(|&&label| label as usize >= rows) {
            let null = if config.null_class { "" } else { ", as this model has no null class" };
            return Err(Error::Shape { operation: "DiT", what: format!("label {label} is outside 0..{rows}{null}") });
        }
        let (found, needed) = (tape.weights_len(), self.layout.len());
        if found < needed {
            let what = format!("the tape has {found} weights, but the model {needed} parameters");
            return Err(Error::Shape { operation: "DiT", what });
        }
        let windows = tape.windows(t.iter().map(|&t| self.windows[t as usize]));
        let all = tape.windows(t.iter().map(|_| Window::all(c)));
        let written = if config.routing == Routing::Sublayer { windows } else { all };
        let route = Route { active: windows, written };

        let (t_emb, t_freq) = timestep_embed(tape, t, self.t_embedder[0], self.t_embedder[1])?; // [B, C]
        let condition = label_embed(tape, t_emb, self.y_embedder, y)?; // [B, C]
        let modulation = modulation(tape, condition, self.modulation)?; // [B, M]
        let mark = tape.mark();
        let x_embed = patch_embed(tape, x, self.x_embedder, &self.positions, config.patch_size)?; // [B, T, C]
        let mut stream = x_embed;
        for (index, &block) in self.blocks.iter().enumerate() {
            let through_block = |tape: &mut Tape, x: Var| match self.checkpoint_activations {
                true => tape.checkpointed(move |tape| block.forward(tape, x, modulation, route)),
                false => block.forward(tape, x, modulation, route),
            };
            stream = match self.masks.get(index) {
                None => through_block(tape, stream)?,
                Some(masks) => {
                    let mask = tape.gather(masks, t, c);
                    let masked = channel_mask(tape, None, stream, mask, Keep::Active)?;
                    let inside = through_block(tape, masked)?;
                    channel_mask(tape, Some(inside), stream, mask, Keep::Inactive)?
                }
            };
            each_block(stream);
            tape.release_since(mark, stream);
        }
        let [shift, scale] =
            std::array::from_fn(|i| PerSample { var: modulation, offset: self.modulation.outputs - (2 - i) * c });
        let patches = ln_linear(tape, stream, all, shift, scale, self.final_layer, Activation::None)?; // [B, T, p p OC]
        let out = unpatchify(tape, patches, config.out_channels(), side, side, config.patch_size)?;
        Ok(Trace { t_freq, t_emb, condition, x_embed, blocks: Vec::new(), out })
    }
}

/// The adaLN layers of all blocks and the final layer, side by side, so that one product computes them all.
fn push_modulation(layout: &mut Layout, depth: usize, c: usize) -> Linear {
    let names = || (0..depth).map(|i| (format!("blocks.{i}"), 6 * c)).chain([("final_layer".into(), 2 * c)]);
    let outputs = 6 * c * depth + 2 * c;
    let mut push = |kind: &str, inputs: &[usize]| {
        let offset = layout.len();
        for (name, rows) in names() {
            layout.push(format!("{name}.adaLN_modulation.1.{kind}"), &[&[rows], inputs].concat());
        }
        Param { offset, len: layout.len() - offset }
    };
    Linear { weight: push("weight", &[c]), bias: push("bias", &[]), inputs: c, outputs }
}
