//! The whole model as a plain implementation computes it: the references of the operations, one after the other, forward and
//! backward. In f64 it is the truth; on tensors in bf16 its error is the measure for the kernels' ([`crate::parity`]).

use super::dit::Dit;
use crate::error::{Error, Result};
use crate::ops::attention;
use crate::ops::channel_mask::{self, Keep};
use crate::ops::label_embed;
use crate::ops::linear_residual;
use crate::ops::ln_linear::{self, Activation};
use crate::ops::modulation;
use crate::ops::patch_embed;
use crate::ops::real::Real;
use crate::ops::timestep_embed;
use crate::ops::unpatchify;
use crate::routing::{Routing, Window};

/// What a forward pass computes.
pub struct Trace<R> {
    /// `[B, 256]`
    pub t_freq: Vec<R>,
    /// `[B, C]`
    pub t_emb: Vec<R>,
    /// `[B, C]`
    pub condition: Vec<R>,
    /// `[B, T, C]`
    pub x_embed: Vec<R>,
    /// Output of each block `[B, T, C]`.
    pub blocks: Vec<Vec<R>>,
    /// `[B, OC, H, W]`
    pub out: Vec<R>,
    modulation: Vec<R>, // [B, M]
    inside: Vec<Inside<R>>,
}

/// Gradients of `sum(out * upstream)`.
pub struct Gradients<R> {
    /// Of the weights, in the layout's order.
    pub weights: Vec<R>,
    /// Of the images.
    pub x: Vec<R>,
}

/// What backward reads of a block.
struct Inside<R> {
    x: Vec<R>,    // [B, T, C], masked in random routing
    mask: Vec<R>, // [B, C], random routing only
    qkv: Vec<R>,  // [B, T, 3C]
    a: Vec<R>,    // [B, T, C]
    x1: Vec<R>,   // [B, T, C]
    h: Vec<R>,    // [B, T, H]
}

/// A model with weights, a batch, and its windows.
pub struct Reference<'a, R> {
    dit: &'a Dit,
    weights: Vec<R>, // as products read them, biases in full
    x: &'a [R],      // [B, IC, H, W]
    t: &'a [u32],
    y: &'a [u32],
    active: Vec<Window>,
    all: Vec<Window>,
}

impl<'a, R: Real> Reference<'a, R> {
    /// The model `dit` on images `x` `[B, IC, H, W]` at timesteps `t` with labels `y`.
    ///
    /// # Errors
    /// When sizes do not fit.
    pub fn new(dit: &'a Dit, weights: &[f32], x: &'a [R], t: &'a [u32], y: &'a [u32]) -> Result<Self> {
        let config = &dit.config;
        let expected = t.len() * config.in_channels * config.input_size * config.input_size;
        if x.len() != expected || y.len() != t.len() || weights.len() != dit.layout.len() {
            let what =
                format!("{} numbers, {} timesteps, {} labels, {} weights", x.len(), t.len(), y.len(), weights.len());
            return Err(Error::Shape { operation: "reference of DiT", what });
        }
        let mut own: Vec<R> = weights.iter().map(|&w| R::from_f64(f64::from(w))).collect();
        for entry in dit.layout.entries().iter().filter(|entry| !entry.name.ends_with("bias")) {
            own[entry.param.range()].iter_mut().for_each(|w| *w = w.stored());
        }
        let active = t.iter().map(|&t| dit.windows()[t as usize]).collect();
        let all = vec![Window::all(config.hidden_size); t.len()];
        Ok(Reference { dit, weights: own, x, t, y, active, all })
    }

    fn range(&self, name: &str) -> std::ops::Range<usize> {
        self.dit.layout.get(name).unwrap_or_else(|| panic!("a DiT has {name}")).param.range()
    }

    fn weight(&self, name: &str) -> &[R] {
        &self.weights[self.range(name)]
    }

    fn written(&self) -> &[Window] {
        if self.dit.config.routing == Routing::Sublayer { &self.active } else { &self.all }
    }

    fn heads(&self) -> attention::Dims {
        let config = &self.dit.config;
        attention::Dims { b: self.t.len(), t: config.tokens(), c: config.hidden_size, heads: config.num_heads }
    }

    fn patches(&self) -> patch_embed::Dims {
        let config = &self.dit.config;
        patch_embed::Dims {
            batch: self.t.len(),
            image_channels: config.in_channels,
            height: config.input_size,
            width: config.input_size,
            patch: config.patch_size,
        }
    }

    fn timestep_weights(&self) -> timestep_embed::reference::Weights<'_, R> {
        timestep_embed::reference::Weights {
            w0: self.weight("t_embedder.mlp.0.weight"),
            b0: self.weight("t_embedder.mlp.0.bias"),
            w2: self.weight("t_embedder.mlp.2.weight"),
            b2: self.weight("t_embedder.mlp.2.bias"),
        }
    }

    /// Weight or bias of the adaLN layers of all blocks and the final layer, which lie side by side.
    fn modulation_range(&self, kind: &str) -> std::ops::Range<usize> {
        let first = self.range(&format!("blocks.0.adaLN_modulation.1.{kind}"));
        first.start..self.range(&format!("final_layer.adaLN_modulation.1.{kind}")).end
    }

    /// C columns of the modulation from `at` on, `[B, C]`.
    fn columns(&self, modulation: &[R], at: usize) -> Vec<R> {
        let (c, m) = (self.dit.config.hidden_size, modulation.len() / self.t.len());
        modulation.chunks_exact(m).flat_map(|row| row[at..at + c].to_vec()).collect()
    }

    fn add_columns(&self, modulation: &mut [R], at: usize, columns: &[R]) {
        let (c, m) = (self.dit.config.hidden_size, modulation.len() / self.t.len());
        for (row, columns) in modulation.chunks_exact_mut(m).zip(columns.chunks_exact(c)) {
            row[at..at + c].iter_mut().zip(columns).for_each(|(sum, &x)| *sum += x);
        }
    }

    /// The inputs of an [`ln_linear`] with `vectors` shift and scale.
    fn normalised<'b>(
        &'b self,
        layer: &str,
        x: &'b [R],
        read: &'b [Window],
        vectors: &'b [Vec<R>; 2],
        activation: Activation,
    ) -> ln_linear::reference::Inputs<'b, R> {
        ln_linear::reference::Inputs {
            x,
            read,
            shift: &vectors[0],
            scale: &vectors[1],
            weight: self.weight(&format!("{layer}.weight")),
            bias: self.weight(&format!("{layer}.bias")),
            activation,
            tokens: self.dit.config.tokens(),
            channels: self.dit.config.hidden_size,
        }
    }

    fn residual<'b>(
        &'b self,
        layer: &str,
        a: &'b [R],
        gate: &'b [R],
        (base, base_window): (&'b [R], &'b [Window]),
        bypass: Option<(&'b [R], &'b [Window])>,
    ) -> linear_residual::reference::Inputs<'b, R> {
        linear_residual::reference::Inputs {
            a,
            weight: self.weight(&format!("{layer}.weight")),
            bias: self.weight(&format!("{layer}.bias")),
            gate,
            base,
            base_window,
            bypass,
            write: self.written(),
            tokens: self.dit.config.tokens(),
        }
    }

    /// The six vectors of block `index`: shift, scale, gate, twice.
    fn vectors(&self, modulation: &[R], index: usize) -> [Vec<R>; 6] {
        let c = self.dit.config.hidden_size;
        std::array::from_fn(|i| self.columns(modulation, (6 * index + i) * c))
    }

    /// Everything up to the output.
    pub fn forward(&self) -> Trace<R> {
        let config = &self.dit.config;
        let (tokens, c) = (config.tokens(), config.hidden_size);
        let t_freq = self.t.iter().flat_map(|&t| timestep_embed::reference::waves(t)).collect();
        let t_emb = timestep_embed::reference::forward(self.t, &self.timestep_weights());
        let condition =
            label_embed::reference::forward(&t_emb, self.weight("y_embedder.embedding_table.weight"), self.y);
        let (weight, bias) =
            (&self.weights[self.modulation_range("weight")], &self.weights[self.modulation_range("bias")]);
        let modulation = modulation::reference::forward(&condition, weight, bias);
        let positions: Vec<R> = self.dit.positions().iter().map(|&p| R::from_f64(f64::from(p))).collect();
        let (weight, bias) = (self.weight("x_embedder.proj.weight"), self.weight("x_embedder.proj.bias"));
        let x_embed = patch_embed::reference::forward(self.x, weight, bias, &positions, self.patches());
        let (mut blocks, mut inside): (Vec<Vec<R>>, Vec<Inside<R>>) = Default::default();
        for index in 0..config.depth {
            let stream = blocks.last().unwrap_or(&x_embed);
            let mask = self.mask(index);
            let x = match mask.is_empty() {
                true => stream.clone(),
                false => channel_mask::reference::forward(None, stream, &mask, tokens, c, Keep::Active),
            };
            let (kept, mut out) = self.block(index, x, &modulation);
            if !mask.is_empty() {
                out = channel_mask::reference::forward(Some(&out), stream, &mask, tokens, c, Keep::Inactive);
            }
            blocks.push(out);
            inside.push(Inside { mask, ..kept });
        }
        let vectors = [0, 1].map(|i| self.columns(&modulation, (6 * config.depth + i) * c));
        let stream = blocks.last().unwrap_or(&x_embed);
        let last = self.normalised("final_layer.linear", stream, &self.all, &vectors, Activation::None);
        let patches = ln_linear::reference::forward(&last);
        let (side, patch) = (config.input_size, config.patch_size);
        let out = unpatchify::reference::forward(&patches, self.t.len(), config.out_channels(), side, side, patch);
        Trace { t_freq, t_emb, condition, x_embed, blocks, out, modulation, inside }
    }

    /// The mask of random routing `[B, C]`; empty in the others.
    fn mask(&self, block: usize) -> Vec<R> {
        let c = self.dit.config.hidden_size;
        let rows = |masks: &'a Vec<f32>| self.t.iter().flat_map(|&t| &masks[t as usize * c..][..c]);
        self.dit.masks().get(block).into_iter().flat_map(rows).map(|&m| R::from_f64(f64::from(m))).collect()
    }

    fn block(&self, index: usize, x: Vec<R>, modulation: &[R]) -> (Inside<R>, Vec<R>) {
        let layer = |name: &str| format!("blocks.{index}.{name}");
        let [shift1, scale1, gate1, shift2, scale2, gate2] = self.vectors(modulation, index);
        let (first, second) = ([shift1, scale1], [shift2, scale2]);
        let qkv = ln_linear::reference::forward(&self.normalised(
            &layer("attn.qkv"),
            &x,
            &self.active,
            &first,
            Activation::None,
        ));
        let a = stored(attention::reference::forward(&qkv, self.heads()));
        let base = (&x[..], &self.active[..]);
        let x1 = linear_residual::reference::forward(&self.residual(&layer("attn.proj"), &a, &gate1, base, None));
        let fc1 = layer("mlp.fc1");
        let h = ln_linear::reference::forward(&self.normalised(&fc1, &x1, self.written(), &second, Activation::Gelu));
        let base = (&x1[..], self.written());
        let bypass = Some((&x[..], &self.active[..]));
        let out = linear_residual::reference::forward(&self.residual(&layer("mlp.fc2"), &h, &gate2, base, bypass));
        (Inside { x, mask: Vec::new(), qkv, a, x1, h }, out)
    }

    /// Gradients of `sum(out * upstream)`.
    pub fn backward(&self, trace: &Trace<R>, upstream: &[R]) -> Gradients<R> {
        let config = &self.dit.config;
        let (b, tokens, c) = (self.t.len(), config.tokens(), config.hidden_size);
        let mut grads = vec![R::zero(); self.weights.len()];
        let mut put = |name: &str, values: &[R]| grads[self.range(name)].copy_from_slice(values);
        let mut dmodulation = vec![R::zero(); trace.modulation.len()];

        let dpatches = stored(self.patchify(upstream));
        let vectors = [0, 1].map(|i| self.columns(&trace.modulation, (6 * config.depth + i) * c));
        let stream = trace.blocks.last().unwrap_or(&trace.x_embed);
        let last = self.normalised("final_layer.linear", stream, &self.all, &vectors, Activation::None);
        let of_last = ln_linear::reference::backward(&last, &dpatches);
        put("final_layer.linear.weight", &of_last.dweight);
        put("final_layer.linear.bias", &of_last.dbias);
        self.add_columns(&mut dmodulation, 6 * config.depth * c, &of_last.dshift);
        self.add_columns(&mut dmodulation, (6 * config.depth + 1) * c, &of_last.dscale);
        let mut dstream = of_last.dx;
        for (index, inside) in trace.inside.iter().enumerate().rev() {
            let dinside = self.block_backward(index, inside, &trace.modulation, &mut dmodulation, &dstream, &mut put);
            dstream = match inside.mask.is_empty() {
                true => dinside,
                false => {
                    let part = |d: &[R], keep| channel_mask::reference::forward(None, d, &inside.mask, tokens, c, keep);
                    sum(&part(&dinside, Keep::Active), &part(&dstream, Keep::Inactive))
                }
            };
        }
        let weight = self.weight("x_embedder.proj.weight");
        let (dx, dweight, dbias) = patch_embed::reference::backward(self.x, weight, &dstream, self.patches());
        put("x_embedder.proj.weight", &dweight);
        put("x_embedder.proj.bias", &dbias);

        let outputs = dmodulation.len() / b;
        let (weight, bias) = (self.modulation_range("weight"), self.modulation_range("bias"));
        let (dcondition, dweight, dbias) =
            modulation::reference::backward(&trace.condition, &self.weights[weight.clone()], &dmodulation, outputs);
        let dtable = label_embed::reference::backward(config.label_rows(), self.y, &dcondition);
        put("y_embedder.embedding_table.weight", &dtable);
        let of_t = timestep_embed::reference::backward(self.t, &self.timestep_weights(), &dcondition);
        put("t_embedder.mlp.0.weight", &of_t.dw0);
        put("t_embedder.mlp.0.bias", &of_t.db0);
        put("t_embedder.mlp.2.weight", &of_t.dw2);
        put("t_embedder.mlp.2.bias", &of_t.db2);
        grads[weight].copy_from_slice(&dweight);
        grads[bias].copy_from_slice(&dbias);
        Gradients { weights: grads, x: dx }
    }

    /// Gradient of the block's input; those of its weights go to `put`.
    fn block_backward(
        &self,
        index: usize,
        inside: &Inside<R>,
        modulation: &[R],
        dmodulation: &mut [R],
        dout: &[R],
        put: &mut impl FnMut(&str, &[R]),
    ) -> Vec<R> {
        let Inside { x, qkv, a, x1, h, .. } = inside;
        let (layer, c) = (|name: &str| format!("blocks.{index}.{name}"), self.dit.config.hidden_size);
        let [shift1, scale1, gate1, shift2, scale2, gate2] = self.vectors(modulation, index);
        let (first, second) = ([shift1, scale1], [shift2, scale2]);
        let mut vector = |i: usize, d: &[R]| self.add_columns(dmodulation, (6 * index + i) * c, d);
        let mut linear = |name: &str, dweight: &[R], dbias: &[R]| {
            put(&layer(&format!("{name}.weight")), dweight);
            put(&layer(&format!("{name}.bias")), dbias);
        };

        let (base, bypass) = ((&x1[..], self.written()), Some((&x[..], &self.active[..])));
        let of_fc2 =
            linear_residual::reference::backward(&self.residual(&layer("mlp.fc2"), h, &gate2, base, bypass), dout);
        linear("mlp.fc2", &of_fc2.dweight, &of_fc2.dbias);
        vector(5, &of_fc2.dgate);
        let fc1 = layer("mlp.fc1");
        let of_fc1 = ln_linear::reference::backward(
            &self.normalised(&fc1, x1, self.written(), &second, Activation::Gelu),
            &of_fc2.da,
        );
        linear("mlp.fc1", &of_fc1.dweight, &of_fc1.dbias);
        vector(3, &of_fc1.dshift);
        vector(4, &of_fc1.dscale);
        let dx1 = sum(&of_fc2.dbase, &of_fc1.dx);

        let base = (&x[..], &self.active[..]);
        let of_proj =
            linear_residual::reference::backward(&self.residual(&layer("attn.proj"), a, &gate1, base, None), &dx1);
        linear("attn.proj", &of_proj.dweight, &of_proj.dbias);
        vector(2, &of_proj.dgate);
        let dqkv = stored(attention::reference::backward(qkv, &of_proj.da, self.heads()));
        let of_qkv = ln_linear::reference::backward(
            &self.normalised(&layer("attn.qkv"), x, &self.active, &first, Activation::None),
            &dqkv,
        );
        linear("attn.qkv", &of_qkv.dweight, &of_qkv.dbias);
        vector(0, &of_qkv.dshift);
        vector(1, &of_qkv.dscale);
        sum(&sum(&of_proj.dbase, &of_qkv.dx), &of_fc2.dbypass)
    }

    /// The gradient of the patches, given that of the image: the inverse of unpatchify's permutation.
    fn patchify(&self, dout: &[R]) -> Vec<R> {
        let config = &self.dit.config;
        let (side, patch) = (config.input_size, config.patch_size);
        let order: Vec<usize> = (0..dout.len()).collect();
        let from = unpatchify::reference::forward(&order, self.t.len(), config.out_channels(), side, side, patch);
        let mut dpatches = vec![R::zero(); dout.len()];
        from.iter().zip(dout).for_each(|(&place, &d)| dpatches[place] = d);
        dpatches
    }
}

fn stored<R: Real>(numbers: Vec<R>) -> Vec<R> {
    numbers.into_iter().map(R::stored).collect()
}

fn sum<R: Real>(a: &[R], b: &[R]) -> Vec<R> {
    a.iter().zip(b).map(|(&a, &b)| (a + b).stored()).collect()
}
