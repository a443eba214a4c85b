//! The model of a case: its weights, and what a pass over it gives.

use super::archive::{Archive, widen};
use super::report::{Check, Report};
use crate::autograd::cuda::{DeviceWeights, pass};
use crate::autograd::{Memory, Tape, Weights, infer};
use crate::backend::Compute;
use crate::backend::DType;
use crate::diffusion::ImageDims;
use crate::error::Result;
use crate::model::config::{ModelConfig, TASKS};
use crate::model::dit::Dit;
use crate::model::reference::Reference;
use crate::ops::real::{InBf16, Real};
use crate::rng::{Philox, Stream};
use crate::routing::Routing;

/// A model with its weights.
pub struct Network {
    /// The model.
    pub dit: Dit,
    /// Its weights, in the layout's order.
    pub weights: Vec<f32>,
    /// Gradients of the last backward pass, in the same order.
    pub grads: Vec<f32>,
    memory: Memory,
    how: Evaluation,
}

/// What evaluates a network.
#[derive(Clone)]
pub enum Evaluation {
    /// The operations under test.
    Fused(Compute),
    /// Plain loops in f64 over weights that are moved by some last bits of bf16, differently in each draw but 0.
    Truth {
        /// Number of the draw.
        draw: u64,
    },
    /// The same on tensors in bf16.
    PlainBf16 {
        /// Number of the draw.
        draw: u64,
    },
}

impl Evaluation {
    /// Whether this is a draw beyond the first.
    pub fn is_further_draw(&self) -> bool {
        matches!(self, Evaluation::Truth { draw: 1.. } | Evaluation::PlainBf16 { draw: 1.. })
    }
}

/// What a forward pass gives besides its output.
pub struct Traced {
    /// The output.
    pub out: Vec<f32>,
    /// Gradient of `sum(out * upstream)` with respect to the input.
    pub grad_x: Vec<f32>,
    /// Activations by name.
    pub activations: Vec<(String, Vec<f32>)>,
}

impl Network {
    /// The model of `config` with the weights of `params` and, for random routing, the masks of `routing`.
    ///
    /// # Errors
    /// When a tensor is missing or of another shape than the model's, or random routing has no masks.
    pub fn new(config: ModelConfig, params: &Archive, routing: Option<&Archive>, how: &Evaluation) -> Result<Self> {
        let mut dit = Dit::new(config)?;
        let mut weights = vec![0.0; dit.layout.len()];
        for entry in dit.layout.entries() {
            weights[entry.param.range()].copy_from_slice(&params.f32s_of(&entry.name, &entry.shape)?);
        }
        if dit.config.routing == Routing::Random {
            let Some(file) = routing else {
                return Err(params.error("belongs to random routing, so routing.safetensors must be beside it".into()));
            };
            dit.set_masks(masks(&dit.config, file)?)?;
        }
        if let Evaluation::Truth { draw } | Evaluation::PlainBf16 { draw } = *how {
            move_weights(&mut weights, draw);
        }
        let memory = if let Evaluation::Fused(compute) = how { Memory::on(compute) } else { Memory::new() };
        Ok(Network { dit, grads: vec![0.0; weights.len()], weights, memory, how: how.clone() })
    }

    /// Compares what the parameter file holds besides weights.
    pub fn check_params(&self, params: &Archive, report: &mut Report) -> Result<()> {
        for name in params.names() {
            let row = format!("{} {name}", params.stem);
            if name == "pos_embed" {
                let found = widen(self.dit.positions());
                report.compare(row, &found, &params.f64s(&name)?, |f, r| vec![Check::max(f, r, 1e-6)]);
            } else if self.dit.layout.get(&name).is_none() {
                report.fail(row, "is no parameter of this model".into());
            }
        }
        Ok(())
    }

    /// The size of one sample.
    pub fn dims(&self) -> ImageDims {
        let ModelConfig { in_channels, input_size, learn_sigma, .. } = self.dit.config;
        ImageDims { channels: in_channels, pixels: input_size * input_size, learn_sigma }
    }

    /// `[batch, IC, H, W]`.
    pub fn images(&self, batch: usize) -> [usize; 4] {
        let ModelConfig { in_channels, input_size, .. } = self.dit.config;
        [batch, in_channels, input_size, input_size]
    }

    /// The output for `x` `[t.len(), IC, H, W]`.
    ///
    /// # Errors
    /// When shapes do not fit, or a timestep or label is out of range.
    pub fn forward(&mut self, x: &[f32], t: &[u32], y: &[u32]) -> Result<Vec<f32>> {
        let images = self.images(t.len());
        let compute = match &self.how {
            Evaluation::Fused(compute) => compute,
            Evaluation::Truth { .. } => return plain_forward::<f64>(&self.dit, &self.weights, x, t, y),
            Evaluation::PlainBf16 { .. } => return plain_forward::<InBf16>(&self.dit, &self.weights, x, t, y),
        };
        let uploaded = uploaded(compute, &self.weights)?;
        let weights = uploaded.as_ref().map_or(Weights::Cpu(&self.weights), Weights::Cuda);
        infer(weights, &mut self.memory, |tape| {
            let x = tape.input(x, images, false)?;
            let out = self.dit.forward(tape, x, t, y)?;
            tape.read(out)
        })
    }

    /// The output, and the gradients of `sum(output * upstream(output))`: of the weights, left in [`Network::grads`], and of x.
    ///
    /// # Errors
    /// As [`Network::forward`], and whatever `upstream` returns.
    pub fn forward_backward(
        &mut self,
        x: &[f32],
        t: &[u32],
        y: &[u32],
        mut upstream: impl FnMut(&[f32]) -> Result<Vec<f32>>,
    ) -> Result<Traced> {
        let (images, dit) = (self.images(t.len()), &self.dit);
        let compute = match &self.how {
            Evaluation::Fused(compute) => compute,
            Evaluation::Truth { .. } => {
                return plain::<f64>(dit, &self.weights, &mut self.grads, x, t, y, &mut upstream);
            }
            Evaluation::PlainBf16 { .. } => {
                return plain::<InBf16>(dit, &self.weights, &mut self.grads, x, t, y, &mut upstream);
            }
        };
        let mut work = |tape: &mut Tape| {
            let input = tape.input(x, images, true)?;
            let trace = dit.forward_traced(tape, input, t, y)?;
            let out = tape.read(trace.out)?;
            let (t_emb, condition) = (tape.read(trace.t_emb)?, tape.read(trace.condition)?);
            let y_emb = condition.iter().zip(&t_emb).map(|(c, t)| c - t).collect();
            let named =
                [("t_freq", tape.read(trace.t_freq)?), ("x_embed", tape.read(trace.x_embed)?), ("y_emb", y_emb)];
            let named = named.into_iter().chain([("t_emb", t_emb), ("c", condition)]);
            let mut activations: Vec<_> = named.map(|(name, v)| (name.to_string(), v)).collect();
            for (i, &var) in trace.blocks.iter().enumerate() {
                activations.push((format!("block{i}"), tape.read(var)?));
            }
            tape.backward(trace.out, &upstream(&out)?)?;
            let grad_x = tape.read_gradient(input)?.unwrap_or_default();
            Ok(Traced { out, grad_x, activations })
        };
        let Some(weights) = uploaded(compute, &self.weights)? else {
            return work(&mut Tape::new(&self.weights, &mut self.grads, false, &mut self.memory));
        };
        let grads = weights.device().alloc(self.grads.len(), DType::F32)?;
        let traced = pass(&weights, Some((&grads, false)), &mut self.memory, work)?;
        self.grads = weights.device().download(&grads)?;
        Ok(traced)
    }

    /// Elements of the K third of `blocks.*.attn.qkv.bias`, whose true gradient is 0: a constant added to all keys leaves
    /// the softmax as it is. `None` for other parameters.
    pub fn key_bias(&self, parameter: &str) -> Option<std::ops::Range<usize>> {
        let c = self.dit.config.hidden_size;
        parameter.ends_with(".attn.qkv.bias").then_some(c..2 * c)
    }
}

/// Moves every weight by up to two last bits of bf16.
fn move_weights(weights: &mut [f32], draw: u64) {
    if draw > 0 {
        let mut random = vec![0.0; weights.len()];
        Philox::new(draw, Stream::Noise).symmetric(&mut random, 2.0 / 128.0, 0, 0);
        weights.iter_mut().zip(random).for_each(|(w, r)| *w *= 1.0 + r);
    }
}

fn cast<R: Real>(numbers: &[f32]) -> Vec<R> {
    numbers.iter().map(|&x| R::from_f64(f64::from(x))).collect()
}

fn narrow<R: Real>(numbers: &[R]) -> Vec<f32> {
    numbers.iter().map(|x| x.to_f64() as f32).collect()
}

fn plain_forward<R: Real>(dit: &Dit, weights: &[f32], x: &[f32], t: &[u32], y: &[u32]) -> Result<Vec<f32>> {
    Ok(narrow(&Reference::<R>::new(dit, weights, &cast(x), t, y)?.forward().out))
}

/// [`Network::forward_backward`] in plain loops.
fn plain<R: Real>(
    dit: &Dit,
    weights: &[f32],
    grads: &mut [f32],
    x: &[f32],
    t: &[u32],
    y: &[u32],
    upstream: &mut impl FnMut(&[f32]) -> Result<Vec<f32>>,
) -> Result<Traced> {
    let x = cast::<R>(x);
    let reference = Reference::new(dit, weights, &x, t, y)?;
    let trace = reference.forward();
    let out = narrow(&trace.out);
    let found = reference.backward(&trace, &cast(&upstream(&out)?));
    grads.copy_from_slice(&narrow(&found.weights));
    let (t_emb, c) = (narrow(&trace.t_emb), narrow(&trace.condition));
    let y_emb = c.iter().zip(&t_emb).map(|(c, t)| c - t).collect();
    let named = [("t_freq", narrow(&trace.t_freq)), ("x_embed", narrow(&trace.x_embed)), ("y_emb", y_emb)];
    let named = named.into_iter().chain([("t_emb", t_emb), ("c", c)]);
    let mut activations: Vec<_> = named.map(|(name, v)| (name.to_string(), v)).collect();
    activations.extend(trace.blocks.iter().enumerate().map(|(i, block)| (format!("block{i}"), narrow(block))));
    Ok(Traced { out, grad_x: narrow(&found.x), activations })
}

/// The weights on the device, where there is one.
fn uploaded(compute: &Compute, weights: &[f32]) -> Result<Option<DeviceWeights>> {
    match compute {
        Compute::Cpu { .. } => Ok(None),
        Compute::Cuda { device, elem } => DeviceWeights::upload(device, weights, *elem).map(Some),
    }
}

/// `blocks.N.mask` `[TASKS, C]` of 0 and 1, one a block.
fn masks(config: &ModelConfig, file: &Archive) -> Result<Vec<Vec<f32>>> {
    let shape = [TASKS, config.hidden_size];
    let mask = |block| {
        let name = format!("blocks.{block}.mask");
        let mask = file.f32s_of(&name, &shape)?;
        match mask.iter().find(|&&v| v != 0.0 && v != 1.0) {
            Some(bad) => Err(file.error(format!("tensor '{name}' holds {bad}, but a mask is 0 or 1"))),
            None => Ok(mask),
        }
    };
    (0..config.depth).map(mask).collect()
}
